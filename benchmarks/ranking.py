"""Lines on ranking and scoring."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterable
from functools import reduce
from itertools import repeat
from pathlib import Path

import numpy as np
import torch

from benchmarks.data import FACE, SCALES
from benchmarks.meter import measure
from mmlib import metrics, rank
from mmlib.data.submission import read_result, read_val_truth, write_result, write_val_truth
from mmlib.retrieve import BLOCK

K, SCALE, SHARDS = 100, 30.0, 8  # clips ranked, scale of the cosines, parts of a gallery that are merged


def embeddings(clips: int, identities: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw the embeddings of clips (N, D) and the vectors of identities (C, D), of length 1."""
    draw = torch.Generator(device).manual_seed(0)
    drawn = (torch.randn(n, FACE, generator=draw, device=device) for n in (clips, identities))
    return tuple(torch.nn.functional.normalize(part, dim=1) for part in drawn)


def ranked(members: list[tuple[torch.Tensor, torch.Tensor]], rows: torch.Tensor) -> rank.Ranking:
    """Score the clips in ``rows`` (n,) block by block, as a system of such members does, and rank them."""

    def blocks():
        for part in rows.split(BLOCK):
            cosines = (embedded[part] @ prototype.T for embedded, prototype in members)
            yield part, rank.combine_scores(cosines, "softmax", scale=SCALE)

    return rank.top_k(blocks(), k=K)


def stream(folder: str, scale: str, device: str, members: int = 1, **_) -> dict:
    """Score and rank the gallery for every identity without holding all scores; members have the same vectors.

    Operations: 2 N C D a member.  Bytes: the embeddings are read, and 100 rows and scores of every identity written.
    """
    s = SCALES[scale]
    drawn = [embeddings(s.gallery, s.queries, device)] * members
    rows = torch.arange(s.gallery, device=device)
    found = measure(lambda: ranked(drawn, rows), device=device, repeats=3 if members == 1 else 1)
    return found | _of_ranking(s.gallery, s.queries, members)


def dense(folder: str, scale: str, device: str, members: int = 1, **_) -> dict:
    """Hold the matrix of all scores, clips by identities, and take the best of each column."""
    s = SCALES[scale]
    drawn = [embeddings(s.gallery, s.queries, device)] * members

    def call():
        scores = (torch.softmax(SCALE * (embedded @ prototype.T), dim=1) for embedded, prototype in drawn)
        return reduce(torch.Tensor.add_, scores).T.topk(K, dim=1)

    found = measure(call, device=device, repeats=3 if members == 1 else 1) | _of_ranking(s.gallery, s.queries, members)
    return found | {"work": "dense matrices and topk, the same vectors"}


def likenesses(clips: int, identities: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw vectors as ``embeddings``, of which every other clip lies near its identity, as without that none is found.

    Its cosine to the identity's vector is .6 on average, and those between others are of deviation D^-1/2 = .044.
    """
    embedded, prototype = embeddings(clips, identities, "cpu")
    own = prototype[torch.arange(0, clips, 2) % identities]
    embedded[::2] = torch.nn.functional.normalize(0.75 * own + embedded[::2], dim=1)
    return embedded, prototype


def by_cosine(embedded: torch.Tensor, prototype: torch.Tensor) -> rank.Ranking:
    """Rank clips (N, D) for identities (C, D) by their cosines, exactly."""
    return rank.top_k(((r, embedded[r] @ prototype.T) for r in torch.arange(len(embedded)).split(BLOCK)), k=K)


def cosines(folder: str, scale: str, **_) -> dict:
    """Rank by the cosine alone, exactly, what `searched` does with an index."""
    s = SCALES[scale]
    embedded, prototype = likenesses(s.gallery, s.queries)
    found = measure(lambda: by_cosine(embedded, prototype), repeats=2)
    return found | _of_ranking(s.gallery, s.queries, 1)


def searched(folder: str, scale: str, probes: int = 16, **_) -> dict:
    """Make an index of faiss, a list for every root of the gallery's size, and look into ``probes`` lists of it."""
    try:
        import faiss
    except ImportError:
        raise RuntimeError("not installed here: pip install faiss-cpu") from None
    s, built, sought = SCALES[scale], [], []
    embedded, prototype = likenesses(s.gallery, s.queries)
    lists = round(s.gallery**0.5)
    exact = by_cosine(embedded, prototype).clip

    def call():
        began = time.perf_counter()
        index = faiss.index_factory(FACE, f"IVF{lists},Flat", faiss.METRIC_INNER_PRODUCT)
        index.train(embedded.numpy())
        index.add(embedded.numpy())
        index.nprobe = probes
        built.append(time.perf_counter() - began)
        sought[:] = [torch.from_numpy(index.search(prototype.numpy(), K)[1])]

    found = measure(call, repeats=2)
    near = s.gallery // 2 // s.queries  # of these an identity has so many, or one more
    recall = [
        (sought[0][:, None, :] == exact[:, :kept, None]).any(2).float().mean().item() for kept in (max(1, near), K)
    ]
    share, words = min(built) / min(found["seconds"]), f"recall {recall[0]:.3f} of the best {max(1, near)}"
    work = f"faiss IVF{lists} with {probes} probes, {words}, {recall[1]:.3f} of {K}; {share:.0%} of it builds the index"
    return found | {"work": work}


def busy(folder: str, scale: str, device: str, **_) -> dict:
    """Take the best clips while a process on every core does other work.  Bytes: the scores are read."""
    clips, identities = (20_000, 2_000) if scale == "full" else (2_000, 200)
    scores = torch.rand(clips, identities, generator=torch.Generator().manual_seed(0))
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(os.cpu_count() or 1)]
    try:
        blocks = list(zip(torch.arange(clips).split(BLOCK), scores.split(BLOCK)))
        found = measure(lambda: rank.top_k(blocks, k=K), repeats=10, warm=1)
    finally:
        for other in others:
            other.kill()
            other.wait()
    work = f"the best {K} of {clips:,} clips for {identities:,} identities beside {len(others)} busy processes"
    return found | {"work": work, "flops": 0, "bytes": scores.nbytes}


