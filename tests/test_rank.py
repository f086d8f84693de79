import threading
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from mmlib import rank
from mmlib.rank import Fallback, Ranking, combine_scores, fuse_ranks


def blocks(scores, sizes):
    """Cut scores (N, C) into blocks of the given sizes, with their rows."""
    return list(zip(torch.arange(len(scores), device=scores.device).split(sizes), scores.split(sizes), strict=True))


def slow_top_k(scores, k):
    """Sort every identity's clips in Python: higher score first, then the lower row."""
    columns = []
    for column in scores.T.tolist():
        order = sorted(range(len(column)), key=lambda row: (-column[row], row))[:k]
        columns.append(order + [-1] * (k - len(order)))
    return np.array(columns)


def test_top_k_by_hand(device):
    scores = torch.tensor([[0.1, 9.0], [0.3, 7.0], [0.2, 8.0]], device=device)
    found = rank.top_k(blocks(scores, 2), k=2)
    assert found.clip.tolist() == [[1, 2], [0, 2]]
    torch.testing.assert_close(found.score.cpu(), torch.tensor([[0.3, 0.2], [9.0, 8.0]]))


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    clips=st.integers(1, 60),
    identities=st.integers(1, 6),
    k=st.integers(1, 12),
    size=st.integers(1, 60),
    levels=st.sampled_from([2, 5, 10**6]),
    piece=st.sampled_from([1, 7, 10**6]),
)
def test_top_k_agrees_with_a_full_sort_also_with_many_ties(seed, clips, identities, k, size, levels, piece):
    rng = np.random.default_rng(seed)
    scores = torch.tensor(rng.integers(-levels, levels, (clips, identities)) / 7, dtype=torch.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rank, "_PIECE", piece)
        found = rank.top_k(blocks(scores, size), k=k)
    expected = slow_top_k(scores, k)
    np.testing.assert_array_equal(found.clip.numpy(), expected)
    picked = np.take_along_axis(scores.T.numpy(), np.maximum(expected, 0), 1)
    np.testing.assert_array_equal(found.score.numpy(), np.where(expected < 0, -np.inf, picked))


def test_parts_are_ranked_in_threads_of_one_each_and_blocks_are_made_in_those_of_the_caller(monkeypatch):
    plain, seen, made = rank._candidates, [], []

    def spy(*arguments, **options):
        seen.append((threading.get_ident(), torch.get_num_threads(), torch.is_grad_enabled()))
        return plain(*arguments, **options)

    def counted(parts):
        for part in parts:
            made.append(torch.get_num_threads())
            yield part

    monkeypatch.setattr(rank, "_candidates", spy)
    monkeypatch.setattr(rank, "_PIECE", 40)
    before, scores = torch.get_num_threads(), torch.randn(40, 9, generator=torch.Generator().manual_seed(0))
    try:
        torch.set_num_threads(2)
        found = rank.top_k(counted(blocks(scores, 10)), k=7)
        assert torch.get_num_threads() == 2 and set(made) == {2}
        assert {threads for _, threads, _ in seen} == {1} and not any(grad for *_, grad in seen)
        assert threading.get_ident() not in {ident for ident, *_ in seen}
        seen.clear()
        torch.set_num_threads(1)
        assert torch.equal(rank.top_k(blocks(scores, 10), k=7).clip, found.clip)
        assert {ident for ident, *_ in seen} == {threading.get_ident()}
    finally:
        torch.set_num_threads(before)
    np.testing.assert_array_equal(found.clip.numpy(), slow_top_k(scores, 7))


def test_order_of_blocks_does_not_change_the_ranking(device):
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(0, 4, (200, 5), generator=generator).float().to(device)
    forward = blocks(scores, 13)
    assert torch.equal(rank.top_k(forward, k=9).clip, rank.top_k(forward[::-1], k=9).clip)


