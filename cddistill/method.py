"""The contract of a method: the nets it trains, its turns, what it requires of a run and what it exports.

A method is a frozen dataclass of hyper-parameters in one file of `cddistill/methods`, derived from `Generator` (it
trains a generator of images) or `Scored` (it trains anything else, such as a perceptual metric). The rest of the
package uses only the members below and no method by name.
"""

import abc
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key, PyTree, Shaped

from cddistill import health
from cddistill.diffusion import like

Index = Int[Array | np.ndarray, " b"]  # the samples' numbers in the global batch
Loss = Callable[[SimpleNamespace, dict[str, Any], jax.Array], tuple[jax.Array, dict[str, jax.Array]]]
StepNoise = Callable[[jax.Array], jax.Array]


class Turn(NamedTuple):
    """One line of an algorithm box: which nets are updated, by which loss, how often.

    loss(n, batch, key) -> (scalar, metrics). n has the nets by role (n.teacher, n.student, n.student_ema, ...), n.step,
    and n.play: the names of the turns of this step, static. Gradients are taken with respect to the nets in `moves`
    only.
    """

    moves: tuple[str, ...]
    loss: Loss
    every: int = 1  # train steps between two updates
    after: int = 0  # train steps before the first
    lazy: int = (
        0  # every `lazy` train steps n.play has "<turn>/lazy" too, for terms such as R1 that are evaluated rarely
    )


class Requires(NamedTuple):
    """What a method needs besides the nets that it trains; it is loaded and checked before the first step."""

    nets: Mapping[str, Callable[[], Any]] = {}  # functions that load further frozen nets, by role: n.<role>
    outlines: Mapping[str, Callable[[], Any]] = {}  # the same nets with shapes for weights, for a plan without files
    teacher: bool = True  # n.teacher, the denoiser of config.teacher
    images: bool = True  # real images in batch["x0"]; False: prompts are enough
    pairs: bool = False  # batch["pairs"], noise and the teacher's output for it, from data.pairs
    pairs_only: bool = False  # of a batch in training, losses take its pairs alone: rows of the data are not read
    text_encoder: bool = False  # n.teacher_text_encoder; batch["text"] then has token ids: {"input_ids"}
    text: bool = False  # a teacher that takes classes or text, for classifier-free guidance of its score
    condition: str = ""  # "pixels" or "latent": the space of batch["cond"] in the student; "": no condition
    classes: int = 0  # class labels 0 ... classes - 1 for every image; 0 = labels are not needed


@runtime_checkable
class Method(Protocol):
    """What every method has."""

    mutable_on_resume: ClassVar[tuple[str, ...]] = ()  # hyper-parameters that may change when a run is resumed
    paths: ClassVar[tuple[str, ...]] = ()  # hyper-parameters that are paths: what lies there must not change
    presets: ClassVar[Mapping[str, dict[str, Any]]] = {}  # config.method.preset=NAME: values of what is not set itself

    @abc.abstractmethod
    def init(self, key: jax.Array, frozen: dict[str, Any], batch: dict[str, Any]) -> dict[str, Any]:
        """The trained nets at step 0, usually copies of frozen["teacher"]. Only the shapes of batch may be used."""

    @abc.abstractmethod
    def turns(self) -> dict[str, Turn]:
        """The turns by name, in the order in which they are played; {} if nothing is trained."""

    def check_train_steps(self, steps: int) -> None:
        """Raise ValueError if a run cannot have so many train steps."""
        return

    def ema(self) -> dict[str, float | Callable]:
        """EMA decay of the nets that have an average, a number or a function of the step, int32 [] from 0.

        Losses see the average as n.<name>_ema.
        """
        return {}

    def requires(self) -> Requires:
        """What the run must load and check."""
        return Requires()

    def exports(self) -> dict[str, str]:
        """The trained net of each part of the exported pipeline: {"unet": "student"}."""
        return {}

    def health_rules(self) -> dict[str, health.Rule]:
        """The rules that detect a failing run from its metrics."""
        return health.frozen(*self.turns())


