import math
import shutil
from contextlib import suppress
from dataclasses import fields, replace
from itertools import combinations

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import BRIEF, of

from mmlib.data.store import ClipStore
from mmlib.experiment import CHOICES, TRAINED_ON, Experiment, Training, smaller, torch_device
from mmlib.rank import Fallback
from mmlib.records import run
from mmlib.retrieve import retrieve

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
    "context_scale": "raw",
    "layers": "released",
}
# What a field has a meaning with.
BESIDE = {
    "head": {"training": Training(margin=0.0)},
    "context_dim": {"context": ("scene",)},
    "context_scale": {"context": ("scene",)},
    "layers": {"start": "random"},
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
    "decay": "all",
    "schedule": "epoch",
    "classes": 512,
}


@pytest.mark.parametrize("name", [field.name for field in fields(Experiment) if field.name not in ("data", "training")])
def test_every_field_of_a_trained_experiment_changes_the_key(name):
    plain = replace(Experiment(), **BESIDE.get(name, {}))
    assert replace(plain, **{name: OTHER[name]}).key() != plain.key()


@pytest.mark.parametrize("name", [field.name for field in fields(Training)])
def test_every_field_of_the_training_changes_the_key(name):
    training = replace(Training(), **{name: OTHER_TRAINING[name]})
    assert Experiment(training=training).key() != Experiment().key()


@pytest.mark.parametrize("name", ["context_dim", "context_scale"])
def test_fields_of_a_context_change_the_key_where_the_fallback_alone_has_one(name):
    plain = Experiment(fallback=Fallback(), combine="softmax")
    assert replace(plain, **{name: OTHER[name]}).key() != plain.key()
    assert replace(Experiment(), **{name: OTHER[name]}).key() == Experiment().key()


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


# -- what is refused -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CHOICES)
def test_unknown_choice_is_refused_with_those_there_are(name):
    with pytest.raises(ValueError, match=f"^{name} must be one of {CHOICES[name][0]}, .*, got 'other'$"):
        Experiment(**{name: "other"})


@pytest.mark.parametrize(
    "bad, message",
    [
        ({"aggregator": "NAN", "classifier": "class means"}, "classifier is 'class means', aggregator is 'NAN'"),
        ({"context": ("scene",), "classifier": "nearest"}, "classifier is 'nearest', .* context is .'scene'"),
        ({"head": "dot", "classifier": "class means"}, "classifier is 'class means', .* head is 'dot'"),
        (
            {"distractors": "class", "classifier": "class means"},
            "classifier is 'class means', .* distractors is 'class'",
        ),
        ({"concat": "raw", "classifier": "whitened means"}, "classifier is 'whitened means', concat is 'raw'"),
        ({"concat": "normalised", "classifier": "whitened means"}, "classifier is 'whitened means', concat is 'norm"),
        ({"modality": None}, "modality None needs a context"),
        ({"modality": None, "context": ("scene",), "concat": "frames"}, "need a modality, concat is 'frames'"),
        ({"modality": None, "context": ("scene",), "fusion": "gated"}, "need a modality, .* fusion is 'gated'"),
        ({"context": ("face",)}, "context has something twice, modality is 'face'"),
        ({"context": ["scene"]}, r"must be tuples, context is \['scene'\]"),
        ({"distractors": "held out", "split": "test"}, "known in val only, distractors is 'held out'"),
        ({"head": "dot"}, "a margin needs a cosine, head is 'dot', training is .*margin=0.5"),
        ({"members": ()}, r"members must be different numbers >= 0, members is \(\)"),
        ({"members": (0, 0)}, r"members must be different numbers >= 0, members is \(0, 0\)"),
        ({"members": (-1,)}, r"members must be different numbers >= 0, members is \(-1,\)"),
        ({"members": ("1",)}, r"members must be different numbers >= 0, members is \('1',\)"),
        ({"ensemble": "views", "members": (3, 4), "regions": 4}, "member 4 of views does not exist with 4 regions"),
        ({"ensemble": "views", "regions": 1}, "regions is 1"),
        ({"fallback": Fallback()}, "a fallback .* modality is 'face', combine is 'log softmax'"),
        ({"fallback": Fallback(), "combine": "ranks"}, "a fallback .* combine is 'ranks'"),
        ({"fallback": Fallback(), "combine": "cosine", "modality": None, "context": ("scene",)}, "modality is None"),
        ({"fallback": Fallback(), "combine": "softmax", "classifier": "class means"}, "classifier is 'class means'"),
        ({"fallback": Fallback(context=()), "combine": "softmax"}, "modality None needs a context"),
        ({"fallback": Fallback(members=()), "combine": "softmax"}, r"members is \(\)"),
        ({"profile": "huge"}, "profile must be one of .*, got 'huge'"),
        ({"settings": (("noface", 0.1),)}, "no setting named noface"),
    ],
)
def test_experiments_that_cannot_be_are_refused(bad, message):
    with pytest.raises(ValueError, match=message):
        Experiment(**bad)


