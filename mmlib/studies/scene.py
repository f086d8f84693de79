"""What chapter 06 reads out of scene networks: other features to compare with, retrieved and confused scenes, maps.

Apart from ``scene``, because an edit of a reading must not train a network again; it decides no kept number.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch.nn.functional import normalize, one_hot

from mmlib import compare, metrics, scene, scene_training
from mmlib.data.images import ImageBatch, image_batches, index_images
from mmlib.data.render import ABOUT, REGIONS, Studio, picture_size, render_scenes
from mmlib.data.store import ClipStore
from mmlib.experiment import Experiment, fingerprint
from mmlib.records import cache_folder, claim, clear_partial, fetch, open_store
from mmlib.retrieve import Retrieval
from mmlib.scene import SceneSettings

TUNED, UNTRAINED, THUMBNAIL, TRUTH = "fine-tuned network", "untrained network", "thumbnail", "show and set"
OWN = {True: "simulated vectors", False: "own vectors"}  # what a store came with, by whether it is simulated
SMALLEST = 16  # identities of a rendered world in the tiny profile
THUMBNAIL_SIDE = 8  # pixels
SETS = 4  # of a show


@dataclass(frozen=True)
class Scenes:
    """Clips of one seed: their store and, where they have pictures, those (``Images``) and the network, a ``SceneRun``.

    rendered: side of the pictures in pixels, 0 where they are not rendered.
    """

    seed: int
    store: ClipStore
    images: Any = None
    run: Any = None
    rendered: int = 0

    @property
    def shows(self) -> bool:
        """Whether the show and the set of every clip are known."""
        return {"show", "set"} <= set(self.store.clips)

    def pictures(self, clips: np.ndarray, size: int, resize: int) -> Iterator[ImageBatch]:
        """Draw a picture of each clip as in test; clips that have one."""
        groups = scene_training.blocks_of(clips, 256)
        return image_batches(self.images, groups, size=size, resize=resize, seed=self.seed, workers=0)

    def experiment(self, store: str | Path, classifier: str = "class means") -> Experiment:
        """Return the experiment on the scene features of a store alone."""
        return Experiment(data=str(store), modality="scene", aggregator="mean", classifier=classifier, seed=self.seed)


def open_scenes(
    data: str, profile: str, seeds: list[int], images: str, settings: SceneSettings, identities: int, device: str
) -> list[Scenes]:
    """Open or make the clips, pictures and networks of the chapter, one a seed; all of it is kept.

    identities: of a simulated world, at most SMALLEST in the tiny profile.  images: the folder of a given store's
    pictures; ``""`` renders those of a simulated one, and any other has none.
    """
    if images and data == "simulated":
        raise ValueError(f"images belong to the clips of a store: name it as data beside images = {images!r}")
    if profile == "tiny":
        identities, settings = min(identities, SMALLEST), replace(settings, epochs=min(settings.epochs, 2))
    found = []
    for seed in seeds:
        store = open_store(Experiment(data=data, profile=profile, seed=seed, settings=(("identities", identities),)))
        each = Scenes(seed, store)
        if images or (store.meta["simulated"] and each.shows):
            listed = index_images(images or _rendered(store, settings.resize), store)
            side = picture_size(listed, store)
            run = scene_training.fetch_or_train(store, listed, settings, seed=seed, device=device)
            each = replace(each, images=listed, run=run, rendered=side)
        found.append(each)
    return found


def _rendered(store: ClipStore, size: int) -> Path:
    """Return the folder of a store's rendered pictures, rendering them if they are not in the cache."""
    said = json.dumps([fingerprint(store.path), size, scene_training.code_hash()])
    folder = cache_folder() / "pictures" / hashlib.sha256(said.encode()).hexdigest()[:20]
    with claim(folder.with_suffix(".lock")):
        if not (folder / ABOUT).exists():
            clear_partial(folder)
            render_scenes(store, folder, size=size, overwrite=True)
    return folder


