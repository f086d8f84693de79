"""Commands that train, rank, score, and run chapters again."""

from __future__ import annotations

import html
import json
import logging
import os
import re
import sys
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from mmlib import parameters
from mmlib.cli.options import PAIRS, Device, Overwrite, Where, argument, command, option, say, split_pairs, writing

CHAPTERS = Path(__file__).parents[2] / "book" / "chapters"
System = StrEnum("System", ["one-name", "one-name-as-coded", "face-only"])
OWN_RUN = re.compile(r"\*\*This page's own run|### What this run adds")  # what a chapter says above tables of it
MOST = 12  # arms whose score is printed after a chapter
Split = StrEnum("Split", ["val", "test"])


@command(
    "predict store/ --out result.txt",
    "predict store/ --out quick.txt --members 2 --epochs 2",
    "predict store/ --out test.txt --system face-only --split test",
    "predict store/ --out result.txt --shard 1/4",
    "predict store/ --out result.txt --merge 4",
)
def predict(
    store: Annotated[Path, argument("STORE", "Clip store with labelled train clips.")],
    out: Annotated[Path, typer.Option(metavar="FILE", help="Submission to write.")] = Path("result.txt"),
    system: Annotated[System, option("As described, as coded by its team, or of faces alone.")] = System["one-name"],
    split: Annotated[Split, option("Whose clips are ranked.")] = Split.val,
    epochs: Annotated[int | None, option("Of a training; else those of the system.", metavar="N", least=1)] = None,
    members: Annotated[int | None, option("First members of its ensembles; else all.", metavar="N", least=1)] = None,
    seed: Annotated[int, option("Of the training.", least=0)] = 0,
    labelled_only: Annotated[bool, option("Only identities labelled in the split.", "--labelled-only")] = False,
    device: Where = Device.auto,
    keep_members: Annotated[bool, option("Leave the trained members in FILE.members.", "--keep-members")] = False,
    shard: Annotated[str | None, option("Rank the I-th of N parts of the clips, for --merge.", metavar="I/N")] = None,
    merge: Annotated[int | None, option("Write FILE from N shards, made if missing.", metavar="N", least=1)] = None,
    overwrite: Overwrite = False,
) -> None:
    """Train a system and write its submission.

    It trains on the train clips of a store and ranks the val clips for every identity. A run that was stopped
    goes on with the member it was in when the same command is given again. Commands with other shards of one FILE
    may run at the same time, on machines that share its folder: each member is trained by one of them.
    """
    from mmlib import submit

    asked = {"system": system.value, "split": split.value, "epochs": epochs, "members": members, "seed": seed}
    asked |= {"device": device.value, "overwrite": overwrite, "progress": sys.stderr.isatty()}
    asked["say"] = say
    written = {"labelled_only": labelled_only, "keep_members": keep_members, "shards": merge}
    if shard is not None and any(written.values()):
        raise ValueError(
            "--shard goes without --merge, --labelled-only and --keep-members: they say how FILE is written"
        )
    if shard is not None and not re.fullmatch(r"\d+/\d+", shard):
        raise ValueError(f"--shard {shard}: expected I/N, such as 1/4")
    with writing(out):
        if shard:
            report = submit.predict_shard(store, out, *map(int, shard.split("/")), **asked)
        else:
            report = submit.predict(store, out, **asked, **written)
    print(*report.lines, sep="\n")


