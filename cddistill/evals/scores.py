"""Scores of sets of images against one set of targets, by named protocols, with standard errors."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cddistill import progress
from cddistill.evals import fidelity, kid, precision_recall
from cddistill.perceptual import efficientnet, lpips

Scores = dict[str, tuple[float, float] | None]  # metric -> (mean, standard error), or None if not computed


class Metric(NamedTuple):
    """Display and requirements of a metric, and a description for the report."""

    higher: bool | None  # True: higher is better; None: no better direction
    digits: int = 3  # decimals
    pixels: int = 1  # smallest image side
    images: int = 1  # smallest set
    how: str = ""  # how it is computed


KID = """1000 × the unbiased squared MMD, kernel (a·b/d + 1)³, of EfficientNet-Lite0's 1280 ImageNet features at {} px \
(bicubic, antialiased), standardised by the targets' statistics. No output is compared with its own target. Standard \
error by jackknife. Other real images score about 0. Not comparable with KID or FID on Inception features."""
FD = """Frechet distance of the KID features on the targets' first 64 principal axes. Biased upwards: compare only at \
equal numbers of images. Not comparable with FID."""
PRECISION = """Improved precision (k = 3) on the KID features: share of the images within the targets' manifold, i.e. \
realism. Compare only at equal numbers of images."""
RECALL = """Improved recall (k = 3) on the KID features: share of the targets within the images' manifold, i.e. \
coverage. A repetitive set has low recall."""
FID = "Frechet distance of Inception-v3's pool3 features, by a published protocol (docs/evaluation.md)."
METRICS = {
    "PSNR": Metric(True, 2, how="Peak signal-to-noise ratio in dB: pixel accuracy; rewards blur."),
    "SSIM": Metric(
        True, 4, fidelity.SMALLEST, how="Structural similarity in 11 px Gaussian windows, mean over channels."
    ),
    "LPIPS-VGG": Metric(False, 4, lpips.SMALLEST["vgg"], how="Perceptual distance, LPIPS v0.1 on VGG16."),
    "LPIPS-Alex": Metric(False, 4, lpips.SMALLEST["alex"], how="Perceptual distance, LPIPS v0.1 on AlexNet."),
    "KID-EffLite0@64": Metric(False, 1, images=3, how=KID.format(64)),
    "KID-EffLite0@224": Metric(False, 1, images=3, how=KID.format(224)),
    "FD-EffLite0-PCA64": Metric(False, 1, images=2 * kid.PCA, how=FD),
    "Precision-EffLite0": Metric(True, 3, images=precision_recall.NEIGHBOURS + 1, how=PRECISION),
    "Recall-EffLite0": Metric(True, 3, images=precision_recall.NEIGHBOURS + 1, how=RECALL),
    "FID": Metric(False, 2, how=FID),
    "Patch FID": Metric(False, 2, how=f"{FID} Of the 299 px in the middle of each image, not resized."),
    "Precision": Metric(True, 3, how="Improved precision (k = 3) on Inception-v3's features."),
    "Recall": Metric(True, 3, how="Improved recall (k = 3) on Inception-v3's features."),
    "CLIP score": Metric(True, 4, how="Mean cosine of the CLIP embeddings of an image and its prompt."),
    "Edge F1": Metric(True, 3, how="F1 of the image's Canny edges against the target's, with a tolerance of 1 px."),
}
WHOLE = {"": None}  # the region of `pair_values` that is all of the image
RECONSTRUCTION = "VAE's reconstruction of the target"  # the row of the targets, encoded and decoded
STUDENT = "student"  # what the names of rows of the network that was trained begin with
TO_TEACHER = " to the teacher"  # suffix of a metric whose targets are the teacher's samples from the same noise


def metric_of(column: str) -> Metric:
    """The metric of a column of the table: "PSNR", "PSNR to the teacher" or "PSNR in the hole"."""
    return next((m for name, m in METRICS.items() if column == name or column.startswith(f"{name} ")), Metric(None))


class NotComputed(ValueError):
    """A metric cannot be computed for these images; the message says why."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One row of the table: a set of images and its scores."""

    name: str
    metrics: Scores
    n: int  # images
    nfe: int | None = None  # network evaluations per image; None without a network, as for bicubic upscaling
    missing: tuple[str, ...] = ()  # metrics that were not computed, with reasons
    each: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict, compare=False, repr=False)  # by image [n]

    @property
    def competes(self) -> bool:
        """Whether it is ranked: the VAE's reconstruction is what a student on latents can reach at best."""
        return self.name != RECONSTRUCTION


