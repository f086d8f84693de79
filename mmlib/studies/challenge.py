"""What most chapters read of the challenge's size: the arms of a page again, in kept records of worlds that large."""

from __future__ import annotations

from collections.abc import Iterable

import pandas as pd

from mmlib.compare import COMPARED, compare_arms, listed, provenance, sign
from mmlib.experiment import arm_key
from mmlib.records import Record, read_results
from mmlib.systems import SEARCH_SEEDS

KEPT = "full.jsonl.gz"  # written by ``mmlib keep``
READINGS = {  # of ``both_sizes``
    "same": "the same sign at both sizes",
    "opposite": "opposite signs",
    "larger": "told from zero in the larger worlds alone",
    "smaller": "told from zero in the smaller worlds alone",
    "neither": "told from zero at neither size",
    "unjudged": "without an interval",
}


def beside(records: Iterable[Record], names: Iterable[str], baseline: str) -> pd.DataFrame:
    """Compare arms with ``baseline`` in the worlds of a page and again in the kept ones of the challenge's size.

    names: the arm of each record.  An arm is found again by all that decides it but the world.  Left out are arms that
    were not run in every kept world of the baseline, the worlds of searches, and all where the records are not of
    simulated worlds.  Of two names of one arm the first counts.  Returns two rows an arm: arm, size (``here``, then
    ``challenge``) and the columns of ``compare_arms``.
    """
    own = list(zip(names, records, strict=True))
    simulated = [(name, record) for name, record in own if record.experiment["data"] == "simulated"]
    arm_of = {arm_key(record.experiment): name for name, record in reversed(simulated)}
    every = [(arm_of.get(arm_key(record.experiment)), record) for record in read_results(KEPT)]
    kept = [(arm, record) for arm, record in every if arm and record.experiment["seed"] not in SEARCH_SEEDS]
    worlds = {name: {record.experiment["seed"] for arm, record in kept if arm == name} for name in dict(kept)}
    whole = {name for name in worlds if worlds[name] == worlds.get(baseline)}
    if not whole:
        return pd.DataFrame(columns=["arm", "size", *COMPARED])
    parts = {}
    for size, pairs in (("here", own), ("challenge", kept)):
        names, records = zip(*pairs)
        parts[size] = compare_arms(records, "arm", baseline, names=names, arms=whole)
    order = list(parts["challenge"]["arm"]).index
    frame = pd.concat(parts, names=["size"]).reset_index("size")[["arm", "size", *COMPARED]]
    return frame.sort_values("arm", key=lambda arms: arms.map(order), kind="stable", ignore_index=True)


def both_sizes(frame: pd.DataFrame, baseline: str) -> dict[str, int | str]:
    """Count the differences of ``beside`` by what their intervals say at the two sizes.

    all; same and opposite signs; told from zero at the larger or the smaller size alone, or at neither; unjudged, where
    an interval is missing; reading, those that there are, in words; source, the provenance of the larger worlds.
    """
    signs: dict[str, list[int | None]] = {}
    for row in frame[frame["arm"] != baseline].to_dict("records"):
        signs.setdefault(row["arm"], []).append(sign(row))
    judged = [(here, large) for here, large in signs.values() if here is not None and large is not None]
    found: dict[str, int | str] = {
        "all": len(signs),
        "same": sum(here == large != 0 for here, large in judged),
        "opposite": sum(here * large < 0 for here, large in judged),
        "larger": sum(here == 0 != large for here, large in judged),
        "smaller": sum(large == 0 != here for here, large in judged),
        "neither": judged.count((0, 0)),
        "unjudged": len(signs) - len(judged),
    }
    said = listed(f"{words} in {found[name]}" for name, words in READINGS.items() if found[name])
    return found | {"reading": said, "source": provenance([] if frame.empty else read_results(KEPT))}