def test_a_hundred_clips_are_ranked_merged_and_fused_unless_told():
    whole = rank.top_k([(torch.arange(150), torch.rand(150, 2, generator=torch.Generator().manual_seed(0)))])
    assert [part.clip.shape for part in (whole, rank.merge([whole]), fuse_ranks([whole]))] == [(2, 100)] * 3


def test_rising_scores_are_ranked_too():
    scores = torch.arange(500.0)[:, None].repeat(1, 3)
    assert rank.top_k(blocks(scores, 50), k=4).clip.tolist() == [[499, 498, 497, 496]] * 3


def test_one_identity_that_gathers_all_clips_does_not_disturb_the_others(monkeypatch):
    monkeypatch.setattr(rank, "_PIECE", 200)
    scores = torch.arange(2000.0)[:, None] * torch.tensor([1.0] + [-1.0] * 19)
    found = rank.top_k(blocks(scores, 100), k=3).clip.tolist()
    assert found == [[1999, 1998, 1997]] + [[0, 1, 2]] * 19


def test_neighbouring_floats_are_told_apart():
    values = np.array(
        [1.0, np.nextafter(np.float32(1), 2), -1.0, np.nextafter(np.float32(-1), -2), 1e-45, 0], np.float32
    )
    found = rank.top_k(blocks(torch.tensor(values)[:, None], 6), k=6)
    assert found.clip[0].tolist() == [1, 0, 4, 5, 2, 3]


def test_signed_zeros_tie():
    assert rank.top_k(blocks(torch.tensor([[-0.0], [0.0], [-0.0]]), 1), k=3).clip.tolist() == [[0, 1, 2]]


def test_infinite_scores_are_ranked_before_nothing():
    scores = torch.tensor([[-torch.inf], [torch.inf], [0.0]])
    assert rank.top_k(blocks(scores, 2), k=4).clip.tolist() == [[1, 2, 0, -1]]


def test_rows_beyond_31_bits_survive():
    rows = torch.tensor([2**31 + 1, 2**31, 2**32 - 1])
    found = rank.top_k([(rows, torch.tensor([[1.0], [1.0], [-1.0]]))], k=3)
    assert found.clip.tolist() == [[2**31, 2**31 + 1, 2**32 - 1]]


def test_half_precision_scores_are_ranked_as_float32():
    scores = torch.tensor([[0.5], [0.75]], dtype=torch.bfloat16)
    found = rank.top_k(blocks(scores, 2), k=1)
    assert found.clip.tolist() == [[1]] and found.score.dtype == torch.float32


def test_empty_blocks_are_passed_over():
    scores = torch.tensor([[1.0], [2.0]])
    assert rank.top_k([*blocks(scores, 2), (torch.arange(0), torch.zeros(0, 1))], k=1).clip.tolist() == [[1]]


def test_nan_scores_are_refused_by_clip():
    scores = torch.zeros(6, 2)
    scores[4, 1] = torch.nan
    with pytest.raises(ValueError, match="clip 4 has a NaN score"):
        rank.top_k(blocks(scores, 3), k=2)


# Merging


def ranked(clips, scores=None):
    clip = torch.tensor(clips)
    return Ranking(clip, torch.zeros(clip.shape) if scores is None else torch.tensor(scores))


def test_merging_by_hand(device):
    one = ranked([[4, 2], [0, -1]], [[0.9, 0.5], [-0.5, -torch.inf]])
    two = ranked([[1, 7], [9, -1]], [[0.5, 0.4], [0.8, -torch.inf]])
    found = rank.merge([Ranking(clip.to(device), score.to(device)) for clip, score in (two, one)], k=2)
    assert found.clip.tolist() == [[4, 1], [9, 0]]
    torch.testing.assert_close(found.score.cpu(), torch.tensor([[0.9, 0.5], [0.8, -0.5]]))


