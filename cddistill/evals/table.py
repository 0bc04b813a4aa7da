"""Scores of sets of images against one set of targets: by named protocols, with standard errors."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cddistill.evals import kid, manifold, pairs
from cddistill.models import efficientnet, lpips

Scores = dict[str, tuple[float, float] | None]  # metric -> (mean, standard error); None: could not be computed


class Metric(NamedTuple):
    """How to read a metric, what it needs and how it is computed."""

    higher: bool | None  # is better; None: neither is
    digits: int = 3  # after the point
    pixels: int = 1  # smallest image
    images: int = 1  # smallest set
    how: str = ""


KID = """1000 × the unbiased squared MMD, kernel (a·b/d + 1)³, of EfficientNet-Lite0's 1280 ImageNet features at {} px \
(bicubic, antialiased), standardised by the targets'; no output is compared with its own target; error by jackknife. \
Other real images score about 0. Not comparable with KID or FID on Inception features."""
FD = """Frechet distance of KID's features on the targets' first 64 principal axes. Biased upwards: compare it at \
equal numbers of images only. Not comparable with FID."""
PRECISION = """Share of the images that lie among the targets (k = 3) in KID's features: realism. Compare it at equal \
numbers of images only."""
RECALL = """Share of the targets that lie among the images, likewise: coverage. A set that repeats itself has little."""
METRICS = {
    "PSNR": Metric(True, 2, how="Peak signal-to-noise ratio in dB: how exactly pixels are restored; rewards blur."),
    "SSIM": Metric(True, 4, pairs.SMALLEST, how="Structural similarity in 11 px Gaussian windows, mean over channels."),
    "LPIPS-VGG": Metric(False, 4, lpips.SMALLEST["vgg"], how="Perceptual distance, LPIPS v0.1 on VGG16."),
    "LPIPS-Alex": Metric(False, 4, lpips.SMALLEST["alex"], how="Perceptual distance, LPIPS v0.1 on AlexNet."),
    "KID-EffLite0@64": Metric(False, 1, images=3, how=KID.format(64)),
    "KID-EffLite0@224": Metric(False, 1, images=3, how=KID.format(224)),
    "FD-EffLite0-PCA64": Metric(False, 1, images=2 * kid.PCA, how=FD),
    "Precision-EffLite0": Metric(True, 3, images=manifold.NEIGHBOURS + 1, how=PRECISION),
    "Recall-EffLite0": Metric(True, 3, images=manifold.NEIGHBOURS + 1, how=RECALL),
}


TO_TEACHER = " to the teacher"  # behind a metric's name: its targets are the teacher's samples from the same noise


def known(metric: str) -> Metric:
    """How to read a metric by its name in a table."""
    return METRICS.get(metric.removesuffix(TO_TEACHER), Metric(None))


class NotComputed(ValueError):
    """A metric does not apply to these images."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of a table: a set of images and its scores."""

    name: str
    metrics: Scores
    n: int  # images
    nfe: int | None = None  # network evaluations per image; None where no network runs, as in bicubic upscaling
    note: str = ""
    missing: tuple[str, ...] = ()  # metrics that could not be computed, and why


class Judge(NamedTuple):
    """A metric of pairs: what it takes from every image, once, and how it compares two of these."""

    see: Callable[[jax.Array], Any]  # of images [b,h,w,3] in [0, 1]
    compare: Callable[[Any, Any], jax.Array]  # -> [b]


def score(outputs, targets, *, paired: bool = True) -> Scores:
    """Scores of one set: see `evaluate`, which is faster for several."""
    return evaluate({"outputs": outputs}, targets, paired=paired)[0].metrics


