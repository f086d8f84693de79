"""Public faces to stores, with splits that were fixed before anything was measured on them.

YouTube Faces (`ytf`): a clip is a clip of the data.  CFP and LFW (`cfp`, `lfw`): photographs, of which clips are made,
each of several different ones of one person (`group_photographs`).  The seed draws each split.

- A share of 80 / 347 of the people of YTF and CFP are distractors: all their clips are val clips without an identity,
  and no training sees them.  So are those of LFW with fewer than four photographs.
- Of every other person's clips in YTF, half, rounded down, are train clips, the others val clips: the challenge has
  more val than train clips, and the task must leave room for an arm to gain.  (Class means, before any arm was run:
  .952 with EdgeFace and .899 with MobileFaceNet; with the odd clip in train .977 and .937.)  Of CFP's and LFW's, half
  of the photographs, and the odd one, become train clips and half val clips, 2 to 5 to a clip; those of CFP mix frontal
  and profile as they come.
- Clips of YTF whose label looks wrong (`label_check`, the mean cosine to the other clips of the person, below .2) stay,
  and are named.  Without them distractors are the same, and the clips of a person are drawn in the same order; who then
  has fewer than two is a distractor.

Clips are numbered in random order, so that a name tells nothing.  Quality is mapped by rank to the challenge's scale.
Embeddings are multiplied by one number a set and network, so that their median norm is the challenge's as calibrated:
arms that learn start from norms of that size, and a constant carries no information.
"""

import re
import tempfile
import time
import unicodedata
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd

from mmlib.data.calibration import NORM_KNOTS
from mmlib.data.content import read_table
from mmlib.data.features import digest, import_features, write_faces
from mmlib.data.foreign import ImportReport, check_rows, open_array
from mmlib.data.quality import rescale
from mmlib.data.sources import known
from mmlib.data.submission import short

STRANGERS = 80 / 347  # share of people who are distractors
NORM = dict(NORM_KNOTS)[0.5]  # median of the challenge, as calibrated
SUSPECT = 0.2  # of `label_check`, below which a label looks wrong
NETWORKS = ("edgeface", "mobilefacenet")
SCENES = {"masked": "scene.npy", "whole": "scene-whole.npy"}
COLUMNS = ("clip", "frame", "identity", "det", "quality")
SETS = ("ytf", "cfp", "lfw")
# The files of import_lfw: sha256, and the names they go by. The first is theirs in oss_data/ of
# github.com/huyhoang17/128D-Facenet-LFW-Embedding-Visualisation at 75ca7f43ce1576a2240de24077016f17d3b52b10.
LFW_ARRAY = (
    "f4ed45ab485beab6a4345a3f86001a7bedbacdd35aaf80298895352329315edb",
    ("LFW_tensor.bytes", "lfw-facenet-128.bytes"),
)
LFW_LABELS = (
    "63e115d1d791ed3d1e48e430e8ebb546357cbf7e97a37cce6ae023558e748ed2",
    ("LFW_labels.tsv", "lfw-facenet-128-labels.tsv"),
)


