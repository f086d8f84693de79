from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from torch.nn import functional as F

from mmlib.aggregate import AGGREGATORS
from mmlib.data.store import ClipStore, Resident
from mmlib.ensemble import Together
from mmlib.experiment import Training
from mmlib.losses import batch_focal_loss, focal_loss, margin_logits
from mmlib.models import IdentityModel
from mmlib.train import SampledClasses, _optimiser, classes_of, contexts, pooled_features, train_together

DIM, CONTEXT, IDENTITIES = 12, 32, 4
SHORT = Training(epochs=4, batch=8, frames=6, lr=1e-2)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Clips of four far apart identities, from 1 to 150 frames long, with a context vector each."""
    rng = np.random.default_rng(0)
    count = rng.permutation([1, 1, 1, 2, 150, 70, *rng.integers(3, 12, 26)])
    identity = np.arange(len(count)) % IDENTITIES
    centre = rng.normal(size=(IDENTITIES, DIM))
    feature = 5 * (centre[identity].repeat(count, axis=0) + 0.3 * rng.normal(size=(count.sum(), DIM)))
    scores = {"quality": rng.uniform(10, 150, count.sum()), "det": rng.uniform(0.8, 1, count.sum())}
    clips = pd.DataFrame({"clip": [f"c{i:02d}" for i in range(len(count))], "split": "train", "identity": identity})
    path, one = tmp_path_factory.mktemp("easy") / "store", np.ones(len(count), int)
    with ClipStore.create(path, simulated=True, provenance={}) as writer:
        writer.append("face", feature.astype(np.float16), **scores)
        writer.append("scene", rng.normal(size=(len(count), CONTEXT)).astype(np.float16))
        writer.finish(
            clips,
            [str(i) for i in range(IDENTITIES)],
            {"face": (count.cumsum() - count, count), "scene": (np.arange(len(count)), one)},
        )
    return ClipStore.open(path)


def model(aggregator="norm", device="cpu", **options):
    torch.manual_seed(0)
    return IdentityModel(AGGREGATORS[aggregator](DIM), IDENTITIES, **{"hidden": 16} | options).to(device)


def train(model, store, clips, training, *, seed, modality="face"):
    return train_together([model], store, [clips], training, seeds=[seed], modality=modality)[0]


def trained(store, aggregator="norm", training=SHORT, seed=0, **options):
    made = model(aggregator, **options)
    return made, train(made, store, store.select(), training, seed=seed)


@pytest.fixture
def read(monkeypatch):
    """Write down (clips, modality, rows) of everything that is gathered; a clip is known by its first frame."""
    calls, on = [], ClipStore.on

    def spy(self, name, device="cpu"):
        source = self.modalities[name]
        having = np.flatnonzero(source.count)

        class Spied(Resident):
            def gather(self, rows, **options):
                place = np.searchsorted(source.start[having], rows[:, 0].cpu().numpy(), side="right") - 1
                calls.append((having[place].tolist(), name, rows.tolist()))
                return super().gather(rows, **options)

        return Spied(**vars(on(self, name, device)))

    monkeypatch.setattr(ClipStore, "on", spy)
    return calls


# -- training ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("aggregator", ["mean", "NAN + scores"])
def test_loss_falls_on_clips_that_are_easy_to_tell_apart(store, device, aggregator):
    made = model(aggregator, device)
    history = train(made, store, store.select(), replace(SHORT, epochs=15), seed=0)
    assert history[-1] < 0.2 * history[0]


def test_trained_model_knows_the_clips_it_was_trained_on(store):
    made, _ = trained(store, training=replace(SHORT, epochs=15))
    predicted = (made.embed(pooled_features(made, store, store.select())) @ made.prototype.T).argmax(dim=1)
    assert np.mean(predicted.numpy() == store.identity_of(store.select())) > 0.9


@pytest.mark.parametrize("aggregator", AGGREGATORS)
def test_every_aggregator_trains(store, aggregator):
    made, history = trained(store, aggregator)
    assert len(history) == SHORT.epochs and np.isfinite(history).all()
    assert all(torch.isfinite(parameter).all() for parameter in made.parameters())


@pytest.mark.parametrize("aggregator", ["norm", "attention + scores", "as coded"])
def test_same_seed_gives_the_same_parameters(store, aggregator):
    (one, first), (two, second) = (trained(store, aggregator, seed=5) for _ in range(2))
    assert first == second
    assert all(
        torch.equal(a, b)
        for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True)
        if a is not None
    )


def test_another_seed_gives_other_parameters(store):
    one, two = (trained(store, seed=seed)[0] for seed in (5, 6))
    assert not torch.equal(one.prototype, two.prototype)


def test_two_aggregators_see_the_same_clips_and_frames(store, read):
    trained(store, "norm")
    plain = list(read)
    read.clear()
    trained(store, "NAN + scores", hidden=0)
    assert read == plain


def test_every_epoch_shows_every_clip_once(store, read):
    trained(store)
    shown = [clip for clips, _, _ in read for clip in clips]
    for first in range(0, len(shown), len(store)):
        assert sorted(shown[first : first + len(store)]) == list(range(len(store)))
    assert len(shown) == SHORT.epochs * len(store)


def test_epochs_have_their_own_order_and_frames(store, read):
    trained(store, training=replace(SHORT, epochs=2, batch=len(store)))
    (first, _, rows), (second, _, others) = read
    assert first != second
    assert [set(rows[first.index(clip)]) for clip in range(len(store))] != [
        set(others[second.index(clip)]) for clip in range(len(store))
    ]


def test_remainder_joins_the_other_batches(store, read):
    clips = store.select()[:17]
    train(model(), store, clips, replace(SHORT, epochs=1, batch=8), seed=0)
    assert sorted(len(members) for members, _, _ in read) == [8, 9]


@pytest.mark.parametrize("number, batch, sizes", [(3, 2, [3]), (5, 2, [2, 3]), (4, 1, [2, 2])])
def test_no_batch_has_a_single_clip(store, read, number, batch, sizes):
    trained_on = store.select()[:number]
    train(model(), store, trained_on, replace(SHORT, epochs=1, batch=batch), seed=0)
    assert sorted(len(members) for members, _, _ in read) == sizes


def test_a_single_clip_is_refused(store):
    with pytest.raises(ValueError, match="training needs two clips at least, got 1"):
        train(model(), store, store.select()[:1], SHORT, seed=0)


def test_frames_are_sampled_as_the_training_says(store, read):
    trained(store, training=replace(SHORT, epochs=1, frames=6, sample="first"))
    start, count = store.modalities["face"].start, store.modalities["face"].count
    for clips, _, rows in read:
        for clip, found in zip(clips, rows, strict=True):
            assert [row for row in found if row >= 0] == list(range(start[clip], start[clip] + min(6, count[clip])))


def test_aggregator_of_a_fixed_number_of_frames_gets_that_number(store, read):
    trained(store, "as coded", training=replace(SHORT, epochs=1, frames=6))
    assert all(len(found) == 40 and min(found) >= 0 for _, _, rows in read for found in rows)


def test_aggregator_has_its_own_learning_rate(store):
    made, _ = trained(store, "NAN", replace(SHORT, aggregator_lr=0.0))
    assert not made.aggregator.query.any()
    moved, _ = trained(store, "NAN", replace(SHORT, aggregator_lr=1e-2))
    assert moved.aggregator.query.any()


def test_other_parameters_do_not_follow_the_aggregators_learning_rate(store):
    made, _ = trained(store, "NAN", replace(SHORT, lr=1e-30, weight_decay=0.0))
    assert torch.equal(made.prototype, model("NAN").prototype)


def test_context_is_trained_with_the_faces(store):
    made = model(contexts={"scene": CONTEXT}, context_dim=8)
    before = made.branches["scene"].layers[0].weight.clone()
    train(made, store, store.select(), SHORT, seed=0)
    assert not torch.equal(made.branches["scene"].layers[0].weight, before)


def test_training_leaves_the_model_ready_for_evaluation(store):
    assert not trained(store)[0].training


def test_diverging_loss_is_refused_with_its_epoch(store):
    with pytest.raises(ValueError, match=r"training diverged: loss nan in epoch 1 of Training\(.*lr=1e\+38"):
        trained(store, training=replace(SHORT, lr=1e38))


@pytest.mark.parametrize("focal, expected", [("clip", focal_loss), ("batch", batch_focal_loss)])
def test_loss_is_the_focal_loss_of_the_margin_logits(focal, expected):
    cosine, label = torch.rand(5, 3, dtype=torch.float64), torch.tensor([0, 1, 2, 1, 0])
    training = Training(margin=0.2, scale=12.0, gamma=2.0, focal=focal)
    logits = margin_logits(cosine, label, margin=0.2, scale=12.0)
    torch.testing.assert_close(training.loss(cosine, label), expected(logits, label, gamma=2.0), rtol=1e-12, atol=0)


# -- features ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [1, 64, 16_384])
@pytest.mark.parametrize("aggregator", ["mean", "best half", "NAN, two blocks", "attention + scores"])
def test_pooled_features_are_those_of_every_clip_alone(store, device, aggregator, block):
    made = model(aggregator, device).eval()
    for parameter in made.aggregator.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    clips = np.random.default_rng(1).permutation(store.select())
    found = pooled_features(made, store, clips, block=block)
    face = store.modalities["face"]
    for row, clip in list(enumerate(clips))[::2]:
        rows = slice(face.start[clip], face.start[clip] + face.count[clip])
        x, quality, det = (
            torch.tensor(np.array(part[rows], np.float32))[None].to(device)
            for part in (face.feature, face.columns["quality"], face.columns["det"])
        )
        with torch.no_grad():
            alone = made.pool(x, torch.ones_like(quality, dtype=torch.bool), quality, det)[0]
        assert torch.allclose(found[row], alone, atol=2e-4), clip  # sums of up to 150 frames in another order


def test_pooled_features_carry_each_clips_own_context(store):
    made = model(contexts={"scene": CONTEXT}, context_dim=8).eval()
    clips = np.random.default_rng(1).permutation(store.select())
    found = pooled_features(made, store, clips)
    scene = F.normalize(torch.tensor(np.array(store.modalities["scene"].feature, np.float32)), dim=1) * CONTEXT**0.5
    one = torch.ones(1, dtype=torch.bool)
    with torch.no_grad():
        expected = torch.stack([made.branches["scene"](scene[clip][None], one)[0] for clip in clips])
    assert torch.allclose(found[:, DIM:], expected, atol=1e-5)


def test_batches_of_frames_stay_within_the_block(store, read):
    pooled_features(model(), store, store.select(), block=100)
    sizes = [(len(clips), len(rows[0])) for clips, _, rows in read]
    assert sum(clips for clips, _ in sizes) == len(store)
    assert all(clips * frames <= 100 or clips == 1 for clips, frames in sizes)


def test_no_clip_gives_no_feature(store):
    assert pooled_features(model(), store, np.array([], int)).shape == (0, DIM)


def test_drawn_frames_follow_the_seed(store):
    made = model("as coded").eval()
    torch.nn.init.normal_(made.aggregator.query, std=0.1)
    one, again, other = (pooled_features(made, store, store.select(), seed=seed) for seed in (0, 0, 1))
    assert torch.equal(one, again) and not torch.equal(one, other)


def test_features_of_a_trained_model_do_not_depend_on_dropout(store):
    made, _ = trained(store)
    one, two = (made.embed(pooled_features(made, store, store.select())) for _ in range(2))
    assert torch.equal(one, two)


# -- memory --------------------------------------------------------------------------------------------------


def out_of_memory(*_, **__):
    """Ask for more than there is: what torch says then on a CPU."""
    return torch.empty(2**50)


def no_more_on_the_gpu(*_, **__):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 14.40 GiB.")


def no_more_for_numpy(*_, **__):
    np.empty(2**50)


@pytest.mark.parametrize("full", [out_of_memory, no_more_on_the_gpu, no_more_for_numpy])
def test_a_clip_that_does_not_fit_is_named_with_what_to_lower(store, monkeypatch, full):
    made = model()
    monkeypatch.setattr(made.aggregator, "pool", full)
    longest = int(store.modalities["face"].count.argmax())
    said = f"out of memory: .*{store.clips['clip'][longest]}' has 150 frames of face"
    with pytest.raises(ValueError, match=said):
        pooled_features(made, store, np.array([longest]))
    with pytest.raises(
        ValueError, match="out of memory: .* 8 clips of 6 frames for 1 models .* lower batch, frames or"
    ):
        train(made, store, store.select(), SHORT, seed=0)


def test_other_errors_of_a_computation_are_not_called_a_full_memory(store, monkeypatch):
    made = model()
    monkeypatch.setattr(made.aggregator, "pool", lambda x, *_: x[0] @ x[0])
    with pytest.raises(RuntimeError, match="mat1 and mat2|cannot be multiplied"):
        pooled_features(made, store, store.select())


# -- contexts ------------------------------------------------------------------------------------------------


def slow_context(store, clip, name="scene"):
    """The mean of a clip's unit vectors, of length sqrt(D) if there is one: entries of order 1."""
    source = store.modalities[name]
    x = np.array(source.feature[source.start[clip] : source.start[clip] + source.count[clip]], float)
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).mean(axis=0) * x.shape[1] ** 0.5