def evaluate(
    sets: Mapping[str, Any], targets, *, nfe: Mapping[str, int] | None = None, paired: bool = True, teacher: str = ""
) -> list[Row]:
    """One row per set of images, float [n,h,w,c] in [0, 1] with c = 1 or 3, against targets of the same shape.

    `paired` says that output i should look like target i; without it only distances of whole sets are computed, and the
    numbers of images may differ. `nfe` has the network evaluations per image of each set that a network made. `teacher`
    names a set that the others are compared with too, image by image as well, for they come from the same noise; where
    targets are None it is all that they are compared with. A metric that cannot be computed (weights not installed,
    images too few or too small) is None: `Row.missing` has the reason. Raises ValueError for images of other ranges or
    shapes.
    """
    sets = {name: checked(name, images) for name, images in sets.items()}
    all_sets = sets if targets is None else {None: checked("targets", targets), **sets}
    shape = next(iter(all_sets.values())).shape
    for name, images in sets.items():
        if images.shape[1:] != shape[1:] or (paired and len(images) != shape[0]):
            raise ValueError(f"{name!r} has images of shape {images.shape}, their targets {shape}")
    size = 64 if max(shape[1:3]) <= 64 else 224
    whole = [f"KID-EffLite0@{size}", "FD-EffLite0-PCA64"]
    whole += [] if paired else ["Precision-EffLite0", "Recall-EffLite0"]  # a restoration lies beside its target
    features = functools.cache(lambda: extract(size, all_sets))
    wanted = {}
    if targets is not None:
        wanted = {metric: (None, all_sets[None], sets) for metric in (*(JUDGES if paired else ()), *whole)}
    if teacher:
        others = {name: images for name, images in sets.items() if name != teacher}
        same_noise = (*whole, "PSNR", "LPIPS-VGG")
        wanted |= {metric + TO_TEACHER: (teacher, sets[teacher], others) for metric in same_noise if others}
    scores, missing = {name: {} for name in sets}, []
    for metric, (goal, truth, shown) in wanted.items():
        kind = metric.removesuffix(TO_TEACHER)
        try:
            require(kind, [truth, *shown.values()])
            found = judged(JUDGES[kind](), shown, truth) if kind in JUDGES else distances(kind, features(), goal, shown)
        except (NotComputed, lpips.WeightsMissing) as error:
            found = dict.fromkeys(shown)
            missing.append(f"{metric}: not computed ({error})")
        for name in shown:
            scores[name][metric] = found[name]
    return [Row(name, scores[name], len(x), (nfe or {}).get(name), missing=tuple(missing)) for name, x in sets.items()]


def markdown(rows: Iterable[Row]) -> str:
    """The table as text that is also Markdown."""
    rows = list(rows)
    names = columns_of(rows)
    head = ["", "network calls", "images", *(f"{m} {arrow(m)}".strip() for m in names)]
    body = [[r.name, str(r.nfe or "–"), str(r.n), *(cell(m, r.metrics.get(m)) for m in names)] for r in rows]
    width = [max(len(line[i]) for line in [head, *body]) for i in range(len(head))]
    lines = ["| " + " | ".join(x.ljust(w) for x, w in zip(line, width, strict=True)) + " |" for line in [head, *body]]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in width) + "|", *lines[1:]])


def columns_of(rows) -> list[str]:
    """Metrics with a value in some row: known ones first, in their order."""
    present = dict.fromkeys(m for row in rows for m, value in row.metrics.items() if value is not None)
    return [m for m in METRICS if m in present] + [m for m in present if m not in METRICS]


def arrow(metric: str) -> str:
    """Which way is better."""
    return {True: "↑", False: "↓", None: ""}[known(metric).higher]


def cell(metric: str, value) -> str:
    """'0.1234 ± 0.0012', or a dash."""
    if value is None:
        return "–"
    digits = known(metric).digits
    mean, error = value
    if not np.isfinite(error):
        return f"{mean:.{digits}f}"
    return f"{mean:.{digits}f} ± " + (f"{error:.0e}" if 0 < error < 0.5 * 10**-digits else f"{error:.{digits}f}")


