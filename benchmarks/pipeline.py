"""What degraded frames do to real faces, and what is decided before any aggregation.

    python -m benchmarks.pipeline degraded FOLDER book/results/12_degraded.jsonl.gz
    python -m benchmarks.pipeline decisions FOLDER book/results/12_pipeline.csv

FOLDER holds the photographs and the networks, as `data.photographs` finds them.  Every clip is searched for among the
others (leave one clip out); average precisions are averaged over the clips of an identity, then over identities, over
which the intervals are.
"""

import gzip
import json
import sys
import warnings
from collections.abc import Callable, Iterator
from datetime import date
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import timm
import torch

from benchmarks.degrade import STRENGTHS, choose_frames, degrade
from mmlib.aggregate import quality_pool
from mmlib.claims import cache_folder
from mmlib.data.detector import align, load_detector
from mmlib.data.embedder import Embedder, Quality
from mmlib.data.images import read_image
from mmlib.data.photographs import HOW, PLACES, cut_faces, find_source, in_batches, list_photographs, photographs_of
from mmlib.data.public import SCENES
from mmlib.data.quality import BY_RANK, rescale
from mmlib.metrics import average_precision, bootstrap_interval
from mmlib.records import commit

SHARES = (0.2, 0.4, 0.6)
EVERY = 4  # of so many people one is taken, with all clips
MIXED = "mixed"  # each degraded frame by a kind and a strength of its own
SHARPNESS = 6.0  # of the weights of the oracle, exp(6 cosine)


def cosines(clips: np.ndarray) -> np.ndarray:
    """Return the cosines (N, N) of clip features (N, D)."""
    return _unit(clips) @ _unit(clips).T


def leave_one_out(similarity: np.ndarray, identity: np.ndarray, k: int = 100) -> np.ndarray:
    """Return AP@k (C,) of identities, sorted, of clips' similarity (N, N), each searched for among the others."""
    others = similarity - np.diag(np.full(len(similarity), np.inf))
    nearest = np.argsort(-others, axis=1, kind="stable")[:, : min(k, len(identity) - 1)]
    relevant = (identity[:, None] == identity).sum(1) - 1
    ap = average_precision(identity[nearest] == identity[:, None], relevant)
    return pd.Series(ap)[relevant > 0].groupby(identity[relevant > 0]).mean().to_numpy()


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True).clip(1e-12)


def usefulness(frames: np.ndarray, identity: np.ndarray, clean: np.ndarray | None = None) -> np.ndarray:
    """Return cosines (N, T) of frames (N, T, D) to the mean of the other clips of their identity, of clean frames."""
    mean = _unit(frames if clean is None else clean).mean(1)
    total = pd.DataFrame(mean).groupby(identity).transform("sum").to_numpy()
    return np.einsum("ntd,nd->nt", _unit(frames), _unit(total - mean))


def pool_arms(frames: np.ndarray, quality: np.ndarray, det: np.ndarray, useful: np.ndarray) -> dict[str, np.ndarray]:
    """Return clip features (N, D) by arm, of frames (N, T, D), their scores (N, T) in [0, 1] and `usefulness`."""
    x = torch.from_numpy(_unit(frames))
    scaled = torch.from_numpy(rescale(quality.ravel(), BY_RANK)[0].reshape(quality.shape))
    steep = quality_pool(x, torch.ones(quality.shape, dtype=torch.bool), scaled, torch.from_numpy(det))
    best = np.take_along_axis(frames, quality.argmax(1)[:, None, None], 1)[:, 0]
    weights = {"mean": 1, "norm": np.linalg.norm(frames, axis=2), "score": quality}
    weights["oracle"] = np.exp(SHARPNESS * useful)
    weights = {name: np.broadcast_to(of, quality.shape)[..., None] for name, of in weights.items()}
    pooled = {name: (_unit(frames) * of).sum(1) for name, of in weights.items()}
    return pooled | {"quality": steep.numpy(), "best frame": best}


def told_apart(score: np.ndarray, degraded: np.ndarray) -> float:
    """Return the share of pairs of a degraded and a clean frame of a clip (N, T) of which the score orders right."""
    pairs = degraded[:, :, None] & ~degraded[:, None]
    lower = score[:, :, None] - score[:, None]
    return float(((lower < 0) + 0.5 * (lower == 0))[pairs].mean())


