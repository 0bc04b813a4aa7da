"""Canny to image: edges, random settings, a person's image or edges, F1."""

import numpy as np
import pytest
from PIL import Image

from cddistill import data
from cddistill.data.tasks.canny import Canny, f1


def disc(size=48, radius=14):
    y, x = np.mgrid[:size, :size] - size / 2 + 0.5
    return np.repeat(np.float32(np.hypot(x, y) < radius)[..., None], 3, -1)


def test_edges_lie_on_the_outline():
    found = Canny().central_edges(disc())
    y, x = np.nonzero(found)
    assert found.sum() > 60
    np.testing.assert_allclose(np.hypot(x - 23.5, y - 23.5), 14, atol=1.5)


def test_a_condition_is_black_and_white_and_random():
    element = {"target": (data.examples(data.configure(), "test", 1)["x0"][0] + 1) / 2}
    conds = [Canny().condition(element, np.random.default_rng(i)) for i in range(6)]
    assert conds[0].shape == (32, 32, 3)
    assert conds[0].dtype == np.float32
    assert {*np.unique(conds)} == {0, 1}
    assert len({c.tobytes() for c in conds}) > 1


def test_an_edge_image_is_taken_as_it_is_and_others_are_converted(tmp_path):
    edges = np.uint8(Canny().central_edges(disc())) * 255
    Image.fromarray(edges).save(tmp_path / "edges.png")
    np.testing.assert_array_equal(Canny().read(tmp_path / "edges.png", 48)[..., 0], edges / 255)
    Image.fromarray(np.uint8(disc() * 200)).save(tmp_path / "photo.png")
    np.testing.assert_array_equal(Canny().read(tmp_path / "photo.png", 48)[..., 0], edges / 255)


def test_f1_of_hand_drawn_edges():
    line, moved, far = (np.zeros((16, 16), bool) for _ in range(3))
    line[4], moved[5], far[9] = True, True, True
    assert f1(line, line) == 1
    assert f1(moved, line) == 1  # within the tolerance
    assert f1(far, line) == 0
    assert f1(line | far, line) == pytest.approx(2 * 0.5 / 1.5)  # precision 1/2, recall 1
    assert f1(line & far, line & far) == 1  # neither has any
    assert f1(line & far, line) == 0


def test_the_measure_falls_with_other_images():
    truth = np.stack([disc(radius=r) for r in (8, 11, 14)])
    same, shifted = (Canny().measures(x, truth, truth)["Edge F1"] for x in (truth, np.roll(truth, 6, 2)))
    assert (same == 1).all()
    assert (shifted < 0.7).all()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"canny_sigma": (2.0, 1.0)}, r"data.canny_sigma=\(2.0, 1.0\) must be a range"),
        ({"canny_low": (0.1,)}, "data.canny_low must be 2 values, not 1"),
        ({"canny_low": (0.1, 0.3)}, r"data.canny_low \(0.1, 0.3\) must not exceed data.canny_high"),
    ],
)
def test_bad_ranges_are_refused(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        data.configure(task="canny", **options)