@runtime_checkable
class Generator(Method, Protocol):
    """A method that trains a generator of images."""

    @abc.abstractmethod
    def sample(
        self, n: SimpleNamespace, noise: jax.Array, batch: dict[str, Any], step_noise: StepNoise, steps: int
    ) -> jax.Array:
        """x0 [b, h, w, c] from unit noise and batch["text" | "null" | "cond" | "index"] in `steps` steps.

        step_noise(i) is unit noise of x0's shape, for samplers that add noise after step i; none is added after the
        last step.
        """

    @abc.abstractmethod
    def exports(self) -> dict[str, str]:
        """As in `Method`; a generator that is trained must export at least one net."""

    def sampling(self, schedule, steps: int):
        """`sample` as a `models.schedulers.Sampling`, which diffusers can reproduce; None if that is not possible.

        Raises ValueError if the student cannot be sampled in that many steps.
        """
        return

    def nfe(self, steps: int) -> int:
        """Network evaluations per image."""
        return steps


@runtime_checkable
class Scored(Method, Protocol):
    """A method that trains something other than a generator, such as a metric, and is evaluated by scores per image."""

    @abc.abstractmethod
    def scores(self, n: SimpleNamespace, batch: dict[str, Any], key: jax.Array) -> dict[str, jax.Array]:
        """Scores by name, one per image [b]."""

    def pictures(self, n: SimpleNamespace, batch: dict[str, Any]) -> dict[str, jax.Array]:
        """Images in [0, 1], [b, h, w, c] by the label of their row, for the preview and the report; {} for none."""
        return {}

    def export_file(self, n: SimpleNamespace, batch: dict[str, Any], path: Path) -> str:
        """Write the result to a file or folder and return a sentence that says what was verified.

        batch has training examples without augmentation, for statistics of the data.

        Raises ValueError if the method has no such file.
        """
        raise ValueError(f"--output={path}: this method has nothing to export")


def per_sample(key: Key[Array, ""], index: Index) -> Key[Array, " b"]:
    """One key per sample, from its number in the global batch, so that it is the same on any number of devices."""
    return jax.vmap(jax.random.fold_in, (None, 0))(key, index)


def normal(key: Key[Array, ""], index: Index, shape: tuple[int, ...]) -> Float[Array, "b ..."]:
    """Unit Gaussian noise [b, *shape] that depends on the sample's number, not on the device."""
    return jax.vmap(lambda k: jax.random.normal(k, shape))(per_sample(key, index))


def step_noise(key: Key[Array, ""], index: Index, shape: tuple[int, ...]) -> StepNoise:
    """i -> unit noise [b, *shape], as `normal` makes it, for samplers that add noise after step i."""
    return lambda i: normal(jax.random.fold_in(key, i), index, shape)


def uniform(key: Key[Array, ""], index: Index) -> Float[Array, " b"]:
    """Uniform numbers in [0, 1) that depend on the sample's number, not on the device."""
    return jax.vmap(jax.random.uniform)(per_sample(key, index))


def warmed_up(decay: float) -> Callable:
    """The EMA decay min(decay, (1 + step) / (10 + step)), TensorFlow's num_updates: random weights are soon forgotten.

    With a constant decay d they would still make up d^n of the average after n steps: 42 % at d = 0.9995, n = 1,729.
    """
    return lambda step: jnp.minimum(decay, (1.0 + step) / (10.0 + step))


def drop_text(key: Key[Array, ""], batch: dict[str, Any], rate: float) -> PyTree[Shaped[Array | np.ndarray, "..."]]:
    """batch["text"], replaced by batch["null"] with probability `rate` per sample, for classifier-free guidance."""
    dropped = uniform(key, batch["index"]) < rate
    return jax.tree.map(lambda null, text: jnp.where(like(dropped, text), null, text), batch["null"], batch["text"])