def settings_frame(scenes: Scenes) -> pd.DataFrame:
    """Set the network's settings and pictures beside those that are described: setting, as described, on this page."""
    said = asdict(SceneSettings()) | {"features": 2048, "identities": 10034, "train clips": 60566}
    here, store, images, run = {}, scenes.store, scenes.images, scenes.run
    if run is not None:
        here = asdict(run.settings) | {
            "weights": Path(run.settings.weights).name or "from scratch",
            "features": run.model.prototype.shape[1],
            "identities": len(store.identities),
            "train clips": len(np.intersect1d(store.select("train", labelled=True), images.present)),
            "pictures": "rendered" if scenes.rendered else "given",
            "clips with a picture": len(images.present),
            "clips without one, left out": len(store) - len(images.present),
            "pictures converted to RGB": sum(number for mode, number in run.modes.items() if mode != "RGB"),
        }
    rows = [(name, str(said.get(name, "")), str(value)) for name, value in here.items()]
    return pd.DataFrame(rows, columns=["setting", "as described", "on this page"])


def feature_stores(scenes: Scenes) -> dict[str, Path]:
    """Return a store for each kind of scene feature, by name; those that do not exist yet are written.

    The store's own; the network's; the pixels of a thumbnail; those of the network before it is trained (unless it
    starts from given weights); and show and set where they are known, which no picture can tell better.
    """
    found = {OWN[scenes.store.meta["simulated"]]: scenes.store.path} if "scene" in scenes.store.modalities else {}
    if scenes.run is None:
        return found
    found[TUNED] = scenes.run.folder / "trained"
    untrained, truth = [] if scenes.run.settings.weights else [UNTRAINED], [TRUTH] if scenes.shows else []
    for name in (THUMBNAIL, *untrained, *truth):
        out = found[name] = scenes.run.folder / name.replace(" ", "-")
        with claim(out.with_suffix(".lock")):
            if not (out / "store.json").exists():
                clear_partial(out)
                said, blocks = {"feature": name}, _features(scenes, name)
                scene_training.write_scene_store(scenes.store, out, blocks, provenance=said, keep=(), overwrite=True)
    return found


def _features(scenes: Scenes, name: str) -> Iterator[tuple[ImageBatch, np.ndarray]]:
    """Yield pictures and features of a kind that needs no training.

    Of show and set one coordinate a show and a smaller one a set of a show, as the simulator weighs them.
    """
    if name == UNTRAINED:
        model = scene.make_model(scenes.run.settings, len(scenes.store.identities), seed=scenes.seed)
        yield from scene_training.extract(model, scenes.images, scenes.run.settings, seed=scenes.seed)
        return
    for batch in scenes.pictures(scenes.images.present, THUMBNAIL_SIDE, THUMBNAIL_SIDE):
        feature = batch.pixels.flatten(1) / 255 - 0.5
        if name == TRUTH:
            show, stage = (torch.from_numpy(scenes.store.clips[of].to_numpy(np.int64)) for of in ("show", "set"))
            shows, place = int(show.max()) + 1, show * SETS + stage % SETS
            known = one_hot(show[batch.clips], shows), 0.7 * one_hot(place[batch.clips], shows * SETS)
            feature = torch.cat(known, 1)
        yield batch, feature.numpy().astype(np.float16)