class Frames:
    """Frames of YouTube Faces as they are cut out, crops (F, S, S, 3) and their table, and the networks."""

    def __init__(self, sources: Path, scratch: Path):
        self.sources, self.networks = sources, {kind: find_source(kind, sources) for kind in (*HOW, "lightqnet")}
        self.embedders = {kind: Embedder(self.networks[kind], *how) for kind, how in HOW.items()}
        self.score = Quality(self.networks["lightqnet"])
        self.detector = load_detector(find_source("retinaface", sources))
        made = _kept(scratch / "crops.npz", partial(self._cut, scratch))
        self.points, self.crops = made.pop("points"), made.pop("crops")
        self.table = pd.DataFrame(made)
        self.shape = (self.table["clip"].nunique(), -1)
        self.identity = self.table.drop_duplicates("clip")["identity"].to_numpy()
        self.det = self.table["det"].to_numpy(np.float64).reshape(self.shape)

    def _cut(self, scratch: Path) -> dict[str, np.ndarray]:
        with photographs_of("ytf", self.sources, scratch) as place:
            table, points, crops = cut_faces("ytf", place, *list_photographs("ytf", place), self.detector)
        columns = {name: table[name].to_numpy() for name in ("det", "eye_px")}
        columns |= {name: table[name].to_numpy(str) for name in ("clip", "identity")}
        return columns | {"points": points, "crops": crops}

    def embed(self, crops: np.ndarray, scored: bool = True) -> dict[str, np.ndarray]:
        """Return features of crops by network, and their quality."""
        networks: dict[str, Callable] = {**self.embedders, **({"quality": self.score} if scored else {})}
        return {kind: in_batches(of, crops) for kind, of in networks.items()}


