"""Public sources of real faces: what they are, where they lie, under which terms, and how they are fetched."""

import hashlib
import tarfile
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path

import pandas as pd

from mmlib.data.features import digest
from mmlib.data.writer import partial_folder

ARCHIVE = "https://github.com/{repository}/archive/{commit}.tar.gz"
FILE = "https://raw.githubusercontent.com/{repository}/{commit}/{path}"
PACKAGE = "https://files.pythonhosted.org/packages/{0}/{1}/{2}/{path}"  # of a commit cut after two and four letters
PYPI = "pypi.org/"


@dataclass(frozen=True)
class Source:
    """A file, or all files below a folder (its `path` ends in `/`), of a public repository at one commit.

    A repository below `PYPI` is a package of Python there, and the commit is the file's blake2b-256.

    sha256: of the file; of a folder, that of the lines `sha256sum` would print for its files in order of their paths,
    as the archive that the repository's host packs need not stay the same.  megabytes: to download.
    """

    title: str
    repository: str
    commit: str
    path: str
    sha256: str
    megabytes: int
    terms: str

    @property
    def url(self) -> str:
        if self.repository.startswith(PYPI):
            return PACKAGE.format(self.commit[:2], self.commit[2:4], self.commit[4:], path=self.path)
        return (ARCHIVE if self.path.endswith("/") else FILE).format(**vars(self))

    def __str__(self) -> str:
        host = "" if self.repository.startswith(PYPI) else "github.com/"
        place = f"{host}{self.repository} at {self.commit[:12]}, {self.path}"
        return f"{self.title}: {place} ({self.megabytes} MB); terms: {self.terms}"


@cache
def known() -> dict[str, Source]:
    """Return every source by its name; `sources.csv` lists them."""
    table = pd.read_csv(files("mmlib.data") / "sources.csv", index_col="name", dtype={"commit": str})
    return {str(name): Source(**row) for name, row in table.to_dict("index").items()}


def fetch_source(name: str, folder: Path, *, progress: bool = False) -> Path:
    """Return the path of a source below `folder`, downloaded unless it is there; either way its sha256 is checked.

    A download takes its place when it is complete and right.  A ValueError says that it cannot be had, or is another.
    """
    source = known()[name]
    place = folder / name
    if not source.path.endswith("/"):
        return _download(source.url, place, Path(source.path).name, f"sha256:{source.sha256}", progress)
    if place.exists():
        _check_folder(place, source)
        return place
    archive = _download(source.url, folder, f"{name}-{source.commit}.tar.gz", None, progress)
    try:
        with partial_folder(place, "") as partial:
            try:
                _unpack(archive, source.path, partial)
            except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
                if getattr(error, "errno", None):  # a full disk
                    raise
                raise ValueError(f"{archive}: not a whole archive ({error}), removed; fetch it again") from None
            _check_folder(partial, source, archive)
    except ValueError:
        archive.unlink()
        raise
    archive.unlink()
    return place


def manifest(folder: Path) -> str:
    """Return the lines that `sha256sum` would print for the files below a folder, in order of their paths."""
    paths = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    return "".join(f"{digest(paths[name])['sha256']}  {name}\n" for name in sorted(paths))


def _check_folder(folder: Path, source: Source, archive: Path | None = None) -> None:
    text = manifest(folder)
    found = hashlib.sha256(text.encode()).hexdigest()
    if found != source.sha256:
        what = f"the sha256 of its {text.count(chr(10))} files is {found}, not {source.sha256}"
        raise ValueError(
            f"{archive or folder}: not the published files, {what}; {'removed' if archive else 'remove it'}"
        )


def _unpack(archive: Path, path: str, folder: Path) -> None:
    """Unpack the files below `path` of the one folder that the archive of a repository holds."""
    with tarfile.open(archive, "r|gz") as tar:
        for member in tar:
            member.name = member.name.partition("/")[2]
            if member.isfile() and member.name.startswith(path):
                tar.extract(member, folder, filter="data")


def _download(url: str, folder: Path, name: str, known: str | None, progress: bool) -> Path:
    import pooch

    pooch.get_logger().setLevel("WARNING")  # the command says what is fetched, from where
    loader = pooch.HTTPDownloader(progressbar=progress, timeout=60)
    try:
        return Path(pooch.retrieve(url, known, fname=name, path=folder, downloader=loader))
    except OSError as error:
        if error.errno is not None:  # of this machine; those of requests have none
            raise
        answer = getattr(error, "response", None)
        reason = type(error).__name__ if answer is None else f"HTTP {answer.status_code}"
        how = f"without a network, put the file there as {folder / name}"
        raise ValueError(f"{url}: cannot be downloaded ({reason}); {how}") from None


def announce(names: Iterable[str], folder: Path) -> list[str]:
    """Say of each source what it is, where it lies, under which terms, and whether it is below `folder` already."""
    lines = []
    for name in names:
        source = known()[name]
        there = folder / name / ("" if source.path.endswith("/") else Path(source.path).name)
        lines.append(f"{source}{'; already there' * there.exists()}")
    return lines
