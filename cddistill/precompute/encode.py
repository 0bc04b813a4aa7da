"""Encode the images and captions of a data set as latents and text embeddings, for `data.source=arrays`.

Each host writes its share of the shards, in the format of data/shards.py, so that a stopped command can resume.
"""

import dataclasses
import functools
import itertools
import json
import pathlib
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import grain
import jax
import numpy as np

import cddistill
from cddistill import data, encoders, io, pipeline, progress, sharding
from cddistill.config import Experiment
from cddistill.data import digests, shards
from cddistill.data.buckets import named
from cddistill.data.encoded import LISTED, EncodedItems, check_listed
from cddistill.data.loader import stack
from cddistill.data.splits import SPLITS
from cddistill.method import per_sample
from cddistill.models.fingerprint import of_network
from cddistill.pipeline import Pipeline
from cddistill.precompute import writing
from cddistill.precompute.writing import stored

ITEM = ("x0", "cond", "caption", "label", "imageless", "time_ids")  # what is encoded or stored of an item
UNUSED = {f"data.{name}" for name in ("pairs", "skip_bad", "window", "threads")}  # options that change no row


def encode(experiment: Experiment, output: pathlib.Path, config: dict) -> None:
    """Write x0, cond, text and captions of every split to the folder `output`, as `data.Arrays` reads them; training
    rows with data.buckets to a sub-folder for each bucket, listed in a manifest of their split.

    Images are encoded by the VAE of config.teacher and captions by its text encoders, if it has them; for methods that
    train the text encoder, captions become token ids. The first pass over the training split is not augmented, the
    others of config.encode_epochs are. Shards of config.encode_shard rows are written by host k modulo the number of
    hosts; those already written by the same command are kept. Raises ValueError if the data is precomputed, the teacher
    has neither a VAE nor a text encoder, `output` was written by another command or from other files or weights, or a
    row is not finite in config.encode_dtype.
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
    work = planned(experiment, output, made, weights_of(teacher))
    most = max(manifest["rows"] for manifest, _ in work.values())  # a part of fewer rows is filled up
    size = -(-min(run.batch_size, run.encode_shard, most) // jax.device_count()) * jax.local_device_count()
    program = program_of(encode_rows, encoders.networks(teacher), size)
    how = How(program, size, experiment.data.threads, np.dtype(run.encode_dtype), null_of(encode_rows, experiment))
    listed = buckets_of(work)
    for folder, (manifest, item) in work.items():
        if "bucket" in manifest and not (folder.parent / shards.MANIFEST).is_file():
            io.write_json(folder.parent / shards.MANIFEST, {"format": LISTED, "buckets": listed})
        write_split(folder, manifest, item, how)


def planned(experiment: Experiment, output: pathlib.Path, made: dict, weights: dict) -> dict[pathlib.Path, tuple]:
    """{folder of a split, or of one of its buckets: (its manifest, item(i) of row i)}, all checked: see `known`."""
    work = {}
    for split in SPLITS:
        source = data.fingerprint(experiment.data, split)
        places = UNUSED | {"teacher", "lora"} | ({"data.path", "data.prompts"} if source else set())
        found = rows_of(experiment, output / split)
        if output / split in found:
            check_listed(output / split, {})
        for folder, (described, item) in found.items():
            work[folder] = known(folder, described | made | {"fingerprints": source | weights}, places), item
    if listed := buckets_of(work):
        check_listed(output / "train", listed)
    return work


def buckets_of(work: dict[pathlib.Path, tuple]) -> dict[str, int]:
    """The number of rows of each bucket that is `planned`: of the training split, for others have none."""
    return {manifest["bucket"]: manifest["rows"] for manifest, _ in work.values() if "bucket" in manifest}


def rows_of(experiment: Experiment, folder: pathlib.Path) -> dict[pathlib.Path, tuple[dict, Callable]]:
    """{folder: (what its manifest says of its rows alone, item(i) of row i)} of a split, or of each of its buckets."""
    run, config, split = experiment.run, experiment.data, folder.name
    made, first = {}, 0
    sets = {folder / named(shape): (named(shape), part) for shape, part in data.parts_of(config, split).items()}
    for place, (bucket, augmented) in (sets or {folder: ("", data.load(config, split))}).items():
        plain = dataclasses.replace(augmented, augment=False)
        rows = len(plain) * (run.encode_epochs if split == "train" else 1)
        described = {"format": shards.FORMAT, "rows": rows, "shard": run.encode_shard}
        described |= {"bucket": bucket, "first": first} if bucket else {}
        made[place] = described, functools.partial(item_of, plain, augmented, run.seed, first)
        first += rows
    return made


def known(folder: pathlib.Path, manifest: dict, places: set[str]) -> dict:
    """The manifest in a folder, or this new one.

    Raises ValueError, saying what differs, if it is of another command or of other files or weights; `places` are the
    keys that may differ.
    """
    manifest = json.loads(json.dumps(manifest | {"made_by": f"cddistill {cddistill.__version__}"}))
    if folder.is_dir() and any(re.fullmatch(r"\d+-of-\d+", path.name) for path in folder.iterdir()):
        raise ValueError(
            f"{folder} is from a version of cddistill that wrote .npy files, so it may serve for training but not be "
            "continued: encode again, to another --output"
        )
    if not (folder / shards.MANIFEST).is_file():
        return manifest
    there = shards.read_manifest(folder, EncodedItems.kind)
    if differing := digests.changes(there["fingerprints"], manifest["fingerprints"]):
        raise ValueError(
            f"{folder} was encoded from something else ({'; '.join(differing)}): undo that, or encode again to "
            "another --output"
        )
    places = places | {"made_by", "fingerprints", "row", "imageless"}
    if differing := writing.changed(there, manifest, places):
        raise ValueError(
            f"{folder} was made by another command ({'; '.join(differing)}): undo that, or choose another --output"
        )
    return there


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


def item_of(plain, augmented, seed: int, first: int, i: int):
    """Row i: an example as it is in the first pass over the data, augmented in the others. `first` rows of its split
    are in other buckets, and come before it."""
    dataset = plain if i < len(plain) else augmented
    return dataset.item(i % len(plain), np.random.default_rng([seed, first + i]))


# ---- encoding


class Part(NamedTuple):
    """Rows of one shard that are encoded together."""

    numbers: range
    items: list[dict[str, Any]]
    arrays: dict[str, Any]  # by name, [n, ...], perhaps still being computed; n may be more than the rows


class How(NamedTuple):
    """How rows are made and stored."""

    program: Callable  # (items, number of the first in its split) -> arrays by name, on the devices
    size: int  # rows at a time
    threads: int  # that read and decode images
    dtype: np.dtype
    null: dict[str, np.ndarray]  # the text of the empty prompt


def program_of(encode: encoders.Encoders, nets, size: int) -> Callable:
    """f(up to `size` items of a data set, the first one's number) -> {name: float32 or integers [size, ...]}, on the
    devices.

    Rows are split over this host's devices. It does not wait for these.
    """
    mesh, key = sharding.make_mesh(devices=jax.local_devices()), jax.random.key(encode.seed)
    layout = sharding.by_row(mesh)
    nets = jax.device_put(nets, sharding.replicated(mesh))

    def rows(nets, batch, numbers):
        made = encode(nets, batch, per_sample(key, numbers) if encode.sampled else None)
        return {name: x for name, x in made.items() if name != "null"}  # stored once

    program = jax.jit(sharding.inside(mesh, rows), out_shardings=layout)

    def arrays(items, first):
        padded = items + items[-1:] * (size - len(items))
        batch = encode.tokenized(stack([{name: x[name] for name in ITEM if name in x} for x in padded]))
        numbers = np.arange(first, first + size, dtype=np.int32)
        made = program(nets, *jax.device_put((encoders.inputs(batch), numbers), layout))
        cond = {name: batch[name] for name in ("cond", "imageless") if name in batch}
        text = shards.flatten_text(made.pop("text", {"class_labels": batch["label"]}))
        return made | cond | text

    return arrays


def null_of(encode: encoders.Encoders, experiment: Experiment) -> dict[str, np.ndarray]:
    """The text of the empty prompt or the null label, as it is stored, by name and without an axis of rows."""
    null = encode.null or {"class_labels": np.array([experiment.data.num_classes], np.int32)}
    dtype, flat = np.dtype(experiment.run.encode_dtype), shards.flatten_text(dict(null))
    rows = {name: stored(name, np.asarray(x)[:1], dtype, ["the empty prompt"]) for name, x in flat.items()}
    return {name: x.reshape(x.shape[1:]) for name, x in rows.items()}


def write_split(folder: pathlib.Path, manifest: dict, item: Callable, how: How) -> None:
    """Write this host's missing shards of a split, or of one of its buckets, whose row i is item(i)."""
    name = f"{folder.parent.name}/{folder.name}" if "bucket" in manifest else folder.name
    mine = filter(writing.is_mine, range(shards.num_shards(manifest)))
    missing = writing.missing(folder, EncodedItems.kind, manifest, mine)
    if (folder / shards.MANIFEST).is_file():
        writing.prepare(folder, manifest, how.null)
    if not missing:
        return
    total, size = sum(len(shards.shard_rows(manifest, k)) for k in missing), manifest["shard"]
    with progress.counting(f"encoding {name}", total, shown=sharding.is_host0()) as advance:
        parts = one_behind(encoded(manifest, missing, item, how))
        for k, group in itertools.groupby(parts, lambda part: part.numbers.start // size):
            rows = [on_host(part, name, how.dtype) for part in group]
            arrays = {name: np.concatenate([x[name] for x in rows]) for name in rows[0] if name != "caption"}
            none = {"imageless": [*arrays.pop("x0").shape[1:]]} if "imageless" in arrays else {}
            arrays = {name: x for name, x in arrays.items() if name != "imageless"}
            if "row" not in manifest:  # a new folder
                shapes = {name: [str(x.dtype), [*x.shape[1:]]] for name, x in sorted(arrays.items())}
                manifest = manifest | {"row": shapes} | none
                writing.prepare(folder, manifest, how.null)
            captions = [text for x in rows for text in x["caption"]]
            arrays["caption"] = shards.caption_rows(captions)
            writing.save(shards.shard_file(folder, k), arrays, shards.describe(manifest, k))
            advance(len(captions))


def encoded(manifest: dict, missing: list[int], item: Callable, how: How) -> Iterator[Part]:
    """The rows of some shards, part by part. Threads decode the next ones while the devices encode these."""
    size = manifest["shard"]
    number = lambda i: missing[i // size] * size + i % size  # only the last shard has fewer rows
    total = sum(len(shards.shard_rows(manifest, k)) for k in missing)
    options = grain.ReadOptions(num_threads=how.threads, prefetch_buffer_size=2 * how.size)
    items = iter(grain.MapDataset.range(total).map(lambda i: item(number(int(i)))).to_iter_dataset(options))
    for k in missing:
        rows = shards.shard_rows(manifest, k)
        for start in range(rows.start, rows.stop, how.size):
            numbers = range(start, min(start + how.size, rows.stop))
            part = [next(items) for _ in numbers]
            yield Part(numbers, part, how.program(part, manifest.get("first", 0) + start))


def one_behind(stream: Iterator) -> Iterator:
    """The same elements, each after the next has been made: the devices work on one while the other is stored."""
    return (last for last, _ in itertools.pairwise(itertools.chain(stream, [None])))


def on_host(part: Part, split: str, dtype: np.dtype) -> dict[str, Any]:
    """The rows of a part as they are stored, by name, and caption, a list of str."""
    captions = [item["caption"] for item in part.items]
    labels = [
        f"row {i} of {split} ({text or 'no caption':.60})" for i, text in zip(part.numbers, captions, strict=True)
    ]
    arrays = jax.device_get(part.arrays)
    kept = {name: stored(name, np.asarray(x)[: len(labels)], dtype, labels) for name, x in arrays.items()}
    return kept | {"caption": captions}