def import_public(
    name: str,
    folder: str | Path,
    store: str | Path,
    *,
    network: str = "edgeface",
    scene: str | None = "masked",
    seed: int = 0,
    suspects: bool = True,
    overwrite: bool = False,
    progress: bool = False,
) -> ImportReport:
    """Turn the tables of a public set, `ytf`, `cfp` or `lfw`, into a store, split as this module says.

    `folder` holds NAME/frames.parquet (columns clip, frame, identity, det and quality, CFP's also name; a row a
    photograph) and, in its order, the embeddings of a `network`, NAME/edgeface.npy (F, 512) or NAME/mobilefacenet.npy
    (F, 128); for YTF also clips.csv (clip, label_check) and in its order scene.npy (N, 1280), with the face masked, or
    scene-whole.npy.  What a SHA256SUMS there lists is checked.  scene: "masked", "whole" or None; other sets have none.
    suspects: keep clips whose label looks wrong.
    """
    began, folder = time.perf_counter(), Path(folder)
    if name not in SETS or network not in NETWORKS or scene not in (None, *SCENES):
        raise ValueError(f"{name!r}, {network!r}, {scene!r}: not one of {[*SETS]}, {[*NETWORKS]} and {[None, *SCENES]}")
    if name != "ytf" and (scene == "whole" or not suspects):
        raise ValueError(f"{name}: scenes, and labels that look wrong, are known of ytf only")
    array = folder / name / f"{network}.npy"
    files = {"table": folder / name / "frames.parquet", "array": array}
    if name == "ytf":
        files |= {"clips": folder / name / "clips.csv"} | ({"scene": folder / name / SCENES[scene]} if scene else {})
    digests, notes = check_sums(folder, files)
    table, features = _read_faces(files["table"], name), open_array(array)
    if len(table) != len(features):
        raise ValueError(f"{array}: {len(features)} rows, but {files['table']} has {len(table)}")
    features, factor = _to_norm(features, array)
    notes.append(f"embeddings times {factor:.4g}, so that their median norm is {NORM:g}")
    provenance: dict = {"set": known()[name].title, "network": network, "seed": seed, "times": factor, **digests}
    scenes, identity = None, table.groupby("clip")["identity"].first()
    if name == "ytf":
        checks = _read_checks(files["clips"], identity)
        wrong = checks.index[checks < SUSPECT]
        split = split_clips(identity, seed, () if suspects else wrong)
        rows = table[table["clip"].isin(split.index)]
        rows = rows.assign(**{column: rows["clip"].map(split[column]) for column in split})
        provenance["suspects"] = {"kept": suspects, "clips": {clip: split["clip"].get(clip) for clip in wrong}}
        some = f": {', '.join(wrong[:3])}{', ...' * (len(wrong) > 3)}" if len(wrong) else ""
        what = f"{len(wrong)} clips, {'kept' if suspects else 'left out'}{some}"
        notes.append(f"labels that look wrong, label_check below {SUSPECT}: {what}")
        if scene:
            shown = open_array(files["scene"])
            if len(shown) != len(checks):
                raise ValueError(f"{files['scene']}: {len(shown)} rows, but {files['clips']} has {len(checks)}")
            scenes = shown, pd.Series(checks.index.get_indexer(split.index), split["clip"])
            provenance["face_in_scene"] = scene
    else:
        split = group_photographs(table["identity"].sort_index(), seed, STRANGERS if name == "cfp" else 0)
        rows = table[["det", "quality"]].join(split)
    rows["quality"], provenance["quality"] = rescale(rows["quality"].to_numpy(), "rank", f"{files['table']}: quality")
    rows = rows.sort_values(["clip", "frame"], kind="stable")
    options: dict = {"provenance": provenance, "scenes": scenes, "overwrite": overwrite, "progress": progress}
    report = write_faces(rows, features, array, store, **options)
    notes.append(f"{known()[name].title}, {network}: whether it was trained on any of these people is unchecked")
    return replace(report, notes=[*report.notes, *notes], seconds=time.perf_counter() - began)


def split_clips(identity: pd.Series, seed: int, left_out: Collection[str] = ()) -> pd.DataFrame:
    """Split clips, of which `identity` says whose each is: split, identity and new name (clip) of each, by its old one.

    left_out: clips that get no row.

    >>> clips = pd.Series({"a0": "ann", "a1": "ann", "a2": "ann", "b0": "bob"})
    >>> split_clips(clips, 0)["split"].value_counts().to_dict()
    {'val': 3, 'train': 1}
    """
    rng, identity = np.random.default_rng(seed), identity.sort_index()
    strangers = _strangers(identity, STRANGERS, rng)
    drawn, number = rng.permutation(len(identity)), rng.permutation(len(identity))
    split = pd.DataFrame({"identity": identity, "number": number}).iloc[drawn]
    split = split[~split.index.isin(left_out)]
    of = split.groupby("identity")["number"]
    size = of.transform("size")
    known = ~split["identity"].isin(strangers) & (size > 1)
    split["split"] = np.where(known & (2 * of.cumcount() < size - 1), "train", "val")
    split["identity"] = split["identity"].where(known, None)
    split["clip"] = [f"{split}_{number:05d}" for split, number in zip(split["split"], split.pop("number"))]
    return split.sort_index()


