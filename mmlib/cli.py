"""The command line: `mmlib --help`. Commands read arguments and print; the library does the work.

Modules that take long to import are imported where they are needed, so that help comes at once.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from typer.core import TyperGroup

if TYPE_CHECKING:
    from mmlib.data.simulate import Settings
    from mmlib.data.store import ClipStore

Profile = StrEnum("Profile", ["tiny", "quick", "full"])
System = StrEnum("System", ["one-name", "one-name-as-coded", "face-only"])
Split = StrEnum("Split", ["val", "test"])
Device = StrEnum("Device", ["auto", "cpu", "cuda"])


class OneLineErrors(TyperGroup):
    """Say what went wrong in one line: status 1, or 130 for an interrupt; typer answers wrong usage, 2."""

    def invoke(self, ctx: typer.Context) -> None:
        """Run the command that was asked for."""
        try:
            super().invoke(ctx)
            print(end="", flush=True)
        except BrokenPipeError:  # whoever read the output has seen enough
            _discard_output()
        except KeyboardInterrupt:
            _stop("interrupted", 130)
        except MemoryError as error:
            _stop(f"out of memory {error}")
        except (ValueError, OSError) as error:
            _discard_output()
            _stop(_reason(error))


app = typer.Typer(
    cls=OneLineErrors,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
Overwrite = Annotated[bool, typer.Option("--overwrite", help=("Replace what is there once the new is complete."))]
Store = Annotated[Path, typer.Argument(metavar="STORE", show_default=False, help=("Clip store to write, a folder."))]


@app.callback()
def describe() -> None:
    """Simulate or import clips, learn from scenes, predict, score a submission, rerun a chapter."""


@app.command(
    epilog="""\b
Examples:
  mmlib simulate store/ --profile tiny
  mmlib simulate store/ --profile quick --seed 3 --set contaminated=0.3
  mmlib simulate official/ --profile quick --as-official"""
)
def simulate(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write.", show_default=False)],
    profile: Annotated[Profile, typer.Option(help="How many identities.")] = Profile.quick,
    seed: Annotated[int, typer.Option(min=0, help="Which world; the same seed gives the same bytes.")] = 0,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="NAME=VALUE",
            help=("Change a setting of the simulator; repeat for more. A wrong name lists them."),
        ),
    ] = None,
    as_official: Annotated[
        bool, typer.Option("--as-official", help=("Write the challenge's own files instead of a clip store."))
    ] = False,
    overwrite: Overwrite = False,
) -> None:
    """Draw a simulated world of clips.

    It becomes a clip store, or the challenge's own files.
    """
    from mmlib.data.simulate import settings_for
    from mmlib.data.simulate import simulate as draw

    chosen = settings_for(profile.value, **read_settings(settings or []))
    with _writing(out):
        if as_official:
            lines = _draw_official(out, chosen, seed, overwrite)
        else:
            lines = _summary(draw(out, chosen, seed, overwrite=overwrite, progress=sys.stderr.isatty()))
    print(*lines, sep="\n")
    print(f"simulated: profile {profile.value}, seed {seed}; no score on it is a result on the challenge")


@app.command(
    "import-iqiyi",
    epilog="""\b
Example:
  mmlib import-iqiyi official/ store/""",
)
def import_iqiyi(
    folder: Annotated[
        Path,
        typer.Argument(
            metavar="FOLDER",
            show_default=False,
            help=("The challenge's folder: feat/*.pickle, train_gt.txt, val_gt.txt."),
        ),
    ],
    store: Store,
    skip_bad_records: Annotated[
        bool,
        typer.Option(
            "--skip-bad-records", help=("Leave bad records out and count them, instead of stopping at the first.")
        ),
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
    with _writing(store):
        report = import_folder(
            folder, store, skip_bad_records=skip_bad_records, overwrite=overwrite, progress=sys.stderr.isatty()
        )
    print(*report.lines(), sep="\n")


@app.command(
    "import-features",
    epilog="""\b
