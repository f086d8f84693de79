import numpy as np
import pytest
import torch
from torch.nn import functional as F

from mmlib import aggregate
from mmlib.models import (
    AGGREGATORS,
    LEARNED,
    NEEDS_SCORES,
    ContextBranch,
    IdentityModel,
    ResidualMLP,
    class_means,
    make_aggregator,
    within_class_whitening,
)

DIM = 8


def clips(lengths=(5, 1, 9, 3), dim=DIM, seed=0):
    """Ragged clips, zero where padded: x, mask, quality, det."""
    rng = np.random.default_rng(seed)
    mask = np.arange(max(lengths))[None] < np.array(lengths)[:, None]
    x = 20 * rng.normal(size=(*mask.shape, dim)) * mask[..., None]
    quality, det = rng.uniform(10, 150, mask.shape) * mask, rng.uniform(0.8, 1, mask.shape) * mask
    x, quality, det = (torch.tensor(part, dtype=torch.float32) for part in (x, quality, det))
    return x, torch.tensor(mask), quality, det


def model(aggregator="mean", identities=3, dim=DIM, **options):
    torch.manual_seed(0)
    return IdentityModel(make_aggregator(aggregator, dim), identities, **{"hidden": 12} | options)


# -- aggregators ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, expected",
    [
        ("mean", lambda x, mask, quality, det: aggregate.mean_pool(x, mask)),
        ("norm", lambda x, mask, quality, det: aggregate.norm_pool(x, mask)),
        ("quality", aggregate.quality_pool),
        ("best half", lambda x, mask, quality, det: aggregate.best_k_pool(x, mask, quality, 0.5)),
    ],
)
def test_fixed_aggregator_is_its_function(name, expected):
    inputs = clips()
    assert torch.equal(make_aggregator(name, DIM)(*inputs), expected(*inputs))


@pytest.mark.parametrize("name", AGGREGATORS)
def test_aggregator_gives_the_width_it_states(name):
    aggregator = make_aggregator(name, DIM)
    lengths = [getattr(aggregator, "frames", 6)] * 3
    assert aggregator(*clips(lengths)).shape == (3, aggregator.out_dim)


@pytest.mark.parametrize("name", AGGREGATORS)
def test_aggregators_with_parameters_are_those_called_learned(name):
    assert bool(list(make_aggregator(name, DIM).parameters())) == (name in LEARNED)


@pytest.mark.parametrize("name", AGGREGATORS)
def test_aggregators_that_fail_without_scores_are_those_said_to_need_them(name):
    aggregator = make_aggregator(name, DIM)
    x, mask, _, _ = clips([getattr(aggregator, "frames", 6)] * 3)
    if name in NEEDS_SCORES:
        with pytest.raises(ValueError, match="scores"):
            aggregator(x, mask, None, None)
    else:
        assert torch.isfinite(aggregator(x, mask, None, None)).all()


def test_unknown_aggregator_is_refused():
    with pytest.raises(ValueError, match="aggregator must be one of mean, .*, got 'median'"):
        make_aggregator("median", DIM)


# -- layers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
def test_residual_mlp_starts_as_the_identity_map(training):
    x = clips()[0][:, 0]
    assert torch.equal(ResidualMLP(DIM, 12, dropout=0.5).train(training)(x), x)


def test_residual_mlp_moves_away_from_the_identity_map():
    mlp = ResidualMLP(DIM, 12, dropout=0)
    x = clips()[0][:, 0]
    optimiser = torch.optim.SGD(mlp.parameters(), lr=0.1)
    mlp(x).square().sum().backward()
    optimiser.step()
    assert not torch.allclose(mlp(x), x)


@pytest.mark.parametrize("dim, out", [(2048, 128), (1920, 120)])
def test_context_branch_has_the_widths_of_the_released_code(dim, out):
    branch = ContextBranch(dim, out, dropout=0.5)
    assert branch.layers[0].out_features == dim // 4
    assert branch(torch.randn(2, dim), torch.ones(2, dtype=torch.bool)).shape == (2, out) == (2, branch.out_dim)


# -- the model -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("concat, extra", [("none", 0), ("normalised", 2), ("raw", 2)])
def test_concatenated_scores_widen_the_clip_feature_by_two(concat, extra):
    made = model(concat=concat)
    assert made.pool(*clips()).shape == (4, DIM + extra)
    assert made(*clips()).shape == (4, 3)


def test_raw_concatenation_is_the_feature_beside_its_mean_scores():
    x, mask, quality, det = clips(lengths=(2,))
    pooled = model("norm", concat="raw").pool(x, mask, quality, det)[0]
    assert torch.allclose(pooled[:DIM], x[0].mean(0))
    assert torch.allclose(pooled[DIM:], torch.stack([quality[0].mean() / 100, det[0].mean()]))


