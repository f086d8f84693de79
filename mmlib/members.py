"""The trained members of a system, saved one by one in a folder that several processes may fill."""

from __future__ import annotations

import hashlib
import io
import time
import zipfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import torch
from tqdm.auto import tqdm

from mmlib.clips.store import ClipStore
from mmlib.experiment import Experiment
from mmlib.fitting import fit_together, make_model
from mmlib.retrieval import TOGETHER, Member
from mmlib.runs import library_hash, write_whole
from mmlib.sweep import claim, clear_partial, share

Key = tuple[Experiment, int]  # a branch and the number of a member


class SavedMembers:
    """The trained members of an experiment in a folder, by (branch, member), as ``rank_clips`` takes them.

    The name of a file is a hash of what decides the member: branch, content of the store, number, library; the split that
    is ranked is no part of it.  workers: processes that are expected to fill the folder together; so many share the
    members that a GPU would train as one.  trained, loaded: how many ``fetch`` has trained and found.
    """

    def __init__(self, folder: Path, experiment: Experiment, store: ClipStore, device: torch.device, *, workers: int = 1,
                 progress: bool = False):
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
            self._groups += [[(branch, member) for member in members[at:at + step]]
                             for at in range(0, len(members), step)]

    def fetch(self) -> dict[Key, Member]:
        """Load the members that are there, train and save the others; each is trained by one process alone.

        Those that are there are loaded first, so that a damaged file is found before hours of training.
        """
        found = {key: self._load(key) for key, path in self.paths.items() if path.exists()}
        with tqdm(total=len(self.paths), initial=len(found), desc="members", unit="member", disable=not self.progress,
                  leave=False) as bar:

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
            mine = [key for key in group if key not in found
                    and held.enter_context(claim(self.paths[key].with_suffix(".lock"), wait))]
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
    torch.save({"state": {name: value.cpu() for name, value in member.model.state_dict().items()},
                "clips": torch.from_numpy(member.clips), "losses": member.losses, "seconds": member.seconds}, content)
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
        raise ValueError(f"{path}: damaged, or not a member; once it is removed, that member is trained again"
                         ) from None
    return Member(branch, store, model.to(device).eval(), clips, losses, seconds)
