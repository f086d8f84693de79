import copy
from itertools import combinations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from mmlib import aggregate
from mmlib.aggregate import AGGREGATORS, LEARNED, NEEDS_SCORES
from mmlib.models import (
    ContextBranch,
    Dropout,
    IdentityModel,
    ResidualMLP,
    class_means,
    gap,
    kept_width,
    seeded,
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
    return IdentityModel(AGGREGATORS[aggregator](dim), identities, **{"hidden": 12} | options)


# -- aggregators ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, expected",
    [
        ("mean", lambda x, mask, quality, det: aggregate.mean_pool(x, mask)),
        ("norm", lambda x, mask, quality, det: aggregate.norm_pool(x, mask)),
        ("quality", aggregate.quality_pool),
        ("best half", lambda x, mask, quality, det: aggregate.best_half_pool(x, mask, quality)),
    ],
)
def test_fixed_aggregator_is_its_function(name, expected):
    inputs = clips()
    assert torch.equal(AGGREGATORS[name](DIM)(*inputs), expected(*inputs))


@pytest.mark.parametrize("name", AGGREGATORS)
def test_aggregator_gives_the_width_it_states(name):
    aggregator = AGGREGATORS[name](DIM)
    lengths = [getattr(aggregator, "frames", 6)] * 3
    assert aggregator(*clips(lengths)).shape == (3, aggregator.out_dim)


@pytest.mark.parametrize("name", AGGREGATORS)
def test_aggregators_with_parameters_are_those_called_learned(name):
    assert bool(list(AGGREGATORS[name](DIM).parameters())) == (name in LEARNED)


@pytest.mark.parametrize("name", AGGREGATORS)
def test_aggregators_that_fail_without_scores_are_those_said_to_need_them(name):
    aggregator = AGGREGATORS[name](DIM)
    x, mask, _, _ = clips([getattr(aggregator, "frames", 6)] * 3)
    if name in NEEDS_SCORES:
        with pytest.raises(ValueError, match="scores"):
            aggregator(x, mask, None, None)
    else:
        assert torch.isfinite(aggregator(x, mask, None, None)).all()


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


def test_dropout_uses_the_mask_that_it_was_given():
    drop = Dropout(4, 0.5).train()
    drop.keep = torch.tensor([[0.0, 2.0, 2.0, 0.0]])
    assert drop(torch.ones(1, 4)).tolist() == [[0, 2, 2, 0]]
    assert drop.eval()(torch.ones(1, 4)).tolist() == [[1, 1, 1, 1]]


@pytest.mark.parametrize("p", [0.0, 0.25, 0.5])
def test_dropout_mask_keeps_the_mean(p):
    mask = Dropout(50, p).draw(2000, torch.Generator().manual_seed(0))
    assert set(mask.unique().tolist()) <= {0.0, np.float32(1 / (1 - p)).item()}
    assert abs(mask.mean().item() - 1) < 0.02  # five standard errors


def test_weights_follow_the_seed_and_leave_torchs_own_generator_alone():
    before, drawn = torch.get_rng_state(), []
    for seed in (3, 3, [3, 1], [3, 2]):
        with seeded(seed):
            drawn.append(torch.nn.Linear(4, 4).weight)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(drawn[0], drawn[1])
    assert all(not torch.equal(one, other) for one, other in combinations(drawn[1:], 2))


def test_weights_of_a_seed_are_those_that_torch_draws_from_it():
    with seeded(7):
        found = torch.randn(5)
    assert torch.equal(found, torch.randn(5, generator=torch.Generator().manual_seed(7)))


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
    direction = torch.cat([F.normalize(x[0].mean(0), dim=0), torch.stack([quality[0].mean() / 100, det[0].mean()])])
    assert torch.allclose(F.normalize(pooled, dim=0), F.normalize(direction, dim=0), atol=1e-6)


