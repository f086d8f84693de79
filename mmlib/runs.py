"""The record of every number: make it, say which library made it, read and write committed ones.

Records live under ``MMLIB_CACHE`` (else the user's cache folder), in a folder named after :func:`library_hash`: an edit
of code that decides numbers starts an empty one, an edit of prose or figures does not.  ``mmlib.sweep`` fills it.
"""

from __future__ import annotations

import ast
import gzip
import hashlib
import json
import os
import platform
import subprocess
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path

import numpy as np
import torch
from platformdirs import user_cache_dir

from mmlib import ensemble, metrics
from mmlib.clips.calibration import QUALITY_EDGES
from mmlib.clips.store import ClipStore
from mmlib.experiment import Experiment, torch_device
from mmlib.fitting import training_clips
from mmlib.retrieval import Retrieval, retrieve

PACKAGE = Path(__file__).parent
RESULTS = PACKAGE.parent / "book" / "results"  # committed records
DECIDING = ("clips/arrays.py", "clips/sampling.py", "clips/store.py", "clips/writer.py", "clips/calibration.py",
            "clips/simulate.py", "aggregate.py", "losses.py", "models.py", "ensemble.py", "together.py",
            "train.py", "rank.py", "combine.py", "metrics.py", "experiment.py", "fitting.py", "retrieval.py",
            "runs.py")
LENGTH_EDGES = [1, 5, 10, 15, 20, 30, 40, 241]  # frames
PERCENTILE_EDGES = [*QUALITY_EDGES, 40, 60, 80, 100]
WRONG_EDGES = [0, 1e-9, .1, .25, .5, .8, 1.001]  # share of frames


@dataclass(frozen=True)
class Record:
    """What a run leaves: enough to redo every figure and comparison without training.

    measures: map_at_100, top1 (queries whose first clip is right), clip_top1 (labelled clips recognised), counts; of an
    ensemble the mean over members of the identities lost and of clip_top1, and the share of clips on which two members
    disagree.
    ap: average precision of each query, in the order of the store's identities.  breakdown: for groups of clips by
    ``frames``, ``quality`` (percentile) and, where known, ``wrong`` (share of frames of another person): lower edge,
    upper edge, clips, top-1, and their mean precision (``metrics.clip_precision``, of which MAP is a mean).
    """

    key: str
    library: str
    experiment: dict
    simulated: bool
    measures: dict[str, float]
    ap: list[float]
    breakdown: dict[str, list[list[float]]]
    losses: list[float]
    seconds: dict[str, float]
    versions: dict[str, str]
    device: str
    made: str
    commit: str

    def row(self) -> dict:
        """Return the experiment's fields and the measures as one flat row."""
        training = {f"training.{name}": value for name, value in self.experiment["training"].items()}
        settings = {name: value for name, value in self.experiment["settings"]}
        return {**self.experiment, **training, **settings, **self.measures, "simulated": self.simulated}


def cache_folder() -> Path:
    """Return the folder of simulated worlds and records: ``MMLIB_CACHE``, else the user's cache folder."""
    return Path(os.environ.get("MMLIB_CACHE") or user_cache_dir("mmlib", appauthor=False))


@cache
def library_hash() -> str:
    """Hash what stands in the modules that decide numbers, 12 hexadecimal digits.

    As syntax trees without docstrings, sorted, and without the imports of the library's own modules: in which of them
    a function stands, and in which place, decides nothing.
    """
    digest = hashlib.sha256()
    parts = [repr(part) for name in DECIDING for part in _tree(ast.parse((PACKAGE / name).read_text()).body)]
    for part in sorted(part for part in parts if not part.startswith(_OWN_IMPORT)):
        digest.update(part.encode() + b"\0")
    digest.update((PACKAGE / "clips" / "clips_per_identity_joint.csv").read_bytes())
    return digest.hexdigest()[:12]


_OWN_IMPORT = "('ImportFrom', [('module', \"'mmlib"


def _tree(node):
    """Reduce a syntax tree to what every supported Python version agrees on: names and non-empty fields."""
    if isinstance(node, list):
        # A string that stands alone is a docstring or does nothing.
        return [_tree(item) for item in node
                if not (isinstance(item, ast.Expr) and isinstance(item.value, ast.Constant)
                        and isinstance(item.value.value, str))]
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = [(name, _tree(value)) for name, value in ast.iter_fields(node) if value not in (None, [])]
    return type(node).__name__, fields


# -- running --------------------------------------------------------------------------------------------------------


