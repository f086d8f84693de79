"""The systems and their rungs, the arms of the comparisons, and the one table of the rates that were chosen for them.

Where the released code and the description differ, each has its own value here; what the released code does and this
study does not is listed in chapter 10 with the reason.
"""

from dataclasses import replace
from typing import NamedTuple

from mmlib.aggregate import LEARNED
from mmlib.experiment import TRAINED_ON, Experiment, Training
from mmlib.rank import Fallback

SEARCH_SEEDS = TUNING_SEEDS = (100, 101)  # worlds that no comparison uses
RATES = (3e-4, 1e-3, 3e-3, 1e-2)
RATES_FROM_RANDOM = (1e-3, 3e-3, 1e-2, 3e-2)  # as many; vectors that start at random have further to go
EPOCHS = (8, 16)


class Rates(NamedTuple):
    """The learning rates of an arm: of the network, and of its aggregator where that has parameters."""

    lr: float
    aggregator_lr: float = Training.aggregator_lr


# Of each arm the rates with the best mean MAP@100 in its search on the worlds of SEARCH_SEEDS, at the shorter length,
# which all arms have in the comparisons. Chapters 04, 05, 07, 08 and 10 show the searches.
_ARMS = [
    (Rates(3e-4), ("softmax",)),
    (Rates(5e-4), ("best half",)),
    (Rates(1e-3), ("mean", "norm", "quality", "attention + scores")),
    (Rates(1e-3), ("cosine softmax", "margin", "margin + focal", "margin + batch focal", "margin + focal, raw scores")),
    (Rates(1e-2), ("margin, scores", "margin + focal, scores")),
    (Rates(1e-3, 3e-4), ("NAN, two blocks", "as coded, alive")),
    (Rates(1e-3, 1e-3), ("NAN", "NAN + scores", "attention")),
    (Rates(1e-3, 1e-2), ("DANet + scores", "as coded")),
    (Rates(1e-3, 1.0), ("learned scores",)),
    # Fusions; of their aggregator 3e-3 is as good, within .02 points (chapter 04).
    (Rates(3e-4, 1e-3), ("scene",)),
    (Rates(1e-3, 1e-3), ("face", "scene 32", "scene 64", "scene 256", "scene 128, gated", "head", "body", "audio")),
    (Rates(3e-3, 1e-3), ("all",)),
    (Rates(1e-2, 1e-3), ("scene 128", "face, random start")),
    (Rates(3e-3, 1e-3), ("scene 128, random start",)),
    (Rates(3e-2, 1e-3), ("scene, random start",)),
    # Members of ensembles.
    (Rates(3e-3, 1e-3), ("face and scene", "random start")),
    (Rates(3e-4, 1e-3), ("scene alone",)),
    # Rungs; of their aggregators by the search of chapter 04.
    (Rates(1e-3, 1e-3), ("described: baseline", "described: fallback", "as coded: fallback")),
    (Rates(1e-2, 1e-3), ("described, random start: baseline", "described, random start: fallback")),
    (Rates(1e-2, 1e-3), ("as coded: baseline", "as coded, alive: baseline")),
    (Rates(1e-2), tuple(f"described: {rung}" for rung in ("aggregation and loss", "scene", "ensemble"))),
    (Rates(1e-2), tuple(f"described, random start: {rung}" for rung in ("aggregation and loss", "scene", "ensemble"))),
    (Rates(1e-2, 1e-2), ("as coded: scene", "as coded: ensemble")),
    (Rates(3e-2, 1e-2), ("as coded: aggregation and loss",)),
    (Rates(1e-2, 3e-4), ("as coded, alive: scene",)),
    (Rates(3e-2, 3e-4), ("as coded, alive: aggregation and loss",)),
    # Training on distractors.
    (Rates(1e-3, 1e-3), tuple(f"faces alone, {form}" for form in TRAINED_ON)),
    (Rates(3e-4), ("faces with scenes, class",)),
    (Rates(3e-3), ("faces with scenes, class, down-weighted",)),
    (Rates(1e-2), ("faces with scenes, class, no margin", "faces with scenes, negatives")),
]
CHOSEN_RATES = {arm: rates for rates, arms in _ARMS for arm in arms}
CHOSEN = {arm: rates.lr for arm, rates in CHOSEN_RATES.items()}


def tuned(aggregator: str) -> Training:
    """Return the training chosen for an aggregator."""
    return Training(**CHOSEN_RATES[aggregator]._asdict())


def tuning_grid(aggregator: str) -> list[Training]:
    """List the trainings tried for an aggregator: two lengths times four rates, its own or those of the network."""
    rates = [Rates(rate) for rate in (5e-4, 1e-3, 1e-2, 3e-2)]
    if aggregator in LEARNED:  # three weights of scores need longer steps than a query over hundreds of dimensions
        own = (1e-1, 3e-1, 1.0, 3.0) if aggregator == "learned scores" else RATES
        rates = [Rates(1e-3, rate) for rate in own]
    return [Training(epochs=epochs, **rate._asdict()) for epochs in EPOCHS for rate in rates]