def shared_names(a: Iterable[str], b: Iterable[str]) -> list[tuple[str, str]]:
    """List the people whom two sets share, pairs of their names, sorted; letters alone count, in any case.

    Accents do not count either, nor do initials between the first and the last word that one of the two leaves out: a
    person too many is apart from nobody, a person too few is trained on and ranked.

    >>> shared_names(["Ann_Lee", "Bob"], ["ann lee", "Eve", "Anñ B. Lee"])
    [('Ann_Lee', 'Anñ B. Lee'), ('Ann_Lee', 'ann lee')]
    """
    others: dict[str, set[str]] = {}
    for name in {*b}:
        for spelling in _spellings(name):
            others.setdefault(spelling, set()).add(name)
    found = {name: {other for spelling in _spellings(name) for other in others.get(spelling, ())} for name in {*a}}
    return sorted((name, other) for name, of in found.items() for other in of)


def people_of(name: str, folder: str | Path) -> list[str]:
    """Return the names of the people of a public set, distractors too, from its table below `folder`."""
    return sorted(_read_faces(Path(folder) / name / "frames.parquet", name)["identity"].unique())


def _to_norm(features: np.ndarray, array: Path) -> tuple[np.ndarray, float]:
    """Multiply embeddings (F, D) by one number, so that their median norm is NORM; return it too."""
    features = features.astype(np.float32)
    norm = np.nanmedian(np.linalg.norm(features, axis=1)) if len(features) else np.nan
    if not 0 < norm < np.inf:
        raise ValueError(f"{array}: the median norm of its {len(features)} rows is {norm}")
    return features * np.float32(NORM / norm), float(NORM / norm)


def _spellings(name: str) -> set[str]:
    """Return the letters of a name, without case and accents, with and without the initials between two words."""
    plain = "".join(letter for letter in unicodedata.normalize("NFKD", name) if not unicodedata.combining(letter))
    words = re.findall(r"[^\W\d_]+", re.sub("['\u2019]", "", plain).casefold())
    middle = [word for word in words[1:-1] if len(word) > 1]
    return {"".join(words), "".join([*words[:1], *middle, *words[1:][-1:]])}


def _strangers(people: Iterable[str], share: float, rng: np.random.Generator) -> set[str]:
    """Draw a share of the people; nothing is drawn for a share of 0."""
    names = sorted({*people})
    return {*rng.permutation(np.array(names, object))[: round(share * len(names))]} if share else set()


def _read_faces(path: Path, name: str) -> pd.DataFrame:
    """Read and check the table of a set as `read_rows` does; people of CFP, numbered there, go by their names."""
    table = read_table(path)
    if missing := [column for column in (*COLUMNS, *["name"] * (name == "cfp")) if column not in table]:
        raise ValueError(f"{path}: no column {', '.join(missing)}; it has {short(', '.join(table.columns), 400)}")
    if name == "cfp":
        table["identity"] = table["name"].str.replace(" ", "_")
    rows = check_rows(table.assign(split="val"), path)
    for row in np.flatnonzero(rows["identity"].isna()):
        raise ValueError(f"{path}, row {rows.index[row] + 1}: clip {rows['clip'].iloc[row]} has no identity")
    return rows


def _read_checks(path: Path, identity: pd.Series) -> pd.Series:
    """Read the `label_check` of every clip of `identity`, in the order of the file."""
    try:
        kinds = {"clip": str, "label_check": float}
        checks = pd.read_csv(path, dtype=kinds, usecols=[*kinds], index_col="clip")["label_check"]
    except (ValueError, OSError) as error:
        raise ValueError(f"{path}: not a readable table ({error})") from None
    for clip in [*checks.index[checks.index.duplicated()], *checks.index.symmetric_difference(identity.index)]:
        raise ValueError(
            f"{path}: clip {short(str(clip))} stands {(checks.index == clip).sum()} times, not once as in the frames"
        )
    return checks


