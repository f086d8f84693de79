"""Processes that share work: nothing is lost, nothing is done twice, nothing waits for the dead."""

import errno
import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
from tqdm import tqdm

from mmlib import claims
from mmlib.claims import cache_folder, claim, clear_partial, helped, is_helper, remove_locks, share
from mmlib.data.content import write_whole


def start(code, *arguments, **options):
    """Start Python code in a process of its own."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, text=True, stdout=subprocess.PIPE, **options)


# -- locks ---------------------------------------------------------------------------------------------------

HOLD = """
import sys, time
from pathlib import Path
from mmlib.claims import claim
with claim(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def test_claim_of_another_process_is_respected_until_it_is_killed(tmp_path):
    path = tmp_path / "locks" / "one.lock"
    process = start(HOLD, path)
    assert process.stdout.readline() == "held\n"
    with claim(path, 0) as held:
        assert not held
    remove_locks(path.parent)
    assert path.exists()
    process.kill()
    process.wait()
    with claim(path, 0) as held:
        assert held
    remove_locks(path.parent)
    assert not path.exists()


def test_claim_is_given_back_after_an_error(tmp_path):
    with pytest.raises(KeyError):
        with claim(tmp_path / "lock"):
            raise KeyError
    with claim(tmp_path / "lock", 0) as held:
        assert held


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL])
def test_folder_without_flock_is_refused_at_once_by_name(tmp_path, monkeypatch, number):
    fcntl = pytest.importorskip("fcntl")

    def missing(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", missing)
    with pytest.raises(ValueError, match=f"^{tmp_path / 'locks'}: .*{os.strerror(number)}"):
        with claim(tmp_path / "locks" / "one.lock"):
            pytest.fail("it was claimed")
    assert [*(tmp_path / "locks").iterdir()] == []


def test_cache_that_cannot_be_written_is_named_with_the_variable(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("MMLIB_CACHE", str(tmp_path / "file"))
    with pytest.raises(ValueError, match=f"^{tmp_path / 'file' / 'locks'}: .*MMLIB_CACHE"):
        with claim(cache_folder() / "locks" / "one.lock"):
            pytest.fail("it was claimed")


# -- the cache -----------------------------------------------------------------------------------------------


def test_cache_lies_where_the_environment_says(tmp_path, monkeypatch):
    monkeypatch.setenv("MMLIB_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path
    monkeypatch.delenv("MMLIB_CACHE")
    assert cache_folder().name == "mmlib"


@pytest.mark.parametrize("named, found", [("~/there", "home/there"), ("~", "home"), ("here/there", "here/there")])
def test_home_and_relative_folders_are_meant_as_such(tmp_path, monkeypatch, named, found):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("MMLIB_CACHE", named)
    assert cache_folder() == tmp_path / found


def test_home_of_nobody_is_refused(monkeypatch):
    monkeypatch.setenv("MMLIB_CACHE", "~nobody-of-that-name/mmlib")
    with pytest.raises(ValueError, match="MMLIB_CACHE.*~nobody-of-that-name"):
        cache_folder()


# -- files ---------------------------------------------------------------------------------------------------


def test_failed_write_keeps_what_was_there(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    write_whole(tmp_path / "file", b"before")
    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        write_whole(tmp_path / "file", b"after")
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("file", b"before")]


@pytest.mark.parametrize("umask", [0o022, 0o007])
def test_file_is_written_with_the_permissions_of_any_other(tmp_path, umask):
    before = os.umask(umask)
    try:
        write_whole(tmp_path / "one", b"")
        (tmp_path / "other").touch()
    finally:
        os.umask(before)
    assert (tmp_path / "one").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_only_what_is_half_written_of_a_file_is_removed(tmp_path):
    for name in (".a.json.partial-1", ".b.json.partial-1", "a.json"):
        (tmp_path / name).touch()
    (tmp_path / ".a.json.partial-2").mkdir()
    clear_partial(tmp_path / "a.json")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".b.json.partial-1", "a.json"]


# -- sharing -------------------------------------------------------------------------------------------------


def test_claimed_tasks_are_passed_over_and_come_back():
    tried, claimed = [], {"a": 2, "c": 1}  # how often each is found claimed

    def attempt(task, wait):
        tried.append((task, wait))
        claimed[task] = claimed.get(task, 0) - 1
        return (1, None) if claimed[task] < 0 else (0, task)

    assert list(share(["a", "b", "c"], attempt)) == [0, 1, 0, 0, 1, 1]
    assert tried == [("a", 0), ("b", 0), ("c", 0), ("a", 0), ("c", 0), ("a", 0)]


def test_claims_are_waited_for_when_nothing_else_is_left():
    waits = []

    def attempt(task, wait):
        waits.append(wait)
        return (1, None) if len(waits) > 2 else (0, task)

    list(share(["a"], attempt))
    assert waits == [0, claims.PATIENCE, claims.PATIENCE]


def test_what_others_have_of_a_task_is_attempted_again():
    tried = []

    def attempt(task, wait):
        tried.append(task)
        return (len(task) - 1, task[1:]) if len(task) > 1 else (1, [])

    assert list(share(["abc"], attempt)) == [2, 1, 1] and tried == ["abc", "bc", "c"]


# -- helpers -------------------------------------------------------------------------------------------------


def note(folder):
    """Leave a folder that says which process was here, and stay."""
    (folder / f"{os.getpid()}.{is_helper()}").mkdir()
    time.sleep(600)


def is_running(process):
    """A process that nobody has asked for its status is a zombie, and runs no more."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_for(condition, what):
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.01)


def test_helpers_end_with_the_block_that_they_help(tmp_path):
    with pytest.raises(KeyError):
        with helped(2, partial(note, tmp_path)):
            wait_for(lambda: len([*tmp_path.iterdir()]) == 2, "a helper does not start")
            raise KeyError
    assert [path.suffix for path in tmp_path.iterdir()] == [".True", ".True"] and not is_helper()
    assert not any(is_running(path.stem) for path in tmp_path.iterdir())


def fail(folder):
    for _ in tqdm(range(2), disable=True):
        (folder / "failed").touch()
    raise ValueError("said by nobody")


FAILED = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from test_claims import fail, helped, partial, wait_for
if __name__ == "__main__":
    with helped(1, partial(fail, Path(sys.argv[2]))):
        wait_for((Path(sys.argv[2]) / "failed").exists, "the helper does not start")
"""


def test_helper_that_fails_or_is_ended_is_not_heard(tmp_path):
    process = start(FAILED, Path(__file__).parent, tmp_path, stderr=subprocess.PIPE)
    assert process.communicate(timeout=120) == ("", "") and process.returncode == 0


ORPHANS = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from test_claims import helped, note, partial
if __name__ == "__main__":
    with helped(2, partial(note, Path(sys.argv[2]))):
        time.sleep(600)
"""


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="/proc says whether a process runs")
def test_helpers_end_with_the_process_that_they_help(tmp_path):
    parent = start(ORPHANS, Path(__file__).parent, tmp_path)
    wait_for(lambda: len([*tmp_path.iterdir()]) == 2, "a helper does not start")
    both = [path.stem for path in tmp_path.iterdir()]
    assert str(parent.pid) not in both and all(map(is_running, both))
    parent.kill()
    parent.wait()
    wait_for(lambda: not any(map(is_running, both)), "a helper outlives the process")
