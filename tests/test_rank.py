import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmlib import rank
from mmlib.rank import Ranking


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


@settings(max_examples=150, deadline=None)
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


def test_order_of_blocks_does_not_change_the_ranking(device):
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(0, 4, (200, 5), generator=generator).float().to(device)
    forward = blocks(scores, 13)
    assert torch.equal(rank.top_k(forward, k=9).clip, rank.top_k(forward[::-1], k=9).clip)


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


@pytest.mark.parametrize(
    ("given_blocks", "k", "message"),
    [
        ([], 3, "no clip to rank"),
        ([(torch.arange(2), torch.zeros(3, 1))], 3, "2 gallery rows came with scores of shape"),
        ([(torch.arange(2), torch.zeros(2, 1)), (torch.arange(2), torch.zeros(2, 2))], 3, "the first had 1"),
        ([(torch.arange(2), torch.zeros(2, 1))], 0, "k must be at least 1"),
    ],
)
def test_malformed_blocks_are_refused(given_blocks, k, message):
    with pytest.raises(ValueError, match=message):
        rank.top_k(given_blocks, k=k)


# Scores


def test_cosines_by_hand_and_block_by_block(device):
    feature = torch.tensor([[3.0, 4.0], [0.0, 0.0], [-2.0, 0.0]], device=device)
    found = list(rank.cosine_scores(feature, torch.tensor([[5.0, 0.0], [0.0, 0.1]], device=device), block=2))
    assert [row.tolist() for row, _ in found] == [[0, 1], [2]]
    expected = torch.tensor([[0.6, 0.8], [0.0, 0.0], [-1.0, 0.0]])
    torch.testing.assert_close(torch.cat([score for _, score in found]).cpu(), expected)


def test_scale_gives_log_softmax_over_identities():
    feature, prototype = torch.tensor([[1.0, 0.0]]), torch.eye(2)
    ((_, score),) = rank.cosine_scores(feature, prototype, scale=np.log(3))
    torch.testing.assert_close(score.exp(), torch.tensor([[0.75, 0.25]]))


def test_scores_leave_their_input_alone_and_carry_no_graph():
    feature = torch.ones(3, 2, requires_grad=True)
    ((_, score),) = rank.cosine_scores(feature, torch.eye(2), scale=30.0)
    assert not score.requires_grad
    assert torch.equal(feature.detach(), torch.ones(3, 2))


def test_block_size_does_not_change_the_ranking():
    generator = torch.Generator().manual_seed(0)
    # Small integers: every product is exact, so blocks of any size give the same floats and real ties.
    feature = torch.randint(-1, 2, (300, 2), generator=generator).float()
    found = [rank.top_k(rank.cosine_scores(feature, torch.eye(2), block=size), k=50).clip for size in (7, 300)]
    assert torch.equal(*found)


def test_blocks_must_hold_a_clip():
    with pytest.raises(ValueError, match="block must be at least 1"):
        next(rank.cosine_scores(torch.ones(1, 2), torch.eye(2), block=0))


# Cosines in two stages


@pytest.fixture(params=[torch.bfloat16, torch.float32], ids=str)
def product(request, monkeypatch):
    """The number format of the first products."""
    monkeypatch.setattr(rank, "_product_dtype", lambda device: request.param)
    return request.param


def unit(x):
    x = np.asarray(x, np.float32)
    length = np.sqrt((x.astype(np.float64) ** 2).sum(1)).astype(np.float32)
    return x / np.where(length > 0, length, np.float32(1))[:, None]


def halved(x):
    """Add the later half of a list of float32 to the earlier, until one is left."""
    while len(x) > 1:
        half = (len(x) + 1) // 2
        x = [x[i] + x[half + i] if half + i < len(x) else x[i] for i in range(half)]
    return x[0]


def slow_cosines(feature, prototype):
    """Cosines (N, C), with the roundings that `rank_cosines` promises."""
    feature, prototype = unit(feature), unit(prototype)
    return halved(list((feature[:, None] * prototype).transpose(2, 0, 1)))


def assert_is_best(found, scores, k, offset=0):
    expected = slow_top_k(torch.tensor(scores), k)
    np.testing.assert_array_equal(found.clip.cpu().numpy(), np.where(expected < 0, -1, expected + offset))
    picked = np.take_along_axis(scores.T, np.maximum(expected, 0), 1)
    np.testing.assert_array_equal(found.score.cpu().numpy(), np.where(expected < 0, -np.inf, picked))


