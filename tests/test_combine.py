from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmlib import rank
from mmlib.rank import Fallback, Ranking, top_k

# Scores of an ensemble


def said(members=3, clips=5, identities=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.rand(members, clips, identities, generator=generator) - 1


def slow_combine(cosines, how, scale):
    """Average clip by clip in float64."""
    out = np.zeros(cosines.shape[1:])
    for clip in range(len(out)):
        for member in cosines.double().numpy():
            score = member[clip]
            if how != "cosine":
                score = np.exp(scale * score) / sum(np.exp(scale * value) for value in score)
            out[clip] += np.log(score) if how == "log softmax" else score
    return out / len(cosines)


@pytest.mark.parametrize("scale", [1.0, 30.0])
@pytest.mark.parametrize("members", [1, 3])
@pytest.mark.parametrize("how", rank.COMBINE[:3])
def test_combined_scores_agree_with_a_slow_average(how, members, scale, device):
    cosines = said(members)
    expected = slow_combine(cosines, how, scale)
    found = rank.combine_scores(iter(cosines.to(device)), how, scale=scale)
    # Log softmax at scale 30 has values to -60, of seven digits.
    np.testing.assert_allclose(found.cpu().numpy(), expected, rtol=2e-6, atol=2e-6)


def test_softmax_averages_probabilities_and_log_softmax_their_logarithms():
    cosines = [torch.tensor([[0.0, 0.0]]), torch.tensor([[np.log(3.0), 0.0]])]
    expected = torch.tensor([[(1 / 2 + 3 / 4) / 2, (1 / 2 + 1 / 4) / 2]])
    torch.testing.assert_close(rank.combine_scores(cosines, "softmax", scale=1.0), expected, check_dtype=False)
    expected = torch.tensor([[np.log(1 / 2 * 3 / 4) / 2, np.log(1 / 2 * 1 / 4) / 2]])
    torch.testing.assert_close(rank.combine_scores(cosines, "log softmax", scale=1.0), expected, check_dtype=False)


@pytest.mark.parametrize("how", ["softmax", "log softmax", "cosine"])
def test_combining_leaves_its_input_alone(how):
    cosines = said()
    before = cosines.clone()
    rank.combine_scores(list(cosines), how, scale=30.0)
    assert torch.equal(cosines, before)


def test_half_precision_cosines_are_combined_in_float32():
    cosine = torch.tensor([[0.5, -0.25]], dtype=torch.bfloat16)
    assert rank.combine_scores([cosine, cosine], "cosine", scale=1.0).dtype == torch.float32


@pytest.mark.parametrize(
    "cosines, how, message",
    [
        ([], "softmax", "there is no member"),
        ([torch.zeros(1, 2)], "ranks", "how must be one of log softmax, softmax, cosine, got 'ranks'"),
        ([torch.zeros(1, 2)], "mean", "how must be one of .*, got 'mean'"),
    ],
)
def test_scores_that_cannot_be_combined_are_refused(cosines, how, message):
    with pytest.raises(ValueError, match=message):
        rank.combine_scores(cosines, how, scale=1.0)


# Fusion of ranks


def slow_fusion(rankings, k, constant=60):
    """Add reciprocals of ranks in a dictionary, exactly: clips and scores of one identity, best first."""
    score = {}
    for clips in rankings:
        for place, clip in enumerate(clips, 1):
            score[clip] = score.get(clip, 0) + Fraction(1, constant + place)
    order = sorted(score, key=lambda clip: (-score[clip], clip))[:k]
    return order, [float(score[clip]) for clip in order]


def ranking_of(lines, width):
    clip = torch.tensor([line + [-1] * (width - len(line)) for line in lines])
    return Ranking(clip, torch.zeros(clip.shape))


some_lists = st.lists(
    st.lists(
        st.permutations(range(9)).flatmap(lambda p: st.integers(0, 9).map(lambda n: list(p[:n]))),
        min_size=2,
        max_size=2,
    ),
    min_size=1,
    max_size=4,
)


@settings(max_examples=80, deadline=None)
@given(members=some_lists, extra=st.lists(st.integers(0, 3), min_size=4, max_size=4), k=st.integers(1, 12))
def test_fusion_of_ranks_agrees_with_a_slow_dictionary(members, extra, k):
    """Two identities; lists of different lengths, shorter ones padded with -1, and rankings of different widths.

    To rank 12, sums of up to four reciprocals are equal only where the ranks are the same.
    """
    rankings = [ranking_of(lines, max(1, *map(len, lines)) + more) for lines, more in zip(members, extra, strict=False)]
    found = rank.fuse_ranks(rankings, k=k)
    for identity in range(2):
        clips, scores = slow_fusion([lines[identity] for lines in members], k)
        row = found.clip[identity].tolist()
        assert row == clips + [-1] * (len(row) - len(clips))
        np.testing.assert_allclose(found.score[identity, : len(clips)], scores, rtol=1e-6)
        assert torch.isneginf(found.score[identity, len(clips) :]).all()


@pytest.mark.parametrize("constant", [1, 60])
def test_fusion_of_ranks_by_hand(constant, device):
    one, two = (
        Ranking(clip.to(device), torch.zeros(1, 3)) for clip in (torch.tensor([[4, 2, 9]]), torch.tensor([[2, 7, -1]]))
    )
    found = rank.fuse_ranks([one, two], constant=constant)
    assert found.clip.tolist()[0][:4] == [2, 4, 7, 9]
    expected = [1 / (constant + 2) + 1 / (constant + 1), 1 / (constant + 1), 1 / (constant + 2), 1 / (constant + 3)]
    np.testing.assert_allclose(found.score[0, :4].cpu(), expected, rtol=1e-6)


def test_fusion_of_one_ranking_is_that_ranking():
    generator = torch.Generator().manual_seed(0)
    alone = top_k([(torch.arange(1200), torch.rand(1200, 3, generator=generator))], k=1000)
    fused = rank.fuse_ranks([alone], k=1000)
    assert torch.equal(fused.clip, alone.clip)
    assert torch.equal(rank.fuse_ranks([alone], k=100).clip, alone.clip[:, :100])


def test_fusion_of_a_ranking_with_itself_is_that_ranking():
    alone = ranking_of([[5, 3, 8], [2]], 4)
    assert torch.equal(rank.fuse_ranks([alone, alone, alone], k=4).clip, alone.clip)


def test_order_of_rankings_does_not_change_their_fusion():
    rankings = [ranking_of([line], 4) for line in ([5, 3, 8, 1], [8, 5], [1, 9, 5])]
    one, two = (rank.fuse_ranks(order, k=6).clip for order in (rankings, rankings[::-1]))
    assert torch.equal(one, two)


def test_equal_sums_of_different_ranks_tie():
    """1 / 63 + 1 / 234 = 1 / 65 + 1 / 210, so the lower row comes first."""
    one, two = torch.full((1, 180), -1), torch.full((1, 180), -1)
    one[0, 2], two[0, 173] = 9, 9  # ranks 3 and 174
    one[0, 4], two[0, 149] = 4, 4  # ranks 5 and 150
    fused = rank.fuse_ranks([Ranking(one, torch.zeros(1, 180)), Ranking(two, torch.zeros(1, 180))], k=2)
    assert fused.clip.tolist() == [[4, 9]] and fused.score[0, 0] == fused.score[0, 1]


# The fallback


def slow_low(fallback, value):
    """Pick the clips of low quality one at a time: those below the threshold, or the lowest again and again."""
    if fallback.threshold is not None:
        return {i for i, v in enumerate(value) if v < fallback.threshold}
    left, low = list(range(len(value))), set()
    while len(low) + 1 <= fallback.share * len(value) + 1e-6:
        lowest = min(left, key=lambda i: (value[i], i))
        left.remove(lowest)
        low.add(lowest)
    return low


@settings(max_examples=100, deadline=None)
@given(
    value=st.lists(st.sampled_from([1.0, 2.0, 8.5, 8.867, 9.0, 40.0]) | st.floats(0, 50), min_size=1, max_size=60),
    share=st.sampled_from([0.0, 0.01, 0.07, 0.25, 0.5, 1.0]),
    threshold=st.sampled_from([None, 8.867, 2.0]),
    weight=st.sampled_from([0.0, 0.3]),
)
def test_fallback_picks_the_clips_that_a_slow_loop_picks(value, share, threshold, weight):
    fallback = Fallback(weight=weight, share=share, threshold=threshold, low=0.8)
    low = slow_low(fallback, value)
    assert fallback.weights(np.array(value)).tolist() == [0.8 if i in low else weight for i in range(len(value))]


@pytest.mark.parametrize("clips, low", [(100, 1), (199, 1), (200, 2), (99, 0), (700, 7), (2900, 29)])
def test_one_percent_of_clips_is_rounded_down_and_not_by_float_noise(clips, low):
    assert np.sum(Fallback(share=0.01).weights(np.arange(clips) + 0.5) > 0) == low


def test_clip_at_the_threshold_is_not_of_low_quality():
    weight = Fallback(by="norm", threshold=8.867, low=0.8).weights(np.array([8.866, 8.867, 8.868]))
    assert weight.tolist() == [0.8, 0, 0]


def test_threshold_takes_the_place_of_the_share():
    assert Fallback(share=1.0, threshold=2.0).weights(np.array([1.0, 3.0])).tolist() == [0.8, 0]


def test_neutral_fallback_gives_the_second_model_no_weight():
    assert not Fallback(share=0, weight=0).weights(np.arange(500.0)).any()


@pytest.mark.parametrize(
    "bad, message",
    [
        ({"by": "det"}, "by must be quality or norm, got 'det'"),
        ({"weight": 1.2}, r"weight must lie in \[0, 1\], got 1.2"),
        ({"share": -0.1}, r"share must lie in \[0, 1\], got -0.1"),
        ({"low": 2}, r"low must lie in \[0, 1\], got 2"),
        ({"low": float("nan")}, r"low must lie in \[0, 1\], got nan"),
        ({"absent": 0.0}, "absent must be positive or None, got 0.0"),
        ({"absent": -1.0}, "absent must be positive or None, got -1.0"),
        ({"lr": 0.0}, "lr must be positive or None, got 0.0"),
    ],
)
def test_meaningless_fallback_is_refused(bad, message):
    with pytest.raises(ValueError, match=message):
        Fallback(**bad)
