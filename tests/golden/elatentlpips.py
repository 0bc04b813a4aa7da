"""What elatentlpips.json was recorded with: weights, images and draws by formula, so that it need hold results only.

Recorded on a CPU with PyTorch 2.13 and the package elatentlpips 0.2, float32, on random weights; its L1 term was on.
The lists are per sample; x_head and y_head are the first four pixels of T(a)[0, 5] and T(b)[20] in channels 0 and 3.
"""

import json
import zlib
from pathlib import Path

import numpy as np

from cddistill.perceptual import ensemble, latent_lpips

RECORDED = json.loads(Path(__file__).with_suffix(".json").read_text())
AUGMENTED = [name.removeprefix("aug_") for name in RECORDED if name.startswith("aug_")]


def shapes(family):
    """The published weights by name, as PyTorch lays them out."""
    return latent_lpips.torch_shapes(latent_lpips.FAMILIES[family], [stage[-1] for stage in latent_lpips.VGG])


def state_dict(family):
    """All 101 weights by their published names."""
    state = {}
    for name, shape in shapes(family).items():
        r = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)
        kind = name.split(".")[-1]
        if len(shape) == 4:
            r = 0.1 * np.abs(r) if name.startswith("lin") else r * np.sqrt(2 / np.prod(shape[1:]))
        elif kind == "running_var":
            r = 1 + 0.5 * r**2
        else:
            r = 1 + 0.1 * r if kind == "weight" else 0.1 * r
        state[name] = r.astype(np.float32)
        if kind == "running_var":
            state[name.replace(kind, "num_batches_tracked")] = np.zeros(1, np.float32)
    return state | {f"lins.{name[3:]}": x for name, x in state.items() if name.startswith("lin")}


def images(channels, size):
    """Two pairs a, b as [2, size, size, channels]."""
    r, s = (
        np.random.RandomState(seed).standard_normal((2, channels, size, size)).astype(np.float32) for seed in (0, 1)
    )
    return r.transpose(0, 2, 3, 1), (r + np.float32(0.5) * s).transpose(0, 2, 3, 1)


def draws(policy):
    """The parameters of T for both pairs. Behind most draws comes one that decides whether to use them: always."""
    rng, parts = np.random.RandomState(7), {}
    unit = lambda *shape: rng.random_sample(shape).astype(np.float32)
    around = lambda *shape: 2 * unit(*shape) - 1
    octaves = lambda: np.exp2(np.float32(0.2) * rng.standard_normal(2).astype(np.float32))

    def used(draw, *gate):
        unit(*gate or (2,))
        return draw

    if "b" in policy:
        flip, turns = used(np.floor(2 * unit(2))), used(np.floor(4 * unit(2)))
        parts["blit"] = ensemble.Blit(flip, turns, used(np.float32(0.125) * around(2, 2), 2, 1))
    if "g" in policy:
        scale, turn = used(octaves()), used(np.float32(np.pi) * around(2))
        stretch, tilt = used(octaves()), used(np.float32(np.pi) * around(2))
        offset = used(np.float32(0.125) * rng.standard_normal((2, 2)).astype(np.float32), 2, 1)
        parts["geometric"] = ensemble.Geometric(scale, turn, stretch, tilt, offset)
    if "c" in policy:
        parts["colour"] = ensemble.Colour(unit(2) - np.float32(0.5), unit(2) + np.float32(0.5), 2 * unit(2))
    if "o" in policy:
        unit(2)  # decides before the draw
        parts["cutout"] = ensemble.Cutout(unit(2, 2), np.full(2, 0.5, np.float32))
    return parts
