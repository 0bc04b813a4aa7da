"""What a run needs of its data and its teacher, checked before the first step: each fault is a ValueError of one
sentence."""

import dataclasses
import functools
import logging
import tempfile
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np

from cddistill import data, io
from cddistill.config import Experiment
from cddistill.data import buckets, ode_pairs
from cddistill.data.loader import stack
from cddistill.diffusion import DDPM
from cddistill.method import Generator, Requires
from cddistill.models import adapter
from cddistill.models.fingerprint import of_network
from cddistill.models.prompt import embed_ids
from cddistill.net import Adapted
from cddistill.pipeline import Pipeline


@functools.cache
def first_rows(data_config):
    """Two rows as they are loaded, with their captions: they show the shapes of a batch; see `data.shown`."""
    square = dataclasses.replace(data_config, buckets="")
    return next(data.batches(square, data.shown(data_config), batch_size=2, seed=0, prepare=dict))


def first_texts(data_config, n: int = 64) -> dict:
    """The text of the first n training rows, stacked."""
    dataset = data.load(data_config, "train", augment=False)
    return stack([dataset.item(i, np.random.default_rng([0, i]))["text"] for i in range(min(n, len(dataset)))])


def check_exports(method) -> None:
    """ValueError if a generator that trains exports nothing, or a net that it does not train."""
    trained = {net for turn in method.turns().values() for net in turn.moves}
    exported = {*method.exports().values()}
    if unknown := exported - trained:
        raise ValueError(f"{type(method).__name__}.exports names {', '.join(sorted(unknown))}, which it does not train")
    if isinstance(method, Generator) and trained and not exported:
        raise ValueError(f"{type(method).__name__}.exports is empty: it must say which nets make up the student")


def check_required_data(experiment: Experiment, requires: Requires) -> None:
    """ValueError if the data lacks what the method requires: images, pairs or labels."""
    config = experiment.data
    if requires.pairs and not config.pairs:
        raise ValueError(
            "this method needs data.pairs: make them with --mode=pairs, and set data.pairs to their folder"
        )
    if requires.images and "imageless" in first_rows(config):
        raise ValueError(
            "this method as it is set needs real images, and the data are prompts only: encode images too, or "
            "switch off the losses that use them (method.gan_weight=0, say)"
        )
    if requires.text_encoder and experiment.run.teacher_steps:
        raise ValueError("teacher_steps must be () while the text encoder is trained: the teacher takes no token ids")
    if requires.classes:
        check_labels(config, requires.classes)


def training_splits(run) -> dict[str, str]:
    """The splits that training reads besides "train", and what for."""
    splits = {}
    if run.eval_every <= run.steps:
        splits["validation"] = f"previews show it every eval_every={run.eval_every} steps"
    if run.report:
        splits["test"] = "the report at the end is on it, and report=False leaves that out"
    return splits


def check_splits(config, splits: Mapping[str, str]) -> None:
    """ValueError if a split is missing or empty, or has arrays of other shapes than the training split."""
    expected = shapes_of(first_rows(config))
    for shape, rows in data.first_of_each(config).items() if data.shown(config) != "train" else ():
        check_like_squares(config, shape, shapes_of(rows), expected)
    for split, use in splits.items():
        try:
            found = shapes_of(data.examples(config, split, 1))
        except ValueError as error:
            raise ValueError(f"{error} ({use})") from error
        for name in expected:
            if found.get(name) != expected[name]:
                where = f"the {split} split of {config.source_name} {config.path}".strip()
                raise ValueError(f"{name} in {where} is {found.get(name)}, and {expected[name]} in the training split")


def check_like_squares(config, shape, found, expected) -> None:
    """ValueError if encoded rows of a bucket differ from those of validation in more than their heights and widths."""
    images = lambda shapes: {name: x[2:] if name.startswith(("x0", "cond")) else x for name, x in shapes.items()}
    if images(found) != images(expected):
        where = f"the bucket {buckets.named(shape)} of {config.path}"
        raise ValueError(f"{where} has {found}, and its validation split {expected}: encode both with one command")


def shapes_of(batch) -> dict[str, tuple[int, ...]]:
    """{"text.class_labels": (), ...} of one row of a batch."""
    kept = {name: batch[name] for name in ("x0", "cond", "cond_latent", "text", "null") if name in batch}
    return {name: np.shape(x)[1:] for name, x in io.flatten(kept).items()}