def busy_one_thread(**asked) -> dict:
    """Do the same in one thread."""
    torch.set_num_threads(1)
    return busy(**asked) | {"work": "one thread, the same scores and processes"}


def merge(folder: str, scale: str, device: str, **_) -> dict:
    """Merge the rankings of the shards of a gallery.  Bytes: those rankings are read, and one of the whole written."""
    s = SCALES[scale]
    embedded, prototype = embeddings(s.gallery, s.queries, device)
    parts = [ranked([(embedded, prototype)], rows) for rows in torch.arange(s.gallery, device=device).chunk(SHARDS)]
    found = measure(lambda: rank.merge(parts, k=K), device=device)
    work = f"{SHARDS} rankings of {s.queries:,} identities, {K} clips each, merged"
    return found | {"work": work, "flops": 0, "bytes": 12 * K * s.queries * (SHARDS + 1)}


def _of_ranking(gallery: int, queries: int, members: int) -> dict:
    many = f"the mean softmax of {members} members, " if members > 1 else ""
    return {
        "work": f"{many}{gallery:,} clips for {queries:,} identities, {FACE} dimensions, the best {K}",
        "flops": 2 * gallery * queries * FACE * members,
        "bytes": 4 * FACE * (gallery + queries) * members + 12 * K * queries,
        "precision": "fp32",
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
    """Read a submission and the truth with all checks, and score.  Bytes: those of the two files."""
    s, truth, result = SCALES[scale], Path(folder, "val_gt.txt"), Path(folder, "result.txt")
    found = measure(lambda: metrics.official_score(read_val_truth(truth), read_result(result)))
    return found | {
        "work": f"files of {s.queries:,} identities, {K} clips each, read and scored",
        "flops": 0,
        "bytes": truth.stat().st_size + result.stat().st_size,
    }


def metric_trec(folder: str, **_) -> dict:
    """Score the same files by the code of TREC, https://github.com/cvangysel/pytrec_eval, which reads no such files.

    Its scores are those of the official rule, mean over the identities of the truth.
    """
    try:
        import pytrec_eval
    except ImportError:
        raise RuntimeError("not installed here: pip install pytrec-eval-terrier") from None
    truth, result = Path(folder, "val_gt.txt"), Path(folder, "result.txt")
    score_at = [1 / rank for rank in range(1, K + 1)]

    def read(path: Path, of: Iterable) -> dict[str, dict]:
        with open(path, encoding="utf-8") as lines:
            return {name: dict(zip(clips, of)) for name, *clips in map(str.split, lines)}

    def call() -> float:
        relevant = read(truth, repeat(1))
        found = pytrec_eval.RelevanceEvaluator(relevant, {f"map_cut_{K}"}).evaluate(read(result, score_at))
        return sum(of[f"map_cut_{K}"] for of in found.values()) / len(relevant)

    return measure(call) | {"work": f"pytrec_eval on the same files, {call():.6f}"}


def scored(ranking: np.ndarray, identity: np.ndarray) -> np.ndarray:
    """Return the AP of every identity (C,) from its ranking (C, K) and the identity of every clip (N,)."""
    relevant = np.bincount(identity[identity >= 0], minlength=len(ranking))
    return metrics.average_precision(metrics.match_ranking(ranking, identity, np.arange(len(ranking))), relevant)


def metric_arrays(folder: str, scale: str, **_) -> dict:
    """Score a ranking that is in memory.  Bytes: the ranking and the identities of the clips."""
    s = SCALES[scale]
    identity, ranking = ranking_problem(s.gallery, s.queries, s.labelled)
    found = measure(lambda: scored(ranking, identity))
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
