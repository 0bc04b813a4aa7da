"""Encode the images and captions of a data set as latents and text embeddings, for `data.source=arrays`.

Each host writes its share of the rows to its own files and records its progress, so that a stopped command can resume.
"""

import functools
import itertools
import json
import os
import pathlib
from collections.abc import Callable, Sequence
from io import BytesIO
from typing import NamedTuple

import jax
import numpy as np
from rich.progress import Progress

from cddistill import checksums, data, encoders, io, pipeline, sharding
from cddistill.config import Experiment
from cddistill.data import digests
from cddistill.data.contracts import NULL_FILES
from cddistill.data.loader import stack
from cddistill.data.splits import SPLITS
from cddistill.method import per_sample
from cddistill.models.fingerprint import of_network
from cddistill.pipeline import Pipeline

MANIFEST = "manifest.json"
ITEM = ("x0", "cond", "caption", "label")  # what is encoded or stored of an item


def encode(experiment: Experiment, output: pathlib.Path, config: dict) -> None:
    """Write x0, cond, text and captions of every split to the folder `output`, as `data.Arrays` reads them.

    Images are encoded by the VAE of config.teacher and captions by its text encoders, if it has them; for methods that
    train the text encoder, captions become token ids. The first pass over the training split is not augmented, the
    others of config.encode_epochs are. Rows already written by the same command are kept. Raises ValueError if the data
    is precomputed, the teacher has neither a VAE nor a text encoder, `output` was written by another command or from
    other files or weights, or a row is not finite in config.encode_dtype.
    """
    run = experiment.run
    if experiment.data.source.precomputed:
        raise ValueError(f"data.source={experiment.data.source_name} is already encoded: --mode=encode takes images")
    teacher = pipeline.of_run(run)
    if not encoders.needed(experiment, teacher):
        raise ValueError(f"{run.teacher} has neither vae/ nor text_encoder/: train on the images without --mode=encode")
    encode_rows = encoders.make(experiment, teacher)
    made = {name: config[name] for name in ("teacher", "lora", "lora_scale", "data", "dtype", "encode_dtype", "seed")}
    made |= {"encode_sample": True} if run.encode_sample else {}
    made |= {"cond_latent": True} if encode_rows.condition else {}
    made |= {"input_ids": True} if encode_rows.tokens else {}
    work, weights = {}, weights_of(teacher)
    for split in SPLITS:  # all are checked before the first is encoded
        plain, augmented = (data.load(experiment.data, split, augment) for augment in (False, True))
        rows = len(plain) * (run.encode_epochs if split == "train" else 1)
        command = Command(made, data.fingerprint(experiment.data, split), weights)
        part, numbers = share(output / split, rows)
        command.known(part, len(numbers))
        work[part] = command, numbers, functools.partial(item_of, plain, augmented, run.seed)
    program, dtype = arrays_of(encode_rows, encoders.networks(teacher)), np.dtype(run.encode_dtype)
    for part, (command, numbers, item) in work.items():
        write_part(part, command, map(item, numbers), numbers, run.batch_size, program, dtype)
        write_null(part, encode_rows.null, dtype)