def test_merging_pads_what_no_part_has():
    found = rank.merge([Ranking(torch.tensor([[3, -1]]), torch.tensor([[0.1, -torch.inf]]))], k=4)
    assert found.clip.tolist() == [[3, -1, -1, -1]] and torch.isneginf(found.score[0, 1:]).all()


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    clips=st.integers(1, 80),
    workers=st.integers(1, 6),
    k=st.integers(1, 9),
    levels=st.sampled_from([2, 10**6]),
    piece=st.sampled_from([1, 10**6]),
)
def test_merged_parts_of_scattered_clips_agree_with_a_full_sort(seed, clips, workers, k, levels, piece):
    rng = np.random.default_rng(seed)
    scores = torch.tensor(rng.integers(-levels, levels, (clips, 3)) / 7, dtype=torch.float32)
    owner = torch.from_numpy(rng.integers(0, workers, clips))
    rows = [(owner == worker).nonzero()[:, 0] for worker in range(workers)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rank, "_PIECE", piece)
        found = rank.merge([rank.top_k([(part, scores[part])], k=k) for part in rows], k=k)
    np.testing.assert_array_equal(found.clip.numpy(), slow_top_k(scores, k))


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
    found = combine_scores(iter(cosines.to(device)), how, scale=scale)
    # Log softmax at scale 30 has values to -60, of seven digits.
    np.testing.assert_allclose(found.cpu().numpy(), expected, rtol=2e-6, atol=2e-6)


def test_softmax_averages_probabilities_and_log_softmax_their_logarithms():
    cosines = [torch.tensor([[0.0, 0.0]]), torch.tensor([[np.log(3.0), 0.0]])]
    expected = torch.tensor([[(1 / 2 + 3 / 4) / 2, (1 / 2 + 1 / 4) / 2]])
    torch.testing.assert_close(combine_scores(cosines, "softmax", scale=1.0), expected, check_dtype=False)
    expected = torch.tensor([[np.log(1 / 2 * 3 / 4) / 2, np.log(1 / 2 * 1 / 4) / 2]])
    torch.testing.assert_close(combine_scores(cosines, "log softmax", scale=1.0), expected, check_dtype=False)


@pytest.mark.parametrize("how", ["softmax", "log softmax", "cosine"])
def test_combining_leaves_its_input_alone(how):
    cosines = said()
    before = cosines.clone()
    combine_scores(list(cosines), how, scale=30.0)
    assert torch.equal(cosines, before)


def test_combining_and_fusing_carry_no_graph():
    cosine = torch.rand(2, 3, requires_grad=True)
    assert not combine_scores([cosine, cosine], "softmax", scale=3.0).requires_grad
    assert not rank.top_k([(torch.arange(2), cosine)], k=1).score.requires_grad


def test_half_precision_cosines_are_combined_in_float32():
    cosine = torch.tensor([[0.5, -0.25]], dtype=torch.bfloat16)
    assert combine_scores([cosine, cosine], "cosine", scale=1.0).dtype == torch.float32


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


@settings(max_examples=30, deadline=None)
@given(members=some_lists, extra=st.lists(st.integers(0, 3), min_size=4, max_size=4), k=st.integers(1, 12))
def test_fusion_of_ranks_agrees_with_a_slow_dictionary(members, extra, k):
    """Two identities; lists of different lengths, shorter ones padded with -1, and rankings of different widths.

    To rank 12, sums of up to four reciprocals are equal only where the ranks are the same.
    """
    rankings = [ranking_of(lines, max(1, *map(len, lines)) + more) for lines, more in zip(members, extra, strict=False)]
    found = fuse_ranks(rankings, k=k)
    for identity in range(2):
        clips, scores = slow_fusion([lines[identity] for lines in members], k)
        row = found.clip[identity].tolist()
        assert row == clips + [-1] * (len(row) - len(clips))
        np.testing.assert_allclose(found.score[identity, : len(clips)], scores, rtol=1e-6)
        assert torch.isneginf(found.score[identity, len(clips) :]).all()


