"""What the images of a protocol are generated from: labels in turn, the lines of a file of prompts, or a test split.

Each function of GIVEN makes rows(numbers) -> Rows of this host's part of a batch, from the numbers of all of its rows.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from cddistill import data, generate, pipeline
from cddistill.build import Parts
from cddistill.evals.protocols import PROMPTS, Protocol
from cddistill.evals.stream import mine


class Rows(NamedTuple):
    """This host's rows of a batch."""

    batch: dict[str, Any]  # what a student takes, with "index"
    texts: list[str] | None = None  # the prompts
    targets: np.ndarray | None = None  # images [b, h, w, 3] in [0, 1]


def labels(parts: Parts, protocol: Protocol, folder: Path, n: int) -> Callable[[np.ndarray], Rows]:
    """Row i has the label i modulo the number of classes. Raises ValueError for a teacher without labels."""
    classes = parts.experiment.data.num_classes
    if "class_labels" not in parts.batch["text"]:
        raise ValueError("this protocol generates from class labels, and the teacher of this run takes none")

    def rows(numbers):
        own = mine(numbers).astype(np.int32)
        text = {"text": {"class_labels": own % classes}, "null": {"class_labels": np.full_like(own, classes)}}
        return Rows(empty(parts, own) | text)

    return rows


def prompts(parts: Parts, protocol: Protocol, folder: Path, n: int) -> Callable[[np.ndarray], Rows]:
    """Row i has line i of the prompts. Raises ValueError for too few lines, and for a teacher without text encoders."""
    texts = read_prompts(folder / PROMPTS, n)
    encoders = pipeline.of_run(parts.experiment.run).prompts  # on this host alone, whose prompts are its own
    if encoders is None:
        raise ValueError(
            f"this protocol generates from prompts, and {parts.experiment.run.teacher} has no text encoder"
        )
    sizes = {"target_size": image_size(parts)}
    embed, null = (lambda lines: jax.device_get(encoders(lines, **sizes))), jax.device_get(encoders.null(1, **sizes))
    if parts.experiment.method.requires().text_encoder:  # the student has one of its own
        embed = lambda lines: {"input_ids": encoders.tokenize(lines)[0]}
        null = embed([""])

    def rows(numbers):
        own = mine(numbers).astype(np.int32)
        lines = [texts[i] for i in own]
        text = {"text": embed(lines), "null": jax.tree.map(lambda x: np.repeat(x, len(own), 0), null)}
        return Rows(empty(parts, own) | text, lines)

    return rows


def pairs(parts: Parts, protocol: Protocol, folder: Path, n: int) -> Callable[[np.ndarray], Rows]:
    """Row i has the condition of image i of the run's test split, degraded as in every evaluation.

    Raises ValueError for a task without a condition, and for a test split of fewer images.
    """
    config = parts.experiment.data
    if not config.task.conditional:
        raise ValueError("this protocol restores degraded images: set data.task to the task of this run")
    there = len(data.load(config, "test", augment=False))
    if there < n:
        raise ValueError(f"the test split has {there} images, and {n} are asked for: set protocol_images")

    def rows(numbers):
        examples = generate.examples_of(parts, "test", numbers)
        batch = generate.batch_of(parts, examples) | {"index": numbers.astype(np.int32)}
        return Rows(jax.tree.map(mine, batch), targets=mine(generate.targets(parts, examples)))

    return rows


GIVEN = {"labels": labels, "prompts": prompts, "pairs": pairs}


def image_size(parts: Parts) -> tuple[int, int]:
    """Height and width of the images that a run generates, in pixels."""
    autoencoder = parts.frozen["autoencoder"]
    return jax.eval_shape(type(autoencoder).images, autoencoder, parts.batch["x0"]).shape[1:3]


def empty(parts: Parts, index: np.ndarray) -> dict[str, Any]:
    """x0, of which only the shape counts, and the numbers that noise follows."""
    return {"x0": np.zeros((len(index), *parts.batch["x0"].shape[1:]), np.float32), "index": index}


def read_prompts(path: Path, n: int) -> list[str]:
    """The first n lines of a text file. Raises ValueError if it is missing or has fewer."""
    if not path.is_file():
        raise ValueError(f"{path} is not there: write a text file with a prompt in each line to it")
    try:
        lines = path.read_text("utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text in UTF-8 ({error}): save it as such") from error
    if len(lines) < n:
        raise ValueError(f"{path} has {len(lines)} prompts, and {n} are asked for: add some, or set protocol_images")
    return lines[:n]
