"""Score rankings by the official rule, and say how far a score can be trusted.

An identity is a query, the clips are the gallery. All scores are fractions in [0, 1]; an AP is kept for each
identity, so that every interval and comparison can be recomputed later.
"""

from collections import namedtuple
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

AP_RULES = ("relevant", "capped", "found", "trapezoid")
_CHUNK = 2_000_000  # random numbers held at once by the resampling functions

Lines = tuple[Sequence, Sequence[Sequence]]  # identities, and for each its clips
Paired = namedtuple("Paired", "difference low high p_value n")  # two runs on the same n identities: a minus b
OverWorlds = namedtuple("OverWorlds", "mean low high sd n")  # a quantity over n worlds, and its spread (sd)


class Score(NamedTuple):
    """Hold what a submission scored: identities (Q,), the AP of each, and the share whose first clip is relevant."""

    identities: np.ndarray
    ap: np.ndarray
    top1: float

    @property
    def map_at_k(self) -> float:
        return float(self.ap.mean())


def average_precision(hits: np.ndarray, relevant: np.ndarray, *, rule: str = "relevant") -> np.ndarray:
    """Average precision of each ranking, (Q,).

    hits (Q, K) bool, best first, False beyond the end of a ranking; relevant (Q,) int, R, how many relevant
    clips the query has anywhere. With P(r) = hits among the first r / r,

        AP = 1 / R * sum over hits of P(r)

    is the official rule ("relevant"), 0 for R = 0; R is not capped at K. Libraries that say AP@k divide by other
    things: "capped" by min(R, K); "found" by the hits in the ranking (torchmetrics, OML); "trapezoid" by R, with the
    mean of P(r) and the precision one rank earlier (1 before the first) in place of P(r) (Oxford and Paris code).

    >>> one = np.array([[1, 0, 1, 0, 0]], bool), np.array([8])
    >>> [average_precision(*one, rule=rule).round(3).item() for rule in AP_RULES]
    [0.208, 0.333, 0.833, 0.198]
    """
    found, rank, total = hits.cumsum(axis=1), np.arange(1, hits.shape[1] + 1), hits.sum(axis=1)
    if (total > relevant).any():
        row = int(np.argmax(total > relevant))
        raise ValueError(f"query {row} has {total[row]} hits, but relevant says {relevant[row]}")
    precision = found / rank
    if rule == "trapezoid":
        before = (found - hits) / np.maximum(rank - 1, 1)
        before[:, :1] = 1.0
        precision = (precision + before) / 2
    capped = np.minimum(relevant, hits.shape[1])
    divisors = {"relevant": relevant, "capped": capped, "found": total, "trapezoid": relevant}
    if rule not in divisors:
        raise ValueError(f"rule must be one of {', '.join(AP_RULES)}, got {rule!r}")
    return (precision * hits).sum(axis=1) / np.maximum(divisors[rule], 1)


