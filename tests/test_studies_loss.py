from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from conftest import made, of

from mmlib import figures, retrieve, systems
from mmlib.compare import compare_arms, steps_frame
from mmlib.experiment import Experiment
from mmlib.studies import loss

# -- logit and gradient --------------------------------------------------------------------------------------


def test_curve_without_a_margin_is_the_cosine_and_its_pull_the_slope_of_the_cross_entropy():
    curve = loss.margin_curves([(0.0, 0.0)], identities=5)
    theta = np.radians(curve["angle"])
    p = np.exp(30 * np.cos(theta)) / (np.exp(30 * np.cos(theta)) + 4)
    assert curve["logit"].to_numpy() == pytest.approx(30 * np.cos(theta))
    assert curve["pull"].to_numpy() == pytest.approx(30 * np.sin(theta) * (1 - p), rel=1e-6)


def test_curve_with_a_margin_is_shifted_and_falls_back():
    curve = loss.margin_curves([(0.5, 0.0)], identities=2)
    theta = np.radians(curve["angle"])
    expected = np.where(theta > np.pi - 0.5, np.cos(theta) - 0.5 * np.sin(0.5), np.cos(theta + 0.5))
    assert curve["logit"].to_numpy() == pytest.approx(30 * expected)


def test_pull_of_a_clip_does_not_depend_on_the_other_settings():
    both = loss.margin_curves([(0.0, 0.0), (0.5, 2.0)], identities=3)
    alone = loss.margin_curves([(0.5, 2.0)], identities=3)
    assert both.loc[both["setting"] == "margin 0.5, gamma 2", "pull"].tolist() == alone["pull"].tolist()


def test_reach_is_the_first_angle_at_half_of_the_largest_pull():
    curves = pd.DataFrame(
        {"setting": ["a"] * 4 + ["b"] * 4, "angle": [0, 1, 2, 3] * 2, "pull": [0, 2, 4, 2, 0, 1, 2.1, 4]}
    )
    assert loss.reach(curves).to_dict() == {"a": 1, "b": 2}


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_focal_gradient_is_that_of_the_formula(gamma):
    curve = loss.focal_curves([gamma])
    p = curve["p"].to_numpy()
    # d/dz of -(1 - p)^gamma log p, with dp/dz = p (1 - p)
    expected = (1 - p) ** (gamma + 1) - gamma * p * (1 - p) ** gamma * np.log(p)
    assert curve["gradient"].to_numpy() == pytest.approx(expected, rel=1e-9)
    assert set(curve["gamma"]) == {f"gamma {gamma:g}"}


def test_batch_level_focal_term_shares_out_as_the_cross_entropy_does():
    p = np.array([0.2, 0.5, 0.9])
    parts = dict(iter(loss.batch_shares(2.0, p).groupby("loss")))
    plain, clip, batch = (parts[name] for name in ("cross-entropy", "focal, clip by clip", "focal, over the batch"))
    assert plain["gradient"].tolist() == pytest.approx([0.8, 0.5, 0.1])
    assert batch["share"].tolist() == pytest.approx(plain["share"].tolist())
    mean = -np.log(p).mean()
    easy = 1 - np.exp(-mean)
    assert batch["factor"].tolist() == pytest.approx([easy**2 + 2 * mean * easy * np.exp(-mean)] * 3)
    assert clip["share"].iloc[0] > plain["share"].iloc[0] and clip["share"].sum() == pytest.approx(1)


def test_share_of_the_hardest_clips_adds_up_their_gradients():
    shares = loss.batch_shares(0.0, (0.9, 0.2, 0.5, 0.6))  # gradients 0.8 + 0.5 of 1.8
    assert loss.share_of_hardest(shares) == {name: pytest.approx(1.3 / 1.8) for name in shares["loss"].unique()}


# -- the arms ------------------------------------------------------------------------------------------------


def ran(arm="margin", seed=0, ap=(0.5,), *, data="simulated", **known):
    return made(replace(systems.LOSSES[arm], seed=seed, data=data), f"{arm} {seed}", ap=list(ap), **known)


