from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import made

from mmlib import records, systems
from mmlib.aggregate import AGGREGATORS
from mmlib.data.simulate import Settings, settings_for
from mmlib.experiment import Experiment
from mmlib.models import IdentityModel
from mmlib.studies import aggregation, rates
from mmlib.studies.aggregation import (
    frame_weights,
    grid_frame,
    grid_settings,
    grid_verdicts,
    mixed_clips,
    weight_on_wrong,
)

# -- attention -----------------------------------------------------------------------------------------------


def models(*names):
    torch.manual_seed(0)
    made = {name: IdentityModel(AGGREGATORS[name](512), 30, hidden=0) for name in names}
    for model in made.values():
        for parameter in model.aggregator.parameters():
            torch.nn.init.normal_(parameter, std=0.01)
    return made


def test_mixed_clips_show_two_persons(store):
    clips = mixed_clips(store, 3)
    face = store.modalities["face"]
    for clip in clips:
        wrong = face.columns["wrong"][face.start[clip] : face.start[clip] + face.count[clip]]
        assert 0.2 <= wrong.mean() <= 0.6 and 12 <= len(wrong) <= 30
    assert (store.identity_of(clips) >= 0).all() and len(clips) == 3


def test_longest_clips_fill_up_where_too_few_are_mixed(store):
    clips = mixed_clips(store, 10_000)
    assert sorted(clips) == store.select("val", labelled=True, having="face").tolist()


def test_weights_of_a_clip_sum_to_one_over_its_own_frames(store):
    clips = mixed_clips(store, 4)
    frame = frame_weights(models("norm", "quality", "NAN", "attention + scores"), store, clips)
    assert frame.groupby(["clip", "method"])["weight"].sum().to_numpy() == pytest.approx(1, abs=1e-5)
    count = dict(zip(store.clips["clip"].iloc[clips], store.modalities["face"].count[clips], strict=True))
    assert (
        frame.groupby(["clip", "method"]).size() == frame.groupby(["clip", "method"])["clip"].first().map(count)
    ).all()


def test_frames_are_marked_wrong_where_the_store_says_so(store):
    clips = mixed_clips(store, 2)
    frame, face = frame_weights(models("norm"), store, clips), store.modalities["face"]
    expected = np.concatenate([face.columns["wrong"][face.start[c] : face.start[c] + face.count[c]] for c in clips])
    assert np.array_equal(frame["wrong"], expected)


def test_weight_on_wrong_frames_is_their_share_where_all_frames_weigh_the_same(store):
    row = weight_on_wrong(models("norm"), store).iloc[0]
    face, shares = store.modalities["face"], []
    for clip in store.select("val", labelled=True, having="face"):
        wrong = face.columns["wrong"][face.start[clip] : face.start[clip] + face.count[clip]].mean()
        shares += [wrong] if 0 < wrong < 1 else []
    assert row["arm"] == "norm" and row["clips"] == len(shares)
    assert row["share of frames"] == pytest.approx(np.mean(shares))
    assert row["share of weight"] == pytest.approx(np.mean(shares), abs=1e-6)


def test_arms_stand_by_the_weight_that_they_put_on_wrong_frames(store):
    frame = weight_on_wrong(models("norm", "quality"), store)
    assert frame["share of weight"].is_monotonic_increasing and set(frame["arm"]) == {"norm", "quality"}


def test_unmarked_frames_are_not_wrong_and_give_no_table(bare):
    clips, made_models = mixed_clips(bare, 2), {"mean": IdentityModel(AGGREGATORS["mean"](8), 2, hidden=0)}
    assert not frame_weights(made_models, bare, clips)["wrong"].any()
    assert weight_on_wrong(made_models, bare).empty


def test_watched_clips_have_marks_and_as_many_faces_as_fit(store, bare):
    clips = aggregation.watched_clips(store)
    val = store.select("val", labelled=True, having="face")
    assert clips.tolist() == [clip for clip in val if 8 <= store.modalities["face"].count[clip] <= 24] and len(clips)
    unscored = replace(bare, modalities={"face": replace(bare.modalities["face"], columns={})})
    model = IdentityModel(AGGREGATORS["mean"](8), 2, hidden=0)
    for each in (bare, unscored):
        clips = aggregation.watched_clips(each)
        ranks = aggregation.person_ranks({"mean": model}, model, each, clips)
        assert aggregation.found_counts(ranks) == {"clips": 0, "every": 0, "no": 0, "some": 0}
        assert aggregation.telling_clips(ranks, each) == {}
        assert aggregation.watched_frames({"mean": model}, model, each, {}).empty


