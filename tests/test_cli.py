import errno
import hashlib
import json
import os
import pickle
import re
import shlex
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import typer
from typer.testing import CliRunner

from mmlib import cli, records
from mmlib.data import public, sources, writer
from mmlib.data.iqiyi import pickle_path
from mmlib.data.simulate import PROFILES
from mmlib.data.store import ClipStore
from mmlib.experiment import Experiment
from mmlib.systems import SYSTEMS

SMALL = ["--profile", "tiny", "--set", "identities=12"]
COMMANDS = typer.main.get_command(cli.app).commands
# A shell may start its background jobs with interrupts ignored, and Python keeps that.
MAIN = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); from mmlib.cli import main; main()"


def run(*arguments):
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def succeed(*arguments):
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return result.stdout.splitlines()


def assert_refused(message, *arguments, status=1):
    """The command says one line that matches `message` on standard error, and nothing else."""
    result = run(*arguments)
    assert result.exit_code == status
    assert re.fullmatch(f"mmlib: error: .*{message}.*\n", result.stderr), result.stderr
    assert result.stdout == ""


def start(folder, *arguments, **options):
    """Start the command line in a process of its own, its output buffered."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": ""}
    return subprocess.Popen(
        [sys.executable, "-c", MAIN, *arguments],
        cwd=folder,
        text=True,
        env=environment,
        **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options,
    )


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


# Help and usage


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_an_example_that_parses(name):
    examples = [shlex.split(line) for line in succeed(name, "--help") if line.lstrip().startswith("mmlib ")]
    assert examples
    for _, command, *arguments in examples:
        assert command == name
        COMMANDS[name].make_context(name, arguments)


def test_help_imports_no_large_library(tmp_path):
    large = {"torch", "pandas", "numpy", "rich.console", "papermill"}
    code = f"import sys, mmlib.cli; print({large} & {{*sys.modules}})"
    assert subprocess.check_output([sys.executable, "-c", code], cwd=tmp_path, text=True) == "set()\n"


def test_profiles_are_those_of_the_simulator():
    assert [*cli.data.Profile] == [*PROFILES]


def test_systems_are_those_of_the_library():
    assert [*cli.study.System] == [*SYSTEMS]


@pytest.mark.parametrize(
    "arguments",
    [
        ["simulate", "store", "--profile", "huge"],
        ["simulate", "store", "--seed", "-1"],
        ["simulate"],
        ["simulat"],
        ["import-features", "table.csv", "array.bin", "store", "--width", "0"],
        ["evaluate", "val_gt.txt"],
        ["evaluate", "store", "val_gt.txt", "result.txt"],
        ["predict", "store", "--system", "two-name"],
        ["predict", "store", "--epochs", "0"],
    ],
)
def test_wrong_usage_has_status_2(tmp_path, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    assert run(*arguments).exit_code == 2
    assert names_in(tmp_path) == []


# Simulate and import the challenge's files


@pytest.fixture(scope="module")
def simulated(tmp_path_factory):
    """A small world as a store, `direct`, and as the challenge's files, `official`, with what was printed."""
    folder = tmp_path_factory.mktemp("simulated")
    printed = [
        succeed("simulate", folder / name, *SMALL, "--seed", 5, *option)
        for name, option in (("direct", []), ("official", ["--as-official"]))
    ]
    assert names_in(folder) == ["direct", "official"]
    assert names_in(folder / "official") == ["feat", "origin.json", "train_gt.txt", "val_gt.txt"]
    return folder, *printed


def test_simulate_prints_counts_and_that_it_is_simulated(simulated):
    folder, printed, _ = simulated
    store = ClipStore.open(folder / "direct")
    val = store.clips[store.clips["split"] == "val"]
    assert printed[0] == f"clips: {len(store.clips)}, {len(store.clips) - len(val)} train and {len(val)} val"
    assert printed[1].startswith(f"frames: {store.modalities['face'].count.sum()} face, ")
    assert printed[2:4] == ["identities: 12", f"distractors: {(val['identity'] < 0).sum()}"]
    assert printed[4].startswith("simulated: profile tiny, seed 5;")
    assert store.meta["provenance"]["seed"] == 5 and store.meta["provenance"]["settings"]["identities"] == 12


def test_official_files_hold_what_the_store_holds(simulated, tmp_path):
    folder, printed, printed_official = simulated
    assert printed_official == printed
    report = succeed("import-iqiyi", folder / "official", tmp_path / "store")
    direct, imported = ClipStore.open(folder / "direct"), ClipStore.open(tmp_path / "store")
    assert all(imported.meta[key] == direct.meta[key] for key in ("schema", "simulated", "provenance"))
    assert imported.identities.tolist() == direct.identities.tolist()
    columns = ["clip", "split", "identity"]
    pd.testing.assert_frame_equal(imported.clips[columns], direct.clips[columns])
    assert imported.modalities.keys() == direct.modalities.keys()
    for name, mine in imported.modalities.items():
        theirs = direct.modalities[name]
        assert "{}: {} frames of {} dimensions".format(name, *theirs.feature.shape) in report
        np.testing.assert_array_equal(mine.count, theirs.count)
        assert mine.columns.keys() == theirs.columns.keys() - {"wrong"}
        for clip, count in enumerate(mine.count):
            here, there = (slice(m.start[clip], m.start[clip] + count) for m in (mine, theirs))
            np.testing.assert_array_equal(mine.feature[here], theirs.feature[there])
            for column, values in mine.columns.items():
                np.testing.assert_array_equal(values[here], theirs.columns[column][there])


@pytest.mark.parametrize("option", [[], ["--as-official"]])
def test_what_exists_is_replaced_only_when_told(tmp_path, option):
    target = tmp_path / "out"
    succeed("simulate", target, *SMALL, *option)
    before = {path: path.read_bytes() for path in target.rglob("*") if path.is_file()}
    assert_refused("out: exists already", "simulate", target, *SMALL, "--seed", 1, *option)
    assert {path: path.read_bytes() for path in target.rglob("*") if path.is_file()} == before
    succeed("simulate", target, *SMALL, "--seed", 1, "--overwrite", *option)
    assert {path: path.read_bytes() for path in target.rglob("*") if path.is_file()} != before
    assert names_in(tmp_path) == ["out"]