def test_normalised_concatenation_scales_the_feature_to_the_order_of_the_scores():
    x, mask, quality, det = clips(lengths=(2,))
    pooled = model("norm", concat="normalised").pool(x, mask, quality, det)[0]
    direction = torch.cat(
        [F.normalize(x[0].mean(0), dim=0), torch.stack([quality[0].mean() / 100, det[0].mean()])]
    )
    assert torch.allclose(F.normalize(pooled, dim=0), F.normalize(direction, dim=0), atol=1e-6)


def test_scores_are_averaged_over_frames_not_over_padding():
    x, mask, quality, det = clips(lengths=(2,))
    longer = [F.pad(part, (0, 0, 0, 3) if part.dim() == 3 else (0, 3)) for part in (x, mask, quality, det)]
    made = model(concat="normalised")
    assert torch.allclose(made.pool(*longer), made.pool(x, mask, quality, det), atol=1e-6)


def test_pooled_entries_are_of_order_one():
    assert torch.allclose(model("norm").pool(*clips()).square().mean(dim=1), torch.ones(4), atol=1e-5)


def test_context_joins_the_clip_feature():
    made = model(contexts={"scene": 32}, context_dim=2)
    present = torch.ones(4, dtype=torch.bool)
    one, two = (made.pool(*clips(), {"scene": (torch.randn(4, 32), present)}) for _ in range(2))
    assert one.shape == (4, DIM + 2)
    assert torch.equal(one[:, :DIM], two[:, :DIM]) and not torch.allclose(one[:, DIM:], two[:, DIM:])


def test_output_is_a_cosine_with_every_identity():
    made = model().eval()
    embedded = made.embed(made.pool(*clips())).detach().numpy()
    prototype = made.prototype.detach().numpy()
    slow = [[e @ p / np.linalg.norm(e) / np.linalg.norm(p) for p in prototype] for e in embedded]
    assert np.allclose(made(*clips()).detach(), slow, atol=1e-6)


def test_clip_without_a_frame_gives_finite_cosines():
    assert torch.isfinite(model().eval()(*clips(lengths=(3, 0)))).all()


def test_linear_classifier_has_no_mlp():
    made = model(hidden=0)
    assert [name for name, _ in made.named_parameters()] == ["prototype"]


def test_concatenation_without_scores_names_them():
    x, mask, quality, _ = clips()
    with pytest.raises(ValueError, match="concat needs det scores"):
        model(concat="raw").pool(x, mask, quality, None)


def test_unknown_concatenation_is_refused():
    with pytest.raises(ValueError, match="concat must be one of none, normalised, raw, frames, got 'sum'"):
        model(concat="sum")


@pytest.mark.parametrize("concat", ["none", "normalised"])
@pytest.mark.parametrize("name", AGGREGATORS)
def test_every_parameter_gets_a_gradient(name, concat):
    made = model(name, concat=concat, contexts={"scene": 32, "audio": 8}, context_dim=2, gated=True, dropout=0)
    generator = torch.Generator().manual_seed(1)
    for parameter in made.parameters():  # behind what starts at 0 nothing gets a gradient
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.3, generator=generator)
    lengths = [made.aggregator.frames] * 16 if hasattr(made.aggregator, "frames") else [5, 2, 9, 3] * 4
    x, mask, quality, det = clips(lengths)
    x = x / 20  # attention over norms of 20 puts all weight on one frame, whose gradient is 0
    present = torch.arange(16) % 4 > 0
    contexts = {name: (torch.randn(16, dim, generator=generator), present) for name, dim in
                (("scene", 32), ("audio", 8))}
    cosine = made(x, mask, quality, det, contexts)
    F.cross_entropy(10 * cosine, torch.arange(16) % 3).backward()
    without = {
        name for name, p in made.named_parameters() if p.grad is None or not p.grad.abs().max() > 1e-12
    }
    assert without == set()


# -- class means ---------------------------------------------------------------------------------------------


def test_class_means_by_hand():
    feature = torch.tensor([[1.0, 0.0], [3.0, 2.0], [5.0, 7.0]])
    assert class_means(feature, torch.tensor([2, 2, 0]), 3).tolist() == [[5, 7], [0, 0], [2, 1]]


def test_start_from_class_means_scores_by_the_cosine_to_the_nearest_mean():
    rng = np.random.default_rng(0)
    pooled, label = rng.normal(size=(12, DIM)), np.arange(12) % 3
    made = model(hidden=12).eval()
    made.start_from_class_means(torch.tensor(pooled, dtype=torch.float32), torch.tensor(label))
    query = rng.normal(size=DIM)
    expected = []
    for identity in range(3):
        mean = np.mean([row / np.linalg.norm(row) for row in pooled[label == identity]], axis=0)
        expected.append(query @ mean / np.linalg.norm(query) / np.linalg.norm(mean))
    embedded = made.embed(torch.tensor(query, dtype=torch.float32)[None])
    found = (embedded @ F.normalize(made.prototype, dim=1).T).detach()[0]
    assert np.allclose(found, expected, atol=1e-6)


