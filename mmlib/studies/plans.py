"""What the chapters that train run: named arms, in no world yet, as far as the clips of a store allow them.

The pages, their committed records and ``benchmarks.gpu`` take their experiments from here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from mmlib import systems
from mmlib.aggregate import AGGREGATORS
from mmlib.data.store import ClipStore
from mmlib.ensemble import KINDS
from mmlib.experiment import CLASSIFIERS, LEARNED, Experiment, smaller
from mmlib.retrieve import missing_scores
from mmlib.studies import aggregation as aggregation_study
from mmlib.studies import ensemble, faces, fusion, inference, ladder, loss, materials

Plan = dict[str, Experiment]
VARIANTS = ("attention", "DANet + scores")  # without the scores, and with another published reading of the map


def placed(
    plan: Plan, seeds: Iterable[int], *, data: str = "simulated", profile: str = "quick", identities: int = 0
) -> list[Experiment]:
    """Return every arm in every world, arm by arm; identities: that a world has at most, 0 for its profile's."""
    worlds: list[dict[str, Any]] = [{"data": data, "profile": profile, "seed": seed} for seed in seeds]
    return [smaller(replace(arm, **world), identities) for arm in plan.values() for world in worlds]


def pool(store: ClipStore) -> str:
    """Return the hand-made weight that the clips allow: ``quality``, or ``norm`` where they lack a score."""
    return "norm" if missing_scores(Experiment(aggregator="quality"), store) else "quality"


def baselines(store: ClipStore) -> Plan:
    """Every classifier on faces, and class means and the MLP on each other modality."""
    face = Experiment(aggregator=pool(store), training=systems.tuned(pool(store)))
    out = {f"face, {kind}": replace(face, classifier=kind) for kind in CLASSIFIERS}
    for name in [name for name in ("head", "body", "audio", "scene") if name in store.modalities]:
        other = Experiment(modality=name, aggregator="norm", training=systems.tuned("norm"))
        out |= {f"{name}, {kind}": replace(other, classifier=kind) for kind in ("class means", "mlp")}
    return out


def aggregation(store: ClipStore, *, variants: bool = True) -> Plan:
    """Every pooling, trained; the weights that nothing is learned of also with two kinds of class means."""
    out: Plan = {}
    variants = variants or pool(store) == "norm"  # where attention cannot see scores, it is judged without
    for name in AGGREGATORS:
        arm = Experiment(aggregator=name, training=systems.tuned(name))
        if not missing_scores(arm, store) and (variants or name not in VARIANTS):
            out[name] = arm
            for kind in ("class means", "whitened means") if name not in LEARNED else ():
                out[f"{name}, {kind}"] = Experiment(aggregator=name, classifier=kind)
    return out


def losses(store: ClipStore) -> Plan:
    """The losses, and the sweeps of margin and gamma."""
    arms = {name: replace(arm, aggregator=pool(store)) for name, arm in systems.arms(systems.LOSSES).items()}
    swept = {f"{field} {e.training}": e for field in loss.SWEEPS for e in loss.sweep(arms["margin"], field, [0])}
    return {name: arm for name, arm in (arms | swept).items() if not missing_scores(arm, store)}


def fusions(store: ClipStore, *, starts: bool = False) -> Plan:
    """Face, scene and the ways to join them, and every weight of the fusion of scores; starts: some at random too."""
    groups = [systems.FUSIONS, systems.FUSIONS_AT_RANDOM][: 1 + starts]
    found = [fusion.possible(systems.arms(group), store) for group in groups]
    mixed = [fusion.weighted(next(iter(group.values())), store) for group in found]  # the first is the face alone
    return {name: arm for group in (*found, *mixed) for name, arm in group.items()}


def ensembles(
    store: ClipStore, *, kinds: Iterable[str] = KINDS, sizes: Iterable[int] = (1, 2, 4, 8, 16), others: bool = True
) -> Plan:
    """Ensembles of every kind and size by every rule; others: also from random starts, and on the scene alone."""
    scene = "scene" in store.modalities
    arms = systems.arms(systems.ENSEMBLES)
    seen: dict[str, Any] = {"aggregator": pool(store), "context": ("scene",) if scene else ()}
    arms = {name: replace(arm, **seen) for name, arm in arms.items() if scene or arm.modality}
    asked = ensemble.plan(arms.pop("face and scene"), kinds, sizes, [0])
    for arm in arms.values() if others else ():
        asked += ensemble.plan(arm, kinds if arm.modality else ("seeds", "views"), sizes, [0], rules=[ensemble.MAIN])
    return {str(number): arm for number, arm in enumerate(asked)}


