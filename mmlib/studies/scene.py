"""What chapter 06 reads out of scene networks: other features to compare with, retrieved and confused scenes, maps.

Apart from ``scene``, because an edit of a reading must not train a network again; it decides no kept number.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from mmlib import compare, metrics, scene
from mmlib.data.images import Images, index_images
from mmlib.data.pictures import ImageBatch, image_batches
from mmlib.data.render import ABOUT, REGIONS, Studio, picture_size, render_scenes
from mmlib.data.store import ClipStore
from mmlib.experiment import Experiment, fingerprint
from mmlib.records import Record, cache_folder, claim, clear_partial, fetch, open_store
from mmlib.retrieve import Retrieval, retrieve
from mmlib.scene import SceneRun, SceneSettings

TUNED, UNTRAINED, THUMBNAIL, TRUTH = "fine-tuned network", "untrained network", "thumbnail", "show and set"
SMALLEST = 16  # identities of a rendered world in the tiny profile
THUMBNAIL_SIDE = 8  # pixels
SETS = 4  # of a show


@dataclass(frozen=True)
class Scenes:
    """Clips of one seed: their own store and, where they have pictures, those and the network that learned from them.

    rendered: side of the pictures in pixels, 0 where they are not rendered.
    """

    seed: int
    store: ClipStore
    images: Images | None = None
    run: SceneRun | None = None
    rendered: int = 0


def open_scenes(
    data: str,
    profile: str,
    seeds: Iterable[int],
    images: str,
    settings: SceneSettings,
    identities: int,
    device: str = "auto",
) -> list[Scenes]:
    """Open or make the clips, pictures and networks of the chapter, one a seed; all of it is kept.

    data, profile: as in ``Experiment``; a simulated world has ``identities`` of them, at most SMALLEST in the tiny
    profile.  images: the folder of a given store's pictures; ``""`` renders those of a simulated one, and a store that
    is not has none.
    """
    if images and data == "simulated":
        raise ValueError(f"images belong to the clips of a store: name it as data beside images = {images!r}")
    if profile == "tiny":
        identities = min(identities, SMALLEST)
        settings = replace(settings, epochs=min(settings.epochs, 2))
    found = []
    for seed in seeds:
        store = open_store(Experiment(data=data, profile=profile, seed=seed, settings=(("identities", identities),)))
        if images:
            listed = index_images(images, store)
        elif store.meta["simulated"] and {"show", "set"} <= set(store.clips):
            listed = index_images(_rendered(store, settings.resize), store)
        else:
            found.append(Scenes(seed, store))
            continue
        rendered = picture_size(listed, store)
        run = scene.fetch_or_train(store, listed, settings, seed=seed, device=device)
        found.append(Scenes(seed, store, listed, run, rendered))
    return found


def _rendered(store: ClipStore, size: int) -> Path:
    """Return the folder of a store's rendered pictures, rendering them if they are not in the cache."""
    said = json.dumps([fingerprint(store.path), size, scene.code_hash()])
    folder = cache_folder() / "pictures" / hashlib.sha256(said.encode()).hexdigest()[:20]
    with claim(folder.with_suffix(".lock")):
        if not (folder / ABOUT).exists():
            clear_partial(folder)
            render_scenes(store, folder, size=size, overwrite=True)
    return folder


# -- features to compare with ---------------------------------------------------------------------------------------


def feature_stores(scenes: Scenes) -> dict[str, Path]:
    """Return a store for each kind of scene feature, by name; those that do not exist yet are written.

    The store's own scene features; the network's; those of the same network before it is trained (unless it starts from
    given weights); the pixels of a picture of 8 by 8; and, in a simulated world, show and set as they are, which no
    picture can tell better.
    """
    found = {own_name(scenes.store): scenes.store.path} if "scene" in scenes.store.modalities else {}
    if scenes.run is None:
        return found
    settings, folder = scenes.run.settings, scenes.run.folder
    found[TUNED] = folder / "trained"
    makers = {THUMBNAIL: _thumbnails}
    if not settings.weights:
        makers[UNTRAINED] = _untrained
    if {"show", "set"} <= set(scenes.store.clips):
        makers[TRUTH] = _truth
    for name, make in makers.items():
        found[name] = folder / name.replace(" ", "-")
        with claim(found[name].with_suffix(".lock")):
            if not (found[name] / "store.json").exists():
                clear_partial(found[name])
                scene.write_scene_store(
                    scenes.store, found[name], make(scenes), provenance={"feature": name}, keep=(), overwrite=True
                )
    return found


