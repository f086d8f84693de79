"""Clips of real people, made harder from real frames alone, and simulated ones made like them, for chapter 12.

A material is a store of a split of a public set (`mmlib.data.public`, which fixes the splits), changed in one way.
Stores lie in `MMLIB_CACHE`, under the content of the tables that they were made of and the code that made them.

Aggregators trained on other people (`others`, `frozen`), as YTF's may be too few; fixed before one was run:

- The people are those of CFP and LFW whose name is not one of YTF, as `shared_names` compares names; of those whom both
  have, CFP's stay.  A clip is several photographs of one person, as in the sets' own stores of the same seed, whose
  train and val clips with an identity are all trained on; norms and the scale of quality are those of each store.
- Training is that of the same arm on YTF: its network, loss, rates, passes and batch (``faces.BUDGET``), so that a step
  is as large and more clips make more steps.
- For clips with wrong frames the other people's clips are made so too, with the same share and kind of strangers.
- Then the aggregator is frozen, its network and classifier are left out, and clips of YTF, which it never saw, are
  ranked by class means of what it makes of YTF's train clips, on the splits of the arms that YTF trains.

Why whitening loses on YTF has two reasons to choose from; `lent` chooses, by what was fixed before a value was seen:

- Half of the people lend all clips, val ones too, to those of which the covariance within people is estimated; the
  other half are ranked among their own val clips and the distractors, by class means of their train clips.  Then the
  halves change places.  The control has the same ranking, and a covariance of train clips alone.
- Simulated clips are cut to as many people, and clips of each (`alike`), so that estimating is as hard.
- Few clips are a reason if the verdict on YTF is better with clips lent than without (loses < open < gains).
- That people vary in different directions is one if, with clips lent, simulated clips gain and YTF does not.
- If neither gains with clips lent, so few clips decide nothing between people.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from mmlib.claims import cache_folder, claim, clear_partial
from mmlib.data.features import digest
from mmlib.data.public import import_public, people_of, shared_names
from mmlib.data.quality import rescale
from mmlib.data.store import ClipStore
from mmlib.experiment import Experiment
from mmlib.records import Record, code_hash, library_hash, run
from mmlib.retrieve import fit
from mmlib.train import pooled_features

MAKING = ("data/features.py", "data/public.py", "data/quality.py", "studies/materials.py")
LIKE = 20  # clips of other people, nearest in mean quality, of which a stranger of like quality is taken
SHARES = (5, 10, 20, 50)  # wrong frames, per cent
TWO = 113 / 347  # share of the people of YTF who have four clips, the others three
STRANGERS = ("anyone", "like quality")
SCORES = ("norm", "det", "shuffled", "oracle")
OTHERS = ("cfp", "lfw")  # sets whose people pool clips of YTF; `others` names their store
LENDING = {"train clips": False, "clips lent": True}  # what a covariance within people is estimated of


class Material(NamedTuple):
    """How a store differs from the clips as they are.

    share: of all frames, that are of other people; strangers: whose.  frames: kept of a clip, 0 for all.  score: in the
    place of the quality.  suspects: whether clips whose label looks wrong are there.
    """

    share: float = 0.0
    strangers: str = STRANGERS[0]
    frames: int = 0
    score: str = ""
    suspects: bool = True


CLEAN, TRUSTED = "clean", "without labels that look wrong"
MATERIALS = {
    CLEAN: Material(),
    **{f"{share} % wrong, {who}": Material(share / 100, who) for who, share in product(STRANGERS, SHARES)},
    **{f"{n} frame{'s' * (n > 1)}": Material(frames=n) for n in (1, 2, 3)},
    **{f"score: {score}": Material(score=score) for score in SCORES},
    **{f"20 % wrong, {who}, score: oracle": Material(0.2, who, score="oracle") for who in STRANGERS},
    TRUSTED: Material(suspects=False),
}
WRONG = {who: (CLEAN, *(f"{share} % wrong, {who}" for share in SHARES)) for who in STRANGERS}
FEWER = (*(name for name, asked in MATERIALS.items() if asked.frames), CLEAN)
SCORED = (
    CLEAN,
    *(name for name, asked in MATERIALS.items() if asked.score),
    *(f"20 % wrong, {who}" for who in STRANGERS),
)


def store_of(name: str, folder: str | Path, network: str, split: int, material: str = CLEAN) -> ClipStore:
    """Open the store of a material, `MATERIALS` has them, making it from the tables in `folder` if it is not there.

    name, network: as for `import_public`, or ``others``; split: its seed, which draws the material too.
    """
    asked, names = MATERIALS[material], ("frames.parquet", f"{network}.npy", "clips.csv", "scene.npy")
    sets = ("ytf", *OTHERS) if name == "others" else (name,)
    files = [path for path in (Path(folder) / of / file for of in sets for file in names) if path.exists()]
    said = json.dumps([[digest(path)["sha256"] for path in files], code_hash(MAKING)])
    place = cache_folder() / "faces" / hashlib.sha256(said.encode()).hexdigest()[:12] / f"{name}-{network}-{split}"
    path = place / material.replace(" %", "").replace(":", "").replace(",", "").replace(" ", "-")
    if not path.exists():
        clean = store_of(name, folder, network, split) if asked[:-1] != Material()[:-1] else None
        with claim(place.with_name(f"{place.name}-{path.name}.lock")):
            if not path.exists():
                clear_partial(path)
                if clean is not None:
                    change(clean, path, asked, split)
                elif name == "others":
                    others(folder, path, network, split)
                else:
                    import_public(name, folder, path, network=network, seed=split, suspects=asked.suspects)
    return ClipStore.open(path)


def others(folder: str | Path, path: Path, network: str, seed: int) -> None:
    """Write a store of train clips of the people of `OTHERS` who are not in YTF by name, each in one of the sets."""
    seen, tables, arrays, left_out = people_of("ytf", folder), [], [], 0
    for name in OTHERS:
        store = store_of(name, folder, network, seed)
        face, names = store.modalities["face"], store.identities
        shared = {mine for mine, _ in shared_names(names, seen)}
        clips = store.clips.assign(start=face.start, count=face.count)[store.clips["identity"] >= 0]
        clips = clips.assign(identity=names[clips["identity"]], clip=f"{name}_" + clips["clip"], split="train")
        tables.append(clips[~clips["identity"].isin(shared)])
        rows = [np.arange(clip.start, clip.start + clip.count) for clip in tables[-1].itertuples()]
        arrays.append((face, np.concatenate([*rows, np.empty(0, int)]).astype(int)))
        seen, left_out = [*seen, *names], left_out + len(shared)
    clips = pd.concat(tables)
    if not len(clips):
        raise ValueError(f"{Path(folder)}: everybody of {' and '.join(OTHERS)} is in ytf too, so nobody is left")
    whose, count = pd.Categorical(clips["identity"]), clips["count"].to_numpy()
    provenance = {"sets": OTHERS, "network": network, "seed": seed, "left_out": left_out}
    with ClipStore.create(path, simulated=False, provenance=provenance) as writer:
        for face, rows in arrays:  # type: ignore[assignment]
            writer.append("face", face.feature[rows], **{name: value[rows] for name, value in face.columns.items()})
        table = clips[["clip", "split"]].assign(identity=whose.codes)
        writer.finish(table, whose.categories.tolist(), {"face": (np.cumsum(count) - count, count)})


def frozen(e: Experiment, store: ClipStore, **options) -> ClipStore:
    """Open a store of the same clips of one frame each: what the aggregator of an experiment, trained, makes of them.

    e: on the store of other people; options: as for `fit`.  The provenance has how many people and clips the aggregator
    was trained on, and how many people were left out.
    """
    said = json.dumps([e.key(), store.fingerprint, library_hash(), code_hash(MAKING)])
    path = cache_folder() / "faces" / "frozen" / hashlib.sha256(said.encode()).hexdigest()[:20]
    if not path.exists():
        with claim(path.with_name(f"{path.name}.lock")):
            if not path.exists():
                clear_partial(path)
                member, every = fit(e, ClipStore.open(e.data), **options), np.arange(len(store))
                feature = pooled_features(member.model, store, every, seed=e.seed).cpu().numpy()
                provenance = {"others_people": len(member.store.identities), "others_clips": len(member.clips)}
                provenance["others_left_out"] = member.store.meta["provenance"]["left_out"]
                with ClipStore.create(path, simulated=False, provenance=provenance) as writer:
                    writer.append("face", feature.astype(np.float16))
                    writer.finish(store.clips, store.identities.tolist(), {"face": (every, np.ones_like(every))})
    return ClipStore.open(path)


def change(store: ClipStore, path: Path, asked: Material, seed: int) -> None:
    """Write a store of the same clips with other frames or scores; the seed draws them."""
    rng, face = np.random.default_rng([seed, 12]), store.modalities["face"]
    rows = [np.arange(start, start + count) for start, count in zip(face.start, face.count)]
    if asked.frames:
        rows = [np.sort(rng.permutation(each)[: asked.frames]) for each in rows]
    count, taken = np.array([len(each) for each in rows]), np.concatenate(rows)
    shown = replace_frames(store, asked, rng) if asked.share else taken
    quality = face.columns["quality"][shown]
    if asked.score:
        quality = rescale(score_of(store, shown, asked.score, rng), "rank")[0]
    columns = {"frame": face.columns["frame"][taken], "det": face.columns["det"][shown], "quality": quality}
    if asked.share:
        columns["wrong"] = shown != taken
    provenance = store.meta["provenance"] | {"material": asked._asdict()}
    spans = {"face": (np.cumsum(count) - count, count)}
    with ClipStore.create(path, simulated=False, provenance=provenance) as writer:
        writer.append("face", face.feature[shown], **columns)
        if "scene" in store.modalities:
            scene = store.modalities["scene"]
            writer.append("scene", np.asarray(scene.feature))
            spans["scene"] = scene.start, scene.count
        writer.finish(store.clips, store.identities.tolist(), spans)


def replace_frames(store: ClipStore, asked: Material, rng: np.random.Generator) -> np.ndarray:
    """Return which row each frame (F,) shows when a share of all frames is of other people.

    Every clip keeps a frame of its own, so that its label stays true; the others are drawn at random.  A stranger comes
    from a clip of another person in the same split, so that no val frame is trained on and no training frame ranked:
    from any such clip, or from one of the ``LIKE`` nearest in mean quality.  Who a distractor is a store does not say,
    so that now and then one is his own stranger, in a clip that is nobody's answer.
    """
    face, clips = store.modalities["face"], store.clips
    owner, shown = np.repeat(np.arange(len(clips)), face.count), np.arange(len(face.feature))
    free = np.setdiff1d(shown, face.start + rng.integers(face.count))
    wanted = round(asked.share * len(shown))
    if wanted > len(free):
        raise ValueError(f"share {asked.share}: at most {len(free)} of {len(shown)} frames can be wrong")
    mean, whose = store.clip_means("face", "quality"), clips["identity"].to_numpy()
    split = clips["split"].to_numpy()
    for row in np.sort(rng.permutation(free)[:wanted]):
        clip = owner[row]
        others = (split == split[clip]) & (np.arange(len(clips)) != clip)
        others = np.flatnonzero(others & ((whose != whose[clip]) | (whose < 0)))
        if asked.strangers != STRANGERS[0]:
            others = others[np.argsort(abs(mean[others] - mean[clip]), kind="stable")[:LIKE]]
        stranger = rng.choice(others)
        shown[row] = face.start[stranger] + rng.integers(face.count[stranger])
    return shown


def score_of(store: ClipStore, shown: np.ndarray, score: str, rng: np.random.Generator) -> np.ndarray:
    """Return another score of the frames that are shown, rows of a clean store, clip by clip (F,).

    oracle: the cosine with the mean direction of the person's other clips; in a clip of nobody all frames are equal.
    """
    face = store.modalities["face"]
    feature = np.asarray(face.feature, np.float32)
    if score == "norm":
        return np.linalg.norm(feature, axis=1)[shown]
    if score == "det":
        return face.columns["det"][shown]
    if score == "shuffled":
        return rng.permutation(face.columns["quality"][shown])
    unit = feature / np.maximum(np.linalg.norm(feature, axis=1, keepdims=True), 1e-9)
    means = np.add.reduceat(unit, face.start) / face.count[:, None]
    whose, out = store.clips["identity"].to_numpy(), np.zeros(len(shown))
    place = np.split(np.arange(len(shown)), np.cumsum(face.count)[:-1])
    for clip in np.flatnonzero(whose >= 0):
        others = means[(whose == whose[clip]) & (np.arange(len(whose)) != clip)].sum(0)
        out[place[clip]] = unit[shown[place[clip]]] @ (others / max(np.linalg.norm(others), 1e-9))
    known = np.repeat(whose >= 0, face.count)
    out[~known] = np.median(out[known])
    return out


def quality_between(store: ClipStore) -> float:
    """Return the share of the variance of quality scores that lies between clips, 0 to 1; the rest is within them."""
    face = store.modalities["face"]
    quality, count = face.columns["quality"].astype(float), face.count[face.count > 0]
    mean = store.clip_means("face", "quality")[face.count > 0]
    return float(count @ (mean - quality.mean()) ** 2 / np.square(quality - quality.mean()).sum())


def thinned(store: ClipStore, *, seed: int = 0) -> ClipStore:
    """Return a store with as few labelled train clips as YTF has: one of a person, two of a share ``TWO`` of them."""
    rng, table = np.random.default_rng([seed, 12]), store.clips
    most = 1 + (rng.random(len(store.identities)) < TWO)
    train = rng.permutation(np.intersect1d(store.select("train", labelled=True), store.select(having="face")))
    place = table.iloc[train].groupby("identity").cumcount().to_numpy()
    keep = np.full(len(table), True)
    keep[store.select("train")] = False
    keep[train[place < most[store.identity_of(train)]]] = True
    return _only(store, keep)


def alike(store: ClipStore, people: int, *, seed: int = 0) -> ClipStore:
    """Return `thinned` clips of so many people, drawn, with two val clips each at most, as YTF has; all distractors."""
    rng, thin = np.random.default_rng([seed, 13]), thinned(store, seed=seed)
    whose, val = thin.clips["identity"].to_numpy(), rng.permutation(thin.select("val", labelled=True, having="face"))
    some = np.sort(rng.permutation(np.unique(whose[thin.select("train")]))[:people])
    code = np.full(len(thin.identities) + 1, -1)  # the last is nobody's
    code[some] = np.arange(len(some))
    keep, two = np.isin(whose, [-1, *some]), val[pd.Series(val).groupby(whose[val]).cumcount() < 2]
    keep[np.setdiff1d(thin.select("val", labelled=True), two)] = False
    numbered = replace(thin, clips=thin.clips.assign(identity=code[whose]), identities=thin.identities[some])
    return _only(numbered, keep)


def _only(store: ClipStore, keep: np.ndarray) -> ClipStore:
    """Return a store of some clips, a mask (N,), with their faces alone."""
    face = store.modalities["face"]
    few = replace(face, start=face.start[keep], count=face.count[keep])
    return replace(store, clips=store.clips[keep].reset_index(drop=True), modalities={"face": few})


def lent(store: ClipStore, side: int, lend: bool) -> ClipStore:
    """Return a store whose val clips are of people of one side, 0 or 1, and of nobody.

    Val clips of the other side, every second identity, become train clips, or, where they are not lent, are left out.
    """
    table = store.clips
    theirs = (table["split"] == "val") & (table["identity"] >= 0) & (table["identity"] % 2 != side)
    if not lend:
        return _only(store, ~theirs.to_numpy())
    return replace(store, clips=table.assign(split=table["split"].where(~theirs, "train")))


def of_halves(e: Experiment, store: ClipStore, lend: bool, **options) -> Record:
    """Make a record of both halves of the people, each ranked while the other lends its clips, or does not.

    Its measures are the MAP and the mean number of independent deviations from a person's mean in the train clips.
    """
    halves = [lent(store, side, lend) for side in (0, 1)]
    parts = [run(e, half, **options) for half in halves]
    whose = np.unique(store.identity_of(store.select("val", labelled=True)))
    ap = np.empty(len(whose))
    for side, part in enumerate(parts):
        ap[whose % 2 == side] = part.ap
    train = [half.identity_of(half.select("train", labelled=True, having="face")) for half in halves]
    measures = {"map_at_100": float(ap.mean()), "deviations": float(np.mean([len(x) - len({*x}) for x in train]))}
    return replace(parts[0], ap=ap.tolist(), measures=measures)