def feature_table(scenes: Iterable[Scenes], device: str = "auto") -> pd.DataFrame:
    """Compare the kinds of features, with class means, with the network's (else the only kind there is).

    Columns: feature, as ``compare_arms``, top1, mlp (MAP@100 behind an MLP).  Stores are worlds, seeds not.
    """
    stores = [(name, each, path) for each in scenes for name, path in feature_stores(each).items()]
    names = [name for name, *_ in stores]
    if not names:
        return pd.DataFrame(columns=["feature", *compare.COMPARED, "top1", "mlp"])
    plain, mlp = (
        fetch([each.experiment(path, classifier) for _, each, path in stores], device=device)
        for classifier in ("class means", "mlp")
    )
    top1, behind = [record.measures["top1"] for record in plain], [record.measures["map_at_100"] for record in mlp]
    if len({each.store.path for _, each, _ in stores}) > 1:
        plain = [replace(record, experiment=record.experiment | {"data": "simulated"}) for record in plain]
    table = compare.compare_arms(plain, "feature", TUNED if TUNED in names else names[0], names=names)
    mean = pd.DataFrame({"feature": names, "top1": top1, "mlp": behind}).groupby("feature").mean()
    return table.join(mean, on="feature")


def _row(scenes: Scenes, label: str, clips: np.ndarray, marks: str | list[str]) -> pd.DataFrame:
    """Return pictures of clips as the network sees them, grey for a clip without one: a row of ``picture_rows``."""
    size, there = scenes.run.settings.size, np.isin(clips, scenes.images.present)
    seen = np.full((len(clips), size, size, 3), 128, np.uint8)
    for batch in scenes.pictures(clips[there], size, scenes.run.settings.resize):
        seen[there] = batch.pixels.permute(0, 2, 3, 1).numpy()
    names = scenes.store.clips["clip"].to_numpy()[clips]
    return pd.DataFrame({"row": label, "clip": names, "picture": list(seen), "mark": marks})


def _spread(n: int, of: int) -> np.ndarray:
    return np.unique(np.linspace(0, of - 1, min(n, of)).astype(int))


def sample_pictures(scenes: Scenes, rows: int = 4, columns: int = 8) -> pd.DataFrame:
    """Return pictures of the shows with the most clips, else of identities: a row each."""
    if scenes.images is None:
        return pd.DataFrame()
    by, order = ("show", ["show", "set"]) if scenes.shows else ("identity", ["identity"])
    table, parts = scenes.store.clips.loc[scenes.images.present], []
    for value in table.loc[table[by] >= 0, by].value_counts().index[:rows]:
        clips = table[table[by] == value].sort_values(order, kind="stable").index.to_numpy()
        label = f"{by} {value if scenes.shows else scenes.store.identities[value]}"
        parts.append(_row(scenes, label, clips[_spread(columns, len(clips))], ""))
    return pd.concat(parts, ignore_index=True)


def retrieved_pictures(
    scenes: Scenes, found: Retrieval | None, rows: int = 4, known: int = 2, top: int = 7
) -> pd.DataFrame:
    """Return ``known`` train pictures of identities and the ``top`` val pictures ranked highest, a row each.

    From the best AP to the worst: identities with a train picture and at least three relevant clips, or any.
    """
    parts = [pd.DataFrame()]
    if found is not None:
        clips = found.members[0].clips
        trained = scenes.store.identity_of(clips)
        seen_before = np.isin(found.queries, trained)
        often = seen_before & (found.relevant >= 3)
        able = np.flatnonzero(often if often.any() else seen_before)
        able = able[np.argsort(-found.ap[able], kind="stable")]
        for query in able[_spread(rows, len(able))]:
            seen = clips[trained == found.queries[query]][:known]
            there = found.ranking[query][:top] >= 0
            ranked, hits = (of[query][:top][there] for of in (found.ranking, found.hits))
            label = f"identity {scenes.store.identities[found.queries[query]]}\nAP {found.ap[query]:.2f}"
            marks = [""] * len(seen) + np.where(hits, "right", "wrong").tolist()
            parts.append(_row(scenes, label, np.concatenate([seen, found.gallery[ranked]]), marks))
    return pd.concat(parts, ignore_index=True)


