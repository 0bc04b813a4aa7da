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
    encoders, size = Encoders(vae, prompts), (experiment.data.size,) * 2
    null = jax.tree.map(lambda x: x[0], prompts.null(1, target_size=size)) if prompts else {}
    made = {name: config[name] for name in ("teacher", "lora", "lora_scale", "data", "dtype", "seed")}
    for split in SPLITS:
        dataset = data.load(experiment.data, split, augment=False)
        item = lambda i, dataset=dataset: dataset.item(i, np.random.default_rng([run.seed, i]))
        write(output / split, made, item, len(dataset), run.batch_size, encoders, null)


def write(folder: pathlib.Path, made: dict, item, rows: int, batch_size: int, encode, null: dict) -> None:
    """This host's share of item(0), item(1) ... as a part of the data set in `folder`, with the null text's row.

    encode takes batch_size items, the last repeated if need be so that one program serves all, and gives arrays by the
    names of their files. Rows already written by the same command are kept.
    """
    hosts, host = jax.process_count(), jax.process_index()
    mine = range(rows * host // hosts, rows * (host + 1) // hosts)
    part = folder / f"{host:05}-of-{hosts:05}"
    write_part(part, made, map(item, mine), len(mine), batch_size, encode)
    for name, x in named(null).items():
        if name in NULL:
            np.save(part / f"{NULL[name]}.npy", np.asarray(x, np.float16))


def write_part(folder: pathlib.Path, made: dict, items, total: int, batch_size: int, encode) -> None:
    """The rows of a part, and how far they are."""
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
            for name, x in encode(rows + rows[-1:] * (batch_size - len(rows))).items():
                if name not in files:
                    files[name] = rows_file(folder / f"{name}.npy", (total, *x.shape[1:]), x.dtype)
                files[name][start:stop] = x[: len(rows)]
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
    """Items of a data set to arrays, most in float16."""

    vae: Autoencoder
    prompts: Prompts | None

    def __post_init__(self):
        self.to_latent = jax.jit(Autoencoder.encode)

    def __call__(self, rows) -> dict[str, np.ndarray]:
        made = {"x0": self.to_latent(self.vae, np.stack([row["x0"] for row in rows]))}
        if "cond" in rows[0]:
            made["cond"] = np.stack([row["cond"] for row in rows])
        if self.prompts is None:
            return half(made) | {"class_labels": np.array([row["label"] for row in rows], np.int32)}
        text = self.prompts([row["caption"] for row in rows], target_size=rows[0]["x0"].shape[:2])
        return half(made | named(text))


def half(arrays):
    """Floats in float16, but sizes in pixels in float32."""
    kinds = {name: np.float32 if name.endswith("time_ids") else np.float16 for name in arrays}
    return {n: x if np.issubdtype(x.dtype, np.integer) else np.asarray(x, kinds[n]) for n, x in arrays.items()}


def named(text: dict) -> dict:
    """The `text` of a UNet by the names of the files that hold it; of a network without text, nothing."""
    if "encoder_hidden_states" not in text:
        return text
    return {"text": text["encoder_hidden_states"], **text.get("added_cond_kwargs", {})}