class Command(NamedTuple):
    """What encoded rows depend on, as the manifest keeps it."""

    made: dict  # the part of the config
    source: dict[str, str]  # fingerprints of the data's files, which may change where their paths do not
    weights: dict[str, str]  # and of the networks

    def known(self, folder: pathlib.Path, total: int) -> dict:
        """The manifest in a folder for so many rows, or a new one.

        Raises ValueError, saying what differs, if it is of another command or of other files or weights. Files and
        weights that were moved are the same.
        """
        fingerprints = self.source | self.weights
        if not (folder / MANIFEST).is_file():
            return {"made": self.made, "fingerprints": fingerprints, "rows": 0, "total": total}
        kinds = {"rows": int, "total": int, "made": dict, "fingerprints": dict | None}
        known = io.read_json(folder / MANIFEST, "encode again, to another --output", **kinds)
        if "fingerprints" not in known:
            raise ValueError(
                f"{folder} is from a version of cddistill that kept no fingerprints of pictures and weights, so it may "
                "serve for training but not be continued: encode again, to another --output"
            )
        if differing := digests.changes(known["fingerprints"], fingerprints):
            raise ValueError(
                f"{folder} was encoded from something else ({'; '.join(differing)}): undo that, or encode again to "
                "another --output"
            )
        places = {"teacher", "lora", "data.pairs", "data.skip_bad"} | ({"data.path"} if self.source else set())
        both = (io.flatten(json.loads(json.dumps(made))) for made in (known["made"], self.made))
        old, new = ({k: x for k, x in made.items() if k not in places} for made in both)
        if differing := digests.changes(old | {"rows": known["total"]}, new | {"rows": total}):
            raise ValueError(
                f"{folder} was made by another command ({'; '.join(differing)}): undo that, or choose another --output"
            )
        return known


def weights_of(teacher: Pipeline) -> dict[str, str]:
    """Fingerprints of the VAE, the text encoders with their LoRA, and the tokenizers' files."""
    found, tokenizers = {}, sorted(teacher.root.glob("tokenizer*/*"))
    if teacher.autoencoder.params is not None:
        found["vae"] = teacher.vae_weights
    if teacher.prompts:
        names = teacher.prompts.family.text_encoders
        found |= {name: of_network(x.params, x.module) for name, x in zip(names, teacher.prompts.nets, strict=True)}
        found["tokenizers"] = digests.of_values(p.read_bytes().hex() for p in tokenizers if p.is_file())
    return found


def item_of(plain, augmented, seed: int, i: int):
    """Row i: an example as it is in the first pass over the data, augmented in the others."""
    dataset = plain if i < len(plain) else augmented
    return dataset.item(i % len(plain), np.random.default_rng([seed, i]))