def wrong_from_known_shows(scenes: Scenes, found: Retrieval | None, depth: int = 10) -> dict[str, float]:
    """Return of the wrong clips among the first ``depth`` of each query the share from a show of its train clips, and
    the share of all wrong clips of the gallery that are: found, chance, clips; NaN where shows are not known.
    """
    if found is None or not scenes.shows:
        return {"found": np.nan, "chance": np.nan, "clips": 0}
    show, clips, ranked = scenes.store.clips["show"].to_numpy(), found.members[0].clips, found.ranking[:, :depth]
    trained = pd.crosstab(scenes.store.identity_of(clips), show[clips])
    known = trained.reindex(found.queries, columns=range(show.max() + 1), fill_value=0).to_numpy() > 0
    known_of_gallery = known[:, show[found.gallery]]  # (queries, gallery), as is the next
    other = scenes.store.identity_of(found.gallery) != found.queries[:, None]
    chance = (known_of_gallery & other).sum(1) / other.sum(1)
    missed = (ranked >= 0) & ~found.hits[:, :depth] & known.any(1, keepdims=True)
    wrong = np.take_along_axis(known_of_gallery, ranked, 1)[missed]
    shares = [float(each.mean()) if len(each) else np.nan for each in (wrong, chance[missed.any(1)])]
    return {"found": shares[0], "chance": shares[1], "clips": len(wrong)}


def nearest_shows(scenes: Scenes) -> pd.DataFrame:
    """Return for every val clip what it and its nearest train clip, by the network's features, are of.

    Columns: show, set, channel, family (of colours), and each with "nearest " before; empty where not known.
    """
    names = ["show", "set", "channel", "family"]
    if not scenes.rendered:
        return pd.DataFrame(columns=[*names, *(f"nearest {name}" for name in names)])
    store, studio = scenes.run.store, Studio(scenes.store)
    train, val = (store.select(split, having="scene") for split in ("train", "val"))
    batches = (store.batch(clips, "scene", sample="first", frames=1) for clips in (train, val))
    known, asked = (normalize(batch.feature[:, 0]) for batch in batches)
    nearest = train[(asked @ known.T).argmax(1).numpy()]
    look = {name: studio.look[name][studio.place].astype(int) for name in ("channel", "family")}
    table = store.clips[["show", "set"]].assign(**look)
    there = table.iloc[nearest].add_prefix("nearest ").reset_index(drop=True)
    return table.iloc[val].reset_index(drop=True).join(there)


def show_confusion(nearest: pd.DataFrame, shows: int = 10) -> pd.DataFrame:
    """Return the share of val clips of each show (rows) whose nearest train clip is of each show (columns).

    The shows are those that take part in the most confusions; the last column is all others.
    """
    wrong = nearest[nearest["show"] != nearest["nearest show"]]
    weight = pd.concat([wrong["show"], wrong["nearest show"]]).value_counts().sort_index()
    chosen = sorted(weight.sort_values(ascending=False, kind="stable").index[:shows].astype(int))
    part = nearest[nearest["show"].isin(chosen)]
    column = part["nearest show"].where(part["nearest show"].isin(chosen), "other")
    table = pd.crosstab(part["show"], column, normalize="index")
    return table.reindex(index=chosen, columns=[*chosen, "other"], fill_value=0.0)


def confused_pairs(nearest: pd.DataFrame, rows: int = 6) -> pd.DataFrame:
    """List the shows most often taken for another: show, taken for, clips, same channel, same colours."""
    wrong = nearest[nearest["show"] != nearest["nearest show"]].rename(columns={"nearest show": "taken for"})
    for name, column in (("same channel", "channel"), ("same colours", "family")):
        wrong[name] = np.where(wrong[column] == wrong[f"nearest {column}"], "yes", "no")
    table = wrong.groupby(["show", "taken for"])[["same channel", "same colours"]].first()
    table.insert(0, "clips", wrong.groupby(["show", "taken for"]).size())
    return table.sort_values("clips", ascending=False, kind="stable").head(rows).reset_index()