def test_persons_are_ranked_and_frames_are_weighed_as_by_hand(store, monkeypatch):
    clips = aggregation.watched_clips(store)[:5]
    arms, means = models("mean", "norm", "NAN + scores"), models("norm")["norm"]
    monkeypatch.setattr(aggregation, "AT_ONCE", 2)
    ranks = aggregation.person_ranks(arms, means, store, clips)
    assert ranks.index.tolist() == clips.tolist() and [*ranks] == [*arms]
    frame = aggregation.watched_frames(arms, means, store, {f"clip {clip}": clip for clip in clips})
    assert frame.groupby(["kind", "arm"])["weight"].sum().to_numpy() == pytest.approx(1, abs=1e-5)
    face, vectors = store.modalities["face"], means.prototype.detach().numpy()
    for clip in clips:
        rows = slice(face.start[clip], face.start[clip] + face.count[clip])
        x = face.feature[rows].astype(np.float64)
        for arm, pooled in {"norm": x.mean(0), "mean": (x / np.linalg.norm(x, axis=1, keepdims=True)).mean(0)}.items():
            cosine = vectors @ pooled / np.linalg.norm(vectors, axis=1) / np.linalg.norm(pooled)
            own = cosine[store.identity_of(clip)]
            found = frame[(frame["kind"] == f"clip {clip}") & (frame["arm"] == arm)]
            assert found["cosine"].to_numpy() == pytest.approx(own, abs=1e-5)
            assert {*found["rank"], ranks.loc[clip, arm]} == {sorted(cosine, reverse=True).index(own) + 1}
            assert np.array_equal(found["quality"], face.columns["quality"][rows])
            assert np.array_equal(found["wrong"], face.columns["wrong"][rows] > 0)


def test_clips_are_chosen_by_what_the_arms_make_of_them(store):
    clips = aggregation.watched_clips(store)
    wrong = store.clip_means("face", "wrong")[clips]
    ranks = pd.DataFrame(1, index=clips, columns=["mean", "quality", "NAN"])
    assert aggregation.telling_clips(ranks, store) == {"found by every arm": clips[wrong.argmax()]}
    ranks.iloc[3:9] = [[5, 1, 1], [9, 1, 2], [1, 7, 1], [9, 1, 1], [300, 200, 295], [250, 260, 240]]
    assert aggregation.telling_clips(ranks, store) == {
        "found by quality, not by the mean": clips[4],
        "found by the mean, not by quality": clips[5],
        "ranks lie furthest apart": clips[7],
        "found by every arm": clips[np.where(ranks.max(axis=1) == 1, wrong, -1).argmax()],
        "found by no arm": clips[8],
    }
    assert aggregation.found_counts(ranks) == {"clips": len(clips), "every": len(clips) - 6, "no": 2, "some": 4}


@pytest.mark.parametrize("step", aggregation.STEPS)
def test_steps_are_between_arms(step):
    assert set(aggregation.STEPS[step]) <= set(AGGREGATORS)


# -- the search for learning rates ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", AGGREGATORS)
def test_every_arm_is_given_as_many_trials(name):
    trials = systems.tuning_grid(name)
    assert len(set(trials)) == len(trials) == len(systems.tuning_grid("mean"))


@pytest.mark.parametrize("name", AGGREGATORS)
def test_training_of_an_arm_is_one_that_was_tried(name):
    assert systems.tuned(name) in systems.tuning_grid(name)


def test_training_of_an_arm_was_the_best_short_one_of_the_committed_search():
    group = {name: Experiment(aggregator=name) for name in AGGREGATORS}
    found = rates.search_frame(group, records.read_results("04_search.jsonl.gz")).set_index("arm")
    assert set(found.index) == set(AGGREGATORS)
    for name, row in found.iterrows():
        training = systems.tuned(name)
        assert (row["lr"], row["aggregator_lr"]) == (training.lr, training.aggregator_lr)


# -- the sensitivity grid ------------------------------------------------------------------------------------


def cell(share, quality, reliability, gain, seeds=(0, 1)):
    """Records of all arms of a cell, each world with its own small difference."""
    settings = grid_settings(share, quality, reliability, 60)
    return [
        made(
            Experiment(aggregator=name, seed=seed, settings=settings),
            ap=[0.5 + (gain + 0.001 * seed) * (name != "quality")],
        )
        for name in aggregation.GRID_ARMS
        for seed in seeds
    ]


def test_grid_settings_scale_the_shares_of_contaminated_clips():
    world = settings_for("quick", **dict(grid_settings(2.0, 0.0, 0.6, 60)))
    assert world == replace(
        Settings(),
        identities=60,
        contaminated=2 * Settings().contaminated,
        wrong_quality=0.0,
        mostly_wrong=2 * Settings().mostly_wrong,
        reliability=0.6,
    )


@pytest.mark.parametrize("name", aggregation.GRIDS)
def test_cells_of_every_grid_are_worlds_that_can_be_drawn(name):
    cells = [settings_for("quick", **dict(grid_settings(*at, 60))) for at in aggregation.GRIDS[name]]
    assert len(set(cells)) == len(cells)


def test_grid_compares_learned_arms_with_quality_weights_cell_by_cell():
    frame = grid_frame(cell(0.5, -1.0, 0.95, 0.02) + cell(2.0, -1.0, 0.95, -0.03))
    assert set(frame["aggregator"]) == set(aggregation.GRID_LEARNED)
    by_share = frame.groupby("share")["difference"].first()
    assert by_share.to_dict() == {0.5: pytest.approx(2.05), 2.0: pytest.approx(-2.95)}


