"""Shapes of a network's weights without computing them, and weights drawn the way PyTorch's layers draw theirs."""

import jax
import jax.numpy as jnp
import numpy as np


def weight_shapes(module):
    """The parameter tree of a network as shapes; nothing is computed or allocated."""
    args, kwargs = module.example()
    return jax.eval_shape(lambda: module.init(jax.random.key(0), *args, **kwargs))["params"]


def draw(shapes, uniform, normal):
    """Weights for a tree of shapes as PyTorch's layers start: U(+-1/sqrt(fan_in)) for kernels and their biases.

    uniform(shape, bound) and normal(shape) are the sources of randomness, called in a fixed order. Norms start as the
    identity, embedding tables as N(0, 1).
    """
    if "kernel" in shapes:
        bound = 1.0 / np.sqrt(np.prod(shapes["kernel"].shape[:-1]))  # kaiming_uniform(a=sqrt(5)) is this bound
        return {name: uniform(leaf.shape, bound) for name, leaf in sorted(shapes.items())}
    if "scale" in shapes:
        return {"scale": jnp.ones(shapes["scale"].shape), "bias": jnp.zeros(shapes["bias"].shape)}
    if "embedding" in shapes:
        return {"embedding": normal(shapes["embedding"].shape)}
    if "freqs" in shapes:  # of NCSN++'s Fourier features
        return {"freqs": 16.0 * normal(shapes["freqs"].shape)}
    return {name: draw(sub, uniform, normal) for name, sub in sorted(shapes.items())}


def draw_jax(shapes, key):
    """`draw` with JAX's generator, for what starts inside a jitted program."""
    keys = iter(jax.random.split(key, len(jax.tree.leaves(shapes))))
    return draw(
        shapes,
        lambda shape, bound: jax.random.uniform(next(keys), shape, jnp.float32, -bound, bound),
        lambda shape: jax.random.normal(next(keys), shape),
    )


def draw_numpy(shapes, seed: int):
    """`draw` with numpy's generator: a UNet in a second, where one small program per shape would be compiled."""
    rng = np.random.default_rng(seed)
    return draw(
        shapes,
        lambda shape, bound: jnp.asarray(rng.uniform(-bound, bound, shape), jnp.float32),
        lambda shape: jnp.asarray(rng.standard_normal(shape), jnp.float32),
    )
