"""The Snakefile runs the right commands, which are stand-ins here, and keeps what a failed one leaves."""

import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(
    shutil.which("snakemake") is None, reason="no snakemake here; it has an environment of its own (CONTRIBUTING)"
)

# Writes down its arguments; leaves a notebook, or half of one where the seed is 1, or a submission.
STAND_IN = """#!/bin/sh
echo "$(basename "$0") $*" >> "$CALLS"
echo "said by $1"
case "$*" in
  *seeds=*1*) touch "$(dirname "$4")/.$(basename "$4" .ipynb).partial-99.ipynb"; exit 1 ;;
  *--shard*) ;;
  *) [ "$1" = build ] || touch "$4" ;;
esac
"""


@pytest.fixture
def sweep(tmp_path, monkeypatch):
    """Run snakemake with stand-ins for the commands; returns its status and its output."""
    (tmp_path / "bin").mkdir()
    for name in ("mmlib", "jupyter-book"):
        (tmp_path / "bin" / name).write_text(STAND_IN)
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))

    def run(*arguments, **config):
        named = {"bin": tmp_path / "bin", "out": tmp_path / "out"} | config
        done = subprocess.run(
            [
                "snakemake",
                "--snakefile",
                ROOT / "Snakefile",
                "--cores",
                "1",
                *arguments,
                "--config",
                *(f"{name}={value}" for name, value in named.items()),
            ],
            cwd=tmp_path,
            text=True,
            env=os.environ | {"XDG_CACHE_HOME": str(tmp_path)},
            stderr=subprocess.STDOUT,
            stdout=subprocess.PIPE,
        )
        return done.returncode, done.stdout

    return run


def calls(folder):
    return sorted((folder / "calls").read_text().splitlines()) if (folder / "calls").exists() else []


def test_every_chapter_and_the_book_are_planned(sweep, tmp_path):
    status, said = sweep("--dry-run")
    chapters = [path.stem for path in (ROOT / "book" / "chapters").glob("*.ipynb")]
    assert status == 0 and all(f"{name}-seed{seed}.ipynb" in said for name in chapters for seed in (0, 1))
    assert "rule book" in said and calls(tmp_path) == []


def test_chapter_of_real_faces_is_not_run_on_a_store(sweep, tmp_path):
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "store.json").touch()
    status, said = sweep("--dry-run", data=tmp_path / "store")
    assert status == 0 and "11_cost-seed0.ipynb" in said and "12_real_faces" not in said


def test_chapters_are_run_with_what_is_asked_and_then_the_book(sweep, tmp_path):
    status, said = sweep(chapters="02,3", seeds=7, profile="tiny", device="cpu")
    assert status == 0, said
    runs = tmp_path / "out" / "simulated" / "tiny"
    assert calls(tmp_path) == ["jupyter-book build book/"] + [
        f"mmlib rerun {name} --out {runs / name}-seed7.ipynb "
        "-p seeds=[7] -p profile=tiny -p data=simulated -p device=cpu"
        for name in ("02_metric", "03_baselines")
    ]
    sweep(chapters="02,3", seeds=7, profile="tiny", device="cpu")
    assert len(calls(tmp_path)) == 3


def test_failed_run_keeps_its_notebook_and_its_log(sweep, tmp_path):
    runs = tmp_path / "out" / "simulated" / "quick"
    for _ in range(2):  # the second run finds what the first, as if killed, left half written
        status, said = sweep("--keep-going", "chapters", chapters="02")
        assert status != 0
    kept = {path.name for path in runs.iterdir()}
    assert {"02_metric-seed0.ipynb", "02_metric-seed1.failed.ipynb"} <= kept and "02_metric-seed1.ipynb" not in kept
    assert (runs / "02_metric-seed1.log").read_text() == "said by rerun\n"
    assert len(calls(tmp_path)) == 3  # that of seed 0 is done


def test_shards_are_ranked_and_merged(sweep, tmp_path):
    (tmp_path / "a store").mkdir()
    (tmp_path / "a store" / "store.json").touch()
    status, said = sweep("result", store=tmp_path / "a store", shards=2, predict="--members 3", device="cpu")
    assert status == 0, said
    (result,) = (tmp_path / "out" / "predict").glob("a store-*/result.txt")
    start = f"mmlib predict {tmp_path / 'a store'} --out {result}"
    assert calls(tmp_path) == [
        f"{start} {part} --device cpu --members 3" for part in ("--merge 2", "--shard 1/2", "--shard 2/2")
    ]


def test_a_result_is_of_its_store_and_options_and_made_anew_with_the_store(sweep, tmp_path):
    for name in ("one", "other"):
        (tmp_path / name / "store").mkdir(parents=True)
        (tmp_path / name / "store" / "store.json").touch()
    asked = [("one", "--seed 1"), ("other", "--seed 1"), ("one", "--seed 2")]
    for number, (name, predict) in enumerate(asked, start=1):
        status, said = sweep("result", store=tmp_path / name / "store", shards=1, predict=predict)
        assert status == 0, said
        assert len({*(tmp_path / "out" / "predict").glob("*/result.txt")}) == number
    ran = len(calls(tmp_path))
    assert sweep("result", store=tmp_path / "one" / "store", shards=1, predict="--seed 2")[0] == 0
    assert len(calls(tmp_path)) == ran
    time.sleep(1)
    (tmp_path / "one" / "store" / "store.json").write_text("made anew")
    assert sweep("result", store=tmp_path / "one" / "store", shards=1, predict="--seed 2")[0] == 0
    assert len(calls(tmp_path)) > ran


@pytest.mark.parametrize("name, value", [("shards", "0"), ("shards", "2.7"), ("threads", "eight"), ("seeds", "-1")])
def test_a_number_that_is_none_is_said(sweep, tmp_path, name, value):
    status, said = sweep(**{name: value})
    assert status != 0 and f"{name}={value}: not a whole number >= " in said and calls(tmp_path) == []


@pytest.mark.parametrize("asked", ["99", "metric"])
def test_chapter_that_does_not_exist_is_said(sweep, tmp_path, asked):
    status, said = sweep(chapters=asked)
    assert status != 0 and f"chapters={asked}: no such chapter; there are 01_data" in said and calls(tmp_path) == []


def test_a_setting_that_does_not_exist_is_said(sweep, tmp_path):
    status, said = sweep(profil="tiny")
    assert status != 0 and "profil: no such setting; there are bin, out, profile" in said and calls(tmp_path) == []