def check_table(experiment: Experiment, requires: Requires, teacher: Pipeline) -> None:
    """ValueError if a label, or the null label where it is used, has no row in the network's table of classes.

    Without this, JAX would fill the missing row with NaN, and EDM's networks would take any such label for none.
    """
    run, config, module = experiment.run, experiment.data, teacher.denoiser.module
    rows = getattr(module, "num_class_embeds", None)
    classes, null = rows or getattr(module, "label_dim", 0), teacher.null_label
    if not classes or "class_labels" not in first_rows(config)["text"] or getattr(module, "class_embed_type", None):
        return
    text = first_texts(config)
    guided = requires.text or run.teacher_guidance != 1.0
    if config.num_classes > classes or (
        config.num_classes == rows and (guided or (text["class_labels"] == config.num_classes).any())
    ):
        raise ValueError(
            f"data.num_classes={config.num_classes} makes labels 0 to {config.num_classes - 1} and the null label "
            f"{config.num_classes}, and {run.teacher} knows 0 to {classes - 1 if rows else classes}: set "
            f"data.num_classes={null}, or use another teacher"
        )
    if config.num_classes < null and not run.random_init:
        logging.warning(
            "data.num_classes=%d makes %d the null label, and that of %s is %d: set data.num_classes=%d unless its "
            "classes are others", config.num_classes, config.num_classes, run.teacher, null, null,
        )  # fmt: skip


def check_encoded(experiment: Experiment, teacher: Pipeline) -> None:
    """Warn of latents that another VAE than the teacher's encoded; it may be the same one in another precision."""
    manifest = getattr(data.load(experiment.data, "train"), "encoded", None) or {}
    made_by = (manifest.get("fingerprints") or {}).get("vae", "")
    if made_by and made_by != teacher.vae_weights:
        logging.warning(
            "%s was encoded by another VAE (%s) than that of %s (%s): encode again unless only their precision differs",
            experiment.data.path, made_by, experiment.run.teacher, teacher.vae_weights or "none",
        )  # fmt: skip


def check_exportable(experiment: Experiment, teacher: Pipeline) -> None:
    """ValueError if the teacher's folder could not be completed to a student's, which would be said after training."""
    run, method, denoiser = experiment.run, experiment.method, teacher.denoiser
    if not (isinstance(method, Generator) and method.exports()):
        return
    with tempfile.TemporaryDirectory() as folder:
        try:
            how = described(method, denoiser.schedule, run.sample_steps)
            teacher.write_settings(Path(folder), denoiser, how, method.exports(), run.controlnet)
        except (ValueError, OSError) as error:
            raise ValueError(f"the student could not be exported: {error}") from error


def described(method: Generator, schedule, sample_steps):
    """The sampling of a student as a scheduler's file describes it; None if no scheduler of diffusers can."""
    if not (method.exports() and isinstance(schedule, DDPM)):
        return None
    return method.sampling(schedule, max(sample_steps))


def check_labels(config, classes: int) -> None:
    """ValueError if a method learns so many classes and the data has others, or images without one."""
    text = first_rows(config)["text"]
    if "class_labels" not in text or (text["class_labels"] == config.num_classes).any():
        data_set = f"data.source={config.source_name} {config.path}".strip()
        raise ValueError(f"this method learns labels, and there are images in {data_set} that have none")
    if classes != config.num_classes:
        raise ValueError(f"method.classes is {classes}, and data.num_classes {config.num_classes}: set both alike")


def check_teacher(experiment: Experiment, requires: Requires, frozen, batch) -> None:
    """ValueError for a teacher that does not fit the data, the method or the requested samplers."""
    run, method, teacher = experiment.run, experiment.method, frozen["teacher"]
    check_space(experiment, frozen)
    if getattr(teacher.module, "text_widths", ()) and "class_labels" in batch["text"]:
        raise ValueError(
            f"the teacher {run.teacher} generates from text, and there are only class labels: give a folder that also "
            "has text_encoder/ and tokenizer/ or, for data.source=arrays, text.npy"
        )
    if requires.text and not getattr(teacher.module, "conditional", True):
        raise ValueError(
            "classifier-free guidance needs a teacher with classes or text: set this method's guidance scale to 1"
        )
    if requires.text_encoder:
        if "input_ids" not in batch["text"]:
            raise ValueError("this method trains the text encoder on token ids: encode its data with --mode=encode")
        if experiment.data.source.precomputed:
            check_ids(experiment.data, frozen["teacher_text_encoder"].module.vocab_size)
        text = jax.eval_shape(embed_ids, frozen["teacher_text_encoder"], batch["text"]["input_ids"])
        batch = batch | {"text": text}
    pairs, shape = experiment.data.pairs, batch["x0"].shape[1:]
    if pairs and (stored := tuple(ode_pairs.read_manifest(pairs)["x0"])) != shape:
        raise ValueError(f"x0 of data.pairs {pairs} is {stored}, and that of the data is {shape}")
    check_shapes(teacher, batch)
    if not method.turns():
        check_condition(experiment, frozen, batch)
    if requires.condition and not experiment.data.task.conditional:
        raise ValueError("this method's student takes a conditioning image: set data.task, or method.adapter='none'")
    if run.teacher_sampler == "heun" and run.teacher_steps:
        check_heun(teacher.schedule)
    if isinstance(method, Generator):
        for steps in run.sample_steps:
            method.sampling(teacher.schedule, steps)  # raises if the student cannot be sampled in that many


