"""From images and captions to what a teacher works on: latents, text embeddings and the latents of conditions.

Training on images calls this before every step, on the devices; --mode=encode calls it once and stores what it gives.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cddistill.config import Experiment
from cddistill.data import buckets
from cddistill.method import per_sample
from cddistill.models.families import Family
from cddistill.models.prompt import Prompts, embed, with_sizes
from cddistill.net import Autoencoder
from cddistill.pipeline import Pipeline

INPUTS = ("x0", "cond", "tokens", "index", "imageless", "time_ids")  # what encoding a batch takes of it
CACHED = 2**16  # captions whose token ids are kept
POSTERIOR = 2**32 - 1  # folded into the seed's key, where the number of no step is


@dataclasses.dataclass(frozen=True, eq=False)
class Encoders:
    """How images and captions are encoded. It is called with the networks, `networks(teacher)`; it holds none."""

    family: Family | None  # of the text encoders; None: there are none, and class labels stay
    tokenize: Callable[[str], tuple] | None  # a caption to its token ids, int32 [l] for each text encoder
    null: Mapping[str, Any]  # the text of the empty prompt, numpy [1, ...]; {} without text encoders
    condition: Callable | None = None  # Task.encode, for students that take their condition in latent space
    tokens: bool = False  # the text is token ids, for methods that train the text encoder
    sampled: bool = False  # draw latents from the VAE's posterior in training; or its mean
    seed: int = 0
    accumulate: int = 1  # parts of a batch that are encoded one after the other, as they are trained on

    def tokenized(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The batch with tokens, int32 [b, l] for each text encoder, in place of caption, a list of b str, if it has
        that."""
        rest = {name: x for name, x in batch.items() if name != "caption"}
        if self.tokenize is None or "caption" not in batch:
            return rest
        return rest | {"tokens": tuple(map(np.stack, zip(*map(self.tokenize, batch["caption"]), strict=True)))}

    def __call__(self, nets, batch, keys=None) -> dict[str, Any]:
        """What replaces the same names of a batch of pixels and tokens: x0, text, null, and cond_latent.

        x0 [b, h, w, c] are latents of images [b, f h, f w, 3] in [-1, 1]: the mean of the VAE's posterior or, with keys
        [b], samples from it; zeros where the batch says that there are no images. It is a pure function of the networks
        `nets`, to be jitted.
        """
        images, vae = batch["x0"], nets["autoencoder"]
        if "imageless" in batch:
            made = {"x0": jnp.zeros(jax.eval_shape(vae.encode, images).shape, jnp.float32)}
        else:
            made = {"x0": vae.encode(images, keys)}
        if self.condition is not None:
            made["cond_latent"] = self.condition(vae, batch["cond"])
        if self.family is None:
            return made
        null = sized(jax.tree.map(lambda x: jnp.broadcast_to(x, (len(images), *x.shape[1:])), self.null), batch)
        if self.tokens:
            return made | {"text": {"input_ids": batch["tokens"][0]}, "null": null}
        text = embed(self.family, tuple(nets[role] for role in roles(self.family)), batch["tokens"])
        return made | {"text": sized(text, batch), "null": null}

    def networks(self, frozen) -> dict[str, Any]:
        """Those of a run's frozen networks that it is called with."""
        return {role: frozen[role] for role in ("autoencoder", *roles(self.family))}

    def at_step(self, nets, batch, step) -> dict[str, Any]:
        """As by a call, for train step `step` from 0. A sample of the posterior depends on seed, step and index."""
        if self.sampled:
            key = jax.random.fold_in(jax.random.key(self.seed), np.uint32(POSTERIOR))
            batch = batch | {"keys": per_sample(jax.random.fold_in(key, step), batch["index"])}
        encode = lambda rows: self(nets, rows, rows.get("keys"))
        if self.accumulate == 1:
            return encode(batch)
        # Rows i, i + k, i + 2k ... are encoded together, so that each device holds rows of every part.
        parts = jax.tree.map(lambda x: x.reshape(-1, self.accumulate, *x.shape[1:]).swapaxes(0, 1), batch)
        return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), jax.lax.map(encode, parts))

    def encoded(self, batches: Iterable[dict], compile: Callable, frozen, start: int) -> Iterator[dict[str, Any]]:
        """Batches on the devices, of steps `start`, start + 1 ..., encoded there: see `sharding.Driver.by_row`."""
        program, nets = compile(self.at_step), self.networks(frozen)
        for step, batch in enumerate(batches, start):
            yield joined(batch, program(nets, inputs(batch), np.int32(step)))


def sized(text, batch) -> dict[str, Any]:
    """A text with the images' sizes, if it takes them (SDXL): each one's own if the batch has them, else the whole."""
    if "time_ids" in batch:
        return text | {"added_cond_kwargs": text["added_cond_kwargs"] | {"time_ids": batch["time_ids"]}}
    return with_sizes(text, target_size=batch["x0"].shape[1:3])