def confusion_causes(nearest: pd.DataFrame) -> dict[str, float]:
    """Return shares of val clips: show (nearest train clip of the same show), set (of the same set, where the show is
    right), channel and family (shared, where the show is wrong), and what chance gives, a nearest clip of anybody's.
    """
    same = {name: nearest[name] == nearest[f"nearest {name}"] for name in ("show", "set", "channel", "family")}
    wrong, out = nearest[~same["show"]], {"show": same["show"].mean(), "set": same["set"][same["show"]].mean()}
    other = np.not_equal.outer(wrong["show"].to_numpy(), nearest["nearest show"].to_numpy())
    for name in ("channel", "family"):
        alike = np.equal.outer(wrong[name].to_numpy(), nearest[f"nearest {name}"].to_numpy())[other]
        out |= {name: same[name][~same["show"]].mean(), f"{name} chance": alike.mean() if len(alike) else np.nan}
    return {name: float(value) for name, value in out.items()}


class Maps(NamedTuple):
    """Pictures (n, S, S, 3), their maps (n, S, S) in cosine, and places in ``render.REGIONS``, None if unknown."""

    pictures: np.ndarray = np.empty(0)
    maps: np.ndarray = np.empty(0)
    regions: Any = None


def occlusion_maps(scenes: Scenes, clips: int = 24) -> Maps:
    """Cover every place of up to ``clips`` pictures of val clips that the network recognises, if there are any.

    The patch is a quarter of the picture's side, in steps of an eighth.
    """
    if scenes.run is None:
        return Maps()
    store, model, settings, kept = scenes.store, scenes.run.model, scenes.run.settings, []
    size, device = settings.size, model.prototype.device
    asked = np.intersect1d(store.select("val", labelled=True), scenes.images.present)
    for batch in scenes.pictures(asked, size, settings.resize):
        label = torch.from_numpy(store.identity_of(batch.clips))
        with torch.inference_mode():
            right = (model(batch.pixels.to(device)).argmax(1).cpu() == label).nonzero()[:, 0].tolist()
        kept += [(batch.clips[at], batch.number[at], batch.pixels[at], label[at]) for at in right]
        if len(kept) >= clips:
            break
    if not kept:
        return Maps()
    clip, number, *parts = zip(*kept[:clips])
    pixels, labels = (torch.stack(part).to(device) for part in parts)
    drop = scene.occlusion(model, pixels, labels, patch=max(1, size // 4), stride=max(1, size // 8))
    regions, whole = None, scenes.rendered
    if whole:
        side = whole * size / settings.resize  # of the crop that the network takes
        at = ((whole - side) / 2 + (np.arange(size) + 0.5) * side / size).astype(int)
        regions = Studio(store).regions(np.array(clip), np.array(number), whole)[:, at][:, :, at]
    return Maps(pixels.permute(0, 2, 3, 1).cpu().numpy(), drop.cpu().numpy(), regions)


def region_effect(maps: Maps) -> pd.DataFrame:
    """Return how much more a place of each region counts than an average place of its picture.

    Columns: region, share (of pixels), effect (mean over clips: of the map in the region less of the whole, in cosine),
    low, high (95 %, bootstrap over clips), clips (that show the region).
    """
    columns, rows = ["region", "share", "effect", "low", "high", "clips"], []
    for place, name in enumerate(REGIONS if maps.regions is not None else ()):
        inside = maps.regions == place
        share = inside.mean((1, 2))
        shown = (share > 0.01) & (share < 1)  # a few pixels say nothing
        if shown.any():
            mean = (maps.maps * inside).sum((1, 2))[shown] / inside.sum((1, 2))[shown]
            effect = mean - maps.maps[shown].mean((1, 2))
            rows.append((name, share.mean(), effect.mean(), *metrics.bootstrap_interval(effect), len(effect)))
    return pd.DataFrame(rows, columns=columns).sort_values("effect", ascending=False, ignore_index=True)
