import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from mmlib import metrics


def slow_official(truth, result, k):
    """The official rule in plain Python, after the description of the challenge's script."""
    videos = {}
    for identity, clips in zip(*truth, strict=True):
        videos[identity] = clips
    id_num = len(truth[0])
    if len(result[0]) > id_num:
        raise ValueError
    total = 0.0
    for identity, clips in zip(*result, strict=True):
        ranking = []
        for clip in clips:
            if clip not in ranking:
                ranking.append(clip)
        if identity not in videos:
            continue
        if len(ranking) > k:
            raise ValueError
        if not videos[identity]:
            continue
        hits, ap = 0, 0.0
        for rank, clip in enumerate(ranking, start=1):
            if clip in videos[identity]:
                hits += 1
                ap += hits / rank
        total += ap / len(videos[identity])
    return total / id_num


# Average precision


def test_the_four_denominators_of_the_worked_example():
    hits, relevant = np.array([[1, 0, 1, 0, 0]], bool), np.array([8])
    gain = 1 + 2 / 3
    expected = {
        "relevant": gain / 8,
        "capped": gain / 5,
        "found": gain / 2,
        "trapezoid": ((1 + 1) / 2 + (1 / 2 + 2 / 3) / 2) / 8,
    }
    for rule, value in expected.items():
        assert metrics.average_precision(hits, relevant, rule=rule)[0] == pytest.approx(value, rel=1e-12)
    assert [round(expected[rule], 3) for rule in ("relevant", "capped", "found")] == [0.208, 0.333, 0.833]


@pytest.mark.parametrize("rule", metrics.AP_RULES)
def test_a_perfect_ranking_has_ap_one_by_every_rule(rule):
    hits, relevant = np.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]], bool), np.array([3, 5])
    np.testing.assert_allclose(metrics.average_precision(hits, relevant, rule=rule), 1, rtol=1e-12)


@pytest.mark.parametrize("rule", metrics.AP_RULES)
def test_no_hit_and_nothing_relevant_have_ap_zero(rule):
    found = metrics.average_precision(np.zeros((2, 4), bool), np.array([3, 0]), rule=rule)
    assert found.tolist() == [0, 0]


def test_more_than_k_relevant_cannot_reach_one():
    assert metrics.average_precision(np.ones((1, 100), bool), np.array([125]))[0] == pytest.approx(100 / 125)


def test_an_empty_ranking_has_ap_zero():
    assert metrics.average_precision(np.zeros((2, 0), bool), np.array([3, 1])).tolist() == [0, 0]


# The official rule, case by case


def official(truth, result, k=100):
    """Score {identity: clips} against {identity: clips}."""
    return metrics.official_score((list(truth), list(truth.values())), (list(result), list(result.values())), k=k)


def test_map_is_the_mean_ap_over_ground_truth_lines():
    score = official({"1": ["a", "b"], "2": ["c"]}, {"2": ["x", "c"], "1": ["a", "x", "b"]})
    assert score.identities.tolist() == ["1", "2"] and score.top1 == 0.5
    np.testing.assert_allclose(score.ap, [(1 + 2 / 3) / 2, 1 / 2], rtol=1e-12)
    assert score.map_at_k == pytest.approx((5 / 6 + 1 / 2) / 2, rel=1e-12)


def test_identity_missing_from_the_result_scores_zero():
    assert official({"1": ["a"], "2": ["b"]}, {"1": ["a"]}).ap.tolist() == [1, 0]


def test_identity_unknown_to_the_ground_truth_is_ignored():
    assert official({"1": ["a"], "2": ["b"]}, {"1": ["a"], "9": ["b"]}).ap.tolist() == [1, 0]


def test_identity_unknown_to_the_ground_truth_counts_in_the_line_limit():
    with pytest.raises(ValueError, match="result has 2 lines, more than the 1 "):
        official({"1": ["a"]}, {"1": ["a"], "9": ["b"]})


def test_identity_unknown_to_the_ground_truth_may_have_any_number_of_clips():
    clips = [str(number) for number in range(101)]
    assert official({"1": ["a"], "2": ["b"]}, {"1": ["a"], "9": clips}).ap.tolist() == [1, 0]
    assert metrics.script_score((["1", "2"], [["a"], ["b"]]), (["1", "9"], [["a"], clips])) == 0.5


