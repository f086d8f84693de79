import csv
import hashlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from importlib.resources import files

import numpy as np
import pytest
from scipy import stats

from mmlib.data import simulate as simulator
from mmlib.data.calibration import FRAME_SURVIVAL, NORM_KNOTS, QUALITY_KNOTS
from mmlib.data.simulate import (
    SEGMENT,
    Settings,
    World,
    draw_clips,
    draw_frames,
    noise_amplitude,
    pick,
    quantile,
    settings_for,
    simulate,
)

SMALL = settings_for("tiny", identities=12)
# No pose, light, make-up or noise: an embedding is its person, but for what all poor faces share.
PLAIN = {"role": 0, "clip_nuisance": 0, "clip_noise": 0, "frame_nuisance": 0, "frame_noise": 0, "warp": 0}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return simulate(tmp_path_factory.mktemp("world") / "store", settings_for("tiny", identities=30), seed=0)


@pytest.fixture(scope="module")
def world():
    return World(settings_for("tiny"), 0)


@pytest.fixture(scope="module")
def large():
    return World(settings_for("quick"), 0)


@pytest.fixture(scope="module")
def full():
    """The clips of a world of the challenge's size."""
    return draw_clips(10_034, np.random.default_rng(0))[0]


def contents(path):
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def by_frame(store, column):
    """Repeat a column of the clip table for every face of the clip, in the order of the faces' rows."""
    face = store.modalities["face"]
    out = np.empty(len(face.feature), store.clips[column].dtype)
    for value, start, count in zip(store.clips[column], face.start, face.count, strict=True):
        out[start : start + count] = value
    return out


# -- the same seed gives the same bytes ----------------------------------------------------------------------


def test_same_settings_and_seed_give_the_same_bytes_on_any_number_of_threads(tmp_path, monkeypatch):
    monkeypatch.setattr(simulator, "CHUNK", 32)
    first = contents(simulate(tmp_path / "first", SMALL, seed=0).path)
    for threads in (1, 5):
        monkeypatch.setattr(simulator, "ThreadPoolExecutor", lambda _, n=threads: ThreadPoolExecutor(n))
        assert contents(simulate(tmp_path / str(threads), SMALL, seed=0).path) == first


def test_order_in_which_chunks_are_drawn_does_not_change_them(monkeypatch):
    monkeypatch.setattr(simulator, "CHUNK", 32)
    one, two = World(SMALL, 0), World(SMALL, 0)
    last_first = [one.chunk(32), one.chunk(0)]
    for drawn, first in zip(reversed(last_first), (0, 32), strict=True):
        for modality, columns in two.chunk(first).items():
            for name, values in columns.items():
                assert np.array_equal(drawn[modality][name], values), (modality, name)


def test_a_world_is_the_one_it_was_when_comparisons_were_frozen():
    """What generators draw, bit for bit; what products of matrices make of it, up to rounding."""
    world = World(SMALL, 0)
    drawn = world.chunk(0)
    face, digest = drawn["face"], hashlib.sha256()
    clips = [world.clips[name] for name in ("identity", "show", "set")]
    for values in (*clips, world.person, world.other, world.frames, face["wrong"], face["frame"]):
        digest.update(np.asarray(values, "<i8").tobytes())
    assert digest.hexdigest() == "87cbf73b0344e1ddc5dbba326d90b69f856dc14a35f7fd35a15efafa1f4fd826"
    known = {
        "face": (0.766108, [0.1405, 1.3691, 2.0059]),
        "head": (0.707267, [-1.0098, 1.5352, -0.2024]),
        "body": (0.705587, [1.0361, 1.0352, 0.7827]),
        "audio": (0.706844, [-0.5977, -0.8164, 2.0684]),
        "scene": (0.270820, [0.0424, -0.5293, 0.0712]),
    }
    for name, (size, last) in known.items():
        feature = drawn[name]["feature"].astype(float)
        assert np.abs(feature).mean() == pytest.approx(size, abs=1e-5), name
        assert feature[-1, :3] == pytest.approx(last, abs=3e-3), name
    assert face["quality"][-3:] == pytest.approx([30.72268996, 86.39348233, 58.75416532], rel=1e-6)
    assert face["det"][-3:] == pytest.approx([0.99363102, 0.9804773, 0.98159499], rel=1e-6)
    assert face["box"][-1].tolist() == [384, 190, 530, 336]


