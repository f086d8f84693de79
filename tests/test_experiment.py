import shutil
from dataclasses import fields, replace

import numpy as np
import pytest
from conftest import BRIEF, of

from mmlib.experiment import Experiment, Training, as_seeds, smaller, torch_device
from mmlib.rank import Fallback
from mmlib.records import run

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


@pytest.mark.parametrize("name", [field.name for field in fields(Experiment) if field.name not in ("data", "training")])
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
        ({"aggregator": "NAN", "classifier": "class means"}, "aggregator 'NAN' is learned, so classifier cannot be"),
        ({"context": ("scene",), "classifier": "nearest"}, "context, head and a class .* cannot be 'nearest'"),
        ({"head": "dot", "classifier": "class means"}, "are trained, so classifier cannot be 'class means'"),
        ({"distractors": "class", "classifier": "class means"}, "are trained, so classifier cannot be 'class means'"),
        ({"modality": None}, "modality None needs a context"),
        ({"head": "dot"}, "a margin needs a cosine, so head cannot be 'dot' with margin 0.5"),
        ({"members": ()}, r"members must be different numbers >= 0, at least one, got \(\)"),
        ({"members": (0, 0)}, r"members must be different numbers .*, got \(0, 0\)"),
        ({"members": (-1,)}, r"members must be different numbers .*, got \(-1,\)"),
        ({"ensemble": "views", "members": (3, 4), "regions": 4}, "member 4 of views does not exist with 4 regions"),
        ({"ensemble": "boosting"}, "ensemble must be one of seeds, .*, got 'boosting'"),
        ({"fusion": "sum"}, "fusion must be one of concat, gated, got 'sum'"),
        ({"distractors": "some"}, "distractors must be one of all, held out, class, got 'some'"),
        ({"start": "zero"}, "start must be one of class means, random, got 'zero'"),
        ({"combine": "median"}, "combine must be one of .*, got 'median'"),
        ({"fallback": Fallback()}, "a fallback .* needs .* 'softmax' or 'cosine', got 'face' and 'log softmax'"),
        ({"fallback": Fallback(), "combine": "ranks"}, "a fallback mixes .* got 'face' and 'ranks'"),
        (
            {"fallback": Fallback(), "combine": "softmax", "modality": None, "context": ("scene",)},
            "a fallback mixes .* so it needs a modality .* got None",
        ),
        (
            {"fallback": Fallback(), "combine": "softmax", "classifier": "class means"},
            "a fallback mixes the scores of two trained models",
        ),
    ],
)
def test_experiments_that_cannot_be_are_refused(bad, message):
    with pytest.raises(ValueError, match=message):
        Experiment(**bad)


# -- parameters ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, seeds",
    [("[3]", [3]), ("3", [3]), (3, [3]), ([3], [3]), ((0, 2), [0, 2]), ("[2, 0]", [2, 0]), (range(3), [0, 1, 2])],
)
def test_seeds_are_read_as_papermill_passes_them(text, seeds):
    assert as_seeds(text) == seeds


@pytest.mark.parametrize(
    "bad", ["", "[]", [], "[1, 1]", [1, 1], [-1], "-1", "x", "null", 3.5, [1.0], None, True, ["0"]]
)
def test_seeds_that_are_none_are_refused_with_their_value(bad):
    with pytest.raises(ValueError, match="seeds must be .*, got "):
        as_seeds(bad)


def test_unknown_device_is_refused():
    with pytest.raises(ValueError, match="device must be auto, cpu or cuda, got 'tpu'"):
        torch_device("tpu")


# -- branches ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [field.name for field in fields(Experiment)])
def test_ranking_is_all_that_experiments_of_one_branch_differ_in(name):
    plain = replace(Experiment(), **BESIDE.get(name, {}))
    other = replace(plain, **{name: {"data": "elsewhere", "training": BRIEF}.get(name, OTHER.get(name))})
    assert (other.branch() == plain.branch()) == (name in ("members", "combine", "scale", "fallback"))


def test_branch_of_a_branch_is_itself():
    asked = Experiment(members=(1, 2), combine="softmax", fallback=Fallback(), scale=2.0)
    assert asked.branch().branch() == asked.branch() == Experiment()


def test_worlds_are_made_smaller_never_larger_and_a_store_stays():
    tiny = Experiment(profile="tiny", settings=(("reliability", 0.5),))
    assert dict(smaller(tiny, 50).settings) == {"reliability": 0.5, "identities": 50}
    assert smaller(tiny, 60) == smaller(tiny, 100) == smaller(tiny, 0) == tiny
    stored = replace(tiny, data="somewhere")
    assert smaller(stored, 50) == stored
    with pytest.raises(ValueError, match="identities"):
        smaller(tiny, -1).world()
