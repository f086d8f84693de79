import csv
from collections import Counter
from importlib.resources import files

import numpy as np
import pytest

from mmlib.data import calibration
from mmlib.data.calibration import clips_per_identity, clips_survival, targets


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


def test_every_fact_is_named_once_with_its_source_and_a_tolerance():
    table = targets()
    assert table["fact"].is_unique and not table.isna().any(axis=None) and (table["tolerance"] >= 0).all()


def test_facts_of_the_clips_are_those_of_the_joint_table(published):
    target = targets().set_index("fact")["target"]
    train, val = np.array(published).T
    assert target["train clips an identity, mean"] == pytest.approx(train.mean(), abs=0.005)
    assert target["train clips an identity, median"] == np.median(train)
    assert target["identities with at most 2 train clips"] == pytest.approx(np.mean(train <= 2), abs=0.0005)
    assert target["labelled val clips an identity, mean"] == pytest.approx(val.mean(), abs=0.005)
    assert target["correlation of train and val clips an identity"] == pytest.approx(
        np.corrcoef(train, val)[0, 1], abs=0.005
    )


def test_survival_of_train_clips_is_that_of_the_joint_table(published):
    for least, share in clips_survival():
        assert share == sum(train >= least for train, _ in published) / len(published)