def scene_model(store, **options):
    torch.manual_seed(0)
    aggregator = AGGREGATORS["norm"](store.modalities["face"].feature.shape[1])
    return IdentityModel(
        aggregator, len(store.identities), **{"hidden": 8, "contexts": {"scene": 32}, "context_dim": 4} | options
    )


@pytest.mark.parametrize("block", [1, 7, 16_384])
def test_context_of_several_images_is_the_mean_of_their_directions(patchy, block):
    clips = patchy.select("train")
    feature, present = contexts(patchy, "scene", clips, torch.device("cpu"), block=block)
    count = patchy.modalities["scene"].count[clips]
    assert {1, 2} < set(count) and present.tolist() == (count > 0).tolist()
    for row, clip in enumerate(clips):
        expected = slow_context(patchy, clip) if count[row] else np.zeros(32)
        np.testing.assert_allclose(feature[row], expected, rtol=1e-5, atol=1e-5)


def test_clip_without_a_context_is_pooled_with_the_learned_vector(patchy):
    made = scene_model(patchy).eval()
    torch.nn.init.normal_(made.branches["scene"].absent)
    clips = patchy.select(having="face")
    without = patchy.modalities["scene"].count[clips] == 0
    found = pooled_features(made, patchy, clips)[:, -4:]
    assert 0 < without.sum() < len(clips)
    assert torch.equal(found[without], made.branches["scene"].absent.detach().expand(without.sum(), -1))
    assert not (found[~without] == made.branches["scene"].absent).all(dim=1).any()


