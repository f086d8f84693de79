"""Photographs and videos of one's own to a ClipStore: decode, detect, align, embed."""

from __future__ import annotations

import json
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, NamedTuple

import numpy as np
import pandas as pd
import torch
from PIL import Image, ImageOps

from mmlib.data.detector import Detector, align, detect, load_detector, need
from mmlib.data.embedder import Embedder, Quality
from mmlib.data.features import BLOCK, digest
from mmlib.data.foreign import ImportReport, count_lost, read_rows, to_half, watch
from mmlib.data.images import SUFFIXES, by_number, is_hidden, read_image
from mmlib.data.quality import BY_RANK, rescale, said
from mmlib.data.store import ClipStore
from mmlib.data.submission import check_names, short
from mmlib.data.writer import nonfinite_rows, partial_folder
from mmlib.threads import one_thread

PICTURES = (*SUFFIXES, ".bmp", ".webp")
VIDEOS = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpg", ".webm")
CHUNK, BATCH = 16, 32  # pictures that one thread decodes and searches at once, faces that it embeds
WAITING = 16  # batches of faces whose features are in memory
ALIKE = 0.99  # of the best score, of faces of which the largest is taken: a poster, or no face at all, has less
LARGE = 64  # pixels of a face at half the size of a search, of which the points are nearly as good as of a larger one
PIXELS = 2**25  # of pictures that are in memory together, in one thread, unless one alone has more
LEFT_OUT, NAMED = "left-out.csv", 10  # in the store: what is not in it, and why; how many of them a report names
NO_FACE, NO_PICTURE, EMPTY = "no face", "neither a picture nor a video by its name", "an empty folder"
SCENES = "faces.json"  # beside the clips' folders of scene pictures: what wrote them
RULE = "half of a person's clips, rounded up, to train, the others to val, by seed {}; one clip alone is a distractor"


@dataclass(frozen=True)
class FaceSettings:
    """With what faces are found and embedded.

    weights, architecture, width, size, mean, std: see `Embedder`; size is the side of a crop in pixels.  detector:
    weights of `RetinaFace`, or `UltraFace`; None takes every picture for a face that is aligned already, and square.
    quality: the graph of `Quality`, or None.  detect_size: pixels of the longer side of a picture in which faces are
    looked for.  rate: frames a second of a video.  seed: of the split.
    """

    weights: Path
    detector: Path | None = None
    quality: Path | None = None
    architecture: str = "edgenext_x_small"
    width: int = 512
    size: int = 112
    mean: float = 0.5
    std: float = 0.5
    detect_size: int = 640
    rate: float = 8.0
    seed: int = 0

    def __post_init__(self):
        for name in ("width", "size", "std", "detect_size", "rate"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)!r}")


class Source(NamedTuple):
    """A picture of a clip: of a file, or a frame of a video, decoded, or why it cannot be."""

    clip: int
    number: int
    path: Path
    frame: np.ndarray | ValueError | None = None


class Found(NamedTuple):
    """The faces of a picture: rows (n, 15) as `detect` has them, in its pixels, and crops (n, S, S, 3) uint8."""

    rows: np.ndarray
    crops: np.ndarray


