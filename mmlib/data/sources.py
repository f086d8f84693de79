"""Public sources of real faces: what they are, where they lie, under which terms, and how they are fetched."""

import hashlib
import tarfile
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from mmlib.data.writer import partial_folder

ARCHIVE = "https://github.com/{repository}/archive/{commit}.tar.gz"
FILE = "https://raw.githubusercontent.com/{repository}/{commit}/{path}"


@dataclass(frozen=True)
class Source:
    """A file, or all files below a folder (its `path` ends in `/`), of a public repository at one commit.

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
        return (ARCHIVE if self.path.endswith("/") else FILE).format(**vars(self))

    def __str__(self) -> str:
        place = f"github.com/{self.repository} at {self.commit[:12]}, {self.path}"
        return f"{self.title}: {place} ({self.megabytes} MB); terms: {self.terms}"


SOURCES = {
    "ytf": Source(
        "YouTube Faces frames",
        "udacity/P1_Facial_Keypoints",
        "6e55adc6bd032d9fb1ad41a4c3e68aae847cdf81",
        "data/",
        "959a777bb9edaa664bbbd04195661269ec3e7762c9f60b9d6db7f8d87fa05dee",
        350,
        "repository MIT, the images from YouTube Faces (Tel Aviv University), for research",
    ),
    "cfp": Source(
        "Celebrities in Frontal-Profile",
        "sburrel/AIDL2019_PROJECT_SBD",
        "3c4e16d044fb39da770850c1d655275e7dea09e3",
        "dataset-cfp/",
        "a269b88518acb39ab797f4d1dfdd9237e3eb4551cd1519b46d78d14108206a64",
        90,
        "repository MIT, the data set states none (Sengupta et al. 2016), for research",
    ),
    "lfw": Source(
        "Labeled Faces in the Wild, aligned",
        "georg-jung/lfw-pairs-aligned",
        "cdf74e7a89c2126f11c2d8aa20cc35b1643487a0",
        "data/",
        "1c3d31f08e13c21924fe5da2056ff4cb0e0da4f7f00cc68b59a345881fc00aca",
        40,
        "none stated, for research",
    ),
    "edgeface": Source(
        "EdgeFace-XS (int8)",
        "yayoimizuha/face_recognition_train",
        "3e631e35bf207a09aa2af79239961cfb14248c0a",
        "checkpoints/edgeface_xs_q.pt",
        "a31314377876ab9fa2a75e5638bc528efe79fd17d5c9c0a228fb7f846d7581a6",
        3,
        "BSD-3-Clause (Idiap)",
    ),
    "mobilefacenet": Source(
        "MobileFaceNet",
        "Xiaoccer/MobileFaceNet_Pytorch",
        "26bd8d262017e472a3c7f56d62929e2138a70aeb",
        "model/best/068.ckpt",
        "e839247cdbdfc023fb7cadeaf53a4549d50c8fc24ad154c02e35920ea8910d99",
        4,
        "none stated",
    ),
    "lightqnet": Source(
        "LightQNet dm100, quality",
        "KaenChan/lightqnet",
        "1f27601e441b653ffb468114cdbd55b8aa2821ad",
        "lightqnet-dm100.pb",
        "057b8ea2714953b70745934bcd7a927f4676a827a55509a2adc64e7282f836f3",
        2,
        "MIT",
    ),
    "retinaface": Source(
        "RetinaFace mobilenet0.25, detector",
        "cunjian/pytorch_face_landmark",
        "6f34bf9f034aa2f521952f825e6ccc567deb42d6",
        "Retinaface/weights/mobilenet0.25_Final.pth",
        "5f88f7957d9eaef82b49b9e0202bc56e97292e2aede2999209accd34442cc4df",
        2,
        "MIT",
    ),
}


def fetch_source(name: str, folder: Path, *, progress: bool = False) -> Path:
    """Return the path of a source below `folder`, downloaded unless it is there; either way its sha256 is checked.

    A download takes its place when it is complete and right.  A ValueError says that it cannot be had, or is another.
    """
    source = SOURCES[name]
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
    lines = []
    for name in sorted(paths):
        with open(paths[name], "rb") as file:
            lines.append(f"{hashlib.file_digest(file, 'sha256').hexdigest()}  {name}\n")
    return "".join(lines)


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
        path = SOURCES[name].path
        there = folder / name / ("" if path.endswith("/") else Path(path).name)
        lines.append(f"{SOURCES[name]}{'; already there' * there.exists()}")
    return lines