def test_contexts_alone_are_pooled_without_reading_a_face(patchy, read):
    made = IdentityModel(None, 6, hidden=4, contexts={"scene": 32}, context_dim=3)
    clips = patchy.select(having="scene")
    train(made, patchy, clips[patchy.identity_of(clips) >= 0], SHORT, seed=0, modality=None)
    assert pooled_features(made, patchy, clips, None).shape == (len(clips), 3)
    assert {modality for _, modality, _ in read} == {"scene"}


@pytest.mark.parametrize("having, batch", [("all", 8), ("none", 8), ("one", 9)])
def test_training_with_all_no_or_one_context_in_a_batch(patchy, having, batch):
    clips = patchy.select("train", labelled=True, having="face")
    scenes = patchy.modalities["scene"].count[clips] > 0
    chosen = {"all": clips[scenes], "none": clips[~scenes], "one": np.concatenate([clips[~scenes], clips[scenes][:1]])}[
        having
    ]
    made = scene_model(patchy)
    before = {name: value.clone() for name, value in made.branches["scene"].state_dict().items()}
    history = train(made, patchy, chosen, replace(SHORT, batch=batch, weight_decay=0.0), seed=0)
    assert np.isfinite(history).all() and torch.isfinite(pooled_features(made, patchy, clips)).all()
    moved = {
        name for name, value in made.branches["scene"].state_dict().items() if not torch.equal(value, before[name])
    }
    layers = {name for name in before if name.startswith("layers")}
    # One clip in a batch has no batch statistics, so nothing of the layers can be learned from it.
    assert moved == (layers if having == "all" else {"absent"})