@pytest.mark.parametrize(
    "setting, message",
    [
        ("contamined=0.3", "no setting named contamined; there are identities, contaminated, .*, warp, "),
        ("contaminated=many", "--set contaminated must be a finite number, got 'many'"),
        ("contaminated=nan", "--set contaminated must be a finite number, got 'nan'"),
        ("contaminated=2", "contaminated must be a number in .0, 1., got 2.0"),
        ("identities=12.5", "--set identities must be a whole number, got '12.5'"),
        ("contaminated", "--set contaminated: expected NAME=VALUE"),
        ("warp=2", "--set warp: given twice, '1' and '2'"),
    ],
)
def test_a_bad_setting_is_named(tmp_path, setting, message):
    assert_refused(message, "simulate", tmp_path / "store", "--set", "warp=1", "--set", setting)
    assert names_in(tmp_path) == []


@pytest.fixture
def official(simulated, tmp_path):
    """A folder of the challenge's files to spoil."""
    folder = tmp_path / "official"
    (folder / "feat").mkdir(parents=True)
    for name in ("train_gt.txt", "val_gt.txt", "feat/face_train_v2.pickle", "feat/face_val_v2.pickle"):
        (folder / name).write_bytes((simulated[0] / "official" / name).read_bytes())
    return folder


def test_a_truncated_pickle_leaves_no_store(official):
    path = pickle_path(official, "face", "val")
    path.write_bytes(path.read_bytes()[:100_000])
    assert_refused("face_val_v2.pickle: .*100,?000", "import-iqiyi", official, official.parent / "store")
    assert names_in(official.parent) == ["official"]


def test_a_pickle_that_calls_the_system_is_refused_unexecuted(official):
    canary = official.parent / "canary"
    pickle_path(official, "face", "val").write_bytes(f"cos\nsystem\n(S'touch {canary}'\ntR.".encode())
    assert_refused(r"face_val_v2.pickle: .*os.system", "import-iqiyi", official, official.parent / "store")
    assert names_in(official.parent) == ["official"]


def test_bad_records_stop_the_import_unless_told_to_skip_them(official):
    path = pickle_path(official, "face", "val")
    clips = pickle.loads(path.read_bytes(), encoding="bytes")
    clip = next(clip for clip, records in clips.items() if len(records) > 1)
    clips[clip][0][1] = [float("nan"), 0.0, 1.0, 1.0]
    path.write_bytes(pickle.dumps(clips, protocol=2))
    store = official.parent / "store"
    assert_refused(f"face_val_v2.pickle.*{clip.decode()}.*nan", "import-iqiyi", official, store)
    report = succeed("import-iqiyi", official, store, "--skip-bad-records")
    assert any(line.startswith("refused: 1 records") and clip.decode() in line for line in report)


# What may happen to any command


class FullDisk:
    """Stand in for `ArrayStream.append` on a disk that is full after a few blocks."""

    def __init__(self, monkeypatch, blocks=7):
        self.blocks, append = blocks, writer.ArrayStream.append

        def append_or_fail(stream, block):
            self.blocks -= 1
            if self.blocks < 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            append(stream, block)

        monkeypatch.setattr(writer.ArrayStream, "append", append_or_fail)


@pytest.mark.parametrize("command", ["simulate", "simulate --as-official", "import-iqiyi"])
def test_a_full_disk_leaves_nothing(official, monkeypatch, command):
    full = FullDisk(monkeypatch)
    name, *option = command.split()
    arguments = [official] if name == "import-iqiyi" else SMALL
    store = official.parent / "new/store"
    assert_refused("/new/store: No space left on device", name, *arguments, store, *option)
    assert full.blocks < 0
    assert not store.parent.exists()


