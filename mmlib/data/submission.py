"""The challenge's text files: ground truth of train and val, and the submission.

Any white space divides names, however much of it; a byte-order mark and empty lines at the end of a file count for
nothing. Anything else that departs from the format is refused. The script of the challenge takes every blank at its
word and no other white space: see `read_as_script`. Clip names carry `.mp4` in the files and nowhere else.
"""

from collections import Counter
from collections.abc import Container, Iterable, Sequence
from itertools import accumulate, chain
from operator import eq
from pathlib import Path

import numpy as np
import pandas as pd

from mmlib.data.content import write_whole

RESULT_LIMIT = 100  # clips to a line of a submission
NAME_RULE = "the challenge's text files take names of one word, those of identities not ending in .mp4"
Lines = tuple[Sequence[str], Sequence[Sequence[str]]]  # identities, and the clips of each


class ClipLists(Sequence[list[str]]):
    """The clips of each line, split when they are asked for: a million names in memory cost more than their file.

    content: bytes, of which `start` to `stop` are the clips of a line, names with `.mp4` and one blank between them.
    sizes (n,): how many there are, repeats too.
    """

    def __init__(self, content: bytes, start: list[int], stop: list[int], sizes: np.ndarray):
        self._content, self._start, self._stop, self.sizes = content, start, stop, sizes

    def __len__(self) -> int:
        return len(self._start)

    def __getitem__(self, line):
        if isinstance(line, slice):
            return [self[each] for each in range(len(self))[line]]
        return f"{self._content[self._start[line] : self._stop[line]].decode()} ".split(".mp4 ")[:-1]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and all(map(eq, self, other))

    def __repr__(self) -> str:
        return repr([*self])


def read_train_truth(path: str | Path, *, bare: bool = False) -> pd.DataFrame:
    """Read `train_gt.txt`, a clip and its identity a line: columns clip and identity, row i is line i + 1.

    bare: clips may stand without `.mp4`, as keys of pickles may.
    """
    found: dict[str, tuple[int, str]] = {}
    for number, words in enumerate(_split(path, _read_bytes(path), needed=True), 1):
        if len(words) != 2 or not (bare or _is_clip(words[0])) or _is_clip(words[1]):
            raise ValueError(f"{path}, line {number}: expected 'CLIP.mp4 IDENTITY', got {short(' '.join(words))!r}")
        clip = words[0].removesuffix(".mp4")
        if clip in found:
            first = found[clip][0]
            raise ValueError(f"{path}, line {number}: clip {short(clip)} is named twice, first on line {first}")
        found[clip] = number, words[1]
    return pd.DataFrame({"clip": [*found], "identity": [identity for _, identity in found.values()]})


def read_val_truth(path: str | Path, *, needed: bool = True, bare: bool = False) -> tuple[list[str], ClipLists]:
    """Read `val_gt.txt`, one identity and its clips a line: identities and their clips, item i is line i + 1.

    Repeats are kept: the official score gives them a meaning. needed: refuse an empty file. bare: clips may
    stand without `.mp4`, as keys of pickles may; not in files to be scored, which the challenge would score 0.
    """
    content = _read_bytes(path)
    if (plain := _read_plain(content)) is not None:
        return plain
    names, texts, sizes = [], [b""], []
    for number, words in enumerate(_split(path, content, needed), 1):
        if not words or _is_clip(words[0]) or not (bare or all(map(_is_clip, words[1:]))):
            got = repr(short(" ".join(words)))
            if words:
                at = 0 if _is_clip(words[0]) else next(at for at, word in enumerate(words[1:], 1) if not _is_clip(word))
                got = f"{got}, of which word {at + 1} is {short(words[at])!r}"
            raise ValueError(f"{path}, line {number}: expected 'IDENTITY CLIP.mp4 CLIP.mp4 ...', got {got}")
        names.append(words[0])
        texts.append(" ".join(word if _is_clip(word) else f"{word}.mp4" for word in words[1:]).encode())
        sizes.append(len(words) - 1)
    ends = [*accumulate(map(len, texts))]
    return names, ClipLists(b"".join(texts), ends[:-1], ends[1:], np.array(sizes, np.int64))


