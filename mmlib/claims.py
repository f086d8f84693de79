"""Work that processes share, on one machine or many: claim a task by a lock on a file, get help, clear away."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TypeVar

from filelock import FileLock, Timeout
from tqdm import tqdm

PATIENCE = 1.0  # seconds to wait for a claim, once every task that is left is claimed by others
Task = TypeVar("Task")


def cache_folder() -> Path:
    """Return the folder of simulated worlds and records: ``MMLIB_CACHE``, else the user's cache folder."""
    named = os.environ.get("MMLIB_CACHE")
    if not named:
        from platformdirs import user_cache_dir  # here: a machine may lack the package that has named its folder

        named = user_cache_dir("mmlib", appauthor=False)
    try:
        return Path(named).expanduser().absolute()
    except RuntimeError:
        raise ValueError(f"MMLIB_CACHE: there is no such home folder: {named}") from None


@contextmanager
def claim(path: Path, wait: float = -1) -> Iterator[bool]:
    """Hold the lock file ``path`` for a block, and yield whether it is held.

    wait: seconds to wait for another process to let go of it; below 0 without end.  The file stays.  A folder without
    ``flock``, which a shared one must carry between machines, is refused: a killed process would leave its claims.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if sys.platform != "win32":
            import fcntl

            with tempfile.TemporaryFile(dir=path.parent) as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        hint = "; MMLIB_CACHE names another" if path.is_relative_to(cache_folder()) else ""
        raise ValueError(f"{path.parent}: a folder where no lock can be held ({error.strerror}){hint}") from None
    lock = FileLock(path)
    with suppress(Timeout):
        lock.acquire(timeout=wait)
    try:
        yield lock.is_locked
    finally:
        lock.release()


def share(tasks: Iterable[Task], attempt: Callable) -> Iterator[int]:
    """Do tasks that other processes may be doing too: those that are free first, the others when they become free.

    attempt: from a task and the seconds to wait for its claims to how much of it is done, which is yielded, and what of
    it others have claimed, which is attempted again, as they may die.
    """
    tasks, wait = list(tasks), 0.0
    while tasks:
        left = []
        for task in tasks:
            done, rest = attempt(task, wait)
            yield done
            left += [rest] if rest else []
        wait = PATIENCE if left == tasks else 0.0
        tasks = left


@contextmanager
def helped(number: int, function: Callable) -> Iterator[None]:
    """Have a function, which shares what it does by claims, called in so many other processes during a block.

    They end with it, or with this process.
    """
    context = multiprocessing.get_context("spawn")
    ended, keep = context.Pipe(duplex=False)
    helpers = [context.Process(target=_help, args=(ended, function), daemon=True) for _ in range(number)]
    for process in helpers:
        process.start()
    try:
        yield
    finally:
        for process in helpers:
            process.terminate()
        for process in helpers:
            process.join()
        keep.close()


def _help(ended: Connection, function: Callable) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that is helped is interrupted too
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(number))  # unwind, so that nothing half-made stays
    threading.Thread(target=_end_with, args=(ended,), daemon=True).start()
    tqdm.set_lock(threading.RLock())  # a bar's own lock is one of the system, and its loss is said when this one ends
    try:
        with suppress(Exception):  # what fails here fails there too
            function()
    finally:
        os._exit(0)  # nothing is left to unwind, and to be ended while Python ends would be said on the page


def _end_with(ended: Connection) -> None:
    with suppress(EOFError, OSError):
        ended.recv()  # nothing is ever sent: it returns when the process that is helped is gone
    os._exit(1)


def is_helper() -> bool:
    """Say whether this process was started by another one, which then has the processors to share."""
    return multiprocessing.parent_process() is not None


def remove_locks(folder: Path) -> None:
    """Remove the locks in a folder that nobody holds; a process that has just opened one notices that it is gone."""
    for path in folder.glob("*.lock"):
        with claim(path, 0) as held, suppress(OSError):  # not every system removes a file that is open
            if held:
                path.unlink()


def clear_partial(path: Path) -> None:
    """Remove what killed processes left of ``path`` half written; only for a process that has claimed it."""
    for left in path.parent.glob(f".{path.name}.partial-*"):
        shutil.rmtree(left, ignore_errors=True)
        with suppress(OSError):
            left.unlink()