# -- classes -------------------------------------------------------------------------------------------------


def test_clips_without_an_identity_are_of_one_further_class(patchy):
    clips = np.array([0, 30, 6, 33, 84])
    assert patchy.identity_of(clips).tolist() == [0, -1, 1, -1, -1]
    assert classes_of(patchy, clips).tolist() == [0, 6, 1, 6, 6]


def test_model_with_a_further_class_learns_the_distractors(patchy):
    torch.manual_seed(0)
    made = IdentityModel(AGGREGATORS["norm"](16), 7, hidden=32, dropout=0.0)
    clips = patchy.select("train", having="face")
    history = train(made, patchy, clips, replace(SHORT, epochs=40, margin=0.0, sample="first"), seed=0)
    predicted = made.compare(made.embed(pooled_features(made, patchy, clips))).argmax(dim=1).numpy()
    distractor = patchy.identity_of(clips) < 0
    assert history[-1] < 0.1 * history[0]
    assert distractor.any() and (predicted[distractor] == 6).all() and not (predicted[~distractor] == 6).any()


# -- optimisers ----------------------------------------------------------------------------------------------


def test_sgd_takes_the_steps_of_momentum_and_weight_decay_along_a_cosine(store):
    """v = .9 v + (gradient + decay p), p = p - lr v: three steps on all clips, in float64 and by hand."""
    training = Training(
        epochs=3,
        batch=1000,
        frames=1,
        sample="first",
        lr=0.2,
        weight_decay=0.01,
        margin=0.0,
        scale=5.0,
        optimiser="sgd",
    )
    made = model(hidden=0)
    face, prototype = store.modalities["face"], made.prototype.detach().double()
    x = torch.tensor(np.array(face.feature[face.start], float))
    label, velocity = torch.tensor(store.identity_of(store.select())), torch.zeros_like(prototype)
    expected = []
    for step in range(3):
        free = prototype.clone().requires_grad_()
        loss = F.cross_entropy(5 * F.normalize(x, dim=1) @ F.normalize(free, dim=1).T, label)
        loss.backward()
        velocity = 0.9 * velocity + free.grad + 0.01 * prototype
        prototype = prototype - 0.2 * (1 + np.cos(np.pi * step / 3)) / 2 * velocity
        expected.append(loss.item())
    history = train(made, store, store.select(), training, seed=0)
    np.testing.assert_allclose(history, expected, rtol=1e-5)
    np.testing.assert_allclose(made.prototype.detach(), prototype, rtol=1e-4, atol=1e-6)
    # Without momentum the last step would differ by more than that.
    assert (velocity - free.grad - 0.01 * free).abs().max() > 1e-3


