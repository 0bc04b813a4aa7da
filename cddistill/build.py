"""From an experiment to its parts: the teacher's pipeline, frozen nets and the state at step 0, all checked."""

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from pathlib import PurePath
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from cddistill import checkpoint, checks, data, encoders, pipeline, sharding
from cddistill.config import Experiment
from cddistill.data.loader import without_captions
from cddistill.encoders import Encoders
from cddistill.method import Generator, Turn
from cddistill.optim import optimizer
from cddistill.pipeline import Pipeline
from cddistill.step import TrainState, init_state, train_step


class Parts(NamedTuple):
    """A run that is ready to start; frozen weights are loaded, and nothing else has been computed."""

    experiment: Experiment
    mesh: jax.sharding.Mesh
    rows: slice  # of the global batch, loaded by this host
    pipeline: Pipeline
    frozen: dict[str, Any]  # on the mesh
    abstract: TrainState  # shapes of the state, laid out on the mesh
    batch: dict[str, Any]  # shapes of the global batch, as losses see it
    encoders: Encoders | None  # of images and captions; None: the data are what the teacher works on

    def init(self) -> TrainState:
        """The state at step 0, every array made where it will live."""
        layout = jax.tree.map(lambda x: x.sharding, self.abstract)
        return jax.jit(functools.partial(initial, self.experiment, self.batch), out_shardings=layout)(self.frozen)

    def driver(self) -> sharding.Driver:
        """The train step, compiled for config.parallel."""
        run = self.experiment.run
        step = functools.partial(
            train_step,
            turns=self.experiment.method.turns(),
            optimizers=make_optimizers(self.experiment),
            ema=self.experiment.method.ema(),
            seed=run.seed,
            accumulate=run.accumulate,
        )
        return sharding.make_driver(run.parallel, step, self.mesh, self.abstract, run.reduce_dtype)

    def batches(self, driver: sharding.Driver, frozen: dict[str, Any], start: int = 0) -> Iterator[dict[str, Any]]:
        """The batches of steps `start`, start + 1 ... for driver.step, encoded by the driver's networks `frozen`."""
        run, pairs_only = self.experiment.run, self.experiment.method.requires().pairs_only
        encode = None if pairs_only else self.encoders
        order = lambda: data.order_digest(self.experiment.data, seed=run.seed)
        sharding.check_alike(order, "the number, names or order of the training images")
        own = {"pairs_only": pairs_only} | ({"prepare": encode.tokenized} if encode else {})
        stream = data.batches(
            self.experiment.data, batch_size=run.batch_size, seed=run.seed, start=start, rows=self.rows, **own
        )
        on_devices = map(driver.put_batch, stream)
        return encode.encoded(on_devices, driver.by_row, frozen, start) if encode else on_devices


def build(experiment: Experiment, splits: Mapping[str, str] | None = None, training: bool = True) -> Parts:
    """Load and check everything that a run needs; any bad input raises a ValueError here, before the first step.

    splits are those that will be read besides "train", and what for: see `checks.training_splits`. Without `training` a
    generator has no nets that only losses use, and of the training split only shapes count.
    """
    run, method, requires = experiment.run, experiment.method, experiment.method.requires()
    mesh = sharding.make_mesh(run.fsdp)
    rows = sharding.local_rows(run.batch_size, run.accumulate)
    teacher = pipeline.of_run(run, place=functools.partial(place, mesh))
    checks.check_exports(method)
    if training:
        method.check_train_steps(run.steps)
        checks.check_required_data(experiment, requires)
    checks.check_splits(experiment.data, splits or {})
    if requires.teacher and experiment.data.pairs:
        checks.check_pairs(experiment, teacher)
    frozen, encode = networks(experiment, teacher)
    if training or not isinstance(method, Generator):
        frozen |= {role: load() for role, load in requires.nets.items()}
    frozen = sharding.put(frozen, sharding.by_shape(mesh, frozen))
    batch = encoded_shapes(encode, frozen, loaded_shapes(experiment, encode, checks.first_rows(experiment.data)))
    if requires.teacher:
        checks.check_teacher(experiment, requires, frozen, batch)
        for shape, some in data.first_of_each(experiment.data).items() if training else ():
            in_bucket = loaded_shapes(experiment, encode, some)
            checks.check_bucket(shape, frozen, encoded_shapes(encode, frozen, in_bucket))
        checks.check_table(experiment, requires, teacher)
        checks.check_encoded(experiment, teacher)
        checks.check_exportable(experiment, teacher)
    abstract = abstract_state(experiment, mesh, batch, frozen)
    unloaded = dataclasses.replace(teacher)  # its networks are in `frozen`: what it holds would stay in memory, too
    return Parts(experiment, mesh, rows, unloaded, frozen, abstract, batch, encode)


