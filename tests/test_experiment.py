import shutil
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from conftest import BRIEF, of

from mmlib import metrics
from mmlib.rank import Fallback
from mmlib.experiment import Experiment, as_seeds, torch_device
from mmlib.retrieval import fit, missing_scores, retrieve
from mmlib.runs import run
from mmlib.train import Training

# -- keys ----------------------------------------------------------------------------------------------------

OTHER = {
    "profile": "tiny",
    "settings": (("no_face", 0.1),),
    "seed": 1,
    "modality": "head",
    "aggregator": "norm",
    "classifier": "linear",
    "concat": "raw",
    "hidden": 8,
    "dropout": 0.1,
    "shrinkage": 0.2,
    "scale": 9.0,
    "head": "dot",
    "context": ("scene",),
    "context_dim": 8,
    "fusion": "gated",
    "start": "random",
    "distractors": "class",
    "split": "test",
    "ensemble": "views",
    "regions": 8,
    "members": (1,),
    "combine": "softmax",
    "fallback": Fallback(),
}
# What a field has a meaning with.
BESIDE = {
    "head": {"training": Training(margin=0.0)},
    "context_dim": {"context": ("scene",)},
    "fusion": {"context": ("scene",)},
    "regions": {"ensemble": "views"},
    "fallback": {"combine": "softmax"},
}
OTHER_TRAINING = {
    "epochs": 1,
    "batch": 9,
    "frames": 3,
    "sample": "first",
    "lr": 1.0,
    "aggregator_lr": 1.0,
    "weight_decay": 1.0,
    "margin": 0.1,
    "scale": 1.0,
    "gamma": 1.0,
    "focal": "batch",
    "optimiser": "sgd",
}


@pytest.mark.parametrize(
    "name", [field.name for field in fields(Experiment) if field.name not in ("data", "training")]
)
def test_every_field_of_a_trained_experiment_changes_the_key(name):
    plain = replace(Experiment(), **BESIDE.get(name, {}))
    assert replace(plain, **{name: OTHER[name]}).key() != plain.key()


@pytest.mark.parametrize("name", [field.name for field in fields(Training)])
def test_every_field_of_the_training_changes_the_key(name):
    training = replace(Training(), **{name: OTHER_TRAINING[name]})
    assert Experiment(training=training).key() != Experiment().key()


@pytest.mark.parametrize("classifier", ["nearest", "class means", "whitened means"])
@pytest.mark.parametrize("ignored", [{"training": BRIEF}, {"hidden": 8}, {"dropout": 0.1}])
def test_training_does_not_change_the_key_where_nothing_is_trained(classifier, ignored):
    plain = Experiment(classifier=classifier)
    assert replace(plain, **ignored).key() == plain.key()


@pytest.mark.parametrize("name", ["seed", "modality", "aggregator", "concat", "scale", "settings"])
def test_what_decides_untrained_numbers_changes_their_key(name):
    plain = Experiment(classifier="class means")
    assert replace(plain, **{name: OTHER[name]}).key() != plain.key()


def test_untrained_experiments_of_one_key_have_one_number(store):
    plain = of(store, concat="raw")
    other = replace(plain, training=BRIEF, hidden=8, dropout=0.1)
    assert plain.key() == other.key() and run(plain, store).ap == run(other, store).ap


def test_setting_given_its_default_does_not_change_the_key():
    assert Experiment(settings=(("contaminated", 0.15),)).key() == Experiment().key()


def test_order_of_settings_does_not_change_the_key():
    settings = (("no_face", 0.1), ("reliability", 0.5))
    assert Experiment(settings=settings).key() == Experiment(settings=settings[::-1]).key()


def test_place_of_a_store_does_not_change_the_key(store, tmp_path):
    moved = shutil.copytree(store.path, tmp_path / "elsewhere")
    assert Experiment(data=str(moved)).key() == of(store, "mlp", "quality").key()


@pytest.mark.parametrize("name", ["face/feature.npy", "face/quality.npy", "scene/feature.npy"])
def test_content_of_a_store_changes_the_key(store, tmp_path, name):
    moved = shutil.copytree(store.path, tmp_path / "elsewhere")
    array = np.lib.format.open_memmap(moved / name, mode="r+")
    array[0] += 1
    array.flush()
    assert Experiment(data=str(moved)).key() != of(store, "mlp", "quality").key()


def test_settings_of_the_simulator_mean_nothing_on_a_given_store(store):
    assert of(store, settings=(("identities", 12),), profile="full").key() == of(store).key()


@pytest.mark.parametrize(
    "bad, message",
    [
        ({"classifier": "svm"}, "classifier must be one of nearest, .*, got 'svm'"),
        (
            {"aggregator": "NAN", "classifier": "class means"},
            "aggregator 'NAN' is learned, so classifier cannot be",
        ),
    ],
)
def test_experiments_that_cannot_be_are_refused(bad, message):
    with pytest.raises(ValueError, match=message):
        Experiment(**bad)


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
    lines = [
        [names[clip] for clip in val if store.identity_of(clip) == code]
        for code in range(len(store.identities))
    ]
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
            [
                [max(x @ known[i] for i in np.flatnonzero(label == code)) for code in range(identities)]
                for x in found
            ]
        )
    if classifier == "whitened means":
        deviation = np.concatenate(
            [known[label == c] - known[label == c].mean(axis=0) for c in range(identities)]
        )
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
        store.identity_of(found.gallery)[store.identity_of(found.gallery) >= 0],
        minlength=len(store.identities),
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
    model, clips, _ = fit(
        of(store, "mlp", training=replace(BRIEF, lr=0.0, weight_decay=0.0)), store, device=torch.device("cpu")
    )
    mean = np.array([mean_faces(store, clips)[label == code].mean(axis=0) for code in range(30)])
    cosine = np.einsum(
        "cd,cd->c", mean / np.linalg.norm(mean, axis=1, keepdims=True), model.prototype.detach()
    )
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
    with pytest.raises(
        ValueError, match="store: 'quality' needs det scores of 'face', and the store has none"
    ):
        run(of(bare, aggregator="quality"), bare)


def test_unknown_modality_is_refused_with_those_there_are(bare):
    with pytest.raises(ValueError, match="no modality 'scene', it has face"):
        run(of(bare, modality="scene"), bare)


def test_unknown_device_is_refused():
    with pytest.raises(ValueError, match="device must be auto, cpu or cuda, got 'tpu'"):
        torch_device("tpu")


# -- parameters ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, seeds",
    [
        ("[3]", [3]),
        ("3", [3]),
        (3, [3]),
        ([3], [3]),
        ((0, 2), [0, 2]),
        ("[2, 0]", [2, 0]),
        (range(3), [0, 1, 2]),
    ],
)
def test_seeds_are_read_as_papermill_passes_them(text, seeds):
    assert as_seeds(text) == seeds


@pytest.mark.parametrize(
    "bad", ["", "[]", [], "[1, 1]", [1, 1], [-1], "-1", "x", "null", 3.5, [1.0], None, True, ["0"]]
)
def test_seeds_that_are_none_are_refused_with_their_value(bad):
    with pytest.raises(ValueError, match="seeds must be .*, got "):
        as_seeds(bad)