def test_loss_without_a_margin_is_the_cross_entropy_of_scaled_scores():
    score, label = 3 * torch.randn(5, 3, dtype=torch.float64), torch.tensor([0, 1, 2, 1, 0])
    slow = -np.mean([2 * row[y] - np.log(sum(np.exp(2 * row))) for row, y in zip(score.numpy(), label)])
    assert Training(margin=0.0, scale=2.0).loss(score, label).item() == pytest.approx(slow)


# -- seeds of members ----------------------------------------------------------------------------------------


def test_seeds_of_members_repeat_themselves_and_differ_from_each_other(store):
    found = [trained(store, seed=seed)[0].prototype for seed in ([5, 1], [5, 1], [5, 2], [6, 1], 5)]
    assert torch.equal(found[0], found[1])
    assert all(not torch.equal(found[i], found[j]) for i, j in ((0, 2), (0, 3), (0, 4), (2, 4)))


def test_members_see_clips_in_another_order_and_other_frames(store, read):
    seen = []
    for seed in ([5, 1], [5, 2]):
        read.clear()
        trained(store, seed=seed, training=replace(SHORT, epochs=1, batch=len(store)))
        seen.append(dict(zip(read[0][0], map(frozenset, read[0][2]), strict=True)))
    assert list(seen[0]) != list(seen[1]) and seen[0] != seen[1] and seen[0].keys() == seen[1].keys()


