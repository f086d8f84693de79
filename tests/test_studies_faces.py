import json
import os
import shutil
from dataclasses import asdict, replace

import numpy as np
import pandas as pd
import pytest
import torch

from mmlib import metrics, systems
from mmlib.aggregate import AGGREGATORS
from mmlib.data.public import NETWORKS, people_of, shared_names
from mmlib.experiment import TRAINED, Experiment, Training, arm_key
from mmlib.records import read_results
from mmlib.retrieve import fit, retrieve
from mmlib.studies import ensemble, faces, fusion, ladder, materials, plans
from mmlib.studies.materials import CLEAN, MATERIALS, STRANGERS, Material, store_of

REAL = os.environ.get("MMLIB_REAL_DATA")
KEPT = read_results("12_faces.jsonl.gz")


@pytest.fixture(scope="module")
def tables(face_tables):
    return face_tables


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("MMLIB_CACHE", str(tmp_path_factory.getbasetemp() / "faces-cache"))


def frames(store):
    """Return features, whose clip and whose person each frame is of, in the order of the store."""
    face = store.modalities["face"]
    clip = np.repeat(np.arange(len(store)), face.count)
    return np.asarray(face.feature, float), clip, store.clips["identity"].to_numpy()[clip]


def origin(store, clean):
    """Return which frame of the clean store each one shows."""
    mine, theirs = frames(store)[0], frames(clean)[0]
    return np.array([np.flatnonzero((theirs == row).all(1))[0] for row in mine])


# -- materials -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share, who", [(0.05, "anyone"), (0.2, "like quality"), (0.5, "anyone")])
def test_wrong_frames_are_real_ones_of_other_people_of_the_same_split(tables, share, who):
    name = f"{100 * share:g} % wrong, {who}"
    store, clean = store_of("ytf", tables, "edgeface", 1, name), store_of("ytf", tables, "edgeface", 1)
    shown, wrong = origin(store, clean), store.modalities["face"].columns["wrong"]
    _, clip, person = frames(clean)
    assert (shown != np.arange(len(shown))).tolist() == wrong.tolist() and wrong.sum() == round(share * len(shown))
    split = clean.clips["split"].to_numpy()
    assert (split[clip[shown]] == split[clip]).all()
    assert (clip[shown] == clip)[~wrong].all() and (clip[shown] != clip)[wrong].all()
    known = wrong & (person >= 0)
    assert (person[shown] != person)[known].all() and known.any()
    assert (np.bincount(clip[~wrong], minlength=len(clean)) > 0).all()  # a frame of its own is left
    for column in ("quality", "det"):  # scores come with the frame
        given = clean.modalities["face"].columns[column]
        np.testing.assert_array_equal(store.modalities["face"].columns[column], given[shown])


def test_strangers_of_like_quality_are_of_the_nearest_clips(tables, monkeypatch):
    monkeypatch.setattr(materials, "LIKE", 3)
    clean, rng = store_of("ytf", tables, "edgeface", 2), np.random.default_rng(0)
    _, clip, person = frames(clean)
    mean, split = clean.clip_means("face", "quality"), clean.clips["split"].to_numpy()
    shown = materials.replace_frames(clean, Material(0.3, "like quality"), rng)
    for row in np.flatnonzero(shown != np.arange(len(shown))):
        at, of = clip[row], clip[shown[row]]
        other = (split == split[at]) & (np.arange(len(mean)) != at)
        other &= (clean.clips["identity"] != person[row]) | (person[row] < 0)
        assert (abs(mean[other] - mean[at]) < abs(mean[of] - mean[at]) - 1e-12).sum() < 3
    far = materials.replace_frames(clean, Material(0.3, "anyone"), np.random.default_rng(0))
    gap = [abs(mean[clip[each]] - mean[clip])[each != np.arange(len(each))].mean() for each in (shown, far)]
    assert gap[0] < gap[1] / 3


def test_a_share_that_leaves_no_clip_a_frame_of_its_own_is_refused(tables):
    clean = store_of("ytf", tables, "edgeface", 0)
    with pytest.raises(ValueError, match="share 0.9: at most 336 of 420 frames can be wrong"):
        materials.replace_frames(clean, Material(0.9), np.random.default_rng(0))


def test_fewer_frames_are_some_of_the_same_clip_with_their_scores(tables):
    clean = store_of("ytf", tables, "edgeface", 0)
    for count in (1, 2, 3):
        store = store_of("ytf", tables, "edgeface", 0, f"{count} frame{'s' * (count > 1)}")
        shown, clip = origin(store, clean), frames(clean)[1]
        assert (store.modalities["face"].count == count).all() and len({*shown}) == len(shown)
        assert (clip[shown] == frames(store)[1]).all()
        quality = clean.modalities["face"].columns["quality"]
        np.testing.assert_array_equal(store.modalities["face"].columns["quality"], quality[shown])
        np.testing.assert_array_equal(store.modalities["scene"].feature, clean.modalities["scene"].feature)


def test_scores_are_replaced_on_the_same_scale(tables):
    clean = store_of("ytf", tables, "edgeface", 0)
    feature, clip, person = frames(clean)
    norm = np.linalg.norm(feature, axis=1)
    unit = feature / norm[:, None]
    truth = np.zeros(len(unit))
    for row in np.flatnonzero(person >= 0):
        others = [unit[clip == other].mean(0) for other in {*clip[(person == person[row]) & (clip != clip[row])]}]
        truth[row] = unit[row] @ np.mean(others, 0) / np.linalg.norm(np.mean(others, 0))
    expected = {"norm": norm, "det": clean.modalities["face"].columns["det"], "oracle": truth}
    for score, value in expected.items():
        store = store_of("ytf", tables, "edgeface", 0, f"score: {score}")
        found, known = store.modalities["face"].columns["quality"], person >= 0
        np.testing.assert_array_equal(store.modalities["face"].feature, clean.modalities["face"].feature)
        rank = np.corrcoef(pd.Series(found[known]).rank(), pd.Series(value[known]).rank())[0, 1]
        assert rank > 0.9999 and np.median(found) == pytest.approx(59, abs=3)
    before = clean.modalities["face"].columns["quality"]
    shuffled = store_of("ytf", tables, "edgeface", 0, "score: shuffled").modalities["face"].columns["quality"]
    assert np.allclose(np.sort(shuffled), np.sort(before)) and abs(np.corrcoef(shuffled, before)[0, 1]) < 0.2


