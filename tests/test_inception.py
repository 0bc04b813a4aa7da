"""Published metrics: Inception-v3 against a PyTorch writing, FID in closed form, resizing by its formulas."""

from pathlib import Path

import jax
import numpy as np
import pytest
import scipy.linalg
from golden import make_inception as golden
from PIL import Image
from torch_file import write_torch

from cddistill.data.resample import matrix
from cddistill.evals import frechet, inception, protocols, scores, views
from cddistill.perceptual import lpips

RECORDED = np.load(Path(golden.__file__).parent / "inception.npz")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A file of random weights as PyTorch writes it."""
    parameters = golden.parameters({name: np.array(shape) for name, shape in inception.shapes().items()})
    return write_torch(tmp_path_factory.mktemp("weights") / inception.FILE, parameters)


def test_features_equal_a_pytorch_writing(weights, parity):
    net = inception.load(weights)
    assert len(net.params) == RECORDED["layers"]
    assert sum(kernel.size for kernel, _ in net.params.values()) == RECORDED["kernels"]
    features = jax.jit(net.apply)(net.params, golden.images())
    # Batch norms are folded into the kernels: other roundings in each of 94 layers.
    parity("Inception-v3 of FID", "output", features, RECORDED["features"], limit=3e-5)


def test_other_weight_files_are_refused(tmp_path):
    with pytest.raises(lpips.WeightsMissing, match=rf"a/{inception.FILE} is not there: download https://\S+ to it"):
        inception.load(tmp_path / "a" / inception.FILE)
    head = {"fc.weight": np.zeros((1000, 2048), np.float32)}  # torchvision's
    with pytest.raises(ValueError, match=r"is not the network of FID \(fc.weight is \(1000, 2048\)\): download"):
        inception.load(write_torch(tmp_path / "torchvision.pth", head))
    head = {"fc.weight": np.zeros((1008, 2048), np.float32)}
    with pytest.raises(ValueError, match=r"has no Conv2d_1a_3x3.conv.weight, where \(32, 3, 3, 3\) is expected"):
        inception.load(write_torch(tmp_path / "part.pth", head))


# ---- FID


def normal(seed, n, d=6):
    """Correlated features [n, d] with a mean."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, d)) @ rng.normal(size=(d, d)) + rng.normal(size=d)


def test_distance_of_gaussians_in_closed_form():
    """For covariances that commute it is |m - m'|^2 + sum (s - s')^2 over standard deviations s along common axes."""
    axes = np.linalg.qr(normal(0, 6))[0]
    s, other = np.array([1.0, 2, 3, 0, 0.5, 1]), np.array([2.0, 2, 0, 0, 1, 3])
    mean, apart = normal(1, 1)[0], normal(2, 1)[0]
    a, b = (frechet.Gaussian(m, axes @ np.diag(x**2) @ axes.T) for m, x in ((mean, s), (apart, other)))
    expected = ((mean - apart) ** 2).sum() + ((s - other) ** 2).sum()
    np.testing.assert_allclose([frechet.distance(a, b), frechet.distance(b, a)], expected, rtol=1e-7)
    assert abs(frechet.distance(a, a)) < 1e-6  # roots of eigenvalues that are 0 but for rounding


def test_distance_equals_the_published_formula_by_scipy():
    """tr sqrtm(C C'), as in the original code, pytorch-fid and EDM."""
    a, b = (frechet.gaussian(frechet.moments(normal(seed, 40))) for seed in (0, 1))
    root = scipy.linalg.sqrtm(a.covariance @ b.covariance)
    expected = ((a.mean - b.mean) ** 2).sum() + np.trace(a.covariance + b.covariance - 2 * root.real)
    np.testing.assert_allclose(frechet.distance(a, b), expected, rtol=1e-10)


def test_moments_of_parts_are_those_of_the_whole():
    """Features far from 0 lose no digits, as they would with sums of squares."""
    x = normal(0, 50) + 1e6
    total = frechet.moments(x[:0])
    for part in (x[:7], x[7:8], x[8:8], x[8:]):
        total = frechet.merged(total, frechet.moments(part))
    found = frechet.gaussian(total)
    assert total.n == 50
    np.testing.assert_allclose(found.mean, x.mean(0), rtol=1e-14)
    np.testing.assert_allclose(found.covariance, np.cov(x.T), rtol=1e-8)
    with pytest.raises(ValueError, match="FID needs at least 2 images in each set, not 1"):
        frechet.gaussian(frechet.moments(x[:1]))


