"""The challenge's text files: ground truth of train and val, and the submission.

Windows line ends, spaces at the end of a line and empty lines at the end of a file are read as if they
were not there; anything else that departs from the format is refused with file, line and text. Clip names
carry `.mp4` in the files and nowhere else.
"""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

RESULT_LIMIT = 100  # clips to a line of a submission


def read_train_truth(path: str | Path) -> pd.DataFrame:
    """Read `train_gt.txt`, a clip and its identity a line: columns clip and identity, row i is line i + 1."""
    rows, seen = [], {}
    for number, words in enumerate(_read_lines(Path(path)), 1):
        if len(words) != 2 or not _is_clip(words[0]) or _is_clip(words[1]):
            raise ValueError(f"{path}, line {number}: expected 'CLIP.mp4 IDENTITY', got {' '.join(words)!r}")
        clip = words[0].removesuffix(".mp4")
        if clip in seen:
            raise ValueError(f"{path}, line {number}: clip {clip} is named twice, first on line {seen[clip]}")
        seen[clip] = number
        rows.append((clip, words[1]))
    if not rows:
        raise ValueError(f"{path}: empty")
    return pd.DataFrame(rows, columns=["clip", "identity"])


def read_val_truth(path: str | Path) -> tuple[list[str], list[list[str]]]:
    """Read `val_gt.txt`, one identity and its clips a line: identities and their clips, item i is line i + 1.

    Repeated identities and clips are kept: the official score gives them a meaning.
    """
    identities, clips = _read_ranking(Path(path))
    if not identities:
        raise ValueError(f"{path}: empty")
    return identities, clips


def read_result(path: str | Path, *, id_num: int | None = None) -> tuple[list[str], list[list[str]]]:
    """Read a submission, in the format of `val_gt.txt` with the best clip first: identities, ranked clips.

    A line may name 100 clips after repeats are dropped; repeats themselves are kept here. With `id_num`,
    the number of lines of the ground truth, a file with more lines is refused.
    """
    identities, ranked = _read_ranking(Path(path))
    for number, clips in enumerate(ranked, 1):
        distinct = len(set(clips))
        if distinct > RESULT_LIMIT:
            raise ValueError(f"{path}, line {number}: {distinct} clips, at most {RESULT_LIMIT} are allowed")
    if id_num is not None and len(identities) > id_num:
        raise ValueError(f"{path}: {len(identities)} lines, the ground truth has {id_num}")
    return identities, ranked


def write_train_truth(path: str | Path, clips: Iterable[str], identities: Iterable[str]) -> None:
    """Write `train_gt.txt`."""
    _write(Path(path), (f"{clip}.mp4 {identity}\n" for clip, identity in zip(clips, identities, strict=True)))


def write_val_truth(path: str | Path, identities: Iterable[str], clips: Iterable[Sequence[str]]) -> None:
    """Write `val_gt.txt`, with the space that ends each line of the original."""
    _write(
        Path(path),
        (
            " ".join([identity, *(f"{clip}.mp4" for clip in of)]) + " \n"
            for identity, of in zip(identities, clips, strict=True)
        ),
    )


def write_result(path: str | Path, identities: Sequence[str], ranking: np.ndarray, clips: Sequence[str]) -> None:
    """Write a submission: `ranking` (C, K) holds positions in `clips` (N,), best first, -1 for none."""
    if ranking.shape[1] > RESULT_LIMIT:
        raise ValueError(f"ranking: {ranking.shape[1]} clips a line, at most {RESULT_LIMIT} are allowed")
    names = np.asarray(clips, object)
    write_val_truth(path, identities, (names[line[line >= 0]] for line in ranking))


def _is_clip(word: str) -> bool:
    return word.endswith(".mp4") and word != ".mp4"


def _read_lines(path: Path) -> list[list[str]]:
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise ValueError(f"{path}: missing") from None
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise ValueError(f"{path}: not text, byte {error.start} is {byte:#04x}") from None
    return [line.split() for line in text.rstrip().split("\n")] if text.strip() else []


def _read_ranking(path: Path) -> tuple[list[str], list[list[str]]]:
    lines = _read_lines(path)
    for number, words in enumerate(lines, 1):
        wrong = not words or _is_clip(words[0]) or any(not _is_clip(word) for word in words[1:])
        if wrong:
            got = " ".join(words)
            raise ValueError(
                f"{path}, line {number}: expected 'IDENTITY CLIP.mp4 CLIP.mp4 ...', "
                f"got {got if len(got) < 80 else got[:76] + ' ...'!r}"
            )
    clips = [[word.removesuffix(".mp4") for word in words[1:]] for words in lines]
    return [words[0] for words in lines], clips


def _write(path: Path, lines: Iterable[str]) -> None:
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        with open(partial, "w", encoding="utf-8", newline="\n") as file:
            file.writelines(lines)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