# -- as released -----------------------------------------------------------------------------------------------


def test_rates_fall_by_epoch_as_released(store, monkeypatch):
    """A cosine over the epochs: every step of the first has the whole rate, of the second of two half of it."""
    rates = {}
    for schedule in ("epoch", "step"):
        seen, step = [], torch.optim.SGD.step

        def spy(self, *arguments, seen=seen, step=step, **options):
            seen.append(self.param_groups[-1]["lr"])
            return step(self, *arguments, **options)

        with monkeypatch.context() as patch:
            patch.setattr(torch.optim.SGD, "step", spy)
            trained(store, training=replace(SHORT, epochs=2, batch=8, lr=0.1, optimiser="sgd", schedule=schedule))
        rates[schedule] = seen
    half = len(rates["epoch"]) // 2
    assert half > 1 and rates["epoch"] == pytest.approx([0.1] * half + [0.05] * half)
    assert len({*rates["step"]}) == len(rates["step"]) == 2 * half


@pytest.mark.parametrize("decay, expected", [("network", 0.0), ("all", 0.3)])
def test_decay_is_on_the_aggregator_only_if_asked(decay, expected):
    made = model("NAN")
    found = _optimiser(dict(made.named_parameters()), replace(SHORT, weight_decay=0.3, decay=decay))
    assert [group["weight_decay"] for group in found.param_groups] == [expected, 0.3]


def test_raw_context_is_the_mean_of_the_embeddings_as_they_are(patchy):
    clips, source = patchy.select("train"), patchy.modalities["scene"]
    feature, present = contexts(patchy, "scene", clips, torch.device("cpu"), raw=True)
    for clip, found, has in zip(clips, feature, present):
        rows = source.feature[source.start[clip] : source.start[clip] + source.count[clip]].astype(np.float64)
        assert has == (len(rows) > 0)
        np.testing.assert_allclose(found, rows.mean(0) if len(rows) else 0 * found, rtol=1e-3, atol=1e-5)


def test_loss_may_be_another_than_that_of_the_training(store):
    made = model()
    options = {"seeds": [0], "loss": lambda cosine, label: 0 * cosine.sum() + 3}
    assert train_together([made], store, [store.select()], SHORT, **options)[0] == pytest.approx([3.0] * SHORT.epochs)


# -- a part of the classes in every step -----------------------------------------------------------------------

MANY = 40  # identities, each of two clips
PART = Training(epochs=3, batch=4, frames=2, lr=1e-2, classes=10)


@pytest.fixture(scope="module")
def crowd(tmp_path_factory):
    rng, number = np.random.default_rng(1), 2 * MANY
    path = tmp_path_factory.mktemp("crowd") / "store"
    clips = pd.DataFrame({"clip": [f"c{i:02d}" for i in range(number)], "split": "train"})
    with ClipStore.create(path, simulated=True, provenance={}) as writer:
        writer.append("face", rng.normal(size=(number, DIM)).astype(np.float16))
        spans = {"face": (np.arange(number), np.ones(number, int))}
        writer.finish(clips.assign(identity=np.arange(number) % MANY), [f"{i:02d}" for i in range(MANY)], spans)
    return ClipStore.open(path)