def test_moments_cross_hosts_in_float64(monkeypatch):
    """JAX would round them to float32 on the way."""
    x, sent = normal(0, 50) + 1e6, []
    parts = [frechet.moments(x[:20]), frechet.moments(x[20:])]
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    gather = lambda mine: sent.append(np.asarray(jax.numpy.asarray(mine))) or np.stack(sent)
    monkeypatch.setattr(frechet.multihost_utils, "process_allgather", gather)
    frechet.over_hosts(parts[0])
    found = frechet.gaussian(frechet.over_hosts(parts[1]))
    np.testing.assert_allclose(found.covariance, np.cov(x.T), rtol=1e-8)


@pytest.mark.parametrize(
    ("arrays", "sentence"),
    [
        ({"mu": np.zeros(3)}, "is no .npz with mu and sigma"),
        ({"mu": np.zeros(3), "sigma": np.zeros((3, 2))}, r"has mu \(3,\) and sigma \(3, 2\), not \(3,\) and \(3, 3\)"),
        ({"mu": np.full(3, np.nan), "sigma": np.zeros((3, 3))}, r"not finite \(NaN or infinity\): download it again"),
    ],
)
def test_reference_statistics_are_checked(tmp_path, arrays, sentence):
    np.savez(tmp_path / "reference.npz", **arrays)
    with pytest.raises(ValueError, match=sentence):
        frechet.read(tmp_path / "reference.npz", 3)


# ---- how images are seen


def picture(h, w, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (h, w, 3), np.uint8)


@pytest.mark.parametrize("shape", [(64, 64), (512, 400), (299, 700)])
def test_clean_resizing_follows_its_formula(shape):
    """Keys' cubic with a = -0.5, widened when it shrinks an image, rows after columns, cut to [0, 255], not rounded."""
    image = picture(*shape)
    rows, columns = (matrix(n, 299, "cubic").astype(np.float64) for n in shape)
    expected = np.clip(np.einsum("Hh,Ww,hwc->HWc", rows, columns, image.astype(np.float64), optimize=True), 0, 255)
    seen = views.clean(image)
    np.testing.assert_allclose(seen, expected, atol=2e-4)  # Pillow keeps float32 between the axes
    assert seen.dtype == np.float32
    assert np.abs(seen - np.rint(seen)).max() > 0.4
    assert {seen.min(), seen.max()} == {0.0, 255.0} or shape != (64, 64)


def test_tensorflow_resizing_follows_its_formula():
    """resize_bilinear(x, align_corners=False) of TensorFlow 1: out[i] = in[i h / 299], between the pixels around it."""
    image, (h, w) = picture(64, 48), (64, 48)
    seen = views.tensorflow(image)
    assert seen.shape == (299, 299, 3)
    for i, j in ((0, 0), (1, 298), (150, 77), (298, 298)):
        y, x = i * h / 299, j * w / 299
        (a, b), (p, q) = (int(y), min(int(y) + 1, h - 1)), (int(x), min(int(x) + 1, w - 1))
        top, bottom = (image[r, p] * (1 - x % 1) + image[r, q] * (x % 1) for r in (a, b))
        np.testing.assert_allclose(seen[i, j], top * (1 - y % 1) + bottom * (y % 1), atol=1e-3)
    assert (views.tensorflow(picture(299, 299)) == picture(299, 299)).all()


def test_squares_and_patches_are_cut_from_the_middle():
    image = picture(300, 401)
    middle = image[:, 50:350]  # (401 - 300) / 2 = 50.5, rounded to even
    resized = np.asarray(Image.fromarray(middle).resize((256, 256), Image.Resampling.LANCZOS))
    assert (views.square(image, 256) == resized).all()
    assert (views.clean_256(image) == views.clean(resized)).all()
    assert (views.patch(image) == image[0:299, 51:350]).all()  # (300 - 299) / 2 = 0.5, rounded to even
    small = picture(298, 400)
    assert (views.patch(small) == views.clean(small)).all()


# ---- protocols


def test_numbers_that_are_not_comparable_say_so():
    protocol = protocols.PROTOCOLS["imagenet64_50k"]
    assert protocols.said("imagenet64_50k", protocol, 50_000) == "imagenet64_50k protocol, N = 50,000"
    few = protocols.said("imagenet64_50k", protocol, 1000)
    assert few == "imagenet64_50k protocol, N = 1,000 of 50,000: not comparable"
    other = protocols.said("imagenet64_50k", protocol, 50_000, ["images of 32 px, not 64"])
    assert other == "imagenet64_50k protocol, N = 50,000: not comparable (images of 32 px, not 64)"


@pytest.mark.parametrize("name", sorted(protocols.PROTOCOLS))
def test_every_column_of_a_protocol_is_described(name):
    from cddistill.evals.inputs import GIVEN

    protocol = protocols.PROTOCOLS[name]
    assert {*protocol.views, *protocol.pairs} <= {*scores.METRICS}
    assert next(iter(protocol.views)) == "FID"
    assert protocol.given in GIVEN
    assert bool(protocol.statistics) + bool(protocol.references) + (protocol.given == "pairs") == 1