def test_suspects_are_left_out(tables):
    assert (
        len(store_of("ytf", tables, "edgeface", 0)) - len(store_of("ytf", tables, "edgeface", 0, materials.TRUSTED))
        == 2
    )


def test_every_material_says_that_it_is_real_and_what_it_is(tables):
    for name, asked in MATERIALS.items():
        store = store_of("ytf", tables, "mobilefacenet", 0, name)
        assert not store.meta["simulated"]
        assert store.meta["provenance"].get("material") == (None if asked[:-1] == Material()[:-1] else asked._asdict())
    assert len({store_of("ytf", tables, "mobilefacenet", 0, name).fingerprint for name in MATERIALS}) == len(MATERIALS)


def test_a_store_is_made_once_and_anew_for_other_tables(tables, tmp_path, monkeypatch):
    monkeypatch.setenv("MMLIB_CACHE", str(tmp_path))
    first = store_of("ytf", tables, "edgeface", 0, "2 frames")
    again = store_of("ytf", tables, "edgeface", 0, "2 frames")
    assert first.path == again.path and first.path.stat().st_mtime_ns == again.path.stat().st_mtime_ns
    other = tmp_path / "tables"
    for name in ("frames.parquet", "edgeface.npy", "clips.csv", "scene.npy"):
        (other / "ytf").mkdir(parents=True, exist_ok=True)
        (other / "ytf" / name).write_bytes((tables / "ytf" / name).read_bytes())
    assert store_of("ytf", other, "edgeface", 0, "2 frames").path == first.path
    np.save(other / "ytf/edgeface.npy", -np.load(other / "ytf/edgeface.npy"))
    assert store_of("ytf", other, "edgeface", 0, "2 frames").path != first.path


def test_a_material_that_fails_leaves_nothing_behind(tables, tmp_path, monkeypatch):
    monkeypatch.setenv("MMLIB_CACHE", str(tmp_path))
    monkeypatch.setitem(MATERIALS, "impossible", Material(0.99))
    with pytest.raises(ValueError, match="at most"):
        store_of("ytf", tables, "edgeface", 0, "impossible")
    assert sorted(path.name for path in tmp_path.rglob("*-0/*")) == ["clean"]


# -- records -------------------------------------------------------------------------------------------------


def small(name, material, store):
    """A plan that takes no time."""
    brief = Training(epochs=1, batch=16, frames=2)
    arms = {"mean": "mean", "norm": "norm", "quality": "quality"}
    out = {arm: Experiment(aggregator=pool, hidden=8, training=brief) for arm, pool in arms.items()}
    return out | {f"{arm}, class means": replace(e, classifier="class means") for arm, e in out.items()}


@pytest.fixture(scope="module")
def kept(tables, tmp_path_factory):
    patch = pytest.MonkeyPatch()
    patch.setenv("MMLIB_CACHE", str(tmp_path_factory.getbasetemp() / "faces-cache"))
    found = [
        record
        for network in NETWORKS
        for material in (CLEAN, "20 % wrong, anyone")
        for record in faces.measure(small, tables, "ytf", network, material, [0, 1, 2], device="cpu")
    ]
    patch.undo()
    return found


def test_kept_records_have_no_person_and_no_place(kept, tables):
    text = json.dumps([asdict(record) for record in kept])
    assert "Person" not in text and str(tables) not in text and "faces-cache" not in text
    assert all(len(record.ap) == 1 and not record.breakdown and not record.losses for record in kept)
    assert not any(record.simulated for record in kept)
    assert {record.experiment["data"] for record in kept if record.experiment["seed"] == 1} == {
        f"ytf, {network}, {material}, split 1" for network in NETWORKS for material in (CLEAN, "20 % wrong, anyone")
    }


def test_kept_records_say_what_was_run(kept):
    arms = small("ytf", CLEAN, None)
    for record in kept:
        assert arm_key(record.experiment) == arm_key(arms[record.experiment["arm"]])
    assert len({record.key for record in kept}) == len(kept) == 2 * 2 * 6 * 3


def test_a_difference_has_the_wider_of_two_intervals(kept, tables):
    frame = faces.differences({"quality": ("quality, class means", "mean, class means")}, kept)
    assert frame["network"].tolist() == ["edgeface", "edgeface", "mobilefacenet", "mobilefacenet"]
    row = frame[(frame["network"] == "edgeface") & (frame["material"] != CLEAN)].iloc[0]
    aps, splits = {}, []
    for split in range(3):
        store = store_of("ytf", tables, "edgeface", split, "20 % wrong, anyone")
        one, other = (
            pd.Series(retrieve(replace(e, data=str(store.path), seed=split), store, device="cpu").ap, store.identities)
            for e in (small("", "", None)[f"{name}, class means"] for name in ("quality", "mean"))
        )
        splits.append((one - other).mean())
        aps[split] = one, other
    over = metrics.over_worlds(np.array(splits))
    one, other = (pd.concat([of[side] for of in aps.values()], axis=1).mean(axis=1) for side in (0, 1))
    within = metrics.paired_test(one.to_numpy(), other.to_numpy())
    assert row["difference"] == pytest.approx(100 * over.mean, abs=1e-3) and row["interval"] == "splits"
    assert row["low"] == pytest.approx(100 * min(over.low, within.low), abs=1e-3)
    assert row["high"] == pytest.approx(100 * max(over.high, within.high), abs=1e-3)