def run(experiment: Experiment, store: ClipStore, *, device: str = "auto", progress: bool = False,
        trained: dict | None = None) -> Record:
    """Retrieve, score, and make the record; ``trained`` as for ``retrieve``."""
    found = retrieve(experiment, store, device=device, progress=progress, trained=trained)
    model = found.members[0].model
    identity, ap = store.identity_of(found.gallery), found.ap
    labelled = identity >= 0
    right = found.predicted == identity
    precision = metrics.clip_precision(found.ranking, found.hits, len(found.gallery))
    measures = {"map_at_100": float(ap.mean()), "top1": float(found.hits[:, 0].mean()),
                "clip_top1": float(right[labelled].mean()), "train_clips": len(found.members[0].clips),
                "gallery_clips": len(found.gallery), "queries": len(found.queries),
                "identities": len(store.identities),
                "parameters": sum(p.numel() for p in model.parameters()) if found.members[0].losses else 0}
    measures |= _of_members(experiment, store, found)
    clips = found.gallery[labelled]
    return Record(
        key=experiment.key(), library=library_hash(), experiment=asdict(experiment), simulated=store.meta["simulated"],
        measures=measures, ap=[round(float(a), 6) for a in ap],
        breakdown=_breakdown(store, experiment.modality, clips, right[labelled], precision[labelled]),
        losses=[round(x, 5) for x in found.members[0].losses], seconds=found.seconds,
        versions={"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
        device=torch.cuda.get_device_name() if torch_device(device).type == "cuda" else "CPU",
        made=datetime.now(UTC).isoformat(timespec="seconds"), commit=commit())


def _of_members(experiment: Experiment, store: ClipStore, found: Retrieval) -> dict[str, float]:
    """Measure an ensemble and what its members lack; empty for one model without contexts."""
    out = {f"train_without_{name}": int((store.modalities[name].count[found.members[0].clips] == 0).sum())
           for name in experiment.context}
    out |= {f"gallery_without_{name}": int((store.modalities[name].count[found.gallery] == 0).sum())
            for name in experiment.context}
    scored = (found.by_member >= 0).all(0) & (store.identity_of(found.gallery) >= 0)
    if len(found.members) > 1 and scored.any():
        trained = store.identity_of(training_clips(experiment, store))
        lost = [ensemble.lost_identities(trained, store.identity_of(member.clips)) for member in found.members]
        right = found.by_member[:, scored] == store.identity_of(found.gallery[scored])
        out |= {"lost_identities": float(np.mean(lost)), "member_clip_top1": float(right.mean()),
                "disagreement": ensemble.disagreement(found.by_member[:, scored])}
    return out


def _breakdown(store: ClipStore, modality: str | None, clips: np.ndarray, right: np.ndarray,
               precision: np.ndarray) -> dict[str, list[list[float]]]:
    """Group labelled gallery clips by length, quality and share of wrong frames; see ``Record``."""
    modality = modality or "face"
    if modality not in store.modalities:
        return {}
    source = store.modalities[modality]
    has = source.count[clips] > 0
    clips, right, precision = clips[has], right[has], precision[has]
    known = {"frames": (source.count[clips], LENGTH_EDGES)}
    if "quality" in source.columns and len(clips):
        mean = store.clip_means(modality, "quality")[clips]
        known["quality"] = (mean.argsort().argsort() / len(clips) * 100, PERCENTILE_EDGES)
    if "wrong" in source.columns:
        known["wrong"] = (store.clip_means(modality, "wrong")[clips], WRONG_EDGES)
    out = {}
    for name, (value, edges) in known.items():
        group = np.digitize(value, edges) - 1
        rows = [(low, high, group == i) for i, (low, high) in enumerate(zip(edges, edges[1:]))]
        out[name] = [[low, high, int(chosen.sum()), round(float(right[chosen].mean()), 5),
                      round(float(precision[chosen].mean()), 5)] for low, high, chosen in rows if chosen.any()]
    return out


# -- records --------------------------------------------------------------------------------------------------------


def write_results(path: str | Path, records: Iterable[Record]) -> None:
    """Write records for committing: gzipped JSON, one record a line, the same bytes for the same records."""
    lines = "".join(json.dumps(asdict(record)) + "\n" for record in records)
    write_whole(Path(path), gzip.compress(lines.encode(), mtime=0))


def read_results(name: str) -> list[Record]:
    """Read committed records by the name of their file in ``book/results``; none if there is no such file."""
    path = RESULTS / name
    if not path.exists():
        return []
    content = path.read_bytes()
    if not content:
        raise ValueError(f"{path}: not a file of records (it is empty)")
    try:
        return [Record(**json.loads(line)) for line in gzip.decompress(content).splitlines()]
    except (OSError, EOFError, ValueError, TypeError) as error:
        raise ValueError(f"{path}: not a file of records ({error})") from None


def write_whole(path: Path, content: bytes) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        partial.write_bytes(content)
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


@cache
def commit() -> str:
    """Return the short commit of the repository the library lies in, with + if files differ; else ``none``."""
    try:
        git = ["git", "-C", str(PACKAGE), "describe", "--always", "--dirty=+", "--exclude=*"]
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "none"