def test_fusion_of_ranks_by_hand(device):
    one, two = (
        Ranking(clip.to(device), torch.zeros(1, 3)) for clip in (torch.tensor([[4, 2, 9]]), torch.tensor([[2, 7, -1]]))
    )
    found = fuse_ranks([one, two])
    assert found.clip.tolist()[0][:4] == [2, 4, 7, 9]
    expected = [1 / 62 + 1 / 61, 1 / 61, 1 / 62, 1 / 63]
    np.testing.assert_allclose(found.score[0, :4].cpu(), expected, rtol=1e-6)


def test_fusion_holds_few_identities_at_a_time(monkeypatch):
    """Of 8 rankings of 50 identities, 40 clips each, nothing that is made is as large as one ranking."""
    generator, sizes = torch.Generator().manual_seed(0), []
    rankings = [Ranking(torch.rand(50, 40, generator=generator).argsort(1), torch.zeros(50, 40)) for _ in range(8)]
    whole = fuse_ranks(rankings, k=10)

    class Watching(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), options=None):
            made = function(*arguments, **(options or {}))
            sizes.extend(part.nbytes for part in (made if isinstance(made, list | tuple) else (made,)))
            return made

    monkeypatch.setattr(rank, "_PIECE", 2 * 8 * 40)
    with Watching():
        found = fuse_ranks(rankings, k=10)
    assert max(sizes) <= rankings[0].clip.nbytes
    assert torch.equal(found.clip, whole.clip) and torch.equal(found.score, whole.score)


def test_fusion_of_one_ranking_is_that_ranking():
    generator = torch.Generator().manual_seed(0)
    alone = rank.top_k([(torch.arange(1200), torch.rand(1200, 3, generator=generator))], k=1000)
    fused = fuse_ranks([alone], k=1000)
    assert torch.equal(fused.clip, alone.clip)
    assert torch.equal(fuse_ranks([alone], k=100).clip, alone.clip[:, :100])


def test_fusion_of_a_ranking_with_itself_is_that_ranking():
    alone = ranking_of([[5, 3, 8], [2]], 4)
    assert torch.equal(fuse_ranks([alone, alone, alone], k=4).clip, alone.clip)


def test_order_of_rankings_does_not_change_their_fusion():
    rankings = [ranking_of([line], 4) for line in ([5, 3, 8, 1], [8, 5], [1, 9, 5])]
    one, two = (fuse_ranks(order, k=6).clip for order in (rankings, rankings[::-1]))
    assert torch.equal(one, two)


def test_equal_sums_of_different_ranks_tie():
    """1 / 63 + 1 / 234 = 1 / 65 + 1 / 210, so the lower row comes first."""
    one, two = torch.full((1, 180), -1), torch.full((1, 180), -1)
    one[0, 2], two[0, 173] = 9, 9  # ranks 3 and 174
    one[0, 4], two[0, 149] = 4, 4  # ranks 5 and 150
    fused = fuse_ranks([Ranking(one, torch.zeros(1, 180)), Ranking(two, torch.zeros(1, 180))], k=2)
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


@settings(max_examples=40, deadline=None)
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
    "bad",
    [
        {"by": "det"},
        {"weight": 1.2},
        {"share": -0.1},
        {"low": 2},
        {"low": float("nan")},
        {"low": True},
        {"absent": 0.0},
        {"absent": -1.0},
        {"lr": 0.0},
        {"lr": float("inf")},
        {"lr": "0.1"},
        {"threshold": float("nan")},
    ],
)
def test_meaningless_fallback_is_refused_by_name_and_value(bad):
    ((name, value),) = bad.items()
    with pytest.raises(ValueError, match=f"^{name} must be .*, got {value!r}$"):
        Fallback(**bad)


def test_fallback_is_the_one_described_unless_told():
    described = {"context": ("scene",), "weight": 0.0, "by": "quality", "share": 0.01, "threshold": None, "low": 0.8}
    assert Fallback() == Fallback(**described, absent=1.0, members=(0,), lr=None) and Fallback(lr=1e-3).lr == 1e-3


def test_threshold_may_be_negative_as_a_quality_may():
    assert Fallback(threshold=-3.0).weights(np.array([-4.0, -2.0])).tolist() == [0.8, 0]
