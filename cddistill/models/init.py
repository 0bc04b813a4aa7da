"""Shapes of a network's weights, and random weights as PyTorch's layers initialise them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np


def weight_shapes(module):
    """The parameter tree of a module as jax.ShapeDtypeStruct; nothing is computed or allocated."""
    return jax.tree.map(lambda shape: shape, traced(module))  # a tree of the caller's own


@functools.lru_cache(64)
def traced(module):
    """`weight_shapes`, traced once for equal modules: seconds for a large network."""

    def init():
        args, kwargs = module.example()  # in here, so that nothing is allocated
        return module.init(jax.random.key(0), *args, **kwargs)

    return jax.eval_shape(init)["params"]


def init_params(shapes, uniform, normal):
    """Weights for a tree of shapes, by PyTorch's defaults: U(+-1/sqrt(fan_in)) for kernels and their biases.

    uniform(shape, bound) and normal(shape) generate random arrays and are called in a fixed order. Norms start as the
    identity, embedding tables as N(0, 1).
    """
    if "kernel" in shapes:
        bound = 1.0 / np.sqrt(np.prod(shapes["kernel"].shape[:-1]))  # the bound of kaiming_uniform(a=sqrt(5))
        return {name: uniform(leaf.shape, bound) for name, leaf in sorted(shapes.items())}
    if "scale" in shapes:
        return {"scale": jnp.ones(shapes["scale"].shape), "bias": jnp.zeros(shapes["bias"].shape)}
    if "embedding" in shapes:
        return {"embedding": normal(shapes["embedding"].shape)}
    if "freqs" in shapes:  # NCSN++'s Fourier features
        return {"freqs": 16.0 * normal(shapes["freqs"].shape)}
    return {name: init_params(sub, uniform, normal) for name, sub in sorted(shapes.items())}


def init_params_jax(shapes, key):
    """`init_params` with JAX's generator, for use inside jit."""
    keys = iter(jax.random.split(key, len(jax.tree.leaves(shapes))))
    return init_params(
        shapes,
        lambda shape, bound: jax.random.uniform(next(keys), shape, jnp.float32, -bound, bound),
        lambda shape: jax.random.normal(next(keys), shape),
    )


def init_params_numpy(shapes, seed: int):
    """`init_params` with numpy's generator: a UNet in a second, since nothing is compiled per shape."""
    rng = np.random.default_rng(seed)
    return init_params(
        shapes,
        lambda shape, bound: jnp.asarray(rng.uniform(-bound, bound, shape), jnp.float32),
        lambda shape: jnp.asarray(rng.standard_normal(shape), jnp.float32),
    )
