import copy
import shutil
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import BRIEF, of

from mmlib import metrics, rank
from mmlib import retrieve as retrieve_module
from mmlib.data.store import ClipStore
from mmlib.ensemble import KINDS
from mmlib.experiment import Experiment, Training
from mmlib.rank import COMBINE, Fallback
from mmlib.records import run
from mmlib.retrieve import Member, fit, gallery_of, missing_scores, retrieve, train_members, training_clips

# -- scores --------------------------------------------------------------------------------------------------


def mean_faces(store, clips):
    """Unit means of the normalised embeddings of each clip, one clip at a time."""
    out = []
    for clip in clips:
        face = store.modalities["face"]
        x = np.array(face.feature[face.start[clip] : face.start[clip] + face.count[clip]], float)
        mean = (x / np.linalg.norm(x, axis=1, keepdims=True)).mean(axis=0)
        out.append(mean / np.linalg.norm(mean))
    return np.array(out)


def official(store, gallery, cosine, scale=30.0):
    """Score cosines (N, C) of gallery clips by names, against all labelled val clips."""
    score = scale * cosine
    score -= np.log(np.exp(score).sum(axis=1, keepdims=True))
    names, val = store.clips["clip"].to_numpy(), store.select("val", labelled=True)
    lines = [[names[clip] for clip in val if store.identity_of(clip) == code] for code in range(len(store.identities))]
    known = [code for code, clips in enumerate(lines) if clips]
    result = [names[gallery[np.argsort(-score[:, code], kind="stable")[:100]]] for code in known]
    return metrics.official_score(
        ([store.identities[c] for c in known], [lines[c] for c in known]),
        ([store.identities[c] for c in known], result),
    )


def slow_cosines(store, classifier, gallery, train):
    label, known, found = store.identity_of(train), mean_faces(store, train), mean_faces(store, gallery)
    identities = len(store.identities)
    if classifier == "nearest":
        return np.array(
            [[max(x @ known[i] for i in np.flatnonzero(label == code)) for code in range(identities)] for x in found]
        )
    if classifier == "whitened means":
        deviation = np.concatenate([known[label == c] - known[label == c].mean(axis=0) for c in range(identities)])
        covariance = deviation.T @ deviation / (len(known) - identities)
        covariance = 0.9 * covariance + 0.1 * np.trace(covariance) / len(covariance) * np.eye(len(covariance))
        half = np.linalg.cholesky(np.linalg.inv(covariance))  # not symmetric: only the angles are the same
        known, found = ((x - x_mean) @ half for x, x_mean in ((known, known.mean(0)), (found, known.mean(0))))
        known, found = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (known, found))
    mean = np.array([known[label == code].mean(axis=0) for code in range(identities)])
    return found @ (mean / np.linalg.norm(mean, axis=1, keepdims=True)).T


@pytest.mark.parametrize("classifier", ["nearest", "class means", "whitened means"])
def test_untrained_systems_score_as_a_slow_computation_from_names(store, classifier):
    gallery, train = store.select("val", having="face"), store.select("train", labelled=True, having="face")
    expected = official(store, gallery, slow_cosines(store, classifier, gallery, train))
    record = run(of(store, classifier), store)
    # Kept with six decimals. In float32 two clips whose scores agree to seven digits may change places: at
    # most one identity of these thirty, by one place.
    apart = np.abs(np.array(record.ap) - expected.ap)
    assert np.sum(apart > 1e-5) <= 1 and apart.max() < 0.05
    assert record.measures["map_at_100"] == pytest.approx(np.mean(record.ap), abs=1e-6)
    assert record.measures["top1"] == pytest.approx(expected.top1)


def test_trained_system_scores_as_the_official_rule_from_names(store):
    found = retrieve(of(store, "mlp", training=BRIEF), store)
    names = store.clips["clip"].to_numpy()
    val = store.select("val", labelled=True)
    truth = [list(names[val[store.identity_of(val) == code]]) for code in found.queries]
    result = [list(names[found.gallery[row[row >= 0]]]) for row in found.ranking]
    queries = [store.identities[code] for code in found.queries]
    assert np.allclose(found.ap, metrics.official_score((queries, truth), (queries, result)).ap)


def test_clips_without_a_face_count_among_the_relevant(store):
    faceless = store.modalities["face"].count == 0
    val = store.select("val", labelled=True)
    assert faceless[val].any()
    found = retrieve(of(store), store)
    assert found.relevant.sum() == len(val) > np.sum(store.identity_of(found.gallery) >= 0)


def test_clips_without_a_face_cost_their_identity(store):
    """An AP cannot exceed the share of the identity's clips that have a face, however they are ranked."""
    found = retrieve(of(store), store)
    having = np.bincount(
        store.identity_of(found.gallery)[store.identity_of(found.gallery) >= 0], minlength=len(store.identities)
    )[found.queries]
    assert (having < found.relevant).any()
    assert (found.ap <= having / found.relevant + 1e-12).all()


def test_distractors_are_in_the_gallery(store):
    found = retrieve(of(store), store)
    assert len(found.gallery) == len(store.select("val", having="face"))


