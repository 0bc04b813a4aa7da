"""Stable Diffusion 1.5 at its full size with random weights, for test_full_size.py: python tests/full_size.py WHAT ...

    make FOLDER              the pipeline's folder: 1.1 billion float16 weights, 2.1 GB
    images FOLDER            four images of 512 px with captions, in folders of splits
    ours FOLDER OUTPUT       the UNet's output by cddistill, float32, to OUTPUT.npy
    theirs FOLDER OUTPUT     the same by PyTorch diffusers
    measure REPORT COMMAND   run a command; its seconds and peak memory in GB to REPORT, as JSON

The shapes are those of the configs in cddistill/models/architectures. Kernels are N(0, 1/fan_in), norms and biases are
near 1 and 0, and no layer is zero, not even those that are zero in a new network, so activations stay about as large as
in a trained network and every layer counts.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

NAME, WIDTH, SIZE, SEED = "stable-diffusion-v1-5", 768, 64, 0  # SIZE: pixels of a latent's side
FILLER = "filler{}</w>"  # tokens that no text has, up to CLIP's 49,408


def make(folder: Path) -> None:
    """Write the diffusers folder. No network is built: its weights are drawn, stored and forgotten part by part."""
    import numpy as np

    from cddistill import io, models, outline

    source = outline.ARCHITECTURES / NAME
    rng = np.random.default_rng(SEED)
    for part in ("vae", "text_encoder", "unet"):
        config = io.read_json(source / part / "config.json")
        shapes = models.load(source, part, shapes=True).params
        models.save(folder, part, drawn(shapes, rng), config)
    shutil.copytree(source / "scheduler", folder / "scheduler", dirs_exist_ok=True)
    write_tokenizer(folder / "tokenizer")
    index = io.read_json(source / "model_index.json")
    io.write_json(folder / "model_index.json", index | {"tokenizer": ["transformers", "CLIPTokenizer"]})


def drawn(shapes, rng):
    """Random float16 weights for a tree of shapes."""
    import jax
    import numpy as np

    def one(path, shape):
        name, x = path[-1].key, rng.standard_normal(shape.shape, np.float32)
        if name == "kernel":
            x /= np.sqrt(np.prod(shape.shape[:-1]))
        else:
            x *= 0.1
        return (x + (name == "scale")).astype(np.float16)

    return jax.tree_util.tree_map_with_path(one, shapes)


def write_tokenizer(folder: Path) -> None:
    """CLIP's tokenizer without merges: every letter is a token, and the ends have the ids of the published one."""
    from tokenizers import pre_tokenizers

    from cddistill.models.tokenizer import END, START
    from cddistill.precompute import make_pocket

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*letters, *(letter + "</w>" for letter in letters)]
    tokens += [FILLER.format(i) for i in range(49408 - 2 - len(tokens))]
    make_pocket.write_tokenizer(folder, {token: i for i, token in enumerate([*tokens, START, END])}, [])


def images(folder: Path) -> None:
    """Smooth random colours: two images to train on, one each to validate and to test."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(SEED)
    for name in ("train/a", "train/b", "validation/c", "test/d"):
        path = folder / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        small = Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8))
        small.resize((8 * SIZE, 8 * SIZE), Image.Resampling.BICUBIC).save(path)
        path.with_suffix(".txt").write_text(f"colours of {path.stem}")


def inputs():
    """z_t [1, 64, 64, 4], timestep and text [1, 77, 768] of the forward pass."""
    import numpy as np

    rng = np.random.default_rng(SEED)
    return (
        rng.standard_normal((1, SIZE, SIZE, 4), np.float32),
        np.array([501], np.int32),
        rng.standard_normal((1, 77, WIDTH), np.float32),
    )


def ours(folder: Path, output: Path) -> None:
    """The UNet's output as the programs of a run compute it."""
    import jax
    import numpy as np

    from cddistill import models, sharding

    z_t, t, text = inputs()
    timed = Watch()
    net = models.load(folder, "unet")
    jax.block_until_ready(net)
    timed("load")
    program = jax.jit(sharding.inside(sharding.make_mesh(), lambda net, *args: net.apply(net.params, *args)))
    compiled = program.lower(net, z_t, t, {"encoder_hidden_states": text}).compile()
    timed("compile")
    out = np.asarray(compiled(net, z_t, t, {"encoder_hidden_states": text}))
    timed("forward")
    np.save(output, out)


def theirs(folder: Path, output: Path) -> None:
    """The UNet's output by PyTorch diffusers, which loads the same float16 weights as float32."""
    import diffusers
    import numpy as np
    import torch

    z_t, t, text = map(torch.from_numpy, inputs())
    timed = Watch()
    net = diffusers.UNet2DConditionModel.from_pretrained(folder, subfolder="unet", torch_dtype=torch.float32)
    timed("load")
    with torch.no_grad():
        out = net(z_t.permute(0, 3, 1, 2), t, text).sample
    timed("forward")
    np.save(output, out.permute(0, 2, 3, 1).numpy())


class Watch:
    """Prints the seconds since it was last asked."""

    def __init__(self):
        self.last = time.monotonic()

    def __call__(self, what: str) -> None:
        now = time.monotonic()
        print(f"{what} {now - self.last:.1f} s", flush=True)
        self.last = now


def measure(report: Path, command: list[str]) -> int:
    """Run a command and write what it took; returns its exit status.

    This process is small: Linux counts the memory of the process that starts another one to the other's peak.
    """
    began, process = time.monotonic(), subprocess.Popen(command)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    took = {"seconds": time.monotonic() - began, "cpu_seconds": usage.ru_utime + usage.ru_stime}
    unit = 1 if sys.platform == "darwin" else 1024  # bytes
    report.write_text(json.dumps(took | {"peak_gb": usage.ru_maxrss * unit / 1e9}))
    return process.returncode


if __name__ == "__main__":
    what, place, *rest = sys.argv[1:]
    if what == "measure":
        sys.exit(measure(Path(place), rest))
    {"make": make, "images": images, "ours": ours, "theirs": theirs}[what](Path(place), *map(Path, rest))