Examples:
  mmlib import-features frames.csv features.npy store/
  mmlib import-features frames.parquet features.bin store/ --width 128""",
)
def import_features(
    table: Annotated[
        Path,
        typer.Argument(
            metavar="TABLE",
            show_default=False,
            help=("Parquet or CSV: clip, frame, identity (or empty), split, and quality and det where known."),
        ),
    ],
    array: Annotated[
        Path,
        typer.Argument(
            metavar="ARRAY",
            show_default=False,
            help=("A row for each row of TABLE: .npy, or raw little-endian float32 with --width."),
        ),
    ],
    store: Store,
    width: Annotated[int | None, typer.Option(min=1, show_default=False, help=("Dimensions of a raw ARRAY."))] = None,
    overwrite: Overwrite = False,
) -> None:
    """Import embeddings of your own.

    A table of frames and an array beside it become a clip store.
    """
    from rich.console import Console
    from rich.progress import Progress

    from mmlib.data import features

    with (
        _writing(store),
        Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as bar,
    ):
        task = bar.add_task(f"store {array.name}", total=1.0)
        report = features.import_features(
            table,
            array,
            store,
            width=width,
            overwrite=overwrite,
            progress=lambda share: bar.update(task, completed=share),
        )
    print(*report.lines(), sep="\n")


@app.command(
    "import-lfw",
    epilog="""\b
The two files are LFW_tensor.bytes and LFW_labels.tsv, from oss_data/ at
https://github.com/huyhoang17/128D-Facenet-LFW-Embedding-Visualisation

\b
Example:
  mmlib import-lfw oss_data/ store/""",
)
def import_lfw(
    folder: Annotated[
        Path,
        typer.Argument(
            metavar="FOLDER", show_default=False, help=("Folder with the two published files; their sha256 is checked.")
        ),
    ],
    store: Store,
    seed: Annotated[int, typer.Option(min=0, help="Which photographs go together.")] = 0,
    overwrite: Overwrite = False,
) -> None:
    """Import public embeddings of real faces.

    FaceNet embeddings of photographs of Labeled Faces in the Wild become a clip store: each person's
    photographs are grouped into short clips, those of persons with fewer than four into distractors.
    """
    from mmlib.data import features

    with _writing(store):
        report = features.import_lfw(folder, store, seed=seed, overwrite=overwrite)
    print(*report.lines(), sep="\n")


@app.command(
    epilog="""\b
Examples:
  mmlib predict store/ --out result.txt
  mmlib predict store/ --out quick.txt --members 2 --epochs 2
  mmlib predict store/ --out test.txt --system face-only --split test
  mmlib predict store/ --out result.txt --shard 1/4
  mmlib predict store/ --out result.txt --merge 4"""
)
def predict(
    store: Annotated[
        Path, typer.Argument(metavar="STORE", show_default=False, help=("Clip store with labelled train clips."))
    ],
    out: Annotated[Path, typer.Option(metavar="FILE", help="Submission to write.")] = Path("result.txt"),
    system: Annotated[
        System,
        typer.Option(help=("What is trained: the system as described, as its released code has it, or faces alone.")),
    ] = System["one-name"],
    split: Annotated[Split, typer.Option(help="Whose clips are ranked.")] = Split.val,
    epochs: Annotated[
        int | None, typer.Option(min=1, show_default=False, help=("Epochs of a training; else what the system has."))
    ] = None,
    members: Annotated[
        int | None,
        typer.Option(min=1, show_default=False, help=("Use the first so many members of its ensembles; else all.")),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the training.")] = 0,
    labelled_only: Annotated[
        bool, typer.Option("--labelled-only", help=("Leave out identities without a labelled clip in the split."))
    ] = False,
    device: Annotated[Device, typer.Option(help="auto is a GPU where there is one.")] = Device.auto,
    keep_members: Annotated[
        bool, typer.Option("--keep-members", help=("Leave the trained members in FILE.members."))
    ] = False,
    shard: Annotated[
        str | None,
        typer.Option(
            metavar="I/N",
            show_default=False,
            help=("Rank the I-th of N parts of the clips, and leave FILE to --merge."),
        ),
    ] = None,
    merge: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            show_default=False,
            help=("Write FILE from N shards; those that are missing are ranked first."),
        ),
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Train a system and write its submission.

    It trains on the train clips of a store and ranks the val clips for every identity. A run that was stopped
    goes on with the member it was in when the same command is given again. Commands with other shards of one FILE
    may run at the same time, on machines that share its folder: each member is trained by one of them.
    """
    from mmlib.submit import predict as train_and_rank
    from mmlib.submit import predict_shard

    asked = dict(
        system=system.value,
        split=split.value,
        epochs=epochs,
        members=members,
        seed=seed,
        device=device.value,
        overwrite=overwrite,
        progress=sys.stderr.isatty(),
    )
    with _writing(out):
        if shard is not None:
            if merge is not None or labelled_only or keep_members:
                raise ValueError(
                    "--shard goes without --merge, --labelled-only and --keep-members, which say how FILE is written"
                )
            report = predict_shard(store, out, *read_shard(shard), **asked)
        else:
            report = train_and_rank(
                store, out, labelled_only=labelled_only, keep_members=keep_members, shards=merge, **asked
            )
    print(*report.lines, sep="\n")


