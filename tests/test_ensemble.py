import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmlib.ensemble import disagreement, member_clips, member_seed

CLIPS = np.arange(100, 400)


def drawn(kind, clips=CLIPS, identity=None, seed=0, member=1):
    return member_clips(
        kind, clips, np.zeros(len(clips), int) if identity is None else identity, seed=seed, member=member
    )


# -- clips of a member ---------------------------------------------------------------------------------------


def test_bagging_draws_as_many_clips_as_there_are_with_repeats():
    found = drawn("bagging")
    assert len(found) == len(CLIPS) and set(found) < set(CLIPS)


def test_bagging_draws_every_clip_equally_often():
    count = np.zeros(10)
    for member in range(400):
        np.add.at(count, drawn("bagging", np.arange(10), member=member), 1)
    # 4000 draws at 1 in 10: standard deviation 19.
    assert count.sum() == 4000 and np.all(np.abs(count - 400) < 5 * 19)


def test_bagging_loses_a_share_of_identities_of_one_clip_near_one_over_e():
    identity = np.arange(len(CLIPS))
    lost = [len({*identity} - {*drawn("bagging", member=m) - 100}) / len(CLIPS) for m in range(20)]
    # Of one member the standard deviation is about .018, of the mean .004.
    assert np.mean(lost) == pytest.approx((1 - 1 / 300) ** 300, abs=0.02)


@settings(max_examples=60, deadline=None)
@given(
    identity=st.lists(st.integers(-1, 5), min_size=1, max_size=40), seed=st.integers(0, 99), member=st.integers(0, 9)
)
def test_stratified_keeps_every_identity_and_its_number_of_clips(identity, seed, member):
    identity = np.array(identity)
    found = drawn("stratified", np.arange(len(identity)), identity, seed, member)
    assert sorted(identity[found]) == sorted(identity)


def test_stratified_draws_every_clip_of_an_identity_equally_often():
    identity, count = np.array([1, 0, 1, 1, 0, 2]), np.zeros(6)
    for member in range(600):
        np.add.at(count, drawn("stratified", np.arange(6), identity, member=member), 1)
    # Three draws at 1 in 3, two at 1 in 2 and one at 1: standard deviations 20, 17 and 0.
    assert count[5] == 600 and np.all(np.abs(count - 600) < 5 * 20)


@pytest.mark.parametrize("kind", ["seeds", "views"])
@pytest.mark.parametrize("member", [0, 3])
def test_seeds_and_views_train_on_all_clips(kind, member):
    assert drawn(kind, member=member).tolist() == CLIPS.tolist()


@pytest.mark.parametrize("kind", ["bagging", "stratified"])
def test_draw_follows_seed_and_member(kind):
    first = drawn(kind)
    assert np.array_equal(first, drawn(kind))
    assert not np.array_equal(first, drawn(kind, member=2)) and not np.array_equal(first, drawn(kind, seed=1))


@pytest.mark.parametrize("kind", ["bagging", "stratified"])
def test_order_of_drawn_clips_is_that_of_the_store(kind):
    found = drawn(kind)
    assert np.all(np.diff(found) >= 0)


def test_unknown_kind_is_refused_with_those_there_are():
    with pytest.raises(ValueError, match="ensemble must be one of seeds, views, bagging, stratified, got 'boosting'"):
        drawn("boosting")


def test_first_member_has_the_plain_seed_and_the_others_their_own():
    assert [member_seed(7, member) for member in range(3)] == [7, [7, 1], [7, 2]]


# -- what is lost and what differs ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "predicted, expected",
    [
        ([[1, 2, 3, 4], [1, 2, 3, 4]], 0),
        ([[1, 2, 3, 4], [1, 2, 3, 5]], 1 / 4),
        ([[1, 1], [2, 2], [3, 3]], 1),
        # Pairs differ on 1, 1 and 2 of four clips.
        ([[0, 0, 0, 0], [1, 0, 0, 0], [0, 5, 0, 0]], (1 + 1 + 2) / 12),
    ],
)
def test_disagreement_by_hand(predicted, expected):
    assert disagreement(np.array(predicted)) == pytest.approx(expected)