def test_empty_ground_truth_line_scores_zero_and_counts():
    truth = {"1": ["a"], "2": []}
    assert official(truth, {"1": ["a"]}).map_at_k == 0.5
    assert official(truth, {"1": ["a"], "2": ["b"]}).map_at_k == 0.5


def test_last_line_of_a_repeated_ground_truth_identity_wins_and_both_count():
    truth = ["1", "2", "1"], [["a"], ["b"], ["c"]]
    assert metrics.official_score(truth, (["1", "2"], [["c"], ["b"]])).ap.tolist() == [0, 1, 1]
    assert metrics.official_score(truth, (["1", "2"], [["a"], ["b"]])).map_at_k == pytest.approx(1 / 3)


def test_clip_repeated_on_a_ground_truth_line_inflates_the_denominator():
    assert official({"1": ["a", "a", "b"]}, {"1": ["a", "b"]}).ap[0] == pytest.approx(2 / 3)


def test_repeats_in_a_result_line_are_dropped_keeping_the_first():
    assert official({"1": ["a", "b"]}, {"1": ["x", "x", "a", "a", "b"]}).ap[0] == pytest.approx((1 / 2 + 2 / 3) / 2)


def test_result_line_limit_counts_after_repeats_are_dropped():
    truth, clips = {"1": ["a"]}, [str(number) for number in range(99)]
    assert official(truth, {"1": [*clips, *clips, "a"]}).ap[0] == pytest.approx(1 / 100)
    with pytest.raises(ValueError, match="identity 1 has 101 clips, more than 100"):
        official(truth, {"1": [*clips, "x", "a"]})


def test_a_result_line_has_a_hundred_clips_unless_told():
    truth, clips = (["1"], [["a"]]), [str(number) for number in range(101)]
    assert metrics.official_score(truth, (["1"], [clips[:100]])).map_at_k == 0
    with pytest.raises(ValueError, match="identity 1 has 101 clips, more than 100"):
        metrics.official_score(truth, (["1"], [clips]))


def test_clips_may_be_arrays():
    truth, clips = (["1"], [np.array(["a", "b"])]), np.array(["x", "a", "a", "b"])
    assert metrics.official_score(truth, (["1"], [clips])).ap[0] == (1 / 2 + 2 / 3) / 2
    assert metrics.official_score(truth, (["1"], [clips[:2]])).ap[0] == 1 / 2 / 2


def test_same_clip_may_serve_several_identities():
    assert official({"1": ["a"], "2": ["a"]}, {"1": ["a"], "2": ["a"]}).ap.tolist() == [1, 1]


def test_identity_repeated_in_the_result_is_refused():
    with pytest.raises(ValueError, match="identity 2 more than once"):
        metrics.official_score((["1", "2"], [["a"], ["b"]]), (["2", "2"], [["a"], ["b"]]))


def test_empty_ground_truth_is_refused():
    with pytest.raises(ValueError, match="nothing to score"):
        official({}, {})


def test_empty_result_scores_zero():
    assert official({"1": ["a"]}, {}).map_at_k == 0


CLIPS = st.lists(st.sampled_from("abcdefgh"), max_size=7)


@settings(max_examples=100, deadline=None)
@given(
    truth=st.lists(st.tuples(st.sampled_from("12345"), CLIPS), min_size=1, max_size=6),
    result=st.dictionaries(st.sampled_from("123456"), CLIPS, max_size=6),
)
def test_official_score_agrees_with_a_slow_script(truth, result):
    truth = [list(column) for column in zip(*truth, strict=True)]
    result = list(result), list(result.values())
    try:
        expected = slow_official(truth, result, k=5)
    except ValueError:
        with pytest.raises(ValueError):
            metrics.official_score(truth, result, k=5)
    else:
        assert metrics.official_score(truth, result, k=5).map_at_k == pytest.approx(expected, rel=1e-12)


# The script of the challenge


def test_the_script_takes_the_last_of_two_rankings():
    truth = ["1", "2"], [["a", "b"], ["c"]]
    assert metrics.script_score(truth, (["1", "1"], [["x"], ["x", "a", "b"]])) == (1 / 2 + 2 / 3) / 2 / 2