@command(
    "evaluate val_gt.txt result.txt",
    "evaluate store/ result.txt",
    "evaluate val_gt.txt result.txt --json",
    "evaluate gt.txt result.txt --strict",
)
def evaluate(
    truth: Annotated[
        Path, argument("GT", "Ground truth, in the format of val_gt.txt, or the clip store that was ranked.")
    ],
    result: Annotated[Path, argument("RESULT", "Submission: an identity and its clips a line, best first.")],
    as_json: Annotated[bool, option("Print one JSON object, with the AP of each identity.", "--json")] = False,
    strict: Annotated[bool, option("MAP@100 alone, as the challenge's script has it.", "--strict")] = False,
) -> None:
    """Print the official score of a submission.

    MAP@100 is a fraction in [0, 1], as is top-1, the share of identities whose first clip is right. Names are
    divided by any white space; with --strict by every single blank, as in the script of the challenge, for which two
    blanks have a clip without a name between them. Chapter 02 of the book has a table of where the two differ. A clip
    store knows the identities of its val clips; one without any has no line in that truth.
    """
    from mmlib.data.iqiyi import val_truth
    from mmlib.data.store import ClipStore
    from mmlib.data.submission import (
        answered,
        check_as_script,
        count_unknown,
        read_as_script,
        read_result,
        read_val_truth,
        remarks,
        without_lines,
    )
    from mmlib.metrics import bootstrap_interval, official_score, script_score

    known, unasked = None, set()
    if truth.is_dir():
        names, clips = val_truth(ClipStore.open(truth), suffix=".mp4" * strict)
        unasked = {name for name, of in zip(names, clips) if not of}
        known = without_lines((names, clips), unasked)
        if not known[0]:
            raise ValueError(f"{truth}: no val clip has an identity, so there is nothing to score")
    if strict:
        whole = read_as_script(result)
        lines = known or read_as_script(truth), without_lines(whole, unasked)
        check_as_script((truth, result), *lines)
        for line in remarks(result, lines[0], whole):
            say(f"mmlib: note: {line}")
        value = script_score(*lines)
        print(json.dumps({"map_at_100": value}) if as_json else f"MAP@100 {value:.6f}")
        return
    wanted = known or read_val_truth(truth)
    whole = read_result(result, known={*wanted[0]})
    ranked = without_lines(whole, unasked)
    score = official_score(wanted, answered(result, wanted, ranked))
    for line in remarks(result, wanted, whole):
        say(f"mmlib: note: {line}")
    low, high = bootstrap_interval(score.ap) if len(score.ap) > 1 else (None, None)
    unknown = count_unknown(wanted, ranked)
    if not score.ap.any():
        alien = [f"{n} {kind}" for kind, (n, lacking) in unknown.items() if n == lacking]
        why = f"{truth} names none of its {' and '.join(alien)}" if alien else "no line names a clip of its identity"
        why = f"{why}; are names written alike?"
        if not any(map(len, ranked[1])):
            why = "it names no clip" if ranked[0] else "it is empty"
        elif not any(map(len, wanted[1])):
            why = f"{truth} names no clip"
        say(f"mmlib: warning: {result}: nothing was found: {why}")
    if as_json:
        said = {"map_at_100": score.map_at_k, "top1": score.top1, "low": low, "high": high, "queries": len(score.ap)}
        for kind, (named, lacking) in unknown.items():
            said |= {kind: named, f"unknown_{kind}": lacking}
        # Of an identity that the ground truth repeats, the last line holds.
        print(json.dumps(said | {"ap": dict(zip(wanted[0], score.ap.tolist()))}))
        return
    print(f"MAP@100 {score.map_at_k:.6f}")
    bounds = "none, for one identity" if low is None else f"{low:.6f} to {high:.6f}, a bootstrap over identities"
    print(f"95% interval {bounds}")
    print(f"top-1 {score.top1:.6f}")
    print(f"queries {len(score.ap)}")
    for kind, (named, lacking) in unknown.items():
        print(f"{kind} in the result {named}, of which the ground truth does not name {lacking}")