KINDS = ("normal", "ties", "close", "copies", "rising", "zeros", "tiny")


def problem(kind, clips, identities, dim, seed=0):
    """Features (N, D) and prototypes (C, D) that are ranked with more or less trouble."""
    rng = np.random.default_rng(seed)
    feature, prototype = rng.normal(size=(clips, dim)), rng.normal(size=(identities, dim))
    if kind == "ties":
        feature, prototype = np.sign(feature).round(), rng.integers(-1, 2, prototype.shape)
    elif kind == "close":  # below the steps of bfloat16
        feature = feature[:1] + 1e-3 * feature
    elif kind == "copies":
        feature[:] = feature[:1]
    elif kind == "rising":
        feature = feature[np.argsort(unit(feature) @ unit(prototype)[0])]
    elif kind == "zeros":
        feature[rng.random(clips) < 0.5] = 0
        prototype[0] = 0
    elif kind == "tiny":
        feature, prototype = feature * 1e-30, prototype * 1e30
    return torch.tensor(feature, dtype=torch.float32), torch.tensor(prototype, dtype=torch.float32)


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    kind=st.sampled_from(KINDS),
    clips=st.integers(1, 150),
    identities=st.integers(1, 5),
    dim=st.integers(1, 40),
    k=st.integers(1, 12),
    dtype=st.sampled_from([torch.bfloat16, torch.float32]),
    piece=st.sampled_from([50, 400, 10**6]),
    crowd=st.sampled_from([8, 10**6]),
)
def test_two_stages_find_what_a_full_sort_finds_bit_for_bit(seed, kind, clips, identities, dim, k, dtype, piece, crowd):
    feature, prototype = problem(kind, clips, identities, dim, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rank, "_PIECE", piece)
        patch.setattr(rank, "_CROWD", crowd)
        patch.setattr(rank, "_product_dtype", lambda device: dtype)
        found = rank.rank_cosines(feature, prototype, k=k)
    assert_is_best(found, slow_cosines(feature, prototype), k)


@pytest.mark.parametrize("kind", KINDS)
def test_two_stages_rank_more_clips_than_are_kept(kind, product, device, monkeypatch):
    monkeypatch.setattr(rank, "_PIECE", 1000)
    feature, prototype = problem(kind, 3000, 7, 33)
    found = rank.rank_cosines(feature.to(device), prototype.to(device), k=5)
    assert_is_best(found, slow_cosines(feature, prototype), 5)


def test_few_pairs_get_an_exact_cosine(product, monkeypatch):
    feature, prototype = problem("normal", 5000, 40, 64)
    scored, plain = [], rank._sum

    def counting(x):
        if x.dtype == torch.float32:  # lengths are sums of float64
            scored.append(len(x))
        return plain(x)

    monkeypatch.setattr(rank, "_sum", counting)
    rank.rank_cosines(feature, prototype, k=20)
    assert 20 * 40 <= sum(scored) < 2 * 20 * 40


@pytest.mark.parametrize("kind", ["normal", "ties", "zeros"])
def test_parts_of_any_size_in_any_order_merge_to_the_whole_bit_for_bit(kind, product):
    feature, prototype = problem(kind, 700, 6, 24)
    whole = rank.rank_cosines(feature, prototype, k=30)
    for seed in range(5):
        rng = np.random.default_rng(seed)
        edges = [0, *sorted(rng.integers(0, 701, 7).tolist()), 700]
        parts = [rank.rank_cosines(feature[a:b], prototype, k=30, offset=a) for a, b in zip(edges, edges[1:])]
        rng.shuffle(order := list(range(len(parts))))
        merged = rank.merge((parts[i] for i in order), k=30)
        twice = rank.merge([rank.merge([parts[i] for i in order[:3]], k=30), *(parts[i] for i in order[3:])], k=30)
        for found in (merged, twice):
            assert torch.equal(found.clip, whole.clip) and torch.equal(found.score, whole.score)


@pytest.mark.parametrize("kind", KINDS)
def test_cosines_of_rounded_vectors_are_as_wrong_as_the_bound_at_most(kind, product):
    feature, prototype = problem(kind, 200, 30, 50)
    pool = rank._RoughPool(feature, prototype, 1, 0)
    rough = pool.multiply(0, 200).double().numpy().T
    exact = (unit(feature).astype(np.float64)) @ unit(prototype).astype(np.float64).T
    pool.kth = rank._key(torch.from_numpy(exact.max(0)).float(), torch.zeros(30, dtype=torch.int64))
    margin = exact.max(0) - pool.bar.double().numpy()
    # The margin is for two cosines, and for the bar's own rounding.
    assert (np.abs(rough - exact).max(0) <= margin / 2 + 1e-7).all()