def test_identity_without_a_clip_keeps_its_direction():
    made = model()
    before = made.prototype[1].clone()
    made.start_from_class_means(torch.randn(4, DIM), torch.tensor([0, 0, 2, 2]))
    assert torch.equal(made.prototype[1], before)


# -- whitening -----------------------------------------------------------------------------------------------


def scattered(n=300, identities=20, seed=0):
    """Features of some identities with strongly correlated deviations from their means."""
    rng = np.random.default_rng(seed)
    label = rng.integers(identities, size=n)
    deviation = rng.normal(size=(n, DIM)) @ rng.normal(size=(DIM, DIM))
    return 5 * rng.normal(size=(identities, DIM))[label] + deviation, label


def within_covariance(feature, label):
    """The unbiased within-class covariance, one clip at a time."""
    total, freedom = np.zeros((DIM, DIM)), 0
    for identity in set(label.tolist()):
        rows = feature[label == identity]
        for row in rows:
            total += np.outer(row - rows.mean(0), row - rows.mean(0))
        freedom += len(rows) - 1
    return total / freedom


def test_whitened_features_have_unit_within_class_covariance():
    feature, label = scattered()
    whitening = within_class_whitening(torch.tensor(feature), torch.tensor(label), shrinkage=0).numpy()
    assert np.allclose(within_covariance(feature @ whitening, label), np.eye(DIM), atol=1e-8)


def test_whitening_does_not_depend_on_where_the_class_means_lie():
    feature, label = scattered()
    moved = feature + 7 * np.random.default_rng(1).normal(size=(20, DIM))[label]
    one, two = (
        within_class_whitening(torch.tensor(x), torch.tensor(label), shrinkage=0.1) for x in (feature, moved)
    )
    assert torch.allclose(one, two, atol=1e-8)


def test_whitening_does_not_depend_on_the_order_of_clips_or_the_numbers_of_identities():
    feature, label = scattered()
    order = np.random.default_rng(2).permutation(len(label))
    one = within_class_whitening(torch.tensor(feature), torch.tensor(label), shrinkage=0.1)
    two = within_class_whitening(
        torch.tensor(feature[order]), torch.tensor(3 * label[order] + 1), shrinkage=0.1
    )
    assert torch.allclose(one, two, atol=1e-8)


def test_full_shrinkage_only_scales():
    feature, label = scattered()
    whitening = within_class_whitening(torch.tensor(feature), torch.tensor(label), shrinkage=1).numpy()
    variance = np.trace(within_covariance(feature, label)) / DIM
    assert np.allclose(whitening, np.eye(DIM) / np.sqrt(variance), atol=1e-8)


def test_shrinkage_interpolates_between_the_covariance_and_its_average_variance():
    feature, label = scattered()
    whitening = within_class_whitening(torch.tensor(feature), torch.tensor(label), shrinkage=0.3).numpy()
    covariance = within_covariance(feature, label)
    shrunk = 0.7 * covariance + 0.3 * np.trace(covariance) / DIM * np.eye(DIM)
    assert np.allclose(whitening @ shrunk @ whitening, np.eye(DIM), atol=1e-8)


def test_fewer_clips_than_dimensions_give_a_finite_whitening():
    feature, label = scattered(n=5, identities=2)
    whitening = within_class_whitening(torch.tensor(feature), torch.tensor(label), shrinkage=0)
    assert torch.isfinite(whitening).all()


def test_whitening_needs_an_identity_with_two_clips():
    with pytest.raises(ValueError, match="no identity has two different clips"):
        within_class_whitening(torch.randn(3, DIM), torch.arange(3), shrinkage=0.1)


@pytest.mark.parametrize("shrinkage", [-0.1, 1.5])
def test_shrinkage_out_of_range_is_refused(shrinkage):
    with pytest.raises(ValueError, match=f"shrinkage must lie in .*, got {shrinkage}"):
        within_class_whitening(torch.randn(3, DIM), torch.arange(3), shrinkage=shrinkage)


def test_model_compares_clips_after_whitening():
    made = model("mean", hidden=0)
    made.centre, made.whitening = torch.randn(DIM), torch.randn(DIM, DIM)
    x, mask, quality, det = clips()
    mean = F.normalize(aggregate.mean_pool(x, mask), dim=1)
    expected = F.normalize((mean - made.centre) @ made.whitening, dim=1)
    assert torch.allclose(made.embed(made.pool(x, mask, quality, det)), expected, atol=1e-5)


@pytest.mark.parametrize("name", ["norm", "quality", "best half"])
def test_weights_of_a_fixed_pool_rebuild_its_feature(name):
    x, mask, quality, det = clips()
    pool = make_aggregator(name, DIM)
    weight = pool.weights(x, mask, quality, det)
    assert torch.allclose(torch.einsum("bt,btd->bd", weight, x), pool(x, mask, quality, det), atol=1e-5)
    assert not weight[~mask].any()
