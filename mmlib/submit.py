"""Predict: train a system of the challenge on a store, rank its clips and write the submission.

Every member of the ensemble is saved when it is trained, in a folder beside the result, and so is the ranking of every
shard of the clips: a run that was killed goes on where it was, and ends with the result of an unbroken one.  Processes
on one machine, and commands on many, each with a shard, share members and shards by claiming them.
"""

import hashlib
import io
import time
import zipfile
from collections.abc import Callable, Iterable
from contextlib import ExitStack, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm.auto import tqdm

from mmlib import rank, retrieve
from mmlib.claims import claim, clear_partial, helped, remove_locks, share
from mmlib.data.content import write_whole
from mmlib.data.store import ClipStore
from mmlib.data.submission import RESULT_LIMIT, check_names, write_result
from mmlib.experiment import Experiment, torch_device
from mmlib.records import library_hash, workers
from mmlib.retrieve import Key, Member
from mmlib.systems import SYSTEMS, with_members, without_scores


class Report(NamedTuple):
    """Hold what came of a command, by it or by one beside it: members trained, or there before; shards; lines on it."""

    trained: int
    loaded: int
    ranked: int
    lines: list[str]


def predict(
    store_path: str | Path,
    out: str | Path,
    *,
    shard: int | None = None,
    shards: int | None = None,
    labelled_only: bool = False,
    overwrite: bool = False,
    keep_members: bool = False,
    device: str = "auto",
    progress: bool = False,
    say: Callable[[str], object] | None = None,
    **options,
) -> Report:
    """Train a system of ``systems.SYSTEMS`` on a store and write its ranking of a split's clips as a submission.

    options: as for ``system_on``.  labelled_only: no line for identities without a labelled clip there.  A result that
    exists is refused unless ``overwrite``, and replaced when the new one is complete.  Members that an earlier run of
    the same system, store and library left in ``members_folder`` are used, for whatever split and on whatever device
    they were trained; the files are removed once the result is there, unless ``keep_members``.

    progress: show a bar.  say: is called with a line on what will be done and, without a bar, with one a member, on how
    long it took and how long the rest will.

    shard: rank that one of ``shards`` parts of the gallery, in [1, shards], and leave it in the folder; processes that
    do so at the same time, on machines that share it, train the members together.  shards without a shard: merge those,
    ranking what is missing; the result is that of a run in one piece.
    """
    began, out, folder = time.perf_counter(), Path(out), members_folder(out)
    _check_target(out, overwrite)
    if shard is not None and not 1 <= shard <= (shards or 1):
        raise ValueError(f"shard must lie in [1, {shards}], got {shard}")
    store = ClipStore.open(store_path)
    e, unscored = system_on(store, **options)
    labelled = np.unique(store.identity_of(store.select(e.split, labelled=True)))
    identities = labelled if labelled_only else np.arange(len(store.identities))
    if not len(identities):
        why = f"no labelled {e.split} clip, so labelled-only leaves no identity" if labelled_only else "has no identity"
        raise ValueError(f"{store.path}: {why}")
    folder.mkdir(parents=True, exist_ok=True)
    try:
        work = Work(e, folder, device, shards)
        every = range(1, work.shards + 1)
        trained, loaded, ranked = work.rank_shards(every if shard is None else [shard], progress, say)
        if shard is None:
            best = rank.merge([_read_shard(work.shard(number)) for number in every], k=RESULT_LIMIT).clip.numpy()
            names = store.clips["clip"].to_numpy(object)[work.gallery]
            _check_target(out, overwrite)
            write_result(out, [*store.identities[identities]], best[identities], names)
            for path in [*folder.glob(f"{work.name}-*.npz"), *([] if keep_members else work.members.values())]:
                path.unlink(missing_ok=True)
                clear_partial(path)
        foreign = len({*folder.glob("*.pt")} - {*work.members.values()})
    finally:
        remove_locks(folder)
        with suppress(OSError):  # others need what is in it
            folder.rmdir()
    members = (True, f"members: {trained} trained, {loaded} loaded")
    if shard is None:
        said = [
            (True, f"wrote {out}: {len(identities)} identities, at most {RESULT_LIMIT} clips each"),
            (shards, f"shards: {shards} merged"),
            members,
            (unscored, f"without {' and '.join(unscored)} scores: norms weight the frames"),
            *_counts(work, identities, labelled),
            (keep_members, f"kept {folder}: {trained + loaded} members"),
            (foreign, f"left in {folder}: {foreign} members of other runs"),
        ]
    else:
        rows = np.concatenate(work.blocks[work.part(shard)])
        clips = f"clips {rows[0] + 1} to {rows[-1] + 1} of {len(work.gallery)}"
        ranking = (True, f"shard {shard} of {shards} {'ranked' if ranked else 'was there already:'} {clips}")
        said = [ranking, members, (True, f"kept {folder} for the merge of the shards")]
    said += [
        (True, f"{time.perf_counter() - began:.1f} s"),
        (store.meta["simulated"], "simulated: no score on it is a result on the challenge"),
    ]
    return Report(trained, loaded, ranked, [line for shown, line in said if shown])


