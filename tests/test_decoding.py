"""Decoding in parts: a few latents at a time, and large ones in tiles."""

import dataclasses

import jax
import numpy as np
import pytest

from cddistill import config, generate, pipeline, sharding
from cddistill.data import tiles
from cddistill.evals import published
from cddistill.method import Generator
from cddistill.net import Autoencoder

SHAPES = []


def double(params, z):
    """A decoder that doubles height and width, and notes the shape that it is traced for."""
    SHAPES.append(z.shape)
    return params * z.repeat(2, 1).repeat(2, 2)


@dataclasses.dataclass(frozen=True)
class Noise(Generator):
    """A method whose x0 is the noise."""

    def init(self, key, frozen, batch):
        return {}

    def turns(self):
        return {}

    def exports(self):
        return {}

    def sample(self, n, noise, batch, step_noise, steps):
        return noise


def whole(z):
    return np.clip(np.asarray(z).repeat(2, 1).repeat(2, 2) / 2 + 0.5, 0.0, 1.0)


@pytest.mark.parametrize(("rows", "tile", "largest"), [(0, 0, (5, 9, 14)), (2, 0, (2, 9, 14)), (3, 8, (3, 8, 8))])
def test_samples_decoded_in_parts_are_the_same(rows, tile, largest):
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    vae = Autoencoder(np.float32(1.0), decoder=double, rows=rows, tile=tile)
    student = generate.Student(Noise(), mesh, {"autoencoder": vae}, {}, {})
    batch = {"x0": np.zeros((5, 9, 14, 3), "f"), "index": np.arange(5, dtype="i")}
    SHAPES.clear()
    found = generate.sample(student, batch, 1)
    assert max(shape[:3] for shape in SHAPES) == largest
    assert found.shape == (5, 18, 28, 3)
    # a decoder that sees one pixel at a time does not know of tiles, but for the sum of weights where they overlap
    np.testing.assert_allclose(found, whole(generate.sample(student, batch, 1, decode=False)), atol=1e-6)
    SHAPES.clear()
    np.testing.assert_allclose(published.sampled(student, batch, 1, 0), found, atol=1e-6)  # of published evaluations
    assert max((shape[:3] for shape in SHAPES), default=largest) == largest  # or it was traced before


def test_tiles_of_an_image_lie_where_those_of_its_latent_do():
    for length in range(16, 70):
        assert tiles.starts(8 * length, 8 * 16, 8) == [8 * x for x in tiles.starts(length, 16)]


def test_config_sets_how_a_teachers_vae_decodes_and_what_remat_keeps():
    run = config.Run(teacher="pocket", decode_batch=2, decode_tile=8, remat=True, remat_policy="offload_dots")
    teacher = pipeline.of_run(run)
    assert (teacher.autoencoder.rows, teacher.autoencoder.tile) == (2, 8)
    assert teacher.autoencoder.decoder.module.remat == "offload_dots"
    plain = pipeline.of_run(config.Run(teacher="pocket")).autoencoder
    assert (plain.rows, plain.tile, plain.decoder.module.remat) == (0, 0, False)


def test_a_policy_without_remat_is_refused():
    with pytest.raises(
        ValueError, match="remat_policy='dots_saveable' says what remat keeps: set remat=True, or leave"
    ):
        pipeline.of_run(config.Run(remat_policy="dots_saveable"))