def _arm(base: Experiment, training: dict | None = None, **fields) -> Experiment:
    return replace(base, training=replace(base.training, **training or {}), **fields)


BASE = Experiment(training=Training(lr=1e-3))
FUSED = _arm(BASE, {"aggregator_lr": 1e-3}, aggregator="attention + scores")
LOSSES = {
    "softmax": _arm(BASE, {"margin": 0.0, "scale": 1.0}, head="dot", scale=1.0),
    "cosine softmax": _arm(BASE, {"margin": 0.0}),
    "margin": BASE,
    "margin + focal": _arm(BASE, {"gamma": 2.0}),
    "margin + batch focal": _arm(BASE, {"gamma": 2.0, "focal": "batch"}),
    "margin, scores": _arm(BASE, concat="normalised"),
    "margin + focal, scores": _arm(BASE, {"gamma": 2.0}, concat="normalised"),
    "margin + focal, raw scores": _arm(BASE, {"gamma": 2.0}, concat="raw"),
}
FUSIONS = {
    "face": FUSED,
    "scene": replace(FUSED, modality=None, context=("scene",)),
    **{f"scene {dim}": replace(FUSED, context=("scene",), context_dim=dim) for dim in (32, 64, 128, 256)},
    "scene 128, gated": replace(FUSED, context=("scene",), fusion="gated"),
    **{name: replace(FUSED, context=(name,)) for name in ("head", "body", "audio")},
    "all": replace(FUSED, context=("scene", "head", "body", "audio")),
}
RANDOM = ", random start"
FUSIONS_AT_RANDOM = {name + RANDOM: replace(FUSIONS[name], start="random") for name in ("face", "scene", "scene 128")}


_MEMBER = replace(BASE, context=("scene",))
ENSEMBLES = {  # a member of each system of chapter 08, by what the chapter calls it
    "face and scene": _MEMBER,
    "random start": replace(_MEMBER, start="random"),
    "scene alone": replace(_MEMBER, modality=None, regions=32),
}


def arms(group: dict[str, Experiment]) -> dict[str, Experiment]:
    """Return the arms with the learning rates chosen for each."""
    return {name: _arm(arm, CHOSEN_RATES[name]._asdict()) for name, arm in group.items()}


def search(group: dict[str, Experiment], profile: str = "quick", seeds: tuple = SEARCH_SEEDS) -> list[Experiment]:
    """List the experiments of the search: two lengths times four rates on each world, for every arm."""
    tried = {True: RATES, False: RATES_FROM_RANDOM}
    return [
        _arm(arm, {"lr": rate, "epochs": epochs}, profile=profile, seed=seed)
        for arm in group.values()
        for epochs in EPOCHS
        for rate in tried[arm.start == "class means"]
        for seed in seeds
    ]


BUDGET = Training(lr=1e-3, aggregator_lr=1e-3)  # of every rung, but for the rates that its search chose
_BASELINE = Experiment(aggregator="quality", combine="softmax")
_BOTH = replace(_BASELINE, context=("scene",), ensemble="views", regions=16)

# Dong et al., ACM MM 2019.
_ALL = tuple(range(16))
_LOW_QUALITY = Fallback(by="quality", share=0.01, low=0.8, absent=1.0, members=_ALL)
_DESCRIBED = replace(_BOTH, aggregator="attention + scores", concat="normalised", members=_ALL, fallback=_LOW_QUALITY)
_DESCRIBED = _arm(_DESCRIBED, {"gamma": 2.0, "focal": "clip"}, context_dim=128, scale=30.0)

# LegenDong/IQIYI_VID_FACE_2019, which keeps eleven of sixteen members; with its training.
_ELEVEN, _OTHER_ELEVEN = (0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 15), (1, 2, 3, 4, 6, 8, 10, 11, 12, 14, 15)
_LOW_NORM = Fallback(by="norm, float16", threshold=8.867, low=0.8, absent=0.95, members=_OTHER_ELEVEN)
_LOW_NORM = replace(_LOW_NORM, context_dim=0, hidden=2 * (2048 - 64))
_CODED = replace(_BOTH, aggregator="as coded", concat="frames", layers="released", start="xavier", scale=1.0)
_CODED = replace(_CODED, context_dim=120, context_scale="raw", hidden=964, members=_ELEVEN, fallback=_LOW_NORM)
_CODED_LOSS = {"frames": 40, "sample": "draw", "gamma": 2.0, "focal": "batch"}
_SGD = {"optimiser": "sgd", "lr": 0.1, "aggregator_lr": 0.1, "weight_decay": 1e-5, "epochs": 100, "batch": 4096}
ONE_NAME_AS_CODED = _arm(_CODED, _CODED_LOSS | _SGD | {"decay": "all", "schedule": "epoch"})

