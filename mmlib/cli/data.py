"""Commands that make a clip store, or files for one."""

from __future__ import annotations

import sys
from dataclasses import fields
from enum import StrEnum
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated

from mmlib import parameters
from mmlib.cli.options import (
    PAIRS,
    NewStore,
    Overwrite,
    argument,
    command,
    option,
    say,
    split_pairs,
    write_store,
    writing,
)

if TYPE_CHECKING:
    from mmlib.data.simulate import Settings
    from mmlib.data.store import ClipStore

Profile = StrEnum("Profile", ["tiny", "quick", "full"])
PublicSource = StrEnum(
    "PublicSource", ["ytf", "cfp", "lfw", "edgeface", "mobilefacenet", "lightqnet", "retinaface", "ultraface"]
)
Network = StrEnum("Network", ["edgeface", "mobilefacenet"])
Scene = StrEnum("Scene", ["masked", "whole", "none"])


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
        list[str] | None, option("Change a setting; a wrong name lists them.", "--set", **PAIRS)
    ] = None,
    as_official: Annotated[bool, option("Write the challenge's own files, not a store.", "--as-official")] = False,
    overwrite: Overwrite = False,
) -> None:
    """Draw a simulated world of clips.

    It becomes a clip store, or the challenge's own files.
    """
    from mmlib.data.simulate import settings_for
    from mmlib.data.simulate import simulate as draw

    chosen, progress = settings_for(profile.value, **read_settings(settings or [])), sys.stderr.isatty()
    with writing(out):
        if as_official:
            lines = _draw_official(out, chosen, seed, overwrite, progress)
        else:
            lines = _summary(draw(out, chosen, seed, overwrite=overwrite, progress=progress))
    print(*lines, sep="\n")
    print(f"simulated: profile {profile.value}, seed {seed}; no score on it is a result on the challenge")


@command("import-iqiyi official/ store/", name="import-iqiyi")
def import_iqiyi(
    folder: Annotated[Path, argument("FOLDER", "The challenge's folder: feat/*.pickle, train_gt.txt, val_gt.txt.")],
    store: NewStore,
    skip_bad_records: Annotated[
        bool, option("Leave bad records out and count them; sort frames.", "--skip-bad-records")
    ] = False,
    overwrite: Overwrite = False,
) -> None:
    """Import the challenge's own files.

    They become a clip store. Nothing in a pickle is executed: what is not an array or a plain container is
    refused. A bad record stops the import unless told otherwise; a score that is NaN is stored as 0. Scene
    features of the released code of 2019, scene_infos_*.pickle, are found in FOLDER, its feat/ and scene_feat/.
    """
    from mmlib.data.iqiyi import import_folder

    write_store(store, import_folder, folder, skip_bad_records=skip_bad_records, overwrite=overwrite)


