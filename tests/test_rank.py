import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmlib import rank


def blocks(scores, sizes):
    """Cut scores (N, C) into blocks of the given sizes, with their rows."""
    return list(
        zip(torch.arange(len(scores), device=scores.device).split(sizes), scores.split(sizes), strict=True)
    )


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
    found = [
        rank.top_k(rank.cosine_scores(feature, torch.eye(2), block=size), k=50).clip for size in (7, 300)
    ]
    assert torch.equal(*found)


def test_blocks_must_hold_a_clip():
    with pytest.raises(ValueError, match="block must be at least 1"):
        next(rank.cosine_scores(torch.ones(1, 2), torch.eye(2), block=0))