def test_arms_are_compared_on_the_splits_that_both_have(kept):
    pair = {"norm": ("norm, class means", "mean, class means")}
    of = [r for r in kept if r.experiment["network"] == "edgeface" and r.experiment["material"] != CLEAN]
    few = [r for r in of if r.experiment["arm"] != "norm, class means" or r.experiment["seed"] < 2]
    row = faces.differences(pair, few).iloc[0]
    value = {(r.experiment["arm"], r.experiment["seed"]): r.measures["map_at_100"] for r in of}
    gains = [value["norm, class means", split] - value["mean, class means", split] for split in (0, 1)]
    assert row["n"] == 2 and row["difference"] == pytest.approx(100 * np.mean(gains))


def test_an_interval_over_people_that_is_wider_counts(kept):
    pair = {"quality": ("quality, class means", "mean, class means")}
    before = faces.differences(pair, kept)
    ends = {"mean, class means: low": -90.0, "mean, class means: high": 90.0}
    wide = [replace(r, measures=r.measures | ends) if r.experiment["seed"] == 0 else r for r in kept]
    after = faces.differences(pair, wide)
    assert (before["low"] > -90).all() and (after["low"] == -90).all() and (after["high"] == 90).all()


def test_the_grid_has_the_clean_clips_in_both_halves(kept):
    frame = faces.grid(kept, faces.WEIGHTED)
    shares = frame.groupby(["strangers", "network"])["share"].apply(lambda part: sorted({*part}))
    assert shares["anyone", "edgeface"] == [0, 20] and shares["like quality", "edgeface"] == [0]


def row(network, low, high, step="a", name="ytf"):
    return {"set": name, "network": network, "step": step, "low": low, "high": high, "difference": (low + high) / 2}


@pytest.mark.parametrize(
    "one, two, word",
    [
        ((1, 2), (1, 3), "gains"),
        ((-2, -1), (-3, -1), "loses"),
        ((1, 2), (-1, 3), "cannot be told apart"),
        ((1, 2), (-3, -1), "cannot be told apart"),
        ((-1, 2), (-1, 3), "cannot be told apart"),
        ((1, 2), None, "cannot be told apart"),
        ((np.nan, np.nan), (np.nan, np.nan), "cannot be told apart"),
    ],
)
def test_a_verdict_needs_both_networks(one, two, word):
    rows = [row("edgeface", *one), *([row("mobilefacenet", *two)] if two else [])]
    assert faces.verdicts(pd.DataFrame(rows))["ytf", "a"] == word


def test_a_tally_counts_what_both_networks_say():
    effects = {"a": (1, 2), "b": (-2, -1), "c": (-1, 2)}
    rows = [row(network, *ends, step) for step, ends in effects.items() for network in NETWORKS]
    rows += [
        row("edgeface", 1, 2, "d"),
        row("mobilefacenet", -2, -1, "d"),
        *(row(name, 1, 2, "e") for name in NETWORKS),
    ]
    assert faces.tally(pd.DataFrame(rows)) == "gain in 2 and lose in 1 (b) of 5 comparisons"
    assert faces.tally(pd.DataFrame()) == "gain in 0 and lose in 0 of 0 comparisons"


def test_agreement_counts_what_simulator_and_video_say():
    words = pd.DataFrame(
        {
            "simulated": ["gains", "gains", "gains", "cannot be told apart", "loses", "gains"],
            "ytf": ["gains", "loses", "cannot be told apart", "loses", "loses", np.nan],
        },
        index=list("abcdef"),
    )
    expected = ["same", "opposite", "simulated only", "real only", "same", ""]
    assert faces.agreement(words).tolist() == expected


def test_tables_say_both_networks_and_nothing_of_nothing(kept):
    same = faces.table(pd.DataFrame([row(network, 0, 0) | {"map_at_100": 0.5} for network in NETWORKS])).data
    assert same["EdgeFace: gain, points"].tolist() == ["—"]
    shown = faces.table(faces.differences(faces.WEIGHTED, [r for r in kept if r.experiment["material"] == CLEAN]))
    assert shown.data["arm"].tolist() == ["norm", "quality"]
    assert {"EdgeFace: gain, points", "MobileFaceNet: gain, points", "both networks"} <= {*shown.data.columns}
    assert faces.table(faces.differences(faces.WEIGHTED, [])) is None
    assert faces.both(faces.differences(faces.WEIGHTED, [])) == ("was not run", "no numbers")


def test_a_claim_that_is_open_says_what_one_network_tells():
    rows = [row("", 1, 2, step, "simulated") for step in (faces.WHITENING, faces.MARGIN, faces.LEARNED)]
    told = {faces.WHITENING: ((-1, 1), (-3, -1)), faces.MARGIN: ((-1, 1), (-2, 1)), faces.LEARNED: ((1, 2), (-2, -1))}
    rows += [row(network, *ends, step) for step, both in told.items() for network, ends in zip(NETWORKS, both)]
    shown = faces.claims_table(pd.DataFrame(rows)).data.set_index("claim")["YTF"]
    assert shown[[faces.WHITENING, faces.MARGIN]].tolist() == ["open; a loss by MobileFaceNet", "open"]
    assert shown[faces.LEARNED] == "open; a gain by EdgeFace and a loss by MobileFaceNet"


def test_a_difference_and_a_grid_say_what_they_were_made_from(kept):
    for frame in (faces.differences(faces.WEIGHTED, kept), faces.grid(kept, faces.WEIGHTED)):
        assert frame.attrs["made"].startswith(f"{len(kept)} records on real clips")
    held = faces.held(kept)
    assert "records on real clips" in held.attrs["made"] and "records on simulated clips" in held.attrs["made"]
    assert faces.pictured(held).attrs["made"] == held.attrs["made"]