def test_offset_numbers_the_clips():
    feature, prototype = problem("normal", 50, 3, 8)
    found = rank.rank_cosines(feature, prototype, k=60, offset=2**32 - 51)
    assert_is_best(found, slow_cosines(feature, prototype), 60, offset=2**32 - 51)


def test_no_clips_give_an_empty_ranking():
    found = rank.rank_cosines(torch.ones(0, 4), torch.ones(2, 4), k=3)
    assert found.clip.tolist() == [[-1] * 3] * 2 and torch.isneginf(found.score).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_features_of_other_formats_and_layouts_rank_as_float32(dtype, product):
    feature, prototype = problem("normal", 300, 4, 16)
    feature = feature.to(dtype).T.contiguous().T
    before = feature.clone()
    assert_is_best(
        rank.rank_cosines(feature, prototype.to(dtype), k=9),
        slow_cosines(feature.double(), prototype.to(dtype).double()),
        9,
    )
    assert torch.equal(feature, before)


def test_lower_precision_of_products_does_not_change_the_ranking(product):
    feature, prototype = problem("normal", 2000, 20, 64)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", torch.bfloat16):
            found = rank.rank_cosines(feature, prototype, k=50)
    finally:
        torch.set_float32_matmul_precision(before)
    assert_is_best(found, slow_cosines(feature, prototype), 50)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 3e38])
def test_vectors_without_a_length_are_refused_by_clip_or_identity(value):
    feature, prototype = problem("normal", 9, 4, 6)
    bad = feature.clone()
    bad[5, :3] = value
    with pytest.raises(ValueError, match="clip 15 has a vector of length (nan|inf)"):
        rank.rank_cosines(bad, prototype, offset=10)
    with pytest.raises(ValueError, match="identity 5 has a vector of length (nan|inf)"):
        rank.rank_cosines(feature, bad)
    with pytest.raises(ValueError, match="clip 5 has a vector of length (nan|inf)"):
        list(rank.cosine_scores(bad, prototype, block=2))


@pytest.mark.parametrize(
    "feature, prototype, options, message",
    [
        ((3, 4), (2, 5), {}, r"feature has shape \(3, 4\) and prototype \(2, 5\)"),
        ((3,), (2, 3), {}, r"feature has shape \(3,\)"),
        ((3, 0), (2, 0), {}, r"feature has shape \(3, 0\)"),
        ((3, 4), (2, 4), {"k": 0}, "k must be at least 1, got 0"),
        ((3, 4), (2, 4), {"offset": -1}, "offset must lie in .*, got -1"),
        ((3, 4), (2, 4), {"offset": 2**32 - 3}, "offset must lie in .*, got 4294967293"),
    ],
)
def test_malformed_galleries_are_refused(feature, prototype, options, message):
    with pytest.raises(ValueError, match=message):
        rank.rank_cosines(torch.ones(feature), torch.ones(prototype), **options)


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


@settings(max_examples=60, deadline=None)
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


@pytest.mark.parametrize(
    "rankings, k, message",
    [
        ([], 2, "rankings is empty"),
        ([ranked([[1, 2]])], 0, "k must be at least 1, got 0"),
        ([ranked([[1, 2]]), ranked([[3, 4], [5, 6]])], 2, "ranking 1 is of 2 identities, the first of 1"),
        ([ranked([[1, 2]]), ranked([[3, 2]])], 1, "clip 2 comes twice for identity 0"),
        ([ranked([[1, 2], [8, 8]])], 2, "clip 8 comes twice for identity 1"),
        ([ranked([[1, 2]]), ranked([[3, 4]])], 3, "ranking 0 is cut after 2 clips of an identity: k cannot be 3"),
        ([ranked([[1, 2]], [[0.0, np.nan]])], 2, "clip 2 has a NaN score"),
        ([Ranking(torch.zeros(1, 2), torch.zeros(1, 3))], 2, r"clip of shape \(1, 2\) and score of \(1, 3\)"),
    ],
)
def test_rankings_that_cannot_be_merged_are_refused(rankings, k, message):
    with pytest.raises(ValueError, match=message):
        rank.merge(rankings, k=k)