def official_score(truth: Lines, result: Lines, *, k: int = 100) -> Score:
    """Score a submission by the rule of the challenge: MAP@k = sum of AP / id_num, id_num = lines of `truth`.

    truth, result: the lines of the two files, each as (identities, clips of each). Decided cases, as the
    official script has them unless said otherwise:

    - an identity that `result` lacks scores 0; one that `truth` lacks is ignored, however many clips it has, but
      counts in the line limit;
    - more lines in `result` than in `truth`: ValueError;
    - a clip repeated on a line of `result` is dropped, keeping the first; more than k clips after that: ValueError;
    - a clip repeated on a line of `truth` counts twice in R (it can be found once, so AP stays below 1);
    - an identity repeated in `truth`: the last line holds, the others score 0, and all count in id_num;
    - an empty line of `truth` scores 0 and counts in id_num, submitted or not (the script may divide by 0);
    - an identity repeated in `result`: ValueError, for nothing says which ranking is meant (the script: the last);
    - a clip that `truth` names nowhere (a distractor) pushes later hits down, and nothing else.

    >>> truth = ["1", "2"], [["a", "b"], ["c"]]
    >>> official_score(truth, (["1"], [["a", "x", "b"]])).map_at_k == (1 + 2 / 3) / 2 / 2
    True
    """
    (names, wanted), (submitted, ranked) = truth, result
    if not len(names):
        raise ValueError("truth has no line, so there is nothing to score")
    if len(submitted) > len(names):
        raise ValueError(f"result has {len(submitted)} lines, more than the {len(names)} of the ground truth")
    row = {name: number for number, name in enumerate(names)}  # the last line holds
    hits, seen = np.zeros((len(names), k), bool), set()
    for name, clips in zip(submitted, ranked):
        if name in seen:
            raise ValueError(f"result names identity {name} more than once")
        seen.add(name)
        if name not in row:
            continue
        distinct, relevant = set(clips), set(wanted[row[name]])
        if len(distinct) > k:
            raise ValueError(f"result line of identity {name} has {len(distinct)} clips, more than {k}")
        ranking = list(clips if len(distinct) == len(clips) else dict.fromkeys(clips))
        for clip in relevant & distinct:  # a few, of a hundred
            hits[row[name], ranking.index(clip)] = True
    ap = average_precision(hits, np.array([len(clips) for clips in wanted]))
    return Score(np.asarray(names), ap, float(hits[:, 0].mean()))


def script_score(truth: Lines, result: Lines, *, k: int = 100) -> float:
    """Score as the script of the challenge does, step by step: for lines as of `submission.read_as_script`.

    It differs from `official_score` where an identity of `result` is repeated (the last line holds) or one with an
    empty line of `truth` is submitted (it would divide by 0).  What it would stop at is a ValueError.

    >>> script_score((["1", "2"], [["a.mp4", "", "b.mp4"], ["c.mp4"]]), (["1"], [["a.mp4", "b.mp4"]])) == 2 / 3 / 2
    True
    """
    if not len(truth[0]):
        raise ValueError("truth has no line: the script would divide by 0")
    if len(result[0]) > len(truth[0]):
        raise ValueError(f"result has {len(result[0])} lines, more than the {len(truth[0])} of the ground truth")
    ranking_of, total = dict(zip(*result)), 0.0
    for name, wanted in dict(zip(*truth)).items():
        if name not in ranking_of:
            continue
        ranking, hits, precision = list(dict.fromkeys(ranking_of[name])), 0, 0.0
        if len(ranking) > k:
            raise ValueError(f"result line of identity {name} has {len(ranking)} clips, more than {k}")
        if not wanted:
            raise ValueError(f"identity {name} is submitted and has no clip in truth: the script would divide by 0")
        for rank, clip in enumerate(ranking, 1):
            if clip in wanted:
                hits += 1
                precision += hits / rank
        total += precision / len(wanted)
    return total / len(truth[0])


def match_ranking(ranking: np.ndarray, gallery_identity: np.ndarray, query_codes: np.ndarray) -> np.ndarray:
    """Say which ranked clips are relevant, (Q, K).

    ranking (Q, K) gallery rows, best first, -1 beyond its end; gallery_identity (N,) identity codes, -1 for
    nobody on the list; query_codes (Q,) whose ranking each row is.
    """
    ordered = np.sort(ranking, axis=1)
    twice = ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any(axis=1)
    if twice.any():
        raise ValueError(f"the ranking of identity {query_codes[np.argmax(twice)]} names a clip twice")
    return (ranking >= 0) & (gallery_identity[ranking] == query_codes[:, None])


def clip_precision(ranking: np.ndarray, hits: np.ndarray, gallery: int) -> np.ndarray:
    """Return what each gallery clip adds to its identity's AP, before division by R: (gallery,), in [0, 1].

    ranking, hits (Q, K) as of `match_ranking`. A clip found at rank r by its identity has precision P(r), one that is
    not found 0, so the AP of a query is the mean over its R relevant clips.

    >>> clip_precision(np.array([[1, 2, 0]]), np.array([[True, False, True]]), 4).round(3)
    array([0.667, 1.   , 0.   , 0.   ])
    """
    precision = hits.cumsum(axis=1) / np.arange(1, hits.shape[1] + 1)
    out = np.zeros(gallery)
    out[np.asarray(ranking)[hits]] = precision[hits]
    return out