def test_a_size_is_another_one_where_no_interval_on_real_video_meets_the_simulated_one():
    rows = [row("", 1, 2, step) | {"set": "simulated"} for step in "abcd"]
    real = {"a": ((-1, 0.9), (2.1, 3)), "b": ((-1, 0.9), (1.5, 3)), "c": ((-1, 1), (0, 0.5)), "d": ((3, 4),)}
    rows += [row(net, *ends, step) for step, both in real.items() for net, ends in zip(NETWORKS, both)]
    assert faces.of_other_size(pd.DataFrame(rows)).to_dict() == {"a": True, "b": False, "c": False, "d": False}


def test_effects_are_said_in_the_order_of_their_networks():
    rows = [row("edgeface", 1, 2), row("mobilefacenet", -1, 3)]
    assert faces.both(pd.DataFrame(rows))[1] == "+1.50 and +1.00 points, a gain by EdgeFace"
    rows[1] = row("mobilefacenet", 1, 2)
    assert faces.both(pd.DataFrame(rows)) == ("gains", "+1.50 and +1.50 points")


def test_the_picture_has_claims_alone_by_their_effect_on_simulated_clips():
    rows = [row("", -2, -1, "the scene adds", "simulated"), row("", 1, 2, "views beat bagging", "simulated")]
    rows += [row(n, 5, 6, "the scene adds", name) for name in ("ytf", "cfp") for n in NETWORKS]
    rows += [row("", 1, 9, claim, "simulated") for claim in [*faces.STARTS, *ladder.other_claims()]]
    found = faces.pictured(pd.DataFrame(rows))
    assert found["step"].tolist() == ["views beat bagging"] + 3 * ["the scene adds"]
    assert found["clips"].tolist()[1:] == ["simulated clips", "YTF, EdgeFace", "YTF, MobileFaceNet"]


def test_effects_stand_in_a_column_a_network_and_a_row_a_claim():
    rows = [row("", 1, 2, "a", "simulated"), row("edgeface", 0.5, 1.5, "a"), row("mobilefacenet", -3, -1, "b")]
    shown = faces.effects_table(pd.DataFrame(rows), ["simulated", "ytf"]).data.set_index("claim, effect in points")
    assert shown.columns.tolist() == ["simulated", "YTF EdgeFace", "YTF MobileFaceNet"]
    said = [text.replace("\N{NO-BREAK SPACE}", " ") for text in shown.to_numpy().ravel()]
    assert said == ["+1.50 [+1.00, +2.00]", "+1.00 [+0.50, +1.50]", "", "", "", "-2.00 [-3.00, -1.00]"]
    assert faces.effects_table(pd.DataFrame(rows), ["lfw"]) is None


def test_decisions_are_shown_in_the_unit_of_their_measure():
    low = {"low": 0.1, "high": 0.2, "photographs": 9}
    one = {"decision": "use", "measure": "rank correlation", "a": "norm", "value_a": 0.15, "network": "edgeface"} | low
    two = one | {"measure": "MAP@100", "b": "mean", "value_b": 0.0, "difference": 0.15, "network": "mobilefacenet"}
    shown = faces.decisions_table(pd.DataFrame([one, two, {"decision": "scenes", "missing": "scene.npy"}])).data
    said = shown.replace("\N{NO-BREAK SPACE}", " ", regex=True).to_numpy().tolist()
    assert said[0] == ["use: rank correlation", "norm", "0.150 [0.100, 0.200]", "", "9"]
    assert said[1] == ["use: MAP@100", "norm, against mean", "", "0.150 +15.00 [+10.00, +20.00]", "9"]


def test_degraded_frames_are_compared_in_points():
    made, rows = faces.read_degraded()
    frame = faces.degraded_frame(made, rows)
    assert {*frame["step"]} == {*faces.DEGRADED.values()} and {*frame["share"]} == {0, 20, 40, 60}
    np.testing.assert_allclose(frame["high"], 100 * rows.loc[frame.index, "gain_high"])
    assert made["commit"] in frame.attrs["made"] and "real clips" in frame.attrs["made"]


def test_quality_that_belongs_to_the_clip_varies_between_clips(tables, kept):
    clean = store_of("ytf", tables, "edgeface", 0)
    shuffled = store_of("ytf", tables, "edgeface", 0, "score: shuffled")
    assert materials.quality_between(clean) > 0.99 and materials.quality_between(shuffled) < 0.35  # a fifth by chance
    quality, clip = clean.modalities["face"].columns["quality"], frames(clean)[1]
    within = pd.Series(quality).groupby(clip).var(ddof=0).mean() / quality.var()
    assert materials.quality_between(clean) == pytest.approx(1 - within)
    said = [r for r in kept if faces.BETWEEN in r.measures]
    assert {r.experiment["arm"] for r in said} == {faces.BASE} and len(said) == 12


def test_a_thinned_world_trains_on_as_few_clips_as_video(store):
    thin = materials.thinned(store)
    train = thin.clips[thin.clips["split"] == "train"]
    had = store.clips["identity"].to_numpy()[
        np.intersect1d(store.select("train", labelled=True), store.select(having="face"))
    ]
    assert {*train.groupby("identity").size()} == {1, 2} and {*train["identity"]} == {*had}
    assert thin.clips[thin.clips["split"] == "val"].equals(
        store.clips[store.clips["split"] == "val"].set_index(thin.clips.index[thin.clips["split"] == "val"])
    )


