import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from benchmarks import pipeline
from benchmarks.degrade import STRENGTHS
from benchmarks.pipeline import SHARES, cosines, degraded, leave_one_out, pool_arms, told_apart, usefulness
from mmlib.studies.faces import read_degraded

pytest.importorskip("cv2", reason="opencv-python-headless is not installed (extra faces)")


def test_each_clip_is_searched_for_among_the_others():
    similarity = np.array(
        [
            [1.0, 0.9, 0.8, 0.7, 0.1],
            [0.9, 1.0, 0.2, 0.3, 0.1],
            [0.8, 0.2, 1.0, 0.5, 0.9],
            [0.7, 0.3, 0.5, 1.0, 0.0],
            [0.1, 0.1, 0.9, 0.0, 1.0],
        ]
    )
    identity = np.array(["a", "b", "a", "a", "c"])
    # a: 0 finds b, a, a; 2 finds c, a, a; 3 finds a, a; b and c have one clip
    first = (1 / 2 + 2 / 3) / 2
    np.testing.assert_allclose(leave_one_out(similarity, identity), [(2 * first + 1) / 3])
    np.testing.assert_allclose(leave_one_out(similarity, identity, k=1), [1 / 2 / 3])  # of two relevant clips


def test_a_frame_is_as_useful_as_it_is_near_to_the_other_clips():
    frames = np.array([[[2.0, 0], [0, 3]], [[1, 0], [1, 0]], [[0, 1], [0, 1]]])
    useful = usefulness(frames, np.array(["a", "a", "b"]))
    np.testing.assert_allclose(useful[0], [1, 0], atol=1e-12)
    np.testing.assert_allclose(useful[1], np.sqrt([0.5, 0.5]))
    clean = np.array([[[0, 1.0], [0, 1]], [[1, 0], [1, 0]], [[0, 1], [0, 1]]])
    np.testing.assert_allclose(usefulness(frames, np.array(["a", "a", "b"]), clean)[1], 0, atol=1e-12)


def test_arms_weight_frames_as_they_say():
    frames = np.array([[[3.0, 0], [0, 1], [0, 1]]])
    quality, det = np.array([[0.1, 0.5, 0.4]]), np.full((1, 3), 0.99)
    arms = pool_arms(frames, quality, det, np.array([[1.0, 0, 0]]))
    np.testing.assert_allclose(arms["mean"], [[1, 2]])
    np.testing.assert_allclose(arms["norm"], [[3, 2]])
    np.testing.assert_allclose(arms["score"], [[0.1, 0.9]])
    np.testing.assert_allclose(arms["best frame"], [[0, 1]])
    np.testing.assert_allclose(arms["oracle"], [[np.exp(6), 2]])
    assert arms["quality"][0, 1] > 4 * arms["quality"][0, 0]


def test_a_score_tells_degraded_frames_apart_by_pairs_of_a_clip():
    score = np.array([[1.0, 2, 3], [5, 5, 9]])
    bad = np.array([[True, False, False], [False, True, False]])
    assert told_apart(score, bad) == (1 + 1 + 0.5 + 1) / 4
    assert told_apart(-score, bad) == 0.5 / 4


@pytest.fixture
def frames(monkeypatch):
    """Ten people of two clips of five crops; an embedder sees the mean colours of four quarters."""
    monkeypatch.setattr(pipeline, "HOW", {"edgeface": (), "mobilefacenet": ()})
    rng, identity = np.random.default_rng(0), np.repeat([f"p{at}" for at in range(10)], 2)
    people = rng.integers(0, 256, (10, 2, 2, 3)).repeat(56, 1).repeat(56, 2)
    crops = people.repeat(10, 0) + rng.normal(0, 30, (100, 1, 1, 3))
    clip = np.repeat([f"{name}/{at % 2}" for at, name in enumerate(identity)], 5)
    calls = []

    def embed(crops):
        calls.append(len(crops))
        colour = crops.reshape(len(crops), 2, 56, 2, 56, 3).mean((2, 4)).reshape(len(crops), -1) - 128
        spread = crops.std((1, 2, 3))
        return {"edgeface": colour, "mobilefacenet": colour[:, :6], "quality": spread / 128}

    return SimpleNamespace(
        table=pd.DataFrame({"clip": clip}),
        crops=crops.clip(0, 255).astype(np.uint8),
        identity=identity,
        shape=(20, -1),
        det=np.full((20, 5), 0.99),
        embed=embed,
        calls=calls,
    )


