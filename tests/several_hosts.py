"""One of several processes that work together: `python several_hosts.py FOLDER TEACHER VAE PICTURES MODE...`.

test_several_hosts.py starts them and sets their environment. `train:2` trains up to step 2 and writes no report; `rows`
trains on what `encode` wrote. What they make is below FOLDER, and decoded-<host>.json: the images that a host has
decoded, or the encoded rows that it has read, {mode: {train step or "": their numbers in the order of reading}}.
"""

import collections
import functools
import sys
import threading

import jax
from jax.experimental import multihost_utils

from cddistill import commands, config, io, sharding, train
from cddistill.data import encoded, loader

STEPS, BATCH, ROWS = 4, 8, 32


def settings(mode, teacher, vae, pictures, folder=None):
    """A class-conditional student of 8 px images, and what encodes images of 16 px, of two devices or more."""
    mode, _, steps = mode.partition(":")
    c = config.defaults("dmd2" if mode == "pairs" else "diffusion")
    c.update(teacher=str(vae if mode in ("encode", "rows") else teacher), steps=STEPS, batch_size=BATCH, log_every=1)
    c.data.update(source="webdataset", path=str(pictures), size=16 if mode == "encode" else 8, split="all")
    c.data.num_classes = 9
    if mode == "pairs":
        c.update(num_pairs=ROWS, pairs_shard=4, pairs_batch=4, teacher_steps=(2,))
    elif mode == "encode":
        c.update(batch_size=4, encode_shard=4)  # shards for every host
    else:
        c.update(checkpoint_every=2, eval_every=2, eval_images=4, sample_steps=(2,))
    c.data.buckets = {"buckets": "8x8,16x8", "encode": "16x16,32x16"}.get(mode, "")
    if mode == "rows":
        c.data.update(source="arrays", path=str(folder / "encode"))
    c.update(steps=int(steps), report=False) if steps else None
    return c


def work(mode, c, folder):
    """Run a mode."""
    run = folder / "run"
    if mode in ("buckets", "rows") or mode.startswith("train"):
        train.train(c, run if mode.startswith("train") else folder / mode)
    elif mode == "evaluate":
        (run / "scores.json").unlink(missing_ok=True) if sharding.is_host0() else None
        commands.evaluate_run(c, run)
    elif mode == "sample":
        commands.sample(c, run, None, str(folder / "sample.png"), n=4)
    elif mode == "export":
        commands.export_run(c, run, str(folder / "export"))
    else:
        {"encode": commands.encode_data, "pairs": commands.make_pairs}[mode](c, folder / mode)


def counting(decoded):
    """Note the numbers of the images that are decoded and of the rows that are read, by the step of their batch."""
    step, item, usable = threading.local(), loader.Steps.__getitem__, loader.Pixels.usable
    row = encoded.EncodedItems.item

    def get(self, k):
        step.now = k if self.batch_size == BATCH else ""  # that of the checks before the first step is smaller
        try:
            return item(self, k)
        finally:
            step.now = ""

    def note(i):
        decoded[str(getattr(step, "now", ""))].append(int(i))

    def noted(self, i, rng):
        note(i)
        return usable(self, i, rng)

    def noted_row(self, i, rng=None):
        note(self.manifest.get("first", 0) + i)
        return row(self, i, rng)

    loader.Steps.__getitem__, loader.Pixels.usable, encoded.EncodedItems.item = get, noted, noted_row


if __name__ == "__main__":
    folder, places, modes = io.path(sys.argv[1]), sys.argv[2:5], sys.argv[5:]
    initialize = functools.partial(jax.distributed.initialize, shutdown_timeout_seconds=5)  # if another host fails
    jax.distributed.initialize = initialize
    sharding.initialize()
    found = {mode: collections.defaultdict(list) for mode in modes}
    current = collections.defaultdict(list)
    counting(current)
    for mode in modes:
        work(mode, settings(mode, *places, folder), folder)
        multihost_utils.sync_global_devices(mode)
        found[mode] = {step: list(numbers) for step, numbers in current.items()}
        current.clear()
    io.write_json(folder / f"decoded-{jax.process_index()}.json", found)
    sharding.wait_for_others()
