"""Predict: train a system of the challenge on a store, rank its clips and write the submission.

Every member of the ensemble is saved when it is trained, in a folder beside the result, so that a run that was killed
goes on with the member it was in and ends with the result of an unbroken one.
"""

from __future__ import annotations

import hashlib
import io
import os
import time
import zipfile
from collections import UserDict
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from mmlib.clips.store import ClipStore
from mmlib.clips.truth import RESULT_LIMIT, write_result
from mmlib.experiment import Experiment, torch_device
from mmlib.retrieval import Member, Ranked, make_model, missing_scores, rank_clips, training_clips
from mmlib.runs import library_hash
from mmlib.systems import FACE_ONLY, SYSTEMS, with_members

Key = tuple[Experiment, int]  # a branch and the number of a member


@dataclass(frozen=True)
class Prediction:
    """What a prediction did: the file, its lines, the fate of the split's clips by modality, members, seconds.

    alone: clips ranked by the fallback alone, for want of the modality.  unranked: clips that nothing could rank.
    without: by context, ranked clips that have the modality and lack that context.  unlabelled, untrained: identities
    without a labelled clip in the split, without a training clip.  foreign: files of other runs among the members.
    """

    out: Path
    experiment: Experiment
    simulated: bool
    identities: int
    clips: int
    ranked: int
    alone: int
    unranked: int
    without: dict[str, int]
    unlabelled: int
    untrained: int
    trained: int
    loaded: int
    kept: Path | None
    foreign: int
    seconds: float

    def lines(self) -> list[str]:
        """Say it in sentences for a terminal."""
        e = self.experiment
        second = " or ".join(e.fallback.context) if e.fallback else ""
        lines = [f"wrote {self.out}: {self.identities} identities, at most {RESULT_LIMIT} clips each",
                 f"members: {self.trained} trained, {self.loaded} loaded",
                 f"{e.split}: {self.clips} clips, {self.ranked} ranked"]
        if second:
            lines.append(f"without {e.modality}, ranked by {second} alone: {self.alone} clips")
        lines += [f"with {e.modality} and without {name}: {number} clips" for name, number in self.without.items()]
        lines.append(f"without {f'{e.modality} or {second}' if second else e.modality}, not ranked: "
                     f"{self.unranked} clips")
        if self.untrained:
            lines.append(f"without a train clip, ranked by chance: {self.untrained} identities")
        if self.unlabelled and e.split == "val":
            lines.append(f"without a labelled val clip: {self.unlabelled} identities; a ground truth that does not "
                         "list them may refuse their lines, and --labelled-only leaves them out")
        if self.kept:
            lines.append(f"kept {self.kept}: {self.trained + self.loaded} members")
        if self.foreign:
            lines.append(f"left in {members_folder(self.out)}: {self.foreign} members of other runs")
        lines.append(f"{self.seconds:.1f} s")
        return lines + ["simulated: no score on it is a result on the challenge"] * self.simulated


def predict(store_path: str | Path, out: str | Path, *, system: str = "one-name", split: str = "val",
            epochs: int | None = None, members: int | None = None, seed: int = 0, labelled_only: bool = False,
            device: str = "auto", overwrite: bool = False, keep_members: bool = False,
            progress: bool = False) -> Prediction:
    """Train a system of ``systems.SYSTEMS`` on a store and write its ranking of a split's clips as a submission.

    epochs; members: the first so many of its ensembles.  labelled_only: no line for identities without a labelled clip in
    the split.  A result that exists is refused unless ``overwrite``, and is then replaced when the new one is complete.
    Members that an earlier run of the same system, store and library left in ``members_folder`` are used, whatever split
    they were for and whatever device they were trained on; the files are removed once the result is there, unless
    ``keep_members``.
    """
    began = time.perf_counter()
    out = Path(out)
    _check_target(out, overwrite)
    store = ClipStore.open(store_path)
    e = system_on(store, system, split=split, epochs=epochs, members=members, seed=seed)
    identities = np.arange(len(store.identities))
    if labelled_only:
        identities = np.unique(store.identity_of(store.select(split, labelled=True)))
        if not len(identities):
            raise ValueError(f"{store.path}: no labelled {split} clip, so labelled-only leaves no identity")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device cuda: there is no GPU here")
    folder = members_folder(out)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        saved = SavedMembers(folder, e, store, torch_device(device), progress=progress)
        with saved.bar:
            found = rank_clips(e, store, device=device, progress=progress, trained=saved)
        _check_target(out, overwrite)
        names = store.clips["clip"].to_numpy(object)[found.gallery]
        write_result(out, store.identities[identities], found.ranking[identities, :RESULT_LIMIT], names)
        if not keep_members:
            saved.remove()
        foreign = len({*folder.glob("*.pt")} - {*saved.paths.values()})
    finally:
        _remove_if_empty(folder)
    return _report(out, e, store, identities, found, trained=saved.trained, loaded=saved.loaded,
                   kept=folder if keep_members else None, foreign=foreign, seconds=time.perf_counter() - began)


def members_folder(out: Path) -> Path:
    """Return where the members of a result are kept until it is complete."""
    return out.with_name(f"{out.name}.members")


