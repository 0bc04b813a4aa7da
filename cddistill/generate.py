"""From trained nets to images: the only place that samples, decodes, and runs over more rows than fit at once."""

import functools
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cddistill import data, encoders, progress, sharding
from cddistill.build import Parts
from cddistill.data import tiles
from cddistill.data.contracts import Task
from cddistill.method import Method, normal, step_noise
from cddistill.methods import UNTRAINED
from cddistill.net import Autoencoder
from cddistill.pipeline import Pipeline
from cddistill.step import namespace

PREVIEWED = 8  # examples whose samples are looked at during training
INPUTS = ("x0", "text", "null", "cond", "cond_latent")  # what a student may take of an example


class Student(NamedTuple):
    """All that generates: a method, the nets that it calls, and the devices they are on."""

    method: Method
    mesh: jax.sharding.Mesh
    frozen: dict[str, Any]
    nets: dict[str, Any]
    ema: dict[str, Any]

    def n(self):
        """The nets by role, as losses see them."""
        return namespace(SimpleNamespace(step=0, ema=self.ema), self.frozen, self.nets)


def student_of(parts: Parts, state) -> Student:
    """The student of a run."""
    return Student(parts.experiment.method, parts.mesh, parts.frozen, state.nets, state.ema)


def teacher_as_student(run, student: Student) -> Student:
    """The frozen teacher in the student's place, sampled as config.teacher_sampler and teacher_guidance say."""
    method = UNTRAINED(guidance=run.teacher_guidance, sampler=run.teacher_sampler)
    return student._replace(method=method, nets={}, ema={})


def baseline_as_student(student: Student, unet, controlnet, timesteps=()) -> Student:
    """Networks that were fine-tuned without distillation in the student's place, sampled by DDIM.

    timesteps, if any, are used where as many steps are asked for; else they are even.
    """
    frozen = student.frozen | {"teacher": unet, "controlnet": controlnet}
    return student._replace(method=UNTRAINED(timesteps=timesteps), frozen=frozen, nets={}, ema={})


# ---- noise


def noises(seed: int, index, shape: tuple[int, ...], count: int) -> jax.Array:
    """[b, count, h, w, c]: the initial noise of rows `index` [b] and the noise that is added after each step.

    What `sample` uses for this seed, for exported programs, which take all noise as an input.
    """
    first, after = seeded(seed, jnp.asarray(index), shape)
    return jnp.stack([first, *(after(i) for i in range(count - 1))], 1)


def seeded(seed, index, shape):
    """(initial noise [b, *shape], step_noise) of rows `index`, functions of the seed and the row alone."""
    key = jax.random.key(seed)
    return normal(key, index, shape), step_noise(jax.random.fold_in(key, 1), index, shape)


def noise_count(student: Student, batch, steps: int) -> int:
    """How many noise arrays a sampler uses: 1, or `steps` if it adds noise between steps."""
    calls = []
    noise = batch["x0"]

    def after(i):
        calls.append(i)
        return jnp.zeros(noise.shape)

    jax.eval_shape(lambda n, noise, b: student.method.sample(SimpleNamespace(**n), noise, b, after, steps),
                   vars(student.n()), noise, batch)  # fmt: skip
    return steps if calls else 1


# ---- programs


def images(student: Student, batch, noise, after, steps: int, decode: bool = True) -> jax.Array:
    """Images [b, h, w, c] in [0, 1], or x0, from noise: a pure function, for tracing."""
    n = student.n()
    x0 = student.method.sample(n, noise, batch, after, steps)
    return n.autoencoder.images(x0) if decode else x0


def sample(
    student: Student,
    batch,
    steps: int,
    seed: int = 0,
    decode: bool = True,
    task: Task | None = None,
    what: str = "sampling",
) -> np.ndarray:
    """Images [n, h, w, c] in [0, 1], or x0 with decode=False.

    batch has INPUTS (of x0 only the shape counts) and "index": noise follows batch["index"] and the seed. The task, if
    given, finishes the images of a batch with conditions. `what` names the work in its progress, which "" hides.
    """
    autoencoder = student.frozen["autoencoder"]
    apart = decode and decodes_apart(autoencoder)
    program, nets = sampling_program(student.method, student.mesh, decode and not apart), student[2:]
    call = lambda rows: program(nets, rows, steps, seed)
    found = map_batched(student.mesh, call, batch, at_a_time(student.mesh), what)
    found = decoded(autoencoder, found, what and "decoding") if apart else found
    return task.finish(found, batch["cond"]) if task and "cond" in batch else found


