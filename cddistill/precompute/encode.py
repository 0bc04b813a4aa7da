"""Encode the images and captions of a data set as latents and text embeddings, for `data.source=arrays`.

Each host writes its share of the rows to its own files and records its progress, so that a stopped command can resume.
"""

import dataclasses
import functools
import itertools
import json
import os
import pathlib
from collections.abc import Callable

import jax
import numpy as np
from rich.progress import Progress

from cddistill import data, io, pipeline, sharding
from cddistill.config import Experiment
from cddistill.data.contracts import NULL_FILES
from cddistill.data.splits import SPLITS
from cddistill.models.prompt import Prompts
from cddistill.net import Autoencoder
from cddistill.pipeline import Pipeline

MANIFEST = "manifest.json"


def encode(experiment: Experiment, output: pathlib.Path, config: dict) -> None:
    """Write x0 (float16), cond, text and captions of every split to the folder `output`, as `data.Arrays` reads them.

    Images are encoded by the VAE of config.teacher and captions by its text encoders, if it has them; for methods that
    train the text encoder, captions become token ids. The first pass over the training split is not augmented, the
    others of config.encode_epochs are. Rows already written by the same command are kept. Raises ValueError if the data
    is precomputed, the teacher has neither a VAE nor a text encoder, or `output` was written by another command.
    """
    run = experiment.run
    if experiment.data.source.precomputed:
        raise ValueError(f"data.source={experiment.data.source_name} is already encoded: --mode=encode takes images")
    teacher = pipeline.of_run(run)
    vae, prompts = teacher.autoencoder, teacher.prompts
    if vae.params is None and prompts is None:
        raise ValueError(f"{run.teacher} has neither vae/ nor text_encoder/: train on the images without --mode=encode")
    latent = vae.params is not None and experiment.data.task.conditional and takes_latents(experiment, teacher, vae)
    tokens = experiment.method.requires().text_encoder
    if tokens:
        _ = teacher.text_encoder  # raises if there is not exactly one
    encoders = Encoders(vae, prompts, experiment.data.task.encode if latent else None, tokens)
    null = encoders.null((experiment.data.size,) * 2)
    command = {name: config[name] for name in ("teacher", "lora", "lora_scale", "data", "dtype", "seed")}
    command |= {"cond_latent": True} if latent else {}
    command |= {"input_ids": True} if tokens else {}
    for split in SPLITS:
        plain, augmented = (data.load(experiment.data, split, augment) for augment in (False, True))
        rows = len(plain) * (run.encode_epochs if split == "train" else 1)
        item = functools.partial(item_of, plain, augmented, run.seed)
        write(output / split, command, item, rows, run.batch_size, encoders, null)


def item_of(plain, augmented, seed: int, i: int):
    """Row i: an example as it is in the first pass over the data, augmented in the others."""
    dataset = plain if i < len(plain) else augmented
    return dataset.item(i % len(plain), np.random.default_rng([seed, i]))


def takes_latents(experiment: Experiment, teacher: Pipeline, vae: Autoencoder) -> bool:
    """Whether the student takes its condition in latent space."""
    size = experiment.data.size
    z = jax.eval_shape(Autoencoder.encode, vae, jax.ShapeDtypeStruct((1, size, size, 3), np.float32))
    return teacher.takes_latent_condition(experiment.method.requires(), z.shape[-1])