_ALIVE = replace(ONE_NAME_AS_CODED, aggregator="as coded, alive", ensemble="seeds", members=(0,), fallback=None)
LADDERS = {  # the last asks what a map that learns is worth, and has no rung above the scene
    "described": _DESCRIBED,
    "described, random start": replace(_DESCRIBED, start="random"),
    "as coded": ONE_NAME_AS_CODED,
    "as coded, alive": _ALIVE,
}
RUNGS = {  # what each has of the system beyond the one before
    "aggregation and loss": ("aggregator", "concat", "training"),
    "scene": ("context", "context_dim", "context_scale", "hidden"),
    "ensemble": ("ensemble", "regions", "members"),
    "fallback": ("fallback",),
}
STEPS = ("baseline", *RUNGS)


def with_members(system: Experiment, members: int | None) -> Experiment:
    """Return the system with the first ``members`` of its ensembles, None for all."""
    fallback = system.fallback and replace(system.fallback, members=system.fallback.members[:members])
    return replace(system, members=system.members[:members], fallback=fallback)


def without_scores(system: Experiment) -> Experiment:
    """Return a system for clips without scores: norms stand in for them, and the coded attention goes with its loss."""
    plain = replace(system, concat="none")
    if plain.fallback and plain.fallback.by == "quality":
        plain = replace(plain, fallback=replace(plain.fallback, by="norm"))
    if system.aggregator == "attention + scores":
        return replace(plain, aggregator="attention")
    return _arm(plain, {"gamma": 0.0, "focal": "clip"}, aggregator="norm")


def climb(ladder: str, *, members: int | None = None, scene: bool = True, scores: bool = True) -> dict[str, Experiment]:
    """Return the rungs of one of ``LADDERS``, from its baseline to its system, each with one part more.

    All have the epochs, batches and optimiser of ``BUDGET``, a ladder one start and kind of layers, a rung the rates
    that its search chose.  members: at most so many.  scene, scores: what the clips have.  Without a scene there is no
    such rung and no fallback; without scores the system is that of ``without_scores``.
    """
    top = with_members(LADDERS[ladder], members)
    top = replace(top, training=replace(BUDGET, gamma=top.training.gamma, focal=top.training.focal))
    last = replace(_BASELINE, scale=top.scale, start=top.start, layers=top.layers, training=BUDGET)
    top, last = (part if scores else without_scores(part) for part in (top, last))
    rungs = {"baseline": _arm(last, CHOSEN_RATES[f"{ladder}: baseline"]._asdict())}
    for step, parts in RUNGS.items():
        higher = replace(last, **{part: getattr(top, part) for part in parts})
        if higher != last and (scene or step not in ("scene", "fallback")):
            rates = CHOSEN_RATES[f"{ladder}: {'ensemble' if step == 'fallback' else step}"]
            fallback = higher.fallback and replace(higher.fallback, lr=CHOSEN[f"{ladder}: fallback"])
            last = higher
            rungs[step] = _arm(higher, rates._asdict(), fallback=fallback)
    return rungs


FACE_ONLY = climb("described")["baseline"]
ONE_NAME = climb("described")["fallback"]
SYSTEMS = {"one-name": ONE_NAME, "one-name-as-coded": ONE_NAME_AS_CODED, "face-only": FACE_ONLY}

SIDES = {"faces alone": "baseline", "faces with scenes": "scene"}  # rung of the described ladder by name
SEARCHED_MEMBERS = 4  # of an ensemble, in the search for its rate


def distractor_arms(**have) -> dict[str, Experiment]:
    """Return the forms of training on distractors by name, and what each is held against; have: as for ``climb``."""
    rungs, arms = climb("described", **have), {}
    for side, step in SIDES.items():
        if step in rungs:
            arms[f"{side}, held out"] = replace(rungs[step], distractors="held out")
            for form in TRAINED_ON:
                name = f"{side}, {form}"
                arms[name] = _arm(rungs[step], CHOSEN_RATES[name]._asdict(), distractors=form)
    return arms


def rung_arms() -> dict[str, Experiment]:
    """Return what chapter 10 searches rates for: every rung, the model of every fallback, and training on distractors.

    An ensemble has its first ``SEARCHED_MEMBERS`` members there, a fallback's model one.
    """
    arms: dict[str, Experiment] = {}
    for ladder in LADDERS:
        rungs = climb(ladder, members=SEARCHED_MEMBERS)
        if "fallback" in rungs:
            second = rungs["fallback"].second()
            rungs["fallback"] = replace(second, members=second.members[:1])
        if "alive" in ladder:  # the map is not in it, so it is that of the ladder before
            del rungs["baseline"]
        arms |= {f"{ladder}: {step}": arm for step, arm in rungs.items()}
    return arms | {name: arm for name, arm in distractor_arms().items() if arm.distractors in TRAINED_ON}
