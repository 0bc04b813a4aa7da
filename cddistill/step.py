"""The training step: the only module that computes gradients and updates weights."""

from types import SimpleNamespace
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax


@flax.struct.dataclass
class TrainState:
    """Everything that training changes, which is what a checkpoint holds.

    Trees of this shape also hold ShapeDtypeStructs, shardings or orbax's arguments, hence Any.
    """

    step: Any  # int32 [], train steps done
    nets: Any  # {role: Net} that is trained
    ema: Any  # {role: Net}, moving averages of some of them
    opt: Any  # {turn: optimiser state}


def init_state(nets, turns, optimizers, ema) -> TrainState:
    """The state at step 0. EMA weights are copies, because a buffer that is donated must not occur twice."""
    opt = {name: optimizers[name].init(select(nets, turn.moves)) for name, turn in turns.items()}
    averages = {name: jax.tree.map(jnp.copy, nets[name]) for name in ema}
    return TrainState(jnp.zeros((), jnp.int32), nets, averages, opt)


def active(turns, step: int) -> tuple[str, ...]:
    """Names of the turns played at this step, and "<turn>/lazy" for those whose lazy terms are due.

    This is the static argument `play` of `train_step`.
    """
    played = {name: turn for name, turn in turns.items() if step >= turn.after and step % turn.every == 0}
    return (*played, *(f"{name}/lazy" for name, turn in played.items() if turn.lazy and step % turn.lazy == 0))


def train_step(state: TrainState, frozen, batch, play, *, turns, optimizers, ema, seed=0, accumulate=1, axis=None):
    """One train step: play the turns named in `play` in order; later turns see the weights updated by earlier ones.

    play is static: one program is compiled for each set of turns. turns, optimizers (one per turn) and ema (see
    `Method.ema`) come from the method and the config. Random keys depend only on seed, step and turn, so a resumed run
    repeats them. accumulate is the number of micro-batches whose gradients are averaged for one update. axis is the
    name of the pmap axis over which gradients and metrics are averaged; under jit it is None, because a mean over the
    batch is already global there.

    Returns the next state and scalar metrics "<turn>/<name>": those of the loss, and loss, grad_norm and moved.
    """
    key = jax.random.fold_in(jax.random.key(seed), state.step)
    nets = dict(state.nets)
    opt = dict(state.opt)
    metrics = {}

    for i, (name, turn) in enumerate(turns.items()):
        if name not in play:
            continue
        moving = select(nets, turn.moves)
        value, logs, grads = gradients(
            turn.loss, moving, namespace(state, frozen, nets, play), batch, jax.random.fold_in(key, i), accumulate
        )
        if axis is not None:
            value, logs, grads = jax.lax.pmean((value, logs, grads), axis)
        updates, opt[name] = optimizers[name].update(grads, opt[name], moving)
        nets |= optax.apply_updates(moving, updates)
        logs |= {"loss": value, "grad_norm": optax.tree.norm(grads)}
        logs |= {"moved": optax.tree.norm(updates) / optax.tree.norm(moving)}  # |update| / |weights|
        metrics |= {f"{name}/{k}": v for k, v in logs.items()}

    decays = {n: decay(state.step) if callable(decay) else decay for n, decay in ema.items()}
    averages = {n: optax.incremental_update(nets[n], state.ema[n], 1.0 - decay) for n, decay in decays.items()}
    return TrainState(state.step + 1, nets, averages, opt), metrics


def gradients(loss, moving, others, batch, key, accumulate):
    """(value, logs, gradients) of the mean loss over `accumulate` micro-batches; one is in memory at a time.

    Gradients are with respect to `moving` (nets by role) only; `others` is the namespace of all nets.
    """

    def of_moving(moving, batch):
        return loss(SimpleNamespace(**(vars(others) | moving)), batch, key)

    def micro(batch):
        (value, logs), grads = jax.value_and_grad(of_moving, has_aux=True)(moving, batch)
        return value, logs, grads

    if accumulate == 1:
        return micro(batch)
    # Micro-batch i has rows i, i + k, i + 2k, ..., so that each device holds rows of every micro-batch.
    micros = jax.tree.map(lambda x: x.reshape(-1, accumulate, *x.shape[1:]).swapaxes(0, 1), batch)
    zero = jax.tree.map(
        lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(micro, jax.tree.map(lambda x: x[0], micros))
    )
    total, _ = jax.lax.scan(lambda sums, b: (jax.tree.map(jnp.add, sums, micro(b)), None), zero, micros)
    return jax.tree.map(lambda x: x / accumulate, total)


def namespace(state, frozen, nets, play=()) -> SimpleNamespace:
    """n, the first argument of losses: nets by role (n.teacher, n.student, n.student_ema, ...), n.step and n.play."""
    return SimpleNamespace(
        step=state.step, play=play, **frozen, **nets, **{f"{name}_ema": net for name, net in state.ema.items()}
    )


def select(nets, names):
    """The nets with these names, as a dict."""
    return {name: nets[name] for name in names}