# -- aggregators of other people -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def both(tables, tmp_path_factory):
    """The tables with those of CFP, of other people and some of YTF's and LFW's under other spellings."""
    folder, rng = tmp_path_factory.mktemp("three-sets"), np.random.default_rng(1)
    shutil.copytree(tables / "ytf", folder / "ytf")
    ours = [f"Stranger {chr(65 + place)}" for place in range(12)]
    theirs = [f"Nobody_{chr(65 + place)}" for place in range(8)]
    sets = {"cfp": [*ours, "PERSON A", "Persón Q. B"], "lfw": [*theirs, "person_c", "Person_X", "stranger_x_a"]}
    for name, people in sets.items():
        (folder / name).mkdir()
        of = pd.DataFrame(
            [(f"{who}/{k}", 0, who) for who in people for k in range(8)], columns=["clip", "frame", "name"]
        )
        of = of.assign(identity=of["name"] if name == "lfw" else of.groupby("name").ngroup().map("{:03d}".format))
        of = of.assign(clip=of["clip"].str.replace(" ", "_"), det=0.9, quality=rng.uniform(0, 1, len(of)))
        of.to_parquet(folder / name / "frames.parquet")
        for network, dim in (("edgeface", 20), ("mobilefacenet", 18)):
            centre = 3 * rng.normal(size=(len(people), dim)).repeat(8, 0)
            np.save(folder / name / f"{network}.npy", (centre + rng.normal(size=centre.shape)).astype(np.float16))
    return folder


def test_other_people_are_nobody_of_video_and_none_of_them_twice(both):
    """Of a CFP of fourteen people, three are distractors in each split and two are YTF's; of LFW three are left out."""
    for seed in (0, 1):
        store, cfp = (store_of(name, both, "edgeface", seed) for name in ("others", "cfp"))
        known = {who for who in cfp.identities if who.startswith("Stranger")}
        twice = {"stranger_x_a"} if "Stranger_A" in known else set()
        mine = {who for who in store.identities if who[0] in "Ss"}
        assert mine - {"stranger_x_a"} == known and ("stranger_x_a" in mine) == (not twice)
        assert {*store.identities} - mine == {f"Nobody_{chr(65 + place)}" for place in range(8)}
        assert {*store.clips["split"]} == {"train"} and (store.clips["identity"] >= 0).all()
        left_out = len(cfp.identities) - len(known) + 2 + len(twice)
        assert store.meta["provenance"]["left_out"] == left_out and not store.meta["simulated"]


def test_clips_of_other_people_are_those_of_their_own_set(both):
    store = store_of("others", both, "edgeface", 0)
    assert len(store) == sum(store.clips["clip"].str.startswith(name).sum() for name in materials.OTHERS)
    for name in materials.OTHERS:
        own = store_of(name, both, "edgeface", 0)
        for clip, batch in ((c, store.batch([i])) for i, c in enumerate(store.clips["clip"]) if c.startswith(name)):
            at = np.flatnonzero(own.clips["clip"] == clip.removeprefix(f"{name}_"))
            one = own.batch(at)
            assert torch.equal(batch.feature, one.feature) and torch.equal(batch.quality, one.quality)
            place = np.flatnonzero(store.clips["clip"] == clip)
            assert store.identities[store.identity_of(place)] == own.identities[own.identity_of(at)]
    harder = store_of("others", both, "edgeface", 0, "20 % wrong, anyone").modalities["face"].columns["wrong"]
    assert harder.sum() == round(0.2 * len(harder))


def test_where_everybody_is_in_video_nobody_is_left(both, tmp_path):
    shutil.copytree(both, tmp_path / "tables")
    for name in materials.OTHERS:
        path = tmp_path / "tables" / name / "frames.parquet"
        table = pd.read_parquet(path)
        whose = pd.factorize(table["name"])[0]
        table["name"] = table["identity"] = [f"PERSON-{chr(65 + who)}" for who in whose]
        table.to_parquet(path)
    with pytest.raises(ValueError, match="tables: everybody of cfp and lfw is in ytf too"):
        store_of("others", tmp_path / "tables", "edgeface", 0)


def quick(name, material, store):
    """A plan of aggregators that learn in no time."""
    training = Training(epochs=3, batch=16, frames=4, lr=1e-3, aggregator_lr=0.3)
    base = {f"{arm}, class means": Experiment(aggregator=arm, classifier="class means") for arm in ("mean", "quality")}
    learned = {
        arm: Experiment(aggregator=arm, hidden=8, training=training) for arm in ("NAN", "learned scores", "mean")
    }
    return base | {arm + faces.FROZEN: e for arm, e in learned.items()}


def test_clips_are_pooled_by_the_aggregator_of_other_people_as_it_is(both):
    store, others = (store_of(name, both, "edgeface", 0) for name in ("ytf", "others"))
    e = replace(quick("", "", None)["learned scores" + faces.FROZEN], data=str(others.path))
    pooled = materials.frozen(e, store, device="cpu").modalities["face"]
    weight = fit(e, others, device="cpu").model.aggregator.weight.detach().numpy()
    assert (abs(weight) > 0.1).any()
    feature, clip, _ = frames(store)
    scores = [store.modalities["face"].columns[name] for name in ("quality", "det")]
    logit = np.stack([scores[0] / 100, scores[1], np.linalg.norm(feature, axis=1) / 20], 1) @ weight
    share = np.exp(logit) / np.bincount(clip, np.exp(logit))[clip]
    expected = np.stack([np.bincount(clip, share * column) for column in feature.T], 1)
    expected *= np.sqrt(expected.shape[1]) / np.linalg.norm(expected, axis=1, keepdims=True)
    assert (pooled.count == 1).all() and pooled.start.tolist() == [*range(len(store))]
    np.testing.assert_allclose(np.asarray(pooled.feature, float), expected, atol=4e-3)
    plain = np.stack([np.bincount(clip, column) for column in feature.T], 1)  # all weights alike
    plain *= np.sqrt(plain.shape[1]) / np.linalg.norm(plain, axis=1, keepdims=True)
    assert abs(plain - expected).max() > 0.02