class PairMetric(NamedTuple):
    """A metric of image pairs: features, computed once per image, and a function of two images' features."""

    features: Callable[[jax.Array], Any]  # of images [b,h,w,3] in [0, 1]
    compare: Callable[..., jax.Array]  # (output features, target features[, weights of pixels [b,h,w,1]]) -> [b]


class Measured(NamedTuple):
    """What is measured of sets of images, of a part of them or of all; the targets are the set ""."""

    columns: dict[str, tuple[str, tuple[str, ...]]]  # of the table: the set that is the reference, those compared
    n: dict[str, int]  # images of each set
    each: dict[str, dict[str, np.ndarray]]  # by set and column: a number for each image [n]
    features: dict[str, np.ndarray]  # by set: EfficientNet's [n, 1280]; {} if they are missing
    missing: dict[str, str]  # columns that are not computed, and why


def evaluate(
    sets: Mapping[str, Any], targets, *, nfe: Mapping[str, int] | None = None, paired: bool = True, teacher: str = ""
) -> list[Row]:
    """One row per set of images: `measure` and `table` of all images at once. `nfe` has the network evaluations per
    image of each generated set."""
    return table(measure(sets, targets, paired=paired, teacher=teacher), nfe)


def measure(sets: Mapping[str, Any], targets, *, paired: bool = True, teacher: str = "", first: int = 0) -> Measured:
    """What is measured of sets of images, float [n,h,w,c] in [0, 1] with c = 1 or 3, against targets of the same shape.

    `paired` means that target i is the ground truth of output i. Otherwise only distances between sets are computed,
    and the numbers of images may differ. `teacher` names a set, sampled from the same noise, that the others are also
    compared with, as sets and image by image. If targets are None, it is the only comparison. A part may be measured at
    a time, of images from number `first` on: `joined`. Raises ValueError for images of other ranges or shapes.
    """
    sets = {name: as_rgb(name, images, first) for name, images in sets.items()}
    all_sets = sets if targets is None else {"": as_rgb("targets", targets, first), **sets}
    shape = next(iter(all_sets.values())).shape
    for name, images in sets.items():
        if images.shape[1:] != shape[1:] or (paired and len(images) != shape[0]):
            raise ValueError(f"{name!r} has images of shape {images.shape}, their targets {shape}")
    size = 64 if max(shape[1:3]) <= 64 else 224
    of_sets = [f"KID-EffLite0@{size}", "FD-EffLite0-PCA64"]
    of_sets += [] if paired else ["Precision-EffLite0", "Recall-EffLite0"]  # trivial for outputs near their targets
    columns = comparisons([*sets], targets is not None, of_sets, paired, teacher)
    each, missing, features = {name: {} for name in sets}, {}, {}
    for column, (reference, names) in progress.each("scoring", columns.items()):
        metric = column.removesuffix(TO_TEACHER)
        try:
            if metric in PAIR_METRICS:
                require(metric, shape[1:3])
                compared = {name: sets[name] for name in names}
                for (name, _), by_image in pair_values(PAIR_METRICS[metric](), compared, all_sets[reference]).items():
                    each[name][column] = by_image
            else:
                features = features or extract(size, all_sets)
        except (NotComputed, lpips.WeightsMissing) as error:
            missing[column] = str(error)
    return Measured(columns, {name: len(x) for name, x in all_sets.items()}, each, features, missing)


def joined(parts: Sequence[Measured]) -> Measured:
    """What is measured of all images, from parts that follow each other."""
    n = {name: sum(part.n[name] for part in parts) for name in parts[0].n}
    each = {
        name: {column: np.concatenate([part.each[name][column] for part in parts]) for column in columns}
        for name, columns in parts[0].each.items()
    }
    features = {name: np.concatenate([part.features[name] for part in parts]) for name in parts[0].features}
    return parts[0]._replace(n=n, each=each, features=features)


