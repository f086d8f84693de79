"""The command that makes the most of some minutes on a GPU, tried on the CPU in tiny worlds."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch

from benchmarks import gpu
from mmlib import retrieve
from mmlib.experiment import TRAINED, Training
from mmlib.records import library_hash, read_records, write_results
from mmlib.studies import plans

CODE = """
import sys
from benchmarks import gpu
gpu.CHAPTERS, gpu.SAVED = ["03_baselines"], 0
sys.exit(gpu.main(sys.argv[1:]))
"""


def command(out, *more):
    return [sys.executable, "-c", CODE, "--device", "cpu", "--profile", "tiny", "--worlds", "1", "--out", out, *more]


@pytest.fixture
def brief(monkeypatch):
    """Plans of one chapter, trained for one epoch."""
    monkeypatch.setattr(gpu, "CHAPTERS", ["03_baselines"])
    monkeypatch.setattr(gpu, "SAVED", 0)


def test_every_trained_model_of_every_chapter_takes_one_step(store):
    arms = gpu.one_of_each(store)
    every = {
        branch
        for plan in plans.PLANS.values()
        for arm in plan(store).values()
        for branch, _ in retrieve.members_of(arm)
        if branch.classifier in TRAINED
    }
    assert len(arms) == len(set(arms.values()))
    short = {"epochs": 1, "batch": 4_096}
    assert set(arms.values()) == {
        replace(arm, profile="tiny", training=replace(arm.training, **short)) for arm in every
    }
    clips = max(len(retrieve.training_clips(arm, store)) for arm in arms.values())
    assert clips <= 4_096


def test_members_together_are_those_alone(store):
    arm = replace(next(iter(gpu.together_arms().values())), training=Training(epochs=1, batch=16, frames=4))
    assert gpu.together_and_alone(arm, store, "cpu") < 1e-3


def test_stopped_at_random_it_goes_on_and_nothing_is_lost_or_made_twice(tmp_path):
    """Where the machine is lost, and its cache with it, only the folder is left."""
    out, caches = tmp_path / "out", iter(range(9))

    def environment():
        return os.environ | {"MMLIB_CACHE": str(tmp_path / f"cache{next(caches)}"), "OMP_NUM_THREADS": "1"}

    asked = command(str(out), "--parts", "records")
    process = subprocess.Popen(asked, env=environment(), start_new_session=True, stdout=subprocess.DEVNULL)
    while not (out / gpu.FULL).exists():
        assert process.poll() is None
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    first = read_records(out / gpu.FULL)
    done = subprocess.run(asked, env=environment(), check=True, capture_output=True, text=True).stdout
    every = read_records(out / gpu.FULL)
    assert 0 < len(first) < len(every) == len({record.key for record in every})
    assert every[: len(first)] == first  # to the second in which they were made
    assert f"{len(every) - len(first)} new, {len(every)} in all" in done
    assert f"{len(every)} in all" in (out / "summary.md").read_text()
    again = subprocess.run(asked, env=environment(), check=True, capture_output=True, text=True).stdout
    assert "0 new" in again and read_records(out / gpu.FULL) == every


def test_records_of_another_library_are_made_again(brief, tmp_path, monkeypatch):
    monkeypatch.setenv("MMLIB_CACHE", str(tmp_path / "cache"))
    asked = ["--device", "cpu", "--profile", "tiny", "--worlds", "1", "--parts", "records", "--out", str(tmp_path)]
    assert gpu.main(asked) == 0
    made = read_records(tmp_path / gpu.FULL)
    write_results(tmp_path / gpu.FULL, [replace(record, library="other", ap=[0.0]) for record in made])
    assert gpu.main(asked) == 0
    again = read_records(tmp_path / gpu.FULL)
    assert [record.key for record in again] == [record.key for record in made]
    assert {record.library for record in again} == {library_hash()} and all(record.ap != [0.0] for record in again)


def test_no_time_begins_nothing_and_says_so(brief, tmp_path, capsys):
    asked = ["--device", "cpu", "--profile", "tiny", "--parts", "records", "--out", str(tmp_path), "--minutes", "0"]
    assert gpu.main(asked) == 0
    assert "records: none" in capsys.readouterr().out and not (tmp_path / gpu.FULL).exists()


def test_a_part_that_fails_keeps_no_other_from_being_run(tmp_path, monkeypatch, capsys):
    def fails(run, seconds):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(gpu, "PARTS", {"smoke": fails, "records": lambda run, seconds: "3 new"})
    assert gpu.main(["--device", "cpu", "--parts", "smoke", "records", "--out", str(tmp_path)]) == 1
    said = (tmp_path / "summary.md").read_text()
    assert "smoke: FAILED: RuntimeError: no such kernel" in said and "records: 3 new" in said


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_how_to_try_it(tmp_path, capsys):
    with pytest.raises(SystemExit):
        gpu.main(["--out", str(tmp_path / "out")])
    assert "--device cpu --profile tiny" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_smoke_is_kept_for_this_library_and_device_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("MMLIB_CACHE", str(tmp_path / "cache"))
    one = dict(list(gpu.together_arms().items())[:1])
    monkeypatch.setattr(gpu, "together_arms", dict)
    monkeypatch.setattr(gpu, "one_of_each", lambda store: one)
    asked = ["--device", "cpu", "--parts", "smoke", "--out", str(tmp_path)]
    path = tmp_path / "smoke.json"
    assert gpu.main(asked) == 0
    first = json.loads(path.read_text())
    assert gpu.main(asked) == 0 and json.loads(path.read_text()) == first
    path.write_text(json.dumps(first | {"library": "other"}))
    assert gpu.main(asked) == 0 and json.loads(path.read_text())["steps"] != first["steps"]