def test_the_script_counts_an_identity_once_and_a_clip_of_its_line_twice():
    assert metrics.script_score((["1", "1"], [["x"], ["a", "a"]]), (["1"], [["a", "a", "x"]])) == 1 / 2 / 2


@pytest.mark.parametrize(
    "truth, result, message",
    [
        (([], []), ([], []), "no line: the script would divide by 0"),
        ((["1"], [["a"]]), (["1", "2"], [["a"], ["a"]]), "2 lines, more than the 1 of"),
        ((["1", "2"], [["a"], []]), (["2"], [["b"]]), "identity 2 is submitted and has no clip .* divide by 0"),
        ((["1"], [["a"]]), (["1"], [list("abcdef")]), "identity 1 has 6 clips, more than 5"),
    ],
)
def test_what_the_script_would_stop_at_is_one_error(truth, result, message):
    with pytest.raises(ValueError, match=message):
        metrics.script_score(truth, result, k=5)


@settings(max_examples=100, deadline=None)
@given(
    truth=st.lists(st.tuples(st.sampled_from("12345"), CLIPS.filter(len)), min_size=1, max_size=6),
    result=st.dictionaries(st.sampled_from("123456"), CLIPS, max_size=6),
)
def test_the_script_and_the_official_score_agree_on_files_without_fault(truth, result):
    truth = [list(column) for column in zip(*truth, strict=True)]
    result = list(result), list(result.values())
    try:
        expected = metrics.script_score(truth, result, k=5)
    except ValueError as error:
        with pytest.raises(ValueError, match=f"^{error}$"):
            metrics.official_score(truth, result, k=5)
    else:
        assert metrics.official_score(truth, result, k=5).map_at_k == pytest.approx(expected, rel=1e-12)


# Rankings in arrays


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), queries=st.integers(1, 8), clips=st.integers(1, 30), k=st.integers(1, 12))
def test_arrays_and_files_score_alike(seed, queries, clips, k):
    rng = np.random.default_rng(seed)
    identity = rng.integers(-1, queries, clips)
    ranking = np.full((queries, k), -1)
    for row in ranking:
        chosen = rng.permutation(clips)[: rng.integers(0, min(k, clips) + 1)]
        row[: len(chosen)] = chosen
    hits = metrics.match_ranking(ranking, identity, np.arange(queries))
    relevant = np.bincount(identity[identity >= 0], minlength=queries)
    truth = [[str(clip) for clip in np.flatnonzero(identity == query)] for query in range(queries)]
    result = [[str(clip) for clip in row[row >= 0]] for row in ranking]
    expected = metrics.official_score((range(queries), truth), (range(queries), result), k=k)
    np.testing.assert_array_equal(metrics.average_precision(hits, relevant), expected.ap)
    assert expected.top1 == hits[:, 0].mean()


def test_hits_by_hand():
    hits = metrics.match_ranking(np.array([[2, 0, 1], [1, -1, -1]]), np.array([4, -1, 4]), np.array([4, 6]))
    assert hits.tolist() == [[True, True, False], [False, False, False]]


def test_precision_of_a_clip_is_that_at_its_rank_in_its_identitys_ranking():
    ranking, hits = np.array([[1, 2, 0], [4, 3, -1]]), np.array([[True, False, True], [False, True, False]])
    assert metrics.clip_precision(ranking, hits, 6).tolist() == [2 / 3, 1, 0, 1 / 2, 0, 0]


# Intervals and comparisons


def test_bootstrap_interval_agrees_with_the_normal_approximation():
    ap = np.random.default_rng(0).beta(4, 1, 3000)
    low, high = metrics.bootstrap_interval(ap, draws=4000)
    half = 1.96 * metrics.standard_error(ap)
    # 4000 draws give the two quantiles to about 4 % of the half width.
    assert (ap.mean() - low) / half == pytest.approx(1, abs=0.12)
    assert (high - ap.mean()) / half == pytest.approx(1, abs=0.12)


def test_bootstrap_interval_covers_the_true_mean_as_often_as_it_says():
    rng = np.random.default_rng(0)
    intervals = [metrics.bootstrap_interval(rng.random(100), level=0.8, draws=200, seed=n) for n in range(300)]
    covered = np.mean([low <= 0.5 <= high for low, high in intervals])
    assert covered == pytest.approx(0.8, abs=0.07)  # three binomial standard deviations


