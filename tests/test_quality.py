import json

import numpy as np
import pytest

from mmlib.data.calibration import QUALITY_KNOTS
from mmlib.data.quality import parse_scale, rescale, said


def test_ranks_get_the_challenges_distribution():
    score = np.random.default_rng(0).beta(8, 5, 20_001)
    scaled, done = rescale(score, "rank")
    for share, value in QUALITY_KNOTS[1:-1]:
        assert np.quantile(scaled, share) == pytest.approx(value, abs=0.5)
    assert (np.diff(scaled[score.argsort()]) >= 0).all()
    assert done["mapped"] == "by rank" and done["scale"] == "challenge"


def test_equal_scores_stay_equal_at_the_mean_of_their_ranks():
    scaled, _ = rescale(np.array([0.7, 0.1, 0.7, 0.7, 0.9]), "rank")
    assert scaled[0] == scaled[2] == scaled[3] == 59  # ranks 2, 3 and 4 of 5: the median
    assert scaled[1] < 59 < scaled[4]


def test_a_constant_score_gets_the_median():
    assert rescale(np.full(4, 0.3), "rank")[0].tolist() == [59] * 4


@pytest.mark.parametrize("scale", ["rank", [(0, 0), (1, 100)], "challenge"])
def test_no_score_stays_none(scale):
    assert len(rescale(np.zeros(0), scale)[0]) == 0


def test_knots_are_linear_between_and_constant_beyond():
    scaled, done = rescale(np.array([-1.0, 0.1, 0.3, 0.45, 2.0]), [(0.1, -20), (0.5, 60), (0.6, 260)])
    np.testing.assert_allclose(scaled, [-20, -20, 20, 50, 260])
    assert done["mapped"] == [[0.1, -20], [0.5, 60], [0.6, 260]]


def test_knots_may_turn_a_score_around():
    np.testing.assert_allclose(rescale(np.array([0.0, 0.5]), [(0, 100), (1, 0)])[0], [100, 50])


@pytest.mark.parametrize(
    "score", [[0.0, 1.0], [0.2, 0.9, 0.5], [18.0, 22.0, 31.0], [60.0, 5.0], [60.1, 95.0], [-8.0, -3.0], [50.0]]
)
def test_scores_on_one_side_of_60_are_refused(score):
    with pytest.raises(ValueError, match=rf"t.csv: quality: .*{min(score):g} to {max(score):g}.*--quality-scale"):
        rescale(np.array(score), None, "t.csv: quality")
    scaled, done = rescale(np.array(score), "challenge")
    assert scaled.tolist() == score and done["mapped"] == "as given"


@pytest.mark.parametrize("score", [[60.0, 60.5], [-20.0, 260.0], []])
def test_scores_on_both_sides_are_the_challenges(score):
    assert rescale(np.array(score), None)[0].tolist() == score


@pytest.mark.parametrize("scale", [None, "challenge", "rank", [(0, 0), (1, 100)]])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_score_that_is_no_number_is_refused(value, scale):
    with pytest.raises(ValueError, match=f"quality: score 2 is {value}"):
        rescale(np.array([0.5, value, 70]), scale)


@pytest.mark.parametrize(
    "scale", [[(0, 0)], [(0, 0), (0, 1)], [(1, 0), (0, 1)], [(0, 0), (np.nan, 1)], [(0, np.inf), (1, 1)], "median", []]
)
def test_a_scale_that_cannot_be_is_refused(scale):
    with pytest.raises(ValueError, match="--quality-scale"):
        rescale(np.array([0.5, 70]), scale)


def test_a_scale_is_read_from_text():
    assert [parse_scale(text) for text in ("rank", "challenge")] == ["rank", "challenge"]
    assert parse_scale("-1:-20,0.5:59,1e1:260") == [(-1, -20), (0.5, 59), (10, 260)]


@pytest.mark.parametrize("text", ["", "ranks", "0:1:2,3:4", "0:a,1:b", "0", "0:1;1:2"])
def test_a_text_that_is_no_scale_is_refused(text):
    with pytest.raises(ValueError, match="--quality-scale .*: expected challenge, rank or knots"):
        parse_scale(text)


def test_what_was_done_is_said_with_both_ranges():
    score = np.array([0.2, 0.4, 0.9])
    assert said(rescale(score, "challenge")[1]).startswith("quality: 0.2 to 0.9 (median 0.4), as given")
    line = said(rescale(score, [(0, 0), (1, 100)])[1])
    assert (
        line
        == "quality: 0.2 to 0.9 (median 0.4), mapped by knots 0:0, 1:100 to the challenge's units: 20 to 90 (median 40)"
    )
    assert "by rank" in said(rescale(score, "rank")[1])


def test_what_was_done_can_be_written_down():
    for scale in ("rank", "challenge", [(0, 0), (1, 100)]):
        done = rescale(np.array([0.2, 0.4, 0.9], np.float32), scale)[1]
        assert json.loads(json.dumps(done)) == done