def read_result(path: str | Path, *, known: Container[str] | None = None) -> tuple[list[str], ClipLists]:
    """Read a submission, as `val_gt.txt` with the best clip first: 100 clips a line beside repeats, which are kept.

    known: identities of the ground truth; lines of others are ignored by the score and may be longer.
    """
    identities, ranked = read_val_truth(path, needed=False)
    for line in np.flatnonzero(ranked.sizes > RESULT_LIMIT).tolist():
        if (distinct := len({*ranked[line]})) > RESULT_LIMIT and (known is None or identities[line] in known):
            raise ValueError(f"{path}, line {line + 1}: {distinct} clips, at most {RESULT_LIMIT} are allowed")
    return identities, ranked


def read_as_script(path: str | Path) -> Lines:
    """Read ground truth or a submission as the script of the challenge does: cut at every single blank, nowhere else.

    So two blanks have a name of no letters between them, a tab or a byte-order mark is part of a name, and each line
    counts, an empty one too. `.mp4` stays. For `metrics.script_score`.
    """
    try:
        with open(path, encoding="utf-8") as file:
            lines = [line.strip().split(" ") for line in file]
    except FileNotFoundError:
        raise ValueError(f"{path}: missing") from None
    except UnicodeDecodeError as error:
        raise _no_text(path, error) from None
    return [words[0] for words in lines], [words[1:] for words in lines]


def answered(path: str | Path, truth: Lines, result: Lines) -> Lines:
    """Return the lines of the submission `result`, read from `path`, whose identities `truth` has: what is scored.

    All lines count in the limit: ValueError for more than the ground truth has, and for one of these identities twice,
    as nothing says which line is meant.
    """
    _check_length(path, truth, result)
    known = {*truth[0]}
    first: dict[str, int] = {}
    for line, name in enumerate(result[0], 1):
        if name in known and first.setdefault(name, line) != line:
            where = f"{path}, line {line}: identity {short(name)}"
            raise ValueError(f"{where} is named twice, first on line {first[name]}")
    if len(first) == len(result[0]):
        return result
    return [*first], [result[1][line - 1] for line in first.values()]


def check_as_script(paths: Sequence[str | Path], truth: Lines, result: Lines) -> None:
    """Raise for what the script of the challenge would stop at: the files and lines of `read_as_script`."""
    if not truth[0]:
        raise ValueError(f"{paths[0]}: empty, so that the script would divide by 0")
    _check_length(paths[1], truth, result)
    last, wanted = ({name: line for line, name in enumerate(of[0])} for of in (result, truth))
    for name, line in last.items():
        if name not in wanted:
            continue
        if len(result[1][line]) > RESULT_LIMIT and (distinct := len({*result[1][line]})) > RESULT_LIMIT:
            raise ValueError(f"{paths[1]}, line {line + 1}: {distinct} clips, at most {RESULT_LIMIT} are allowed")
        if not truth[1][wanted[name]]:
            where = f"{paths[0]}, line {wanted[name] + 1}: identity {short(name) or repr(name)}"
            raise ValueError(f"{where} has no clip and is submitted, so that the script would divide by 0")


def _check_length(path: str | Path, truth: Lines, result: Lines) -> None:
    if (lines := len(result[0])) > (most := len(truth[0])):
        raise ValueError(f"{path}, line {most + 1}: {lines} lines, more than the {most} of the ground truth")


def without_lines(lines: Lines, identities: Container[str]) -> Lines:
    """Return lines without those of some identities."""
    if not identities:
        return lines
    kept = [line for line, name in enumerate(lines[0]) if name not in identities]
    return [lines[0][line] for line in kept], [lines[1][line] for line in kept]


def count_unknown(truth: Lines, result: Lines) -> dict[str, tuple[int, int]]:
    """Count the identities and the clips that a result names, and those of them that the ground truth does not."""
    named = {"identities": {*result[0]}, "clips": {*chain.from_iterable(result[1])}}
    known = {"identities": truth[0], "clips": [*chain.from_iterable(truth[1])]}
    return {kind: (len(names), len(names.difference(known[kind]))) for kind, names in named.items()}


