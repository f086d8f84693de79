"""Records of earlier versions of the library that count as made by this one are made again, number by number."""

import numpy as np
import pytest

from mmlib.records import SAME, fetch, library_hash, read_results
from mmlib.studies import plans

ARMS = ["quality, whitened means", "quality", "as coded"]  # nothing is trained; little; a map, statistics, drawn frames


def test_only_this_version_is_said_to_make_the_numbers_of_others():
    assert set(SAME) <= {library_hash()}


@pytest.mark.skipif(not SAME, reason="no other version is said to make the same numbers")
@pytest.mark.parametrize("name", ARMS)
def test_numbers_of_an_earlier_version_are_made_again(name, store, tmp_path_factory, monkeypatch):
    monkeypatch.setenv("MMLIB_CACHE", str(tmp_path_factory.getbasetemp() / "same"))
    arm = plans.aggregation(store)[name]
    kept = [r for r in read_results("04_arms.jsonl.gz") if r.experiment["seed"] == 0]
    said = {"aggregator": arm.aggregator, "classifier": arm.classifier}
    (before,) = (record for record in kept if said.items() <= record.experiment.items())
    assert before.library in SAME[library_hash()]
    (after,) = fetch(plans.placed({name: arm}, [0]), device="cpu")
    if (after.ap, after.losses) != (before.ap, before.losses):
        # On another kind of processor the last bit of a product differs, and training makes more of it.
        assert np.mean(after.ap) == pytest.approx(np.mean(before.ap), abs=0.003)