@pytest.mark.parametrize("made", [Experiment, Training])
@pytest.mark.parametrize(
    "names, bad",
    [
        (("epochs", "batch", "frames", "regions"), (0, 1.5, True, "8", None)),
        (("seed", "hidden", "context_dim"), (-1, 0.5, None)),
        (("lr", "scale"), (0.0, -1.0, math.nan, math.inf, "0.1", None)),
        (("aggregator_lr", "weight_decay", "gamma"), (-0.1, math.nan, math.inf)),
        (("margin",), (-0.1, 1.6, math.nan)),
        (("dropout",), (-0.1, 1.0, math.nan)),
        (("shrinkage",), (-0.1, 1.1, math.nan)),
    ],
)
def test_numbers_outside_of_their_range_are_refused_by_name_and_value(made, names, bad):
    for name in {field.name for field in fields(made)} & set(names):
        for value in bad:
            with pytest.raises(ValueError, match=rf"^{name} must be a .*, got {value!r}$"):
                made(**{name: value})


def test_ends_of_the_ranges_are_taken():
    Training(epochs=1, batch=1, frames=1, aggregator_lr=0.0, weight_decay=0, margin=math.pi / 2, gamma=0)
    Experiment(
        context_dim=1, regions=1, hidden=0, dropout=0.0, shrinkage=1, seed=np.int64(0), training=Training(margin=0)
    )