def roles(family: Family | None) -> tuple[str, ...]:
    """The names of a family's text encoders among a run's frozen networks."""
    return tuple(f"teacher_{name}" for name in family.text_encoders) if family else ()


def inputs(batch) -> dict[str, Any]:
    """What encoding a batch takes of it."""
    return {name: batch[name] for name in INPUTS if name in batch}


def joined(batch, made) -> dict[str, Any]:
    """The batch with what was made of it."""
    return {name: x for name, x in batch.items() if name not in ("tokens", "time_ids")} | made


def needed(experiment: Experiment, teacher: Pipeline) -> bool:
    """Whether the data are images and captions, and the teacher works on latents or text embeddings."""
    return not experiment.data.source.precomputed and (
        teacher.autoencoder.params is not None or teacher.prompts is not None
    )


def networks(teacher: Pipeline) -> dict[str, Any]:
    """The VAE and the text encoders, by the names that they have among a run's frozen networks."""
    nets, family = (teacher.prompts.nets, teacher.prompts.family) if teacher.prompts else ((), None)
    return {"autoencoder": teacher.autoencoder} | dict(zip(roles(family), nets, strict=True))


def make(experiment: Experiment, teacher: Pipeline) -> Encoders:
    """The encoders of a run. Raises ValueError for images of a size that the VAE cannot take, and for methods that
    train the text encoder of a teacher that has not exactly one."""
    run, config, requires = experiment.run, experiment.data, experiment.method.requires()
    vae, prompts = teacher.autoencoder, teacher.prompts
    if requires.text_encoder:
        _ = teacher.text_encoder  # raises if there is not exactly one
    condition = None
    if vae.params is not None:
        check_size(run.teacher, vae, config.size, "data.size")
        for side in sorted({side for shape in buckets.parse(config.buckets) for side in shape}):
            check_size(run.teacher, vae, side, "a side in data.buckets")
        if config.task.conditional:
            image = jax.ShapeDtypeStruct((1, config.size, config.size, 3), np.float32)
            z = jax.eval_shape(Autoencoder.encode, vae, image)
            condition = config.task.encode if teacher.takes_latent_condition(requires, z.shape[-1]) else None
    how = {"condition": condition, "tokens": requires.text_encoder, "sampled": run.encode_sample, "seed": run.seed}
    if prompts is None:
        check_takes_sizes(experiment, {})
        return Encoders(None, None, {}, **how, accumulate=run.accumulate)
    null = prompts.null(1, target_size=(config.size,) * 2)
    check_takes_sizes(experiment, null)
    null = {"input_ids": prompts.tokenize([""])[0]} if requires.text_encoder else jax.device_get(null)
    return Encoders(prompts.family, tokenizer_of(prompts), null, **how, accumulate=run.accumulate)


def tokenizer_of(prompts: Prompts) -> Callable[[str], tuple]:
    """A caption to its token ids, int32 [l] for each text encoder; those that repeat are cheap. It holds no weights."""
    shapes = dataclasses.replace(prompts, nets=jax.eval_shape(lambda nets: nets, prompts.nets))
    return functools.lru_cache(CACHED)(lambda caption: tuple(ids[0] for ids in shapes.tokenize([caption])))


@dataclasses.dataclass(frozen=True)
class Items:
    """A data set's items, encoded one by one, for programs that read few of them."""

    dataset: Any
    encode: Encoders
    nets: dict[str, Any]

    def __len__(self):
        return len(self.dataset)

    @functools.cached_property
    def program(self):
        return jax.jit(self.encode)

    def item(self, i, rng):
        """Item i, as encoded data would give it."""
        item = self.dataset.item(i, rng)
        tokens = self.encode.tokenized({"caption": [item["caption"]]})
        rows = {name: item[name][None] for name in ("x0", "cond", "time_ids") if name in item} | tokens
        return item | jax.tree.map(lambda x: x[0], jax.device_get(self.program(self.nets, rows)))


def check_takes_sizes(experiment: Experiment, null) -> None:
    """ValueError for data.size_conditions=own and a teacher whose null text has no sizes."""
    config = experiment.data
    if config.size_conditions == "own" and not config.source.precomputed and "added_cond_kwargs" not in null:
        raise ValueError(
            f"data.size_conditions=own is for teachers that take sizes of images, such as Stable Diffusion XL, and "
            f"{experiment.run.teacher} takes none: set it to full"
        )


def check_size(name: str, vae: Autoencoder, size: int, key: str) -> None:
    """ValueError for a number of pixels, of the config key `key`, that the VAE of the teacher `name` cannot reduce."""
    factor = vae.encoder.module.factor
    if size % factor:
        raise ValueError(
            f"{key}={size} is not divisible by {factor}, the factor by which the VAE of {name} reduces images: set "
            f"it to {size // factor * factor or factor} or {(size // factor + 1) * factor}"
        )