def import_faces(
    folder: str | Path,
    store: str | Path,
    settings: FaceSettings,
    *,
    table: str | Path | None = None,
    scenes: str | Path | None = None,
    skip_bad_files: bool = False,
    overwrite: bool = False,
    progress: bool = False,
    say: Callable[[str], object] | None = None,
) -> ImportReport:
    """Turn photographs, crops or videos into a store of faces.

    `folder` has a folder a person, as `list_faces` reads it; a `table` of files in it, with the columns path, clip,
    identity (or empty) and split, says otherwise.  Of several faces the largest of those as sure as the best (`ALIKE`)
    is taken, in a video the one nearest to that of the frame before.  Frames without a face are left out; a clip
    without any stands in the store without frames.  scenes: a folder for whole pictures as `<clip>/<n>.jpg`, of a video
    one a second.  A file that cannot be read, or without a detector is not square, is refused, or left out.  `LEFT_OUT`
    in the store names all that was left out.  progress, say: as for `foreign.watch`.
    """
    began, folder = time.perf_counter(), Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder")
    files, other, hidden, renamed = (
        (read_rows(Path(table), files=True), [], [], []) if table else list_faces(folder, settings.seed)
    )
    clips = files.drop_duplicates("clip")[["clip", "split", "identity"]].reset_index(drop=True)
    files["place"] = pd.factorize(files["clip"])[0]
    _check_files(files, scenes)
    how = asdict(settings)
    embed = Embedder(*(how[name] for name in ("weights", "architecture", "width", "size", "mean", "std")))
    score = Quality(settings.quality) if settings.quality else None
    detector = load_detector(settings.detector) if settings.detector else None

    def work(crops: np.ndarray) -> tuple:
        return *to_half(embed(crops)), score(crops) if score else None

    provenance = {name: digest(of) if isinstance(of, Path) else of for name, of in how.items()}
    provenance["split"] = digest(Path(table)) if table else RULE.format(settings.seed)
    with ExitStack() as stack:
        create = ClipStore.create(store, simulated=False, provenance=provenance, overwrite=overwrite)
        writer = stack.enter_context(create)
        kept = stack.enter_context(partial_folder(Path(scenes), SCENES, overwrite)) if scenes else None
        workers = torch.get_num_threads()
        pool = stack.enter_context(ThreadPoolExecutor(workers))
        stack.callback(pool.shutdown, cancel_futures=True)
        stack.enter_context(one_thread(torch.device("cpu")))  # each of the pool
        find = Finder(detector, settings, kept, [*clips["clip"]])
        spilled = stack.enter_context(TemporaryFile(dir=writer.partial))
        taken = Taken(lambda crops: pool.submit(work, crops), spilled)
        listed = [*zip(files["place"], files["path"], files["frame"])]
        watched = watch(listed, "faces, files", [1] * len(listed), progress=progress, say=say)
        for source, found in _ahead(pool, workers + 1, find, _chunks(watched, folder, settings.rate)):
            if isinstance(found, ValueError) and not skip_bad_files:
                raise found
            taken.add(source, found)
        if not taken.rows:
            raise ValueError(f"{folder}: no face in any of {sum(taken.seen.values())} pictures")
        feature, loss, quality = taken.embedded()
        owner, frame, rows = (np.array(column) for column in zip(*taken.rows))
        lost = count_lost(loss, settings.weights)
        columns = {"frame": frame}
        if detector:
            columns |= {"box": rows[:, :4], "det": rows[:, 4]}
        if quality is not None:
            # The scores of a network have a unit of their own.
            columns["quality"], done = rescale(quality, BY_RANK, str(settings.quality))
            provenance["quality"] |= done
        step = max(1, BLOCK // feature.shape[1])
        for first in range(0, len(feature), step):
            block = np.array(feature[first : first + step])
            for row in first + nonfinite_rows(block):
                where = f"clip {clips['clip'][owner[row]]}, frame {frame[row]}"
                raise ValueError(f"{settings.weights}: {where}: a number of its feature is none that float16 can hold")
            writer.append("face", block, **{name: of[first : first + step] for name, of in columns.items()})
        count = np.bincount(owner, minlength=len(clips))
        clips = clips.assign(start=np.cumsum(count) - count, count=count).iloc[sorted(taken.seen)]
        named = pd.Categorical(clips["identity"])
        clips["identity"] = named.codes.astype(np.int32)
        writer.finish(clips, [*named.categories], {"face": (clips.pop("start"), clips.pop("count"))})
        taken.left += [(path, "", why) for path, why in other]
        if taken.left:
            pd.DataFrame(taken.left, columns=["path", "frame", "why"]).to_csv(writer.partial / LEFT_OUT, index=False)
        if kept:
            pictures = sum(1 for _ in kept.glob("*/*.jpg"))
            (kept / SCENES).write_text(json.dumps({"pictures": pictures}) + "\n")
    report = ImportReport(ClipStore.open(store), time.perf_counter() - began, [], *lost)
    report.absent = [f"column {name}" for name in ("det", "quality") if name not in columns]
    empty = Counter(path for path, _, why in taken.left if why == NO_FACE)
    if bad := [why for *_, why in taken.left if why not in (NO_FACE, NO_PICTURE, EMPTY)]:
        report.refused["files that cannot be taken"] = len(bad), bad[0]
    for reason in (NO_PICTURE, EMPTY):
        if paths := [str(path) for path, why in other if why == reason]:
            report.refused[reason] = len(paths), paths[0]
    if renamed:
        report.mended["names with blanks, which became underscores"] = len(renamed), renamed[0]
    report.notes = [
        f"split: {'as the table says' if table else RULE.format(settings.seed)}",
        f"pictures: {sum(taken.seen.values())}"
        + f", {empty.total()} without a face, {taken.several} with several" * (detector is not None),
    ]
    if detector:
        largest = "of several faces the largest that is as sure as the best was taken"
        report.notes.append(f"{largest}, in a video the nearest to the last")
    report.notes += [f"{NO_FACE}: {path}{f', {n} frames' * (n > 1)}" for path, n in [*empty.items()][:NAMED]]
    if taken.left:
        report.notes.append(
            f"left out: {len(taken.left)} pictures, files or folders, each named in {Path(store) / LEFT_OUT}"
        )
    if hidden:
        report.notes.append(f"passed over: {len(hidden)} hidden files or those of a system; first: {hidden[0]}")
    if quality is not None:
        report.notes.append(said(done))
    if kept:
        report.notes.append(f"scene pictures: {pictures} in {scenes}, of which mmlib scene makes features")
    return report


def list_faces(folder: Path, seed: int) -> tuple[pd.DataFrame, list[tuple[Path, str]], list[Path], list[str]]:
    """List `folder/<person>/<clip>/<n>.jpg`, `folder/<person>/<photograph>` and `folder/<person>/<video>`.

    Returns a table of files with path, clip, identity, split and frame; what is none of them, and why; what is hidden,
    see `is_hidden`; and names with blanks, which become underscores, as `Ann Ash is Ann_Ash`.  A clip is called
    `<person>-<clip>`.  The split is by `RULE`.
    """
    rows: list[tuple[str, str, str, int]] = []
    other: list[tuple[Path, str]] = []
    hidden: list[Path] = []
    owner: dict[tuple[str, str], Path] = {}

    def call(kind: str, path: Path, name: str) -> str:
        word = "_".join(name.split())
        if (other := owner.setdefault((kind, word), path)) != path:
            raise ValueError(f"{folder}: {kind} {short(word)} would be both {other.name} and {path.name}")
        return word

    def entries(folder: Path) -> list[Path]:
        found = sorted(folder.iterdir(), key=lambda path: by_number(path.name))
        hidden.extend(path for path in found if is_hidden(path.name))
        return [path for path in found if not is_hidden(path.name)]

    for person in entries(folder):
        if not person.is_dir():
            raise ValueError(f"{person}: lies in no person's folder; expected {folder}/<person>/{person.name}")
        identity = call("identity", person, person.name)
        clips = entries(person)
        other += [(person, EMPTY)] * (not clips)
        for entry in clips:
            files = entries(entry) if entry.is_dir() else [entry]
            chosen = [path for path in files if path.suffix.lower() in (*PICTURES, *VIDEOS) and not path.is_dir()]
            other += [(path, NO_PICTURE) for path in files if path not in chosen] or [(entry, EMPTY)] * (not files)
            if chosen:
                clip = call("clip", entry, f"{person.name}-{entry.name if entry.is_dir() else entry.stem}")
                rows += [(str(path.relative_to(folder)), clip, identity, at) for at, path in enumerate(chosen)]
    if not rows:
        raise ValueError(f"{folder}: holds no picture or video <person>/<file> or <person>/<clip>/<n>.jpg")
    table = pd.DataFrame(rows, columns=["path", "clip", "identity", "frame"])
    rng = np.random.default_rng(seed)
    split: dict[str, str] = {}
    for _, names in table.groupby("identity", sort=False)["clip"].unique().items():
        order = rng.permutation(names)
        trained = (len(order) + 1) // 2 if len(order) > 1 else 0
        split |= dict.fromkeys(order[:trained], "train") | dict.fromkeys(order[trained:], "val")
    alone = table.groupby("identity")["clip"].transform("nunique") == 1
    renamed = [f"{path.name} is {word}" for (_, word), path in owner.items() if path.name.split() != [path.name]]
    table = table.assign(split=table["clip"].map(split), identity=table["identity"].mask(alone, None))
    return table, other, hidden, renamed


def _is_video(path: str) -> bool:
    return path.lower().endswith(VIDEOS)


def _check_files(files: pd.DataFrame, scenes: str | Path | None) -> None:
    """Refuse names that a store cannot have, a video beside other files of its clip, and a clip that is no folder."""
    check_names(files["clip"].unique(), files["identity"].dropna().unique())
    for clip, path in files.loc[files["path"].duplicated(), ["clip", "path"]].to_numpy():
        raise ValueError(f"{path}: stands in two rows, of which one is of clip {short(clip)}")
    several = files["clip"].duplicated(keep=False)
    for clip, path in files.loc[several & files["path"].map(_is_video), ["clip", "path"]].to_numpy():
        raise ValueError(f"{path}: clip {short(clip)} has another file; a video is a clip of its own")
    if scenes:
        for clip in files.loc[files["clip"].str.contains(r"[/\\]"), "clip"]:
            raise ValueError(f"clip {short(clip)}: is no name for a folder of scene pictures")


def _chunks(files: Iterable[tuple[int, str, int]], folder: Path, rate: float) -> Iterator[list[Source]]:
    """Yield pictures in the order of clips, so many as a thread should have at once; videos are decoded here."""
    chunk: list[Source] = []
    pixels = 0
    for place, name, number in files:
        path = folder / name
        frames = enumerate(read_video(path, rate)) if _is_video(name) else [(number, None)]
        for at, frame in frames:
            chunk.append(Source(place, at, path, frame))
            pixels += frame.size // 3 if isinstance(frame, np.ndarray) else 0
            if len(chunk) == CHUNK or pixels >= PIXELS:
                yield chunk
                chunk, pixels = [], 0
    if chunk:
        yield chunk


def read_video(path: Path, rate: float) -> Iterator[np.ndarray | ValueError]:
    """Yield frames (h, w, 3) uint8, RGB, upright, of a video, `rate` a second or as many as there are.

    What goes wrong comes as the last of them: frames before it are good.
    """
    av = need("av")
    count = 0
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise ValueError("it has no video stream")
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            first = None
            for at, frame in enumerate(container.decode(stream)):
                seconds = at / float(stream.average_rate or 25) if frame.time is None else frame.time
                first = seconds if first is None else first
                if seconds - first >= count / rate - 1e-4:
                    yield np.ascontiguousarray(np.rot90(frame.to_ndarray(format="rgb24"), frame.rotation // 90))
                    count += 1
        if not count:
            raise ValueError("it has no frame")
    except (av.FFmpegError, OSError, ValueError) as error:
        yield ValueError(f"{path}: video, after {count} frames: {error}")


class Finder:
    """Find and cut the faces of a chunk of pictures, and keep whole pictures where that is asked for."""

    def __init__(self, detector: Detector | None, settings: FaceSettings, folder: Path | None, clips: list[str]):
        self.detector, self.settings, self.folder, self.clips = detector, settings, folder, clips

    def __call__(self, chunk: list[Source]) -> list[Found | ValueError]:
        """Return for each picture its faces, or why it cannot be read."""
        found: dict[int, Found | ValueError] = {}
        held: dict[int, np.ndarray] = {}
        for at, source in enumerate(chunk):
            try:
                held[at] = self._read(source)
            except ValueError as error:
                found[at] = error
            if sum(picture.size for picture in held.values()) >= 3 * PIXELS or at == len(chunk) - 1:
                filmed = [chunk[place].frame is not None for place in held]
                found |= zip(held, self._search([*held.values()], filmed))
                held = {}
        return [found[at] for at in range(len(chunk))]

    def _read(self, source: Source) -> np.ndarray:
        if isinstance(source.frame, ValueError):
            raise source.frame
        clip, picture = self.clips[source.clip], source.frame
        if picture is None:
            picture = np.asarray(ImageOps.exif_transpose(read_image(source.path, clip)[0]))
        if self.detector is None and picture.shape[0] != picture.shape[1]:  # a face that is squeezed is another one
            high, wide = picture.shape[:2]
            raise ValueError(f"{source.path}: clip {short(clip)} is {wide} x {high} pixels; an aligned crop is square")
        if self.folder and (source.frame is None or source.number % max(1, round(self.settings.rate)) == 0):
            (self.folder / clip).mkdir(exist_ok=True)
            Image.fromarray(picture).save(self.folder / clip / f"{source.number}.jpg", quality=92)
        return picture

    def _search(self, pictures: list[np.ndarray], filmed: list[bool]) -> list[Found]:
        size = self.settings.size
        if self.detector is None:
            row = np.zeros((1, 15), np.float32)
            fitted = (Image.fromarray(picture).resize((size, size), Image.Resampling.BILINEAR) for picture in pictures)
            return [Found(row, np.asarray(crop)[None]) for crop in fitted]
        found: list[np.ndarray | None] = [None] * len(pictures)
        for long in (self.settings.detect_size // 2, self.settings.detect_size):
            half = long < self.settings.detect_size
            asked = [at for at, rows in enumerate(found) if rows is None and (filmed[at] or not half)]
            for at, rows in zip(asked, detect(self.detector, [pictures[at] for at in asked], long)):
                side = np.sqrt(np.prod(rows[:, 2:4] - rows[:, :2], 1)).min(initial=np.inf) if len(rows) else 0
                if not half or side * long >= LARGE * max(pictures[at].shape):
                    found[at] = rows
        whole = [of for of in found if of is not None]
        return [Found(of, align(picture, of[:, 5:].reshape(-1, 5, 2), size)) for picture, of in zip(pictures, whole)]


class Taken:
    """The face that is taken of each picture, in order; batches of them are embedded while others are found.

    Features go to the open file `spilled`, so that no more than some batches of them are in memory.
    """

    def __init__(self, embed: Callable[[np.ndarray], Future], spilled: IO[bytes]):
        self.rows: list[tuple[int, int, np.ndarray]] = []  # clip, number, row as `detect` has it
        self.seen: Counter[int] = Counter()  # pictures that could be read, by clip
        self.left: list[tuple[Path, int | str, str]] = []  # file, frame if it is of a video, and why it is left out
        self.several = 0
        self._embed, self._jobs, self._crops = embed, deque[Future](), list[np.ndarray]()
        self._spilled, self._width, self._scores = spilled, 0, list[tuple[np.ndarray, np.ndarray | None]]()

    def add(self, source: Source, found: Found | ValueError) -> None:
        """Take the largest face of those as sure as the best, in a video the one nearest to the last of its clip."""
        if isinstance(found, ValueError):
            self.left.append((source.path, "", str(found)))
            return
        rows = found.rows
        self.seen[source.clip] += 1
        self.several += len(rows) > 1
        if not len(rows):
            self.left.append((source.path, "" if source.frame is None else source.number, NO_FACE))
            return
        sure = rows[:, 4] >= ALIKE * rows[:, 4].max()
        at = np.where(sure, np.prod(rows[:, 2:4] - rows[:, :2], 1), 0).argmax()
        if source.frame is not None and self.rows and self.rows[-1][0] == source.clip:
            before = self.rows[-1][2]
            at = np.square(rows[:, :2] + rows[:, 2:4] - before[:2] - before[2:4]).sum(1).argmin()
        self.rows.append((source.clip, source.number, rows[at]))
        self._crops.append(found.crops[at])
        if len(self._crops) == BATCH:
            self._submit()

    def embedded(self) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """Return of the faces taken features (F, D) float16, their losses and scores, see `to_half`."""
        self._submit()
        self._spill(0)
        self._spilled.flush()
        feature = np.memmap(self._spilled, np.float16, "r", shape=(len(self.rows), self._width))
        loss, quality = zip(*self._scores)
        return feature, np.concatenate(loss), None if quality[0] is None else np.concatenate(quality)

    def _submit(self) -> None:
        if self._crops:
            self._jobs.append(self._embed(np.stack(self._crops)))
            self._crops = []
            self._spill(WAITING)

    def _spill(self, most: int) -> None:
        """Write features out, in order, until at most so many batches of them are in memory."""
        while len(self._jobs) > most:
            feature, *scores = self._jobs.popleft().result()
            self._spilled.write(feature.tobytes())
            self._width = feature.shape[1]
            self._scores.append(tuple(scores))


def _ahead(
    pool: ThreadPoolExecutor, most: int, find: Finder, chunks: Iterator[list[Source]]
) -> Iterator[tuple[Source, Found | ValueError]]:
    """Yield pictures with what was found in them, in order, while a pool works on the next `most` chunks."""
    jobs = ((chunk, pool.submit(find, chunk)) for chunk in chunks)
    waiting = deque(islice(jobs, most))
    while waiting:
        chunk, job = waiting.popleft()
        waiting.extend(islice(jobs, 1))
        yield from zip(chunk, job.result())
