"""Lines on ranking and scoring."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from benchmarks.data import FACE, SCALES
from benchmarks.meter import measure
from mmlib import metrics, rank
from mmlib.data.submission import read_result, read_val_truth, write_result
from mmlib.data.submission import write_val_truth

K = 100


def features(clips: int, identities: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw clip features (N, D) and the vectors of identities (C, D)."""
    draw = torch.Generator(device).manual_seed(0)
    return tuple(torch.randn(n, FACE, generator=draw, device=device) for n in (clips, identities))


def stream(folder: str, scale: str, device: str, **_) -> dict:
    """Score and rank the gallery for every identity without holding all scores.

    Operations: 2 N C D, which ``rank_cosines`` does in bfloat16 before it makes sure of the best.  Bytes: both features are
    read, and 100 rows and scores of every identity written.
    """
    s = SCALES[scale]
    feature, prototype = features(s.gallery, s.queries, device)
    found = measure(lambda: rank.rank_cosines(feature, prototype, k=K), device=device)
    return found | _of_ranking(s.gallery, s.queries) | {"precision": "bf16"}


def dense(folder: str, scale: str, device: str, **_) -> dict:
    """Hold the matrix of all cosines, identities by clips, and take the best of each row."""
    s = SCALES[scale]
    feature, prototype = features(s.gallery, s.queries, device)

    def call():
        unit = [torch.nn.functional.normalize(x, dim=1) for x in (prototype, feature)]
        return (unit[0] @ unit[1].T).topk(K, dim=1)

    with torch.no_grad():
        return (
            measure(call, device=device)
            | _of_ranking(s.gallery, s.queries)
            | {"precision": "fp32", "work": "a dense matrix and topk, the same vectors"}
        )


def _of_ranking(gallery: int, queries: int) -> dict:
    return {
        "work": f"{gallery:,} clips for {queries:,} identities, {FACE} dimensions, the best {K}",
        "flops": 2 * gallery * queries * FACE,
        "bytes": 4 * FACE * (gallery + queries) + 12 * K * queries,
    }


def ranking_problem(gallery: int, queries: int, labelled: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw the identity of every clip (N,), -1 for nobody, and a ranking (C, K) of clips without repeats."""
    rng = np.random.default_rng(0)
    identity = np.full(gallery, -1)
    identity[:labelled] = rng.permutation(np.arange(labelled) % queries)
    rng.shuffle(identity)
    # Steps of a prime stride that does not divide the gallery never meet the same clip twice.
    stride = 7_919
    return identity, (rng.integers(0, gallery, (queries, 1)) + stride * np.arange(K)) % gallery


def make_ranking(folder: str, scale: str, **_) -> dict:
    """Write ``folder/val_gt.txt`` and ``folder/result.txt``."""
    s = SCALES[scale]
    identity, ranking = ranking_problem(s.gallery, s.queries, s.labelled)
    names = np.array([f"IQIYI_VID_VAL_{row:07d}" for row in range(s.gallery)], object)
    order = np.argsort(identity, kind="stable")
    owners = np.split(names[order], np.searchsorted(identity[order], np.arange(s.queries)))[1:]
    identities = [str(code + 1) for code in range(s.queries)]
    write_val_truth(Path(folder, "val_gt.txt"), identities, owners)
    write_result(Path(folder, "result.txt"), identities, ranking, names)
    return {}


def metric(folder: str, scale: str, **_) -> dict:
    """Read a submission and the truth, and score.  Bytes: those of the two files."""
    s, truth, result = SCALES[scale], Path(folder, "val_gt.txt"), Path(folder, "result.txt")
    found = measure(lambda: metrics.official_score(read_val_truth(truth), read_result(result)))
    return found | {
        "work": f"files of {s.queries:,} identities, {K} clips each, read and scored",
        "flops": 0,
        "bytes": truth.stat().st_size + result.stat().st_size,
    }


def metric_arrays(folder: str, scale: str, **_) -> dict:
    """Score a ranking that is in memory.  Bytes: the ranking and the identities of the clips."""
    s = SCALES[scale]
    identity, ranking = ranking_problem(s.gallery, s.queries, s.labelled)
    codes = np.arange(s.queries)
    found = measure(lambda: metrics.score_ranking(ranking, identity, codes))
    return found | {
        "work": f"arrays of {s.queries:,} identities, {K} clips each, scored",
        "flops": 0,
        "bytes": ranking.nbytes + identity.nbytes,
    }


def bootstrap(folder: str, scale: str, **_) -> dict:
    """Draw an interval of a score.  Bytes: every draw reads as many numbers as there are identities."""
    s = SCALES[scale]
    ap = np.random.default_rng(0).random(s.queries)
    draws = 2_000
    found = measure(lambda: metrics.bootstrap_interval(ap, draws=draws))
    return found | {"work": f"{draws:,} draws of {s.queries:,} identities", "flops": 0, "bytes": 8 * draws * s.queries}