@pytest.mark.parametrize(
    "option, sent, said, status",
    [
        ([], signal.SIGINT, "mmlib: error: interrupted\n", 130),
        (["--as-official"], signal.SIGTERM, "mmlib: error: stopped by SIGTERM\n", 143),
        ([], signal.SIGHUP, "mmlib: error: stopped by SIGHUP\n", 129),
    ],
)
def test_an_interrupt_leaves_nothing(tmp_path, option, sent, said, status):
    if signal.getsignal(sent) == signal.SIG_IGN:
        pytest.skip("nohup holds this signal back, here and in a command")
    process = start(tmp_path, "simulate", "store", "--profile", "quick", *option)
    deadline = time.monotonic() + 120
    while not any(path.stat().st_size > 10**7 for path in tmp_path.glob("**/face/feature.npy")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(sent)
    assert process.communicate(timeout=120) == ("", said)
    assert process.returncode == status
    assert names_in(tmp_path) == []


def test_a_reader_that_goes_away_is_no_error(tmp_path):
    write_lines(tmp_path, result="1 a.mp4\n2 c.mp4\n")
    process = start(tmp_path, "evaluate", "val_gt.txt", "result.txt")
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait(timeout=120) == 0
    process.stderr.close()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_output_that_cannot_be_written_is_said(tmp_path):
    write_lines(tmp_path, result="1 a.mp4\n2 c.mp4\n")
    with open("/dev/full", "w") as full:
        process = start(tmp_path, "evaluate", "val_gt.txt", "result.txt", stdout=full)
        assert process.communicate(timeout=120)[1] == "mmlib: error: No space left on device\n"
    assert process.returncode == 1


def test_progress_is_shown_on_a_terminal_and_apart_from_the_report(official):
    pty = pytest.importorskip("pty")
    terminal, standard_error = pty.openpty()
    process = start(official.parent, "import-iqiyi", "official", "store", stderr=standard_error)
    os.close(standard_error)
    shown = b""
    with open(terminal, "rb", buffering=0) as file:
        try:
            while block := file.read(2**16):
                shown += block
        except OSError:  # how Linux says that the other end is closed
            pass
    report, _ = process.communicate(timeout=120)
    assert report.startswith("train: ") and "\x1b" not in report
    assert b"face_train_v2.pickle" in shown


def test_a_folder_that_may_not_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    assert_refused("file.*: (Not a directory|File exists)", "simulate", tmp_path / "file/store", *SMALL)


# Evaluate


def write_lines(folder, truth="1 a.mp4 b.mp4 \n2 c.mp4 \n", result="1 a.mp4 x.mp4 b.mp4\n"):
    (folder / "val_gt.txt").write_bytes(truth.encode())
    (folder / "result.txt").write_bytes(result.encode())
    return folder / "val_gt.txt", folder / "result.txt"


@pytest.mark.parametrize("ends", ["\n", "\r\n"])
def test_evaluate_prints_the_official_score(tmp_path, ends):
    files = write_lines(tmp_path, f"1 a.mp4 b.mp4 {ends}2 c.mp4 {ends}{ends}", f"1 a.mp4 x.mp4 b.mp4{ends}")
    # identity 1 has precision 1 and 2/3 at its two clips, identity 2 has no ranking: (5/6 + 0) / 2
    result = run("evaluate", *files)
    lacking = "result.txt: no line for 1 of 2 identities of the ground truth, which score 0; first: 2\n"
    assert result.exit_code == 0 and re.fullmatch(f"mmlib: note: .*{lacking}", result.stderr)
    assert result.stdout.splitlines()[:4] == [
        "MAP@100 0.416667",
        "95% interval 0.000000 to 0.833333, a bootstrap over identities",
        "top-1 0.500000",
        "queries 2",
    ]


def test_evaluate_prints_json(tmp_path):
    (line,) = succeed("evaluate", *write_lines(tmp_path), "--json")
    found = json.loads(line)
    assert found.pop("ap") == pytest.approx({"1": 5 / 6, "2": 0}, abs=1e-12)
    expected = {"map_at_100": 5 / 12, "top1": 0.5, "low": 0, "high": 5 / 6, "queries": 2}
    expected |= {"identities": 1, "unknown_identities": 0, "clips": 3, "unknown_clips": 1}
    assert found == pytest.approx(expected, abs=1e-12)


def test_evaluate_gives_one_identity_no_interval(tmp_path):
    files = write_lines(tmp_path, "1 a.mp4 b.mp4 \n", "1 a.mp4\n")
    assert [line for line in succeed("evaluate", *files) if "interval" in line] == [
        "95% interval none, for one identity"
    ]
    found = json.loads(*succeed("evaluate", *files, "--json"))
    assert (found["map_at_100"], found["low"], found["high"]) == (0.5, None, None)


@pytest.mark.parametrize(
    "result, identities, clips, loud",
    [
        ("1 a.mp4 x.mp4\n", (1, 0), (2, 1), False),
        ("0 a.mp4\n1 b.mp4\n", (2, 1), (2, 0), False),
        ("a1 a.mp4\na2 b.mp4\n", (2, 2), (2, 0), True),
        ("1 val/a.mp4\n2 C.mp4\n", (2, 0), (2, 2), True),
        ("2 a.mp4 b.mp4\n", (1, 0), (2, 0), True),  # every name is known, and none is where it belongs
        ("1\n", (1, 0), (0, 0), True),
        ("", (0, 0), (0, 0), True),
    ],
)
def test_evaluate_counts_names_that_the_truth_lacks_and_warns_where_nothing_is_found(
    tmp_path, result, identities, clips, loud
):
    said = run("evaluate", *write_lines(tmp_path, result=result))
    assert said.exit_code == 0 and ("warning" in said.stderr and "result.txt" in said.stderr) == loud
    score, *_, of_identities, of_clips = said.stdout.splitlines()
    assert (score == "MAP@100 0.000000") == loud
    for line, kind, counts in ((of_identities, "identities", identities), (of_clips, "clips", clips)):
        assert kind in line and tuple(map(int, re.findall(r"\d+", line))) == counts


def rank_badly(store, path):
    """Write a submission that names each identity's own val clips behind one or two of others."""
    clips = store.clips.loc[store.select("val")]
    with open(path, "w") as file:
        for code, name in enumerate(store.identities):
            own, other = (clips.loc[which, "clip"] for which in (clips["identity"] == code, clips["identity"] != code))
            print(name, *(f"{clip}.mp4" for clip in [*other[: 1 + code % 2], *own, *other[5:9]]), file=file)


@pytest.mark.parametrize("option", [[], ["--strict"]])
def test_a_store_is_its_own_ground_truth(simulated, tmp_path, option):
    folder, result = simulated[0], tmp_path / "result.txt"
    rank_badly(ClipStore.open(folder / "direct"), result)
    by_store, by_file = (
        succeed("evaluate", folder / truth, result, "--json", *option) for truth in ("direct", "official/val_gt.txt")
    )
    assert by_store == by_file and 0.3 < json.loads(*by_store)["map_at_100"] < 0.7


@pytest.fixture
def known(tmp_path):
    """A store of Ann, who has a val clip, Bob, who has none, and a distractor."""
    table = pd.DataFrame({"clip": list("abcd"), "frame": 0, "identity": ["ann", "ann", "bob", ""]})
    table.assign(split=["train", "val", "train", "val"]).to_csv(tmp_path / "table.csv", index=False)
    np.save(tmp_path / "array.npy", np.eye(4, dtype=np.float32))
    succeed("import-features", tmp_path / "table.csv", tmp_path / "array.npy", tmp_path / "store")
    return tmp_path / "store"


def test_identities_without_a_val_clip_count_for_nothing(known, tmp_path):
    (tmp_path / "result.txt").write_text("ann d.mp4 b.mp4\nbob b.mp4\n")
    printed = succeed("evaluate", known, tmp_path / "result.txt")
    assert {"MAP@100 0.500000", "queries 1"} < {*printed}
    assert succeed("evaluate", known, tmp_path / "result.txt", "--strict") == ["MAP@100 0.500000"]


def test_a_folder_that_knows_no_truth_is_refused(known, tmp_path):
    (tmp_path / "result.txt").write_text("ann b.mp4\n")
    table = pd.read_csv(tmp_path / "table.csv")
    table.assign(split="train").to_csv(tmp_path / "table.csv", index=False)
    succeed("import-features", tmp_path / "table.csv", tmp_path / "array.npy", known, "--overwrite")
    assert_refused("store: no val clip has an identity", "evaluate", known, tmp_path / "result.txt")
    assert_refused("is not a clip store", "evaluate", tmp_path, tmp_path / "result.txt")


LONG = "1 a.mp4\n2 " + " ".join(f"{i}.mp4" for i in range(101))


@pytest.mark.parametrize(
    "truth, result, message",
    [
        ("1 a.mp4\n2 b.mp4\n", LONG, "result.txt, line 2: 101 clips"),
        ("1 a.mp4\n", "1 a.mp4\n2 a.mp4\n", "result.txt, line 2: 2 lines, more than the 1 of"),
        ("1 a.mp4\n2 b.mp4\n", "1 a.mp4\n1 b.mp4\n", "result.txt, line 2: identity 1 is named twice, first on line 1"),
        ("1 a.mp4\n2 b\n", "1 a.mp4\n", "val_gt.txt, line 2: .*'2 b'"),
        ("", "1 a.mp4\n", "val_gt.txt: empty"),
    ],
)
def test_evaluate_refuses_a_bad_file_by_name_and_line(tmp_path, truth, result, message):
    assert_refused(message, "evaluate", *write_lines(tmp_path, truth, result))


@pytest.mark.parametrize("truth, result, ours, script", [("1 a.mp4 b.mp4\n", "1 a.mp4  b.mp4\n", 1, (1 + 2 / 3) / 2)])
def test_evaluate_strict_is_the_arithmetic_of_the_script(tmp_path, truth, result, ours, script):
    files = write_lines(tmp_path, truth, result)
    assert succeed("evaluate", *files)[0] == f"MAP@100 {ours:.6f}"
    assert succeed("evaluate", *files, "--strict") == [f"MAP@100 {script:.6f}"]
    assert json.loads(*succeed("evaluate", *files, "--strict", "--json")) == {"map_at_100": script}


@pytest.mark.parametrize(
    "truth, result, message",
    [
        ("", "1 a.mp4\n", "val_gt.txt: empty, .*divide by 0"),
        ("1 a.mp4\n", "1 a.mp4\n\n", "result.txt, line 2: 2 lines, more than the 1 of"),
        ("1 a.mp4\n2\n", "2 a.mp4\n", "val_gt.txt, line 2: identity 2 has no clip and is submitted, .*divide by 0"),
        (LONG, LONG, "result.txt, line 2: 101 clips, at most 100"),
    ],
)
def test_evaluate_strict_says_what_the_script_would_stop_at(tmp_path, truth, result, message):
    assert_refused(message, "evaluate", *write_lines(tmp_path, truth, result), "--strict")


def test_evaluate_ignores_a_long_line_of_an_identity_that_the_truth_lacks(tmp_path):
    files = write_lines(tmp_path, "1 a.mp4\n3 b.mp4\n", LONG)
    assert succeed("evaluate", *files)[0] == succeed("evaluate", *files, "--strict")[0] == "MAP@100 0.500000"


def test_evaluate_ignores_an_identity_that_the_truth_lacks_on_two_lines(tmp_path):
    files = write_lines(tmp_path, "1 a.mp4\n2 b.mp4\n3 c.mp4\n4 d.mp4\n", "9 a.mp4\n1 a.mp4\n9 b.mp4\n2 b.mp4\n")
    assert succeed("evaluate", *files)[0] == succeed("evaluate", *files, "--strict")[0] == "MAP@100 0.500000"


@pytest.mark.parametrize(
    "truth, result, why",
    [
        ("1 a.mp4\n", "1\n", "it names no clip"),
        ("1\n2\n", "1 a.mp4\n", "val_gt.txt names no clip"),
        ("1 a.mp4\n", "", "it is empty"),
        ("1 a.mp4\n", "1 b.mp4\n", "val_gt.txt names none of its 1 clips; are names written alike?"),
    ],
)
def test_evaluate_says_why_nothing_was_found(tmp_path, truth, result, why):
    assert run("evaluate", *write_lines(tmp_path, truth, result)).stderr.endswith(f"{why}\n")


@pytest.mark.parametrize("option", [[], ["--json"], ["--strict"]])
def test_evaluate_says_which_line_names_a_clip_twice_and_keeps_the_score(tmp_path, option):
    once = "{0}1 x.mp4 a.mp4\n2 c.mp4\n"
    twice = "{0}1 x.mp4 x.mp4 a.mp4\n2 c.mp4 c.mp4 d.mp4 d.mp4\n"
    truth = "0 z.mp4\n1 a.mp4\n2 c.mp4\n"
    for first, line in (
        ("", 1),
        ("9 z.mp4 z.mp4\n", 2),
    ):  # a line of an identity that nobody asked for counts for nothing
        plain = succeed("evaluate", *write_lines(tmp_path, truth, once.format(first)), *option)
        said = run("evaluate", *write_lines(tmp_path, truth, twice.format(first)), *option)
        repeats, lacking = said.stderr.splitlines()
        suffix = ".mp4" if option == ["--strict"] else ""
        where = f"result.txt, line {line}: identity 1 names clip x{suffix} more than once; a repeat is dropped"
        assert repeats.startswith("mmlib: note: ") and repeats.endswith(f"{where}, and so are 2 more")
        assert lacking.endswith("no line for 1 of 3 identities of the ground truth, which score 0; first: 0")
        assert score_of(said.stdout) == score_of("\n".join(plain))


def score_of(printed):
    return re.search(r"MAP@100 [\d.]+|\"map_at_100\": [\d.]+", printed)[0]


def test_evaluate_names_a_missing_file(tmp_path):
    truth, _ = write_lines(tmp_path)
    assert_refused("nothing.txt: missing", "evaluate", truth, tmp_path / "nothing.txt")


# Predict


def test_three_commands_from_the_official_files_to_a_score(simulated, tmp_path):
    official, result = simulated[0] / "official", tmp_path / "result.txt"
    succeed("import-iqiyi", official, tmp_path / "store")
    printed = succeed("predict", tmp_path / "store", "--out", result, "--epochs", 1, "--members", 2)
    assert printed[:2] == [f"wrote {result}: 12 identities, at most 100 clips each", "members: 4 trained, 0 loaded"]
    assert printed[-1].startswith("simulated: ")
    assert names_in(tmp_path) == ["result.txt", "store"]
    score = succeed("evaluate", official / "val_gt.txt", result)
    # class means alone find most clips; by chance it would be about 0.1
    assert score[0].startswith("MAP@100 ") and float(score[0].split()[1]) > 0.5
    assert "queries 12" in score

    before = result.read_bytes()
    assert_refused("result.txt: exists already", "predict", tmp_path / "store", "--out", result)
    assert result.read_bytes() == before


@pytest.fixture
def one_thread():
    """As many threads as `start` gives, for results that are the same to the byte."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_a_stopped_prediction_goes_on_with_the_member_it_was_in(simulated, tmp_path, one_thread):
    result, folder = tmp_path / "result.txt", tmp_path / "result.txt.members"
    arguments = ["predict", str(simulated[0] / "direct"), "--epochs", "4", "--members", "3", "--device", "cpu"]
    saved = {}
    for sent, status in ((signal.SIGTERM, 128 + signal.SIGTERM), (signal.SIGKILL, -signal.SIGKILL)):
        process = start(tmp_path, *arguments)
        deadline = time.monotonic() + 120
        while not {*folder.glob("*.pt")} - {*saved}:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.005)
        process.send_signal(sent)
        printed, said = process.communicate(timeout=120)
        assert printed == "" and process.returncode == status
        lines = said.splitlines()
        if sent == signal.SIGTERM:
            assert lines.pop() == "mmlib: error: stopped by SIGTERM"
        assert all(re.match(r"to train: |member \d of 6: ", line) for line in lines)
        assert names_in(tmp_path) == ["result.txt.members"]
        saved = saved | {path: path.stat().st_mtime_ns for path in folder.glob("*.pt") if path not in saved}
        if sent == signal.SIGTERM:  # what cannot be caught may leave a part, under another name
            assert {*folder.iterdir()} == {*saved}
    assert 2 <= len(saved) < 6

    printed = succeed(*arguments, "--out", result, "--keep-members")
    assert printed[1] == f"members: {6 - len(saved)} trained, {len(saved)} loaded"
    assert {path: path.stat().st_mtime_ns for path in saved} == saved and len([*folder.glob("*.pt")]) == 6
    succeed(*arguments, "--out", tmp_path / "whole.txt")
    assert result.read_bytes() == (tmp_path / "whole.txt").read_bytes()


def test_a_damaged_member_stops_the_prediction(simulated, tmp_path):
    arguments = [
        "predict",
        simulated[0] / "direct",
        "--out",
        tmp_path / "result.txt",
        "--system",
        "face-only",
        "--epochs",
        1,
    ]
    succeed(*arguments, "--keep-members")
    (path,) = (tmp_path / "result.txt.members").iterdir()
    path.write_bytes(path.read_bytes()[:-1])
    assert_refused(f"{path.name}: damaged", *arguments, "--overwrite")


def test_a_shard_and_its_merge_are_a_prediction(simulated, tmp_path, one_thread):
    arguments = ["predict", simulated[0] / "direct", "--system", "face-only", "--epochs", 1]
    printed = succeed(*arguments, "--out", tmp_path / "result.txt", "--shard", "1/1")
    assert printed[0].startswith("shard 1 of 1 ranked clips 1 to ") and names_in(tmp_path) == ["result.txt.members"]
    assert "shards: 1 merged" in succeed(*arguments, "--out", tmp_path / "result.txt", "--merge", 1)
    succeed(*arguments, "--out", tmp_path / "whole.txt")
    assert (tmp_path / "result.txt").read_bytes() == (tmp_path / "whole.txt").read_bytes()
    assert names_in(tmp_path) == ["result.txt", "whole.txt"]


@pytest.mark.parametrize(
    "options, message",
    [
        (["--shard", "1"], "--shard 1: expected I/N, such as 1/4"),
        (["--shard", "a/2"], "--shard a/2: expected I/N"),
        (["--shard", "3/2"], r"shard must lie in \[1, 2\], got 3"),
        (["--shard", "1/2", "--merge", "2"], "--shard goes without"),
        (["--shard", "1/2", "--labelled-only"], "--shard goes without"),
    ],
)
def test_a_bad_shard_is_said(simulated, tmp_path, options, message):
    assert_refused(message, "predict", simulated[0] / "direct", "--out", tmp_path / "result.txt", *options)
    assert names_in(tmp_path) == []


# Features of one's own


def write_features(folder, raw):
    table = pd.DataFrame(
        {
            "clip": ["b", "a", "b"],
            "frame": [3, 2, 1],
            "identity": ["ann", "", "ann"],
            "split": ["val", "train", "val"],
            "det": [0.5, 0.25, 0.75],
        }
    )
    table.to_csv(folder / "table.csv", index=False)
    array = np.arange(12, dtype="<f4").reshape(3, 4)
    array.tofile(folder / "array.bin") if raw else np.save(folder / "array.npy", array)
    return folder / "table.csv", folder / ("array.bin" if raw else "array.npy"), folder / "store"


@pytest.mark.parametrize("raw", [False, True])
def test_features_become_a_store(tmp_path, raw):
    report = succeed("import-features", *write_features(tmp_path, raw), *(["--width", 4] if raw else []))
    store = ClipStore.open(tmp_path / "store")
    assert store.clips["clip"].tolist() == ["a", "b"] and store.clips["identity"].tolist() == [-1, 0]
    assert store.batch([1]).feature[0].tolist() == [[8, 9, 10, 11], [0, 1, 2, 3]]
    assert {"face: 3 frames of 4 dimensions", "1 identities, 1 without a train clip: ann"} < {*report}
    assert "absent: column quality" in report


def test_a_raw_array_without_width_is_refused(tmp_path):
    assert_refused("width", "import-features", *write_features(tmp_path, True))
    assert names_in(tmp_path) == ["array.bin", "table.csv"]


def test_the_scale_of_quality_is_asked_for_and_mapped(tmp_path):
    table, array, store = write_features(tmp_path, False)
    pd.read_csv(table).assign(quality=[0.2, 0.4, 0.9]).to_csv(table, index=False)
    assert_refused(
        "table.csv: quality: scores from 0.2 to 0.9.*--quality-scale", "import-features", table, array, store
    )
    assert_refused("--quality-scale half: expected", "import-features", table, array, store, "--quality-scale", "half")
    assert names_in(tmp_path) == ["array.npy", "table.csv"]
    report = succeed("import-features", table, array, store, "--quality-scale", "-1:-20,0:0,1:100")
    assert any("mapped by knots -1:-20, 0:0, 1:100" in line for line in report)
    assert sorted(ClipStore.open(store).modalities["face"].columns["quality"]) == pytest.approx([20, 40, 90])


def test_public_faces_become_a_store_from_a_folder(tmp_path):
    folder = tmp_path / "tables/lfw"
    folder.mkdir(parents=True)
    names = np.repeat(["Ann", "Bob", "Eve"], [8, 4, 1])
    scores = {"det": 0.9, "quality": np.linspace(0.1, 0.6, 13)}
    table = pd.DataFrame({"clip": [f"p{row}" for row in range(13)], "frame": 0, "identity": names, **scores})
    table.to_parquet(folder / "frames.parquet")
    np.save(folder / "mobilefacenet.npy", np.ones((13, 4), np.float16))
    options = ["--folder", tmp_path / "tables", "--network", "mobilefacenet"]
    report = succeed("fetch", "lfw", tmp_path / "store", *options)
    assert {"face: 13 frames of 4 dimensions", "2 identities, 0 without a train clip"} < {*report}
    assert any("mapped by rank" in line for line in report) and any("not in SHA256SUMS" in line for line in report)
    assert_refused("edgeface.npy: missing", "fetch", "lfw", tmp_path / "other", *options[:2])
    assert_refused("--folder .*: needs a STORE", "fetch", "lfw", *options[:2])
    gone = ["--folder", tmp_path / "gone"]
    assert_refused("gone: no such folder", "fetch", "lfw", tmp_path / "other", *gone)
    assert_refused("known of ytf only", "fetch", "lfw", tmp_path / "other", *options, "--without-suspects")
    assert names_in(tmp_path) == ["store", "tables"]


def test_places_and_terms_are_said_before_anything_is_fetched(tmp_path, monkeypatch):
    monkeypatch.setenv("MMLIB_CACHE", str(tmp_path))
    for name in ("ARCHIVE", "FILE"):
        monkeypatch.setattr(sources, name, "http://127.0.0.1:9/{repository}/{commit}/{path}")
    result = run("fetch", "cfp")
    lines = result.stdout.splitlines()
    assert result.exit_code == 1 and len(lines) == 6 and lines[-1] == f"to {tmp_path / 'sources'}"
    assert all("github.com/" in line and "terms: " in line for line in lines[:-1])
    assert re.fullmatch("mmlib: error: http://127.0.0.1:9/.*cannot be downloaded .*\n", result.stderr)


def test_fetch_says_where_each_file_is(tmp_path, monkeypatch):
    monkeypatch.setenv("MMLIB_CACHE", str(tmp_path))
    monkeypatch.setattr(sources, "fetch_source", lambda name, folder, progress: folder / name / "network.pt")
    assert succeed("fetch", "retinaface")[-1] == f"retinaface: {tmp_path / 'sources/retinaface/network.pt'}"


@pytest.fixture
def published(tmp_path, monkeypatch):
    """Stand-ins for the two published files: five photographs of Ann Lee and one of Bob."""
    folder = tmp_path / "published"
    folder.mkdir()
    np.arange(6 * 128, dtype="<f4").tofile(folder / "LFW_tensor.bytes")
    (folder / "LFW_labels.tsv").write_text("Ann Lee\nBob\n" + "Ann Lee\n" * 4)
    for variable, name in (("LFW_ARRAY", "LFW_tensor.bytes"), ("LFW_LABELS", "LFW_labels.tsv")):
        digest = hashlib.sha256((folder / name).read_bytes()).hexdigest()
        monkeypatch.setattr(public, variable, (digest, getattr(public, variable)[1]))
    return folder


def test_published_faces_become_a_store(published):
    report = succeed("import-lfw", published, published.parent / "store")
    store = ClipStore.open(published.parent / "store")
    assert store.identities.tolist() == ["Ann_Lee"]
    assert store.clips["split"].tolist() == ["train", "val", "val"]
    assert sorted(store.clips["identity"]) == [-1, 0, 0]
    assert store.modalities["face"].count[store.select(labelled=False)].tolist() == [1]
    assert store.batch(store.select(labelled=False)).feature[0, 0, 0] == 128  # Bob's row
    assert "face: 6 frames of 128 dimensions" in report


def test_an_altered_file_is_not_taken_for_the_published_one(published):
    with open(published / "LFW_labels.tsv", "a") as file:
        file.write("Bob\n")
    message = "LFW_labels.tsv: not the published file"
    assert_refused(message, "import-lfw", published, published.parent / "store")
    assert names_in(published.parent) == ["published"]


def test_a_missing_published_file_is_named(published):
    (published / "LFW_tensor.bytes").unlink()
    assert_refused("LFW_tensor.bytes: missing", "import-lfw", published, published.parent / "store")


@pytest.mark.skipif(
    "MMLIB_REAL_DATA" not in os.environ, reason="MMLIB_REAL_DATA names no folder with the published embeddings of LFW"
)
def test_real_faces_become_a_store(tmp_path):
    folder = Path(os.environ["MMLIB_REAL_DATA"])
    succeed("import-lfw", folder, tmp_path / "store")
    store = ClipStore.open(tmp_path / "store")
    faces = store.modalities["face"]
    names = (folder / "lfw-facenet-128-labels.tsv").read_text().replace(" ", "_").splitlines()
    rows = np.fromfile(folder / "lfw-facenet-128.bytes", "<f4").reshape(-1, 128).astype(np.float16)
    photographs = Counter(names)
    listed = {name for name, number in photographs.items() if number >= 4}
    assert (len(names), len(photographs), len(listed)) == (2921, 353, 352)
    assert set(store.identities) == listed and faces.feature.shape == (2921, 128)
    assert not store.meta["simulated"]

    # every photograph stands in one clip, under the name it has
    order = np.argsort(faces.start)
    owner = np.repeat(store.clips["identity"].to_numpy()[order], faces.count[order])
    found = Counter(
        (row.tobytes(), store.identities[code] if code >= 0 else "") for row, code in zip(faces.feature, owner)
    )
    assert found == Counter((row.tobytes(), name if name in listed else "") for row, name in zip(rows, names))

    train, val, distractors = (
        store.select("train"),
        store.select("val", labelled=True),
        store.select("val", labelled=False),
    )
    assert len(distractors) == 1 and faces.count[distractors].tolist() == [3]
    assert faces.count[train].sum() == sum(-(-photographs[name] // 2) for name in listed)
    assert faces.count[val].sum() == sum(photographs[name] // 2 for name in listed)
    assert set(np.unique(faces.count)) == {2, 3, 4, 5}
    assert len(np.unique(store.identity_of(train))) == len(np.unique(store.identity_of(val))) == 352


# Rerun


@pytest.fixture
def chapters(tmp_path, monkeypatch):
    """Two chapters that print what they are given and divide the number of seeds by `share`."""
    nbformat = pytest.importorskip("nbformat")
    pytest.importorskip("papermill")
    folder = tmp_path / "book/chapters"
    folder.mkdir(parents=True)
    cells = [
        nbformat.v4.new_code_cell(
            "seeds: list[int] = [0]  # worlds\nshare: float = 0.5  # in [0, 1]\n"
            "profile: str = 'quick'\ndata: str = 'simulated'  # a store",
            metadata={"tags": ["parameters"]},
        ),
        nbformat.v4.new_code_cell("print('given', seeds, share)"),
        nbformat.v4.new_code_cell("import os\nif share > 1: os._exit(3)\nlen(seeds) / share"),
    ]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    for name in ("01_data", "04_aggregation"):
        notebook = nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel})
        nbformat.write(notebook, folder / f"{name}.ipynb")
    monkeypatch.setattr(cli.study, "CHAPTERS", folder)
    monkeypatch.chdir(tmp_path)
    return folder


@pytest.mark.parametrize("name", ["04", "04_aggregation"])
def test_rerun_passes_values_and_leaves_the_chapter(chapters, name):
    before = (chapters / "04_aggregation.ipynb").read_bytes()
    printed = succeed("rerun", name, "-p", "seeds=[3, 4]", "-p", "share=1e-3")
    assert printed == ["wrote 04_aggregation-rerun.ipynb"]
    cells = json.loads(Path("04_aggregation-rerun.ipynb").read_text())["cells"]
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert ["given [3, 4] 0.001\n"] in [output.get("text") for output in outputs]
    assert (chapters / "04_aggregation.ipynb").read_bytes() == before
    assert names_in(Path(".")) == ["04_aggregation-rerun.ipynb", "book"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            ["04", "-p", "seedz=[3]"],
            "-p seedz: 04_aggregation has no such parameter; it has seeds, share, profile, data",
        ),
        (["04", "-p", "seeds"], "-p seeds: expected NAME=VALUE"),
        (["04", "-p", "seeds=[3"], "-p seeds must be a list such as"),
        (["04", "-p", "seeds=[0, 0]"], "-p seeds must be different whole numbers"),
        (["04", "-p", "share=half"], "-p share must be a finite number"),
        (["04", "-p", "share=1", "-p", "share=2"], "-p share: given twice"),
        (["04", "-p", "data=book"], "-p data=book: is no clip store, for there is no book/store.json"),
        (["04", "-p", "data=nowhere"], "-p data=nowhere: is no clip store"),
        (["04", "-p", "profile=huge"], "-p profile must be one of tiny, quick, full, got 'huge'"),
        (["05"], "05: no chapter has that name; there are 01_data, 04_aggregation"),
        (["0"], "0: no chapter has that name"),
        (["04", "--out", "book/chapters/new.ipynb"], "lies among the chapters"),
        (["04", "--out", "book"], "ends in .ipynb"),
    ],
)
def test_rerun_refuses(chapters, arguments, message):
    assert_refused(message, "rerun", *arguments)
    assert names_in(Path(".")) == ["book"] and len(names_in(chapters)) == 2


@pytest.mark.parametrize(
    "parameter, message",
    [
        ("share=0", "04_aggregation, cell 4: ZeroDivisionError: .*; out/new.failed.ipynb shows where"),
        ("share=2", "04_aggregation: the kernel died, .*; out/new.failed.ipynb shows where"),
    ],
)
def test_a_failed_rerun_keeps_its_notebook_under_another_name(chapters, parameter, message):
    assert_refused(message, "rerun", "04", "-p", parameter, "--out", "out/new.ipynb")
    assert names_in(Path("out")) == ["new.failed.ipynb"]
    assert "given" in Path("out/new.failed.ipynb").read_text()


def add_cell(chapters, source, text=""):
    nbformat = pytest.importorskip("nbformat")
    notebook = nbformat.read(chapters / "04_aggregation.ipynb", as_version=4)
    if text:
        notebook.cells.append(nbformat.v4.new_markdown_cell(text))
    notebook.cells.append(nbformat.v4.new_code_cell(source))
    nbformat.write(notebook, chapters / "04_aggregation.ipynb")


SHOW = """import pandas as pd
from mmlib import compare
rows = [("{0} <i>", 0.9, 1.5, 0.5, 2.5, 0.3, 7, 3, "worlds"), ("plain", 0.885, 0, 0, 0, 0, 5, 3, "worlds")]
names = ["arm", "map_at_100", "difference", "low", "high", "sd", "cost", "n", "interval"]
compare.table(pd.DataFrame(rows, columns=names))"""


def test_rerun_prints_the_scores_of_its_arms(chapters):
    add_cell(chapters, SHOW.format("kept"))
    scores = ["MAP@100", "gain, points", "95 % interval, 3 worlds"]
    printed = [re.split(r"\s{2,}", line) for line in succeed("rerun", "04")]
    first = [["arm", *scores], ["kept <i>", "0.900", "+1.50", "[+0.50, +2.50]"], ["plain", "0.885", "—"]]
    assert printed == [*first, ["wrote 04_aggregation-rerun.ipynb"]]
    # where the page shows kept records, what it ran itself stands below
    add_cell(chapters, SHOW.format("own"), "**This page's own run.**")
    assert [line.split()[0] for line in succeed("rerun", "04")] == ["arm", "own", "plain", "wrote"]


def test_rerun_prints_a_dozen_arms_and_counts_the_others(chapters):
    rows = "pd.DataFrame({'arm': [f'arm {n}' for n in range(30)], 'MAP@100': 0.5}).style.hide(axis='index')"
    add_cell(chapters, f"import pandas as pd\n{rows}")
    printed = succeed("rerun", "04")
    assert len(printed) == 15 and printed[12].startswith("arm 11 ") and printed[13] == "... 18 more"


@pytest.mark.parametrize("path", sorted(cli.study.CHAPTERS.glob("*.ipynb")), ids=lambda path: path.stem)
def test_a_chapter_that_shows_kept_records_says_where_its_own_run_stands(path):
    cells = json.loads(path.read_text())["cells"]
    sources = [(cell["cell_type"], "".join(cell["source"])) for cell in cells]
    kept = any("committed or" in source for _, source in sources)
    own = [at for at, (kind, source) in enumerate(sources) if kind == "markdown" and cli.study.OWN_RUN.search(source)]
    assert len(own) == kept and (
        not own or any("own" in source and "table(" in source for _, source in sources[own[0] :])
    )


def test_a_missing_package_is_said_with_the_python_that_lacks_it(chapters):
    add_cell(chapters, "import no_such_package")
    assert_refused("No module named 'no_such_package' in the kernel python3, which runs .*python", "rerun", "04")


def test_a_kernel_that_does_not_start_is_said_with_its_python(chapters, tmp_path, monkeypatch):
    folder = tmp_path / "jupyter" / "kernels" / "python3"
    folder.mkdir(parents=True)
    ends = [sys.executable, "-c", "raise SystemExit(1)", "{connection_file}"]
    (folder / "kernel.json").write_text(json.dumps({"argv": ends, "display_name": "Python 3", "language": "python"}))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    assert_refused(f"which runs {sys.executable}; that Python needs ipykernel", "rerun", "04")
    assert [name for name in names_in(Path(".")) if name.endswith(".ipynb")] == []


@pytest.mark.parametrize("backend", ["Agg"])
def test_pictures_stand_in_the_notebook_whatever_backend_the_environment_asks_for(chapters, monkeypatch, backend):
    monkeypatch.setenv("MPLBACKEND", backend)
    draw = (
        "from mmlib import figures\nimport matplotlib.pyplot as plt\nfigures.set_style()\nplt.plot([1, 2])\nplt.show()"
    )
    add_cell(chapters, draw)
    succeed("rerun", "04")
    cells = json.loads(Path("04_aggregation-rerun.ipynb").read_text())["cells"]
    assert sum("image/svg+xml" in output.get("data", {}) for output in cells[-1]["outputs"]) == 1


def test_rerun_without_papermill_says_what_to_install(chapters, monkeypatch):
    monkeypatch.setitem(sys.modules, "papermill", None)
    assert_refused(r"rerun needs papermill .*pip install -e '.\[book\]'", "rerun", "04")


def test_rerun_outside_a_checkout_is_refused(tmp_path, monkeypatch):
    pytest.importorskip("papermill")
    monkeypatch.setattr(cli.study, "CHAPTERS", tmp_path / "nowhere")
    assert_refused("nowhere: no chapters there", "rerun", "04")


def test_kept_records_are_those_of_whole_worlds_of_one_size(tmp_path, monkeypatch):
    monkeypatch.setenv("MMLIB_CACHE", str(tmp_path / "cache"))
    asked = Experiment(profile="tiny", classifier="class means", aggregator="mean")
    few = (("identities", 20),)
    every = records.fetch([asked, replace(asked, seed=1), replace(asked, settings=few)])
    (said,) = succeed("keep", tmp_path / "kept.jsonl.gz", "--profile", "tiny")
    assert said == f"wrote 2 records, seeds 0, 1: {tmp_path / 'kept.jsonl.gz'}"
    kept = {record.key: record for record in records.read_results(tmp_path / "kept.jsonl.gz")}
    assert kept.keys() == {record.key for record in every[:2]}
    for record in every[:2]:  # with what an interval needs: the average precision of every query
        assert kept[record.key].ap == pytest.approx(record.ap, abs=1e-4) and len(record.ap) > 1


def test_nothing_to_keep_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("MMLIB_CACHE", str(tmp_path))
    assert_refused("no records of simulated 'full' worlds by this version", "keep", tmp_path / "kept.jsonl.gz")
    assert not (tmp_path / "kept.jsonl.gz").exists()