def checked(name, images) -> np.ndarray:
    """Images as float32 [n,h,w,3]; a sentence if they are not images."""
    images = np.asarray(images)
    if images.ndim != 4 or images.shape[3] not in (1, 3) or not len(images):
        raise ValueError(f"{name!r} has shape {images.shape}, not [n, h, w, 1 or 3] with n > 0")
    if not np.issubdtype(images.dtype, np.floating):
        raise ValueError(f"{name!r} is {images.dtype}: divide by 255 for floats in [0, 1]")
    low, high = images.min(), images.max()
    if not (low >= -1e-4 and high <= 1.0001):  # also catches nan
        raise ValueError(f"{name!r} has values from {low} to {high}, not in [0, 1]")
    return np.repeat(images, 3 // images.shape[3], 3).astype(np.float32)


def require(metric, sets):
    """Raise NotComputed where a metric has no meaning."""
    need = METRICS[metric]
    if min(sets[0].shape[1:3]) < need.pixels:
        raise NotComputed(f"needs images of at least {need.pixels} px")
    if min(map(len, sets)) < need.images:
        raise NotComputed(f"needs at least {need.images} images")


def judged(judge: Judge, sets, targets) -> dict[str, tuple[float, float]]:
    """Mean and standard error of a metric of pairs, by set."""
    values = {name: [] for name in sets}
    for rows in batches(targets):
        target = judge.see(padded(targets, rows))
        for name, images in sets.items():
            values[name].append(np.asarray(judge.compare(judge.see(padded(images, rows)), target)))
    n = len(targets)
    values = {name: np.concatenate(v)[:n].astype(np.float64) for name, v in values.items()}
    return {name: (v.mean(), v.std(ddof=1) / n**0.5 if n > 1 else np.nan) for name, v in values.items()}


def distances(metric, features, goal, names) -> dict[str, tuple[float, float]]:
    """A metric of whole sets, by set, from features that the goal's standardise."""
    real = kid.standardized(features[goal], features[goal])
    return {name: DISTANCES[metric](kid.standardized(features[name], features[goal]), real) for name in names}


def extract(size, sets) -> dict[str | None, np.ndarray]:
    """EfficientNet-Lite0 features [n, 1280] by set."""
    see = extractor(size)
    return {
        name: np.concatenate([see(padded(images, rows)) for rows in batches(images)])[: len(images)]
        for name, images in sets.items()
    }


def batches(images) -> list[slice]:
    """Slices of one size, the last too long perhaps: up to 64 images, fewer if they are larger than 128 px."""
    size = max(1, min(64, len(images), 2**20 // (images.shape[1] * images.shape[2])))
    return [slice(i, i + size) for i in range(0, len(images), size)]


def padded(images, rows: slice):
    """images[rows], with zeros in place of missing rows, so that a network is compiled once."""
    part = images[rows]
    return np.pad(part, ((0, rows.stop - rows.start - len(part)), (0, 0), (0, 0), (0, 0)))


def accurate(f):
    """jit(f) with true float32 products, which accelerators would round."""

    def call(*args):
        with jax.default_matmul_precision("highest"):
            return jitted(*args)

    jitted = jax.jit(f)
    return call


@functools.cache
def extractor(size: int):
    """Images in [0, 1] -> EfficientNet-Lite0's features at size x size px."""
    net = efficientnet.load()
    resize = lambda x: jnp.clip(jax.image.resize(x, (len(x), size, size, 3), "cubic", antialias=True), 0.0, 1.0)
    return functools.partial(accurate(lambda net, x: net(resize(x))), jax.device_put(net))


@functools.cache
def lpips_judge(trunk: str) -> Judge:
    """LPIPS, its network loaded and compiled once."""
    params = jax.device_put(lpips.load(trunk).params)
    features = {"vgg": lpips.vgg_features, "alex": lpips.alex_features}[trunk]
    see = accurate(lambda params, x: features(params, x * 2.0 - 1.0))
    return Judge(functools.partial(see, params), functools.partial(accurate(lpips.distance), params))


JUDGES = {
    "PSNR": functools.cache(lambda: Judge(np.asarray, accurate(pairs.psnr))),
    "SSIM": functools.cache(lambda: Judge(np.asarray, accurate(pairs.ssim))),
    "LPIPS-VGG": functools.partial(lpips_judge, "vgg"),
    "LPIPS-Alex": functools.partial(lpips_judge, "alex"),
}
DISTANCES = {
    "KID-EffLite0@64": kid.kid,
    "KID-EffLite0@224": kid.kid,
    "FD-EffLite0-PCA64": kid.frechet,
    "Precision-EffLite0": manifold.precision,
    "Recall-EffLite0": manifold.recall,
}