def check_sums(folder: Path, files: dict[str, Path]) -> tuple[dict, list[str]]:
    """Digest files, hold them to what SHA256SUMS in the folder lists, and say for how many it did."""
    sums, listed = folder / "SHA256SUMS", {}
    for number, line in enumerate(sums.read_text().splitlines() if sums.exists() else [], 1):
        if not re.fullmatch("[0-9a-f]{64} [ *].+", line):
            raise ValueError(f"{sums}, line {number}: {short(line)!r} is no sha256 and name of a file")
        listed[line[66:]] = line[:64]
    digests, names = {}, {kind: path.relative_to(folder).as_posix() for kind, path in files.items()}
    for kind, path in files.items():
        if not path.exists():
            raise ValueError(f"{path}: missing")
        digests[kind] = digest(path)
        if (found := digests[kind]["sha256"]) != (wanted := listed.get(names[kind], found)):
            raise ValueError(f"{path}: its sha256 is {found}, but SHA256SUMS lists {wanted}")
    unknown = [name for name in names.values() if name not in listed]
    return digests, [f"not in SHA256SUMS: {', '.join(unknown)}"] if unknown else ["sha256 of every file as listed"]


def import_lfw(folder: str | Path, store: str | Path, *, seed: int = 0, overwrite: bool = False) -> ImportReport:
    """Turn public embeddings of photographs of Labeled Faces in the Wild into a store.

    `folder` holds `LFW_ARRAY`, 2,921 FaceNet embeddings of 128 dimensions as raw float32, and `LFW_LABELS`, a name a
    line; their sha256 is checked. Spaces in a name become underscores, as the challenge's text files divide words at
    spaces. The photographs, of which `group_photographs` makes clips, are for research.
    """
    array, labels = (_find_published(Path(folder), *file) for file in (LFW_ARRAY, LFW_LABELS))
    names = labels.read_text(encoding="utf-8").replace(" ", "_").splitlines()
    with tempfile.TemporaryDirectory() as scratch:
        table = Path(scratch) / f"grouped-{seed}.csv"
        group_photographs(names, seed).to_csv(table, index=False)
        return import_features(table, array, store, width=128, overwrite=overwrite)


def group_photographs(names: Sequence[str], seed: int, strangers: float = 0) -> pd.DataFrame:
    """Make clips of photographs: a table for `import_features`, row i for the photograph of `names[i]` (F,).

    The photographs of a person are shuffled. Of 4 or more, half (and the odd one) go to train and half to val, each
    half cut into a random number of even clips of 2 to 5. 1 to 3 make one val clip, a distractor without identity.
    Clips are numbered in random order, so that a name tells nothing. strangers: a share of the people of whom all clips
    are such distractors, however many photographs there are.

    >>> table = group_photographs(["ann", "bob", "ann", "ann", "bob", "ann"], seed=0)
    >>> table["split"].value_counts().to_dict()
    {'val': 4, 'train': 2}
    """
    rng, clips = np.random.default_rng(seed), []
    unknown = _strangers(names, strangers, rng)
    for name, rows in pd.Series(names, dtype=object).groupby(np.asarray(names, object)).indices.items():
        rows = rng.permutation(rows)
        if len(rows) < 4:
            clips.append(("val", None, rows))
            continue
        for split, half in zip(("train", "val"), np.array_split(rows, 2)):
            number = rng.integers(-(-len(half) // 5), len(half) // 2, endpoint=True)
            whose = ("val", None) if name in unknown else (split, name)
            clips += [(*whose, part) for part in np.array_split(half, number)]
    table = pd.DataFrame(clips, columns=["split", "identity", "row"])
    numbers = rng.permutation(len(table))
    table["clip"] = [f"{split}_{number:05d}" for split, number in zip(table["split"], numbers)]
    table = table.explode("row")
    table["frame"] = table.groupby("clip").cumcount()
    return table.set_index(table.pop("row").astype(np.int64)).sort_index()


def _find_published(folder: Path, sha256: str, names: Sequence[str]) -> Path:
    path = next(filter(Path.exists, (folder / name for name in names)), folder / names[0])
    if not path.exists():
        raise ValueError(f"{path}: missing")
    if (found := digest(path)["sha256"]) != sha256:
        raise ValueError(f"{path}: not the published file, its sha256 is {found}, not {sha256}")
    return path
