"""Where an image is cut: against torchvision's own."""

import numpy as np
import pytest
from PIL import Image
from torchvision import transforms

from biper.data.crops import Centre, RandomArea, Whole, cut


def image(width, height):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8))


@pytest.mark.parametrize("size", [(500, 375), (375, 500), (256, 256), (257, 300), (90, 1000), (100, 60), (333, 334)])
@pytest.mark.parametrize(("side", "shorter"), [(224, 256), (64, 73)])
def test_the_centre_is_torchvisions(size, side, shorter):
    picture = image(*size)
    expected = transforms.Compose([transforms.Resize(shorter), transforms.CenterCrop(side)])(picture)
    window = Centre(side, shorter).window(*size, np.random.default_rng(0))
    assert np.array_equal(cut(picture, window), np.asarray(expected))


@pytest.mark.parametrize("size", [(64, 64), (100, 60)])
def test_the_whole_is_torchvisions_resize(size):
    picture = image(*size)
    window = Whole(64).window(*size, np.random.default_rng(0))
    assert np.array_equal(cut(picture, window), np.asarray(transforms.Resize((64, 64))(picture)))


@pytest.mark.parametrize("size", [(500, 375), (100, 300), (60, 600)])
def test_random_areas_have_the_distribution_of_torchvision(size):
    """Means and spreads of the region's area, shape and place; n = 4,000, so 6 % is more than 4 standard errors."""
    view, random, count = RandomArea(224), np.random.default_rng(0), 4000
    ours = np.array([view.window(*size, random).region for _ in range(count)], float)
    crop = transforms.RandomResizedCrop.get_params
    picture = image(*size)
    theirs = np.array([crop(picture, view.area, view.shape) for _ in range(count)], float)[:, [1, 0, 3, 2]]
    for left, top, width, height in (ours.T, theirs.T):
        assert (left >= 0).all()
        assert (top >= 0).all()
        assert (left + width <= size[0]).all()
        assert (top + height <= size[1]).all()
    scale = np.array([size[0], size[1], size[0], size[1]])
    assert ours.mean(0) / scale == pytest.approx(theirs.mean(0) / scale, abs=0.02)
    assert ours.std(0) / scale == pytest.approx(theirs.std(0) / scale, abs=0.02)
    areas = [np.sort(x[:, 2] * x[:, 3]) / (size[0] * size[1]) for x in (ours, theirs)]
    assert np.abs(areas[0] - areas[1]).mean() < 0.02  # the distance between the distributions


def test_a_region_is_cut_and_resized_as_torchvision_does():
    picture = image(80, 60)
    window = RandomArea(32).window(80, 60, np.random.default_rng(3))
    left, top, width, height = window.region
    expected = transforms.functional.resized_crop(picture, top, left, height, width, [32, 32])
    assert np.array_equal(cut(picture, window), np.asarray(expected))