def test_another_seed_gives_other_clips_and_features():
    one, two = (World(SMALL, seed) for seed in (0, 1))
    assert not one.clips.equals(two.clips)
    for name, drawn in one.chunk(0).items():
        assert not np.isin(two.chunk(0)[name]["feature"][:, 0], drawn["feature"][:, 0]).all(), name


def test_store_says_how_to_draw_it_again(tmp_path):
    said = simulate(tmp_path / "one", SMALL, 3).meta["provenance"]
    again = simulate(tmp_path / "two", Settings(**said["settings"]), said["seed"])
    assert contents(again.path) == contents(tmp_path / "one")


def test_store_says_that_it_is_simulated(store):
    assert store.meta["simulated"] is True


# -- the clip table ------------------------------------------------------------------------------------------


def test_as_many_identities_as_the_challenge_have_exactly_its_clips(full):
    with (files("mmlib.data") / "clips_per_identity_joint.csv").open() as file:
        published = Counter({(int(train), int(val)): int(n) for train, val, n in list(csv.reader(file))[1:]})
    listed = full[full["identity"] >= 0]
    train, val = (
        np.bincount(listed.loc[listed["split"] == split, "identity"], minlength=10_034).tolist()
        for split in ("train", "val")
    )
    assert Counter(zip(train, val, strict=True)) == published


def test_as_many_identities_as_the_challenge_have_its_totals(full):
    groups = full.groupby(["split", full["identity"] >= 0]).size().to_dict()
    assert groups == {("train", True): 60_566, ("val", True): 45_472, ("val", False): 30_541}


def test_share_of_clips_without_a_face_is_the_published_one(large):
    # four standard errors over 6,700 clips
    assert np.mean(large.frames == 0) == pytest.approx(0.044, abs=0.01)


@pytest.mark.parametrize("identities", [2, 12, 60])
def test_distractors_are_two_fifths_of_val_at_any_scale(identities):
    clips, _ = draw_clips(identities, np.random.default_rng(0))
    val = clips.query("split == 'val'")["identity"]
    labelled = (val >= 0).sum()
    assert (val < 0).sum() == round(labelled * 30_541 / 45_472)


def test_distractors_are_not_listed_identities(world):
    stranger = (world.clips["identity"] < 0).to_numpy()
    assert world.person[stranger].min() >= world.listed
    assert np.array_equal(world.person[~stranger], world.clips["identity"][~stranger])


def test_some_distractors_come_back_in_several_clips(world):
    _, clips = np.unique(world.person[world.clips["identity"] < 0], return_counts=True)
    assert clips.min() == 1 and clips.max() > 2


def test_clip_names_are_unique_and_look_like_those_of_the_challenge(store):
    assert store.clips["clip"].is_unique
    assert store.clips["clip"].str.fullmatch(r"IQIYI_VID_(TRAIN|VAL)_\d{7}").all()


@pytest.mark.parametrize("split", ["train", "val"])
def test_order_of_names_tells_nothing_of_the_identity(full, split):
    clips = full[full["split"] == split].sort_values("clip")
    rank = stats.spearmanr(np.arange(len(clips)), clips["identity"])
    assert abs(rank.statistic) < 4 / np.sqrt(len(clips))


def test_neighbours_in_the_table_share_an_identity_no_more_often_than_any_two_clips(full):
    identity = full.query("split == 'train'").sort_values("clip")["identity"].to_numpy()
    share = np.bincount(identity) / len(identity)
    expected = len(identity) * (share**2).sum()
    found = np.sum(identity[1:] == identity[:-1])
    assert abs(found - expected) < 5 * np.sqrt(expected)


def test_every_clip_is_of_a_show_in_which_its_person_appears(large):
    shows = large.person_shows[large.person]
    assert (shows == large.clips["show"].to_numpy()[:, None]).any(axis=1).all()


def test_train_and_val_clips_of_an_identity_share_shows(large):
    listed = large.clips[large.clips["identity"] >= 0]
    pairs = [set(zip(part["identity"], part["show"], strict=True)) for _, part in listed.groupby("split")]
    shuffled = set(zip(np.roll(listed["identity"], 7), listed["show"], strict=True))
    assert len(pairs[0] & pairs[1]) > 5 * len(pairs[0] & shuffled)


# -- modalities ----------------------------------------------------------------------------------------------


def test_clips_without_a_face_have_the_other_modalities(store):
    faceless = store.modalities["face"].count == 0
    assert faceless.any()
    for name in ("head", "body", "audio", "scene"):
        assert (store.modalities[name].count[faceless] == 1).all(), name