def degraded(frames: Frames, scratch: Path) -> Iterator[dict]:
    """Yield what `pool_arms` finds in clips of which a share is degraded; embeddings, once made, stay in `scratch`.

    The clips are those of one person in `EVERY`, all degraded alike: among clean clips of others degraded ones would be
    found by their being degraded.  Rows have network, kind, strength, share, arm; map with low and high; gain over the
    mean of the same frames with gain_low and gain_high; and of `told_apart` by_quality and by_norm.
    """
    table, crops, identity = frames.table, frames.crops, frames.identity
    taken = np.isin(identity, np.unique(identity)[::EVERY])
    asked = taken.repeat(len(table) // len(identity))
    identity, det, shape = identity[taken], frames.det[taken], (taken.sum(), -1)
    rows = np.flatnonzero(asked & choose_frames(table["clip"], max(SHARES)))
    made = {("clean", 0.0): _kept(scratch / "clean.npz", lambda: frames.embed(crops))}
    for kind, strengths in STRENGTHS.items():
        for strength in strengths:

            def embed() -> dict[str, np.ndarray]:
                rngs = (np.random.default_rng((0, int(row))) for row in rows)
                changed = [degrade(crops[row], kind, strength, rng) for row, rng in zip(rows, rngs)]
                return frames.embed(np.stack(changed))

            made[kind, strength] = _kept(scratch / f"{kind}-{strength}.npz", embed)
    clean = {name: of[asked] for name, of in made.pop(("clean", 0.0)).items()}
    drawn = np.random.default_rng(0).integers(0, len(made), len(rows))
    every = {name: np.stack([of[name] for of in made.values()]) for name in clean}
    made[MIXED, 0.0] = {name: of[drawn, np.arange(len(rows))] for name, of in every.items()}
    for network in HOW:
        true = clean[network].reshape(*shape, clean[network].shape[1])
        for (kind, strength), of in {("clean", 0.0): None, **made}.items():
            for share in SHARES if of else (0.0,):
                chosen, at = choose_frames(table["clip"], share), {name: clean[name].copy() for name in clean}
                if of:
                    for name in (network, "quality"):
                        at[name][chosen[asked]] = of[name][chosen[rows]]
                x, quality = at[network].reshape(true.shape), at["quality"].reshape(shape)
                arms = pool_arms(x, quality, det, usefulness(x, identity, true))
                ap = {arm: leave_one_out(cosines(clips), identity) for arm, clips in arms.items()}
                shared: dict = {"network": network, "kind": kind, "strength": strength, "share": share}
                if of:
                    bad = chosen[asked].reshape(shape)
                    norm = np.linalg.norm(x, axis=2)
                    shared |= {"by_quality": told_apart(quality, bad), "by_norm": told_apart(norm, bad)}
                for arm, found in ap.items():
                    row = {"arm": arm} | _interval(found, "map", "") | _interval(found - ap["mean"], "gain", "gain_")
                    row |= {"identities": len(found), "clips": len(identity), "degraded": int(chosen[asked].sum())}
                    yield shared | row


def _kept(path: Path, make: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Read arrays that were made before, or make and keep them."""
    if not path.exists():
        part = path.with_suffix(".part.npz")
        np.savez(part, **make())  # type: ignore[arg-type]  # numpy's hint has its option among the names
        part.rename(path)
    with np.load(path) as file:
        return dict(file)


def _interval(values: np.ndarray, name: str, prefix: str) -> dict[str, float]:
    low, high = bootstrap_interval(values)
    return {name: round(float(values.mean()), 5), f"{prefix}low": round(low, 5), f"{prefix}high": round(high, 5)}


def decisions(frames: Frames, scratch: Path) -> Iterator[dict]:
    """Yield what each decision before any aggregation is worth: `decision`, `network`, `measure`, `a` with its value.

    Of two ways the row has both, `a` and `b`, and their difference with low and high; and how many photographs.  What
    the files below the folder do not allow is yielded as a `missing` alone.
    """
    identity, shape = frames.identity, frames.shape
    made = _kept(scratch / "clean.npz", lambda: frames.embed(frames.crops))
    quality = made["quality"].reshape(shape)
    rgb = _kept(scratch / "rgb.npz", lambda: {"quality": in_batches(frames.score, frames.crops[..., ::-1])})["quality"]

    def row(decision: str, measure: str, x: np.ndarray, y: np.ndarray | None = None, /, **names: object) -> dict:
        found = {"decision": decision, "measure": measure, **names, "value_a": float(x.mean())}
        found |= {} if y is None else {"value_b": float(y.mean())}
        low, high = bootstrap_interval(x if y is None else x - y)
        return found | {"difference": np.nan if y is None else float((x - y).mean()), "low": low, "high": high}

    for network in HOW:
        x = made[network].reshape(*shape, made[network].shape[1])
        useful, names = usefulness(x, identity), {"network": network, "photographs": len(frames.table)}
        scores = {
            "its quality score": quality,
            "its norm": np.linalg.norm(x, axis=2),
            "its detection score": frames.det,
        }
        scores["the distance of its eyes"] = frames.table["eye_px"].to_numpy().reshape(shape)
        knows = {name: _within(score, useful, identity) for name, score in scores.items()}
        for name, value in knows.items():
            yield row("what knows a frame's use", "rank correlation in a clip", value, a=name, **names)
        other = _within(rgb.reshape(shape), useful, identity)
        ways = {"a": "red first", "b": "blue first, as its authors"}
        both = other, knows["its quality score"]
        yield row("colours of the quality network", "rank correlation in a clip", *both, **ways, **names)
        arms = pool_arms(x, quality, frames.det, useful)
        arms["score to the fourth power"] = (_unit(x) * quality[..., None] ** 4).sum(1)
        ap = {arm: leave_one_out(cosines(clips), identity) for arm, clips in arms.items()}
        for arm in ("score", "score to the fourth power", "quality", "best frame", "oracle"):
            yield row("weights of five frames", "MAP@100", ap[arm], ap["mean"], a=arm, b="mean", **names)
        yield from _scenes(frames, scratch.parent, cosines(arms["mean"]), partial(row, **names))
    yield from _int8(frames, row)
    yield from _profiles(frames, scratch, row)


def _within(score: np.ndarray, useful: np.ndarray, identity: np.ndarray) -> np.ndarray:
    """Return the rank correlation in a clip (N, T), averaged over the clips of each identity (C,)."""
    a, b = (pd.DataFrame(of).rank(axis=1).to_numpy() for of in (score, useful))
    a, b = (of - of.mean(1, keepdims=True) for of in (a, b))
    spread = np.sqrt((a**2).sum(1) * (b**2).sum(1))
    found = pd.Series((a * b).sum(1) / np.where(spread > 0, spread, np.nan))
    return found.groupby(identity).mean().dropna().to_numpy()


def _scenes(frames: Frames, tables: Path, face: np.ndarray, row: Callable[..., dict]) -> Iterator[dict]:
    """Add similarities of scenes (of the tables that were made) to those of faces."""
    for kind, file in SCENES.items():
        if not (tables / "ytf" / file).exists():
            yield {"decision": "scenes", "missing": f"{file}, of mmlib fetch ytf"}
            continue
        scene = np.load(tables / "ytf" / file).astype(np.float64)
        scene = cosines(scene - scene.mean(0))
        plain = leave_one_out(face, frames.identity)
        for share in (0.1, 0.2):
            ap = leave_one_out(face + share * scene, frames.identity)
            yield row("a scene beside the face", "MAP@100", ap, plain, a=f"{share} of a scene, {kind}", b="face alone")


def _int8(frames: Frames, row: Callable[..., dict]) -> Iterator[dict]:
    """Embed by the published int8 network, an image at a time and 32 at once."""
    path = frames.sources / PLACES["edgeface"][0]
    if not path.exists():
        yield {"decision": "int8 weights", "missing": str(path)}
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch, that quantised tensors are an old kind
        network = timm.create_model(*HOW["edgeface"][:1], num_classes=512)
        network = torch.ao.quantization.quantize_dynamic(network.eval(), {torch.nn.Linear})
        torch.nn.ModuleDict({"model": network}).load_state_dict(torch.load(path, weights_only=True))
        crops = frames.crops[:: len(frames.crops) // 192][:192]
        pixels = torch.from_numpy(crops).permute(0, 3, 1, 2).float() / 127.5 - 1
        with torch.inference_mode():
            singly, batch = (torch.cat([network(part) for part in pixels.split(n)]).numpy() for n in (1, 32))
    plain = frames.embedders["edgeface"](crops)
    for a, b, x, y in (
        ("int8, one image a call", "int8, 32 a call", singly, batch),
        ("int8, one image a call", "the same weights as numbers", singly, plain),
    ):
        cosine = (_unit(x) * _unit(y)).sum(1)
        names = {"network": "edgeface", "photographs": len(crops)}
        yield row("int8 weights", "cosine of two embeddings of an image", cosine, a=f"{a}, and {b}", **names)


def _profiles(frames: Frames, scratch: Path, row: Callable[..., dict]) -> Iterator[dict]:
    """Verify frontal against profile faces of CFP, aligned on the points given or on a detector's, in ten folds."""
    try:
        place = find_source("cfp", frames.sources)
        if not (place / "Protocol").is_dir():
            raise ValueError(f"{place}: holds crops only, not the photographs")
    except ValueError as error:
        yield {"decision": "profiles", "missing": str(error)}
        return

    def embed() -> dict[str, np.ndarray]:
        table, points = list_photographs("cfp", place.parent)
        _, _, crops = cut_faces("cfp", place.parent, table, points, frames.detector)
        found = {f"detector {name}": of for name, of in frames.embed(crops, scored=False).items()}
        for at, photograph in enumerate(table.itertuples()):
            given = np.loadtxt(place / f"Data/Fiducials/{photograph.clip}.txt", delimiter=",")
            three = np.stack([given[12:18].mean(0), given[21], given[25]])
            side = [0, 2, 3] if three[0, 0] < three[1, 0] else [1, 2, 4]  # of the picture, which the points show
            picture = np.asarray(read_image(place.parent / photograph.path, photograph.clip)[0])
            crops[at] = align(picture, three[None], 112, side)[0]
        found |= {f"given {name}": of for name, of in frames.embed(crops, scored=False).items()}
        return found | {"clip": table["clip"].to_numpy(str)}

    made = _kept(scratch / "cfp.npz", embed)
    rows = pd.Series(np.arange(len(made["clip"])), made["clip"])
    paths = (place / f"Protocol/image_list_{kind}.txt" for kind in "FP")
    lists = [pd.read_csv(path, sep=r"\s+", index_col=0, header=None)[1] for path in paths]
    lists = [rows[of.str.removeprefix("Data/Images/").str.removesuffix(".jpg")].set_axis(of.index) for of in lists]
    folds = []
    for fold in range(1, 11):
        paths = (place / f"Protocol/Split/FP/{fold:02d}/{kind}.txt" for kind in ("same", "diff"))
        pairs = [np.loadtxt(path, int, delimiter=",") for path in paths]
        same = np.repeat([True, False], [len(of) for of in pairs])
        folds.append((*(of[numbers].to_numpy() for of, numbers in zip(lists, np.concatenate(pairs).T)), same))
    for network in HOW:
        right = []
        for way in ("given", "detector"):
            unit = _unit(made[f"{way} {network}"])
            scores = [((unit[f] * unit[p]).sum(1), same) for f, p, same in folds]
            right.append(np.array([_verified(scores, fold) for fold in range(len(folds))]))
        names = {"a": "its own points", "b": "five of a detector", "network": network, "photographs": len(rows)}
        yield row("profiles of CFP aligned on", "verification accuracy, mean of ten folds", *right, **names)


def _verified(scores: list, fold: int) -> float:
    """Return the accuracy of a fold at the threshold that is best for the others."""
    cosine, same = (np.concatenate([of[at] for n, of in enumerate(scores) if n != fold]) for at in (0, 1))
    order = np.argsort(-cosine, kind="stable")
    best = np.argmax(np.cumsum(np.where(same[order], 1, -1)))
    threshold = cosine[order[best]]
    return float(((scores[fold][0] >= threshold) == scores[fold][1]).mean())


def main(what: str, sources: str, out: str) -> None:
    """Make one of the two results, as the module says."""
    scratch = cache_folder() / "faces" / "pipeline"
    scratch.mkdir(parents=True, exist_ok=True)
    frames = Frames(Path(sources), scratch)
    if what == "decisions":
        pd.DataFrame(decisions(frames, scratch)).round(4).to_csv(out, index=False)
        return
    made = {"made": date.today().isoformat(), "commit": commit()}
    lines = [json.dumps(each) for each in [made, *degraded(frames, scratch)]]
    Path(out).write_bytes(gzip.compress("\n".join([*lines, ""]).encode(), mtime=0))


if __name__ == "__main__":
    main(*sys.argv[1:])
