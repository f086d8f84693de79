"""Commands that make a clip store, or files for one."""

from __future__ import annotations

import shutil
import sys
from dataclasses import fields
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from mmlib.cli.options import NewStore, Overwrite, argument, command, option, split_pairs, writing

if TYPE_CHECKING:
    from mmlib.data.simulate import Settings
    from mmlib.data.store import ClipStore

Profile = StrEnum("Profile", ["tiny", "quick", "full"])


@command(
    "simulate store/ --profile tiny",
    "simulate store/ --profile quick --seed 3 --set contaminated=0.3",
    "simulate official/ --profile quick --as-official",
)
def simulate(
    out: Annotated[Path, argument("OUT", "Folder to write.")],
    profile: Annotated[Profile, option("How many identities.")] = Profile.quick,
    seed: Annotated[int, option("Which world; the same seed gives the same bytes.", least=0)] = 0,
    settings: Annotated[
        list[str] | None,
        option(
            "Change a setting of the simulator; repeat for more. A wrong name lists them.",
            "--set",
            metavar="NAME=VALUE",
        ),
    ] = None,
    as_official: Annotated[
        bool, option("Write the challenge's own files instead of a clip store.", "--as-official")
    ] = False,
    overwrite: Overwrite = False,
) -> None:
    """Draw a simulated world of clips.

    It becomes a clip store, or the challenge's own files.
    """
    from mmlib.data.simulate import settings_for
    from mmlib.data.simulate import simulate as draw

    chosen = settings_for(profile.value, **read_settings(settings or []))
    with writing(out):
        if as_official:
            lines = _draw_official(out, chosen, seed, overwrite)
        else:
            lines = _summary(draw(out, chosen, seed, overwrite=overwrite, progress=sys.stderr.isatty()))
    print(*lines, sep="\n")
    print(f"simulated: profile {profile.value}, seed {seed}; no score on it is a result on the challenge")


@command("import-iqiyi official/ store/", name="import-iqiyi")
def import_iqiyi(
    folder: Annotated[Path, argument("FOLDER", "The challenge's folder: feat/*.pickle, train_gt.txt, val_gt.txt.")],
    store: NewStore,
    skip_bad_records: Annotated[
        bool, option("Leave bad records out and count them, instead of stopping at the first.", "--skip-bad-records")
    ] = False,
    overwrite: Overwrite = False,
) -> None:
    """Import the challenge's own files.

    They become a clip store. Nothing in a pickle is executed: what is not an array or a plain container is
    refused.
    """
    import rich

    from mmlib.data.iqiyi import import_folder

    rich.reconfigure(stderr=True)  # standard output is for the report
    options = {"skip_bad_records": skip_bad_records, "overwrite": overwrite, "progress": sys.stderr.isatty()}
    with writing(store):
        report = import_folder(folder, store, **options)
    print(*report.lines(), sep="\n")


@command(
    "import-features frames.csv features.npy store/",
    "import-features frames.parquet features.bin store/ --width 128",
    name="import-features",
)
def import_features(
    table: Annotated[
        Path,
        argument("TABLE", "Parquet or CSV: clip, frame, identity (or empty), split, and quality and det where known."),
    ],
    array: Annotated[
        Path, argument("ARRAY", "A row for each row of TABLE: .npy, or raw little-endian float32 with --width.")
    ],
    store: NewStore,
    width: Annotated[int | None, option("Dimensions of a raw ARRAY.", metavar="D", least=1)] = None,
    overwrite: Overwrite = False,
) -> None:
    """Import embeddings of your own.

    A table of frames and an array beside it become a clip store.
    """
    import rich

    from mmlib.data import features

    rich.reconfigure(stderr=True)  # standard output is for the report
    options = {"width": width, "overwrite": overwrite, "progress": sys.stderr.isatty()}
    with writing(store):
        report = features.import_features(table, array, store, **options)
    print(*report.lines(), sep="\n")


@command(
    "import-lfw oss_data/ store/",
    name="import-lfw",
    before="""\b
The two files are LFW_tensor.bytes and LFW_labels.tsv, from oss_data/ at
https://github.com/huyhoang17/128D-Facenet-LFW-Embedding-Visualisation

""",
)
def import_lfw(
    folder: Annotated[Path, argument("FOLDER", "Folder with the two published files; their sha256 is checked.")],
    store: NewStore,
    seed: Annotated[int, option("Which photographs go together.", least=0)] = 0,
    overwrite: Overwrite = False,
) -> None:
    """Import public embeddings of real faces.

    FaceNet embeddings of photographs of Labeled Faces in the Wild become a clip store: each person's
    photographs are grouped into short clips, those of persons with fewer than four into distractors.
    """
    from mmlib.data import features

    with writing(store):
        report = features.import_lfw(folder, store, seed=seed, overwrite=overwrite)
    print(*report.lines(), sep="\n")


@command("render-scenes store/ img/", name="render-scenes")
def render(
    store: Annotated[Path, argument("STORE", "Simulated clip store.")],
    out: Annotated[Path, argument("OUT", "Folder to write, with a folder of pictures a clip.")],
    size: Annotated[int, option("Side of a picture in pixels.", least=16)] = 64,
    overwrite: Overwrite = False,
) -> None:
    """Render scene pictures of simulated clips.

    They show the show and the set of a clip, not who is in it.
    """
    from mmlib.data.render import render_scenes
    from mmlib.data.store import ClipStore

    clips = ClipStore.open(store)
    with writing(out):
        drawn = render_scenes(clips, out, size=size, overwrite=overwrite)
    print(f"pictures: {drawn} of {len(clips)} clips")
    print("simulated: no score on them is a result on the challenge")


def _draw_official(out: Path, settings: Settings, seed: int, overwrite: bool) -> list[str]:
    """Draw a world, write it as the challenge's files, and describe it."""
    from mmlib.data.iqiyi import export_folder
    from mmlib.data.simulate import simulate as draw
    from mmlib.data.writer import partial_folder

    with partial_folder(out, "feat", overwrite) as partial:
        store = draw(partial / "store", settings, seed, progress=sys.stderr.isatty())
        export_folder(store, partial / "files")
        lines = _summary(store)
        del store  # not every system removes a file that is mapped
        shutil.rmtree(partial / "store")
        for path in sorted((partial / "files").iterdir()):
            path.rename(partial / path.name)
        (partial / "files").rmdir()
    return lines


def _summary(store: ClipStore) -> list[str]:
    train, val = store.select("train"), store.select("val")
    distractors = store.select("val", labelled=False)
    frames = ", ".join(f"{len(modality.feature)} {name}" for name, modality in store.modalities.items())
    return [
        f"clips: {len(store)}, {len(train)} train and {len(val)} val",
        f"frames: {frames}",
        f"identities: {len(store.identities)}",
        f"distractors: {len(distractors)}",
    ]


def read_settings(texts: list[str]) -> dict[str, float]:
    """Read NAME=VALUE texts as settings of the simulator."""
    from mmlib.data.simulate import Settings

    kinds = {field.name: type(field.default) for field in fields(Settings)}
    values = {}
    for name, text in split_pairs("--set", texts).items():
        if name not in kinds:
            raise ValueError(f"--set {name}: no such setting; there are {', '.join(kinds)}")
        try:
            values[name] = kinds[name](text)
        except ValueError:
            kind = "a whole number" if kinds[name] is int else "a number"
            raise ValueError(f"--set {name}: expected {kind}, got {text!r}") from None
        if not abs(values[name]) < float("inf"):
            raise ValueError(f"--set {name}: expected a finite number, got {text!r}")
    return values