def test_arms_of_other_people_rank_the_same_splits_by_class_means(both, monkeypatch):
    monkeypatch.setattr(faces, "TRAINED_SPLITS", 2)
    found = faces.measure(quick, both, "ytf", "edgeface", CLEAN, [0, 1, 2], device="cpu")
    of = {(r.experiment["arm"], r.experiment["seed"]): r for r in found}
    frozen = [arm + faces.FROZEN for arm in ("NAN", "learned scores", "mean")]
    assert {key for key in of if key[0] in frozen} == {(arm, split) for arm in frozen for split in (0, 1)}
    for arm, split in ((arm, split) for arm in frozen for split in (0, 1)):
        one, base = of[arm, split], of["mean, class means", split]
        same = ("queries", "gallery_clips", "train_clips", "identities")
        assert {name: one.measures[name] for name in same} == {name: base.measures[name] for name in same}
        others = store_of("others", both, "edgeface", split)
        asked = {"others_people": len(others.identities), "others_clips": len(others)}
        assert asked.items() <= one.measures.items() and arm_key(one.experiment) == arm_key(quick("", "", None)[arm])
        assert one.ap == [one.measures["map_at_100"]] and str(both) not in json.dumps(asdict(one))
    # A plain mean has nothing to learn, so that what others train it on changes nothing.
    still = [(of["mean" + faces.FROZEN, split], of["mean, class means", split]) for split in (0, 1)]
    assert all(abs(a.ap[0] - b.ap[0]) < 0.005 for a, b in still)
    ends = [key for key in of["NAN" + faces.FROZEN, 0].measures if ": " in key]
    assert ends == [f"{pool}, class means: {end}" for pool in ("mean", "quality") for end in ("low", "high")]


def test_arms_of_other_people_wait_for_their_sets(tables, both):
    assert faces.lacking(tables) == ["cfp"] and faces.lacking(both) == []
    arms = {r.experiment["arm"] for r in faces.measure(quick, tables, "ytf", "edgeface", CLEAN, [0], device="cpu")}
    assert arms == {"mean, class means", "quality, class means"}


# -- what the chapter runs -----------------------------------------------------------------------------------


@pytest.mark.parametrize("material, few", [("2 frames", 1), (CLEAN, 2)])
def test_what_is_trained_has_the_first_splits_alone(tables, monkeypatch, material, few):
    monkeypatch.setattr(faces, "HARDER_SPLITS", 1)
    monkeypatch.setattr(faces, "TRAINED_SPLITS", 2)
    found = faces.measure(small, tables, "ytf", "edgeface", material, [2, 1, 0], device="cpu")
    ran = {arm: [r.experiment["seed"] for r in found if r.experiment["arm"] == arm] for arm in small("", "", None)}
    assert ran == {arm: [2, 1, 0][: None if "class means" in arm else few] for arm in ran}


def test_every_arm_of_the_chapter_runs_on_clips_and_on_photographs(tables):
    for name in ("ytf", "lfw"):
        store = store_of(name, tables, "mobilefacenet", 0)
        arms = plans.real(name, CLEAN, store)
        longer = [arm for arm, e in arms.items() if e.training.epochs > faces.BUDGET["epochs"]]
        assert longer == ([faces.LONGER] if name == "ytf" else [])
        assert {e.training.epochs for arm, e in arms.items() if e.classifier == "mlp" and arm not in longer} == {
            faces.BUDGET["epochs"]
        }
        missing = {arm for pair in faces.claims_of(name == "ytf").values() for arm in pair} - {*arms}
        assert all("scene" in arm for arm in missing) if name == "lfw" else missing == {fusion.SCORE}
    store = store_of("ytf", tables, "mobilefacenet", 0, "20 % wrong, anyone")
    assert {*AGGREGATORS} & {*plans.real("ytf", "20 % wrong, anyone", store)} == {
        "mean", "quality", "learned scores", "NAN", "NAN + scores", "attention + scores"
    }  # fmt: skip
    assert not {*AGGREGATORS} & {*plans.real("ytf", "2 frames", store)}


@pytest.mark.parametrize("name, material", [("ytf", material) for material in MATERIALS] + [("lfw", CLEAN)])
def test_what_other_people_train_is_what_video_trains(tables, name, material):
    arms = plans.real(name, material, store_of(name, tables, "edgeface", 0, material))
    frozen = {arm for arm in arms if arm.endswith(faces.FROZEN)}
    wanted = name == "ytf" and material in (CLEAN, "20 % wrong, anyone", "20 % wrong, like quality")
    assert frozen == {arm for of in faces.POOLS.values() for arm, _ in of.values()} if wanted else not frozen
    assert all(arms[arm] == arms[arm.removesuffix(faces.FROZEN)] for arm in frozen)


def test_the_claims_of_simulated_clips_are_those_of_the_ladder():
    """One claim has one answer: what chapter 10 says of simulated clips stands in this table too."""
    world = faces.simulated().set_index("step")
    records = read_results("10_ladder.jsonl.gz")
    others = [read_results(f"{name}.jsonl.gz") for name in ("04_arms", "08_ensemble")]
    claims = ladder.claims(records, ladder.names_of(records, ladder.plan()), *others).set_index("claim")
    both = claims.index.intersection(world.index)
    # The aggregation beside a baseline without a margin, and ensembles of sixteen members, are in chapter 10 alone.
    assert len(both) == len(claims) - 2
    of_four = ladder.views_against_bagging(others[1], faces.MEMBERS)
    assert world.loc[faces.VIEWS, "difference"] == of_four["difference"].item() and faces.MEMBERS == 4
    for name in ("difference", "low", "high"):
        np.testing.assert_allclose(world.loc[both, name].astype(float), claims.loc[both, name].astype(float))


