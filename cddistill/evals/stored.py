"""Images that a baseline has generated before, kept in its folder: many steps of it may take longer than all the rest.

A file samples/<n>-steps.safetensors has the images and says of what they are. They are used if all is the same:
weights, sampler, seed, conditions and texts.
"""

import hashlib
import json
from pathlib import Path

import jax
import numpy as np
import safetensors.numpy

from cddistill import io
from cddistill.checksums import crc32
from cddistill.generate import Student
from cddistill.models import files
from cddistill.models.fingerprint import fingerprint

MOST = 2**16 - 1


def path_of(folder: Path, steps: int) -> Path:
    """The file for a number of steps."""
    return Path(folder) / "samples" / f"{steps}-steps.safetensors"


def number(folder: Path, steps: int) -> int:
    """How many images are stored for a number of steps."""
    path = path_of(folder, steps)
    header = files.safetensors_header(path)[0] if path.is_file() else {}
    return header["images"]["shape"][0] if "images" in header else 0


def find(folder: Path, student: Student, batch, steps: int, seed: int) -> np.ndarray | None:
    """Images [n, h, w, c] in [0, 1] as `generate.sample` would generate them, to 1e-5; None if they are not stored."""
    path = path_of(folder, steps)
    if not path.is_file():
        return None
    said = files.safetensors_header(path)[0].get("__metadata__")
    if said != {"of": description(student, batch, steps, seed)}:
        return None
    return np.float32(safetensors.numpy.load_file(path)["images"]) / MOST


def write(folder: Path, student: Student, batch, steps: int, seed: int, images: np.ndarray) -> Path:
    """Store images [n, h, w, c] in [0, 1], rounded to 16 bits; returns the file. With 8, KID would be 2 % higher."""
    found = {"images": np.uint16(np.round(images * MOST))}
    content = safetensors.numpy.save(found, {"of": description(student, batch, steps, seed)})
    io.write_atomic(path := path_of(folder, steps), content)
    return path


def description(student: Student, batch, steps: int, seed: int) -> str:
    """What the images depend on. Conditions count in 8 bits, so that platforms may round differently."""
    networks = {name: student.frozen[name].params for name in ("teacher", "controlnet")}
    inputs = {name: x for name, x in batch.items() if name != "x0"} | {"shape": np.array(batch["x0"].shape)}
    rounded = lambda x: np.round(x * 255).astype(np.int64) if np.issubdtype(x.dtype, np.floating) else np.int64(x)
    sums = [crc32(rounded(np.asarray(x))) for x in jax.tree.leaves(inputs)]
    said = {"weights": fingerprint(networks), "sampling": repr(student.method), "steps": steps, "seed": seed}
    return json.dumps(said | {"inputs": hashlib.sha256("".join(sums).encode()).hexdigest()[:16]})