def standard_error(ap: np.ndarray) -> float:
    """Standard error of a mean AP over identities: sd / sqrt(Q), with Q - 1 in the variance; NaN for one identity."""
    ap = _finite(ap, "ap")
    return float(stats.sem(ap)) if len(ap) > 1 else np.nan


def bootstrap_interval(ap: np.ndarray, *, level: float = 0.95, draws: int = 2000, seed: int = 0) -> tuple[float, float]:
    """Percentile interval of the mean of `ap` (Q,) under resampling of identities; NaN for one, without a spread."""
    ap, rng = _finite(ap, "ap"), np.random.default_rng(seed)
    if len(ap) == 1:
        return np.nan, np.nan
    rows = (rng.integers(0, len(ap), (size, len(ap)), dtype=np.int32) for size in _pieces(draws, len(ap)))
    means = [ap[drawn].mean(axis=1) for drawn in rows]
    low, high = np.quantile(np.concatenate(means), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _pieces(draws: int, width: int) -> list[int]:
    """Cut a number of draws of ``width`` numbers each into pieces of some million numbers."""
    step = max(1, _CHUNK // max(width, 1))
    return [min(step, draws - done) for done in range(0, draws, step)]


def paired_test(ap_a: np.ndarray, ap_b: np.ndarray, *, level: float = 0.95, draws: int = 2000, seed: int = 0) -> Paired:
    """Compare two runs identity by identity; ap_a and ap_b (Q,) in the same order of identities.

    difference = mean(ap_a - ap_b), with its `bootstrap_interval`. The p value is two-sided, by random sign flips of the
    differences: (1 + flips with a mean at least as far from 0) / (1 + draws).

    >>> paired_test(np.array([0.75, 0.5]), np.array([0.25, 0.5])).difference
    0.25
    """
    ap_a, ap_b = _finite(ap_a, "ap_a"), _finite(ap_b, "ap_b")
    if ap_a.shape != ap_b.shape:
        raise ValueError(f"ap_a has {len(ap_a)} identities and ap_b {len(ap_b)}; a paired test needs the same ones")
    difference = ap_a - ap_b
    low, high = bootstrap_interval(difference, level=level, draws=draws, seed=seed)
    moved, rng = difference[difference != 0], np.random.default_rng([seed, 1])
    # sum of signs * moved = 2 * (sum of those with a plus) - sum of all
    sizes = _pieces(draws, len(moved))
    signs = (rng.integers(0, 2, (size, len(moved)), dtype=np.uint8).astype(float) for size in sizes)
    plus = np.concatenate([sign @ moved for sign in signs])
    # Rounding must not turn a flip that equals the observed sum into a smaller one.
    bar = abs(moved.sum()) - 1e-9 * np.abs(moved).sum()
    extreme = np.abs(2 * plus - moved.sum()) >= bar
    return Paired(float(difference.mean()), low, high, float((1 + extreme.sum()) / (1 + draws)), len(difference))


def over_worlds(differences: np.ndarray, *, level: float = 0.95) -> OverWorlds:
    """Summarise one number a world, (W,): mean, t interval with W - 1 degrees of freedom, and sd; NaN for one world."""
    value = _finite(differences, "differences")
    if len(value) == 1:
        return OverWorlds(float(value[0]), np.nan, np.nan, np.nan, 1)
    mean, half = float(value.mean()), float(stats.t.ppf((1 + level) / 2, len(value) - 1) * stats.sem(value))
    return OverWorlds(mean, mean - half, mean + half, float(value.std(ddof=1)), len(value))


def _finite(value: np.ndarray, name: str) -> np.ndarray:
    value = np.asarray(value, float)
    if value.ndim != 1 or not len(value) or not np.isfinite(value).all():
        raise ValueError(f"{name} must be finite numbers, one a query or world, got {value}")
    return value