def test_clip_without_frames_and_with_scores_has_a_finite_gradient():
    x, mask, quality, det = clips(lengths=(2, 0))
    x.requires_grad_()
    pooled = model("norm", concat="normalised").pool(x, mask, quality, det)
    pooled.square().sum().backward()
    assert torch.isfinite(x.grad).all() and not pooled[1].any()


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
    contexts = {
        name: (torch.randn(16, dim, generator=generator), present) for name, dim in (("scene", 32), ("audio", 8))
    }
    cosine = made(x, mask, quality, det, contexts)
    F.cross_entropy(10 * cosine, torch.arange(16) % 3).backward()
    without = {name for name, p in made.named_parameters() if p.grad is None or not p.grad.abs().max() > 1e-12}
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
    one, two = (within_class_whitening(torch.tensor(x), torch.tensor(label), shrinkage=0.1) for x in (feature, moved))
    assert torch.allclose(one, two, atol=1e-8)


def test_whitening_does_not_depend_on_the_order_of_clips_or_the_numbers_of_identities():
    feature, label = scattered()
    order = np.random.default_rng(2).permutation(len(label))
    one = within_class_whitening(torch.tensor(feature), torch.tensor(label), shrinkage=0.1)
    two = within_class_whitening(torch.tensor(feature[order]), torch.tensor(3 * label[order] + 1), shrinkage=0.1)
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
    pool = AGGREGATORS[name](DIM)
    weight = pool.weights(x, mask, quality, det)
    assert torch.allclose(torch.einsum("bt,btd->bd", weight, x), pool(x, mask, quality, det), atol=1e-5)
    assert not weight[~mask].any()


# -- regions -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width, blocks", [(512, 16), (2048, 32), (514, 16), (10, 4), (7, 7), (5, 1)])
def test_regions_cover_every_dimension_once(width, blocks):
    covered = [dimension for block in range(blocks) for dimension in range(width)[gap(width, (block, blocks))]]
    assert covered == list(range(width))