def crowd_model(member=0, extra=0):
    torch.manual_seed(member)
    return IdentityModel(AGGREGATORS["norm"](DIM), MANY + extra, hidden=16)


def steps_of(monkeypatch):
    """Write down, for every step, the classes that were drawn, the labels among them, and all vectors before it."""
    seen, draw = [], SampledClasses.draw

    def spy(self, label, optimiser):
        before, found = self._whole.clone(), draw(self, label, optimiser)
        seen.append((label, self._drawn, found, before))
        return found

    monkeypatch.setattr(SampledClasses, "draw", spy)
    return seen


@pytest.mark.parametrize("optimiser", ["adamw", "sgd"])
@pytest.mark.parametrize("members", [1, 2])
def test_a_step_touches_the_classes_of_its_clips_and_some_others_and_no_more(crowd, monkeypatch, members, optimiser):
    seen, models = steps_of(monkeypatch), [crowd_model(member) for member in range(members)]
    training = replace(PART, optimiser=optimiser)
    train_together(models, crowd, [crowd.select()] * members, training, seeds=list(range(members)))
    assert len(seen) == training.epochs * 2 * MANY // training.batch
    after = [before for *_, before in seen[1:]] + [torch.stack([model.prototype.detach() for model in models])]
    for (label, drawn, found, before), now in zip(seen, after):
        assert torch.equal(drawn.gather(1, found), label)  # every clip meets its own identity
        assert drawn.shape == (members, PART.classes) and all(len(set(row.tolist())) == PART.classes for row in drawn)
        for member in range(members):
            moved = (before[member] != now[member]).any(1).nonzero().flatten()
            assert set(moved.tolist()) <= set(drawn[member].tolist()) and len(moved)
    others = torch.cat([drawn for _, drawn, _, _ in seen], 1)
    assert all(len(row.unique()) == MANY for row in others)
    if members == 2:
        assert not torch.equal(*seen[0][1])  # each draws its own


def test_all_classes_are_none_left_out(crowd):
    one, other = crowd_model(), crowd_model()
    train(one, crowd, crowd.select(), replace(PART, classes=MANY), seed=0)
    train(other, crowd, crowd.select(), replace(PART, classes=0), seed=0)
    assert torch.equal(one.prototype, other.prototype)


def test_nearly_all_classes_lead_nearly_to_the_same_place(crowd):
    """Both optimisers keep what they know of an identity while it is not drawn."""
    for optimiser in ("adamw", "sgd"):
        one, other = crowd_model(), crowd_model()
        train(one, crowd, crowd.select(), replace(PART, optimiser=optimiser, classes=MANY - 1), seed=0)
        train(other, crowd, crowd.select(), replace(PART, optimiser=optimiser, classes=0), seed=0)
        start = crowd_model().prototype
        assert (one.prototype - other.prototype).norm() < 0.3 * (other.prototype - start).norm()


def test_the_class_of_nobody_is_always_the_last(crowd, monkeypatch):
    seen = steps_of(monkeypatch)
    train(crowd_model(extra=1), crowd, crowd.select(), PART, seed=0)
    assert all(drawn[0, -1] == MANY for _, drawn, _, _ in seen)


def test_nobody_without_a_class_has_a_label_beyond_the_drawn(crowd):
    sampled = SampledClasses(Together([crowd_model()]), 10, MANY, [torch.Generator()])
    label = sampled.draw(torch.tensor([[3, MANY]]), torch.optim.SGD([sampled.rows], 0.1))
    assert label[0, 1] == 10 and label[0, 0] < 10


def test_fewer_classes_than_a_step_may_need_are_refused():
    with pytest.raises(ValueError, match="classes must be a whole number in .8, inf., got 7"):
        replace(PART, classes=7)
