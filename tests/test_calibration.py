import csv
from collections import Counter
from importlib.resources import files

import numpy as np
import pandas as pd
import pytest

from mmlib.data import calibration
from mmlib.data.calibration import TARGETS, Target, calibration_table, clips_per_identity, marginals
from mmlib.data.simulate import settings_for, simulate
from mmlib.data.store import ClipStore


@pytest.fixture(scope="module")
def published():
    """The joint table, row by row: (train clips, labelled val clips) of every identity, sorted."""
    with (files("mmlib.data") / "clips_per_identity_joint.csv").open() as file:
        rows = [(int(train), int(val), int(n)) for train, val, n in list(csv.reader(file))[1:]]
    return sorted((train, val) for train, val, n in rows for _ in range(n))


# -- clips per identity --------------------------------------------------------------------------------------


def test_all_identities_have_exactly_the_published_counts(published):
    counts = clips_per_identity(10_034, np.random.default_rng(0))
    assert Counter(map(tuple, counts.tolist())) == Counter(published)


def test_published_counts_have_the_published_totals(published):
    assert len(published) == 10_034
    assert np.sum(published, axis=0).tolist() == [60_566, 45_472]


def test_identities_come_in_no_order(published):
    counts = clips_per_identity(10_034, np.random.default_rng(0))
    assert abs(np.corrcoef(np.arange(len(counts)), counts[:, 0])[0, 1]) < 4 / np.sqrt(len(counts))


@pytest.mark.parametrize("identities", [2, 60, 500, 4000])
def test_fewer_identities_are_one_from_each_stratum(published, identities):
    counts = sorted(map(tuple, clips_per_identity(identities, np.random.default_rng(1)).tolist()))
    for i, drawn in enumerate(counts):
        first, last = i * 10_034 // identities, -(-(i + 1) * 10_034 // identities) - 1
        assert published[first] <= drawn <= published[last]


@pytest.mark.parametrize("seed", range(3))
def test_fewer_identities_keep_the_means(seed):
    mean = clips_per_identity(500, np.random.default_rng(seed)).mean(axis=0)
    # within a stratum val clips vary with a standard deviation of about 2.5: five standard errors
    assert mean == pytest.approx([6.04, 4.53], abs=0.55)
    assert mean[0] == pytest.approx(6.04, abs=0.15)  # the strata hold the train clips nearly fixed


def test_every_identity_has_clips_to_train_on_and_to_find():
    assert clips_per_identity(10_034, np.random.default_rng(0)).min() == 1


def test_more_identities_than_published_are_refused():
    with pytest.raises(ValueError, match="at most 10034, got 10035"):
        clips_per_identity(10_035, np.random.default_rng(0))


# -- what is published ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["NORM_KNOTS", "QUALITY_KNOTS"])
def test_quantile_knots_ascend(name):
    assert (np.diff(getattr(calibration, name), axis=0) > 0).all()


def test_survival_of_frames_falls_from_one():
    faces, survival = np.array(calibration.FRAME_SURVIVAL).T
    assert (faces[0], survival[0]) == (1, 1)
    assert (np.diff(faces) > 0).all() and (np.diff(survival) < 0).all()


def test_every_accuracy_has_its_bin_of_quality():
    assert len(calibration.TOP1_BY_QUALITY) == len(calibration.QUALITY_EDGES) - 1


def test_facts_are_named_once():
    assert len({target.fact for target in TARGETS}) == len(TARGETS)


# -- marginals of a store of known ones ----------------------------------------------------------------------


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
    assert {target.fact for target in TARGETS} == known.keys()


def test_table_says_which_facts_are_within_their_tolerance(tmp_path, monkeypatch):
    monkeypatch.setattr(
        calibration,
        "TARGETS",
        [
            Target("faces a clip, median", 2.5, 0.5, "on the edge"),
            Target("quality score, mean", 49, 0.9, "just outside"),
        ],
    )
    table = calibration_table(write(tmp_path / "store"))
    assert table["within"].tolist() == [True, False]
    assert table["achieved"].tolist() == [2, pytest.approx(50)]


@pytest.mark.parametrize("column", ["quality", "det"])
def test_store_without_a_score_lacks_just_its_facts(tmp_path, known, column):
    store = write(tmp_path / "store", columns=[name for name in ("quality", "det") if name != column])
    facts = calibration_table(store)["fact"].tolist()
    assert facts == [target.fact for target in TARGETS if not target.fact.startswith(f"{column} score")]


def test_norms_are_those_of_clips_with_a_face(tmp_path):
    norms = calibration.clip_norms(write(tmp_path / "store"))
    assert norms == pytest.approx([15] * 5, abs=1e-3)


def test_cosines_by_quality_tell_pairs_of_one_identity_from_pairs_of_two(tmp_path):
    frame = calibration.cosines_by_quality(write(tmp_path / "store"), pairs=200)
    # 7 and 8 look along different axes, and the distractor is in no pair
    assert frame[frame["pair"] == "one identity"]["cosine"].to_numpy() == pytest.approx(1, abs=1e-5)
    assert frame[frame["pair"] == "two identities"]["cosine"].to_numpy() == pytest.approx(0, abs=1e-5)
    assert (frame["pair"] == "one identity").sum() == 200


# -- a simulated world ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    store = simulate(tmp_path_factory.mktemp("quick") / "store", settings_for("quick"), 0)
    return calibration_table(store).set_index("fact")


def test_table_has_a_row_for_every_target(table):
    assert table.index.tolist() == [target.fact for target in TARGETS]
    assert table.columns.tolist() == ["target", "tolerance", "achieved", "within", "source"]


@pytest.mark.parametrize("fact", [target.fact for target in TARGETS])
def test_simulated_world_meets_its_target(table, fact):
    row = table.loc[fact]
    assert row["within"], f"{fact}: {row['achieved']:.4g}, not {row['target']} +- {row['tolerance']}"