def of_one_host(parts: Parts, state: TrainState) -> tuple[Parts, TrainState]:
    """A run's parts and weights, opt excepted, on this host's own devices; every host of the run must call this."""
    if jax.process_count() == 1:
        return parts, state
    mesh = sharding.make_mesh(-1 if parts.mesh.shape["fsdp"] > 1 else 1, jax.local_devices())

    def own(tree):
        tree = sharding.whole(parts.mesh, tree)
        return sharding.put(tree, sharding.by_shape(mesh, tree))

    state = state.replace(nets=own(state.nets), ema=own(state.ema), opt={})
    return parts._replace(mesh=mesh, frozen=own(parts.frozen)), state


def place(mesh, path, x):
    """A weight to the devices as soon as it is read, so that no host ever holds a whole network."""
    return sharding.put(x, sharding.by_shape(mesh, x))


def networks(experiment: Experiment, teacher: Pipeline) -> tuple[dict[str, Any], Encoders | None]:
    """(the teacher's networks that the run freezes, by role; how images and captions are encoded, if they are)."""
    requires, controlnet = experiment.method.requires(), experiment.run.controlnet
    frozen = {"teacher": teacher.denoiser} if requires.teacher else {}
    if requires.teacher and (controlnet or not experiment.method.turns()) and (branch := teacher.branch(controlnet)):
        frozen["controlnet"] = branch  # what is not trained is sampled with its own
    encode = encoders.make(experiment, teacher) if requires.teacher and encoders.needed(experiment, teacher) else None
    if encode is None:
        encoders.check_takes_sizes(experiment, {})
    frozen |= encoders.networks(teacher) if encode else {"autoencoder": teacher.autoencoder}
    if requires.text_encoder:
        frozen["teacher_text_encoder"] = teacher.text_encoder
    return frozen, encode


def abstract_state(experiment: Experiment, mesh, batch, frozen) -> TrainState:
    """Shapes of the state at step 0, laid out on the mesh; frozen nets may be shapes, too."""
    shapes = jax.eval_shape(functools.partial(initial, experiment, batch), frozen)
    return sharding.laid_out(shapes, sharding.by_shape(mesh, shapes))


def make_optimizers(experiment: Experiment):
    """One optax transformation per turn, its schedule as long as the turn's updates."""
    turns, steps = experiment.method.turns(), experiment.run.steps
    return {name: optimizer(experiment.optim[name], max(updates(turn, steps), 1)) for name, turn in turns.items()}


def updates(turn: Turn, steps: int) -> int:
    """How often a turn is played in the first `steps` train steps."""
    return -(-steps // turn.every) - -(-min(turn.after, steps) // turn.every)


def initial(experiment: Experiment, batch, frozen) -> TrainState:
    """State at step 0 as a pure function of the frozen nets, for batches of these shapes."""
    method = experiment.method
    nets = method.init(jax.random.key(experiment.run.seed), frozen, batch)
    return init_state(nets, method.turns(), make_optimizers(experiment), method.ema())


def in_frozen_dtype(parts: Parts) -> Parts:
    """The run with its frozen networks as config.frozen_dtype says, once what is trained has been initialised."""
    if (dtype := parts.experiment.run.frozen_dtype) == "float32":
        return parts
    layout = jax.tree.map(lambda x: x.sharding, parts.frozen)
    cast = jax.jit(functools.partial(in_dtype, dtype=dtype), out_shardings=layout)
    return parts._replace(frozen=cast(parts.frozen))


def in_dtype(tree, dtype: str):
    """Networks with their matrices, kernels and tables in another type. Vectors stay: they are few, and norms and
    biases are not rounded to the type that networks compute in, as kernels are."""
    return jax.tree.map(lambda x: x.astype(dtype) if x.ndim > 1 and x.dtype == jnp.float32 else x, tree)


def open_checkpoints(workdir: PurePath, experiment: Experiment, read_only: bool = False) -> checkpoint.Checkpoints:
    """The run's checkpoints; a generator's task may name the metric that marks the best one."""
    best = experiment.data.task.best_metric if isinstance(experiment.method, Generator) else None
    return checkpoint.Checkpoints(workdir / "checkpoints", experiment.run.keep, best, "max", read_only)


def loaded_shapes(experiment: Experiment, encode: Encoders | None, rows):
    """Shapes of the global batch as it is loaded, from some rows of the data with their captions."""
    size, rows = experiment.run.batch_size, encode.tokenized(rows) if encode else without_captions(rows)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct((size, *x.shape[1:]), x.dtype), rows)


def encoded_shapes(encode: Encoders | None, frozen, batch):
    """Shapes of the global batch as losses see it, from those of `loaded_shapes`."""
    if encode is None:
        return batch
    made = jax.eval_shape(encode.at_step, encode.networks(frozen), encoders.inputs(batch), 0)
    return encoders.joined(batch, made)
