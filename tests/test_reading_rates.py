import pandas as pd
import pytest

from mmlib import systems
from mmlib.studies import rates


def trials(**found):
    """The frame of ``systems.best_trials``: by arm, the MAP of (rate, short, long)."""
    rows = [
        (arm, epochs, rate, value)
        for arm, points in found.items()
        for rate, *values in points
        for epochs, value in zip(systems.EPOCHS, values, strict=True)
    ]
    return pd.DataFrame(rows, columns=["arm", "epochs", "lr", "map_at_100"])


def test_search_keeps_the_best_of_each_length():
    best = rates.search_frame(
        trials(margin=[(1e-3, 0.8, 0.7), (3e-3, 0.6, 0.802)], softmax=[(1e-2, 0.9, 0.9), (1e-3, 0.1, 0.1)])
    )
    assert best.values.tolist() == [
        ["softmax", 1e-2, 0.9, 1e-2, 0.9, 0, True],
        ["margin", 1e-3, 0.8, 3e-3, 0.802, pytest.approx(0.2), False],
    ]


def test_under_trained_arms_and_rates_at_the_edge_are_named():
    best = rates.search_frame(trials(margin=[(1e-3, 0.8, 0.802)], softmax=[(1e-2, 0.9, 0.9005)]))
    sentence = rates.search_sentence(best)
    assert "more than 0.1 points to 1 of 2 arms" in sentence and "here: margin (+0.20 points)." in sentence
    assert sentence.endswith("may lie outside, for softmax.")


def test_no_arm_is_under_trained_where_longer_is_worth_little():
    best = rates.search_frame(trials(margin=[(1e-3, 0.8, 0.8005)], softmax=[(3e-3, 0.9, 0.8)]))
    assert rates.search_sentence(best) == (
        "Twice the epochs are worth at most +0.05 points, to margin, so no arm is under-trained."
    )


def test_search_without_records_is_said():
    best = rates.search_frame(systems.best_trials(systems.LOSSES, []))
    assert best.empty and rates.search_sentence(best).startswith("There are no records of the search")