@app.command(
    epilog="""\b
Examples:
  mmlib evaluate val_gt.txt result.txt
  mmlib evaluate val_gt.txt result.txt --json"""
)
def evaluate(
    truth: Annotated[
        Path, typer.Argument(metavar="GT", show_default=False, help=("Ground truth, in the format of val_gt.txt."))
    ],
    result: Annotated[
        Path,
        typer.Argument(
            metavar="RESULT", show_default=False, help=("Submission: an identity and its clips a line, best first.")
        ),
    ],
    as_json: Annotated[
        bool, typer.Option("--json", help=("Print one JSON object, with the AP of each identity."))
    ] = False,
) -> None:
    """Print the official score of a submission.

    MAP@100 is a fraction in [0, 1], as is top-1, the share of identities whose first clip is right.
    """
    from mmlib.data.submission import read_result, read_val_truth
    from mmlib.metrics import bootstrap_interval, official_score

    wanted = read_val_truth(truth)
    ranked = read_result(result, id_num=len(wanted[0]))
    try:
        score = official_score(wanted, ranked)
    except ValueError as error:
        raise ValueError(f"{result}: {error}") from None
    low, high = bootstrap_interval(score.ap)
    if as_json:
        # Of an identity that the ground truth repeats, the last line holds.
        print(
            json.dumps(
                {
                    "map_at_100": score.map_at_k,
                    "top1": score.top1,
                    "low": low,
                    "high": high,
                    "queries": len(score.ap),
                    "ap": dict(zip(wanted[0], score.ap.tolist())),
                }
            )
        )
        return
    print(f"MAP@100 {score.map_at_k:.6f}")
    print(f"95% interval {low:.6f} to {high:.6f}, a bootstrap over identities")
    print(f"top-1 {score.top1:.6f}")
    print(f"queries {len(score.ap)}")


@app.command(
    epilog="""\b
Examples:
  mmlib rerun 04_aggregation -p profile=tiny
  mmlib rerun 04 -p 'seeds=[3, 4]' -p data=store/ --out out.ipynb"""
)
def rerun(
    chapter: Annotated[
        str,
        typer.Argument(
            metavar="CHAPTER", show_default=False, help=("Name or number of a chapter, such as 04_aggregation or 04.")
        ),
    ],
    parameters: Annotated[
        list[str] | None,
        typer.Option(
            "-p",
            "--parameter",
            metavar="NAME=VALUE",
            help=("Change a parameter; repeat for more. Values are YAML, lists too. A wrong name lists them."),
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.ipynb",
            show_default=False,
            help=("Notebook to write, replaced if it exists; else CHAPTER-rerun.ipynb, here."),
        ),
    ] = None,
) -> None:
    """Run a chapter with other parameters.

    The executed notebook is kept; that of a run that failed is kept as FILE.failed.ipynb.
    """
    try:
        import papermill
        from nbclient.exceptions import DeadKernelError
    except ImportError as error:
        raise ValueError(f"rerun needs papermill ({error}): pip install -e '.[book]' in the checkout") from None
    logging.getLogger("papermill").setLevel(logging.CRITICAL)  # what it would log is raised too
    notebook = find_chapter(chapter)
    values = read_parameters(notebook, parameters or [])
    out = Path(f"{notebook.stem}-rerun.ipynb") if out is None else out
    if out.suffix != ".ipynb":
        raise ValueError(f"--out {out}: the name of a notebook ends in .ipynb")
    if out.resolve().is_relative_to(CHAPTERS.resolve()):
        raise ValueError(f"--out {out}: lies among the chapters, which stay as they are")
    if out.is_dir():
        raise ValueError(f"--out {out}: is a folder")
    partial = out.with_name(f".{out.stem}.partial-{os.getpid()}.ipynb")
    failed = out.with_name(f"{out.stem}.failed.ipynb")
    with _writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        try:
            papermill.execute_notebook(
                notebook, partial, values, progress_bar=sys.stderr.isatty(), extra_arguments=["--log-level=CRITICAL"]
            )
            partial.replace(out)
        except papermill.PapermillExecutionError as error:
            partial.replace(failed)
            raise ValueError(
                f"{notebook.stem}, cell {error.cell_index + 1}: {error.ename}: {error.evalue}; {failed} shows where"
            ) from None
        except DeadKernelError:
            partial.replace(failed)
            raise ValueError(f"{notebook.stem}: the kernel died, perhaps out of memory; {failed} shows where") from None
        finally:
            partial.unlink(missing_ok=True)
    print(f"wrote {out}")