def predict_shard(store_path: str | Path, out: str | Path, shard: int, shards: int, **options) -> Report:
    """Rank one of ``shards`` parts of the gallery, and leave it for ``predict``, which says more, to merge."""
    return predict(store_path, out, shard=shard, shards=shards, **options)


class Work:
    """A system on a store: its members, and its ranking in shards of whole blocks, as files of a folder.

    members: the file of each.  A name is a hash of what decides the content: of a member that is its branch with the
    content of the store, its number and the library, and the split that is ranked is no part of it.
    """

    def __init__(self, experiment: Experiment, folder: Path, device: str, shards: int | None):
        self.experiment, self.folder, self.device, self.at = experiment, folder, device, torch_device(device)
        self.store = ClipStore.open(experiment.data)
        retrieve.training_clips(experiment, self.store)  # refuses a store that has none, before the folder holds a lock
        self.gallery = retrieve.ranked_gallery(experiment, self.store)
        self.blocks = retrieve.blocks_of(experiment, self.store, self.gallery)
        self.trained: dict[Key, Member] = {}
        keys, blocks = retrieve.members_of(experiment), len(self.blocks)
        self.shards = min(workers(len(keys), device), blocks) if shards is None else shards
        if not 1 <= self.shards <= blocks:
            clips = f"{len(self.gallery)} clips in blocks of {retrieve.BLOCK}"
            raise ValueError(f"shards must lie in [1, {blocks}] for {clips}, got {shards}")
        said = {branch: replace(branch, split="val").key() for branch in dict.fromkeys(branch for branch, _ in keys)}
        self.members = {(b, number): folder / f"{_hashed(said[b], number)}.pt" for b, number in keys}
        self.name = _hashed(experiment.key(), "ranked")

    def __reduce__(self):
        """Have another process open the store and load the members itself."""
        return Work, (self.experiment, self.folder, self.device, self.shards)

    def load(self) -> dict[Key, Member]:
        """Return the members whose files are there."""
        for key, path in self.members.items():
            if key not in self.trained and path.exists():
                self.trained[key] = read_member(path, *key, self.store, self.at)
        return self.trained

    def shard(self, number: int) -> Path:
        return self.folder / f"{self.name}-{number}-{self.shards}.npz"

    def part(self, number: int) -> slice:
        """Return which blocks are in a shard."""
        return slice(*(len(self.blocks) * edge // self.shards for edge in (number - 1, number)))

    def plan(self, missing: list[Key]) -> str:
        """Say what there is to do, and how much of the disk that takes until the result is there."""
        size = {branch: 0 for branch, _ in missing}
        for branch in size:
            state = retrieve.make_model(branch, self.store, branch.members[0]).state_dict()
            size[branch] = sum(tensor.nbytes for tensor in state.values())
        disk = sum(size[branch] for branch, _ in missing) / 1e6
        of = f"{len(missing)} of {len(self.members)} members, {self.experiment.training.epochs} epochs each"
        kept = f"about {disk:,.0f} MB in {self.folder} until it is written"
        return f"to train: {of}; to rank: {len(self.gallery)} clips; {kept}; how long is said after the first member"

    def rank_shards(
        self, shards: Iterable[int], progress: bool = False, say: Callable[[str], object] | None = None
    ) -> tuple[int, int, int]:
        """Rank the shards that are not there; return how many members and shards were not there, and members that were.

        Members that are there are loaded first, so that a damaged file is found before hours of training.
        """
        asked = [number for number in shards if not self.shard(number).exists()]
        if not asked:
            return 0, 0, 0
        known = {*self.load()}
        missing = [key for key in self.members if key not in known]
        step = min(retrieve.TOGETHER[self.at.type], -(-len(self.experiment.members) // self.shards))
        groups = [missing[at : at + step] for at in range(0, len(missing), step)]
        began, said, ready = time.perf_counter(), len(known), len(known)
        if say:
            say(self.plan(missing))
        with tqdm(total=len(missing), desc="members", unit="member", disable=not progress) as bar:
            with helped(workers(len(self.members), self.device) - 1, partial(self.rank_shards, shards)):
                for done in share(groups, partial(self._train, progress=progress)):
                    bar.update(done)
                    if say and not progress:  # members that others have trained meanwhile are there as well
                        ready = sum(path.exists() for path in self.members.values())
                        spent = time.perf_counter() - began
                        left = spent / max(1, ready - len(known)) * (len(self.members) - ready)
                        for number in range(said + 1, ready + 1):
                            say(
                                f"member {number} of {len(self.members)}: {spent:.0f} s so far, about {left:.0f} s left"
                            )
                        said = max(said, ready)
                for _ in share(asked, self._rank):
                    pass
        return len(missing), len(known), len(asked)

    def _train(self, group: list[Key], wait: float, progress: bool) -> tuple[int, list[Key]]:
        """Train and save the members of a group that no other process is at; return their number, and the others."""
        with ExitStack() as held:
            mine = [key for key in group if held.enter_context(claim(self.members[key].with_suffix(".lock"), wait))]
            missing = [key for key in mine if not self.members[key].exists()]
            trained = retrieve.train_members(missing, self.store, device=self.device, progress=progress)
            for key, member in trained.items():
                clear_partial(self.members[key])
                write_member(self.members[key], member)
        self.trained.update(trained)
        return len(mine), [key for key in group if key not in mine]

    def _rank(self, number: int, wait: float) -> tuple[int, int]:
        """Rank a shard that is not there and that no other process is at; return 1, and 0 or the number if one is."""
        path = self.shard(number)
        with claim(path.with_suffix(".lock"), wait) as held:
            if held and not path.exists():
                clear_partial(path)
                found = retrieve.rank_clips(self.experiment, self.store, self.load(), self.part(number))
                content = io.BytesIO()
                np.savez(content, clip=found.best, score=found.score)
                write_whole(path, content.getvalue())
        return int(held), 0 if held else number


def _counts(work: Work, identities: np.ndarray, labelled: np.ndarray) -> list[tuple]:
    """Count the clips and identities that lack something: whether a line is shown, and the line."""
    e, store = work.experiment, work.store
    has = {name: source.count[work.gallery] > 0 for name, source in store.modalities.items()}
    clips, first = len(store.select(e.split)), has[e.modality or "face"]
    second = " or ".join(e.fallback.context) if e.fallback else ""
    untrained = len(np.setdiff1d(identities, store.identity_of(retrieve.training_clips(e, store))))
    unlabelled = len(np.setdiff1d(identities, labelled)) if e.split == "val" else 0
    lacking = "a ground truth that does not list them may refuse their lines, and --labelled-only leaves them out"
    return [
        (True, f"{e.split}: {clips} clips, {len(first)} ranked"),
        (second, f"without {e.modality}, ranked by {second} alone: {(~first).sum()} clips"),
        *((True, f"with {e.modality} and without {name}: {(first & ~has[name]).sum()} clips") for name in e.context),
        (True, f"without {e.modality}{f' or {second}' * bool(second)}, not ranked: {clips - len(first)} clips"),
        (untrained, f"without a train clip, ranked by chance: {untrained} identities"),
        (unlabelled, f"without a labelled val clip: {unlabelled} identities; {lacking}"),
    ]


def _hashed(*said: object) -> str:
    return hashlib.sha256(f"{said} {library_hash()}".encode()).hexdigest()[:20]


def _read_shard(path: Path) -> rank.Ranking:
    try:
        with np.load(path) as arrays:
            return rank.Ranking(torch.from_numpy(arrays["clip"]), torch.from_numpy(arrays["score"]))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        raise ValueError(f"{path}: damaged, or not a shard; once it is removed, it is ranked again") from None


def members_folder(out: str | Path) -> Path:
    """Return where the members of a result are kept until it is complete."""
    return Path(f"{out}.members")


def system_on(
    store: ClipStore,
    system: str = "one-name",
    *,
    split: str = "val",
    epochs: int | None = None,
    members: int | None = None,
    seed: int = 0,
) -> tuple[Experiment, list[str]]:
    """Return a system of the challenge as an experiment on a store, and the scores that it does without there.

    members: the first so many of its ensembles.  Faces alone are weighted by their norms where there are no scores; the
    other systems refuse a store that lacks what they need, and name one that does not.
    """
    if system not in SYSTEMS:
        raise ValueError(f"system must be one of {', '.join(SYSTEMS)}, got {system!r}")
    # Absolute, as an experiment takes the word "simulated" for something else.
    e = replace(SYSTEMS[system], data=str(store.path.absolute()), seed=seed, split=split)
    check_names(store.clips["clip"].iloc[store.select(split)], store.identities)
    if epochs is not None:
        e = replace(e, training=replace(e.training, epochs=epochs))
    if members is not None and not 1 <= members <= len(e.members):
        raise ValueError(f"members must lie in [1, {len(e.members)}] for {system}, got {members}")
    e = with_members(e, members)
    lacking = [name for name in (e.modality or "face", *e.context) if name not in store.modalities]
    unscored = retrieve.missing_scores(e, store) if e.modality in store.modalities else []
    if lacking or unscored and system != "face-only":
        what = " and no ".join([*lacking, *(f"{name} score" for name in unscored)])
        hint = "; --system face-only does without" if "face" in store.modalities else ""
        raise ValueError(f"{store.path}: has no {what}, which {system} needs{hint}")
    return (without_scores(e) if unscored else e), unscored


def _check_target(out: Path, overwrite: bool) -> None:
    if out.is_dir():
        raise ValueError(f"{out}: is a folder")
    if out.exists() and not overwrite:
        raise FileExistsError(f"{out}: exists already")


def write_member(path: Path, member: Member) -> None:
    """Save a member, whole or not at all."""
    saved = {"state": member.model.state_dict(), "clips": torch.from_numpy(member.clips)}
    content = io.BytesIO()
    torch.save(saved | {"losses": member.losses, "seconds": member.seconds}, content)
    write_whole(path, content.getvalue())


def read_member(path: Path, branch: Experiment, number: int, store: ClipStore, device: torch.device) -> Member:
    """Load a saved member of a branch; nothing in the file is executed."""
    content = io.BytesIO(path.read_bytes())
    model = retrieve.make_model(branch, store, number)
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
        said = "damaged, or not a member; once it is removed, that member is trained again"
        raise ValueError(f"{path}: {said}") from None
    return Member(branch, store, model.to(device).eval(), clips, losses, seconds)
