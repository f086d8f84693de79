import numpy as np
import pytest
from PIL import Image

from mmlib.data.crops import Crops, cut_crops, fit_picture, resample


def noise(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def pillow(picture, place, flip, size):
    """The crop by Pillow alone."""
    left, top = (np.array([picture.shape[1], picture.shape[0]]) - size) * place
    box = (left, top, left + size, top + size)
    pixels = np.asarray(Image.fromarray(picture).resize((size, size), Image.Resampling.BILINEAR, box))
    return pixels[:, ::-1] if flip else pixels


def cropped(pictures, place, flip, size):
    return resample(cut_crops(pictures, np.array(place, float), np.array(flip), size)).numpy()


# -- the picture ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((30, 20), (15, 10)),
        ((20, 30), (10, 15)),
        ((7, 7), (10, 10)),
        ((50, 20), (20, 10)),
        ((1, 1), (10, 10)),
        ((20_000, 1), (20, 10)),
        ((1, 20_000), (10, 20)),
    ],
)
def test_the_shorter_side_is_as_asked_and_the_longer_at_most_twice_that(shape, expected):
    pixels = fit_picture(Image.new("RGB", shape[::-1], (9, 8, 7)), 10)
    assert pixels.shape == (*expected, 3) and (pixels == (9, 8, 7)).all()


def test_a_picture_of_the_right_size_is_not_touched():
    picture = noise(10, 14)
    assert (fit_picture(Image.fromarray(picture), 10) == picture).all()


def test_of_a_very_long_picture_the_middle_is_taken():
    pixels = np.zeros((10, 50, 3), np.uint8)
    pixels[:, 15:35] = 200  # two squares, in the middle
    fitted = fit_picture(Image.fromarray(pixels), 10)
    assert fitted.shape == (10, 20, 3) and (fitted == 200).all()


# -- the crop ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "height", "width"), [(56, 64, 64), (224, 256, 455), (8, 9, 10), (1, 3, 3), (30, 30, 41)]
)
def test_crops_are_those_of_pillow_to_the_last_bit(size, height, width):
    rng = np.random.default_rng(size)
    pictures = [noise(height, width, seed) for seed in range(40)]
    place, flip = rng.random((40, 2)), rng.random(40) < 0.5
    place[:8] = [(x, y) for x in (0, 1) for y in (0, 1)] * 2  # the corners
    place[8:12] = np.nextafter(place[:4], 0.5)
    place[12:16] = 0.5
    expected = np.stack([pillow(*each, size) for each in zip(pictures, place, flip)])
    assert (cropped(pictures, place, flip, size) == expected).all()


def test_crops_of_tall_pictures_are_those_of_pillow_but_for_the_order_of_rounding():
    rng = np.random.default_rng(0)
    pictures, place, flip = [noise(90, 60, seed) for seed in range(20)], rng.random((20, 2)), np.zeros(20, bool)
    expected = np.stack([pillow(*each, 56) for each in zip(pictures, place, flip)]).astype(int)
    assert np.abs(cropped(pictures, place, flip, 56) - expected).max() <= 1  # Pillow 13 takes rows first here


def test_a_crop_at_whole_pixels_is_a_copy_and_nothing_more_is_sent():
    picture = noise(12, 20)
    crops = cut_crops([picture], np.array([[0.5, 0.25]]), np.array([False]), 8)  # from column 6 and row 1
    assert crops.window.shape == (1, 8, 8, 3)
    assert (resample(crops)[0].numpy() == picture[1:9, 6:14]).all()


def test_half_a_pixel_is_the_mean_of_two():
    picture = np.zeros((2, 3, 3), np.uint8)
    picture[:, :, 0] = [0, 100, 50]
    assert cropped([picture], [[0.5, 0]], [False], 2)[0, :, :, 0].tolist() == [[50, 75]] * 2


def test_a_flipped_crop_is_the_crop_mirrored():
    picture, place = noise(12, 20), [[0.3, 0.7]]
    assert (cropped([picture], place, [True], 8) == cropped([picture], place, [False], 8)[:, :, ::-1]).all()


def test_crops_do_not_depend_on_the_others_of_their_batch():
    pictures, place, flip = [noise(12, 20), noise(9, 8)], np.array([[0.3, 0.7], [0.0, 1.0]]), np.array([True, False])
    both = cropped(pictures, place, flip, 8)
    for row in (0, 1):
        assert (cropped(pictures[row : row + 1], place[row : row + 1], flip[row : row + 1], 8)[0] == both[row]).all()


def test_a_device_gives_the_same_crops(device):
    crops = cut_crops([noise(12, 20)], np.array([[0.3, 0.7]]), np.array([True]), 8)
    assert (resample(Crops(*(part.to(device) for part in crops))).cpu() == resample(crops)).all()