def check_condition(experiment: Experiment, frozen, batch) -> None:
    """ValueError for a network that is sampled as it is, and takes a condition that the task lacks, or the reverse."""
    teacher, task = experiment.run.teacher, experiment.data.task_name
    kind = adapter.kind_of(frozen["teacher"], frozen.get("controlnet"), batch["x0"].shape[-1])
    if kind == "none" and experiment.data.task.conditional:
        raise ValueError(
            f"data.task={task} has a conditioning image, and {teacher} takes none: set config.controlnet to the folder "
            "of a ControlNet, or data.task to none"
        )
    if kind != "none" and not experiment.data.task.conditional:
        raise ValueError(
            f"{teacher} takes a conditioning image, and data.task={task} has none: set data.task to its own"
        )


def check_ids(config, size: int) -> None:
    """ValueError if token ids lie outside of the text encoder's vocabulary: its rows would be NaN."""
    ids = first_texts(config)["input_ids"]
    if ids.min() < 0 or ids.max() >= size:
        raise ValueError(
            f"the token ids of {config.source_name} {config.path} go from {ids.min()} to {ids.max()}, and the text "
            f"encoder has a vocabulary of {size}: encode the captions again with this teacher"
        )


def check_space(experiment: Experiment, frozen) -> None:
    """ValueError if the data are images, and the teacher generates something else and has no VAE."""
    config, teacher, autoencoder = experiment.data, experiment.run.teacher, frozen["autoencoder"]
    channels = getattr(frozen["teacher"].module, "out_channels", 3)
    if config.source.precomputed or autoencoder.params is not None or channels == 3:
        return
    raise ValueError(
        f"the teacher {teacher} works on {channels} channels, not on RGB, and data.source={config.source_name} has "
        "images: if those are latents, give a folder that also has vae/ (--mode=sample with --prompt or --label needs "
        "no data)"
    )


def check_heun(schedule) -> None:
    """ValueError if Heun's method would divide by an alpha of 0."""
    if not schedule.alpha_sigma(schedule.grid(1))[0].all():
        sentence = "teacher_sampler heun divides by alpha, and this teacher's schedule starts at alpha = 0"
        raise ValueError(f"{sentence}: use ddim or dpm_solver_pp")


def check_shapes(teacher, batch) -> None:
    """Let the network itself refuse data that it cannot take: channels, sizes, missing text."""
    args, t = [batch["x0"], batch["text"]], teacher.schedule.grid(1)
    if "cond" in batch and adapter.has_concat_channels(teacher, batch["x0"].shape[-1]):
        teacher = Adapted(teacher)
        args.append(adapter.condition("concat", batch))
    jax.eval_shape(lambda n, x0, *rest: n(x0, t, *rest), teacher, *args)


def check_bucket(shape, frozen, batch) -> None:
    """ValueError for one of data.buckets, (height, width), that the teacher cannot take."""
    try:
        check_shapes(frozen["teacher"], batch)
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"the teacher cannot take {buckets.named(shape)} in data.buckets ({error}): leave it out"
        ) from error


def check_pairs(experiment: Experiment, teacher: Pipeline) -> None:
    """ValueError if data.pairs are of another teacher than this run's, or of another size than the data."""
    run, folder = experiment.run, experiment.data.pairs
    manifest = ode_pairs.read_manifest(folder)
    fingerprints = manifest.get("fingerprints") or {}
    ours = {"teacher": run.teacher, "lora": run.lora, "lora_scale": run.lora_scale, "weights": teacher.weights}
    compared = ("weights", "lora_scale") if run.lora else ("weights",)
    if any(manifest[name] != ours[name] for name in compared):
        made_by, here = describe_teacher(manifest), describe_teacher(ours)
        sentence = f"data.pairs {folder} was made by {made_by}, and this run's teacher is {here}"
        raise ValueError(f"{sentence}: make pairs of that one with --mode=pairs")
    if made_with := fingerprints.get("controlnet", ""):
        net = run.controlnet and teacher.controlnet(run.controlnet)
        here = of_network(net.params, net.module) if net else "none"
        if here != made_with:
            raise ValueError(
                f"data.pairs {folder} was made with another ControlNet ({made_with}) than config.controlnet="
                f"{run.controlnet!r} ({here}): set it to that one, or make the pairs again"
            )
    schedule, made_on = describe_schedule(teacher.denoiser), fingerprints.get("schedule")
    if made_on not in (None, schedule):  # None: made by a version that did not keep it
        raise ValueError(f"data.pairs {folder} was made with {made_on}, and this run's teacher has {schedule}")


def describe_schedule(denoiser) -> str:
    """What a network predicts and its noise levels, in short: "v at sigma/alpha 14.6, 1.61, 0.5, 0.158"."""
    alpha, sigma = denoiser.schedule.alpha_sigma(denoiser.schedule.grid(4))
    ratios = np.asarray(sigma, np.float64) / np.maximum(np.asarray(alpha, np.float64), 1e-9)
    return f"{denoiser.predicts} at sigma/alpha {', '.join(f'{x:.3g}' for x in ratios)}"


def describe_teacher(of) -> str:
    """A teacher in words, with its fingerprint."""
    added = f" with {of['lora_scale']:g} of {of['lora']}" if of["lora"] else ""
    return f"{of['teacher']}{added} (weights {of['weights']})"