def test_degraded_frames_are_embedded_once_and_compared_with_their_mean(frames, tmp_path):
    rows = pd.DataFrame(degraded(frames, tmp_path))
    versions = sum(map(len, STRENGTHS.values()))
    number = 6 * 3  # of five frames of the two clips of every fourth of ten people
    assert frames.calls == [100] + [number] * versions
    assert len(rows) == 2 * 6 * (1 + len(SHARES) * (versions + 1))
    assert {*rows["kind"]} == {*STRENGTHS, "clean", "mixed"} and {*rows["share"]} == {0, *SHARES}
    mean = rows[rows["arm"] == "mean"]
    assert (mean["gain"] == 0).all() and mean["map"].between(0, 1).all() and (rows["identities"] == 3).all()
    assert ((rows["low"] <= rows["map"]) & (rows["map"] <= rows["high"])).all()
    assert rows.loc[rows["kind"] != "clean", "by_quality"].between(0, 1).all()
    worst = mean[(mean["kind"] == "occlusion") & (mean["share"] == max(SHARES)) & (mean["network"] == "edgeface")]
    clean = mean[(mean["kind"] == "clean") & (mean["network"] == "edgeface")]
    assert worst["map"].iloc[-1] <= clean["map"].iloc[0]
    again = pd.DataFrame(degraded(frames, tmp_path))
    pd.testing.assert_frame_equal(rows, again)
    assert len(frames.calls) == 1 + versions


def test_decisions_are_compared_and_what_is_missing_is_named(frames, tmp_path):
    frames.table["eye_px"], frames.sources = np.arange(100.0), tmp_path
    frames.det = np.random.default_rng(1).uniform(0.98, 1, (20, 5))
    frames.score = lambda crops: crops[..., 0].mean((1, 2)) / 255
    rows = pd.DataFrame(pipeline.decisions(frames, tmp_path))
    missing = rows[rows["missing"].notna()]
    assert {*missing["decision"]} == {"scenes", "int8 weights", "profiles"}
    told = rows[rows["missing"].isna()]
    assert {*told["network"]} == {"edgeface", "mobilefacenet"} and (told["photographs"] == 100).all()
    both = told.dropna(subset="value_b")
    np.testing.assert_allclose(both["difference"], both["value_a"] - both["value_b"])
    assert (told["low"] <= told["high"]).all() and len(both) == 2 * (1 + 5)


def test_the_result_is_written_with_its_date_and_commit(frames, tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "Frames", lambda *_: frames)
    monkeypatch.setenv("MMLIB_CACHE", str(tmp_path / "cache"))
    pipeline.main("degraded", str(tmp_path), str(tmp_path / "out.jsonl.gz"))
    made, rows = read_degraded(tmp_path / "out.jsonl.gz")
    assert {"made", "commit"} == {*made} and {"network", "kind", "strength", "share", "arm", "map"} < {*rows.columns}


COMMITTED = Path(__file__).parents[1] / "book/results"


@pytest.mark.skipif(not (COMMITTED / "12_degraded.jsonl.gz").exists(), reason="no record of degraded frames yet")
def test_the_committed_record_is_of_aggregates_alone():
    _, rows = read_degraded(COMMITTED / "12_degraded.jsonl.gz")
    assert {*rows["network"]} == {"edgeface", "mobilefacenet"} and {*rows["kind"]} == {*STRENGTHS, "clean", "mixed"}
    clean = rows[(rows["kind"] == "clean") & (rows["arm"] == "mean")].set_index("network")["map"]
    # orientation of the data's own README, by clips: .9446 and .8558
    np.testing.assert_allclose(clean[["edgeface", "mobilefacenet"]], [0.945, 0.856], atol=0.06)  # of fewer people
    assert (rows["identities"] == 87).all()


@pytest.mark.skipif("MMLIB_REAL_DATA" not in os.environ, reason="MMLIB_REAL_DATA names no folder with real faces")
@pytest.mark.parametrize("network, mean", [("edgeface", 0.9444), ("mobilefacenet", 0.8543)])
def test_real_clips_are_found_as_was_measured(network, mean):
    folder = Path(os.environ["MMLIB_REAL_DATA"]) / "ytf"
    table, features = pd.read_parquet(folder / "frames.parquet"), np.load(folder / f"{network}.npy")
    frames, identity = features.reshape(1154, 5, -1).astype(np.float64), table["identity"].to_numpy()[::5]
    quality, det = (table[name].to_numpy(np.float64).reshape(1154, 5) for name in ("quality", "det"))
    arms = pool_arms(frames, quality, det, usefulness(frames, identity))
    assert leave_one_out(cosines(arms["mean"]), identity).mean() == pytest.approx(mean, abs=1e-3)
