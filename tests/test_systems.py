from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from mmlib.aggregate import CodedAttention
from mmlib.retrieve import make_model
from mmlib.systems import FACE_ONLY, ONE_NAME, ONE_NAME_AS_CODED, SYSTEMS, with_members

CODED = ONE_NAME_AS_CODED


@pytest.fixture(scope="module")
def official():
    """What a model asks of a store of the challenge's widths: face embeddings of 512, scene features of 2048 dimensions."""
    widths = {"face": 512, "scene": 2048}
    modalities = {name: SimpleNamespace(feature=np.zeros((0, dim))) for name, dim in widths.items()}
    return SimpleNamespace(modalities=modalities, identities=np.arange(5))


# -- as coded: the values of LegenDong/IQIYI_VID_FACE_2019 ------------------------------------------------------


def test_coded_members_are_the_eleven_of_sixteen_that_the_code_keeps():
    assert CODED.members == (0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 15)
    assert CODED.fallback.members == (1, 2, 3, 4, 6, 8, 10, 11, 12, 14, 15)


def test_coded_views_are_one_of_sixteen_blocks_and_one_of_thirty_two_for_scenes():
    assert (CODED.ensemble, CODED.regions, CODED.second().regions) == ("views", 16, 32)


def test_coded_frames_are_forty_drawn_ones():
    assert (CODED.training.frames, CODED.training.sample) == (40, "draw")


def test_coded_scores_are_appended_to_raw_frames_and_never_normalised():
    assert (CODED.aggregator, CODED.concat) == ("as coded", "frames")


def test_coded_loss_is_arcface_with_focal_on_the_batch_mean():
    training = CODED.training
    assert (training.scale, training.margin, training.gamma, training.focal) == (30.0, 0.5, 2.0, "batch")


def test_coded_optimiser_is_sgd_for_a_hundred_epochs():
    training = CODED.training
    assert (training.optimiser, training.lr, training.aggregator_lr) == ("sgd", 0.1, 0.1)
    assert (training.weight_decay, training.epochs, training.batch) == (1e-5, 100, 4096)


def test_coded_score_is_the_mean_softmax_of_raw_cosines():
    assert (CODED.combine, CODED.scale, CODED.head) == ("softmax", 1.0, "cosine")


def test_coded_fallback_is_that_of_the_last_day():
    fallback = CODED.fallback
    assert (fallback.by, fallback.threshold, fallback.context) == ("norm", 8.867, ("scene",))
    assert (fallback.absent, fallback.low, fallback.weight) == (0.95, 0.8, 0.0)


def test_coded_distractors_are_in_the_gallery_and_not_in_training():
    assert CODED.distractors == "all"


def test_coded_network_has_the_widths_of_the_code(official):
    model = make_model(CODED, official, 5)
    assert isinstance(model.aggregator, CodedAttention)
    assert (model.aggregator.frames, model.aggregator.out_dim) == (40, 480 + 2)
    scene = model.branches["scene"].layers
    assert (scene[0].in_features, scene[0].out_features, scene[4].out_features) == (1920, 480, 120)
    assert (model.dim, model.mlp.layers[0].out_features, model.mlp.layers[4].out_features) == (602, 964, 602)
    assert model.mlp.layers[3].p == scene[3].p == 0.5 and not model.gates


def test_coded_scene_model_sees_all_but_one_of_thirty_two_blocks(official):
    model = make_model(CODED.second(), official, 15)
    assert model.aggregator is None and list(model.branches) == ["scene"]
    assert model.branches["scene"].layers[0].in_features == 2048 - 64
    assert model.discard == (15, 32)


# -- as described: Dong et al., ACM MM 2019 -----------------------------------------------------------------


def test_described_system_attends_and_appends_scores_to_normalised_features():
    assert (ONE_NAME.aggregator, ONE_NAME.concat) == ("attention + scores", "normalised")


def test_described_loss_is_a_margin_with_focal_clip_by_clip():
    training = ONE_NAME.training
    assert training.margin > 0 and (training.gamma, training.focal) == (2.0, "clip")


def test_described_scene_is_reduced_to_128_dimensions(official):
    model = make_model(ONE_NAME, official)
    assert (model.branches["scene"].out_dim, ONE_NAME.fusion) == (128, "concat")


def test_described_ensemble_discards_every_region_once():
    assert ONE_NAME.ensemble == "views" and ONE_NAME.members == tuple(range(ONE_NAME.regions))


def test_described_fallback_mixes_the_lowest_percent_by_quality():
    fallback = ONE_NAME.fallback
    assert (fallback.by, fallback.share, fallback.threshold) == ("quality", 0.01, None)
    assert (fallback.absent, fallback.context) == (1.0, ("scene",)) and 0 < fallback.low < 1


def test_face_only_is_one_model_of_faces():
    assert (FACE_ONLY.modality, FACE_ONLY.context, FACE_ONLY.fallback) == ("face", (), None)
    assert len(FACE_ONLY.members) == 1


def test_names_of_systems_are_those_of_the_command_line():
    assert SYSTEMS == {"one-name": ONE_NAME, "one-name-as-coded": CODED, "face-only": FACE_ONLY}


# -- fewer members ---------------------------------------------------------------------------------------------


def test_fewer_members_are_the_first_of_both_models():
    fewer = with_members(CODED, 3)
    assert (fewer.members, fewer.fallback.members) == ((0, 1, 2), (1, 2, 3))


def test_fewer_members_leave_all_else_alone():
    fewer = with_members(CODED, 3)
    assert fewer.branch() == CODED.branch() and fewer.second().branch() == CODED.second().branch()
    assert replace(fewer, members=CODED.members, fallback=CODED.fallback) == CODED


def test_system_without_a_fallback_stays_without_one():
    assert with_members(FACE_ONLY, 1) == FACE_ONLY


def test_more_members_than_there_are_is_all_of_them():
    assert with_members(ONE_NAME, 99) == ONE_NAME