@pytest.mark.skipif(not KEPT, reason="no records of real faces are kept")
def test_kept_records_are_of_the_arms_of_the_chapter(tables):
    """An arm that changed without a word would find no record."""
    found: dict = {}
    for record in KEPT:
        e = record.experiment
        found.setdefault((e["set"], e["network"], e["material"]), set()).add((arm_key(e), e["arm"], e["seed"]))
    wanted = {(name, n, m) for name in faces.SPLITS for n in NETWORKS for m in MATERIALS if name == "ytf" or m == CLEAN}
    assert {*found} == wanted
    for (name, _, material), kept_here in found.items():
        store = store_of("ytf" if name == "ytf" else "lfw", tables, "edgeface", 0, material)
        planned = plans.real(name, material, store).items()
        few = min(faces.TRAINED_SPLITS if material == CLEAN else faces.HARDER_SPLITS, faces.SPLITS[name])
        splits = {arm: few if e.classifier in TRAINED else faces.SPLITS[name] for arm, e in planned}
        weights = {arm_key(e) for arm, e in planned if arm in fusion.WEIGHTS}
        fused = {(arm, split) for key, arm, split in kept_here if arm == fusion.SCORE and key in weights}
        assert fused == {(fusion.SCORE, split) for split in range(few) if weights}
        kept_here = {(key, arm, split) for key, arm, split in kept_here if (arm, split) not in fused}
        assert kept_here == {(arm_key(e), arm, split) for arm, e in planned for split in range(splits[arm])}


@pytest.mark.skipif(not KEPT, reason="no records of real faces are kept")
def test_kept_records_hold_no_person(tables):
    assert all(len(record.ap) == 1 and not record.breakdown for record in KEPT)


def test_fusion_and_starts_of_simulated_clips_are_those_of_their_chapters():
    world = faces.simulated().set_index("step")["difference"]
    arms = systems.arms(systems.FUSIONS)
    runs = fusion.named(read_results("07_arms.jsonl.gz"), arms | fusion.at_every_weight(arms["face"]))
    mixed = [np.mean(record.ap) for record in fusion.held_out(runs)[0]]
    for claim, other in zip(faces.FUSED, ("face", "scene 128")):
        gain = np.subtract(mixed, [np.mean(record.ap) for record in runs.loc[other]])
        assert world[claim] == pytest.approx(100 * gain.mean()) and len(gain) == 10
    runs = ensemble.as_runs(read_results("08_ensemble.jsonl.gz"))
    runs = runs[(runs["members"] <= faces.MEMBERS) & runs["system"].isin(["face and scene", "random start"])]
    starts = ensemble.starts(runs).set_index(["models", "start"])["difference"]
    for claim, models in zip(faces.STARTS, ("one model", f"{faces.MEMBERS} views")):
        assert world[claim] == pytest.approx(starts[models, "random"])


# -- halves of the people ------------------------------------------------------------------------------------


HARD = "50 % wrong, anyone"  # where the weights of halves differ


def halved(name, material, store):
    """A plan that takes no time: poolings under the names of weights, as different as halves need, and whitening."""
    pools = dict(zip(("weight 0", "weight 0.5", "weight 1"), ("mean", "norm", "quality")))
    wanted = {arm for pair in faces.LENT.values() for arm in pair}
    return {arm: Experiment(aggregator=pool, classifier="class means") for arm, pool in pools.items()} | {
        arm: e for arm, e in plans.real_faces(store).items() if arm in wanted
    }


@pytest.fixture
def unsaid(tables, monkeypatch):
    """Records of halves as they are before they forget persons, two splits: arm, split and AP by person."""
    monkeypatch.setattr(faces, "kept", lambda arms, records, stores, said: [*zip(arms, records)])
    found = faces.measure(halved, tables, "ytf", "edgeface", HARD, [0, 1], device="cpu")
    return {(arm, r.experiment["seed"]): r for arm, r in found}


def test_nobody_is_judged_by_a_weight_that_was_chosen_on_him(unsaid):
    for split in (0, 1):
        ap = {name: np.array(unsaid[name, split].ap) for name in fusion.WEIGHTS if (name, split) in unsaid}
        mixed = unsaid[fusion.SCORE, split]
        for side, key in enumerate(faces.CHOSEN):
            best = max(ap, key=lambda name: ap[name][1 - side :: 2].sum())  # the first of equal ones is the lowest
            assert mixed.measures[key] == fusion.WEIGHTS[best]
            np.testing.assert_array_equal(mixed.ap[side::2], ap[best][side::2])
        assert mixed.measures["map_at_100"] == pytest.approx(np.mean(mixed.ap))
    chosen = {unsaid[fusion.SCORE, split].measures[key] for split in (0, 1) for key in faces.CHOSEN}
    assert len(chosen) > 1  # else halves that choose for themselves would pass
    assert len({r.key for r in unsaid.values()}) == len(unsaid)


@pytest.mark.parametrize("lend", [True, False])
def test_clips_are_lent_to_training_by_those_who_are_not_ranked(tables, lend):
    clean = store_of("ytf", tables, "edgeface", 0)
    whose, split = clean.clips["identity"].to_numpy(), clean.clips["split"].to_numpy()
    for side in (0, 1):
        half, theirs = materials.lent(clean, side, lend), (split == "val") & (whose >= 0) & (whose % 2 != side)
        of = {name: {*half.clips["clip"][half.clips["split"] == name]} for name in ("train", "val")}
        assert of["val"] == {*clean.clips["clip"][(split == "val") & ~theirs]}
        lends = {*clean.clips["clip"][theirs]}
        assert of["train"] == {*clean.clips["clip"][split == "train"]} | (lends if lend else set())
        at = half.clips["clip"].tolist()
        same = [clean.clips["clip"].tolist().index(clip) for clip in at]
        assert torch.equal(half.batch(np.arange(len(at))).feature, clean.batch(same).feature)


def test_a_record_of_halves_has_everybody_once(unsaid, tables):
    store = store_of("ytf", tables, "edgeface", 1, HARD)
    e = Experiment(classifier="whitened means")
    for of, (arm, _) in faces.LENT.items():
        record = unsaid[arm, 1]
        for side in (0, 1):
            half = materials.lent(store, side, materials.LENDING[of])
            found = retrieve(e, half, device="cpu")
            assert {*found.queries} == {who for who in range(len(store.identities)) if who % 2 == side}
            np.testing.assert_allclose(np.array(record.ap)[found.queries], found.ap, atol=1e-6)
    train = store.clips["identity"][(store.clips["split"] == "train") & (store.clips["identity"] >= 0)]
    val = ((store.clips["split"] == "val") & (store.clips["identity"] >= 0)).sum()
    counts = [unsaid[arm, 1].measures["deviations"] for arm, _ in faces.LENT.values()]
    own = len(train) - train.nunique()
    assert counts == [own, own + val / 2]