@app.command(
    epilog="""\b
Examples:
  mmlib keep book/results/full.jsonl.gz
  mmlib keep quick.jsonl.gz --profile quick"""
)
def keep(
    out: Annotated[
        Path,
        typer.Argument(
            metavar="FILE",
            show_default=False,
            help=("File of records to write, replaced if it exists; the book reads book/results/full.jsonl.gz."),
        ),
    ],
    profile: Annotated[str, typer.Option(help="Size of the worlds: tiny, quick or full.")] = "full",
) -> None:
    """Keep the records of reruns on whole worlds of one size, for the book to show beside its own.

    They are those in the cache that this version of the code made. Average precisions are kept to four digits.
    """
    from mmlib.records import cache_folder, stored, write_results

    records = stored(profile)
    if not records:
        raise ValueError(
            f"{cache_folder()}: no records of simulated worlds of profile {profile!r} by this version of the code"
        )
    with _writing(out):
        write_results(out, [replace(record, ap=[round(value, 4) for value in record.ap]) for record in records])
    seeds = sorted({record.experiment["seed"] for record in records})
    print(f"wrote {len(records)} records, seeds {', '.join(map(str, seeds))}: {out}")


@app.command(
    "render-scenes",
    epilog="""\b
Example:
  mmlib render-scenes store/ img/""",
)
def render(
    store: Annotated[Path, typer.Argument(metavar="STORE", show_default=False, help="Simulated clip store.")],
    out: Annotated[
        Path,
        typer.Argument(metavar="OUT", show_default=False, help=("Folder to write, with a folder of pictures a clip.")),
    ],
    size: Annotated[int, typer.Option(min=16, help="Side of a picture in pixels.")] = 64,
    overwrite: Overwrite = False,
) -> None:
    """Render scene pictures of simulated clips.

    They show the show and the set of a clip, not who is in it.
    """
    from mmlib.data.render import render_scenes
    from mmlib.data.store import ClipStore

    with _writing(out):
        drawn = render_scenes(ClipStore.open(store), out, size=size, overwrite=overwrite)
    print(f"pictures: {drawn.pictures} of {drawn.clips} clips")
    print("simulated: no score on them is a result on the challenge")


@app.command(
    epilog="""\b
Examples:
  mmlib scene store/ official/img/ out/ --weights pretrained
  mmlib scene store/ official/img/ out/ --weights seresnext50.safetensors --epochs 20
  mmlib scene store/ img/ out/ --architecture narrow_seresnext26"""
)
def scene(
    store: Annotated[Path, typer.Argument(metavar="STORE", show_default=False, help="Clip store.")],
    images: Annotated[
        Path,
        typer.Argument(metavar="IMAGES", show_default=False, help=("Folder of its clips' pictures, <clip>/<n>.jpg.")),
    ],
    out: Annotated[
        Path,
        typer.Argument(
            metavar="OUT", show_default=False, help=("Clip store to write: STORE with other scene features.")
        ),
    ],
    architecture: Annotated[
        str,
        typer.Option(help=("seresnext50_32x4d, legacy_seresnext50_32x4d, narrow_seresnext26 or narrow_seresnext14.")),
    ] = "seresnext50_32x4d",
    weights: Annotated[
        str, typer.Option(help=("A file of weights, or pretrained to download timm's; else from scratch."))
    ] = "",
    epochs: Annotated[int, typer.Option(min=1, help="Epochs of fine-tuning.")] = 20,
    seed: Annotated[int, typer.Option(min=0, help="Of the training and of the pictures drawn.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    decoded: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", show_default=False, help=("Keep the decoded pictures there for further runs.")),
    ] = None,
    compile_mode: Annotated[
        str,
        typer.Option(
            metavar="MODE", show_default=False, help=("Compile the network: default, or max-autotune for long runs.")
        ),
    ] = "",
    overwrite: Overwrite = False,
) -> None:
    """Fine-tune a scene network and extract its features.

    An SE-ResNeXt learns the identities from one picture a clip; its features become the scene modality of a new
    clip store. The other modalities are copied. Started by accelerate launch or torchrun, one process a GPU, the
    processes share every batch.
    """
    from mmlib import scene as network
    from mmlib.data.images import count_converted, index_images
    from mmlib.data.render import picture_size
    from mmlib.data.store import ClipStore
    from mmlib.launch import launched

    settings = network.settings_for(architecture, weights, epochs=epochs)
    clips, progress = ClipStore.open(store), sys.stderr.isatty()
    listed = index_images(images, clips)
    rendered = picture_size(listed, clips)
    with _writing(out):
        modes = network.fine_tune_to_store(
            clips,
            listed,
            settings,
            out,
            seed=seed,
            device=device,
            decoded=decoded,
            compile_mode=compile_mode,
            overwrite=overwrite,
            progress=progress,
        )
    if launched(device).index:
        return  # the first of several processes reports
    print(*listed.lines(), sep="\n")
    if converted := count_converted(modes):
        print(converted)
    print(
        f"scene: {sum(modes.values())} clips, {architecture}, "
        f"{f'weights {weights}' if weights else 'from scratch'}, epochs: {epochs}"
    )
    if rendered:
        print("simulated: the pictures are rendered; no score on them is a result on the challenge")


