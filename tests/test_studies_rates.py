from dataclasses import replace

import pytest
from conftest import made

from mmlib import systems
from mmlib.experiment import Experiment
from mmlib.records import read_results
from mmlib.studies import rates
from mmlib.systems import FUSIONS, FUSIONS_AT_RANDOM, LOSSES

ARMS = {**LOSSES, "attention": Experiment(aggregator="attention")}


def trial(name, epochs, value, seed=100, **rates):
    arm = ARMS[name]
    asked = replace(arm, seed=seed, training=replace(arm.training, epochs=epochs, **rates))
    return made(asked, measures={"map_at_100": value})


def search(name, rate="lr", **found):
    """Trials of an arm at three rates, by MAP; found: the short and the long one."""
    return [
        trial(name, epochs, value, **{rate: at})
        for epochs, values in zip((8, 16), found.values(), strict=True)
        for at, value in zip((1e-3, 3e-3, 1e-2), values, strict=True)
    ]


def test_search_keeps_the_best_of_each_length_and_the_best_arm_comes_first():
    records = [
        *search("margin", short=(0.1, 0.8, 0.6), long=(0.7, 0.6, 0.802)),
        *search("softmax", short=(0.1, 0.2, 0.9), long=(0.1, 0.2, 0.9)),
    ]
    frame = rates.search_frame(ARMS, records)
    columns = ["arm", "lr", "map_at_100", "longer lr", "longer map_at_100", "worth", "at the edge"]
    assert frame[columns].values.tolist() == [
        ["softmax", 1e-2, 0.9, 1e-2, 0.9, 0, True],
        ["margin", 3e-3, 0.8, 1e-2, 0.802, pytest.approx(0.2), False],
    ]


def test_search_averages_over_worlds_before_it_chooses():
    found = {1e-3: (0.5, 0.7), 3e-3: (0.1, 0.9)}  # of one world, the second would be the best
    records = [
        trial("margin", epochs, value, seed, lr=rate)
        for epochs in (8, 16)
        for rate, values in found.items()
        for seed, value in zip((100, 101), values, strict=True)
    ]
    row = rates.search_frame(ARMS, records).iloc[0]
    assert (row["lr"], row["map_at_100"], row["worth"]) == (1e-3, pytest.approx(0.6), 0)


def test_rate_of_the_aggregator_is_searched_like_that_of_the_network():
    records = search("attention", "aggregator_lr", short=(0.5, 0.4, 0.3), long=(0.4, 0.4, 0.5))
    row = rates.search_frame(ARMS, records).iloc[0]
    assert (row["aggregator_lr"], row["longer aggregator_lr"], row["at the edge"]) == (1e-3, 1e-2, True)


def test_under_trained_arms_and_rates_at_the_edge_are_named():
    frame = rates.search_frame(
        ARMS,
        [
            *search("margin", short=(0.1, 0.8, 0.6), long=(0.7, 0.6, 0.802)),
            *search("softmax", short=(0.1, 0.2, 0.9), long=(0.1, 0.2, 0.9005)),
        ],
    )
    found = rates.summary(frame)
    assert (found["arms"], found["late"], found["most"]) == (2, 1, pytest.approx(0.2))
    assert "margin" in found["most-arm"] and "margin" in found["late-arms"] and "softmax" in found["edge-arms"]
    assert "softmax" not in found["late-arms"] and "margin" not in found["edge-arms"]


def test_search_without_records_is_empty():
    frame = rates.search_frame(LOSSES, [])
    found = rates.summary(frame)
    assert frame.empty and (found["arms"], found["late"], found["late-arms"]) == (0, 0, "none")


def test_record_of_no_arm_is_refused():
    with pytest.raises(KeyError):
        rates.search_frame(LOSSES, [made(replace(systems.BASE, hidden=7), measures={"map_at_100": 0.5})])


@pytest.mark.parametrize(
    "group, name",
    [(LOSSES, "05_search.jsonl.gz"), (FUSIONS | FUSIONS_AT_RANDOM, "07_search.jsonl.gz")],
    ids=["losses", "fusions"],
)
def test_rates_are_the_best_short_ones_of_the_committed_searches(group, name):
    found = rates.search_frame(group, read_results(name)).set_index("arm")["lr"]
    assert found.to_dict() == {name: arm.training.lr for name, arm in systems.arms(group).items()}


CAVEATS = {
    "margin": "Twice the epochs would be worth +0.20 points to “margin”.",
    "softmax": "The best rate lies at the edge of those tried for “softmax”.",
    "cosine softmax": "The search for rates leaves nothing open for “cosine softmax”.",
}


@pytest.mark.parametrize("arm", CAVEATS)
def test_what_a_search_leaves_open_of_an_arm_is_said_beside_its_headline(arm):
    records = [
        *search("margin", short=(0.1, 0.8, 0.6), long=(0.7, 0.6, 0.802)),
        *search("softmax", short=(0.1, 0.2, 0.9), long=(0.1, 0.2, 0.9005)),
        *search("cosine softmax", short=(0.1, 0.8, 0.6), long=(0.1, 0.8, 0.6)),
    ]
    assert rates.caveat(rates.search_frame(ARMS, records), [arm]) == CAVEATS[arm]


def test_both_caveats_are_one_sentence_and_no_search_has_none():
    frame = rates.search_frame(ARMS, search("margin", short=(0.1, 0.2, 0.8), long=(0.1, 0.2, 0.802)))
    said = CAVEATS["margin"][:-1] + "; the best rate lies at the edge of those tried for “margin”."
    assert rates.caveat(frame, ["margin"]) == said and rates.caveat(frame, ["softmax"]) == ""


def test_table_of_a_search_has_rates_that_can_be_read():
    shown = rates.table(rates.search_frame(ARMS, search("margin", short=(0.8, 0.1, 0.6), long=(0.802, 0.6, 0.7)))).data
    assert shown.values.tolist() == [["margin", "0.001", "+0.20"]]
    assert list(shown) == ["arm", "learning rate", "longer is worth, points"]
    both = rates.table(
        rates.search_frame(ARMS, search("margin", short=(0.8, 0.1, 0.6), long=(0.8, 0.6, 0.7))), rates.RATES
    )
    assert list(both.data)[1:3] == ["learning rate", "rate of the aggregator"]