def test_a_world_is_cut_to_as_many_people_and_clips_as_video(store):
    cut = materials.alike(store, 20)
    labelled = cut.clips[cut.clips["identity"] >= 0]
    sizes = labelled.groupby(["split", "identity"]).size()
    assert {*sizes["train"]} <= {1, 2} and {*sizes["val"]} <= {1, 2} and sizes["val"].max() == 2
    assert {*labelled["identity"]} == {*range(20)} == {*labelled["identity"][labelled["split"] == "train"]}
    owner = dict(zip(store.clips["clip"], store.clips["identity"]))
    assert all(
        cut.identities[code] == store.identities[owner[clip]]
        for clip, code in zip(labelled["clip"], labelled["identity"])
    )
    assert (cut.clips["identity"] < 0).sum() == (store.clips["identity"] < 0).sum()
    assert (cut.modalities["face"].count[cut.clips["identity"] >= 0] > 0).all()
    train = labelled[labelled["split"] == "train"]
    alone, lent = (materials.of_halves(Experiment(classifier="class means"), cut, lend) for lend in (False, True))
    assert alone.measures["deviations"] == len(train) - train["identity"].nunique() < lent.measures["deviations"]


def test_kept_records_of_worlds_cut_like_video_are_of_as_many_people_in_ten_worlds():
    kept = read_results("12_lending.jsonl.gz")
    video = [r for r in KEPT if (r.experiment["set"], r.experiment["material"]) == ("ytf", CLEAN)]
    people = {r.measures["identities"] for r in video if "identities" in r.measures}
    assert {r.key.split(", ")[-1] for r in kept} == {f"{who:.0f}" for who in people}
    arms = [(arm, seed) for seed in range(10) for pair in faces.LENT.values() for arm in pair]
    assert [(r.experiment["arm"], r.experiment["seed"]) for r in kept] == arms
    assert all(len(r.ap) == 1 and r.simulated for r in kept)


def test_worlds_are_lent_as_video_is(store, monkeypatch):
    monkeypatch.setattr(faces, "open_store", lambda world: store)
    found = {r.experiment["arm"]: r for r in faces.lending([Experiment(profile="tiny")], 20)}
    cut, e = materials.alike(store, 20), Experiment(profile="tiny", classifier="whitened means")
    for of, (arm, against) in faces.LENT.items():
        again = materials.of_halves(e, cut, materials.LENDING[of], device="cpu")
        assert found[arm].ap == [np.mean(again.ap)] and found[arm].measures == again.measures
        assert found[against].experiment["classifier"] == "class means"
    assert len({r.key for r in found.values()}) == 4


@pytest.mark.parametrize(
    "alone, lent, world, few, other",
    [
        ("loses", "loses", "gains", "are not shown to be a reason", "are a reason"),
        ("loses", "cannot be told apart", "gains", "are a reason", "are a reason"),
        ("loses", "gains", "gains", "are a reason", "are not needed as one"),
        ("loses", "loses", "loses", "are not shown to be a reason", "are neither shown nor ruled out"),
        ("was not run", "was not run", "gains", "are not shown to be a reason", "are neither shown nor ruled out"),
    ],
)  # fmt: skip
def test_reasons_follow_the_verdicts(alone, lent, world, few, other):
    assert faces.reasons(alone, lent, world) == (few, other)


def test_a_claim_that_nothing_is_told_of_is_open_in_the_table():
    rows = [row("", -1, 2, claim, "simulated") for claim in faces.FUSED]
    rows += [row(network, 1, 2, claim) for claim in faces.FUSED for network in NETWORKS]
    shown = faces.claims_table(pd.DataFrame(rows)).data
    assert shown["claim"].tolist() == [*faces.FUSED]
    assert shown[["simulated", "YTF"]].to_numpy().tolist() == [["open", "gains"]] * 2


@pytest.mark.skipif(not REAL, reason="MMLIB_REAL_DATA names no folder with the tables of public faces")
def test_sharp_strangers_take_over_poor_clips_of_real_people():
    """The finding of the chapter, on one split: quality weights lose far more by anyone's frames than by like ones."""
    loss = {}
    for who in STRANGERS:
        store = store_of("ytf", REAL, "mobilefacenet", 0, f"20 % wrong, {who}")
        arms = [
            Experiment(data=str(store.path), aggregator=name, classifier="class means") for name in ("mean", "quality")
        ]
        mean, quality = (retrieve(e, store, device="cpu").ap.mean() for e in arms)
        loss[who] = mean - quality
    assert loss["anyone"] > 0.15 and 0.02 < loss["like quality"] < 0.15


@pytest.mark.skipif(not REAL, reason="MMLIB_REAL_DATA names no folder with the tables of public faces")
def test_real_people_of_other_sets_are_apart():
    """Nobody of a split is in YTF by name, or there twice, and the kept records were trained on as many people."""
    store = store_of("others", REAL, "mobilefacenet", 0)
    names = {name: people_of(name, REAL) for name in faces.SPLITS}
    assert not shared_names(store.identities, names["ytf"])
    assert not [pair for pair in shared_names(store.identities, store.identities) if pair[0] != pair[1]]
    assert {*store.identities} <= {*names["cfp"], *names["lfw"]} and 650 < len(store.identities) < 750
    said = [r for r in KEPT if r.experiment["arm"].endswith(faces.FROZEN) and r.experiment["seed"] == 0]
    assert {r.measures["others_people"] for r in said} == {len(store.identities)}
