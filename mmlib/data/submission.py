"""The challenge's text files: ground truth of train and val, and the submission.

Windows line ends, spaces at the end of a line and empty lines at the end of a file count for nothing; anything else
that departs from the format is refused. Clip names carry `.mp4` in the files and nowhere else.
"""

from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path
from textwrap import shorten

import numpy as np
import pandas as pd

from mmlib.data.content import write_whole

RESULT_LIMIT = 100  # clips to a line of a submission
NAME_RULE = "the challenge's text files take names of one word, those of identities not ending in .mp4"
Lines = tuple[list[str], list[list[str]]]  # identities, and the clips of each


def read_train_truth(path: str | Path) -> pd.DataFrame:
    """Read `train_gt.txt`, a clip and its identity a line: columns clip and identity, row i is line i + 1."""
    found: dict[str, tuple[int, str]] = {}
    for number, words in enumerate(_read_lines(Path(path), needed=True), 1):
        if len(words) != 2 or not _is_clip(words[0]) or _is_clip(words[1]):
            raise ValueError(f"{path}, line {number}: expected 'CLIP.mp4 IDENTITY', got {' '.join(words)!r}")
        clip = words[0].removesuffix(".mp4")
        if clip in found:
            raise ValueError(f"{path}, line {number}: clip {clip} is named twice, first on line {found[clip][0]}")
        found[clip] = number, words[1]
    return pd.DataFrame({"clip": [*found], "identity": [identity for _, identity in found.values()]})


def read_val_truth(path: str | Path, *, needed: bool = True) -> Lines:
    """Read `val_gt.txt`, one identity and its clips a line: identities and their clips, item i is line i + 1.

    Repeats are kept: the official score gives them a meaning. needed: refuse an empty file.
    """
    lines = _read_lines(Path(path), needed)
    for number, words in enumerate(lines, 1):
        if not words or _is_clip(words[0]) or not all(map(_is_clip, words[1:])):
            got = shorten(" ".join(words), 80, placeholder=" ...")
            raise ValueError(f"{path}, line {number}: expected 'IDENTITY CLIP.mp4 CLIP.mp4 ...', got {got!r}")
    return [words[0] for words in lines], [[word.removesuffix(".mp4") for word in words[1:]] for words in lines]


def read_result(path: str | Path) -> Lines:
    """Read a submission, as `val_gt.txt` with the best clip first: 100 clips a line beside repeats, which are kept."""
    result = read_val_truth(path, needed=False)
    for number, clips in enumerate(result[1], 1):
        if (distinct := len(set(clips))) > RESULT_LIMIT:
            raise ValueError(f"{path}, line {number}: {distinct} clips, at most {RESULT_LIMIT} are allowed")
    return result


def count_unknown(truth: Lines, result: Lines) -> dict[str, tuple[int, int]]:
    """Count the identities and the clips that a result names, and those of them that the ground truth does not."""
    named = {"identities": {*result[0]}, "clips": {*chain(*result[1])}}
    known = {"identities": truth[0], "clips": [*chain(*truth[1])]}
    return {kind: (len(names), len(names.difference(known[kind]))) for kind, names in named.items()}


def write_train_truth(path: str | Path, clips: Sequence[str], identities: Sequence[str]) -> None:
    """Write `train_gt.txt`."""
    check_names(clips, identities)
    lines = (f"{clip}.mp4 {identity}\n" for clip, identity in zip(clips, identities, strict=True))
    write_whole(Path(path), "".join(lines).encode())


def write_val_truth(path: str | Path, identities: Sequence[str], clips: Sequence[Sequence[str]]) -> None:
    """Write `val_gt.txt`, with the space that ends each line of the original."""
    check_names(chain(*clips), identities)
    words = ([name, *(f"{clip}.mp4" for clip in of)] for name, of in zip(identities, clips, strict=True))
    write_whole(Path(path), "".join(" ".join(line) + " \n" for line in words).encode())


def write_result(path: str | Path, identities: Sequence[str], ranking: np.ndarray, clips: Sequence[str]) -> None:
    """Write a submission: `ranking` (C, K) holds positions in `clips` (N,), best first, -1 for none."""
    if ranking.shape[1] > RESULT_LIMIT:
        raise ValueError(f"ranking: {ranking.shape[1]} clips a line, at most {RESULT_LIMIT} are allowed")
    names = np.asarray(clips, object)
    write_val_truth(path, identities, [names[line[line >= 0]] for line in ranking])


def check_names(clips: Iterable[str], identities: Iterable[str]) -> None:
    """Raise for the first name that these files cannot hold."""
    for kind, names in (("clip", clips), ("identity", identities)):
        if bad := bad_names(kind, names):
            raise ValueError(f"{kind} {bad[0]!r}: {NAME_RULE}")


def bad_names(kind: str, names: Iterable[str]) -> list[str]:
    """Return those names of a `kind`, clip or identity, that would not be read back from these files as they are."""
    # a byte-order mark in front would be lost
    read = {name: name.encode(errors="ignore").decode("utf-8-sig").split() for name in names}
    return [name for name, words in read.items() if words != [name] or (kind == "identity" and _is_clip(name))]


def _is_clip(word: str) -> bool:
    return word.endswith(".mp4") and word != ".mp4"


def _read_lines(path: Path, needed: bool) -> list[list[str]]:
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise ValueError(f"{path}: missing") from None
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise ValueError(f"{path}: not text, byte {error.start} is {byte:#04x}") from None
    if needed and not text.strip():
        raise ValueError(f"{path}: empty")
    return [line.split() for line in text.rstrip().split("\n")] if text.strip() else []