@command("rerun 04_aggregation -p profile=tiny", "rerun 04 -p 'seeds=[3, 4]' -p data=store/ --out out.ipynb")
def rerun(
    chapter: Annotated[str, argument("CHAPTER", "Name or number of a chapter, such as 04_aggregation or 04.")],
    given: Annotated[list[str] | None, option("Change a parameter.", "-p", "--parameter", **PAIRS)] = None,
    out: Annotated[Path | None, option("Notebook to write; else CHAPTER-rerun.ipynb.", metavar="FILE.ipynb")] = None,
) -> None:
    """Run a chapter with other parameters.

    The executed notebook is kept, in the place of an older one; that of a run that failed is kept as
    FILE.failed.ipynb. -p may be repeated; a wrong name lists the parameters.
    """
    try:
        import papermill
        from nbclient.exceptions import DeadKernelError
    except ImportError as error:
        raise ValueError(f"rerun needs papermill ({error}): pip install -e '.[book]' in the checkout") from None
    logging.getLogger("papermill").setLevel(logging.CRITICAL)  # what it would log is raised too
    notebook = find_chapter(chapter)
    values = parameters.read_texts(notebook, split_pairs("-p", given or []))
    described = Path(str(values.get("data", "simulated")), "store.json")
    if str(described.parent) != "simulated" and not described.exists():  # a kernel would take seconds to say so
        raise ValueError(f"-p data={described.parent}: is no clip store, for there is no {described}")
    out = out or Path(f"{notebook.stem}-rerun.ipynb")
    if out.suffix != ".ipynb":
        raise ValueError(f"--out {out}: the name of a notebook ends in .ipynb")
    if out.resolve().is_relative_to(CHAPTERS.resolve()):
        raise ValueError(f"--out {out}: lies among the chapters, which stay as they are")
    if out.is_dir():
        raise ValueError(f"--out {out}: is a folder")
    names = f".{out.stem}.partial-{os.getpid()}.ipynb", f"{out.stem}.failed.ipynb"
    partial, failed = map(out.with_name, names)
    options = {"progress_bar": sys.stderr.isatty(), "extra_arguments": ["--log-level=CRITICAL"]}
    with writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        try:
            executed = papermill.execute_notebook(notebook, partial, values, **options)
            partial.replace(out)
        except (papermill.PapermillExecutionError, DeadKernelError) as error:
            partial.replace(failed)
            raise ValueError(f"{notebook.stem}{_failure(error)}; {failed} shows where") from None
        except RuntimeError as error:  # as jupyter_client says that a kernel ended before it answered
            raise ValueError(f"{notebook.stem}: {error}{_python()}; that Python needs ipykernel") from None
        finally:
            partial.unlink(missing_ok=True)
    print(*_scores(executed["cells"]), f"wrote {out}", sep="\n")


def _scores(cells: list) -> list[str]:
    """Return lines of the first table of MAP@100 in an executed chapter, of its own run where kept records stand too.

    Of its columns those stay that say the arm, which come first, its MAP@100, what it gains and the intervals.
    """
    own = [at for at, cell in enumerate(cells) if cell["cell_type"] == "markdown" and OWN_RUN.search(cell["source"])]
    outputs = [output for cell in cells[own[0] if own else 0 :] for output in cell.get("outputs", [])]
    for output in outputs:
        shown = "".join(output.get("data", {}).get("text/html", ""))
        rows = [re.findall("<t[hd][^>]*>(.*?)</t[hd]>", row, re.S) for row in re.findall("<tr>(.*?)</tr>", shown, re.S)]
        head = rows[0] if rows and len({*map(len, rows)}) == 1 else []
        if score := next((at for at, name in enumerate(head) if "MAP@100" in name), 0):
            kept = [at for at, name in enumerate(head) if at < score or re.search("MAP@100|gain|interval", name)]
            texts = [[" ".join(html.unescape(row[at]).split()) for at in kept] for row in rows]
            wide = [max(map(len, column)) for column in zip(*texts)]
            lines = ["  ".join(map(str.ljust, row, wide)).rstrip() for row in texts]
            return lines[: 1 + MOST] + [f"... {len(lines) - 1 - MOST} more"] * (len(lines) > 1 + MOST)
    return []


def _failure(error: Exception) -> str:
    """Say what a chapter died of; of a missing package, which Python looked for it."""
    if not hasattr(error, "ename"):
        return ": the kernel died, perhaps out of memory"
    where = _python() if error.ename == "ModuleNotFoundError" else ""
    return f", cell {error.cell_index + 1}: {error.ename}: {error.evalue}{where}"


def _python() -> str:
    from jupyter_client.kernelspec import get_kernel_spec

    return f" in the kernel python3, which runs {get_kernel_spec('python3').argv[0]}"