def rules(store: ClipStore) -> Plan:
    """The fallback rules on one system, and the sweeps of their constants."""
    base = inference.base(store)
    points = inference.sweeps(base).itertuples()
    return inference.rules(base) | {f"{p.sweep} {p.line} {p.x}": p.experiment for p in points}


def ladders(store: ClipStore, *, members: int = 16) -> Plan:
    """The rungs of every ladder, and the arms beside them."""
    return ladder.plan(members=members, **ladder.has(store))


def real_faces(store: ClipStore) -> Plan:
    """All that chapter 12 runs on real clips as they are: the arms of chapters 04, 05, 08, 09 and 10, in one budget.

    Of chapter 07 the face, network fusion and every weight of score fusion; of chapter 08 the ensembles of
    ``faces.MEMBERS`` and a start at random; of chapter 10 what starts at class means, and what the claims ask of the
    released network.  What is asked of whitening has the arms of ``faces.LENT``, which ``materials.of_halves`` runs.
    """
    asked = ladders(store, members=faces.MEMBERS)
    wanted = {name for pair in [*faces.rungs().values(), *ladder.SCALED.values()] for name in pair}
    out = {
        name: arm for name, arm in asked.items() if name in wanted or name.startswith(("described: ", *ladder.SIDES))
    }
    out |= aggregation(store, variants=False)
    out |= {f"{pool(store)}, linear": Experiment(aggregator=pool(store), classifier="linear")}
    arms = {name: replace(arm, aggregator=pool(store)) for name, arm in systems.arms(systems.LOSSES).items()}
    out |= {name: arm for name, arm in arms.items() if not missing_scores(arm, store)}
    groups = [arm for arm in ensembles(store, sizes=(faces.MEMBERS,)).values() if arm.modality]
    main = [arm for arm in groups if (arm.combine, arm.scale) == tuple(ensemble.RULES[ensemble.MAIN].values())]
    named = {f"{arm.ensemble}, {len(arm.members)}" + systems.RANDOM * (arm.start == "random"): arm for arm in main}
    members = {arm for pair in [*faces.ENSEMBLES.values(), *faces.STARTS.values()] for arm in pair}
    out |= {name: arm for name, arm in named.items() if name in members}
    out |= {name: arm for name, arm in fusions(store).items() if name in ("face", "scene 128", *fusion.WEIGHTS)}
    kinds = ("whitened means", "class means")
    out |= {arm: Experiment(classifier=kind) for pair in faces.LENT.values() for arm, kind in zip(pair, kinds)}
    out |= {f"rule: {name}": arm for name, arm in inference.rules(inference.base(store)).items()}
    out = {name: _in_budget(arm) for name, arm in out.items()}
    random = out[f"seeds, 1{systems.RANDOM}"]
    return out | {faces.LONGER: replace(random, training=replace(random.training, **faces.LONGER_BUDGET))}


def real(name: str, material: str, store: ClipStore) -> Plan:
    """What chapter 12 runs on a material of a set: of clips of YTF as they are everything, of photographs the claims.

    Of harder clips of YTF class means by every hand-made weight, and where other people stand in them the arms of the
    grid of chapter 04 too, with the plain mean and NAN.  On some also aggregators that other sets train; such an arm is
    what trains one.
    """
    learned = {arm + faces.FROZEN: Experiment(aggregator=arm, training=systems.tuned(arm)) for arm in faces.FROZEN_ARMS}
    frozen = {arm: _in_budget(e) for arm, e in learned.items() if name == "ytf" and material in faces.FROZEN_ON}
    if material == materials.CLEAN:
        every = real_faces(store)
        wanted = {arm for pair in faces.claims_of("scene" in store.modalities).values() for arm in pair}
        return {arm: e for arm, e in every.items() if name == "ytf" or arm in wanted} | frozen
    asked = materials.MATERIALS[material]
    grid = ("mean", *aggregation_study.GRID_ARMS, "NAN") if asked.share and not asked.score else ()
    arms = aggregation(store, variants=False).items()
    return {arm: _in_budget(e) for arm, e in arms if e.classifier != "mlp" or arm in grid} | frozen


def _in_budget(arm: Experiment) -> Experiment:
    return replace(arm, training=replace(arm.training, **faces.BUDGET))


PLANS: dict[str, Callable[[ClipStore], Plan]] = {
    "03_baselines": baselines,
    "04_aggregation": aggregation,
    "05_loss": losses,
    "07_fusion": fusions,
    "08_ensemble": ensembles,
    "09_inference": rules,
    "10_ladder": ladders,
}