def remarks(path: str | Path, truth: Lines, result: Lines) -> list[str]:
    """Say what the score of the submission `result`, read from `path`, passes over in silence, a sentence each.

    A clip that a line repeats is dropped, and an identity of `truth` without a line scores 0.
    """
    known, answering, said = {*truth[0]}, {*result[0]}, []
    lines = ((line, name, clips) for line, (name, clips) in enumerate(zip(*result), 1) if name in known)
    twice = [(line, name, clip) for line, name, clips in lines for clip, n in Counter(clips).items() if n > 1]
    if twice:
        line, name, clip = twice[0]
        more = f", and so are {len(twice) - 1} more" * (len(twice) > 1)
        where = f"{path}, line {line}: identity {short(name)}"
        said.append(f"{where} names clip {short(clip) or repr(clip)} more than once; a repeat is dropped{more}")
    if lacking := [name for name in dict.fromkeys(truth[0]) if name not in answering]:
        many = f"{len(lacking)} of {len(known)} identities of the ground truth"
        said.append(f"{path}: no line for {many}, which score 0; first: {short(lacking[0])}")
    return said


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
            raise ValueError(f"{kind} {short(bad[0])!r}: {NAME_RULE}")


def bad_names(kind: str, names: Iterable[str]) -> list[str]:
    """Return those names of a `kind`, clip or identity, that would not be read back from these files as they are."""
    # a byte-order mark in front would be lost
    read = {name: name.encode(errors="ignore").decode("utf-8-sig").split() for name in names}
    return [name for name, words in read.items() if words != [name] or (kind == "identity" and _is_clip(name))]


def short(text: str, most: int = 80) -> str:
    """Cut a text for a message: a file may name anything."""
    return text if len(text) <= most else f"{text[: most - 4]} ..."


def _is_clip(word: str) -> bool:
    return word.endswith(".mp4") and word != ".mp4"


def _read_bytes(path: str | Path) -> bytes:
    """Read a file, all lines ended by a newline alone."""
    try:
        content = Path(path).read_bytes()
    except FileNotFoundError:
        raise ValueError(f"{path}: missing") from None
    return content.replace(b"\r\n", b"\n") if b"\r" in content else content


def _split(path: str | Path, content: bytes, needed: bool) -> list[list[str]]:
    """Split the lines of a file into words; needed: refuse an empty one."""
    try:
        text = content.decode("utf-8-sig").rstrip()
    except UnicodeDecodeError as error:
        raise _no_text(path, error) from None
    if needed and not text:
        raise ValueError(f"{path}: empty")
    return [line.split() for line in text.split("\n")] if text else []


def _no_text(path: str | Path, error: UnicodeDecodeError) -> ValueError:
    return ValueError(f"{path}: not text, byte {error.start} is {error.object[error.start]:#04x}")


def _read_plain(content: bytes) -> tuple[list[str], ClipLists] | None:
    """Read lines of an identity and names of clips, of ASCII, with one blank between them; None if there is a fault.

    All words are checked at once; where this fails they are looked at one by one.
    """
    if len(content) < len(".mp4") or not content.isascii():
        return None
    byte = np.frombuffer(content, np.uint8)
    blocks = range(0, len(byte), 2**20)  # that stay in the processor's cache
    end = np.concatenate([np.flatnonzero(byte[at : at + 2**20] <= ord(" ")) + at for at in blocks])  # of each word
    mark = byte[end]
    if content[-1:] != b"\n":
        end, mark = np.append(end, len(byte)), np.append(mark, np.uint8(ord("\n")))
    size, last = np.diff(end, prepend=-1) - 1, mark == ord("\n")
    first = np.append(True, last[:-1])  # of its line
    clip = size > 4
    for back, letter in enumerate(b"4pm.", 1):
        clip &= byte[end - back] == letter
    right = np.where(first, (size > 0) & ~clip, clip | (last & (size == 0)))
    if not (right & (last | (mark == ord(" ")))).all():
        return None
    head, tail = np.flatnonzero(first), np.flatnonzero(last)
    start, stop = end[head], end[tail]
    names = [content[at:to].decode() for at, to in zip((start - size[head]).tolist(), start.tolist())]
    start = np.minimum(start + 1, stop)  # a line may have no more than its identity
    return names, ClipLists(content, start.tolist(), stop.tolist(), tail - head - (size[tail] == 0))
