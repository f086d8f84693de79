import json
import shutil
import tempfile
from dataclasses import asdict, fields, replace

import numpy as np
import pandas as pd
import pytest
import torch

from mmlib import experiment, metrics
from mmlib.clips.simulate import settings_for, simulate
from mmlib.clips.store import ClipStore
from mmlib.experiment import (
    Experiment,
    Record,
    as_seeds,
    cache_folder,
    clip_means,
    fetch_or_run,
    fit,
    library_hash,
    missing_scores,
    open_store,
    read_results,
    retrieve,
    run,
    torch_device,
    write_results,
)
from mmlib.train import Training

SMALL = (("identities", 12),)
BRIEF = Training(epochs=1, batch=64)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return simulate(tmp_path_factory.mktemp("world") / "store", settings_for("tiny", identities=30), seed=0)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MMLIB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def of(store, classifier="class means", aggregator="mean", **options):
    return Experiment(data=str(store.path), classifier=classifier, aggregator=aggregator, **options)


def made(asked, ap=(0.5,), library="here", simulated=True):
    """A record of an experiment that nobody ran."""
    return Record(
        key=asked.key(),
        library=library,
        experiment=asdict(asked),
        simulated=simulated,
        measures={},
        ap=list(ap),
        breakdown={},
        losses=[],
        seconds={},
        versions={},
        device="CPU",
        made="2024-02-03T04:05:06+00:00",
        commit="abc1234",
    )


@pytest.fixture
def runs(monkeypatch, cache):
    """Let every run succeed at once, and write down what was run on which store."""
    calls = []

    def fake(asked, store, **_):
        calls.append((asked, store))
        return made(asked)

    monkeypatch.setattr(experiment, "run", fake)
    return calls


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
}


@pytest.mark.parametrize(
    "name", [field.name for field in fields(Experiment) if field.name not in ("data", "training")]
)
def test_every_field_of_a_trained_experiment_changes_the_key(name):
    assert replace(Experiment(), **{name: OTHER[name]}).key() != Experiment().key()


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
    assert of(store, settings=SMALL, profile="full").key() == of(store).key()


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


# -- the hash of the library ---------------------------------------------------------------------------------


@pytest.fixture
def library(tmp_path, monkeypatch):
    """A copy of the library to edit; call it for its hash."""
    copy = shutil.copytree(
        experiment.PACKAGE, tmp_path / "mmlib", ignore=shutil.ignore_patterns("__pycache__")
    )
    monkeypatch.setattr(experiment, "PACKAGE", copy)

    def fresh():
        library_hash.cache_clear()
        return library_hash()

    fresh.path = copy
    yield fresh
    library_hash.cache_clear()