def table(found: Measured, nfe: Mapping[str, int] | None = None) -> list[Row]:
    """One row per set. A metric that cannot be computed (weights not installed, too few or too small images) is None;
    `Row.missing` has the reason."""
    scores, missing = {name: {} for name in found.each}, []
    for column, (reference, names) in found.columns.items():
        metric, why = column.removesuffix(TO_TEACHER), found.missing.get(column, "")
        if not why and min(found.n[name] for name in (reference, *names)) < METRICS[metric].images:
            why = f"needs at least {METRICS[metric].images} images"
        elif not why and metric in SET_METRICS and not kid.varies(found.features[reference]):
            why = "most features are the same in all images that it compares with: evaluate more of them"
        if why:
            values = dict.fromkeys(names)
            missing.append(f"{column}: not computed ({why})")
        elif metric in PAIR_METRICS:
            values = {name: mean_and_error(found.each[name][column]) for name in names}
        else:
            values = set_scores(metric, found.features, reference, names)
        for name in names:
            scores[name][column] = values[name]
    calls, reasons = nfe or {}, tuple(missing)
    return [Row(name, scores[name], found.n[name], calls.get(name), reasons, x) for name, x in found.each.items()]


def comparisons(names: list[str], targets: bool, of_sets, paired: bool, teacher: str):
    """`Measured.columns` of these sets, with targets or without."""
    columns = {}
    if targets:
        columns = {metric: ("", tuple(names)) for metric in (*(PAIR_METRICS if paired else ()), *of_sets)}
    if teacher:
        others = tuple(name for name in names if name not in (teacher, RECONSTRUCTION))
        same_noise = (*of_sets, "PSNR", "LPIPS-VGG")
        columns |= {metric + TO_TEACHER: (teacher, others) for metric in same_noise if others}
    return columns


def markdown(rows: Iterable[Row]) -> str:
    """The table in Markdown, aligned to be read as plain text."""
    rows = list(rows)
    names = columns_of(rows)
    head = ["", "network calls", "images", *(f"{m} {arrow(m)}".strip() for m in names)]
    body = [[r.name, str(r.nfe or "–"), str(r.n), *(cell(m, r.metrics.get(m)) for m in names)] for r in rows]
    width = [max(len(line[i]) for line in [head, *body]) for i in range(len(head))]
    lines = ["| " + " | ".join(x.ljust(w) for x, w in zip(line, width, strict=True)) + " |" for line in [head, *body]]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in width) + "|", *lines[1:]])


def columns_of(rows) -> list[str]:
    """Metrics with a value in at least one row: those of METRICS first, in their order."""
    present = dict.fromkeys(m for row in rows for m, value in row.metrics.items() if value is not None)
    return [m for m in METRICS if m in present] + [m for m in present if m not in METRICS]


def arrow(metric: str) -> str:
    """An arrow in the better direction, or ""."""
    return {True: "↑", False: "↓", None: ""}[metric_of(metric).higher]


def cell(metric: str, value) -> str:
    """'0.1234 ± 0.0012', or a dash without a value."""
    if value is None:
        return "–"
    digits = metric_of(metric).digits
    mean, error = value
    if not np.isfinite(error):
        return f"{mean:.{digits}f}"
    return f"{mean:.{digits}f} ± " + (f"{error:.0e}" if 0 < error < 0.5 * 10**-digits else f"{error:.{digits}f}")