def share(folder: pathlib.Path, rows: int) -> tuple[pathlib.Path, range]:
    """This host's own sub-folder of `folder`, and the rows that it writes there."""
    hosts, host = jax.process_count(), jax.process_index()
    return folder / f"{host:05}-of-{hosts:05}", range(rows * host // hosts, rows * (host + 1) // hosts)


def write_null(folder: pathlib.Path, null: dict, dtype) -> None:
    """Write the text of the empty prompt, one row, and record the checksums of all small files in the manifest."""
    for name, x in text_arrays(null).items():
        if name in NULL_FILES:
            file = BytesIO()
            np.save(file, stored(name, np.asarray(x), dtype, ["the empty prompt"])[0])
            io.write_atomic(folder / NULL_FILES[name], file.getvalue())
    small = [path for name in ("captions.json", *NULL_FILES.values()) if (path := folder / name).is_file()]
    found = {path.name: checksums.crc32_file(path) for path in small}
    io.write_json(folder / MANIFEST, io.read_json(folder / MANIFEST, "encode again") | {"crc32": found})


def write_part(folder: pathlib.Path, command: Command, items, numbers: range, batch_size: int, encode, dtype) -> None:
    """Write one host's rows, `items` with these numbers, and record progress in the manifest.

    encode maps batch_size items and their numbers to {file name: array}; floats are stored in dtype. The last batch
    repeats its last item, so that one program serves all batches. Rows already written by the same command are kept.
    """
    total = len(numbers)
    known = command.known(folder, total)
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
            captioned = zip(numbers[start:stop], (row["caption"] for row in rows), strict=True)
            labels = [f"row {i} of {folder.parent.name} ({text or 'no caption':.60})" for i, text in captioned]
            padded = rows + rows[-1:] * (batch_size - len(rows))
            for name, x in encode(padded, np.arange(start, start + batch_size) + numbers.start).items():
                x = stored(name, x[: len(rows)], dtype, labels)
                if name not in files:
                    files[name] = open_rows(folder / f"{name}.npy", (total, *x.shape[1:]), x.dtype, start)
                for file, values in zip(files[name], (x, checksums.crc32_rows(x)), strict=True):
                    file[start:stop] = values
                    file.flush()
            if stop == total:
                io.write_atomic(folder / "captions.json", json.dumps(captions))
            io.write_json(folder / MANIFEST, known | {"rows": stop})


def open_rows(path: pathlib.Path, shape, dtype, done: int) -> tuple[np.ndarray, np.ndarray]:
    """(rows, their checksums) as memory-mapped files; an older version has written no checksums of the first `done`."""
    sums, rows = digests.rows_file(path), rows_file(path, shape, dtype)
    known = sums.is_file()
    found = rows_file(sums, shape[:1], np.dtype(np.uint32))
    if not known:
        found[:done] = checksums.crc32_rows(rows[:done])
    return rows, found


def rows_file(path: pathlib.Path, shape, dtype):
    """A memory-mapped .npy file, opened if it exists, else created. Raises OSError if the disk is too full.

    A file of this name has all of its blocks: a full disk would kill the process that has it mapped.
    """
    if not path.is_file():
        draft = path.with_name(f".{path.name}.tmp")  # one process writes this folder; the next writes over what is left
        try:
            with io.naming(path):
                np.lib.format.open_memmap(draft, "w+", dtype, shape)
                if hasattr(os, "posix_fallocate"):  # not on macOS
                    with draft.open("r+b") as file:
                        os.posix_fallocate(file.fileno(), 0, draft.stat().st_size)
                os.replace(draft, path)
        finally:
            draft.unlink(missing_ok=True)
    return np.lib.format.open_memmap(path, "r+")


def arrays_of(encode: encoders.Encoders, nets) -> Callable:
    """f(items of a data set, their numbers) -> {file name: float32 or integers [b, ...]}."""
    key, program = jax.random.key(encode.seed), jax.jit(encode)

    def arrays(items, numbers):
        batch = encode.tokenized(stack([{name: x[name] for name in ITEM if name in x} for x in items]))
        keys = per_sample(key, np.asarray(numbers, np.int32)) if encode.sampled else None
        made = jax.device_get(program(nets, encoders.inputs(batch), keys))
        text = text_arrays(made.pop("text", {"class_labels": batch["label"]}))
        cond = {name: batch[name] for name in ("cond",) if name in batch}
        return {name: x for name, x in made.items() if name != "null"} | cond | text

    return arrays


def stored(name: str, x: np.ndarray, dtype, labels: Sequence[str]) -> np.ndarray:
    """Rows x of an array as they are stored: floats in dtype, but sizes in pixels (time_ids) in float32.

    Raises ValueError with the label of the first row that is not finite then.
    """
    if np.issubdtype(x.dtype, np.integer):
        return x
    with np.errstate(over="ignore"):
        kept = np.asarray(x, np.float32 if name.endswith("time_ids") else dtype)
    bad = np.flatnonzero(~np.isfinite(kept.reshape(len(kept), -1)).all(1))
    if len(bad):
        where = f"{name} of {labels[bad[0]]}"
        if not np.isfinite(x[bad[0]]).all():
            raise ValueError(f"{where} is not finite (NaN or infinity): check the weights, or set config.dtype=float32")
        raise ValueError(
            f"{where} has numbers up to {np.abs(x[bad[0]]).max():.3g}, too large for {kept.dtype}: set "
            "--config.encode_dtype=float32"
        )
    return kept


def text_arrays(text: dict) -> dict:
    """A UNet's text inputs by file name: text, text_embeds, time_ids; unchanged without encoder_hidden_states."""
    if "encoder_hidden_states" not in text:
        return text
    return {"text": text["encoder_hidden_states"], **text.get("added_cond_kwargs", {})}
