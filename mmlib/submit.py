"""Predict: train a system of the challenge on a store, rank its clips and write the submission.

Every member of the ensemble is saved when it is trained, in a folder beside the result, so that a run that was killed
goes on with the member it was in and ends with the result of an unbroken one.  Several processes may share the work: each
ranks a shard of the clips (``predict_shard``), and they share the members.
"""

from __future__ import annotations

import hashlib
import io
import time
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from mmlib import rank, retrieve
from mmlib.data.store import ClipStore
from mmlib.data.submission import RESULT_LIMIT, write_result
from mmlib.experiment import Experiment, torch_device
from mmlib.records import claim, clear_partial, library_hash, remove_locks, share, write_whole
from mmlib.retrieve import (
    TOGETHER,
    Member,
    fit_together,
    make_model,
    missing_scores,
    rank_clips,
    ranked_gallery,
    training_clips,
)
from mmlib.systems import FACE_ONLY, SYSTEMS, with_members


@dataclass(frozen=True)
class Prediction:
    """What a prediction did: the file, its lines, the fate of the split's clips by modality, members, seconds.

    alone: clips ranked by the fallback alone, for want of the modality.  unranked: clips that nothing could rank.
    without: by context, ranked clips that have the modality and lack that context.  unlabelled, untrained: identities
    without a labelled clip in the split, without a training clip.  foreign: files of other runs among the members.
    shards: how many it was merged from, if any.
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
    shards: int | None
    seconds: float

    def lines(self) -> list[str]:
        """Say it in sentences for a terminal."""
        e = self.experiment
        second = " or ".join(e.fallback.context) if e.fallback else ""
        lines = [
            f"wrote {self.out}: {self.identities} identities, at most {RESULT_LIMIT} clips each",
            f"members: {self.trained} trained, {self.loaded} loaded",
            f"{e.split}: {self.clips} clips, {self.ranked} ranked",
        ]
        if self.shards:
            lines.insert(1, f"shards: {self.shards} merged")
        if second:
            lines.append(f"without {e.modality}, ranked by {second} alone: {self.alone} clips")
        lines += [f"with {e.modality} and without {name}: {number} clips" for name, number in self.without.items()]
        lines.append(
            f"without {f'{e.modality} or {second}' if second else e.modality}, not ranked: {self.unranked} clips"
        )
        if self.untrained:
            lines.append(f"without a train clip, ranked by chance: {self.untrained} identities")
        if self.unlabelled and e.split == "val":
            lines.append(
                f"without a labelled val clip: {self.unlabelled} identities; a ground truth that does not "
                "list them may refuse their lines, and --labelled-only leaves them out"
            )
        if self.kept:
            lines.append(f"kept {self.kept}: {self.trained + self.loaded} members")
        if self.foreign:
            lines.append(f"left in {members_folder(self.out)}: {self.foreign} members of other runs")
        lines.append(f"{self.seconds:.1f} s")
        return lines + ["simulated: no score on it is a result on the challenge"] * self.simulated


@dataclass(frozen=True)
class ShardPrediction:
    """What the ranking of a shard did: gallery rows of all, whether it was not there before, members, seconds."""

    shard: int
    shards: int
    rows: slice
    clips: int
    made: bool
    simulated: bool
    trained: int
    loaded: int
    folder: Path
    seconds: float

    def lines(self) -> list[str]:
        """Say it in sentences for a terminal."""
        done = "ranked" if self.made else "was there already:"
        clips = f"clips {self.rows.start + 1} to {self.rows.stop} of {self.clips}"
        lines = [
            f"shard {self.shard} of {self.shards} {done} {clips}",
            f"members: {self.trained} trained, {self.loaded} loaded",
            f"kept {self.folder} for the merge of the shards",
            f"{self.seconds:.1f} s",
        ]
        return lines + ["simulated: no score on it is a result on the challenge"] * self.simulated


def predict(
    store_path: str | Path,
    out: str | Path,
    *,
    system: str = "one-name",
    split: str = "val",
    epochs: int | None = None,
    members: int | None = None,
    seed: int = 0,
    labelled_only: bool = False,
    device: str = "auto",
    overwrite: bool = False,
    keep_members: bool = False,
    shards: int | None = None,
    progress: bool = False,
) -> Prediction:
    """Train a system of ``systems.SYSTEMS`` on a store and write its ranking of a split's clips as a submission.

    epochs; members: the first so many of its ensembles.  labelled_only: no line for identities without a labelled clip in
    the split.  A result that exists is refused unless ``overwrite``, and is then replaced when the new one is complete.
    Members that an earlier run of the same system, store and library left in ``members_folder`` are used, whatever split
    they were for and whatever device they were trained on; the files are removed once the result is there, unless
    ``keep_members``.  shards: merge so many shards, those of ``predict_shard`` and, where one is missing, one's own; the
    result is the same.
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
    with _folder_of(out) as folder:
        work = _Work(e, store, folder, device, 1 if shards is None else shards, progress)
        if shards is not None:
            work.rank_shards(work.paths)
            ranking = rank.merge([_read_shard(path) for path in work.paths.values()], k=RESULT_LIMIT).clip.numpy()
        else:
            ranking = rank_clips(e, store, device=device, progress=progress, trained=work.members.fetch()).ranking
        _check_target(out, overwrite)
        names = store.clips["clip"].to_numpy(object)[work.gallery]
        write_result(out, store.identities[identities], ranking[identities, :RESULT_LIMIT], names)
        work.remove_shards()
        if not keep_members:
            work.members.remove()
        foreign = len({*folder.glob("*.pt")} - {*work.members.paths.values()})
    return _report(
        out,
        e,
        store,
        identities,
        work.gallery,
        trained=work.members.trained,
        loaded=work.members.loaded,
        kept=folder if keep_members else None,
        foreign=foreign,
        shards=shards,
        seconds=time.perf_counter() - began,
    )