@command(
    "import-features frames.csv features.npy store/",
    "import-features frames.parquet features.bin store/ --width 128",
    "import-features frames.csv features.npy store/ --quality-scale rank",
    "import-features frames.csv features.npy store/ --quality-scale 0:0,0.5:59,1:260",
    name="import-features",
)
def import_features(
    table: Annotated[Path, argument("TABLE", "Parquet or CSV of frames.")],
    array: Annotated[Path, argument("ARRAY", "Their rows: .npy, or raw little-endian float32 with --width.")],
    store: NewStore,
    width: Annotated[int | None, option("Dimensions of a raw ARRAY.", metavar="D", least=1)] = None,
    quality_scale: Annotated[
        str | None, option("Map quality: rank or knots; challenge leaves it.", "--quality-scale", metavar="SCALE")
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Import embeddings of your own.

    A table of frames and an array beside it become a clip store. The table has the columns clip, frame,
    identity (or empty), split, and quality and det where known. Weights by quality have thresholds in the units
    of the challenge, whose scores are about -20 to 260, half of them above 60. Another score is mapped to them:
    by rank, or by knots SCORE:CHALLENGE,SCORE:CHALLENGE,..., linear between them and constant beyond. One that
    lies on one side of 60 is refused until SCALE says what it is.
    """
    from mmlib.data import features
    from mmlib.data.quality import parse_scale

    scale = None if quality_scale is None else parse_scale(quality_scale)
    options = {"width": width, "quality_scale": scale, "overwrite": overwrite}
    write_store(store, features.import_features, table, array, **options)


@command(
    "import-faces people/ store/ --weights edgeface-xs.safetensors --detector mobilenet0.25_Final.pth",
    "import-faces crops/ store/ --weights edgeface-xs.safetensors --aligned --quality lightqnet-dm100.pb",
    name="import-faces",
)
def import_faces(
    folder: Annotated[Path, argument("FOLDER", "<person>/<video>, <person>/<picture> or <person>/<clip>/<n>.jpg.")],
    store: NewStore,
    weights: Annotated[Path, option("Embedder: safetensors, weights of torch, or .onnx.", metavar="FILE")],
    detector: Annotated[Path | None, option("RetinaFace mobilenet0.25, or UltraFace (.onnx).", metavar="FILE")] = None,
    aligned: Annotated[bool, option("Pictures are square crops, aligned already.", "--aligned")] = False,
    quality: Annotated[Path | None, option("Graph of LightQNet (.pb).", metavar="FILE")] = None,
    table: Annotated[
        Path | None, option("Its columns path, clip, identity and split say what is whose.", metavar="TABLE")
    ] = None,
    scenes: Annotated[
        Path | None, option("Folder for whole pictures, of a video one a second.", metavar="FOLDER")
    ] = None,
    architecture: Annotated[str, option("The embedder's name in timm; mobilefacenet.")] = "edgenext_x_small",
    width: Annotated[int, option("Its outputs.", least=1)] = 512,
    size: Annotated[int, option("Side of its pictures in pixels.", least=1)] = 112,
    mean: Annotated[float, option("What it takes from pixels in [0, 1].")] = 0.5,
    std: Annotated[float, option("By what it divides them then.")] = 0.5,
    detect_size: Annotated[int, option("Longer side in which faces are looked for, pixels.", least=32)] = 640,
    rate: Annotated[float, option("Frames a second of a video.")] = 8.0,
    seed: Annotated[int, option("Which clips are for training.", least=0)] = 0,
    skip_bad_files: Annotated[bool, option("Leave bad files out and count them.", "--skip-bad-files")] = False,
    overwrite: Overwrite = False,
) -> None:
    """Import faces of photographs and videos.

    Faces are found, aligned on five points and embedded; they become a clip store. Of each person's clips half
    go to train and half to val, a person of one clip is a distractor, unless a table says otherwise. Needs the
    packages of the extra `faces`.
    """
    from mmlib.data import faces

    if aligned != (detector is None):
        raise ValueError("--detector FILE finds the faces, --aligned says that pictures are crops: give one of them")
    how = faces.FaceSettings(weights, detector, quality, architecture, width, size, mean, std, detect_size, rate, seed)
    options = {"table": table, "scenes": scenes, "skip_bad_files": skip_bad_files, "overwrite": overwrite, "say": say}
    write_store(store, faces.import_faces, folder, settings=how, **options)


@command("import-lfw oss_data/ store/", name="import-lfw")
def import_lfw(
    folder: Annotated[Path, argument("FOLDER", "Folder with the two published files; their sha256 is checked.")],
    store: NewStore,
    seed: Annotated[int, option("Which photographs go together.", least=0)] = 0,
    overwrite: Overwrite = False,
) -> None:
    """Import public embeddings of real faces.

    FaceNet embeddings of photographs of Labeled Faces in the Wild become a clip store: each person's
    photographs are grouped into short clips, those of persons with fewer than four into distractors. The two
    files are LFW_tensor.bytes and LFW_labels.tsv, from oss_data/ at
    https://github.com/huyhoang17/128D-Facenet-LFW-Embedding-Visualisation
    """
    from mmlib.data import public

    with writing(store):
        report = public.import_lfw(folder, store, seed=seed, overwrite=overwrite)
    print(*report.lines(), sep="\n")


@command(
    "fetch ytf store/",
    "fetch cfp store/ --network mobilefacenet --seed 3",
    "fetch ytf store/ --folder data/",
    "fetch ultraface",
)
def fetch(
    name: Annotated[PublicSource, argument("NAME", "ytf (YouTube Faces frames), cfp, lfw (photographs); a network.")],
    store: Annotated[Path | None, argument("[STORE]", "Clip store to make of its photographs, a folder.")] = None,
    folder: Annotated[
        Path | None, option("Folder of tables or photographs that are there; nothing is fetched.", metavar="FOLDER")
    ] = None,
    network: Annotated[Network, option("Whose embeddings.")] = Network.edgeface,
    scene: Annotated[Scene, option("Of ytf: scene features, with the face masked or of whole frames.")] = Scene.masked,
    seed: Annotated[int, option("Which split; chapter 12 uses 0 to 9.", least=0)] = 0,
    without_suspects: Annotated[
        bool, option("Of ytf: leave out clips whose label looks wrong.", "--without-suspects")
    ] = False,
    overwrite: Overwrite = False,
) -> None:
    """Fetch a public set of real faces.

    Its photographs and the networks that read them go from their public places to the user's cache (MMLIB_CACHE),
    each checked by its sha256; what is there already stays. Places and terms are said first: they are for
    research. With STORE, faces are found, aligned, embedded and scored, once, into tables in the cache, and become a
    clip store, split into train and val clips and distractors by the seed. FOLDER has tables, NAME/frames.parquet and
    its arrays, or the photographs and networks: those of the cache's sources/, or ytf-frames.tar, cfp-aligned.tar,
    lfw-pairs-aligned-*.tar.gz beside edgeface-xs.safetensors and the others.
    """
    import rich

    from mmlib.claims import cache_folder
    from mmlib.data import photographs, public, sources

    rich.reconfigure(stderr=True)  # standard output is for the report
    progress, place, shown = sys.stderr.isatty(), cache_folder() / "sources", None if scene == "none" else scene.value
    tables, made = cache_folder() / "faces", Path(name.value, "frames.parquet")
    if folder is not None and store is None:
        raise ValueError(f"--folder {folder}: needs a STORE to make of it")
    if store is not None and name.value not in public.SETS:
        raise ValueError(f"{name.value}: a network, of which no STORE can be made")
    if folder is not None and not folder.is_dir():
        raise ValueError(f"{folder}: no such folder")
    if folder is None:
        also = (*photographs.NEEDED, *[photographs.SCENE_NETWORK] * (name == "ytf" and shown is not None))
        wanted = (name.value, *also) if name.value in public.SETS else (name.value,)
        print(*sources.announce(wanted, place), f"to {place}", sep="\n", flush=True)
        with writing(place):
            for source in wanted:
                print(f"{source}: {sources.fetch_source(source, place, progress=progress)}", flush=True)
    if store is None:
        return
    if folder is not None and (folder / made).exists():
        tables = folder
    elif not (tables / made).exists() or (shown and name == "ytf" and not (tables / "ytf/scene.npy").exists()):
        print(f"{name.value}: its photographs are cut, embedded and scored, once, in some minutes", flush=True)
        options: dict = {"scenes": shown is not None, "overwrite": True, "progress": progress, "say": say}
        with writing(tables):
            print(*photographs.make_tables(name.value, folder or place, tables, **options), sep="\n", flush=True)
    else:
        print(f"tables: made before, in {tables / name.value}")
    options = {"network": network.value, "scene": shown, "seed": seed, "overwrite": overwrite}
    write_store(store, public.import_public, name.value, tables, suspects=not without_suspects, **options)


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


def _draw_official(out: Path, settings: Settings, seed: int, overwrite: bool, progress: bool) -> list[str]:
    """Draw a world, write it as the challenge's files, and describe it."""
    from mmlib.data.iqiyi import export_folder
    from mmlib.data.simulate import simulate as draw
    from mmlib.data.writer import partial_folder

    with partial_folder(out, "feat", overwrite) as partial, TemporaryDirectory(dir=partial.parent) as folder:
        store = draw(Path(folder) / "store", settings, seed, progress=progress)
        export_folder(store, partial)
        lines = _summary(store)
        del store  # not every system removes a file that is mapped
    return lines


def _summary(store: ClipStore) -> list[str]:
    clips, frames = store.clips, {name: len(modality.feature) for name, modality in store.modalities.items()}
    sizes = clips["split"].value_counts()
    return [
        f"clips: {len(store)}, {sizes['train']} train and {sizes['val']} val",
        f"frames: {', '.join(f'{number} {name}' for name, number in frames.items())}",
        f"identities: {len(store.identities)}",
        f"distractors: {len(store.select('val', labelled=False))}",
    ]


def read_settings(texts: list[str]) -> dict[str, object]:
    """Read NAME=VALUE texts as settings of the simulator, which knows their names and bounds."""
    from mmlib.data.simulate import Settings

    kinds = {field.name: str(field.type) for field in fields(Settings)}
    pairs = split_pairs("--set", texts)
    return {name: parameters.convert(f"--set {name}", text, kinds.get(name, "str")) for name, text in pairs.items()}