def test_recognised_clips_are_those_whose_best_identity_is_right(store):
    gallery, train = store.select("val", having="face"), store.select("train", labelled=True, having="face")
    best = slow_cosines(store, "class means", gallery, train).argmax(axis=1)
    identity = store.identity_of(gallery)
    expected = np.mean(best[identity >= 0] == identity[identity >= 0])
    assert run(of(store), store).measures["clip_top1"] == pytest.approx(expected)


def test_another_seed_trains_another_model_on_a_given_store(store):
    one, two = (run(of(store, "mlp", training=BRIEF, seed=seed), store) for seed in (0, 1))
    assert one.losses != two.losses


@pytest.mark.parametrize("modality", ["head", "audio", "body", "scene"])
def test_every_modality_can_be_ranked(store, modality):
    record = run(of(store, modality=modality), store)
    assert record.measures["gallery_clips"] == len(store.select("val"))
    assert record.measures["clip_top1"] > 1 / 30


def test_trained_model_starts_from_class_means(store):
    label = store.identity_of(store.select("train", labelled=True, having="face"))
    found = fit(of(store, "mlp", training=replace(BRIEF, lr=1e-30, weight_decay=0.0)), store, device="cpu")
    model, clips = found.model, found.clips
    mean = np.array([mean_faces(store, clips)[label == code].mean(axis=0) for code in range(30)])
    cosine = np.einsum("cd,cd->c", mean / np.linalg.norm(mean, axis=1, keepdims=True), model.prototype.detach())
    assert cosine == pytest.approx(np.ones(30), abs=1e-5)


# -- what a store lacks --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arm, missing",
    [
        ({"aggregator": "mean"}, []),
        ({"aggregator": "best half"}, []),
        ({"aggregator": "quality"}, ["det"]),
        ({"aggregator": "NAN"}, []),
        ({"aggregator": "NAN + scores"}, ["det"]),
        ({"aggregator": "mean", "concat": "raw"}, ["det"]),
        ({"aggregator": "best half", "concat": "raw"}, ["det"]),
    ],
)
def test_missing_scores_are_those_that_the_arm_needs(bare, arm, missing):
    assert missing_scores(of(bare, "mlp", **arm), bare) == missing


def test_arm_without_its_scores_is_refused_by_name(bare):
    with pytest.raises(ValueError, match="store: 'quality' needs det scores of 'face', and the store has none"):
        run(of(bare, aggregator="quality"), bare)


def test_unknown_modality_is_refused_with_those_there_are(bare):
    with pytest.raises(ValueError, match="no modality 'scene', it has face"):
        run(of(bare, modality="scene"), bare)


# -- ensembles -----------------------------------------------------------------------------------------------


def small(store, **options):
    """A quick system of faces and scenes on the patchy store."""
    fixed = dict(
        aggregator="norm",
        hidden=8,
        dropout=0.2,
        context=("scene",),
        context_dim=4,
        regions=4,
        training=Training(epochs=2, batch=16, frames=4, lr=1e-2),
    )
    return Experiment(data=str(store.path), **fixed | options)


@pytest.fixture
def scored(monkeypatch):
    """Retrieve, and give the scores (N, C) that were ranked beside what was retrieved."""
    plain, seen = rank.top_k, []

    def spy(blocks, **options):
        seen.append(list(blocks))
        return plain(seen[-1], **options)

    monkeypatch.setattr(rank, "top_k", spy)

    def scored(asked, store, **options):
        seen.clear()
        found = retrieve(asked, store, device="cpu", **options)
        return found, torch.cat([score for _, score in seen[0]]).double().numpy()

    return scored


def slow_scores(member, store, clips):
    """Say what a trained model says of clips (n, C), one by one and in float64; a class of distractors comes last."""
    model, e, out = copy.deepcopy(member.model).double().eval(), member.experiment, []
    for clip in clips:
        inputs, contexts = [None] * 4, {}
        if e.modality:
            face = store.modalities[e.modality]
            rows = slice(face.start[clip], face.start[clip] + face.count[clip])
            x, quality, det = (
                torch.tensor(np.array(part[rows], float))[None]
                for part in (face.feature, face.columns["quality"], face.columns["det"])
            )
            x = torch.from_numpy(_kept(model, x.numpy()))
            inputs = [x, torch.ones_like(quality, dtype=torch.bool), quality, det]
        for name in e.context:
            source = store.modalities[name]
            x = np.array(source.feature[source.start[clip] : source.start[clip] + source.count[clip]], float)
            kept = _kept(model, x)
            mean = (
                (kept / np.linalg.norm(kept, axis=1, keepdims=True)).sum(axis=0) / max(1, len(x)) * kept.shape[1] ** 0.5
            )
            contexts[name] = torch.tensor(mean)[None], torch.tensor([len(x) > 0])
        with torch.no_grad():
            out.append(model(*inputs, contexts)[0].numpy())
    return np.array(out)