def system_on(store: ClipStore, system: str, *, split: str = "val", epochs: int | None = None,
              members: int | None = None, seed: int = 0) -> Experiment:
    """Return a system of the challenge as an experiment on a store, refusing a store that lacks what it needs."""
    if system not in SYSTEMS:
        raise ValueError(f"system must be one of {', '.join(SYSTEMS)}, got {system!r}")
    # Absolute, as an experiment takes the word "simulated" for something else.
    e = replace(SYSTEMS[system], data=str(store.path.absolute()), seed=seed, split=split)
    if epochs is not None:
        e = replace(e, training=replace(e.training, epochs=epochs))
    if members is not None:
        if not 1 <= members <= len(e.members):
            raise ValueError(f"members must lie in [1, {len(e.members)}] for {system}, got {members}")
        e = with_members(e, members)
    wanted = dict.fromkeys([*e.context, *(e.fallback.context if e.fallback else ())])
    if absent := [name for name in wanted if name not in store.modalities]:
        faces = "face" in store.modalities and not missing_scores(FACE_ONLY, store)
        hint = "; --system face-only does without" if faces else ""
        raise ValueError(f"{store.path}: has no {' and no '.join(absent)}, which {system} needs{hint}")
    return e


class SavedMembers(UserDict):
    """The trained members of an experiment by (branch, member), as ``rank_clips`` takes them; each is saved when it is set.

    folder: where; those that it holds already are loaded at once, so that a damaged file is found before hours of
    training.  The name of a file is a hash of what decides the member: branch, content of the store, number, library; the
    split that is ranked is no part of it.  trained, loaded: how many.
    """

    def __init__(self, folder: Path, experiment: Experiment, store: ClipStore, device: torch.device, *,
                 progress: bool = False):
        super().__init__()
        e = experiment
        numbers = {e.branch(): e.members} | ({e.second().branch(): e.fallback.members} if e.fallback else {})
        self.paths: dict[Key, Path] = {}
        for branch, members in numbers.items():
            key = replace(branch, split="val").key()
            for member in members:
                digest = hashlib.sha256(f"{key} {member} {library_hash()}".encode()).hexdigest()
                self.paths[branch, member] = folder / f"{digest[:20]}.pt"
        for (branch, member), path in self.paths.items():
            if path.exists():
                self.data[branch, member] = read_member(path, branch, member, store, device)
        self.loaded, self.trained = len(self.data), 0
        self.bar = tqdm(total=len(self.paths), initial=self.loaded, desc="members", unit="member",
                        disable=not progress, leave=False)

    def __setitem__(self, key: Key, member: Member) -> None:
        write_member(self.paths[key], member)
        super().__setitem__(key, member)
        self.trained += 1
        self.bar.update()

    def remove(self) -> None:
        """Remove the files, and what a killed run left of one half written."""
        for path in self.paths.values():
            for file in (path, *path.parent.glob(f".{path.name}.partial-*")):
                file.unlink(missing_ok=True)


def write_member(path: Path, member: Member) -> None:
    """Save a member, whole or not at all."""
    content = io.BytesIO()
    torch.save({"state": {name: value.cpu() for name, value in member.model.state_dict().items()},
                "clips": torch.from_numpy(member.clips), "losses": member.losses, "seconds": member.seconds}, content)
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        partial.write_bytes(content.getbuffer())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def read_member(path: Path, branch: Experiment, number: int, store: ClipStore, device: torch.device) -> Member:
    """Load a saved member of a branch; nothing in the file is executed."""
    content = io.BytesIO(path.read_bytes())
    model = make_model(branch, store, number)
    try:
        if zipfile.ZipFile(content).testzip() is not None:  # torch does not compare check sums
            raise ValueError("a check sum is wrong")
        content.seek(0)
        saved = torch.load(content, map_location="cpu", weights_only=True)
        model.load_state_dict(saved["state"])
        clips, losses, seconds = saved["clips"].numpy(), saved["losses"], saved["seconds"]
    except MemoryError:
        raise
    except Exception:  # zipfile, pickle and torch have many names for a file that is not what it should be
        raise ValueError(f"{path}: damaged, or not a member; once it is removed, that member is trained again"
                         ) from None
    return Member(branch, store, model.to(device).eval(), clips, losses, seconds)


def _check_target(out: Path, overwrite: bool) -> None:
    if out.is_dir():
        raise ValueError(f"{out}: is a folder")
    if out.exists() and not overwrite:
        raise FileExistsError(f"{out}: exists already")


def _remove_if_empty(folder: Path) -> None:
    try:
        folder.rmdir()
    except OSError:
        pass


def _report(out: Path, e: Experiment, store: ClipStore, identities: np.ndarray, found: Ranked, **known) -> Prediction:
    clips = store.select(e.split)
    has = {name: source.count[found.gallery] > 0 for name, source in store.modalities.items()}
    lacking = [np.setdiff1d(identities, store.identity_of(of)) for of in
               (store.select(e.split, labelled=True), training_clips(e, store))]
    return Prediction(
        out=out, experiment=e, simulated=store.meta["simulated"], identities=len(identities), clips=len(clips),
        ranked=len(found.gallery), alone=int((~has[e.modality]).sum()), unranked=len(clips) - len(found.gallery),
        without={name: int((has[e.modality] & ~has[name]).sum()) for name in e.context},
        unlabelled=len(lacking[0]), untrained=len(lacking[1]), **known)
