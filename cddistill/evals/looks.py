"""What a protocol measures of images, by column: Inception's features, the CLIP score, distances from targets."""

import concurrent.futures
import functools
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from cddistill import generate, sharding
from cddistill.data.digests import of_path
from cddistill.evals import clip_score, grids, inception, scores
from cddistill.evals.inputs import Rows
from cddistill.evals.protocols import CLIP, PROMPTS, Protocol
from cddistill.evals.reference import TARGETS
from cddistill.net import Net
from cddistill.perceptual.lpips import WeightsMissing

Look = Callable[[list[np.ndarray], Rows], np.ndarray]  # images uint8 [h, w, 3] -> what is measured, a row for each


class Inception:
    """The network of a folder's weight file, on this host's own devices."""

    def __init__(self, folder: Path):
        file = folder / inception.FILE
        self.features = local(inception.load(file))
        self.digest = inception.digest(file)
        published = self.digest in inception.FILE
        self.departures = () if published else (f"{inception.FILE} is not the published file",)

    def of(self, view: Callable) -> Callable[[list[np.ndarray]], np.ndarray]:
        """Images, each seen in this way, to features [b, 2048]."""
        return lambda images: self.features(np.stack([*threads().map(view, images)]))


@functools.cache
def threads() -> concurrent.futures.ThreadPoolExecutor:
    """Threads that resize images: Pillow works without Python's lock."""
    return concurrent.futures.ThreadPoolExecutor()


def local(net: Net) -> Callable[[np.ndarray], np.ndarray]:
    """A network of one input on this host's own devices, rows split over them, in full float32."""
    mesh = sharding.make_mesh(devices=jax.local_devices())
    params = jax.device_put(net.params, sharding.replicated(mesh))
    program = scores.accurate(net.apply)

    def run(x):
        size = -(-len(x) // mesh.size) * mesh.size
        return np.asarray(program(params, jax.device_put(generate.pad(x, size), sharding.by_row(mesh))))[: len(x)]

    return run


def columns(protocol: Protocol, folder: Path, network: Inception) -> tuple[dict[str, Look], list[str]]:
    """({column: its look}, sentences on those whose weights are missing)."""
    found, missing = {}, []
    for column, view in protocol.views.items():
        see = network.of(view)
        found[column] = lambda images, rows, see=see: see(images)
        if protocol.given == "pairs":
            found[column + TARGETS] = lambda images, rows, see=see: see(list(grids.to_uint8(rows.targets)))
    wanted = {name: functools.partial(distances, name) for name in protocol.pairs}
    if protocol.clip is not None:
        wanted["CLIP score"] = functools.partial(clip_scores, protocol.clip, folder / CLIP)
    for column, load in wanted.items():
        try:
            found[column] = load()
        except WeightsMissing as error:
            missing.append(f"{column}: not computed ({error})")
    return found, missing


def distances(name: str) -> Look:
    """A metric of images, as they are stored in 8 bits, and their targets in [0, 1]."""
    metric = scores.PAIR_METRICS[name]()

    def look(images, rows):
        shown = {"": np.float32(np.stack(images)) / np.float32(255)}
        return next(iter(scores.pair_values(metric, shown, rows.targets).values()))

    return look


def clip_scores(before: str, folder: Path) -> Look:
    """The CLIP score of images and their prompts, with a text before each prompt."""
    model = clip_score.load(folder)
    return lambda images, rows: clip_score.score(model, [before + text for text in rows.texts], images)


def fingerprint(protocol: Protocol, folder: Path) -> dict[str, str]:
    """Fingerprints of the prompts and of CLIP's folder, as far as the protocol uses them."""
    found = {PROMPTS: of_path(str(folder / PROMPTS))} if protocol.given not in ("labels", "pairs") else {}
    return found | ({CLIP: of_path(str(folder / CLIP))} if protocol.clip is not None else {})