def predict_shard(
    store_path: str | Path,
    out: str | Path,
    shard: int,
    shards: int,
    *,
    system: str = "one-name",
    split: str = "val",
    epochs: int | None = None,
    members: int | None = None,
    seed: int = 0,
    device: str = "auto",
    overwrite: bool = False,
    progress: bool = False,
) -> ShardPrediction:
    """Rank one of ``shards`` parts of the gallery, ``shard`` in [1, shards], and keep it in ``members_folder``.

    Processes that do so at the same time, on machines that share the folder, train the members together.  The other
    arguments as for ``predict``, which merges the shards and must be given the same ones.
    """
    began = time.perf_counter()
    out = Path(out)
    _check_target(out, overwrite)
    if not 1 <= shard <= shards:
        raise ValueError(f"shard must lie in [1, {shards}], got {shard}")
    store = ClipStore.open(store_path)
    e = system_on(store, system, split=split, epochs=epochs, members=members, seed=seed)
    with _folder_of(out) as folder:
        work = _Work(e, store, folder, device, shards, progress)
        made = work.rank_shards([shard])
    return ShardPrediction(
        shard,
        shards,
        work.rows(shard),
        len(work.gallery),
        bool(made),
        store.meta["simulated"],
        work.members.trained,
        work.members.loaded,
        folder,
        time.perf_counter() - began,
    )