def main() -> None:
    """Run the command line."""
    # how a batch system stops a run: unwind, so that nothing half-made stays
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    app(prog_name="mmlib")


def _draw_official(out: Path, settings: "Settings", seed: int, overwrite: bool) -> list[str]:
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


def _summary(store: "ClipStore") -> list[str]:
    train, val = store.select("train"), store.select("val")
    distractors = store.select("val", labelled=False)
    frames = ", ".join(f"{len(modality.feature)} {name}" for name, modality in store.modalities.items())
    return [
        f"clips: {len(store)}, {len(train)} train and {len(val)} val",
        f"frames: {frames}",
        f"identities: {len(store.identities)}",
        f"distractors: {len(distractors)}",
    ]


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Have an error of the system that names no file, such as a full disk, name `path`."""
    try:
        yield
    except OSError as error:
        if error.strerror and error.filename is None:
            error.filename = str(path)
        raise


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror if error.filename is None else f"{error.filename}: {error.strerror}"
    return str(error) or type(error).__name__


def _stop(reason: str, status: int = 1) -> None:
    print("mmlib: error:", " ".join(line.strip() for line in reason.splitlines()), file=sys.stderr)
    raise typer.Exit(status) from None


def _discard_output() -> None:
    """Drop printed text that cannot be written, or Python would try once more at exit and complain."""
    try:
        print(end="", flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


CHAPTERS = Path(__file__).parents[1] / "book" / "chapters"


def read_settings(texts: list[str]) -> dict[str, float]:
    """Read NAME=VALUE texts as settings of the simulator."""
    from mmlib.data.simulate import Settings

    kinds = {field.name: type(field.default) for field in fields(Settings)}
    values = {}
    for name, text in _split_pairs("--set", texts).items():
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


def read_parameters(notebook: Path, texts: list[str]) -> dict[str, object]:
    """Read NAME=VALUE texts as parameters that the notebook has."""
    import papermill
    import yaml

    known = papermill.inspect_notebook(notebook)
    values = {}
    for name, text in _split_pairs("-p", texts).items():
        if name not in known:
            raise ValueError(f"-p {name}: {notebook.stem} has no such parameter; it has {', '.join(known) or 'none'}")
        try:
            values[name] = yaml.safe_load(text)
        except yaml.YAMLError:
            raise ValueError(f"-p {name}: {text!r} is not YAML") from None
        if isinstance(values[name], str):  # YAML takes 1e-3 for text, papermill for a number
            try:
                values[name] = float(values[name])
            except ValueError:
                pass
    return values


def read_shard(text: str) -> tuple[int, int]:
    """Read I/N."""
    number, slash, total = text.partition("/")
    if not (slash and number.isdecimal() and total.isdecimal()):
        raise ValueError(f"--shard {text}: expected I/N, such as 1/4")
    return int(number), int(total)


def _split_pairs(option: str, texts: list[str]) -> dict[str, str]:
    pairs = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise ValueError(f"{option} {text}: expected NAME=VALUE")
        if name in pairs:
            raise ValueError(f"{option} {name}: given twice, {pairs[name]!r} and {value!r}")
        pairs[name] = value
    return pairs


def find_chapter(name: str) -> Path:
    """Return the notebook of the chapter with that name or number."""
    chapters = sorted(CHAPTERS.glob("*.ipynb"))
    if not chapters:
        raise ValueError(f"{CHAPTERS}: no chapters there; rerun works from a checkout of the repository")
    stem = name.removesuffix(".ipynb")
    found = [path for path in chapters if path.stem == stem or path.stem.startswith(f"{stem}_")]
    if len(found) != 1:
        listed = ", ".join(path.stem for path in found or chapters)
        number = "more than one" if found else "no"
        raise ValueError(f"{name}: {number} chapter has that name; there are {listed}")
    return found[0]
