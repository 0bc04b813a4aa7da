"""Images and captions of a data set as latents and text embeddings, once and for all: what `data.source=arrays` reads.

Every host writes its share of the rows to files of its own, and how far it is, so that a stopped command goes on.
"""

import dataclasses
import itertools
import json
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from rich.progress import Progress

from cddistill import data, models, sharding
from cddistill.build import has, load_autoencoder
from cddistill.config import Experiment
from cddistill.data.splits import SPLITS
from cddistill.evals import grids
from cddistill.models.prompt import Prompts, load_prompts
from cddistill.net import Autoencoder

MANIFEST = "manifest.json"
NULL = {"text": "null", "text_embeds": "null_text_embeds"}


def encode(experiment: Experiment, output: pathlib.Path, config: dict) -> None:
    """Write x0 (float16), cond, text and captions of every split below `output`, as `data.Arrays` reads them.

    Images pass through the VAE of config.teacher, captions through its text encoders; what a teacher does not have is
    left out. Nothing is augmented. Rows already written by the same command are kept. Raises ValueError for data that
    are arrays already, for a teacher that encodes nothing, and for an `output` made by another command.
    """
    run = experiment.run
    if experiment.data.source == "arrays":
        raise ValueError("data.source=arrays is encoded already: --mode=encode takes images")
    dtype, root = jnp.dtype(run.dtype), models.resolve(run.teacher, "text_encoder")
    vae = load_autoencoder(run.teacher, dtype=dtype)
    prompts = load_prompts(root, dtype) if has(root, "text_encoder") else None
    if prompts and run.lora:
        prompts = prompts.adapted(run.lora, run.lora_scale)
    if vae.params is None and prompts is None:
        raise ValueError(
            f"{run.teacher} has neither vae/ nor text_encoder/: it takes images as they are, train on them"
        )
    encoders, hosts, host = Encoders(vae, prompts, run.batch_size), jax.process_count(), jax.process_index()
    made = {name: config[name] for name in ("teacher", "lora", "lora_scale", "data", "dtype", "seed")}
    for split in SPLITS:
        dataset = data.load(experiment.data, split, augment=False)
        mine = range(len(dataset) * host // hosts, len(dataset) * (host + 1) // hosts)
        items = (dataset.item(i, np.random.default_rng([run.seed, i])) for i in mine)
        folder = output / split / f"{host:05}-of-{hosts:05}"
        write(folder, made, items, len(mine), run.batch_size, encoders)
        for name, x in encoders.null((experiment.data.size,) * 2).items():
            np.save(folder / f"{name}.npy", x)


def write(folder: pathlib.Path, made: dict, items, total: int, batch_size: int, encoders) -> None:
    """This host's rows of a split, and how far they are."""
    made, manifest = json.loads(json.dumps(made)), folder / MANIFEST
    known = json.loads(manifest.read_text()) if manifest.is_file() else {"made": made, "rows": 0, "total": total}
    if (known["made"], known["total"]) != (made, total):
        raise ValueError(f"{folder} was made by another command, see {MANIFEST}: choose another --output")
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
            for name, x in encoders(rows).items():
                if name not in files:
                    files[name] = rows_file(folder / f"{name}.npy", (total, *x.shape[1:]), x.dtype)
                files[name][start:stop] = x
                files[name].flush()
            if stop == total:
                grids.replace(folder / "captions.json", json.dumps(captions).encode())
            grids.replace(manifest, json.dumps(known | {"rows": stop}, indent=2).encode())


def rows_file(path: pathlib.Path, shape, dtype):
    """An array on disk of this shape, opened where it is already; OSError if the disk has no room for all of it."""
    if path.is_file():
        return np.lib.format.open_memmap(path, "r+")
    rows = np.lib.format.open_memmap(path, "w+", dtype, shape)
    if hasattr(os, "posix_fallocate"):  # not on macOS
        reserve(path)
    return rows


def reserve(path: pathlib.Path) -> None:
    """Make the disk give a file all of its blocks: if it cannot later, that kills the process which has it mapped."""
    try:
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    except OSError as error:
        path.unlink()
        raise OSError(error.errno, error.strerror, str(path)) from error


@dataclasses.dataclass
class Encoders:
    """Rows of a data set to arrays, most in float16; padded to one batch size, so that one program serves all."""

    vae: Autoencoder
    prompts: Prompts | None
    batch_size: int

    def __post_init__(self):
        self.to_latent = jax.jit(Autoencoder.encode)

    def __call__(self, rows) -> dict[str, np.ndarray]:
        n, padded = len(rows), rows + rows[-1:] * (self.batch_size - len(rows))
        x0 = self.to_latent(self.vae, np.stack([row["x0"] for row in padded]))
        made = {"x0": x0, "cond": np.stack([row["cond"] for row in padded])} if "cond" in rows[0] else {"x0": x0}
        if self.prompts is None:
            return self.half(made, n) | {"class_labels": np.array([row["label"] for row in rows], np.int32)}
        size = rows[0]["x0"].shape[:2]
        return self.half(made | named(self.prompts([row["caption"] for row in padded], target_size=size)), n)

    def null(self, size) -> dict[str, np.ndarray]:
        """The empty prompt's row, by file name."""
        if self.prompts is None:
            return {}
        one = named(self.prompts.null(1, target_size=size))
        return {NULL[name]: x[0] for name, x in self.half(one, 1).items() if name in NULL}

    @staticmethod
    def half(arrays, n):
        exact = ("time_ids",)  # sizes in pixels
        return {k: np.asarray(x[:n], np.float32 if k in exact else np.float16) for k, x in arrays.items()}


def null_files(null: dict) -> dict[str, np.ndarray]:
    """The null text of one row by the names of the files that hold it; of classes there is none."""
    return {NULL[name]: np.asarray(x, np.float16) for name, x in named(null).items() if name in NULL}


def named(text: dict) -> dict:
    """The `text` of a UNet by the names of the files that hold it."""
    if "class_labels" in text:
        return {"class_labels": text["class_labels"]}
    return {"text": text["encoder_hidden_states"], **text.get("added_cond_kwargs", {})}