@pytest.mark.parametrize("width, blocks", [(514, 16), (10, 4), (129, 32)])
def test_regions_differ_by_at_most_one_dimension(width, blocks):
    sizes = {width - kept_width(width, (block, blocks)) for block in range(blocks)}
    assert sizes == {width // blocks, width // blocks + 1}


@pytest.mark.parametrize(
    "width, discard, kept",
    [(512, (3, 16), 480), (2048, (15, 16), 1920), (2048, (31, 32), 1984), (512, None, 512), (8, (0, 8), 7)],
)
def test_kept_widths_are_those_of_the_released_code(width, discard, kept):
    assert kept_width(width, discard) == kept


@pytest.mark.parametrize("width, block, blocks", [(8, 4, 4), (8, -1, 4), (3, 0, 4), (8, 0, 0)])
def test_region_that_does_not_exist_is_refused(width, block, blocks):
    with pytest.raises(ValueError, match=f"block {block} of {blocks} does not exist in {width} dimensions"):
        gap(width, (block, blocks))


@pytest.mark.parametrize("discard, width, ends", [((1, 3), 6, (2, 4)), ((0, 4), 8, (0, 2)), (None, 8, (0, 0))])
def test_gap_is_the_discarded_block(discard, width, ends):
    assert (gap(width, discard).start, gap(width, discard).stop) == ends


# -- contexts ------------------------------------------------------------------------------------------------


def branch_of(training=True, out=3):
    """A branch away from where it starts, without dropout, and a feature of each of 6 clips."""
    torch.manual_seed(0)
    branch = ContextBranch(16, out, dropout=0.0)
    for parameter in branch.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return branch.train(training), torch.randn(6, 16)


SOME = torch.tensor([True, False, True, True, False, True])


@pytest.mark.parametrize("training", [True, False])
def test_clip_without_a_context_gets_the_learned_vector(training):
    branch, feature = branch_of(training)
    assert torch.equal(branch(feature, SOME)[~SOME], branch.absent.expand(2, -1))


def plain_layers(branch):
    """The layers of a branch with torch's own batch norm, which knows no mask."""
    layers = [copy.deepcopy(layer) for layer in branch.layers]
    for place in (1, 5):
        norm = torch.nn.BatchNorm1d(layers[place].num_features).train(branch.training)
        norm.load_state_dict(layers[place].state_dict())
        layers[place] = norm
    return torch.nn.Sequential(*layers)


@pytest.mark.parametrize("present", [SOME, torch.ones(6, dtype=torch.bool)])
@pytest.mark.parametrize("training", [True, False])
def test_clips_with_a_context_are_reduced_as_if_the_others_were_not_there(training, present):
    branch, feature = branch_of(training)
    alone = plain_layers(branch)
    weight = torch.randn(6, 3)
    found, expected = branch(feature, present), alone(feature[present])
    assert torch.allclose(found[present], expected, atol=1e-6)
    (found * weight)[present].sum().backward()
    (expected * weight[present]).sum().backward()
    for (name, one), other in zip(branch.layers.named_parameters(), alone.parameters(), strict=True):
        assert torch.allclose(one.grad, other.grad, atol=1e-5), name
    for one, other in zip(branch.layers.buffers(), alone.buffers(), strict=True):
        assert one.dtype == torch.long or torch.allclose(one, other, atol=1e-6)


def test_context_of_few_dimensions_has_a_layer_of_one():
    branch = ContextBranch(3, 2, dropout=0.0)
    assert branch.layers[0].out_features == 1 and branch(torch.randn(4, 3), SOME[:4]).shape == (4, 2)


@pytest.mark.parametrize("number", [0, 1])
def test_batch_with_fewer_than_two_contexts_teaches_nothing_about_them(number):
    branch, feature = branch_of()
    before = [buffer.clone() for buffer in branch.layers.buffers()]
    found = branch(feature, torch.arange(6) < number)
    assert torch.equal(found, branch.absent.expand(6, -1))
    found.sum().backward()
    assert all(torch.equal(one, other) for one, other in zip(branch.layers.buffers(), before, strict=True))
    assert all(not p.grad.any() for p in branch.layers.parameters())


def test_learned_vector_gets_the_gradient_of_the_clips_without_the_context():
    branch, feature = branch_of()
    weight = torch.randn(6, 3)
    (branch(feature, SOME) * weight).sum().backward()
    assert torch.allclose(branch.absent.grad, weight[1] + weight[4])


def test_learned_vector_starts_at_zero():
    assert not ContextBranch(16, 3, dropout=0.5).absent.any()


def gated_pair(bias):
    """The pooled feature of the same clips with and without gates, the gates' weights away from 0."""
    made = model(contexts={"scene": 32}, context_dim=2, gated=True).eval()
    torch.nn.init.normal_(made.gates["scene"].weight, std=0.2)
    torch.nn.init.constant_(made.gates["scene"].bias, bias)
    plain = model(contexts={"scene": 32}, context_dim=2).eval()
    plain.branches.load_state_dict(made.branches.state_dict())
    scene = {"scene": (torch.randn(4, 32), torch.tensor([True, True, True, False]))}
    with torch.no_grad():
        torch.nn.init.normal_(made.branches["scene"].absent)
        plain.branches["scene"].absent.copy_(made.branches["scene"].absent)
        return made, made.pool(*clips(), scene), plain.pool(*clips(), scene)


def test_gate_is_a_logistic_function_of_face_and_context():
    made, gated, plain = gated_pair(0.3)
    layer = made.gates["scene"]
    logit = plain.double().numpy() @ layer.weight[0].detach().double().numpy() + layer.bias.item()
    expected = plain[:, DIM:].double().numpy() / (1 + np.exp(-logit))[:, None]
    assert torch.equal(gated[:, :DIM], plain[:, :DIM])
    np.testing.assert_allclose(gated[:, DIM:], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("bias, share", [(100.0, 1.0), (-100.0, 0.0)])
def test_gate_can_open_and_shut(bias, share):
    _, gated, plain = gated_pair(bias)
    assert torch.allclose(gated[:, DIM:], share * plain[:, DIM:], atol=1e-6) and plain[:, DIM:].any(dim=1).all()


def test_every_context_has_its_own_branch_and_place():
    torch.manual_seed(0)
    made = model(contexts={"scene": 32, "audio": 8}, context_dim=2).eval()
    present = torch.ones(4, dtype=torch.bool)
    contexts = {"audio": (torch.randn(4, 8), present), "scene": (torch.randn(4, 32), present)}
    pooled = made.pool(*clips(), contexts)
    parts = [made.branches[name](*contexts[name]) for name in ("scene", "audio")]
    assert torch.equal(pooled[:, DIM:], torch.cat(parts, 1))


def test_model_of_contexts_alone_needs_no_frames():
    made = IdentityModel(None, 3, hidden=4, contexts={"scene": 32}, context_dim=5).eval()
    scene = torch.randn(4, 32), torch.tensor([True, False, True, True])
    assert torch.equal(made.pool(None, None, None, None, {"scene": scene}), made.branches["scene"](*scene))
    assert made(None, None, None, None, {"scene": scene}).shape == (4, 3)


# -- heads ---------------------------------------------------------------------------------------------------


def test_dot_head_gives_inner_products():
    made = model(head="dot", hidden=0).eval()
    torch.nn.init.normal_(made.prototype, std=3.0)
    pooled = made.pool(*clips()).detach()
    slow = [[sum(a * b for a, b in zip(e, p)) for p in made.prototype.tolist()] for e in pooled.tolist()]
    np.testing.assert_allclose(made(*clips()).detach(), slow, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("head, factor", [("dot", 2.0), ("cosine", 1.0)])
def test_length_of_an_identitys_vector_counts_under_a_dot_head_only(head, factor):
    made = model(head=head).eval()
    before = made(*clips()).detach()
    with torch.no_grad():
        made.prototype.mul_(2)
    torch.testing.assert_close(made(*clips()).detach(), factor * before)


def test_frames_concatenation_leaves_the_aggregators_output_raw():
    made = model("NAN + scores", concat="frames").eval()
    torch.nn.init.normal_(made.aggregator.query, std=0.1)
    pooled = made.pool(*clips())
    assert torch.equal(pooled, made.aggregator(*clips())) and pooled.shape == (4, DIM + 2)


# -- as released -----------------------------------------------------------------------------------------------


def test_layers_as_released_start_away_from_the_identity_map_and_end_in_a_prelu():
    torch.manual_seed(0)
    mlp = ResidualMLP(300, 600, dropout=0.5, released=True)
    assert [type(layer).__name__ for layer in mlp.layers][4:] == ["Linear", "BatchNorm1d", "PReLU"]
    assert (mlp.layers[5].weight == 1).all()
    for layer, fan in ((mlp.layers[0], 300), (mlp.layers[4], 600)):  # Kaiming-normal: variance 2 / fan in
        assert layer.weight.std().item() == pytest.approx((2 / fan) ** 0.5, rel=0.02) and layer.bias is None


def test_branch_as_released_starts_kaiming_normal():
    torch.manual_seed(0)
    branch = ContextBranch(800, 50, dropout=0.5, released=True)
    for layer, fan in ((branch.layers[0], 800), (branch.layers[4], 200)):
        assert layer.weight.std().item() == pytest.approx((2 / fan) ** 0.5, rel=0.02)


def test_branch_without_reduction_is_the_feature_or_a_learned_vector():
    branch = ContextBranch(3, 0, dropout=0.5)
    with torch.no_grad():
        branch.absent += 7
    feature, present = torch.arange(6.0).view(2, 3), torch.tensor([True, False])
    assert branch.out_dim == 3 and [*branch.layers] == []
    for mode in (True, False):  # one clip that has it is enough, as there are no batch statistics
        assert branch.train(mode)(feature, present).tolist() == [[0, 1, 2], [7, 7, 7]]


def test_vectors_of_identities_start_as_released():
    torch.manual_seed(0)
    made = IdentityModel(AGGREGATORS["norm"](602), 10_035, hidden=0, start="xavier")
    bound = (6 / (602 + 10_035)) ** 0.5
    assert made.prototype.abs().max().item() == pytest.approx(bound, rel=1e-3)
    assert made.prototype.norm(dim=1).mean().item() == pytest.approx(0.336, abs=0.002)


def test_class_means_leave_out_clips_of_nobody_where_they_have_no_vector():
    made = IdentityModel(AGGREGATORS["norm"](2), 2, hidden=0)
    pooled, label = torch.tensor([[1.0, 0.0], [0.0, 2.0], [-1.0, -1.0]]), torch.tensor([0, 1, 2])
    made.start_from_class_means(pooled, label)
    assert made.prototype.tolist() == [[1, 0], [0, 1]]