@command("keep book/results/full.jsonl.gz", "keep quick.jsonl.gz --profile quick")
def keep(
    out: Annotated[Path, argument("FILE", "File to write, replaced if it exists; the book has a full.jsonl.gz.")],
    profile: Annotated[str, option("Size of the worlds: tiny, quick or full.")] = "full",
) -> None:
    """Keep the records of reruns on whole worlds of one size, for the book to show beside its own.

    They are those in the cache that this version of the code made. Average precisions are kept to four digits.
    """
    from mmlib.records import cache_folder, stored, write_results

    records = stored(profile)
    if not records:
        raise ValueError(f"{cache_folder()}: no records of simulated {profile!r} worlds by this version of the code")
    with writing(out):
        write_results(out, [replace(record, ap=[round(value, 4) for value in record.ap]) for record in records])
    seeds = sorted({record.experiment["seed"] for record in records})
    print(f"wrote {len(records)} records, seeds {', '.join(map(str, seeds))}: {out}")


@command(
    "scene store/ official/img/ out/ --weights pretrained",
    "scene store/ official/img/ out/ --weights seresnext50.safetensors --epochs 20",
    "scene store/ img/ out/ --architecture narrow_seresnext26",
)
def scene(
    store: Annotated[Path, argument("STORE", "Clip store.")],
    images: Annotated[Path, argument("IMAGES", "Folder of its clips' pictures, <clip>/<n>.jpg.")],
    out: Annotated[Path, argument("OUT", "Clip store to write: STORE with other scene features.")],
    architecture: Annotated[str, option("Of the network; a wrong name lists them.")] = "seresnext50_32x4d",
    weights: Annotated[str, option("A file of weights, or pretrained to download timm's; else from scratch.")] = "",
    epochs: Annotated[int, option("Epochs of fine-tuning.", least=1)] = 20,
    seed: Annotated[int, option("Of the training and of the pictures drawn.", least=0)] = 0,
    batch: Annotated[int | None, option("Clips a step; fewer need less memory.", metavar="N", least=1)] = None,
    device: Where = Device.auto,
    decoded: Annotated[Path | None, option("Keep decoded pictures there for further runs.", metavar="FOLDER")] = None,
    compile_mode: Annotated[str, option("Compile: default, or max-autotune for long runs.", metavar="MODE")] = "",
    overwrite: Overwrite = False,
) -> None:
    """Fine-tune a scene network and extract its features.

    An SE-ResNeXt (seresnext50_32x4d, legacy_seresnext50_32x4d, narrow_seresnext26 or narrow_seresnext14)
    learns the identities from one picture a clip; its features become the scene modality of a new clip store.
    The other modalities are copied. Started by accelerate launch or torchrun, one process a GPU, the processes
    share every batch.
    """
    from mmlib import scene_training
    from mmlib.data.images import count_converted, index_images
    from mmlib.data.render import picture_size
    from mmlib.data.store import ClipStore
    from mmlib.scene import settings_for

    settings = settings_for(architecture, weights, epochs=epochs, **{"batch": batch} if batch else {})
    progress = sys.stderr.isatty()
    run = scene_training.launched(device.value, progress=progress, compile_mode=compile_mode, decoded=decoded)
    clips = ClipStore.open(store)
    listed = index_images(images, clips)
    rendered = picture_size(listed, clips)
    with writing(out):
        _, modes = scene_training.fine_tune_to_store(
            clips, listed, settings, out, seed=seed, run=run, overwrite=overwrite
        )
    if run.index:
        return  # the first of several processes reports
    print(*listed.lines(), sep="\n")
    if converted := count_converted(modes):
        print(converted)
    start = f"weights {weights}" if weights else "from scratch"
    print(f"scene: {sum(modes.values())} clips, {architecture}, {start}, epochs: {epochs}")
    if rendered:
        print("simulated: the pictures are rendered; no score on them is a result on the challenge")


def find_chapter(name: str) -> Path:
    """Return the notebook of the chapter with that name or number."""
    chapters = sorted(CHAPTERS.glob("*.ipynb"))
    if not chapters:
        raise ValueError(f"{CHAPTERS}: no chapters there; rerun works from a checkout of the repository")
    stem = name.removesuffix(".ipynb")
    found = [path for path in chapters if path.stem == stem or path.stem.startswith(f"{stem}_")]
    if len(found) == 1:
        return found[0]
    listed, number = ", ".join(path.stem for path in found or chapters), "more than one" if found else "no"
    raise ValueError(f"{name}: {number} chapter has that name; there are {listed}")
