"""What a method is: the nets it trains, the turns it plays, and what they are for in the end: to draw or to compare."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from cddistill.diffusion import like

Loss = Callable[[SimpleNamespace, dict[str, Any], jax.Array], tuple[jax.Array, dict[str, jax.Array]]]


class Turn(NamedTuple):
    """One line of an algorithm box: which nets move, down which loss, how often.

    loss(n, batch, key) -> (scalar, metrics), with n.teacher, n.student, n.student_ema ... the nets by role, n.step, and
    n.play, the names of the turns of this step, which is static. Gradients reach the nets named in `moves` and nothing
    else, by construction.
    """

    moves: tuple[str, ...]
    loss: Loss
    every: int = 1  # train steps between two plays
    after: int = 0  # train steps before the first
    lazy: int = 0  # every so many train steps n.play also has "<turn>/lazy", for what its loss does only now and then


@runtime_checkable
class Method(Protocol):
    """What every method has. With what a Generator or a Metric adds, it is the whole interface between a method's file
    and the rest of the package."""

    def init(self, key: jax.Array, frozen: dict[str, Any], batch: dict[str, Any]) -> dict[str, Any]:
        """The trained nets at step 0, usually copies of frozen["teacher"]; batch shows shapes only."""

    def turns(self) -> dict[str, Turn]:
        """The algorithm box, in order of play."""

    def ema(self) -> dict[str, float]:
        """Nets that have an average, seen by losses as n.<name>_ema, and their decay per step."""


@runtime_checkable
class Generator(Method, Protocol):
    """A method whose student draws images."""

    def sample(
        self, n: SimpleNamespace, noise: jax.Array, batch: dict[str, Any], key: jax.Array, steps: int
    ) -> jax.Array:
        """Generate x0 [b, h, w, c] from unit noise and batch["text" | "null" | "cond" | "index"] in `steps` steps."""

    def sampling(self, schedule, steps: int):
        """`sample` as a `models.schedulers.Sampling`, which diffusers can follow too; None if none describes it."""

    def nfe(self, steps: int) -> int:
        """Network evaluations that `sample` spends on one image."""


@runtime_checkable
class Metric(Method, Protocol):
    """A method whose outcome compares images: it draws none, and needs no teacher."""

    def scores(self, n: SimpleNamespace, batch: dict[str, Any], key: jax.Array) -> dict[str, jax.Array]:
        """What to evaluate it by: names and numbers, one per image [b]."""

    def metric(self, n: SimpleNamespace) -> Any:
        """What --mode=export writes: LatentLPIPS as a net."""


def per_sample(key: jax.Array, index: jax.Array) -> jax.Array:
    """One key per sample, made from its number in the global batch: the same on any number of devices and hosts."""
    return jax.vmap(jax.random.fold_in, (None, 0))(key, index)


def normal(key: jax.Array, index: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Unit Gaussian noise [b, *shape] that follows the sample, not the device."""
    return jax.vmap(lambda k: jax.random.normal(k, shape))(per_sample(key, index))


def fresh(key: jax.Array, index: jax.Array, shape: tuple[int, ...]) -> Callable[[jax.Array], jax.Array]:
    """Step number -> unit noise [b, *shape] of its own, that follows the sample: what samplers add between steps."""
    return lambda i: normal(jax.random.fold_in(key, i), index, shape)


def uniform(key: jax.Array, index: jax.Array) -> jax.Array:
    """Uniform numbers in [0, 1), shape [b], that follow the sample."""
    return jax.vmap(jax.random.uniform)(per_sample(key, index))


def check_choices(method, choices: dict[str, tuple[str, ...]]) -> None:
    """Raises ValueError for an option of a method that is none of its choices."""
    for name, allowed in choices.items():
        if getattr(method, name) not in allowed:
            raise ValueError(f"method.{name} {getattr(method, name)!r} is not one of {', '.join(allowed)}")


def drop_text(key: jax.Array, batch: dict[str, Any], rate: float) -> Any:
    """batch["text"] with the null text in its place for a share of the samples, for classifier-free guidance."""
    dropped = uniform(key, batch["index"]) < rate
    return jax.tree.map(lambda null, text: jnp.where(like(dropped, text), null, text), batch["null"], batch["text"])