def _kept(model, x):
    """Cut the region that a model discards out of the last axis."""
    block, blocks = model.discard or (0, 0)
    width = x.shape[-1]
    gap = np.arange(block * width // blocks, (block + 1) * width // blocks) if blocks else []
    return np.delete(x, gap, axis=-1)


def slow_mean(members, store, clips, how, scale):
    """Average members' scores of clips, over the identities."""
    total = 0
    for member in members:
        score = slow_scores(member, store, clips)
        if how != "cosine":
            score = np.exp(scale * score) / np.exp(scale * score).sum(axis=1, keepdims=True)
        total = total + (np.log(score) if how == "log softmax" else score)
    return (total / len(members))[:, : len(store.identities)]


def listed(scores, queries):
    """Rank clips by scores (N, C): the 100 best of each query."""
    return [np.argsort(-scores[:, code], kind="stable")[:100].tolist() for code in queries]


def without_padding(ranking):
    return [row[row >= 0].tolist() for row in ranking]


@pytest.mark.parametrize("combine", COMBINE)
@pytest.mark.parametrize("kind", KINDS)
def test_ensemble_of_one_ranks_as_its_member(patchy, kind, combine):
    trained = {}
    asked = small(patchy, ensemble=kind, members=(2,), combine=combine, scale=5.0)
    found = retrieve(asked, patchy, device="cpu", trained=trained)
    (member,) = trained.values()
    how = "log softmax" if combine == "ranks" else combine
    scores = slow_mean([member], patchy, found.gallery, how, 5.0)
    assert without_padding(found.ranking) == listed(scores, found.queries)
    assert found.predicted.tolist() == found.by_member[0].tolist() == scores.argmax(axis=1).tolist()


@pytest.mark.parametrize("combine", ["log softmax", "softmax", "cosine"])
def test_scores_of_an_ensemble_are_the_mean_of_its_members(patchy, scored, combine):
    found, scores = scored(small(patchy, ensemble="views", members=(0, 3, 1), combine=combine, scale=9.0), patchy)
    expected = slow_mean(found.members, patchy, found.gallery, combine, 9.0)
    np.testing.assert_allclose(scores, expected, rtol=1e-4, atol=1e-5)
    assert found.predicted.tolist() == expected.argmax(axis=1).tolist()
    for row, member in zip(found.by_member, found.members, strict=True):
        assert row.tolist() == slow_scores(member, patchy, found.gallery).argmax(axis=1).tolist()


def test_ranks_of_an_ensemble_are_fused_from_its_members_rankings(patchy):
    found = retrieve(small(patchy, members=(0, 1, 2), combine="ranks", scale=5.0), patchy, device="cpu")
    points = np.zeros((len(found.queries), len(found.gallery)))
    for member in found.members:
        lists = listed(slow_mean([member], patchy, found.gallery, "log softmax", 5.0), found.queries)
        for query, clips in enumerate(lists):
            for place, clip in enumerate(clips, 1):
                points[query, clip] += 1 / (60 + place)
    got = np.array(without_padding(found.ranking))
    assert sorted(got[0]) == list(range(len(found.gallery)))
    picked = np.take_along_axis(points, got, 1)
    assert np.all(np.diff(picked, axis=1) < 1e-6) and np.all(picked[:, 0] == points.max(axis=1))


@pytest.mark.parametrize("combine", COMBINE)
@pytest.mark.parametrize("kind", KINDS)
def test_prefix_of_members_is_the_same_whether_or_not_more_were_trained(patchy, kind, combine):
    three = small(patchy, ensemble=kind, members=(0, 1, 2), combine=combine)
    trained, first = {}, replace(three, members=(0, 1))
    retrieve(three, patchy, trained=trained)
    among, alone = run(first, patchy, trained=trained), run(first, patchy)
    assert (among.ap, among.measures, among.breakdown, among.losses) == (
        alone.ap,
        alone.measures,
        alone.breakdown,
        alone.losses,
    )


@pytest.mark.parametrize("combine", COMBINE)
def test_order_of_members_does_not_change_the_ranking(patchy, combine):
    one, two = (
        retrieve(small(patchy, members=members, combine=combine), patchy, device="cpu") for members in ((0, 1), (1, 0))
    )
    assert np.array_equal(one.ranking, two.ranking) and np.array_equal(one.by_member, two.by_member[::-1])


@pytest.mark.parametrize("kind", KINDS)
def test_members_repeat_themselves_and_differ_from_the_first(patchy, kind):
    first, second, again = (fit(small(patchy, ensemble=kind), patchy, member, device="cpu") for member in (0, 1, 1))
    assert second.losses == again.losses and np.array_equal(second.clips, again.clips)
    weights = zip(second.model.parameters(), again.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in weights)
    one, other = (member.model.mlp.layers[0].weight for member in (first, second))
    assert second.losses != first.losses and not torch.equal(other, one[:, : other.shape[1]])


@pytest.mark.parametrize("kind", KINDS)
def test_members_are_drawn_and_trained_with_seeds_of_their_own(patchy, monkeypatch, kind):
    seeds, plain = [], retrieve_module.seeded
    monkeypatch.setattr(retrieve_module, "seeded", lambda seed: seeds.append(seed) or plain(seed))

    def spy(models, *_, seeds: list, **__):
        trained.extend(seeds)
        return [[]] * len(models)

    trained = []
    monkeypatch.setattr(retrieve_module, "train_together", spy)
    train_members([(small(patchy, ensemble=kind, seed=7), member) for member in (0, 1, 3)], patchy, device="cpu")
    assert seeds == trained == [7, [7, 1], [7, 3]]


def test_first_member_of_seeds_is_the_plain_model(patchy):
    plain = replace(small(patchy), members=(0,))
    one, two = run(plain, patchy), run(replace(plain, members=(0, 1)), patchy)
    assert one.losses == two.losses


@pytest.mark.parametrize("kind", KINDS)
def test_members_are_trained_on_the_clips_of_their_kind(patchy, kind):
    all_clips = training_clips(small(patchy), patchy)
    clips = fit(small(patchy, ensemble=kind), patchy, 1, device="cpu").clips
    identity = patchy.identity_of(clips)
    assert len(clips) == len(all_clips) and set(clips) <= set(all_clips)
    assert np.array_equal(clips, all_clips) == (kind in ("seeds", "views"))
    same = np.array_equal(np.bincount(identity), np.bincount(patchy.identity_of(all_clips)))
    assert same == (kind != "bagging")


def lacking(store, *clips, name="scene"):
    """The store as if ``clips`` lacked a modality."""
    source = store.modalities[name]
    count = source.count.copy()
    count[np.concatenate(clips)] = 0
    return replace(store, modalities=store.modalities | {name: replace(source, count=count)})


def altered(store, path, change):
    """Copy a store and edit its features, ``change(name, array)`` in place."""
    shutil.copytree(store.path, path)
    for name in store.modalities:
        array = np.lib.format.open_memmap(path / name / "feature.npy", mode="r+")
        change(name, array)
        array.flush()
    return ClipStore.open(path)


def test_training_of_a_view_never_sees_its_block(patchy, tmp_path):
    """Block 1 of 4: dimensions 4 to 8 of 16 of a face, 8 to 16 of 32 of a scene."""

    def change(name, array):
        block = array[:, array.shape[1] // 4 : array.shape[1] // 2]
        block[:] = np.random.default_rng(5).normal(size=block.shape)

    asked = small(patchy, aggregator="NAN + scores", ensemble="views", members=(1,))
    other = altered(patchy, tmp_path / "store", change)
    one, two = (fit(asked, store, 1, device="cpu") for store in (patchy, other))
    states = zip(one.model.state_dict().values(), two.model.state_dict().values())
    assert one.losses == two.losses and all(torch.equal(a, b) for a, b in states if a is not None)
    assert fit(asked, patchy, 2, device="cpu").losses != fit(asked, other, 2, device="cpu").losses


@pytest.mark.parametrize("fields", [{"context": ("face",)}, {"context": ("scene", "scene")}])
def test_context_that_is_there_already_is_refused(fields):
    with pytest.raises(ValueError, match="context has .* twice"):
        Experiment(**fields)


def test_members_that_the_fallback_cannot_have_are_refused_before_anything_is_trained():
    with pytest.raises(ValueError, match="member 8 of views does not exist with 8 regions"):
        Experiment(ensemble="views", regions=4, combine="softmax", fallback=Fallback(members=(8,)))


@pytest.mark.parametrize("at_once, passes", [(1, [[0], [2], [1]]), (16, [[0, 2], [1]])])
def test_trained_members_are_reused_and_added(patchy, monkeypatch, at_once, passes):
    trained_at_once, plain = [], retrieve_module.train_together

    def spy(models, *args, seeds, **options):
        trained_at_once.append([0 if seed == 0 else seed[1] for seed in seeds])
        return plain(models, *args, seeds=seeds, **options)

    monkeypatch.setattr(retrieve_module, "train_together", spy)
    monkeypatch.setitem(retrieve_module.TOGETHER, "cpu", at_once)
    asked, trained = small(patchy, members=(0, 2)), {}
    retrieve(asked, patchy, device="cpu", trained=trained)
    retrieve(replace(asked, members=(2, 1), combine="cosine", scale=3.0), patchy, device="cpu", trained=trained)
    assert trained_at_once == passes and trained.keys() == {(asked.branch(), member) for member in (0, 1, 2)}


def test_members_trained_together_say_what_members_trained_one_by_one_say(patchy, monkeypatch):
    asked = small(patchy, ensemble="views", members=(0, 1, 3), context=("scene",))
    alone = retrieve(asked, patchy, device="cpu")
    monkeypatch.setitem(retrieve_module.TOGETHER, "cpu", 3)
    together = retrieve(asked, patchy, device="cpu")
    for one, other in zip(alone.members, together.members, strict=True):
        torch.testing.assert_close(other.embed(alone.gallery), one.embed(alone.gallery), rtol=1e-3, atol=1e-3)
    assert np.mean(alone.ranking == together.ranking) > 0.98  # near ties may swap


# -- the second model ----------------------------------------------------------------------------------------


def test_second_model_sees_contexts_alone_with_twice_as_many_regions(patchy):
    first = small(
        patchy,
        ensemble="views",
        combine="softmax",
        fallback=Fallback(members=(5, 7)),
        concat="normalised",
        fusion="gated",
        aggregator="NAN + scores",
    )
    second = first.second()
    assert (second.modality, second.context, second.regions, second.members) == (None, ("scene",), 8, (5, 7))
    assert second.fallback is None and second.training == first.training and second.seed == first.seed
    model = retrieve_module.make_model(second, patchy, 5)
    assert model.aggregator is None and model.discard == (5, 8) and model.branches["scene"].layers[0].in_features == 28


def test_second_model_can_have_a_rate_of_its_own(patchy):
    first = small(patchy, combine="softmax", fallback=Fallback(lr=0.25))
    assert first.second().training == replace(first.training, lr=0.25)


def test_second_model_does_not_depend_on_the_aggregator_of_the_first(patchy):
    one, two = (
        small(patchy, combine="softmax", fallback=Fallback(), aggregator=name).second().branch()
        for name in ("mean", "NAN")
    )
    assert one == two


# -- the fallback --------------------------------------------------------------------------------------------


def test_neutral_fallback_is_no_fallback_bit_for_bit(patchy, scored):
    plain = small(patchy, members=(0, 1), combine="softmax")
    one, scores = scored(plain, patchy)
    two, others = scored(replace(plain, fallback=Fallback(share=0.0, weight=0.0, absent=None)), patchy)
    assert np.array_equal(scores, others)
    for name in ("gallery", "ranking", "predicted", "by_member", "ap"):
        assert np.array_equal(getattr(one, name), getattr(two, name))


def slow_mixture(asked, store, trained, gallery):
    """Score clip by clip: the first model, the second, or both, by the rules of the fallback."""
    fallback, face, scene = asked.fallback, store.modalities["face"], store.modalities["scene"]
    first = [trained[asked.branch(), member] for member in asked.members]
    second = [trained[asked.second().branch(), member] for member in fallback.members]
    value = {}
    for clip in gallery:
        rows = range(face.start[clip], face.start[clip] + face.count[clip])
        if fallback.by == "norm":
            known = [np.linalg.norm(np.array(face.feature[row], float)) for row in rows]
        else:
            known = [float(face.columns["quality"][row]) for row in rows]
        if known:
            value[clip] = np.mean(known)
    if fallback.threshold is None:
        low = sorted(value, key=lambda clip: (value[clip], clip))[: int(np.floor(fallback.share * len(value) + 1e-9))]
    else:
        low = [clip for clip in value if value[clip] < fallback.threshold]
    having, either = [clip for clip in gallery if face.count[clip]], [clip for clip in gallery if scene.count[clip]]
    one = dict(zip(having, slow_mean(first, store, having, asked.combine, asked.scale)))
    two = dict(zip(either, slow_mean(second, store, either, asked.combine, asked.scale)))
    out = np.zeros((len(gallery), len(store.identities)))
    for row, clip in enumerate(gallery):
        share = 0 if not scene.count[clip] else fallback.low if clip in low else fallback.weight
        if not face.count[clip]:
            out[row] = fallback.absent * two[clip]
        elif share:
            out[row] = (1 - share) * one[clip] + share * two[clip]
        else:
            out[row] = one[clip]
    return out, low, value


RULES = {
    "described": Fallback(share=0.2, low=0.8, absent=1.0, members=(0, 1)),
    "coded": Fallback(by="norm", threshold=5.5, low=0.8, absent=0.95, members=(2, 0, 1)),
    "scores of all": Fallback(weight=0.3, share=0.0, absent=0.5),
    "all at once": Fallback(weight=0.25, by="norm", share=0.3, low=0.6, absent=None),
    "wholly": Fallback(share=0.5, low=1.0),
}


@pytest.mark.parametrize("combine", ["softmax", "cosine"])
@pytest.mark.parametrize("rule", RULES)
def test_mixing_agrees_with_a_slow_computation(patchy, scored, rule, combine):
    trained = {}
    asked = small(patchy, ensemble="views", members=(0, 2), combine=combine, scale=9.0, fallback=RULES[rule])
    found, scores = scored(asked, patchy, trained=trained)
    expected, low, value = slow_mixture(asked, patchy, trained, found.gallery)
    np.testing.assert_allclose(scores, expected, rtol=1e-4, atol=1e-5)
    assert found.predicted.tolist() == expected.argmax(axis=1).tolist()
    assert without_padding(found.ranking) == listed(expected, found.queries)
    assert (rule == "scores of all") == (not low) and len(low) < len(value)


def test_mixing_on_a_simulated_world_agrees_with_a_slow_computation(store, scored):
    trained = {}
    asked = of(
        store,
        "mlp",
        "norm",
        training=BRIEF,
        hidden=64,
        context=("scene",),
        context_dim=16,
        combine="softmax",
        fallback=Fallback(by="quality", share=0.05, low=0.8, absent=0.95),
    )
    found, scores = scored(asked, store, trained=trained)
    expected, low, value = slow_mixture(asked, store, trained, found.gallery)
    assert len(low) == len(value) // 20 > 0 and len(value) < len(found.gallery)
    # float32 logits of size 30.
    np.testing.assert_allclose(scores, expected, rtol=2e-3, atol=1e-6)


def test_gallery_with_a_fallback_are_the_clips_that_something_can_score(patchy):
    face, scene = (patchy.modalities[name].count > 0 for name in ("face", "scene"))
    val = patchy.select("val")
    assert {(a, b) for a, b in zip(face[val], scene[val])} == {
        (True, True),
        (True, False),
        (False, True),
        (False, False),
    }
    asked = small(patchy, combine="softmax", fallback=Fallback())
    assert retrieve(asked, patchy).gallery.tolist() == val[(face | scene)[val]].tolist()
    left_out = replace(asked, fallback=Fallback(absent=None))
    assert retrieve(left_out, patchy).gallery.tolist() == val[face[val]].tolist()


@pytest.mark.parametrize("fallback", [None, Fallback(), Fallback(absent=None)])
def test_clips_that_nothing_can_score_count_among_the_relevant(patchy, fallback):
    found = retrieve(small(patchy, combine="softmax", fallback=fallback), patchy)
    val = patchy.identity_of(patchy.select("val", labelled=True))
    assert found.relevant.tolist() == [np.sum(val == code) for code in found.queries]
    ranked = np.bincount(patchy.identity_of(found.gallery) + 1, minlength=7)[1:]
    assert (ranked < found.relevant).any() and (found.ap <= ranked / found.relevant + 1e-12).all()


def test_members_name_only_the_clips_that_they_can_score(patchy):
    found = retrieve(small(patchy, members=(0, 1), combine="softmax", fallback=Fallback()), patchy)
    face = patchy.modalities["face"].count[found.gallery] > 0
    assert (~face).any() and ((found.by_member >= 0) == face).all()
    assert (found.predicted >= 0).all()


def test_fallback_by_norm_needs_no_scores_and_by_quality_says_that_they_lack(patchy, tmp_path):
    plain = ClipStore.open(patchy.path)
    plain.modalities["face"].columns.clear()
    asked = small(patchy, combine="softmax", fallback=Fallback(by="norm"))
    assert missing_scores(asked, plain) == [] and len(retrieve(asked, plain).gallery)
    asked = replace(asked, fallback=Fallback(by="quality"))
    assert missing_scores(asked, plain) == ["quality"]
    with pytest.raises(ValueError, match="needs quality scores of 'face', and the store has none"):
        retrieve(asked, plain)


# -- contexts that some clips lack ---------------------------------------------------------------------------


def test_clips_without_a_context_are_counted(patchy):
    record = run(small(patchy), patchy)
    face, scene = (patchy.modalities[name].count > 0 for name in ("face", "scene"))
    split = patchy.clips["split"].to_numpy()
    labelled = patchy.identity_of(np.arange(len(patchy))) >= 0
    assert record.measures["train_without_scene"] == np.sum((split == "train") & labelled & face & ~scene) == 6
    assert record.measures["gallery_without_scene"] == np.sum((split == "val") & face & ~scene) == 11
    assert record.measures["train_clips"] == np.sum((split == "train") & labelled & face)


def test_clips_of_a_fallback_without_a_context_are_counted_in_the_larger_gallery(patchy):
    record = run(small(patchy, combine="softmax", fallback=Fallback()), patchy)
    scene = patchy.modalities["scene"].count[
        retrieve(small(patchy, combine="softmax", fallback=Fallback()), patchy).gallery
    ]
    assert record.measures["gallery_without_scene"] == np.sum(scene == 0) > 0


def test_system_without_contexts_counts_none(patchy):
    assert not [name for name in run(small(patchy, context=()), patchy).measures if "without" in name]


def test_contexts_alone_are_trained_and_ranked_on_the_clips_that_have_one(patchy):
    asked = small(patchy, modality=None)
    scene = patchy.modalities["scene"].count > 0
    val, train = patchy.select("val"), patchy.select("train", labelled=True)
    assert gallery_of(asked, patchy).tolist() == val[scene[val]].tolist()
    assert training_clips(asked, patchy).tolist() == train[scene[train]].tolist()


def test_two_contexts_alone_take_clips_that_have_either(patchy):
    asked = small(patchy, modality=None, context=("scene", "face"))
    either = (patchy.modalities["scene"].count > 0) | (patchy.modalities["face"].count > 0)
    val, train = patchy.select("val"), patchy.select("train", labelled=True)
    assert gallery_of(asked, patchy).tolist() == val[either[val]].tolist()
    assert training_clips(asked, patchy).tolist() == train[either[train]].tolist()
    assert np.isfinite(run(asked, patchy).measures["map_at_100"])


@pytest.mark.parametrize("kept", ["all", "no"])
def test_training_where_all_or_no_clips_have_the_context(patchy, kept, scored):
    everywhere = patchy.select()
    without = np.setdiff1d(everywhere, patchy.select(having="scene"))
    some = lacking(patchy, without, name="face") if kept == "all" else lacking(patchy, everywhere)
    found, scores = scored(small(patchy), some)
    assert len(found.gallery) and np.isfinite(scores).all() and np.isfinite(found.members[0].losses).all()


@pytest.mark.parametrize("fusion", ["concat", "gated"])
@pytest.mark.parametrize(
    "aggregator",
    [
        "mean",
        "norm",
        "quality",
        "best half",
        "learned scores",
        "NAN, two blocks",
        "attention + scores",
        "DANet + scores",
    ],
)
def test_order_of_frames_changes_nothing_with_scenes_views_and_fallback(patchy, scored, aggregator, fusion):
    rng, other = np.random.default_rng(3), ClipStore.open(patchy.path)
    for name, source in patchy.modalities.items():
        order = np.concatenate([rng.permutation(np.arange(a, a + n)) for a, n in zip(source.start, source.count)])
        columns = {column: array[order] for column, array in source.columns.items()}
        other.modalities[name] = replace(source, feature=source.feature[order], columns=columns)
    trained = {}
    asked = small(
        patchy,
        ensemble="views",
        members=(0, 3),
        combine="softmax",
        concat="normalised",
        aggregator=aggregator,
        fusion=fusion,
        fallback=Fallback(share=0.2, members=(0, 5)),
    )
    _, scores = scored(asked, patchy, trained=trained)
    moved = {key: Member(m.experiment, other, m.model, m.clips, m.losses, m.seconds) for key, m in trained.items()}
    _, found = scored(asked, other, trained=moved)
    np.testing.assert_allclose(found, scores, rtol=2e-4, atol=1e-6)


# -- distractors ---------------------------------------------------------------------------------------------


def test_half_of_the_val_distractors_leave_the_gallery_in_both_arms(patchy):
    every, held, classed = (retrieve(small(patchy, distractors=name), patchy) for name in ("all", "held out", "class"))
    assert held.gallery.tolist() == classed.gallery.tolist()
    gone = np.setdiff1d(every.gallery, held.gallery)
    assert 0 < len(gone) <= 15 // 2 and set(held.gallery) < set(every.gallery)
    assert (patchy.identity_of(gone) == -1).all()


def test_exactly_half_of_the_distractors_leave_a_gallery_that_holds_them_all(store):
    """Every clip of the world has a scene: of d distractors, d // 2 leave."""
    every, held = (gallery_of(of(store, modality="scene", distractors=name), store) for name in ("all", "held out"))
    distractors = store.select("val", labelled=False)
    assert len(every) == len(store.select("val"))
    gone = np.setdiff1d(every, held)
    assert len(gone) == len(distractors) // 2 and set(gone) < set(distractors) and set(held) < set(every)


@pytest.mark.parametrize("modality, context", [("face", ("scene",)), (None, ("scene",)), (None, ("face", "scene"))])
def test_class_of_distractors_are_those_that_left_the_gallery(patchy, modality, context):
    plain, held, classed = (
        small(patchy, modality=modality, context=context, distractors=name) for name in ("all", "held out", "class")
    )
    labelled = training_clips(plain, patchy)
    assert training_clips(held, patchy).tolist() == labelled.tolist()
    extra = np.setdiff1d(gallery_of(plain, patchy), gallery_of(classed, patchy))
    found = training_clips(classed, patchy)
    assert found[: len(labelled)].tolist() == labelled.tolist() and found[len(labelled) :].tolist() == extra.tolist()
    assert len(extra) > 0 and (patchy.identity_of(labelled) >= 0).all()


def test_train_distractors_are_never_trained_on(patchy):
    train = patchy.select("train", labelled=False)
    assert len(train) == 4
    for name in ("all", "held out", "class"):
        assert not np.isin(train, training_clips(small(patchy, distractors=name), patchy)).any()


def test_other_seed_takes_another_half(patchy):
    one, two, again = (gallery_of(small(patchy, distractors="held out", seed=seed), patchy) for seed in (0, 1, 0))
    assert one.tolist() == again.tolist() != two.tolist()


@pytest.mark.parametrize("combine", COMBINE)
def test_class_of_distractors_is_in_the_softmax_and_never_in_a_ranking(patchy, scored, combine):
    asked = small(patchy, members=(0, 1), distractors="class", combine=combine)
    found, scores = scored(asked, patchy)
    assert [len(member.model.prototype) for member in found.members] == [7, 7]
    assert (
        scores.shape[1] == 6 and found.queries.max() == 5 and found.predicted.max() <= 5 and found.by_member.max() <= 5
    )
    if combine != "ranks":
        expected = slow_mean(found.members, patchy, found.gallery, combine, 30.0)
        np.testing.assert_allclose(scores, expected, rtol=1e-4, atol=2e-5)


def test_fallback_has_the_class_of_distractors_and_its_gallery_too(patchy, scored):
    trained = {}
    asked = small(patchy, distractors="class", combine="softmax", fallback=Fallback(share=0.2))
    found, scores = scored(asked, patchy, trained=trained)
    held = retrieve(replace(asked, distractors="held out"), patchy)
    assert found.gallery.tolist() == held.gallery.tolist()
    assert [len(member.model.prototype) for member in trained.values()] == [7, 7]
    np.testing.assert_allclose(scores, slow_mixture(asked, patchy, trained, found.gallery)[0], rtol=1e-4, atol=1e-5)


def test_distractors_keep_their_number_in_a_stratified_member(patchy):
    asked = small(patchy, distractors="class", ensemble="stratified")
    clips = fit(asked, patchy, 1, device="cpu").clips
    assert np.sum(patchy.identity_of(clips) < 0) == np.sum(patchy.identity_of(training_clips(asked, patchy)) < 0) > 0


# -- heads and starts ----------------------------------------------------------------------------------------


def test_plain_softmax_is_ranked_on_inner_products(patchy, scored):
    found, scores = scored(
        small(
            patchy, head="dot", combine="cosine", training=Training(epochs=2, batch=16, frames=4, margin=0.0, scale=1.0)
        ),
        patchy,
    )
    member = found.members[0]
    expected = member.embed(found.gallery).double() @ member.model.prototype.detach().double().T
    np.testing.assert_allclose(scores, expected, rtol=1e-4, atol=1e-5)
    assert np.abs(scores).max() > 1


@pytest.mark.parametrize("start", ["class means", "random"])
def test_start_of_the_identities_vectors(patchy, start):
    still = Training(epochs=1, batch=16, frames=4, lr=1e-30, weight_decay=0.0)
    asked = small(patchy, context=(), start=start, training=still)
    found = fit(asked, patchy, device="cpu").model.prototype
    drawn = retrieve_module.make_model(asked, patchy).prototype
    moved = (found != drawn).any(dim=1).tolist()
    # The last identity has no train clip to start from.
    assert moved == [start == "class means"] * 5 + [False]


# -- what training never saw ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lonely(tmp_path_factory):
    """Nine identities of one train clip and three without any; two val clips of each."""
    rng, identity = np.random.default_rng(0), np.array([*range(9), *range(12), *range(12)])
    clips = pd.DataFrame(
        {"clip": [f"c{i:02d}" for i in range(33)], "split": ["train"] * 9 + ["val"] * 24, "identity": identity}
    )
    path, span = tmp_path_factory.mktemp("lonely") / "store", (np.arange(33), np.ones(33, int))
    with ClipStore.create(path, simulated=True, provenance={}) as writer:
        for name, dim in (("face", 16), ("scene", 32)):
            feature = 4 * rng.normal(size=(12, dim))[identity] + rng.normal(size=(33, dim))
            writer.append(name, feature.astype(np.float16), quality=np.full(33, 60.0), det=np.full(33, 0.9))
        writer.finish(clips, [str(i) for i in range(12)], {"face": span, "scene": span})
    return ClipStore.open(path)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("combine", ["softmax", "log softmax", "ranks"])
def test_identities_of_one_clip_or_none_are_ranked_with_finite_scores(lonely, scored, kind, combine):
    fallback = Fallback(share=0.1) if combine == "softmax" else None
    found, scores = scored(small(lonely, ensemble=kind, members=(0, 1), combine=combine, fallback=fallback), lonely)
    assert np.isfinite(scores).all() and found.queries.tolist() == list(range(12))
    assert all(np.isfinite(member.losses).all() for member in found.members)
    assert all(sorted(row) == list(range(24)) for row in without_padding(found.ranking))


def test_store_without_scenes_is_refused_by_store_and_modality(bare):
    for asked in (
        of(bare, "mlp", context=("scene",)),
        of(bare, "mlp", modality=None, context=("scene",)),
        of(bare, "mlp", combine="softmax", fallback=Fallback(by="norm")),
        of(bare, "mlp", ensemble="views", regions=4, members=(0, 1), context=("scene",)),
    ):
        with pytest.raises(ValueError, match=f"^{bare.path}: no modality 'scene', it has face$"):
            run(asked, bare)


def test_store_with_too_few_dimensions_for_the_regions_is_refused(bare):
    with pytest.raises(ValueError, match="block 0 of 16 does not exist in 8 dimensions"):
        run(of(bare, "mlp", ensemble="views", training=BRIEF), bare)


def test_clips_without_scenes_alone_cannot_be_trained_on(patchy):
    empty = lacking(patchy, patchy.select("train"))
    with pytest.raises(
        ValueError, match=f"^{patchy.path}: no labelled train clip has scene, so nothing can be trained"
    ):
        run(small(patchy, modality=None), empty)


def test_gallery_without_a_clip_is_refused_by_what_it_lacks(patchy):
    empty = lacking(patchy, patchy.select("val"))
    with pytest.raises(ValueError, match=f"^{patchy.path}: no val clip with 'scene': nothing to rank"):
        run(small(patchy, modality=None), empty)
