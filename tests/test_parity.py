"""The fixture `parity`: differences from PyTorch fail, and every comparison is in the table."""

import pathlib

import numpy as np
import pytest
from golden import make_clip, make_edm, make_models, make_modules, make_schedulers, make_vae
from parity import Parity, table


@pytest.fixture
def noted():
    return []


@pytest.fixture
def compare(noted):
    return Parity(lambda kind, note: noted.append(note))


def test_errors_are_relative_to_the_largest_value(compare, noted):
    theirs = np.array([200.0, 1.0])
    compare("net", "output", theirs + 1e-3, theirs)
    assert noted[0] == ("net", "output", pytest.approx(5e-6), 1e-5, 2)
    with pytest.raises(AssertionError, match="net: output differs from PyTorch by 2.0e-05"):
        compare("net", "output", theirs + 4e-3, theirs)
    compare("net", "output", theirs + 4e-3, theirs, limit=3e-5)
    for ours in (np.array([200.0, np.nan]), theirs[:1], theirs[None]):
        with pytest.raises(AssertionError):
            compare("net", "output", ours, theirs)


def test_the_gradient_of_every_weight_is_compared(compare, noted):
    grads = {"b": {"kernel": np.array([[3.0, 4.0]])}, "a": {"scale": np.array([1e-9])}}
    norms = np.array([0.0, 5.0])  # of a.weight and b.weight; the first is 0 up to rounding
    compare.weights("net", grads, norms)
    assert noted[0] == ("net", "weight gradients", pytest.approx(2e-7), 1e-3, 2)
    with pytest.raises(AssertionError, match="weight gradients"):
        compare.weights("net", grads, np.array([0.02, 5.0]))
    with pytest.raises(AssertionError):
        compare.weights("net", grads, norms[1:])


def test_parameter_counts_must_be_equal(compare):
    compare.size("net", {"a": np.zeros((2, 3)), "b": np.zeros(4)}, 10)
    with pytest.raises(AssertionError):
        compare.size("net", {"a": np.zeros((2, 3))}, 7)


def test_the_table_has_the_largest_error_and_counts_all_numbers():
    output = [("net", "output", 1e-6, 1e-5, 4), ("net", "output", 2.34e-6, 1e-5, 2)]
    rows = table([*output, ("a net", "trajectory", 1e-4, 3e-4, 1000)]).splitlines()
    assert rows[0] == "| | output | trajectory | numbers |"
    assert rows[2:] == ["| a net |  | 1.0e-04 (limit 3e-04) | 1,000 |", "| net | 2.3e-06 |  | 6 |"]


def test_the_page_has_a_row_for_everything_that_was_recorded():
    page = (pathlib.Path(__file__).parents[1] / "docs" / "parity.md").read_text()
    rows = {line.split("|")[1].strip() for line in page.splitlines() if line.startswith("| ")}
    unets = {f"UNet2DConditionModel, {name}" for name in make_models.UNETS}
    controlnets = {f"ControlNetModel, {name}" for name in make_models.CONTROLNETS}
    samplers = {*make_schedulers.CONFIGS, *make_schedulers.STUDENTS}
    assert not {*make_modules.MODULES, *unets, *controlnets, *samplers} - rows
    networks = {*make_vae.CONFIGS, *make_clip.ENCODERS, *make_edm.CONFIGS}
    assert not networks - {row.rpartition(", ")[2] for row in rows}