@pytest.mark.parametrize("sample", ["all", "last"])
def test_sample_that_draws_no_number_of_frames_is_refused(sample):
    with pytest.raises(ValueError, match=f"sample must be one of first, .*, got '{sample}'"):
        Training(sample=sample)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Six identities and distractors in every split; faces, scenes and sounds, of which some clips lack one."""
    rng, place = np.random.default_rng(0), np.arange(120)
    split, identity = np.repeat(["train", "val", "test"], 40), np.where(place % 5 < 4, place % 6, -1)
    path, dims = tmp_path_factory.mktemp("world") / "store", {"face": 16, "scene": 16, "audio": 8}
    count = {name: np.where(place % 7 == i, 0, 1 + (place + i) % 4) for i, name in enumerate(dims)}
    with ClipStore.create(path, simulated=False, provenance={}) as writer:
        for name, dim in dims.items():
            owner = identity.repeat(count[name])
            feature = rng.normal(size=(7, dim))[owner] + rng.normal(size=(len(owner), dim))
            scores = {"quality": rng.uniform(5, 150, len(owner)), "det": rng.uniform(0.8, 1, len(owner))}
            writer.append(name, feature.astype(np.float16), **scores)
        clips = pd.DataFrame({"clip": [f"c{i:03d}" for i in place], "split": split, "identity": identity})
        writer.finish(clips, list("012345"), {name: (n.cumsum() - n, n) for name, n in count.items()})
    return ClipStore.open(path)


SHORT = Training(epochs=1, batch=16, frames=3, lr=1e-2)
TRIED = CHOICES | {
    "modality": ("face", "scene", None),
    "context": ((), ("scene",), ("scene", "audio"), ("face",)),
    "hidden": (0, 6),
    "dropout": (0.0, 0.5),
    "regions": (1, 4),
    "members": ((0,), (0, 2)),
    "fallback": (
        None,
        Fallback(context_dim=0, hidden=5),
        Fallback(context=("audio",), by="norm, float16", threshold=3.0, absent=None, lr=1e-3),
    ),
    "training": (
        SHORT,
        replace(SHORT, margin=0.0, gamma=2.0, optimiser="sgd", sample="replace", decay="all", schedule="epoch"),
        replace(SHORT, batch=1, sample="draw", focal="batch", gamma=0.5),
        replace(SHORT, margin=0.0, scale=1.0, sample="first", batch=1000),
    ),
}


def test_every_combination_runs_to_its_end_or_is_refused_when_it_is_made(world):
    """Draw 10,000 of all fields, half of them plain; of what can be made run enough to see every pair of values."""
    rng, made = np.random.default_rng(0), []
    for _ in range(10_000):
        drawn = {name: values[rng.integers(len(values)) * rng.integers(2)] for name, values in TRIED.items()}
        with suppress(ValueError):
            made.append((Experiment(data=str(world.path), context_dim=3, **drawn), set(combinations(drawn.items(), 2))))
    pairs = set().union(*(found for _, found in made))
    assert len(pairs) > 1_650  # of 1,768, among which are those that cannot be
    state = torch.get_rng_state()
    while pairs:
        asked, found = max(made, key=lambda one: len(one[1] & pairs))
        assert np.isfinite(retrieve(asked, world, device="cpu").ap).all()
        pairs -= found
    assert torch.equal(torch.get_rng_state(), state)  # nothing draws from torch's own generator


# -- parameters ----------------------------------------------------------------------------------------------


def test_unknown_device_is_refused():
    with pytest.raises(ValueError, match="device must be auto, cpu or cuda, got 'tpu'"):
        torch_device("tpu")


def test_a_gpu_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ValueError, match="device cuda: there is no GPU here"):
        torch_device("cuda")
    assert torch_device("auto").type == "cpu"


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


# -- training on distractors ---------------------------------------------------------------------------------


def slow_entropy(row, true, margin, scale=30.0):
    moved = torch.stack([torch.cos(torch.arccos(x) + margin * (i == true)) for i, x in enumerate(row)])
    return torch.logsumexp(scale * moved, 0) - scale * moved[true]


@pytest.mark.parametrize("form", TRAINED_ON)
def test_loss_of_distractors_is_that_of_its_form(form):
    """Clip by clip and slowly: five clips, the last two of nobody."""
    torch.manual_seed(0)
    asked = Experiment(distractors=form)
    identities = 4
    classes = identities + (form != "negatives")
    cosine = (0.8 * torch.rand(5, classes, dtype=torch.float64)).requires_grad_()
    label = torch.tensor([0, 2, 1, identities, identities])
    found = asked.loss(cosine, label)
    parts, weights = [], []
    for row, true in zip(cosine, label.tolist()):
        nobody = true == identities
        if nobody and form == "negatives":
            parts.append(torch.log(1 + torch.exp(torch.logsumexp(30 * row, 0) - 30 * 0.35)))
        else:
            parts.append(slow_entropy(row, true, 0.0 if nobody and form == "class, no margin" else 0.5))
        weights.append(0.2 if nobody and form == "class, down-weighted" else 1.0)
    expected = sum(w * part for w, part in zip(weights, parts)) / sum(weights)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    slopes = [torch.autograd.grad(value, cosine, retain_graph=True)[0] for value in (found, expected)]
    torch.testing.assert_close(*slopes, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("gamma, focal", [(2.0, "clip"), (2.0, "batch")])
@pytest.mark.parametrize("form", TRAINED_ON)
def test_loss_of_distractors_is_the_same_for_models_together(form, gamma, focal):
    """As on a GPU, where members train in one pass: under vmap, values and gradients of each."""
    torch.manual_seed(0)
    asked = Experiment(distractors=form, training=Training(gamma=gamma, focal=focal))
    cosine = 0.8 * torch.rand(3, 5, 4 + asked.has_class_of_nobody, dtype=torch.float64)
    cosine, label = cosine.requires_grad_(), torch.tensor([[0, 2, 1, 4, 4], [4, 1, 1, 0, 3], [4, 4, 4, 4, 4]])
    together = torch.func.vmap(asked.loss)(cosine, label)
    alone = torch.stack([asked.loss(*pair) for pair in zip(cosine, label)])
    torch.testing.assert_close(together, alone, rtol=1e-6, atol=1e-7)
    slopes = [torch.autograd.grad(value.sum(), cosine, retain_graph=True)[0] for value in (together, alone)]
    torch.testing.assert_close(*slopes, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("form", TRAINED_ON)
def test_loss_of_distractors_alone_is_finite(form):
    asked = Experiment(distractors=form)
    cosine = torch.zeros(3, 4 + asked.has_class_of_nobody, requires_grad=True)
    value = asked.loss(cosine, torch.full((3,), 4))
    value.backward()
    assert torch.isfinite(value) and torch.isfinite(cosine.grad).all() and (cosine.grad != 0).any()


def test_a_last_identity_is_not_nobody():
    """Where no distractor is trained on, the last column is an identity as the others."""
    cosine, label = torch.rand(4, 3, dtype=torch.float64), torch.tensor([2, 2, 1, 0])
    assert torch.equal(Experiment().loss(cosine, label), Training().loss(cosine, label))


def test_only_forms_with_a_class_have_a_vector_of_nobody():
    having = {form: Experiment(distractors=form).has_class_of_nobody for form in CHOICES["distractors"]}
    assert having == {
        "all": False,
        "held out": False,
        "class": True,
        "class, no margin": True,
        "class, down-weighted": True,
        "negatives": False,
    }
