"""Optimisers: AdamW from config, one per turn; its moments in float32 or in fewer bits."""

import dataclasses
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from cddistill import rounding
from cddistill.typed import Count, Decay, Natural, NonNegative, Positive


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """AdamW with gradient clipping; `config.optim.<turn>.<field>` overrides a field for one turn."""

    lr: NonNegative = 1e-4  # learning rate, after the warm-up
    betas: tuple[Decay, Decay] = (0.9, 0.999)  # decay of the averages of the gradient and of its square
    eps: Positive = 1e-8  # added to the root of the latter
    weight_decay: NonNegative = 0.0  # decoupled, times lr; libraries disagree on the default (optax 1e-4, PyTorch 1e-2)
    clip: NonNegative = 1.0  # largest global gradient norm; 0 = no clipping
    warmup: Natural = 0  # updates of linear warm-up from 0; a turn that is played every 5th step counts only its own
    decay: Literal["constant", "cosine", "linear"] = "constant"  # else to 0 over the updates after the warm-up
    cycles: Count = 1  # equal parts of the training, each with its own warm-up and decay
    state_dtype: rounding.Stored = "float32"  # of both averages between updates, which are 8 bytes a weight; "bfloat16"
    # makes them 4, "int8" 2; rounded at random, and other numbers than in float32


def optimizer(config: OptimConfig, updates: int) -> optax.GradientTransformation:
    """AdamW with its learning-rate schedule over `updates` updates, after clipping by the global norm."""
    cycle = -(-updates // config.cycles)
    after = max(cycle - config.warmup, 1)
    schedules = {
        "constant": optax.constant_schedule(config.lr),
        "cosine": optax.cosine_decay_schedule(config.lr, after),
        "linear": optax.linear_schedule(config.lr, 0.0, after),
    }
    lr = schedules[config.decay]
    if config.warmup:
        lr = optax.join_schedules([optax.linear_schedule(0.0, config.lr, config.warmup), lr], [config.warmup])
    adam = optax.adamw(
        lr if config.cycles == 1 else lambda update: lr(update % cycle),
        *config.betas,
        eps=config.eps,
        weight_decay=config.weight_decay,
    )
    if config.state_dtype != "float32":
        adam = stored_in(adam, config.state_dtype)
    return optax.chain(optax.clip_by_global_norm(config.clip), adam) if config.clip else adam


class StoredState(NamedTuple):
    """The state of an optimiser whose large arrays are stored in fewer bits."""

    count: Any  # int32 [], updates done
    inner: Any  # the optimiser's own state


def stored_in(optimizer: optax.GradientTransformation, dtype: rounding.Stored) -> optax.GradientTransformation:
    """An optimiser whose state starts from zeros, is float32 in an update, and in another type between two.

    What is rounded, see `rounding.store`, depends on the number of the update only, so a resumed run repeats it.
    """

    def store(state, count):
        leaves, tree = jax.tree.flatten(state)
        keys = jax.random.split(jax.random.fold_in(jax.random.key(0), count), len(leaves))
        rounded = [rounding.store(x, dtype, key) for x, key in zip(leaves, keys, strict=True)]
        return StoredState(count, jax.tree.unflatten(tree, rounded))

    def init(params):
        # Zeros, as Adam starts from: the compiler would round whole kernels of them, for minutes.
        shapes = jax.eval_shape(lambda: store(optimizer.init(params), jnp.zeros((), jnp.int32)))
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

    def update(updates, state, params=None):
        inner = jax.tree.map(rounding.load, state.inner, is_leaf=lambda x: isinstance(x, rounding.Coded))
        updates, inner = optimizer.update(updates, inner, params)
        return updates, store(inner, state.count + 1)

    return optax.GradientTransformation(init, update)