def test_bootstrap_does_not_depend_on_how_it_is_cut_into_chunks(monkeypatch):
    ap = np.random.default_rng(0).random(40)
    whole = metrics.bootstrap_interval(ap, draws=500)
    monkeypatch.setattr(metrics, "_CHUNK", 40 * 100)
    assert metrics.bootstrap_interval(ap, draws=500) == whole


@pytest.mark.parametrize("ap", [[0.0, 1.0], [1.0, 0.0]])
def test_bootstrap_draws_every_identity(ap):
    """Of two identities a quarter of the draws has the one twice, and a quarter the other."""
    assert metrics.bootstrap_interval(np.array(ap)) == (0, 1)


def test_bootstrap_is_fixed_by_its_seed():
    ap = np.random.default_rng(0).random(40)
    assert metrics.bootstrap_interval(ap, seed=1) == metrics.bootstrap_interval(ap, seed=1)
    assert metrics.bootstrap_interval(ap, seed=1) != metrics.bootstrap_interval(ap, seed=2)


def test_interval_of_equal_values_has_no_width():
    assert metrics.bootstrap_interval(np.full(5, 0.25)) == (0.25, 0.25)


def test_standard_error_by_hand():
    assert metrics.standard_error(np.array([0.0, 1.0])) == pytest.approx(0.5)  # sd sqrt(1/2), over sqrt(2)


def test_paired_test_agrees_with_all_sign_flips():
    difference = np.array([0.3, -0.1, 0.2, 0.05, 0.0, 0.4])
    signs = np.array(np.meshgrid(*[[-1, 1]] * 6)).reshape(6, -1)
    exact = np.mean(np.abs(difference @ signs) >= abs(difference.sum()) - 1e-12)
    found = metrics.paired_test(difference, np.zeros(6), draws=20_000)
    assert found.p_value == pytest.approx(exact, abs=0.01)  # three standard deviations of 20,000 draws
    assert found.difference == pytest.approx(0.85 / 6)
    assert (found.low, found.high) == metrics.bootstrap_interval(difference, draws=20_000)
    assert found.n == 6


def test_flips_that_tie_with_the_observed_sum_count_in_spite_of_rounding():
    tenths = np.array([1, 2, -3, 4])
    signs = np.array(np.meshgrid(*[[-1, 1]] * 4)).reshape(4, -1)
    exact = np.mean(np.abs(tenths @ signs) >= 4)
    found = metrics.paired_test(tenths / 10, np.zeros(4), draws=20_000)
    assert found.p_value == pytest.approx(exact, abs=0.01)  # three standard deviations of 20,000 draws


@pytest.mark.parametrize("unit", [1.0, 1e-7, 1e7])
def test_p_value_does_not_depend_on_the_unit(unit):
    """Of three equal differences the flips with all of one sign are as far from 0: two of eight."""
    found = metrics.paired_test(np.full(3, unit), np.zeros(3), draws=20_000)
    assert found.p_value == pytest.approx(1 / 4, abs=0.01)


def test_paired_test_of_a_run_with_itself_finds_nothing():
    ap = np.random.default_rng(0).random(30)
    assert metrics.paired_test(ap, ap) == metrics.Paired(0.0, 0.0, 0.0, 1.0, 30)


def test_paired_test_swaps_sign_with_its_arguments():
    rng = np.random.default_rng(0)
    one, two = rng.random(50), rng.random(50)
    forth, back = metrics.paired_test(one, two), metrics.paired_test(two, one)
    assert (forth.difference, forth.p_value) == (-back.difference, back.p_value)


def test_p_values_are_uniform_where_nothing_differs():
    rng = np.random.default_rng(0)
    p = [metrics.paired_test(rng.random(30), rng.random(30), draws=200, seed=n).p_value for n in range(300)]
    assert stats.kstest(p, "uniform").pvalue > 0.01


def test_a_clear_difference_reaches_the_smallest_p_value():
    ap = np.random.default_rng(0).random(200)
    assert metrics.paired_test(ap + 0.1, ap, draws=999).p_value == 1 / 1000


def test_pairing_shrinks_the_interval_of_correlated_runs():
    rng = np.random.default_rng(0)
    ap = rng.random(400)
    paired = metrics.paired_test(ap + 0.01 * rng.normal(size=400), ap)
    low, high = metrics.bootstrap_interval(ap)
    assert paired.high - paired.low < (high - low) / 5