def write(folder: pathlib.Path, command: dict, item, rows: int, batch_size: int, encode, null: dict) -> None:
    """Write this host's share of item(0), item(1) ... to its own sub-folder of `folder`, with the null text.

    encode maps batch_size items to {file name: array}. The last batch repeats its last item, so that one program
    serves all batches. Rows already written by the same command are kept.
    """
    hosts, host = jax.process_count(), jax.process_index()
    numbers = range(rows * host // hosts, rows * (host + 1) // hosts)
    part = folder / f"{host:05}-of-{hosts:05}"
    write_part(part, command, map(item, numbers), len(numbers), batch_size, encode)
    for name, x in text_arrays(null).items():
        if name in NULL_FILES:
            np.save(part / NULL_FILES[name], half({name: np.asarray(x)})[name])


def write_part(folder: pathlib.Path, command: dict, items, total: int, batch_size: int, encode) -> None:
    """Write one host's rows and record progress in the manifest. Raises ValueError if another command wrote it."""
    command, manifest = json.loads(json.dumps(command)), folder / MANIFEST
    known = json.loads(manifest.read_text()) if manifest.is_file() else {"made": command, "rows": 0, "total": total}
    if (known["made"], known["total"]) != (command, total):
        raise ValueError(f"{folder} was made by another command, see its {MANIFEST}: choose another --output")
    folder.mkdir(parents=True, exist_ok=True)
    files, captions = {}, []
    with Progress(disable=not sharding.is_host0()) as progress:
        task = progress.add_task(f"encoding {folder.parent.name}", total=total)
        for start in range(0, total, batch_size):
            rows = list(itertools.islice(items, batch_size))
            captions += [row["caption"] for row in rows]
            stop = start + len(rows)
            progress.update(task, completed=stop)
            if stop <= known["rows"]:
                continue
            for name, x in encode(rows + rows[-1:] * (batch_size - len(rows))).items():
                if name not in files:
                    files[name] = rows_file(folder / f"{name}.npy", (total, *x.shape[1:]), x.dtype)
                files[name][start:stop] = x[: len(rows)]
                files[name].flush()
            if stop == total:
                io.write_atomic(folder / "captions.json", json.dumps(captions))
            io.write_json(manifest, known | {"rows": stop})


def rows_file(path: pathlib.Path, shape, dtype):
    """A memory-mapped .npy file, opened if it exists, else created. Raises OSError if the disk is too full."""
    if path.is_file():
        return np.lib.format.open_memmap(path, "r+")
    rows = np.lib.format.open_memmap(path, "w+", dtype, shape)
    if hasattr(os, "posix_fallocate"):  # not on macOS
        reserve(path)
    return rows


def reserve(path: pathlib.Path) -> None:
    """Allocate all blocks of a file. Without this, a full disk would kill the process that has the file mapped."""
    try:
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    except OSError as error:
        path.unlink()
        raise OSError(error.errno, error.strerror, str(path)) from error


@dataclasses.dataclass
class Encoders:
    """Encode items of a data set as arrays by file name. Floats are float16, except sizes in pixels."""

    vae: Autoencoder
    prompts: Prompts | None
    encode_condition: Callable | None = None  # Task.encode, for students with a latent condition
    tokens: bool = False  # captions become token ids instead of embeddings

    def __post_init__(self):
        self.to_latent = jax.jit(Autoencoder.encode)
        if self.encode_condition:
            self.encode_condition = jax.jit(self.encode_condition)

    def __call__(self, rows) -> dict[str, np.ndarray]:
        arrays = {"x0": self.to_latent(self.vae, np.stack([row["x0"] for row in rows]))}
        if "cond" in rows[0]:
            arrays["cond"] = np.stack([row["cond"] for row in rows])
            if self.encode_condition:
                arrays["cond_latent"] = self.encode_condition(self.vae, arrays["cond"])
        if self.prompts is None:
            return half(arrays) | {"class_labels": np.array([row["label"] for row in rows], np.int32)}
        captions = [row["caption"] for row in rows]
        if self.tokens:
            return half(arrays) | {"input_ids": self.prompts.tokenize(captions)[0]}
        return half(arrays | text_arrays(self.prompts(captions, target_size=rows[0]["x0"].shape[:2])))

    def null(self, size) -> dict:
        """The text of the empty prompt for images of a size, one row; {} without text encoders."""
        if self.prompts is None:
            return {}
        text = {"input_ids": self.prompts.tokenize([""])[0]} if self.tokens else self.prompts.null(1, target_size=size)
        return jax.tree.map(lambda x: x[0], text)


def half(arrays):
    """Floats as float16, but sizes in pixels (time_ids) as float32."""
    kinds = {name: np.float32 if name.endswith("time_ids") else np.float16 for name in arrays}
    return {n: x if np.issubdtype(x.dtype, np.integer) else np.asarray(x, kinds[n]) for n, x in arrays.items()}


def text_arrays(text: dict) -> dict:
    """A UNet's text inputs by file name: text, text_embeds, time_ids; unchanged without encoder_hidden_states."""
    if "encoder_hidden_states" not in text:
        return text
    return {"text": text["encoder_hidden_states"], **text.get("added_cond_kwargs", {})}
