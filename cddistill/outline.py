"""A run without its weights and its data: the shapes of all that it holds, from config.json files alone.

Nothing is read but configs, and nothing is allocated; its programs can be traced and compiled, for `plan`.
"""

import dataclasses
import functools
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cddistill import build, checks, models, pipeline, sharding
from cddistill.build import Parts
from cddistill.config import Experiment
from cddistill.data import crops, loader
from cddistill.method import Requires
from cddistill.models.prompt import embed, with_sizes
from cddistill.pipeline import Pipeline

ARCHITECTURES = Path(models.__file__).parent / "architectures"


class Outline(NamedTuple):
    """A run of shapes."""

    parts: Parts  # jax.ShapeDtypeStruct for every array, laid out on the mesh
    loaded: dict[str, Any]  # shapes of the global batch as it is loaded; parts.batch is what losses see


def outline(experiment: Experiment, mesh) -> Outline:
    """The run on the devices of this mesh, with a ("data", "fsdp") axis each.

    The data need not be there: they are taken to be what the config describes, encoded as --mode=encode does it. Raises
    ValueError as `build.build` where that needs no data, and for a teacher whose architecture is not known.
    """
    run, method = experiment.run, experiment.method
    if run.parallel != "jit":
        raise ValueError(f"parallel={run.parallel!r} cannot be planned: plan with parallel='jit', which needs no more")
    check_rows(run, mesh)
    experiment = experiment._replace(run=dataclasses.replace(run, teacher=architecture(run.teacher)))
    teacher = dataclasses.replace(pipeline.of_run(experiment.run), shapes=True)
    requires = method.requires()
    checks.check_exports(method)
    method.check_train_steps(run.steps)
    frozen, encode = build.networks(experiment, teacher)
    frozen |= {role: requires.outlines.get(role) or functools.partial(jax.eval_shape, load)
               for role, load in requires.nets.items()}  # fmt: skip
    frozen = {role: net() if role in requires.nets else net for role, net in frozen.items()}
    frozen = sharding.laid_out(frozen, sharding.by_shape(mesh, frozen))
    loaded = build.loaded_shapes(experiment, encode, rows(experiment, teacher, requires))
    batch = build.encoded_shapes(encode, frozen, loaded)
    if requires.teacher and not requires.text_encoder:
        checks.check_shapes(frozen["teacher"], batch)
    state = build.abstract_state(experiment, mesh, batch, frozen)
    frozen = sharding.laid_out(
        jax.eval_shape(functools.partial(build.in_dtype, dtype=run.frozen_dtype), frozen),
        jax.tree.map(lambda x: x.sharding, frozen),
    )
    by_row = lambda tree: sharding.laid_out(tree, jax.tree.map(lambda _: sharding.by_row(mesh), tree))
    parts = Parts(experiment, mesh, slice(None), teacher, frozen, state, by_row(batch), encode)
    return Outline(parts, by_row(loaded))


def check_rows(run, mesh) -> None:
    """ValueError for a batch that the devices and micro-batches do not divide; as `sharding.local_rows`."""
    if run.batch_size % (parts := mesh.size * run.accumulate):
        raise ValueError(
            f"batch_size {run.batch_size} is not divisible by {mesh.size} devices x {run.accumulate} micro-batches; "
            f"use {max(run.batch_size // parts, 1) * parts}"
        )


def architecture(teacher: str) -> str:
    """The name or folder that has a teacher's configs: its own or, if it is not on this machine, one that ships here.

    Raises ValueError naming those that do.
    """
    known = {path.name: path for path in sorted(ARCHITECTURES.iterdir()) if path.is_dir()}
    last = Path(teacher).name
    if Path(teacher).expanduser().exists() or (models.folders.ASSETS / teacher).is_dir():
        return teacher
    if last not in known:
        raise ValueError(
            f"the teacher {teacher!r} is not on this machine, and its architecture is not among those that ship with "
            f"cddistill ({', '.join(known)}): set config.teacher to a folder with its config.json files, weights are "
            "not needed"
        )
    return str(known[last])


# ---- data


@dataclasses.dataclass(frozen=True)
class Blank:
    """A source whose every image is black, with all that tasks may ask of one."""

    size: int
    num_labels = 0

    def __len__(self):
        return 2

    def element(self, i, rng) -> dict[str, Any]:
        image = np.zeros((self.size, self.size, 3), np.uint8)
        depth = np.linspace(1.0, 2.0, self.size**2, dtype=np.float32).reshape(self.size, self.size)
        images = {"image": image, "edited": image, "mask": image[..., 0], "depth": depth}
        place = crops.placed((self.size, self.size), self.size)
        return images | {"label": 0, "caption": "", "instruction": "", "place": place}


def rows(experiment: Experiment, teacher: Pipeline, requires: Requires):
    """Two rows of zeros as the loader gives them; of precomputed data, as --mode=encode writes them."""
    config = experiment.data
    item = pixels(config, config.size)
    if config.source.precomputed:
        item = precomputed(config, teacher, requires)
    item = {name: x for name, x in item.items() if name in loader.KEPT}
    pairs = {name: item[name] for name in ("x0", "text", "null", "cond") if name in item} | {"noise": item["x0"]}
    made = loader.stack([item, item]) | {"index": np.arange(2, dtype=np.int32)}
    return made | ({"pairs": loader.stack([pairs] * 2), "others": loader.stack([pairs] * 2)} if config.pairs else {})


def pixels(config, size: int) -> dict[str, Any]:
    """One item of images of this size, through the run's own task."""
    pixels = loader.Pixels(Blank(size), config, augment=True, sized=config.size_conditions == "own")
    return pixels.item(0, np.random.default_rng(0))


def precomputed(config, teacher: Pipeline, requires: Requires) -> dict[str, Any]:
    """One item in the teacher's space: x0, its text and the null text and, where the task has one, the condition."""
    zeros = lambda tree: jax.tree.map(lambda x: np.zeros(x.shape[1:], x.dtype), tree)
    shape = getattr(config.source, "x0_shape", ()) or teacher.x0_shape
    vae = teacher.autoencoder
    size = shape[0] * (1 if vae.params is None else vae.encoder.module.factor)
    item = pixels(config, size) | {"x0": np.zeros(shape, np.float32)}
    if "cond" in item and vae.params is not None and teacher.takes_latent_condition(requires, shape[-1]):
        cond = jax.ShapeDtypeStruct((1, *item["cond"].shape), jnp.float32)
        item["cond_latent"] = zeros(jax.eval_shape(config.task.encode, vae, cond))
    if prompts := teacher.prompts:
        ids = prompts.tokenize([""])
        text = {"input_ids": ids[0]}
        if not requires.text_encoder:
            text = with_sizes(jax.eval_shape(functools.partial(embed, prompts.family), prompts.nets, ids))
        item |= {"text": zeros(text), "null": zeros(text)}
    return item