def test_grid_without_records_is_empty():
    cells = grid_frame([])
    assert cells.empty and grid_verdicts(cells).empty and aggregation.grid_axes(cells).empty


def test_cells_are_said_in_the_words_that_their_intervals_support():
    found = grid_frame(cell(1.0, -1.0, 0.95, 0.02) + cell(2.0, -1.0, 0.95, -0.03) + cell(0.5, 0.0, 0.6, 0, seeds=(0,)))
    said = aggregation.grid_words(found)
    assert [*said][:3] == [*aggregation.GRID_AXES.values()] and said.attrs == found.attrs != {}
    said = said[said["aggregator"] == "NAN + scores"].set_index(aggregation.GRID_AXES["share"])
    assert said["verdict"].to_dict() == {0.5: "is not judged against", 1: "beats", 2: "loses to"}
    assert said["calibrated"].to_dict() == {0.5: False, 1: True, 2: False}
    assert said.loc[2, "gain"] == "-2.95" and said.loc[2, "interval"].endswith("] over 2 worlds")
    assert aggregation.grid_words(grid_frame([])).empty


def test_cell_of_one_world_with_one_ap_a_record_is_open():
    cells = grid_frame(cell(1.0, -1.0, 0.95, 0.02, seeds=(0,)))
    assert grid_verdicts(cells)[["cells", "ahead", "behind", "open"]].values.tolist() == [[1, 0, 0, 1]] * 3


def test_verdict_counts_the_cells_whose_interval_excludes_zero():
    cells = pd.DataFrame({"aggregator": ["NAN"] * 4, "low": [0.1, -0.1, -0.3, 0], "high": [0.2, 0.1, -0.2, 0.3]})
    assert grid_verdicts(cells).values.tolist() == [["NAN", 4, 1, 1, 2]]


def test_axes_that_vary_are_told_by_the_means_at_their_ends():
    frame = aggregation.grid_axes(grid_frame(cell(0.5, -1.0, 0.95, 0.02) + cell(2.0, -1.0, 0.95, -0.03)))
    assert frame["axis"].tolist() == [aggregation.GRID_AXES["share"]]
    assert frame.iloc[0, 1:].tolist() == pytest.approx([0.5, 2, 2.05, -2.95])


@pytest.mark.parametrize(
    "name, identities, message", [("corse", 100, "grid must be one of none"), ("fine", 5, "12 at")]
)
def test_a_grid_that_cannot_be_run_is_refused(name, identities, message):
    with pytest.raises(ValueError, match=message):
        aggregation.grid_points(name, identities)


# -- the map of the released code ----------------------------------------------------------------------------


def test_released_start_never_moves_while_the_rest_learns(store):
    said = aggregation.from_released_start(store, mixed_clips(store, 3), steps=5)
    assert (said["gradient"], said["weight"], said["away"], said["steps"]) == (0, 0, 0, 5)
    assert said["other-gradient"] > 0


def test_maps_have_a_row_that_sums_to_one_for_every_frame_or_mixture(store):
    inputs = aggregation.forty(store, mixed_clips(store, 3))
    assert inputs[0].shape == (3, 40, 512)
    found = {name: aggregation.attention_map(model, inputs) for name, model in models(*aggregation.MAPS).items()}
    assert [maps.shape for maps in found.values()] == [(3, 20, 20), (3, 20, 20), (3, 40, 40)]
    for maps in found.values():
        np.testing.assert_allclose(maps.sum(2), 1, rtol=1e-5)
    assert (found["as coded"] == np.float32(1 / 20)).all()


def test_map_of_the_description_is_that_of_its_frames(store):
    (name, model), *_ = models("attention + scores").items()
    x, mask, quality, det = inputs = aggregation.forty(store, mixed_clips(store, 1))
    frames = torch.cat([x, quality[..., None] / 100, det[..., None]], -1)[0].double()
    with torch.no_grad():
        expected = torch.softmax(frames @ frames.T / model.aggregator.log_temperature.exp(), 1)
    np.testing.assert_allclose(aggregation.attention_map(model, inputs)[0], expected, rtol=1e-3, atol=1e-6)


def test_sharpness_is_the_mean_largest_share():
    maps = {"even": np.full((2, 4, 4), 0.25), "sharp": np.stack([np.eye(4)] * 2)}
    assert aggregation.sharpness(maps).values.tolist() == [["even", 0.25, 0.25], ["sharp", 1.0, 0.25]]


def test_frames_are_drawn_with_replacement_from_short_clips_alone(store):
    face = store.modalities["face"]
    long = np.flatnonzero(face.count >= 40)[:1]
    short = np.flatnonzero((face.count > 0) & (face.count < 40))[:1]
    distinct = [len(np.unique(aggregation.forty(store, clips)[0][0].numpy(), axis=0)) for clips in (long, short)]
    assert distinct[0] == 40 > face.count[short[0]] >= distinct[1]
