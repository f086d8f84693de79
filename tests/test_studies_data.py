import numpy as np
import pandas as pd
import pytest

from mmlib.data.calibration import targets
from mmlib.data.simulate import settings_for, simulate
from mmlib.data.store import ClipStore
from mmlib.studies import data
from mmlib.studies.data import calibration_table, clip_norms, cosines_by_quality, marginals


def write(path, columns=("quality", "det")):
    """Two identities: 7 with train clips a, b, c and val clip v, 8 with train clip d; w is a distractor.

    All frames of 7 point along axis 0, those of 8 along axis 1, those of w along axis 2; the norms of a
    clip's two frames are 10 and 20, d has 40 of norm 15, c has no face.
    """
    rows = {"a": 0, "b": 0, "d": 1, "v": 0, "w": 2}
    feature, start, count = [], {}, {}
    for clip, axis in rows.items():
        start[clip], count[clip] = len(feature), 40 if clip == "d" else 2
        feature += [(15 if clip == "d" else (10, 20)[i]) * np.eye(4)[axis] for i in range(count[clip])]
    n = len(feature)
    scores = {"quality": np.linspace(0, 100, n), "det": np.where(np.arange(n) < 12, 0.85, 0.95)}
    clips = pd.DataFrame(
        {"clip": list("abcdvw"), "split": ["train"] * 4 + ["val"] * 2, "identity": [0, 0, 0, 1, 0, -1]}
    )
    spans = [[part.get(clip, 0) for clip in "abcdvw"] for part in (start, count)]
    with ClipStore.create(path, simulated=False, provenance={}) as writer:
        writer.append("face", np.array(feature, np.float16), **{name: scores[name] for name in columns})
        writer.finish(clips, ["7", "8"], {"face": tuple(map(np.array, spans))})
    return ClipStore.open(path)


@pytest.fixture(scope="module")
def known(tmp_path_factory):
    return marginals(write(tmp_path_factory.mktemp("known") / "store"))


@pytest.mark.parametrize(
    "fact, value",
    [
        ("train clips an identity, mean", 2),
        ("train clips an identity, median", 2),
        ("identities with at most 2 train clips", 0.5),
        ("labelled val clips an identity, mean", 0.5),
        ("correlation of train and val clips an identity", 1),
        ("val clips that are distractors", 0.5),
        ("clips without a face", 1 / 6),
        ("faces a clip, mean", 48 / 5),
        ("faces a clip, median", 2),
        ("clips with at least 40 faces", 0.2),
        ("quality score, mean", 50),
        ("quality score, median", 50),
        ("quality score, 5 %", 5),
        ("quality score, standard deviation", 100 / 47 * np.sqrt((48**2 - 1) / 12)),  # of 48 equal steps
        ("det score at least .8", 1),
        ("det score above .9", 0.75),
        ("mean norm of a clip, median", 15),
        ("mean norm of a clip, 1 %", 15),
        ("cosine of two clips of one identity, mean", 1),
        ("cosine of two clips of two identities, mean", 0),
        ("cosine of two clips of two identities, standard deviation", 0),
    ],
)
def test_marginals_of_a_known_store(known, fact, value):
    assert known[fact] == pytest.approx(value, abs=1e-6)


def test_every_target_is_measured(known):
    assert set(targets()["fact"]) == known.keys()


def test_table_says_which_facts_are_within_their_tolerance(tmp_path, monkeypatch):
    rows = [("faces a clip, median", 2.5, 0.5, "on the edge"), ("quality score, mean", 49, 0.9, "just outside")]
    wanted = pd.DataFrame(rows, columns=["fact", "target", "tolerance", "source"])
    monkeypatch.setattr(data, "targets", lambda: wanted)
    table = calibration_table(write(tmp_path / "store"))
    assert table["within"].tolist() == [True, False]
    assert table["achieved"].tolist() == [2, pytest.approx(50)]


@pytest.mark.parametrize("column", ["quality", "det"])
def test_store_without_a_score_lacks_just_its_facts(tmp_path, known, column):
    store = write(tmp_path / "store", columns=[name for name in ("quality", "det") if name != column])
    facts = calibration_table(store)["fact"].tolist()
    assert facts == [fact for fact in targets()["fact"] if not fact.startswith(f"{column} score")]


def test_norms_are_those_of_clips_with_a_face(tmp_path):
    norms = clip_norms(write(tmp_path / "store"))
    assert norms == pytest.approx([15] * 5, abs=1e-3)


def test_cosines_by_quality_tell_pairs_of_one_identity_from_pairs_of_two(tmp_path):
    frame = cosines_by_quality(write(tmp_path / "store"), pairs=200)
    # 7 and 8 look along different axes, and the distractor is in no pair
    assert frame[frame["pair"] == "one identity"]["cosine"].to_numpy() == pytest.approx(1, abs=1e-5)
    assert frame[frame["pair"] == "two identities"]["cosine"].to_numpy() == pytest.approx(0, abs=1e-5)
    assert (frame["pair"] == "one identity").sum() == 200


def test_a_simulated_world_meets_every_target(tmp_path):
    table = calibration_table(simulate(tmp_path / "store", settings_for("tiny", identities=150), 0))
    assert table["fact"].tolist() == targets()["fact"].tolist()
    assert table.loc[~table["within"], ["fact", "target", "achieved"]].to_numpy().tolist() == []
