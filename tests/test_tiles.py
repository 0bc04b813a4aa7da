"""Large inputs in overlapping tiles: the pieces, their blending, and what inputs may be."""

import numpy as np
import pytest
from PIL import Image

from cddistill.data import TASKS, tiles
from cddistill.data.tasks.sr import upsample

SIZES = [(16, 16), (17, 16), (28, 29), (40, 16), (51, 77), (100, 33)]


@pytest.mark.parametrize("shape", SIZES)
def test_tiles_cover_an_image_and_joining_them_gives_it_back(shape):
    image = np.random.default_rng(0).random((*shape, 3), np.float32)
    cut = tiles.cut(image, 16)
    assert cut.shape[1:] == (16, 16, 3)
    np.testing.assert_allclose(tiles.join(cut, shape), image, atol=1e-6)  # also says that weights sum to one
    if shape == (16, 16):
        np.testing.assert_array_equal(tiles.join(cut, shape), image)


@pytest.mark.parametrize("length", [17, 20, 28, 29, 40, 100])
def test_neighbours_overlap_by_a_quarter_or_more_and_as_few_as_that_needs(length):
    at = tiles.starts(length, 16)
    steps = np.diff(at)
    assert (at[0], at[-1]) == (0, length - 16)
    assert 0 < steps.min() <= steps.max() <= 12
    assert 16 + 12 * (len(at) - 2) < length


def test_one_tile_passes_into_the_next_linearly():
    """The left tile is 0 and the right one 1: a ramp over the 4 px in which they overlap."""
    cut = np.stack([np.full((16, 16, 1), k, np.float32) for k in (0, 1)])
    row = tiles.join(cut, (16, 28))[5, :, 0]
    np.testing.assert_allclose(row, [0] * 12 + [0.125, 0.375, 0.625, 0.875] + [1] * 12, atol=1e-6)


SR = TASKS["sr"](scale=4)


def picture(path, width, height):
    """Random pixels [height, width, 3], written to a file."""
    pixels = np.random.default_rng(width).integers(0, 256, (height, width, 3), np.uint8)
    Image.fromarray(pixels).save(path)
    return pixels


def test_super_resolution_reads_inputs_at_their_own_size(tmp_path):
    pixels = picture(tmp_path / "a.png", 21, 12)
    np.testing.assert_array_equal(SR.read_whole(tmp_path / "a.png", 32), upsample(pixels, (48, 84)))


def test_what_cannot_be_tiled_is_refused(tmp_path):
    picture(tmp_path / "a.png", 7, 20)
    with pytest.raises(ValueError, match="a.png is 7 x 20 px, and a tile 8 x 8: sample it without tiles"):
        SR.read_whole(tmp_path / "a.png", 32)
    with pytest.raises(ValueError, match="the image is 7 x 20 px, and a tile 8 x 8"):
        SR.read_whole(Image.open(tmp_path / "a.png"), 32)
    with pytest.raises(ValueError, match="inputs of this task cannot be cut into tiles: sample .*a.png without"):
        TASKS["canny"]().read_whole(tmp_path / "a.png", 32)
