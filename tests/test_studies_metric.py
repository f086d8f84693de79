"""The scores of files that depart from the format, by hand; the script's were also compared with it itself."""

import numpy as np
import pytest
from conftest import of

from mmlib import retrieve
from mmlib.studies import metric

BY_HAND = {  # ours and the script's, None where refused
    "nothing": (1, 1),
    "Windows line ends, blanks at the ends of lines": (1, 1),
    "two blanks between names": (1, ((1 + 2 / 3) / 2 + 1) / 2),  # the second name is empty
    "a tab between names": (1, 1 / 2),  # a name with a tab in it, and one with a form feed
    "a form feed between names": (1, 1 / 2),
    "a byte-order mark before the submission": (1, 1 / 2),  # identity 1 is called otherwise
    "an empty line at the end of the submission": (1, None),  # a line too many
    "an empty line at the end of the ground truth": (1, 2 / 3),  # a third identity
    "an empty line within the ground truth": (None, 2 / 3),
    "names without .mp4 in both files": (None, 1),
    "the first identity on both lines of the submission": (None, 1 / 2 / 2 / 2),  # a at the second rank, of two; of two
    "one identity on both lines of the ground truth": (1 / 2, 1 / 2),
    "a clip twice on a line of the submission": (1, 1),
    "a clip twice on a line of the ground truth": ((1 / 2 + 1) / 2, (1 / 2 + 1) / 2),
    "an identity without clips in the ground truth": (1 / 2, None),  # a division by 0
    "an unknown identity in place of the second": (1 / 2, 1 / 2),
    "the same, with over a hundred clips": (1 / 2, 1 / 2),
    "an unknown identity twice, in place of both": (0, 0),
    "more than a hundred clips of an identity": (None, None),
    "more lines than the ground truth has": (None, None),
}


def test_every_case_is_scored_as_by_hand():
    found = metric.edge_cases().set_index("case")
    assert found.index.tolist() == list(BY_HAND)
    for case, expected in BY_HAND.items():
        wanted = [np.nan if value is None else value for value in expected]
        assert found.loc[case, ["ours", "script"]].tolist() == pytest.approx(wanted, nan_ok=True), case


def test_what_is_refused_here_is_said_so():
    found = metric.edge_cases()
    assert (found["ours"].isna() == (found["here"] == "refused")).all()


@pytest.fixture(scope="module")
def found(store):
    return retrieve.retrieve(of(store), store)


def test_identities_have_their_counts_and_the_beginning_of_their_rankings(store, found):
    frame, clips = metric.identities_frame(found, store, places=5), store.clips
    assert frame["identity"].tolist() == [store.identities[query] for query in found.queries]
    for query, row in zip(found.queries, frame.to_dict("records"), strict=True):
        both = [((clips["identity"] == query) & (clips["split"] == split)).sum() for split in ("train", "val")]
        assert [row["train"], row["clips"]] == both
        low, high = {"1": (1, 1), "3–5": (3, 5), "over 20": (21, 999)}.get(row["group"], (2, 20))
        assert low <= row["clips"] <= high
    shown = [[int(place) for place in places] for places in frame["places"]]
    assert np.array_equal(shown, found.hits[:, :5]) and np.array_equal(frame["ap"], found.ap)


def test_groups_of_identities_add_up_to_all(store, found):
    frame = metric.by_clips(metric.identities_frame(found, store))
    assert frame["identities"].sum() == len(found.ap)
    assert (frame["identities"] * frame["ap"]).sum() == pytest.approx(found.ap.sum())
    assert (frame["identities"] * frame["whole"]).sum() == pytest.approx((found.ap == 1).sum())