def worlds(gains):
    """Records and names: every arm in two worlds, ahead of 0.5 by its gain there."""
    records = [ran(name, seed, [0.5 + gain]) for name, found in gains.items() for seed, gain in enumerate(found)]
    return records, [name for name in gains for _ in (0, 1)]


def test_arms_are_compared_by_the_names_that_are_given():
    records, names = worlds({"margin": [0.0, 0.0], "softmax": [0.1, 0.3]})
    table = compare_arms(records, by="arm", baseline="margin", names=names)
    assert table["arm"].tolist() == ["softmax", "margin"]
    assert table["difference"].tolist() == pytest.approx([20, 0])


@pytest.mark.parametrize("step", loss.STEPS)
def test_step_changes_one_thing(step):
    one, other = (systems.LOSSES[name] for name in loss.STEPS[step])
    changed = [field for field in ("head", "concat") if getattr(one, field) != getattr(other, field)]
    of_loss = [(t.margin, t.gamma, t.focal) for t in (one.training, other.training)]
    assert len(changed) + (of_loss[0] != of_loss[1]) == 1


def test_steps_are_those_whose_two_arms_were_run():
    records, names = worlds({"margin": [0.0, 0.0], "cosine softmax": [-0.1, -0.2], "margin + focal": [0.0, 0.02]})
    steps = steps_frame(loss.STEPS, records, names)
    assert steps[["step", "arm", "against", "n"]].values.tolist() == [
        ["a margin", "margin", "cosine softmax", 2],
        ["focal term clip by clip (described)", "margin + focal", "margin", 2],
    ]
    assert steps["difference"].tolist() == pytest.approx([15, 1])


# -- the sweeps ----------------------------------------------------------------------------------------------


def test_sweep_changes_one_field_of_the_training():
    swept = loss.sweep(systems.LOSSES["margin"], "gamma", [0, 7])
    assert [(e.training.gamma, e.seed) for e in swept] == [(g, s) for g in loss.SWEEPS["gamma"] for s in (0, 7)]
    assert {replace(e, seed=0, training=replace(e.training, gamma=0.0)) for e in swept} == {systems.LOSSES["margin"]}


@pytest.mark.parametrize("field, arm", [("margin", "margin"), ("gamma", "margin"), ("gamma", "margin + focal")])
def test_sweeps_share_their_records_with_the_arms(field, arm):
    keys = {e.key() for e in loss.sweep(systems.LOSSES["margin"], field, [0])}
    assert replace(systems.LOSSES[arm], seed=0).key() in keys


def swept(field, **values):
    """The frame of a sweep; by ``v`` and tenths of the value, the MAP of each world."""
    records = []
    for name, found in values.items():
        value = int(name[1:]) / 10
        for seed, ap in enumerate(found):
            asked = Experiment(seed=seed)
            asked = replace(asked, training=replace(asked.training, **{field: value}))
            records.append(made(asked, ap=[ap]))
    return records


def test_sweep_is_compared_world_by_world():
    frame = loss.sweep_frame(swept("margin", v5=[0.5, 0.7], v0=[0.49, 0.72], v7=[0.52, 0.73]), "margin", 0.5)
    assert frame.values.tolist() == [
        [0.0, pytest.approx(0.605), pytest.approx(0.5), pytest.approx(-1), pytest.approx(2), 2],
        [0.5, pytest.approx(0.6), 0, 0, 0, 2],
        [0.7, pytest.approx(0.625), pytest.approx(2.5), pytest.approx(2), pytest.approx(3), 2],
    ]


def test_one_world_of_a_sweep_has_no_range():
    frame = loss.sweep_frame(swept("margin", v3=[0.52], v5=[0.5]), "margin", 0.5)
    assert frame["difference"].tolist() == pytest.approx([2, 0]) and frame[["low", "high"]].isna().all(axis=None)


# -- what the scores add -------------------------------------------------------------------------------------


def by_quality(*precisions):
    """A breakdown of three groups: one clip and three clips of the lowest fifth, two of the highest."""
    edges = [(0, 1, 1), (8, 12, 3), (80, 100, 2)]
    return {"quality": [[*at, 0.0, value] for at, value in zip(edges, precisions, strict=True)]}


