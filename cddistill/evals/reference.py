"""What a protocol compares generated images with: published statistics, a folder of images, or each image's target."""

from collections.abc import Callable
from pathlib import Path, PurePath
from typing import NamedTuple

import numpy as np

from cddistill.data import images as pictures
from cddistill.data import listing
from cddistill.data.digests import of_files
from cddistill.evals import frechet, precision_recall, scores, stream
from cddistill.evals.inception import FEATURES
from cddistill.evals.protocols import IMAGES, Protocol

TARGETS = " of the targets"  # suffix of the features of the images that outputs should be


class Reference(NamedTuple):
    """The other set. Both functions take a column, the folder of what was measured of the outputs, and their number."""

    gaussian: Callable[[str, PurePath, int], frechet.Gaussian]
    features: Callable[[str, PurePath, int], np.ndarray] | None  # [m, 2048]; None: only moments are known
    departures: tuple[str, ...] = ()  # from the protocol

    def compare(self, protocol: Protocol, folder: PurePath, n: int) -> scores.Scores:
        """FID by column and, on the features of the first, precision and recall (k = 3) where the reference has them.

        The numbers are distances of sets: they have no standard error.
        """
        found = {}
        for column in protocol.views:
            ours = stream.gaussian(folder, column, n)
            found[column] = (frechet.distance(ours, self.gaussian(column, folder, n)), np.nan)
        if self.features is not None:
            first = next(iter(protocol.views))
            x, real = (np.asarray(f(first, folder, n), np.float64) for f in (generated, self.features))
            if min(len(x), len(real)) > precision_recall.NEIGHBOURS:
                found |= {"Precision": precision_recall.precision(x, real), "Recall": precision_recall.recall(x, real)}
        return found


def generated(column: str, folder: PurePath, n: int) -> np.ndarray:
    """The features of the outputs."""
    return stream.array(folder, column, n)


def of_targets() -> Reference:
    """The target of each output, measured beside it."""
    return Reference(
        lambda column, folder, n: stream.gaussian(folder, column + TARGETS, n),
        lambda column, folder, n: stream.array(folder, column + TARGETS, n),
    )


def of_statistics(file: Path) -> Reference:
    """Published moments. Raises ValueError if the file is missing or holds anything else."""
    if not file.is_file():
        raise ValueError(f"{file} is not there: download the reference statistics of this protocol to it")
    known = frechet.read(file, FEATURES)
    return Reference(lambda column, folder, n: known, None)


def of_images(protocol: Protocol, folder: Path, place: PurePath, looks: dict, identity: dict, batch: int) -> Reference:
    """All images below a folder, measured once; looks are functions of a list of images, by column.

    Raises ValueError if there are none, or one cannot be read.
    """
    names = sorted(filter(pictures.is_image, listing.files_below(folder))) if folder.is_dir() else []
    if not names:
        count = f"{protocol.references:,}"
        raise ValueError(f"{folder}/ has no images: copy the {count} of this protocol's reference to it")

    def measure(numbers):
        images = [np.asarray(pictures.read(folder / names[i])) for i in stream.mine(numbers)]
        return {column: look(images) for column, look in looks.items()}

    stream.measure_all(place, identity | {"pictures": of_files(folder, names)}, len(names), batch, measure, "reference")
    departures = (f"a reference of {len(names):,} images, not {protocol.references:,}",)
    return Reference(
        lambda column, _, n: stream.gaussian(place, column, len(names)),
        lambda column, _, n: stream.array(place, column, len(names)),
        departures * (len(names) != protocol.references),
    )


def opened(protocol: Protocol, folder: Path, place: PurePath, looks: dict, identity: dict, batch: int) -> Reference:
    """The reference of a protocol: see the functions above."""
    if protocol.statistics:
        return of_statistics(folder / protocol.statistics)
    if protocol.references:
        return of_images(protocol, folder / IMAGES, place, looks, identity, batch)
    return of_targets()
