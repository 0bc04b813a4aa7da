"""The report's table: images are generated and measured a part at a time, with the numbers of all at once."""

import dataclasses

import numpy as np
import pytest

from cddistill import config, data, generate
from cddistill.build import build
from cddistill.evals import compare, scores

pytestmark = pytest.mark.usefixtures("one_device")


@pytest.mark.parametrize("n", [1, 63, 64, 127, 128, 191, 192])
@pytest.mark.parametrize("at_once", [8, 64, 48, 256])
def test_parts_are_those_of_the_program_that_samples_and_the_last_is_no_smaller(n, at_once):
    parts = compare.cut(n, at_once)
    np.testing.assert_array_equal(np.concatenate(parts), np.arange(n))
    size = 48 if at_once == 48 else max(at_once, 64)
    assert all(len(x) == size for x in parts[:-1])
    assert len(parts[-1]) < 2 * size
    assert len(parts) == max(n // size, 1)


@pytest.fixture
def projected(monkeypatch):
    """A random matrix in place of the feature network, which takes seconds to compile."""
    project = np.random.default_rng(1).standard_normal((12 * 12 * 3, 70)).astype(np.float32)
    flat = lambda x: x.reshape(len(x), -1)
    monkeypatch.setattr(scores, "feature_extractor", lambda size: lambda x: flat(x) @ project[: flat(x).shape[1]])


@pytest.mark.usefixtures("projected")
def test_what_is_measured_in_parts_gives_the_table_of_all():
    real, a, b = np.random.default_rng(0).random((3, 200, 12, 12, 3), dtype=np.float32)
    for options in ({}, {"paired": False, "teacher": "b"}):
        whole = scores.evaluate({"a": a, "b": b}, real, nfe={"a": 2}, **options)
        found = [scores.measure({"a": a[i], "b": b[i]}, real[i], **options) for i in compare.cut(200, 8)]
        assert len(found) == 3
        rows = scores.table(scores.joined(found), {"a": 2})
        assert rows == whole
        assert [{k: x.tolist() for k, x in row.each.items()} for row in rows] == [
            {k: x.tolist() for k, x in row.each.items()} for row in whole
        ]
    bad = np.where(np.arange(64)[:, None, None, None] == 3, 2.0, a[:64])
    with pytest.raises(ValueError, match="image 67 is the first"):
        scores.measure({"a": bad}, real[:64], first=64)


@pytest.fixture(scope="module")
def built(teacher, one_device):
    """A student that inpaints 8 px emoji and the teacher beside it, not trained."""
    c = config.defaults("codi")
    c.update(teacher=str(teacher), batch_size=8, sample_steps=(1, 2), teacher_steps=(1,))
    c.data.update(size=8, task="inpaint")  # 192 test images
    parts = build(config.resolve(c), {"test": "it is scored"})
    return parts, parts.init()


@pytest.mark.usefixtures("projected")
def test_no_more_than_a_part_is_in_memory_and_the_rows_are_those_of_all_at_once(built, monkeypatch):
    parts, state = built
    expected, _ = compare.compare(parts, state, 21, {})  # at once
    seen, measure, examples = [], scores.measure, data.examples
    noted = lambda n, x: seen.append(n) or x
    monkeypatch.setattr(compare, "PART", 8)
    monkeypatch.setattr(
        scores, "measure", lambda sets, *a, **k: noted(len(sets["student, 1 step"]), measure(sets, *a, **k))
    )
    monkeypatch.setattr(data, "examples", lambda *a, numbers: noted(len(numbers), examples(*a, numbers=numbers)))
    timings = {}
    rows, figures = compare.compare(parts, state, 21, timings)
    assert seen == [8, 8, 13, 13]
    assert [row.name for row in rows] == ["grey hole", "teacher, 1 step", "student, 1 step", "student, 2 steps"]
    assert [dataclasses.replace(row, metrics={}) for row in rows] == [
        dataclasses.replace(row, metrics={}) for row in expected
    ]
    assert "PSNR in the hole" in rows[0].metrics
    for row, other in zip(rows, expected, strict=True):
        assert row.n == 21
        assert row.metrics.keys() == other.metrics.keys()
        for metric, value in other.metrics.items():
            np.testing.assert_allclose(row.metrics[metric] or 0, value or 0, rtol=1e-5, err_msg=metric)
    assert figures[0][0].startswith("The first 12 of 21 images")
    assert timings.keys() == {f"sampling: {name}, s" for name in (row.name for row in rows[1:])}


def test_noise_follows_the_number_of_an_image(built):
    """Also in a part that does not begin with the first."""
    parts, state = built
    generating = [("student", generate.student_of(parts, state), 1)]
    images = lambda numbers: compare.images_of(parts, generating, {}, np.array(numbers, np.int32), 16, {})[0]
    np.testing.assert_allclose(
        images(range(8, 16))["student, 1 step"], images(range(16))["student, 1 step"][8:], atol=1e-5
    )