def scored(data="simulated", seeds=(0, 1)):
    arms_ = {"margin": (0.4, 0.4, 0.8), "margin, scores": (0.8, 0.4, 0.7)}
    pairs = [
        (ran(name, seed, data=data, breakdown=by_quality(*values)), name)
        for name, values in arms_.items()
        for seed in seeds
    ]
    return [record for record, _ in pairs], [name for _, name in pairs]


def test_gains_are_by_fifth_and_weigh_clips_alike():
    frame = loss.gains(*scored())
    assert frame[["arm", "against", "start", "end", "clips"]].values.tolist() == [
        ["margin, scores", "margin", 0, 20, 4],
        ["margin, scores", "margin", 80, 100, 2],
    ]
    # one clip of four gains 0.4
    assert frame["difference"].tolist() == pytest.approx([10, -10])
    assert frame["low"].tolist() == pytest.approx([10, -10])


@pytest.mark.parametrize("data, seeds", [("simulated", [0]), ("some store", [0, 1])])
def test_gains_have_no_interval_without_several_worlds(data, seeds):
    frame = loss.gains(*scored(data, seeds))
    assert len(frame) == 2 and frame[["low", "high"]].isna().all(axis=None)


def test_gains_by_frames_keep_their_groups():
    pairs = [
        (ran(name, breakdown={"frames": [[1, 5, 3, 0, value], [5, 10, 2, 0, 0.5]]}), name)
        for name, value in (("margin", 0.5), ("margin + focal", 0.6))
    ]
    frame = loss.gains(*zip(*pairs, strict=True), group="frames")
    assert frame[["arm", "start", "end", "middle"]].values.tolist() == [
        ["margin + focal", 1, 4, 2.5],
        ["margin + focal", 5, 9, 7],
    ]
    assert frame["difference"].tolist() == pytest.approx([10, 0])


@pytest.mark.parametrize("open_end", [None, 241])
def test_longest_clips_stand_at_their_shortest(open_end):
    pairs = [
        (ran(name, breakdown={"frames": [[30, 40, 3, 0, 0.5], [40, open_end, 2, 0, 0.5]]}), name)
        for name in ("margin", "margin + focal")
    ]
    frame = loss.gains(*zip(*pairs, strict=True), group="frames")
    assert frame[["start", "end", "middle"]].values.tolist() == [[30, 39, 34.5], [40, 40, 40]]


def test_arms_without_a_counterpart_have_no_gain():
    assert loss.gains([ran("margin")], ["margin"]).empty


def test_length_in_scores_is_that_of_the_mean_scores(store):
    found = loss.length_in_scores(of(store, "mlp", "norm"), store)
    clips = store.select("val", labelled=True, having="face")
    length = (store.clip_means("face", "quality")[clips] / 100) ** 2 + store.clip_means("face", "det")[clips] ** 2
    normalised, raw = found["share of the squared length"]
    assert normalised == pytest.approx((length / (1 + length)).mean(), rel=1e-3)
    assert 0 < raw < 0.1 * normalised


def test_length_in_scores_is_empty_where_clips_have_none(bare):
    assert loss.length_in_scores(of(bare, "mlp", "norm"), bare).empty


# -- names ---------------------------------------------------------------------------------------------------


def test_every_arm_and_curve_has_a_colour_of_the_book():
    drawn = {*systems.LOSSES, *loss.focal_curves(loss.SWEEPS["gamma"])["gamma"], *loss.batch_shares(2.0)["loss"]}
    assert drawn <= set(figures.COLOURS)


@pytest.mark.parametrize("name", loss.PAIRS)
def test_pairs_are_of_arms(name):
    assert {name, loss.PAIRS[name]} <= set(systems.LOSSES)


def test_arms_with_scores_need_them(bare):
    lacking = [
        name
        for name, arm in systems.LOSSES.items()
        if retrieve.missing_scores(replace(arm, data=str(bare.path), aggregator="norm"), bare)
    ]
    assert lacking == [name for name in systems.LOSSES if "scores" in name]