def test_runs_on_different_identities_are_not_paired():
    with pytest.raises(ValueError, match="ap_a has 3 identities and ap_b 2"):
        metrics.paired_test(np.zeros(3), np.zeros(2))


def test_one_identity_says_nothing_of_the_spread():
    one = np.array([0.5])
    assert np.isnan(metrics.standard_error(one)) and np.isnan(metrics.bootstrap_interval(one)).all()


def test_over_worlds_by_hand():
    found = metrics.over_worlds(np.array([1.0, 2.0, 3.0]))
    half = 4.302652729911275 / np.sqrt(3)  # t of 2 degrees of freedom at .975; sd is 1
    assert (found.mean, found.sd, found.n) == (2.0, 1.0, 3)
    assert (found.low, found.high) == pytest.approx((2 - half, 2 + half), rel=1e-9)


def test_two_worlds_have_an_interval():
    found = metrics.over_worlds(np.array([1.0, 2.0]))
    half = 12.706204736174706 / 2  # t of 1 degree of freedom at .975; sd is sqrt(1/2)
    assert (found.low, found.high, found.sd, found.n) == pytest.approx((1.5 - half, 1.5 + half, 0.5**0.5, 2), rel=1e-9)


def test_one_world_has_no_interval():
    found = metrics.over_worlds(np.array([0.5]))
    assert found.mean == 0.5 and found.n == 1
    assert np.isnan([found.low, found.high, found.sd]).all()


def test_more_hits_than_relevant_clips_are_refused():
    with pytest.raises(ValueError, match="query 1 has 2 hits, but relevant says 1"):
        metrics.average_precision(np.array([[1, 0], [1, 1]], bool), np.array([1, 1]))


def test_an_unknown_rule_is_refused():
    with pytest.raises(ValueError, match="got 'mean'"):
        metrics.average_precision(np.ones((1, 1), bool), np.ones(1, int), rule="mean")


@pytest.mark.parametrize(
    "bad, message",
    [
        (np.array([0.1, np.nan]), r"got \[0.1 nan\]"),
        (np.array([np.inf, 0.1]), r"got \[inf 0.1\]"),
        (np.array([]), r"got \[\]"),
        (np.zeros((2, 2)), r"got \[\[0"),
    ],
)
def test_intervals_refuse_what_is_no_list_of_numbers(bad, message):
    calls = {
        "ap must": (metrics.bootstrap_interval, metrics.standard_error),
        "differences must": (metrics.over_worlds,),
        "ap_a must": (lambda value: metrics.paired_test(value, np.zeros(2)),),
        "ap_b must": (lambda value: metrics.paired_test(np.zeros(2), value),),
    }
    for name, functions in calls.items():
        for function in functions:
            with pytest.raises(ValueError, match=f"^{name} .*{message}"):
                function(bad)


def test_the_identity_whose_ranking_names_a_clip_twice_is_named():
    with pytest.raises(ValueError, match="identity 9 names a clip twice"):
        metrics.match_ranking(np.array([[0, 1], [1, 1]]), np.array([7, 9]), np.array([7, 9]))


def test_trapezoid_counts_the_precision_one_rank_earlier_from_the_second_rank_on():
    # hits at ranks 2 and 3 of 2 relevant clips: ((1/2 + 0) / 2 + (2/3 + 1/2) / 2) / 2
    found = metrics.average_precision(np.array([[0, 1, 1]], bool), np.array([2]), rule="trapezoid")
    assert found[0] == pytest.approx((1 / 4 + 7 / 12) / 2)


def test_the_first_clip_of_a_gallery_is_seen_twice_too():
    with pytest.raises(ValueError, match="identity 7 names a clip twice"):
        metrics.match_ranking(np.array([[0, 0]]), np.array([7, -1]), np.array([7]))


def test_both_ends_of_the_bootstrap_interval_are_those_of_the_normal_law():
    ap = np.linspace(0, 1, 101)
    half = 1.96 * ap.std() / np.sqrt(len(ap))
    low, high = metrics.bootstrap_interval(ap)
    assert 0.5 - low == pytest.approx(half, abs=0.003) and high - 0.5 == pytest.approx(half, abs=0.003)