def edit(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def test_hash_of_the_library_does_not_depend_on_where_it_lies(library):
    copied = library()
    assert copied == library_hash.__wrapped__() and len(copied) == 12


def test_hash_ignores_docstrings_and_comments(library):
    before = library()
    path = library.path / "train.py"
    edit(path, '"""One training loop', '"""The training loop')
    edit(path, "# dropout", "# of dropout")
    path.write_text(path.read_text() + "\n\n# The end.\n")
    assert library() == before


def test_hash_ignores_figures(library):
    before = library()
    edit(library.path / "figures.py", "MARKERS", "SIGNS")
    assert library() == before


@pytest.mark.parametrize(
    "name, old, new",
    [
        ("train.py", "epochs: int = ", "epochs: int = 1"),
        ("clips/simulate.py", "SEGMENT = 8", "SEGMENT = 9"),
        ("clips/clips_per_identity_joint.csv", "1,1,1137", "1,1,1136"),
    ],
)
def test_hash_sees_what_decides_numbers(library, name, old, new):
    before = library()
    edit(library.path / name, old, new)
    assert library() != before


@pytest.mark.parametrize(
    "one, two",
    [
        ('def f():\n    """Say."""\n    return 1', "def f():\n    return 1"),
        ('"""Module."""\nx = 1  # why', "x = 1"),
        ('class A:\n    """A."""\n    y: int = 2', "class A:\n    y: int = 2"),
        ("x = (1 +\n     2)", "x = 1 + 2"),
    ],
)
def test_tree_is_blind_to_prose_and_layout(one, two):
    assert experiment._tree(experiment.ast.parse(one)) == experiment._tree(experiment.ast.parse(two))


@pytest.mark.parametrize(
    "one, two",
    [
        ("x = 1", "x = 2"),
        ("x = 1", "x = 1.0"),
        ("x = 'a'", "x = 'b'"),
        ("f(None)", "f()"),
        ("x = a + b", "x = a - b"),
        ("x = None", "x = 0"),
        ("def f(a=None): return a", "def f(a): return a"),
        ("x = {**a}", "x = {a: a}"),
        ("x = []", "x = ()"),
        ("return_ = [1]", "return_ = []"),
        ("x = f('a')", "x = f('b')"),
    ],
)
def test_tree_sees_code(one, two):
    assert experiment._tree(experiment.ast.parse(one)) != experiment._tree(experiment.ast.parse(two))


# -- fetching ------------------------------------------------------------------------------------------------


def test_stored_record_is_fetched_without_running(store, cache, monkeypatch):
    first = fetch_or_run([of(store)])
    monkeypatch.setattr(experiment, "run", lambda *_, **__: pytest.fail("it was run again"))
    assert fetch_or_run([of(store)]) == first


def test_record_holds_what_was_run(store, cache):
    direct, fetched = run(of(store), store), fetch_or_run([of(store)])[0]
    assert (fetched.ap, fetched.measures, fetched.breakdown) == (direct.ap, direct.measures, direct.breakdown)
    assert fetched.key == of(store).key() and fetched.library == library_hash()


def test_records_come_in_the_order_asked_for(store, runs):
    asked = [of(store, scale=float(scale)) for scale in (3, 1, 2, 1)]
    assert [record.experiment["scale"] for record in fetch_or_run(asked)] == [3, 1, 2, 1]


def test_experiments_of_one_key_run_once(store, runs):
    records = fetch_or_run([of(store), of(store, hidden=8), of(store)])
    assert len(runs) == 1 and len(records) == 3


def test_another_library_runs_again(store, runs, monkeypatch):
    fetch_or_run([of(store)])
    monkeypatch.setattr(experiment, "library_hash", lambda: "changed")
    fetch_or_run([of(store)])
    assert len(runs) == 2


def test_interrupted_set_resumes_at_the_arm_it_was_in(store, runs, monkeypatch):
    arms = [of(store, scale=float(scale)) for scale in range(1, 5)]
    counting = experiment.run

    def interrupted(asked, store, **options):
        if asked == arms[2]:
            raise KeyboardInterrupt
        return counting(asked, store, **options)

    monkeypatch.setattr(experiment, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fetch_or_run(arms)
    monkeypatch.setattr(experiment, "run", counting)
    runs.clear()
    assert len(fetch_or_run(arms)) == 4
    assert [asked for asked, _ in runs] == arms[2:]


def test_failed_write_leaves_no_record(store, runs, cache, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(experiment.os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        fetch_or_run([of(store)])
    assert [path for path in cache.rglob("*") if path.is_file()] == []


# -- worlds --------------------------------------------------------------------------------------------------


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """Write down the worlds that are drawn; temporary ones go to a folder of their own."""
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    calls = []

    def spy(path, settings, seed, **options):
        calls.append((settings, seed))
        return simulate(path, settings, seed, **options)

    monkeypatch.setattr(experiment, "simulate", spy)
    return calls


def test_worlds_with_settings_are_deleted_after_use(runs, drawn, cache, tmp_path):
    fetch_or_run([Experiment(settings=SMALL, seed=seed) for seed in (0, 1)])
    assert all(not ran.path.exists() for _, ran in runs)
    assert list((tmp_path / "scratch").iterdir()) == [] and not (cache / "worlds").exists()


def test_worlds_with_settings_are_deleted_after_an_interrupt(drawn, cache, tmp_path, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(experiment, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fetch_or_run([Experiment(settings=SMALL)])
    assert len(drawn) == 1 and list((tmp_path / "scratch").iterdir()) == []


def test_arms_of_one_world_draw_it_once(runs, drawn):
    fetch_or_run(
        [
            Experiment(settings=SMALL, seed=seed, aggregator=name)
            for name in ("mean", "norm", "quality")
            for seed in (0, 1)
        ]
    )
    assert [seed for _, seed in drawn] == [0, 1] and len(runs) == 6


def test_every_arm_runs_in_its_own_world(runs, drawn):
    fetch_or_run(
        [
            Experiment(settings=(*SMALL, ("no_face", share)), seed=seed)
            for share in (0, 0.1)
            for seed in (0, 1)
        ]
    )
    for asked, world in runs:
        said = world.meta["provenance"]
        assert (said["settings"]["no_face"], said["seed"]) == (dict(asked.settings)["no_face"], asked.seed)


def test_calibrated_worlds_stay_in_the_cache(runs, drawn, cache):
    fetch_or_run([Experiment(profile="tiny", aggregator=name) for name in ("mean", "norm")])
    fetch_or_run([Experiment(profile="tiny", aggregator="quality")])
    assert len(drawn) == 1 and len(list((cache / "worlds").iterdir())) == 1


def test_given_store_is_used_whatever_the_settings(store, runs, drawn):
    fetch_or_run([of(store, settings=SMALL)])
    assert [ran.path for _, ran in runs] == [store.path] and drawn == []


def test_cache_lies_where_the_environment_says(cache, monkeypatch):
    assert cache_folder() == cache
    monkeypatch.delenv("MMLIB_CACHE")
    assert cache_folder().name == "mmlib"


def test_open_store_opens_the_given_one(store):
    assert open_store(of(store)).path == store.path


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
    # Kept with six decimals. In float32 two clips whose scores agree to seven digits may change places: at most one
    # identity of these thirty, by one place.
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


@pytest.mark.parametrize("group", ["frames", "quality", "wrong"])
def test_breakdown_counts_every_labelled_gallery_clip_once(store, group):
    found, record = retrieve(of(store), store), run(of(store), store)
    clips, top1, precision = np.array(record.breakdown[group])[:, 2:].T
    assert clips.sum() == np.sum(store.identity_of(found.gallery) >= 0)
    assert clips @ top1 / clips.sum() == pytest.approx(record.measures["clip_top1"], abs=1e-4)
    assert clips @ precision == pytest.approx(found.ap @ found.relevant, abs=0.01)


def test_breakdown_by_length_puts_clips_between_its_edges(store):
    gallery = store.select("val", labelled=True, having="face")
    count = store.modalities["face"].count[gallery]
    for low, high, clips, _, _ in run(of(store), store).breakdown["frames"]:
        assert clips == sum(low <= n < high for n in count)


def test_training_beats_chance_and_keeps_its_losses(store):
    record = run(of(store, "mlp", training=Training(epochs=2, batch=64)), store)
    assert len(record.losses) == 2 and record.measures["parameters"] > 0
    assert record.measures["clip_top1"] > 10 / 30


def test_untrained_record_has_no_losses_and_no_parameters(store):
    record = run(of(store), store)
    assert record.losses == [] and record.measures["parameters"] == 0


@pytest.mark.parametrize("classifier", ["class means", "mlp"])
def test_same_experiment_gives_the_same_record(store, classifier):
    one, two = (run(of(store, classifier, training=BRIEF), store) for _ in range(2))
    assert (one.ap, one.losses, one.measures) == (two.ap, two.losses, two.measures)


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


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """Two identities, each with two train clips and a val clip of one frame; quality but no det score."""
    clips = pd.DataFrame(
        {"clip": list("abcdef"), "split": ["train"] * 4 + ["val"] * 2, "identity": [0, 0, 1, 1, 0, 1]}
    )
    rng = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("bare") / "store"
    with ClipStore.create(path, simulated=False, provenance={}) as writer:
        writer.append("face", rng.normal(size=(6, 8)).astype(np.float16), quality=np.full(6, 50.0))
        writer.finish(clips, ["7", "8"], {"face": (np.arange(6), np.ones(6, int))})
    return ClipStore.open(path)


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


def test_store_without_truth_has_no_breakdown_by_wrong_frames(bare):
    record = run(of(bare), bare)
    assert record.breakdown.keys() == {"frames", "quality"} and not record.simulated


def test_unknown_modality_is_refused_with_those_there_are(bare):
    with pytest.raises(ValueError, match="no modality 'scene', it has face"):
        run(of(bare, modality="scene"), bare)


def test_unknown_device_is_refused():
    with pytest.raises(ValueError, match="device must be auto, cpu or cuda, got 'tpu'"):
        torch_device("tpu")


def test_clip_means_are_those_of_every_clip_alone(store):
    face = store.modalities["face"]
    slow = [
        face.columns["quality"][s : s + n].mean() if n else np.nan
        for s, n in zip(face.start, face.count, strict=True)
    ]
    assert np.allclose(clip_means(store, "face", "quality"), slow, equal_nan=True, rtol=1e-9)


# -- files and parameters ------------------------------------------------------------------------------------


def test_record_survives_json(store):
    record = run(of(store, "mlp", training=BRIEF), store)
    back = Record(**json.loads(json.dumps(asdict(record))))
    assert replace(back, experiment={}) == replace(record, experiment={})
    assert {**back.experiment, "settings": ()} == record.experiment


def test_row_of_a_record_is_flat(store):
    row = made(replace(of(store), settings=(("no_face", 0.1),))).row()
    assert (
        row["no_face"] == 0.1
        and row["training.epochs"] == Training().epochs
        and row["classifier"] == "class means"
    )


@pytest.fixture
def results(tmp_path, monkeypatch):
    monkeypatch.setattr(experiment, "RESULTS", tmp_path)
    return tmp_path / "some.json.gz"


def test_committed_records_are_read_as_they_were_written(results, runs, store):
    records = fetch_or_run([of(store, scale=float(scale)) for scale in (1, 2)])
    write_results(results, records)
    assert read_results("some.json.gz") == records


def test_same_records_give_the_same_bytes(results, monkeypatch):
    write_results(results, [made(Experiment())])
    first = results.read_bytes()
    monkeypatch.setattr("time.time", lambda: 4e9)  # gzip would write the time
    write_results(results, [made(Experiment())])
    assert results.read_bytes() == first


def test_failed_write_keeps_the_committed_records(results, monkeypatch):
    write_results(results, [made(Experiment())])
    before = results.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(experiment.os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        write_results(results, [made(Experiment(seed=1))])
    assert results.read_bytes() == before and list(results.parent.iterdir()) == [results]


def test_missing_file_of_records_is_none(results):
    assert read_results("absent.json.gz") == []


@pytest.mark.parametrize("content", [b"not gzip", b""])
def test_broken_file_of_records_is_refused_by_name(results, content):
    results.write_bytes(content)
    with pytest.raises(ValueError, match="some.json.gz: not a file of records"):
        read_results("some.json.gz")


def test_truncated_file_of_records_is_refused(results):
    write_results(results, [made(Experiment())])
    results.write_bytes(results.read_bytes()[:-20])
    with pytest.raises(ValueError, match="some.json.gz: not a file of records"):
        read_results("some.json.gz")


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
