"""The training step. The only module that differentiates and updates weights."""

from types import SimpleNamespace
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from cddistill.net import Net


@flax.struct.dataclass
class TrainState:
    """All that training changes, and so all that a checkpoint holds."""

    step: jax.Array
    nets: dict[str, Net]
    ema: dict[str, Net]
    opt: dict[str, Any]


def init_state(nets, turns, optimizers, ema) -> TrainState:
    """State at step 0. EMA weights are copies: a donated buffer must not be held twice."""
    opt = {name: optimizers[name].init(pick(nets, turn.moves)) for name, turn in turns.items()}
    averages = {name: jax.tree.map(jnp.copy, nets[name]) for name in ema}
    return TrainState(jnp.zeros((), jnp.int32), nets, averages, opt)


def active(turns, step: int) -> tuple[str, ...]:
    """Names of the turns played at this step, and "<turn>/lazy" where it has that: the static argument of
    `train_step`."""
    played = {name: turn for name, turn in turns.items() if step >= turn.after and step % turn.every == 0}
    return (*played, *(f"{name}/lazy" for name, turn in played.items() if turn.lazy and step % turn.lazy == 0))


def train_step(state: TrainState, frozen, batch, play, *, turns, optimizers, ema, seed=0, accumulate=1, axis=None):
    """Play the named turns in order; later turns see the weights moved by earlier ones.

    Returns the next state and scalar metrics "<turn>/<name>". `axis` is the name of the pmap axis over which
    gradients and metrics are averaged; under jit it is None, because there a mean over the batch is already global.
    """
    key = jax.random.fold_in(jax.random.key(seed), state.step)
    nets, opt, metrics = dict(state.nets), dict(state.opt), {}

    for i, (name, turn) in enumerate(turns.items()):
        if name not in play:
            continue
        moving = pick(nets, turn.moves)
        value, logs, grads = gradients(
            turn.loss, moving, namespace(state, frozen, nets, play), batch, jax.random.fold_in(key, i), accumulate
        )
        if axis is not None:
            value, logs, grads = jax.lax.pmean((value, logs, grads), axis)
        updates, opt[name] = optimizers[name].update(grads, opt[name], moving)
        nets |= optax.apply_updates(moving, updates)
        logs |= {"loss": value, "grad_norm": optax.tree.norm(grads)}
        logs |= {"moved": optax.tree.norm(updates) / optax.tree.norm(moving)}  # share of the weights' own size
        metrics |= {f"{name}/{k}": v for k, v in logs.items()}

    averages = {n: optax.incremental_update(nets[n], state.ema[n], 1.0 - decay) for n, decay in ema.items()}
    return TrainState(state.step + 1, nets, averages, opt), metrics


def gradients(loss, moving, others, batch, key, accumulate):
    """(value, logs, gradients) of the mean loss over `accumulate` micro-batches, one in memory at a time."""

    def of_moving(moving, batch):
        return loss(SimpleNamespace(**(vars(others) | moving)), batch, key)

    def micro(batch):
        (value, logs), grads = jax.value_and_grad(of_moving, has_aux=True)(moving, batch)
        return value, logs, grads

    if accumulate == 1:
        return micro(batch)
    # Rows i, i + k, i + 2k, ... make micro-batch i, so that each device keeps rows of every one.
    micros = jax.tree.map(lambda x: x.reshape(-1, accumulate, *x.shape[1:]).swapaxes(0, 1), batch)
    zero = jax.tree.map(
        lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(micro, jax.tree.map(lambda x: x[0], micros))
    )
    total, _ = jax.lax.scan(lambda sums, b: (jax.tree.map(jnp.add, sums, micro(b)), None), zero, micros)
    return jax.tree.map(lambda x: x / accumulate, total)


def namespace(state, frozen, nets, play=()) -> SimpleNamespace:
    """n.teacher, n.student, n.student_ema, n.step ... for use inside losses."""
    return SimpleNamespace(
        step=state.step, play=play, **frozen, **nets, **{f"{name}_ema": net for name, net in state.ema.items()}
    )


def pick(nets, names):
    """The named entries of a dict."""
    return {name: nets[name] for name in names}
