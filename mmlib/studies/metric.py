"""What chapter 02 says of single identities, and of files that depart from the format, here and by the script."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pandas as pd

from mmlib.data.store import ClipStore
from mmlib.data.submission import RESULT_LIMIT, answered, check_as_script, read_as_script, read_result, read_val_truth
from mmlib.metrics import official_score, script_score
from mmlib.retrieve import Retrieval

_MANY = " ".join(f"x{number}.mp4" for number in range(RESULT_LIMIT + 1))
_TRUTH = _RESULT = "1 a.mp4 b.mp4\n2 c.mp4\n"  # each of two identities is ranked rightly
# What departs, what is done about it here, and the two files.
CASES = [
    ("nothing", "", _TRUTH, _RESULT),
    ("Windows line ends, blanks at the ends of lines", "count for nothing", _TRUTH, "1 a.mp4 b.mp4 \r\n2 c.mp4 \r\n"),
    ("two blanks between names", "count as one", _TRUTH, "1 a.mp4  b.mp4\n2 c.mp4\n"),
    ("a tab between names", "counts as a blank", _TRUTH, "1 a.mp4\tb.mp4\n2 c.mp4\n"),
    ("a form feed between names", "counts as a blank", _TRUTH, "1 a.mp4\fb.mp4\n2 c.mp4\n"),
    ("a byte-order mark before the submission", "counts for nothing", _TRUTH, f"\ufeff{_RESULT}"),
    ("an empty line at the end of the submission", "counts for nothing", _TRUTH, f"{_RESULT}\n"),
    ("an empty line at the end of the ground truth", "counts for nothing", f"{_TRUTH}\n", _RESULT),
    ("an empty line within the ground truth", "refused", "1 a.mp4 b.mp4\n\n2 c.mp4\n", _RESULT),
    ("names without .mp4 in both files", "refused", "1 a b\n2 c\n", "1 a b\n2 c\n"),
    ("the first identity on both lines of the submission", "refused", _TRUTH, "1 a.mp4 b.mp4\n1 x.mp4 a.mp4\n"),
    ("one identity on both lines of the ground truth", "the last holds, both count", "1 a.mp4\n1 b.mp4\n", "1 b.mp4\n"),
    ("a clip twice on a line of the submission", "the first counts", _TRUTH, "1 a.mp4 a.mp4 b.mp4\n2 c.mp4\n"),
    ("a clip twice on a line of the ground truth", "counts as two", "1 a.mp4 a.mp4\n2 c.mp4\n", _RESULT),
    ("an identity without clips in the ground truth", "has AP 0", "1 a.mp4 b.mp4\n2 \n", _RESULT),
    ("an unknown identity in place of the second", "ignored", _TRUTH, "1 a.mp4 b.mp4\n9 c.mp4\n"),
    ("the same, with over a hundred clips", "ignored", _TRUTH, f"1 a.mp4 b.mp4\n9 {_MANY}\n"),
    ("an unknown identity twice, in place of both", "ignored", _TRUTH, "9 a.mp4 b.mp4\n9 c.mp4\n"),
    ("more than a hundred clips of an identity", "refused", _TRUTH, f"1 {_MANY}\n2 c.mp4\n"),
    ("more lines than the ground truth has", "refused", _TRUTH, f"{_RESULT}9 x.mp4\n"),
]


GROUPS = {"1": 1, "2": 2, "3–5": 5, "6–10": 10, "11–20": 20, "over 20": np.inf}  # clips to find, up to


def identities_frame(found: Retrieval, store: ClipStore, *, places: int = 20) -> pd.DataFrame:
    """Return a row an identity: identity (name), train, clips (counts), group, ap, places (1 a right clip, 0 not)."""
    train = np.bincount(store.identity_of(store.select("train", labelled=True)), minlength=len(store.identities))
    counts = {"train": train[found.queries], "clips": found.relevant}
    group = pd.cut(found.relevant, [0, *GROUPS.values()], labels=[*GROUPS])
    first = ["".join("01"[int(hit)] for hit in hits[:places]) for hits in found.hits]
    known = {"identity": store.identities[found.queries]} | counts | {"group": group, "ap": found.ap, "places": first}
    return pd.DataFrame(known)


def by_clips(identities: pd.DataFrame) -> pd.DataFrame:
    """Return how identities fare by the clips that there are to find: group, identities, ap (mean), whole (AP of 1)."""
    ap = identities.groupby("group", observed=True)["ap"]
    return ap.agg(identities="size", ap="mean", whole=lambda ap: (ap == 1).mean()).reset_index()


def edge_cases() -> pd.DataFrame:
    """Score small files by both rules: case, here (what is done), ours and script (MAP@100, NaN where refused)."""
    with TemporaryDirectory() as folder:
        rows = [(case, here, *scores(Path(folder), truth, result)) for case, here, truth, result in CASES]
    return pd.DataFrame(rows, columns=["case", "here", "ours", "script"])


def scores(folder: Path, truth: str, result: str) -> tuple[float, float]:
    """Score two texts, written to `folder`, as `mmlib evaluate` does and as with --strict; NaN where refused."""
    paths = folder / "val_gt.txt", folder / "result.txt"
    for path, text in zip(paths, (truth, result)):
        path.write_bytes(text.encode())
    found = []
    for score in (_ours, _script):
        try:
            found.append(score(*paths))
        except ValueError:
            found.append(np.nan)
    return found[0], found[1]


def _ours(truth: Path, result: Path) -> float:
    wanted = read_val_truth(truth)
    return official_score(wanted, answered(result, wanted, read_result(result, known={*wanted[0]}))).map_at_k


def _script(truth: Path, result: Path) -> float:
    lines = read_as_script(truth), read_as_script(result)
    check_as_script((truth, result), *lines)
    return script_score(*lines)