class _Work:
    """The ranking of a gallery in shards: contiguous parts of whole blocks, which are scored as they are in one run.

    gallery (N,); members; paths: the file of each shard, by number.  Its name holds a hash of what decides it.
    """

    def __init__(
        self, experiment: Experiment, store: ClipStore, folder: Path, device: str, shards: int, progress: bool
    ):
        if device == "cuda" and not torch.cuda.is_available():
            raise ValueError("device cuda: there is no GPU here")
        self.experiment, self.store, self.device, self.progress = experiment, store, device, progress
        self.gallery = ranked_gallery(experiment, store)
        blocks = -(-len(self.gallery) // retrieve.BLOCK)
        if shards > 1 and experiment.combine == "ranks":
            raise ValueError(
                "the system fuses whole rankings (combine 'ranks'), so its clips cannot be ranked in shards"
            )
        if not 1 <= shards <= blocks:
            raise ValueError(
                f"shards must lie in [1, {blocks}] for {len(self.gallery)} clips in blocks of "
                f"{retrieve.BLOCK}, got {shards}"
            )
        training_clips(experiment, store)  # refuses a store that has none, before the folder holds a lock
        self.members = SavedMembers(folder, experiment, store, torch_device(device), workers=shards, progress=progress)
        edges = [min(blocks * part // shards * retrieve.BLOCK, len(self.gallery)) for part in range(shards + 1)]
        self._rows = [slice(low, high) for low, high in zip(edges, edges[1:])]
        said = f"{experiment.key()} {library_hash()}"
        self.paths = {
            shard: folder / f"{hashlib.sha256(f'{said} {shard}/{shards}'.encode()).hexdigest()[:20]}.npz"
            for shard in range(1, shards + 1)
        }

    def rows(self, shard: int) -> slice:
        return self._rows[shard - 1]

    def rank_shards(self, shards: Iterable[int]) -> list[int]:
        """Rank those of the shards that are not there; return which."""
        missing, made = [shard for shard in shards if not self.paths[shard].exists()], []
        trained = self.members.fetch() if missing else {}

        def attempt(shards: list[int], wait: float) -> Iterator[bool]:
            for shard in shards:
                path = self.paths[shard]
                with claim(path.with_suffix(".lock"), wait) as held:
                    if held and not path.exists():
                        clear_partial(path)
                        found = rank_clips(
                            self.experiment,
                            self.store,
                            device=self.device,
                            progress=self.progress,
                            trained=trained,
                            rows=self.rows(shard),
                        )
                        _write_shard(path, found)
                        made.append(shard)
                yield held

        share(missing, attempt)
        return made

    def remove_shards(self) -> None:
        for path in self.paths.values():
            path.unlink(missing_ok=True)
            clear_partial(path)


def _write_shard(path: Path, found: retrieve.Ranked) -> None:
    content = io.BytesIO()
    np.savez(content, clip=found.ranking, score=found.score)
    write_whole(path, content.getvalue())


def _read_shard(path: Path) -> rank.Ranking:
    try:
        with np.load(path) as arrays:
            return rank.Ranking(torch.from_numpy(arrays["clip"]), torch.from_numpy(arrays["score"]))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        raise ValueError(f"{path}: damaged, or not a shard; once it is removed, it is ranked again") from None


@contextmanager
def _folder_of(out: Path) -> Iterator[Path]:
    """Yield the folder of the members, and leave no lock in it that nobody holds, nor an empty folder."""
    folder = members_folder(out)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield folder
    finally:
        remove_locks(folder)
        with suppress(OSError):
            folder.rmdir()


def members_folder(out: Path) -> Path:
    """Return where the members of a result are kept until it is complete."""
    return out.with_name(f"{out.name}.members")


def system_on(
    store: ClipStore,
    system: str,
    *,
    split: str = "val",
    epochs: int | None = None,
    members: int | None = None,
    seed: int = 0,
) -> Experiment:
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


def _check_target(out: Path, overwrite: bool) -> None:
    if out.is_dir():
        raise ValueError(f"{out}: is a folder")
    if out.exists() and not overwrite:
        raise FileExistsError(f"{out}: exists already")


def _report(
    out: Path, e: Experiment, store: ClipStore, identities: np.ndarray, gallery: np.ndarray, **known
) -> Prediction:
    clips = store.select(e.split)
    has = {name: source.count[gallery] > 0 for name, source in store.modalities.items()}
    lacking = [
        np.setdiff1d(identities, store.identity_of(of))
        for of in (store.select(e.split, labelled=True), training_clips(e, store))
    ]
    return Prediction(
        out=out,
        experiment=e,
        simulated=store.meta["simulated"],
        identities=len(identities),
        clips=len(clips),
        ranked=len(gallery),
        alone=int((~has[e.modality]).sum()),
        unranked=len(clips) - len(gallery),
        without={name: int((has[e.modality] & ~has[name]).sum()) for name in e.context},
        unlabelled=len(lacking[0]),
        untrained=len(lacking[1]),
        **known,
    )


Key = tuple[Experiment, int]  # a branch and the number of a member


class SavedMembers:
    """The trained members of an experiment in a folder, by (branch, member), as ``rank_clips`` takes them.

    The name of a file is a hash of what decides the member: branch, content of the store, number, library; the split that
    is ranked is no part of it.  workers: processes that are expected to fill the folder together; so many share the
    members that a GPU would train as one.  trained, loaded: how many ``fetch`` has trained and found.
    """

    def __init__(
        self,
        folder: Path,
        experiment: Experiment,
        store: ClipStore,
        device: torch.device,
        *,
        workers: int = 1,
        progress: bool = False,
    ):
        e = experiment
        self.store, self.device, self.progress = store, device, progress
        self.trained = self.loaded = 0
        numbers = {e.branch(): e.members} | ({e.second().branch(): e.fallback.members} if e.fallback else {})
        self.paths: dict[Key, Path] = {}
        self._groups: list[list[Key]] = []
        for branch, members in numbers.items():
            key = replace(branch, split="val").key()
            for member in members:
                digest = hashlib.sha256(f"{key} {member} {library_hash()}".encode()).hexdigest()
                self.paths[branch, member] = folder / f"{digest[:20]}.pt"
            step = min(TOGETHER[device.type], -(-len(members) // workers))
            self._groups += [
                [(branch, member) for member in members[at : at + step]] for at in range(0, len(members), step)
            ]

    def fetch(self) -> dict[Key, Member]:
        """Load the members that are there, train and save the others; each is trained by one process alone.

        Those that are there are loaded first, so that a damaged file is found before hours of training.
        """
        found = {key: self._load(key) for key, path in self.paths.items() if path.exists()}
        with tqdm(
            total=len(self.paths),
            initial=len(found),
            desc="members",
            unit="member",
            disable=not self.progress,
            leave=False,
        ) as bar:

            def attempt(groups: list[list[Key]], wait: float) -> Iterator[bool]:
                for group in groups:
                    before = len(found)
                    self._add(group, found, wait)
                    bar.update(len(found) - before)
                    yield all(key in found for key in group)

            share(self._groups, attempt)
        return found

    def _load(self, key: Key) -> Member:
        member = read_member(self.paths[key], *key, self.store, self.device)
        self.loaded += 1
        return member

    def _add(self, group: list[Key], found: dict[Key, Member], wait: float) -> None:
        """Add the members of a group that no other process is at."""
        with ExitStack() as held:
            mine = [
                key
                for key in group
                if key not in found and held.enter_context(claim(self.paths[key].with_suffix(".lock"), wait))
            ]
            for key in mine:
                if self.paths[key].exists():  # another process has trained it meanwhile
                    found[key] = self._load(key)
            missing = [key for key in mine if key not in found]
            if not missing:
                return
            branch, began = missing[0][0], time.perf_counter()
            fitted = fit_together(missing, self.store, device=self.device, progress=self.progress)
            seconds = (time.perf_counter() - began) / len(missing)
            for key, parts in zip(missing, fitted):
                found[key] = Member(branch, self.store, *parts, seconds)
                clear_partial(self.paths[key])
                write_member(self.paths[key], found[key])
                self.trained += 1

    def remove(self) -> None:
        """Remove the files, and what a killed run left of one half written."""
        for path in self.paths.values():
            path.unlink(missing_ok=True)
            clear_partial(path)


def write_member(path: Path, member: Member) -> None:
    """Save a member, whole or not at all."""
    content = io.BytesIO()
    torch.save(
        {
            "state": {name: value.cpu() for name, value in member.model.state_dict().items()},
            "clips": torch.from_numpy(member.clips),
            "losses": member.losses,
            "seconds": member.seconds,
        },
        content,
    )
    write_whole(path, content.getvalue())


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
        raise ValueError(
            f"{path}: damaged, or not a member; once it is removed, that member is trained again"
        ) from None
    return Member(branch, store, model.to(device).eval(), clips, losses, seconds)