def decodes_apart(autoencoder: Autoencoder) -> bool:
    """Whether samples are decoded in a program of its own, a few or a tile at a time."""
    return autoencoder.params is not None and bool(autoencoder.rows or autoencoder.tile)


def at_a_time(mesh) -> int:
    """How many images are sampled at a time, at most, by one program. A CPU's rate hardly depends on it."""
    n = PREVIEWED * mesh.size if mesh.devices.flat[0].platform == "cpu" else 64
    return -(-n // mesh.size) * mesh.size


def sample_from(
    student: Student, pipeline: Pipeline, task: Task, batch, conditions, size: int, steps: int, seed: int = 0
) -> list[np.ndarray]:
    """An image [h, w, 3] in [0, 1] for each of the conditions [h, w, c]; those larger than the network's `size` px are
    generated in tiles, which are blended.

    batch has INPUTS without a condition, one row for each; a tile has the row of its condition, and noise of its own.
    """
    cut = [tiles.cut(condition, size) for condition in conditions]
    counts = [len(x) for x in cut]
    batch = jax.tree.map(lambda x: np.repeat(x, counts, 0), batch)
    batch |= {"cond": np.concatenate(cut), "index": np.arange(sum(counts), dtype=np.int32)}
    found = sample(student, with_latent_condition(student, pipeline, task, batch), steps, seed, task=task)
    parts = np.split(found, np.cumsum(counts)[:-1])
    return [tiles.join(x, condition.shape[:2]) for x, condition in zip(parts, conditions, strict=True)]


@functools.lru_cache(maxsize=16)
def sampling_program(method: Method, mesh, decode: bool):
    """The compiled part of `sample`, one program for each number of steps and shape."""

    @functools.partial(jax.jit, static_argnums=2, out_shardings=sharding.replicated(mesh))
    @functools.partial(sharding.inside, mesh)
    def program(nets, batch, steps, seed):
        noise, after = seeded(seed, batch["index"], batch["x0"].shape[1:])
        return images(Student(method, mesh, *nets), batch, noise, after, steps, decode)

    return program


def score(student: Student, batch, seed: int = 0, chunk: int = 64) -> dict[str, np.ndarray]:
    """{name: [n] numbers, one per image} of a method that is `Scored`."""
    program, nets = scoring_program(student.method, student.mesh), student[2:]
    return map_batched(student.mesh, lambda rows: program(nets, rows, seed), batch, chunk, "scoring")


@functools.lru_cache(maxsize=4)
def scoring_program(method: Method, mesh):
    """The compiled part of `score`."""

    @functools.partial(jax.jit, out_shardings=sharding.replicated(mesh))
    @functools.partial(sharding.inside, mesh)
    def program(nets, batch, seed):
        return method.scores(Student(method, mesh, *nets).n(), batch, jax.random.key(seed))

    return program


def pictures(student: Student, batch) -> dict[str, np.ndarray]:
    """{label: images [n, h, w, c] in [0, 1]} of a method that is `Scored`; {} if it shows none."""
    program, nets = pictures_program(student.method, student.mesh), student[2:]
    return map_batched(student.mesh, lambda rows: program(nets, rows), batch, len(batch["index"]))


@functools.lru_cache(maxsize=4)
def pictures_program(method: Method, mesh):
    """The compiled part of `pictures`."""

    @functools.partial(jax.jit, out_shardings=sharding.replicated(mesh))
    @functools.partial(sharding.inside, mesh)
    def program(nets, batch):
        return method.pictures(Student(method, mesh, *nets).n(), batch)

    return program


def decoded(autoencoder: Autoencoder, x0, what: str = "") -> np.ndarray:
    """Images [n, h, w, c] in [0, 1] of pixels or latents x0; a few at a time, as decoding takes memory.

    Latents larger than autoencoder.tile are decoded in tiles, which are blended.
    """
    chunk = len(x0) if autoencoder.params is None else autoencoder.rows or 8
    size = min(autoencoder.tile, *x0.shape[1:3])
    if autoencoder.params is not None and 0 < size < max(x0.shape[1:3]):
        cut = np.stack([tiles.cut(np.asarray(x), size) for x in x0])
        flat = decoded(autoencoder, cut.reshape(-1, *cut.shape[2:]), what)
        unit, images = flat.shape[1] // size, flat.reshape(*cut.shape[:2], *flat.shape[1:])
        return np.stack([tiles.join(x, (x0.shape[1] * unit, x0.shape[2] * unit), unit) for x in images])
    starts = progress.each(what, range(0, len(x0), chunk), sharding.is_host0())
    return np.concatenate([to_images(autoencoder, x0[i : i + chunk]) for i in starts])


to_images = jax.jit(Autoencoder.images)


# ---- batches


def batch_of(parts: Parts, examples) -> dict[str, Any]:
    """`data.examples` as the run's student takes them."""
    return conditioned(parts, encoded(parts, examples))


def examples_of(parts: Parts, split: str, numbers: np.ndarray) -> dict[str, Any]:
    """`data.examples` of these numbers, as `batch_of` takes them. Each of several hosts decodes its share of them."""
    found = data.examples(parts.experiment.data, split, numbers=numbers[sharding.share(len(numbers))])
    if jax.process_count() == 1:
        return found
    tokenized = parts.encoders.tokenized(found) if parts.encoders else found
    return sharding.gathered({name: x for name, x in tokenized.items() if name != "caption"}, len(numbers))


def conditioned(parts: Parts, batch) -> dict[str, Any]:
    """A batch with what the run's student takes of its conditions."""
    student = Student(parts.experiment.method, parts.mesh, parts.frozen, {}, {})
    return with_latent_condition(student, parts.pipeline, parts.experiment.data.task, batch)


def encoded(parts: Parts, examples, chunk: int = 8) -> dict[str, Any]:
    """The numeric part of `data.examples`; images and captions encoded, latents as the mean of the posterior."""
    if parts.encoders is None:
        return arrays(examples)
    rows = parts.encoders.tokenized(examples)
    given = encoders.inputs(rows | arrays(rows))
    program, nets = encoding_program(parts.encoders, parts.mesh), parts.encoders.networks(parts.frozen)
    return encoders.joined(arrays(rows), map_batched(parts.mesh, functools.partial(program, nets), given, chunk))


@functools.lru_cache(maxsize=2)
def encoding_program(encode: encoders.Encoders, mesh):
    """The compiled part of `encoded`."""
    return jax.jit(sharding.inside(mesh, encode), out_shardings=sharding.replicated(mesh))


def targets(parts: Parts, examples) -> np.ndarray:
    """The images of `data.examples`, [n, h, w, c] in [0, 1]: their own pixels or, if they are latents, decoded."""
    return decoded(Autoencoder() if parts.encoders else parts.frozen["autoencoder"], examples["x0"])


def reconstruction(parts: Parts, batch) -> np.ndarray | None:
    """Targets of a batch as the VAE encodes and decodes them, [n, h, w, c] in [0, 1]; None where nothing is encoded."""
    autoencoder = parts.frozen["autoencoder"]
    return None if parts.encoders is None or autoencoder.params is None else decoded(autoencoder, batch["x0"])


def arrays(examples) -> dict[str, Any]:
    """The numeric part of `data.examples`, with the row numbers that noise follows."""
    kept = {name: examples[name] for name in INPUTS if name in examples}
    return kept | {"index": np.arange(len(examples["x0"]), dtype=np.int32)}


def example(parts: Parts) -> dict[str, Any]:
    """One validation example, for shapes and null texts."""
    return encoded(parts, data.examples(parts.experiment.data, "validation", 1))


def with_latent_condition(student: Student, pipeline: Pipeline, task: Task, batch):
    """The batch with cond_latent, where the student takes its condition in latent space and the batch has pixels."""
    autoencoder = student.frozen["autoencoder"]
    if "cond" not in batch or "cond_latent" in batch or autoencoder.params is None:
        return batch
    if not pipeline.takes_latent_condition(student.method.requires(), batch["x0"].shape[-1]):
        return batch
    encode = jax.jit(task.encode)
    latents = [encode(autoencoder, batch["cond"][i : i + 8]) for i in range(0, len(batch["cond"]), 8)]
    return batch | {"cond_latent": np.concatenate(latents)}


def map_batched(mesh, f, batch, chunk: int, what: str = ""):
    """f of all rows of a batch, numpy, at most `chunk` at a time; padded, so that one program serves any number.

    `what` names the work in its progress, which "" hides.
    """
    total = len(batch["index"])
    chunk = -(-min(chunk, total) // mesh.size) * mesh.size
    made = []
    for start in progress.each(what, range(0, total, chunk), sharding.is_host0()):
        part = jax.tree.map(lambda x, start=start: pad(x[start : start + chunk], chunk), batch)
        rows = sharding.put(part, jax.tree.map(lambda _: sharding.by_row(mesh), part))
        made.append(jax.tree.map(np.asarray, f(rows)))
    return jax.tree.map(lambda *parts: np.concatenate(parts)[:total], *made)


def pad(x, n):
    """Repeat the last row up to n rows."""
    return np.concatenate([x, np.repeat(x[-1:], n - len(x), 0)]) if len(x) < n else x