def own_name(store: ClipStore) -> str:
    """Name the scene features that a store came with."""
    return "simulated vectors" if store.meta["simulated"] else "own vectors"


def _groups(scenes: Scenes) -> list[np.ndarray]:
    clips = scenes.images.present
    return np.array_split(clips, max(1, -(-len(clips) // 256)))


def _untrained(scenes: Scenes) -> Iterator[tuple[ImageBatch, np.ndarray]]:
    model = scene.make_model(scenes.run.settings, len(scenes.store.identities), seed=scenes.seed)
    return scene.extract(model, scenes.images, scenes.run.settings, seed=scenes.seed)


def _thumbnails(scenes: Scenes) -> Iterator[tuple[ImageBatch, np.ndarray]]:
    for batch in image_batches(
        scenes.images, _groups(scenes), size=THUMBNAIL_SIDE, resize=THUMBNAIL_SIDE, seed=scenes.seed
    ):
        yield batch, (batch.pixels.flatten(1).numpy() / 255 - 0.5).astype(np.float16)


def _truth(scenes: Scenes) -> Iterator[tuple[ImageBatch, np.ndarray]]:
    """One coordinate a show and a smaller one a set of a show, as the simulator weighs them."""
    show, stage = (scenes.store.clips[name].to_numpy(np.int64) for name in ("show", "set"))
    shows = int(show.max()) + 1
    for batch in image_batches(scenes.images, _groups(scenes), size=1, resize=1, seed=scenes.seed):
        feature = np.zeros((len(batch.clips), shows * (1 + SETS)), np.float16)
        rows = np.arange(len(feature))
        feature[rows, show[batch.clips]] = 1
        feature[rows, shows + show[batch.clips] * SETS + stage[batch.clips] % SETS] = 0.7
        yield batch, feature


def feature_records(
    scenes: Iterable[Scenes], classifiers: Iterable[str] = ("class means", "mlp"), *, device: str = "auto"
) -> list[Record]:
    """Return the records of every kind of feature, the kind as a field ``feature`` of the experiment.

    The store of a seed is a world of its own where it is simulated, and its records say so to ``compare.compare``.
    """
    asked, names = [], []
    for each in scenes:
        for name, path in feature_stores(each).items():
            for classifier in classifiers:
                asked.append(
                    Experiment(
                        data=str(path), modality="scene", aggregator="mean", classifier=classifier, seed=each.seed
                    )
                )
                names.append((name, "simulated" if each.store.meta["simulated"] else str(each.store.path)))
    records = fetch(asked, device=device)
    return [
        replace(record, experiment=record.experiment | {"feature": name, "data": data})
        for record, (name, data) in zip(records, names)
    ]


def feature_table(records: list[Record]) -> pd.DataFrame:
    """Compare the kinds of features, with class means, with the network's (else the only kind there is).

    Columns of ``compare.compare``, and top1, mlp (MAP@100 behind a trained MLP) and seeds.
    """
    columns = ["feature", "map_at_100", "difference", "low", "high", "sd", "n", "interval", "top1", "mlp"]
    if not records:
        return pd.DataFrame(columns=columns)
    plain = [record for record in records if record.experiment["classifier"] == "class means"]
    kinds = {record.experiment["feature"] for record in plain}
    table = compare.compare_arms(plain, by="feature", baseline=TUNED if TUNED in kinds else next(iter(kinds)))
    mean = compare.as_frame(records).groupby(["classifier", "feature"])[["map_at_100", "top1"]].mean()
    table["top1"] = table["feature"].map(mean.loc["class means", "top1"])
    table["mlp"] = table["feature"].map(mean.loc["mlp", "map_at_100"])
    return table


# -- pictures -------------------------------------------------------------------------------------------------------

ROWS = ["row", "picture", "mark"]  # of a frame for ``figures.picture_rows``; mark: right, wrong or empty


def _pictures(scenes: Scenes, clips: np.ndarray) -> np.ndarray:
    """Return the drawn picture of each clip as the network sees it, (n, S, S, 3) uint8; grey for a clip without one."""
    settings = scenes.run.settings
    out = np.full((len(clips), settings.size, settings.size, 3), 128, np.uint8)
    there = np.isin(clips, scenes.images.present)
    groups = [clips[there]] if there.any() else []
    for batch in image_batches(
        scenes.images, groups, size=settings.size, resize=settings.resize, seed=scenes.seed, workers=0
    ):
        out[there] = batch.pixels.permute(0, 2, 3, 1).numpy()
    return out


def sample_pictures(scenes: Scenes, rows: int = 4, columns: int = 8) -> pd.DataFrame:
    """Return pictures of the shows with the most clips, else of identities: a row each, columns ROWS."""
    if scenes.run is None:
        return pd.DataFrame(columns=ROWS)
    by = "show" if "show" in scenes.store.clips else "identity"
    table = scenes.store.clips.loc[scenes.images.present]
    table = table[table[by] >= 0]
    parts = []
    for value in table[by].value_counts(sort=True).index[:rows]:
        part = table[table[by] == value]
        clips = (part.sort_values("set", kind="stable") if "set" in part else part).index.to_numpy()
        clips = clips[np.unique(np.linspace(0, len(clips) - 1, columns).astype(int))]
        parts.append(
            pd.DataFrame(
                {
                    "row": f"{by} {value if by == 'show' else scenes.store.identities[value]}",
                    "picture": list(_pictures(scenes, clips)),
                    "mark": "",
                }
            )
        )
    return pd.concat(parts, ignore_index=True)


def retrieve_scenes(scenes: Scenes, device: str = "auto") -> Retrieval:
    """Rank the val clips for every identity by the network's features and class means."""
    experiment = Experiment(
        data=str(scenes.run.store.path), modality="scene", aggregator="mean", classifier="class means", seed=scenes.seed
    )
    return retrieve(experiment, scenes.run.store, device=device)


def retrieved_pictures(
    scenes: Scenes, rows: int = 4, known: int = 2, top: int = 7, device: str = "auto"
) -> pd.DataFrame:
    """Return, for identities from the best AP to the worst, ``known`` train pictures and the ``top`` val pictures ranked
    highest: columns ROWS.

    The identities are those at even steps of AP among those with a train picture and at least three relevant clips (any,
    where none has three).
    """
    if scenes.run is None:
        return pd.DataFrame(columns=ROWS)
    found = retrieve_scenes(scenes, device)
    trained = scenes.store.identity_of(found.members[0].clips)
    able = np.isin(found.queries, trained)
    able = np.flatnonzero(able & (found.relevant >= 3) if (able & (found.relevant >= 3)).any() else able)
    able = able[np.argsort(-found.ap[able], kind="stable")]
    parts = []
    for query in able[np.unique(np.linspace(0, len(able) - 1, min(rows, len(able))).astype(int))]:
        seen = found.members[0].clips[trained == found.queries[query]][:known]
        ranked = found.ranking[query][:top]
        hits = found.hits[query][:top][ranked >= 0]
        clips = np.concatenate([seen, found.gallery[ranked[ranked >= 0]]])
        label = f"identity {scenes.store.identities[found.queries[query]]}\nAP {found.ap[query]:.2f}"
        marks = [""] * len(seen) + ["right" if hit else "wrong" for hit in hits]
        parts.append(pd.DataFrame({"row": label, "picture": list(_pictures(scenes, clips)), "mark": marks}))
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=ROWS)


def wrong_from_known_shows(scenes: Scenes, depth: int = 10, device: str = "auto") -> dict[str, float]:
    """Return of the wrong clips among the first ``depth`` of each query the share from a show of its train clips, and
    the share of all wrong clips of the gallery that are: found, chance, clips; NaN where shows are not known.
    """
    if scenes.run is None or "show" not in scenes.store.clips:
        return {"found": np.nan, "chance": np.nan, "clips": 0}
    found = retrieve_scenes(scenes, device)
    show = scenes.store.clips["show"].to_numpy()
    trained, identity = scenes.store.identity_of(found.members[0].clips), scenes.store.identity_of(found.gallery)
    wrong, chance = [], []
    for place, query in enumerate(found.queries):
        known = np.unique(show[found.members[0].clips[trained == query]])
        ranked = found.ranking[place][:depth]
        missed = found.gallery[ranked[(ranked >= 0) & ~found.hits[place][:depth]]]
        if len(known) and len(missed):
            wrong.append(np.isin(show[missed], known))
            chance.append(np.isin(show[found.gallery[identity != query]], known).mean())
    if not wrong:
        return {"found": np.nan, "chance": np.nan, "clips": 0}
    return {
        "found": float(np.concatenate(wrong).mean()),
        "chance": float(np.mean(chance)),
        "clips": int(sum(map(len, wrong))),
    }


# -- confusion ------------------------------------------------------------------------------------------------------


def nearest_shows(scenes: Scenes) -> pd.DataFrame:
    """Return for every val clip the show and set of its nearest train clip by the network's features.

    Columns: show, set, nearest show, nearest set, channel, nearest channel, family, nearest family (of colours); empty
    where shows or pictures are not known.
    """
    names = ["show", "set", "channel", "family"]
    if scenes.run is None or "show" not in scenes.store.clips or not scenes.rendered:
        return pd.DataFrame(columns=[*names, *(f"nearest {name}" for name in names)])
    store = scenes.run.store
    train, val = (store.select(split, having="scene") for split in ("train", "val"))
    known, asked = (
        torch.nn.functional.normalize(store.batch(clips, "scene", sample="first", frames=1).feature[:, 0])
        for clips in (train, val)
    )
    nearest = train[(asked @ known.T).argmax(1).numpy()]
    studio = Studio(scenes.store)
    value = {name: store.clips[name].to_numpy() for name in ("show", "set")}
    value |= {name: studio.look[name][studio.place].astype(int) for name in ("channel", "family")}
    return pd.DataFrame(
        {name: value[name][val] for name in names} | {f"nearest {name}": value[name][nearest] for name in names}
    )


def show_confusion(nearest: pd.DataFrame, shows: int = 10) -> pd.DataFrame:
    """Return the share of val clips of each show (rows) whose nearest train clip is of each show (columns).

    The shows are those that take part in the most confusions; the last column is all others.
    """
    wrong = nearest[nearest["show"] != nearest["nearest show"]]
    weight = wrong["show"].value_counts().add(wrong["nearest show"].value_counts(), fill_value=0)
    chosen = sorted(weight.sort_values(ascending=False, kind="stable").index[:shows].astype(int))
    part = nearest[nearest["show"].isin(chosen)]
    column = part["nearest show"].where(part["nearest show"].isin(chosen), -1)
    table = pd.crosstab(part["show"], column, normalize="index").reindex(index=chosen, columns=[*chosen, -1])
    return table.fillna(0).rename(columns={-1: "other"})


def confused_pairs(nearest: pd.DataFrame, rows: int = 6) -> pd.DataFrame:
    """List the shows most often taken for another: show, taken for, clips, same channel, same colours."""
    wrong = nearest[nearest["show"] != nearest["nearest show"]]
    groups = wrong.groupby(["show", "nearest show"])
    table = groups.size().rename("clips").reset_index().rename(columns={"nearest show": "taken for"})
    first = groups.first()
    table["same channel"] = (first["channel"] == first["nearest channel"]).map({True: "yes", False: "no"}).to_numpy()
    table["same colours"] = (first["family"] == first["nearest family"]).map({True: "yes", False: "no"}).to_numpy()
    return table.sort_values("clips", ascending=False, kind="stable").head(rows).reset_index(drop=True)


def confusion_causes(nearest: pd.DataFrame) -> dict[str, float]:
    """Return shares of val clips: show (nearest train clip of the same show), set (of the same set, where the show is
    right), channel and family (shared, where the show is wrong), and for the last two what chance would give.

    Chance: a clip of another show, drawn as often as it is a nearest one of anybody's.
    """
    if nearest.empty:
        return dict.fromkeys(("show", "set", "channel", "channel chance", "family", "family chance"), np.nan)
    right = nearest["show"] == nearest["nearest show"]
    out = {"show": right.mean(), "set": (nearest["set"] == nearest["nearest set"])[right].mean()}
    wrong = nearest[~right]
    for name in ("channel", "family"):
        same, other = (
            np.equal.outer(wrong[a].to_numpy(), nearest[b].to_numpy())
            for a, b in ((name, f"nearest {name}"), ("show", "nearest show"))
        )
        out[name] = (wrong[name] == wrong[f"nearest {name}"]).mean()
        out[f"{name} chance"] = same[~other].mean() if (~other).any() else np.nan
    return {name: float(value) for name, value in out.items()}


# -- where the network looks ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Maps:
    """Occlusion maps of val clips that the network recognises: pictures (n, S, S, 3), maps (n, S, S) in cosine, and
    regions (n, S, S), positions in ``render.REGIONS``, or None for pictures that were not rendered.
    """

    pictures: np.ndarray
    maps: np.ndarray
    regions: np.ndarray | None


def occlusion_maps(scenes: Scenes, clips: int = 24) -> Maps:
    """Cover every place of up to ``clips`` pictures in turn; of none, without pictures or a recognised clip.

    The patch is a quarter of the picture's side, in steps of an eighth.
    """
    none = Maps(np.empty((0, 1, 1, 3), np.uint8), np.empty((0, 1, 1), np.float32), None)
    if scenes.run is None:
        return none
    settings, model = scenes.run.settings, scenes.run.model
    asked = np.intersect1d(scenes.store.select("val", labelled=True), scenes.images.present)
    device = model.prototype.device
    kept, numbers, pixels = [], [], []
    for batch in image_batches(
        scenes.images,
        np.array_split(asked, max(1, len(asked) // 64)) if len(asked) else [],
        size=settings.size,
        resize=settings.resize,
        seed=scenes.seed,
        workers=0,
    ):
        with torch.inference_mode():
            predicted = model(batch.pixels.to(device)).argmax(1).cpu().numpy()
        right = predicted == scenes.store.identity_of(batch.clips)
        kept.append(batch.clips[right])
        numbers.append(batch.number[right])
        pixels.append(batch.pixels[torch.from_numpy(right)])
        if sum(map(len, kept)) >= clips:
            break
    if not sum(map(len, kept)):
        return none
    kept, numbers = np.concatenate(kept)[:clips], np.concatenate(numbers)[:clips]
    pixels = torch.cat(pixels)[:clips].to(device)
    label = torch.from_numpy(scenes.store.identity_of(kept)).to(device)
    drop = scene.occlusion(model, pixels, label, patch=max(1, settings.size // 4), stride=max(1, settings.size // 8))
    regions = _regions(scenes, kept, numbers) if scenes.rendered else None
    return Maps(pixels.permute(0, 2, 3, 1).cpu().numpy(), drop.cpu().numpy(), regions)


def _regions(scenes: Scenes, clips: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """Return what each pixel of the network's crop of rendered pictures belongs to, (n, S, S)."""
    size = scenes.rendered
    drawn = Studio(scenes.store).regions(clips, numbers, size)
    # The nearest pixel of the crop that ``crops.cut_crops`` takes.
    side = size * scenes.run.settings.size / scenes.run.settings.resize
    at = ((size - side) / 2 + (np.arange(scenes.run.settings.size) + 0.5) * side / scenes.run.settings.size).astype(int)
    return drawn[:, at][:, :, at]


def region_effect(maps: Maps) -> pd.DataFrame:
    """Return how much more a place of each region counts than an average place of its picture.

    Columns: region, share (of pixels), effect (mean over clips of: mean of the map in the region less that of the whole
    picture, in cosine), low, high (95 %, bootstrap over clips), clips (that show the region).
    """
    columns = ["region", "share", "effect", "low", "high", "clips"]
    if maps.regions is None:
        return pd.DataFrame(columns=columns)
    rows = []
    for place, name in enumerate(REGIONS):
        inside = maps.regions == place
        share = inside.mean((1, 2))
        shown = (share > 0.01) & (share < 1)  # a few pixels say nothing
        if shown.any():
            mean = (maps.maps * inside).sum((1, 2))[shown] / inside.sum((1, 2))[shown]
            effect = mean - maps.maps[shown].mean((1, 2))
            rows.append((name, share.mean(), effect.mean(), *metrics.bootstrap_interval(effect), len(effect)))
    return pd.DataFrame(rows, columns=columns).sort_values("effect", ascending=False, ignore_index=True)


# -- sentences ------------------------------------------------------------------------------------------------------


def start_sentence(scenes: list[Scenes]) -> str:
    """Say what the network starts from, and what became of the pictures."""
    run = scenes[0].run
    if run is None:
        own = "scene" in scenes[0].store.modalities
        return "These clips have no pictures, so no network is trained: the page shows " + (
            "the scene features that the clips came with." if own else "nothing, as they have no scene features either."
        )
    weights = run.settings.weights
    start = (
        "from scratch"
        if not weights
        else "from the weights that timm publishes"
        if weights == "pretrained"
        else f"from the weights in {Path(weights).name}"
    )
    converted = sum(number for mode, number in run.modes.items() if mode != "RGB")
    missing = len(scenes[0].store) - len(scenes[0].images.present)
    kind = "rendered" if scenes[0].rendered else "the reader's own"
    return (
        f"The network starts {start}; the pictures are {kind} (clips with one: {sum(run.modes.values())}; without any, "
        f"left out: {missing}; converted to RGB: {converted})."
    )


def answer(table: pd.DataFrame, simulated: bool) -> str:
    """Answer the chapter's question in a sentence, which says whether the clips are simulated."""
    clips = "simulated clips" if simulated else "these clips"
    reached = table.set_index("feature")["map_at_100"]
    if reached.empty:
        return "These clips have neither pictures nor scene features, so this page has no answer for them."
    if TUNED not in reached:
        return f"The scene features that {clips} came with reach a MAP@100 of {reached.iloc[0]:.3f} with class means."
    text = (
        f"Alone, with class means, the features that a network learned from pictures of {clips} reach a MAP@100 "
        f"of {reached[TUNED]:.3f}, the pixels of a thumbnail {reached[THUMBNAIL]:.3f}"
    )
    return text + (f", and knowing show and set without error {reached[TRUTH]:.3f}." if TRUTH in reached else ".")


def feature_sentences(table: pd.DataFrame) -> str:
    """Say how the network's features stand to each other kind, by the interval of the difference."""
    if TUNED not in set(table["feature"]):
        return ""
    out = []
    for row in table[table["feature"] != TUNED].to_dict("records"):
        low, high = 0 - row["high"], 0 - row["low"]  # of the network less the other
        verdict = "ahead of" if low > 0 else "behind" if high < 0 else "not told apart from"
        out.append(
            f"{verdict} {_PHRASES[row['feature']]} ({0 - row['difference']:+.1f} points, {low:+.1f} to {high:+.1f})"
        )
    text = f"The network's features are {'; '.join(out)}; the intervals cover 95 %, over {table['interval'].iloc[0]}."
    if TRUTH in set(table["feature"]):
        text += (
            " The distance to show and set is what pictures, training and the size of the network cost here; with "
            "pretrained weights and real pictures it may be another one, and nothing on this page tells which."
        )
    return text


_PHRASES = {
    THUMBNAIL: "the pixels of a thumbnail",
    UNTRAINED: "those of the same network before training",
    TRUTH: "show and set read without error",
    "simulated vectors": "the vectors that the simulator draws",
    "own vectors": "the scene features that the clips came with",
}


def training_sentence(scenes: list[Scenes]) -> str:
    """Say how far train and val have come apart."""
    if scenes[0].run is None:
        return ""
    last = pd.DataFrame([each.run.history[-1] for each in scenes if each.run]).mean()
    text = f"In the last epoch it recognises {last['train']:.0%} of the train pictures"
    text += f" and {last['val']:.0%} of the val clips that it never saw." if np.isfinite(last["val"]) else "."
    if last["train"] > last["val"]:
        text += (
            " What lies between the two is learned by heart: persons in front, framing and noise say nothing about a "
            "clip that comes later."
        )
    return text


def wrong_sentence(found: dict[str, float], depth: int = 10) -> str:
    """Say whether wrong clips come from shows in which the identity was seen."""
    if not found["clips"]:
        return ""
    return (
        f"Of the {found['clips']} wrong clips among the first {depth} of every identity, {found['found']:.0%} are from a "
        f"show in which the identity was seen in training; among all wrong clips of the gallery that are "
        f"{found['chance']:.0%}."
    )


def confusion_sentence(causes: dict[str, float]) -> str:
    """Say what is recognised and what the confused shows have in common."""
    if not np.isfinite(causes["show"]):
        return ""
    text = f"For {causes['show']:.0%} of the val clips the nearest train clip is of the same show"
    text += f", and for {causes['set']:.0%} of those of the same set." if np.isfinite(causes["set"]) else "."
    if np.isfinite(causes["family chance"]):
        text += (
            f" Where it is of another show, the two share their colours in {causes['family']:.0%} of the cases (by chance "
            f"{causes['family chance']:.0%}), and their caption bar in {causes['channel']:.0%} (by chance "
            f"{causes['channel chance']:.0%})."
        )
    return text


def region_sentence(effect: pd.DataFrame) -> str:
    """Say which regions count more than an average place of their picture, by their intervals."""
    if effect.empty:
        return ""
    more = effect.loc[effect["low"] > 0, "region"].tolist()
    less = effect.loc[effect["high"] < 0, "region"].tolist()
    text = f"Over {effect['clips'].max()} clips that the network recognises, places of the "
    parts = [
        f"{compare.listed(names)} count {word} than an average place"
        for names, word in ((more, "more"), (less, "less"))
        if names
    ]
    return text + (", and those of the ".join(parts) if parts else "regions cannot be told apart") + "."


def settings_frame(scenes: list[Scenes]) -> pd.DataFrame:
    """Set the network's settings beside those that are described: setting, as described, on this page."""
    run = scenes[0].run
    if run is None:
        return pd.DataFrame(columns=["setting", "as described", "on this page"])
    said, here = asdict(SceneSettings()), asdict(run.settings)
    for part in (said, here):
        path = part["weights"] not in ("", "pretrained")
        part["weights"] = Path(part["weights"]).name if path else part["weights"] or "from scratch"
    rows = [(name, f"{said[name]}", f"{here[name]}") for name in said]
    trained = len(np.intersect1d(scenes[0].store.select("train", labelled=True), scenes[0].images.present))
    rows += [
        ("features", "2048", f"{run.model.prototype.shape[1]}"),
        ("train clips", "60566", f"{trained}"),
        ("identities", "10034", f"{len(scenes[0].store.identities)}"),
    ]
    return pd.DataFrame(rows, columns=["setting", "as described", "on this page"])