def as_rgb(name, images, begin: int = 0) -> np.ndarray:
    """Images, whose numbers begin there, as float32 [n,h,w,3]. Raises ValueError for other shapes, types or ranges than
    `measure` takes."""
    images = np.asarray(images)
    if images.ndim != 4 or images.shape[3] not in (1, 3) or not len(images):
        raise ValueError(f"{name!r} has shape {images.shape}, not [n, h, w, 1 or 3] with n > 0")
    if not np.issubdtype(images.dtype, np.floating):
        raise ValueError(f"{name!r} is {images.dtype}: divide by 255 for floats in [0, 1]")
    low, high = images.min(), images.max()
    if not (low >= -1e-4 and high <= 1.0001):  # also False for nan
        first = np.flatnonzero(~((images >= -1e-4) & (images <= 1.0001)).all((1, 2, 3)))[0]
        raise ValueError(f"{name!r} has values from {low} to {high}, not in [0, 1]; image {begin + first} is the first")
    return np.repeat(images, 3 // images.shape[3], 3).astype(np.float32)


def require(metric, sides):
    """Raise NotComputed if images of these sides are too small for a metric."""
    if min(sides) < METRICS[metric].pixels:
        raise NotComputed(f"needs images of at least {METRICS[metric].pixels} px")


def pair_values(metric: PairMetric, sets, targets, regions: Mapping[str, Any] = WHOLE) -> dict[tuple, np.ndarray]:
    """{(set, region): a metric of image pairs, float64 [n]}; regions are weights of pixels [n,h,w], or None for all."""
    values = {(name, region): [] for name in sets for region in regions}
    for rows in batches(targets):
        target = metric.features(padded(targets, rows))
        weights = {r: () if w is None else (padded(w[..., None], rows),) for r, w in regions.items()}
        for name, images in sets.items():
            features = metric.features(padded(images, rows))
            for region, given in weights.items():
                values[name, region].append(np.asarray(metric.compare(features, target, *given)))
    return {key: np.concatenate(v)[: len(targets)].astype(np.float64) for key, v in values.items()}


def mean_and_error(values: np.ndarray) -> tuple[float, float]:
    """Mean of values [n] and its standard error, NaN for a single one."""
    return values.mean(), values.std(ddof=1) / len(values) ** 0.5 if len(values) > 1 else np.nan


def set_scores(metric, features, reference, names) -> dict[str, tuple[float, float]]:
    """A metric between sets, by set, on features standardised by the reference set."""
    real = kid.standardized(features[reference], features[reference])
    return {name: SET_METRICS[metric](kid.standardized(features[name], features[reference]), real) for name in names}


def extract(size, sets) -> dict[str, np.ndarray]:
    """EfficientNet-Lite0 features [n, 1280] by set."""
    net = feature_extractor(size)
    features = lambda images: np.concatenate([net(padded(images, rows)) for rows in batches(images)])[: len(images)]
    return {name: features(images) for name, images in sets.items()}


def batches(images) -> list[slice]:
    """Slices of equal size: up to 64 images, above 128 px a power of two below. The last may exceed the images."""
    fit = max(1, 2**20 // (images.shape[1] * images.shape[2]))
    size = min(64, len(images), 1 << fit.bit_length() - 1)
    return [slice(i, i + size) for i in range(0, len(images), size)]


def padded(images, rows: slice):
    """images[rows], padded with zero images, so that a network is compiled only once."""
    part = images[rows]
    return np.pad(part, ((0, rows.stop - rows.start - len(part)), (0, 0), (0, 0), (0, 0)))


def accurate(f):
    """jit(f) with full float32 matrix products, which accelerators round by default."""

    def call(*args):
        with jax.default_matmul_precision("highest"):
            return jitted(*args)

    jitted = jax.jit(f)
    return call


@functools.cache
def feature_extractor(size: int):
    """Images [b,h,w,3] in [0, 1] -> EfficientNet-Lite0 features [b,1280] at size x size px."""
    net = efficientnet.load()
    resize = lambda x: jnp.clip(jax.image.resize(x, (len(x), size, size, 3), "cubic", antialias=True), 0.0, 1.0)
    return functools.partial(accurate(lambda net, x: net(resize(x))), jax.device_put(net))


@functools.cache
def lpips_metric(trunk: str) -> PairMetric:
    """LPIPS with its network loaded and compiled only once."""
    params = jax.device_put(lpips.load(trunk).params)
    trunk_features = {"vgg": lpips.vgg_features, "alex": lpips.alex_features}[trunk]
    features = accurate(lambda params, x: trunk_features(params, x * 2.0 - 1.0))
    return PairMetric(functools.partial(features, params), functools.partial(accurate(lpips.distance), params))


PAIR_METRICS = {  # functions that load them
    "PSNR": functools.cache(lambda: PairMetric(np.asarray, accurate(fidelity.psnr))),
    "SSIM": functools.cache(lambda: PairMetric(np.asarray, accurate(fidelity.ssim))),
    "LPIPS-VGG": functools.partial(lpips_metric, "vgg"),
    "LPIPS-Alex": functools.partial(lpips_metric, "alex"),
}
SET_METRICS = {
    "KID-EffLite0@64": kid.kid,
    "KID-EffLite0@224": kid.kid,
    "FD-EffLite0-PCA64": kid.frechet,
    "Precision-EffLite0": precision_recall.precision,
    "Recall-EffLite0": precision_recall.recall,
}