def test_heads_and_bodies_come_once_a_segment_of_eight_faces(store):
    faces = store.modalities["face"].count
    segments = [max(1, -(-int(count) // 8)) for count in faces]
    assert store.modalities["head"].count.tolist() == segments
    assert store.modalities["body"].count.tolist() == segments


def test_world_without_missing_faces_gives_every_clip_one():
    assert World(settings_for("tiny", identities=12, no_face=0), 0).frames.min() >= 1


def test_frames_of_a_clip_are_in_ascending_order(store):
    face = store.modalities["face"]
    for start, count in zip(face.start, face.count, strict=True):
        assert (np.diff(face.columns["frame"][start : start + count]) > 0).all()


def test_boxes_have_an_area_and_no_negative_corner(store):
    for name in ("face", "head", "body"):
        box = store.modalities[name].columns["box"]
        assert box.min() >= 0 and (box[:, 2:] > box[:, :2]).all(), name


@pytest.fixture(scope="module")
def scenes(store):
    """Cosines between the scenes of all pairs of clips, and which pairs share the show and the set."""
    scene = store.modalities["scene"].feature[:].astype(np.float64)[store.modalities["scene"].start]
    scene /= np.linalg.norm(scene, axis=1, keepdims=True)
    apart = ~np.eye(len(store), dtype=bool)
    show, stage = (store.clips[name].to_numpy() for name in ("show", "set"))
    return (scene @ scene.T)[apart], (show[:, None] == show)[apart], (stage[:, None] == stage)[apart]


def test_scenes_of_one_show_are_more_alike_than_those_of_two(scenes):
    cosine, show, _ = scenes
    assert cosine[show].mean() > cosine[~show].mean() + 0.1


def test_scenes_of_one_set_are_more_alike_than_those_of_two_sets_of_a_show(scenes):
    cosine, show, stage = scenes
    assert cosine[show & stage].mean() > cosine[show & ~stage].mean() + 0.05


def test_shows_do_not_share_their_sets(scenes):
    cosine, show, stage = scenes
    assert cosine[~show & stage].mean() == pytest.approx(cosine[~show & ~stage].mean(), abs=0.02)


@pytest.mark.parametrize("name", ["face", "head", "audio", "body"])
def test_clips_of_one_identity_are_more_alike_than_those_of_two(store, name):
    source = store.modalities[name]
    chosen = store.select(labelled=True, having=name)
    first = source.feature[:][source.start[chosen]].astype(np.float64)
    first /= np.linalg.norm(first, axis=1, keepdims=True)
    identity = store.identity_of(chosen)
    same = (identity[:, None] == identity) & ~np.eye(len(chosen), dtype=bool)
    cosine = first @ first.T
    apart = cosine[identity[:, None] != identity]
    assert cosine[same].mean() > apart.mean() + 10 * apart.std() / np.sqrt(len(chosen))


# -- wrong frames --------------------------------------------------------------------------------------------


def test_without_contamination_no_frame_is_wrong(tmp_path):
    clean = settings_for("tiny", identities=12, contaminated=0, mostly_wrong=0)
    assert not simulate(tmp_path / "clean", clean, 0).modalities["face"].columns["wrong"].any()


def test_share_of_wrong_frames_is_that_of_the_beta_distribution():
    world = World(settings_for("tiny", identities=30, contaminated=1, mostly_wrong=0, no_face=0), 0)
    # Beta(1, 2.5) has mean 1 / 3.5 and standard deviation .22, over 400 clips: .055 is five standard errors
    assert world.wrong_share.mean() == pytest.approx(1 / 3.5, abs=0.055)
    assert world.chunk(0)["face"]["wrong"].mean() == pytest.approx(1 / 3.5, abs=0.07)


def test_mostly_wrong_clips_hardly_show_their_person():
    world = World(settings_for("tiny", identities=12, mostly_wrong=1, no_face=0), 0)
    wrong = np.split(world.chunk(0)["face"]["wrong"], np.cumsum(world.frames)[:-1])
    assert world.wrong_share.min() >= 0.8
    assert np.mean([part.mean() for part in wrong]) > 0.8


def test_long_clips_are_wrong_by_whole_segments(store):
    face, mixed = store.modalities["face"], 0
    for start, count in zip(face.start, face.count, strict=True):
        wrong = face.columns["wrong"][start : start + count]
        if count > 16:
            mixed += wrong.any() and not wrong.all()
            for first in range(0, count, SEGMENT):
                assert len(set(wrong[first : first + SEGMENT])) == 1
    assert mixed > 10


def test_short_clips_are_wrong_frame_by_frame(store):
    face = store.modalities["face"]
    first = [
        face.columns["wrong"][start : start + 8]
        for start, count in zip(face.start, face.count, strict=True)
        if 8 <= count <= 16
    ]
    assert any(part.any() and not part.all() for part in first)


def test_other_person_is_never_the_labelled_one(large):
    assert (large.other != large.person).all()


def test_wrong_faces_mostly_come_from_the_same_show(large):
    appears = (large.person_shows[large.other] == large.clips["show"].to_numpy()[:, None]).any(axis=1)
    assert appears.mean() > 0.5


def test_every_face_shows_its_clips_person_or_the_other_one_where_wrong():
    world = World(settings_for("tiny", identities=12, contaminated=1, **PLAIN), 0)
    face = world.chunk(0)["face"]
    clip = np.repeat(np.arange(len(world.clips)), world.frames)
    shown = np.where(face["wrong"], world.other[clip], world.person[clip])
    x = face["feature"].astype(np.float64)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    person = world.observe(world.mu).astype(np.float64)
    # What all unrecognisable faces share says nothing of the person: compare across it.
    shared = world.observe(world.unrecognisable[None])[0].astype(np.float64)
    left = np.abs(x @ shared) < 0.9
    across = np.eye(len(shared)) - np.outer(shared, shared)
    x, person = x @ across, person @ across
    person /= np.linalg.norm(person, axis=1, keepdims=True)
    assert left.mean() > 0.9 and face["wrong"][left].any()
    assert np.array_equal((x[left] @ person.T).argmax(axis=1), shown[left])


def test_quality_of_wrong_faces_follows_its_setting(tmp_path):
    means = []
    for level in (-1.0, 1.0):
        face = simulate(
            tmp_path / str(level), settings_for("tiny", identities=12, contaminated=1, wrong_quality=level), 0
        ).modalities["face"]
        means.append(face.columns["quality"][face.columns["wrong"]].mean())
    assert means[1] > means[0] + 20


# -- persons -------------------------------------------------------------------------------------------------


def test_identity_vectors_have_length_one(large):
    assert np.allclose(np.linalg.norm(large.mu, axis=1), 1, atol=1e-5)


def test_lookalikes_are_more_alike_than_anyone_in_a_world_without_them():
    nearest = []
    for share in (0, 0.5):
        world = World(settings_for("tiny", lookalikes=share), 0)
        cosine = world.mu @ world.mu.T - 2 * np.eye(world.persons)
        nearest.append(cosine.max(axis=1))
    assert np.quantile(nearest[1], 0.9) > np.quantile(nearest[0], 0.9) + 0.1


def test_some_distractors_look_like_listed_identities(large):
    stranger = large.mu[large.listed :] @ large.mu[: large.listed].T
    assert np.quantile(stranger.max(axis=1), 0.9) > 0.4


def test_observation_without_warp_keeps_every_cosine():
    world = World(settings_for("tiny", identities=12, warp=0), 0)
    seen = world.observe(world.mu)
    assert np.allclose(seen @ seen.T, world.mu @ world.mu.T, atol=1e-5)


def test_warped_observation_is_not_linear():
    world = World(settings_for("tiny", identities=12, warp=1), 0)
    large, small = world.observe(world.mu), world.observe(0.01 * world.mu)  # a linear map keeps the direction
    assert np.einsum("nd,nd->n", large, small).min() < 0.999


# -- scores --------------------------------------------------------------------------------------------------


def test_quality_score_follows_the_norm_imperfectly(store):
    face = store.modalities["face"]
    norm = np.linalg.norm(face.feature[:].astype(np.float64), axis=1)
    assert 0.45 < np.corrcoef(face.columns["quality"], norm)[0, 1] < 0.85


def test_quality_score_follows_the_latent_quality_of_the_clip(store):
    face = store.modalities["face"]
    right = ~face.columns["wrong"]
    assert np.corrcoef(by_frame(store, "latent_quality")[right], face.columns["quality"][right])[0, 1] > 0.5


@pytest.fixture(scope="module")
def unreliable(tmp_path_factory):
    settings = settings_for("tiny", identities=30, reliability=0)
    return simulate(tmp_path_factory.mktemp("unreliable") / "store", settings, 0)


def test_unreliable_quality_score_says_nothing_of_the_latent_quality(unreliable):
    face = unreliable.modalities["face"]
    right = ~face.columns["wrong"]
    # a share of the score's noise belongs to the clip, so clips and not frames are independent
    correlation = np.corrcoef(by_frame(unreliable, "latent_quality")[right], face.columns["quality"][right])[0, 1]
    assert abs(correlation) < 4 / np.sqrt(len(unreliable))


def test_reliability_changes_the_scores_and_not_the_faces(store, unreliable):
    here, there = store.modalities["face"], unreliable.modalities["face"]
    assert not np.array_equal(here.columns["quality"], there.columns["quality"])
    assert np.array_equal(here.feature, there.feature)
    assert np.array_equal(here.columns["wrong"], there.columns["wrong"])


def test_poor_clips_are_harder_to_tell_than_good_ones(store):
    chosen = store.select(labelled=True, having="face")
    face = store.modalities["face"]
    mean = np.stack(
        [
            face.feature[s : s + n].astype(np.float64).mean(axis=0)
            for s, n in zip(face.start[chosen], face.count[chosen], strict=True)
        ]
    )
    mean /= np.linalg.norm(mean, axis=1, keepdims=True)
    identity = store.identity_of(chosen)
    same = (identity[:, None] == identity) & ~np.eye(len(chosen), dtype=bool)
    own = np.where(same, mean @ mean.T, 0).sum(axis=1) / np.maximum(same.sum(axis=1), 1)
    latent = store.clips["latent_quality"].to_numpy()[chosen]
    paired = same.any(axis=1)
    assert own[paired & (latent < -1)].mean() < own[paired & (latent > 1)].mean() - 0.1


# -- distributions -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("faces, survival", FRAME_SURVIVAL)
def test_frames_a_clip_survive_as_published(faces, survival):
    frames = draw_frames((np.arange(100_000) + 0.5) / 100_000)
    assert np.mean(frames >= faces) == pytest.approx(survival, abs=2e-5)


def test_no_clip_has_more_faces_than_the_published_end():
    assert draw_frames(np.array([0.0, 1e-9])).tolist() == [240, 240]


@pytest.mark.parametrize("knots", [NORM_KNOTS, QUALITY_KNOTS])
def test_quantile_passes_through_its_knots_and_stays_within_them(knots):
    probability, value = np.array(knots).T
    assert np.allclose(quantile(knots, stats.norm.ppf(probability)), value, atol=1e-9)
    assert quantile(knots, np.array([-50.0, 50.0])).tolist() == [value[0], value[-1]]


def test_noise_amplitude_is_one_at_the_median_and_falls_with_quality():
    amplitude = noise_amplitude(np.linspace(-3.4, 3.4, 200))
    assert noise_amplitude(np.zeros(1)) == pytest.approx(1)
    assert (np.diff(amplitude) < 0).all()


def test_pick_draws_columns_in_proportion_to_their_weight():
    weight = np.tile([1.0, 0.0, 3.0, 0.0], (20_000, 1))
    share = np.bincount(pick(weight, np.random.default_rng(0)), minlength=4) / 20_000
    assert share[[1, 3]].tolist() == [0, 0]
    assert share[0] == pytest.approx(0.25, abs=0.015)  # five standard errors


# -- settings ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, value",
    [
        ("identities", 1),
        ("contaminated", 1.5),
        ("mostly_wrong", -0.1),
        ("reliability", 2),
        ("lookalikes", -1),
        ("no_face", float("nan")),
    ],
)
def test_settings_out_of_range_are_refused_by_name_and_value(name, value):
    with pytest.raises(ValueError, match=f"{name} .*{value}"):
        Settings(**{name: value})


def test_more_identities_than_the_challenge_are_refused():
    with pytest.raises(ValueError, match="10034, got 10035"):
        World(Settings(identities=10_035), 0)


def test_profile_gives_its_number_of_identities_unless_overridden():
    assert settings_for("full").identities == 10_034
    assert settings_for("full", identities=7, no_face=0) == Settings(identities=7, no_face=0)


def test_unknown_profile_is_refused():
    with pytest.raises(ValueError, match="tiny, quick, full, got 'huge'"):
        settings_for("huge")


def test_unknown_setting_is_refused_by_name():
    with pytest.raises(ValueError, match="no setting named colour, smell"):
        settings_for("tiny", smell=1, colour=2)
