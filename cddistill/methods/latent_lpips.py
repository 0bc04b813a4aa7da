"""A latent LPIPS for autoencoders that have no published one, trained in two runs.

    classify   cross-entropy of image labels given the latents: trains the trunk, a VGG16 with group norms
    judge      a, b two random distortions of an image x;  is LPIPS-VGG(x, b) < LPIPS-VGG(x, a)?
               cross-entropy of that answer given d(z_x, z_a) and d(z_x, z_b): trains the heads of d

The recipe is LPIPS's (Zhang et al. 2018, arXiv:1801.03924), on latents as in Kang et al. 2024 (arXiv:2405.05967). Their
answers are human judgements of the BAPPS patches; here pixel LPIPS gives them. Other deviations are marked as ours.
--mode=export writes the file for method.metric of Diffusion2GAN; docs/diffusion2gan.md has the commands.
"""

import dataclasses
import functools
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
import numpy as np

from cddistill import losses
from cddistill.method import Requires, Scored, Turn, per_sample
from cddistill.net import Autoencoder, Net
from cddistill.perceptual import latent_lpips, lpips
from cddistill.perceptual.distort import distort
from cddistill.perceptual.lpips import distance
from cddistill.typed import Count, within

MULTIPLES = (1, 2, 4, 8, 8)  # channels of the five VGG stages, in units of `width`
STAGES = {  # the nets that are trained, and the score whose mean is the loss
    "classify": (("trunk", "classifier"), "cross_entropy"),
    "judge": (("heads", "ranker"), "rank_loss"),
}
HIDDEN = 32  # width of the ranker
EPS = 0.1  # added to the denominators of its ratios of distances


@dataclasses.dataclass(frozen=True)
class LatentMetric(Scored):
    """Hyper-parameters of a latent LPIPS; the defaults are those of the published ones."""

    stage: Literal[*STAGES] = "classify"  # then "judge", with init_from_run=<workdir of the first run>
    family: str = ""  # name of the autoencoder, stored in the exported file
    width: Annotated[int, within(least=2, most=2**16, multiple=2)] = 64  # channels of the first stage (the others: 2,
    # 4, 8, 8 times as many); norms have width / 2 groups
    pools: tuple[Annotated[int, within(least=1, most=5)], ...] = (3, 4)  # stages that end in a max-pool; for images
    # instead of latents: (1, 2, 3, 4)
    classes: Count = 9  # labels are 0 ... classes - 1; equal to data.num_classes
    tune: bool = False  # "judge" trains the trunk too: LPIPS's "tune"; False is its "lin"

    def init(self, key, frozen, batch):
        """A random trunk and a random classifier ("classify"), or equal heads and a random ranker ("judge")."""
        k_trunk, k_end = jax.random.split(key)
        z = jax.eval_shape(Autoencoder.encode, frozen["autoencoder"], self.images(batch))
        trunk = self.random_trunk(k_trunk, z.shape[-1])
        maps = jax.eval_shape(trunk.apply.maps, trunk.params, z)
        if self.stage == "classify":
            kernel = jax.nn.initializers.lecun_normal()(k_end, (maps[-1].shape[-1], self.classes))
            return {"trunk": trunk, "classifier": Net({"kernel": kernel, "bias": jnp.zeros(self.classes)}, linear)}
        heads = Net([jnp.ones(x.shape[-1]) for x in maps], non_negative)
        return {"trunk": trunk, "heads": heads, "ranker": Net(init_ranker(k_end), rank)}

    def random_trunk(self, key, channels: int) -> Net:
        """LatentLPIPS with random convolutions and without heads.

        Raises ValueError if the family is empty or has another number of channels.
        """
        if not (family := self.family):
            raise ValueError("method.family is empty: set it to the name of the autoencoder for the exported file")
        known = latent_lpips.FAMILIES.get(family)
        if known and known != channels:
            raise ValueError(f"the family {family} has {known} channels, but these latents have {channels}")
        convs = latent_lpips.init_convs(key, channels, [self.width * m for m in MULTIPLES])
        layout = latent_lpips.LatentLPIPS(family, self.pools, pooled=False, groups=self.width // 2)
        return Net({"convs": convs}, layout)

    def turns(self):
        trunk = ("trunk",) if self.tune and self.stage == "judge" else ()
        return {self.stage: Turn(moves=STAGES[self.stage][0] + trunk, loss=self.loss)}

    def requires(self):
        if self.stage == "classify":
            return Requires(teacher=False, classes=self.classes)
        return Requires({"lpips": functools.partial(lpips.load, "vgg")}, teacher=False)

    def loss(self, n, batch, key):
        """The mean over the batch of the stage's score; the metrics are the means of the others."""
        means = {name: x.mean() for name, x in self.scores(n, batch, key).items()}
        return means.pop(STAGES[self.stage][1]), means

    def scores(self, n, batch, key):
        """Scores per image [b]: the loss of the stage, and 0 or 1 for a wrong or right answer."""
        return {"classify": self.classify, "judge": self.judge}[self.stage](n, batch, key)

    def export_file(self, n, batch, path):
        """Write the file for method.metric of Diffusion2GAN. Raises ValueError unless it is a .safetensors."""
        if path.suffix != ".safetensors":
            raise ValueError(f"--output={path}: a latent LPIPS is exported as *.safetensors")
        net = jax.device_get(self.metric(n))
        loaded = latent_lpips.load(latent_lpips.save(net, path))
        same = jax.tree.all(jax.tree.map(np.array_equal, loaded.params, net.params))
        weights = "the same" if same else "NOT the same"
        return f"LatentLPIPS of the family {loaded.apply.family}, read back, {weights} weights"

    def metric(self, n) -> Net:
        """The metric of n.trunk and n.heads. Raises ValueError in stage "classify", which has no heads."""
        if self.stage == "classify":
            raise ValueError("stage 'classify' has no metric yet: train 'judge' with init_from_run=<workdir> first")
        return n.trunk.replace(params=n.trunk.params | {"heads": n.heads()})

    # ---- the two stages

    def classify(self, n, batch, key):
        """A linear classifier on the spatial mean of the last map (ours: VGG's own has three layers)."""
        z = n.autoencoder.encode(self.images(batch))
        labels = batch["text"]["class_labels"]
        logits = n.classifier(n.trunk.apply.maps(n.trunk.params, z)[-1].astype(jnp.float32).mean((1, 2)))
        return {
            "cross_entropy": cross_entropy(logits, labels),
            "accuracy": jnp.float32(logits.argmax(-1) == labels),
        }

    def judge(self, n, batch, key):
        """Which of two distortions is nearer, by LPIPS-VGG and by the metric.

        "agreement" is 1 where both agree; "agreement_equal_heads" and "agreement_l2" are baselines without training.
        """
        x = self.images(batch)
        a, b = (distort(x, per_sample(k, batch["index"])) for k in jax.random.split(key))
        answer = jnp.float32(n.lpips(x, b) < n.lpips(x, a))
        z = n.autoencoder.encode(jnp.stack([x, a, b], 1).reshape(-1, *x.shape[1:]))  # one call for all three
        z_x, *others = split_triplets([z])
        f_x, *features = split_triplets(n.trunk.apply.features(n.trunk.params, z))

        def distances(heads):
            return [distance({"heads": heads}, f_x, f) for f in features]

        def right(d_a, d_b):
            return jnp.float32((d_b < d_a) == (answer > 0.5))

        trained = distances(n.heads())
        return {
            "rank_loss": rank_loss(n.ranker(*trained), answer),
            "agreement": right(*trained),
            "agreement_equal_heads": right(*distances(jax.tree.map(jnp.ones_like, n.heads.params))),
            "agreement_l2": right(*(losses.mse(z_x[0], z[0]) for z in others)),
        }

    def images(self, batch):
        """x0. Raises ValueError unless it has three channels."""
        if (shape := batch["x0"].shape)[-1] != 3:
            raise ValueError(f"a metric is trained on images, but x0 is {shape}: use data that is not encoded")
        return batch["x0"]


def split_triplets(maps) -> list[list]:
    """Maps [3 b, ...] with rows x, a, b, x, a, b, ... as three lists of maps [b, ...]: of x, of a, of b."""
    return [[m.reshape(-1, 3, *m.shape[1:])[:, i] for m in maps] for i in range(3)]


def linear(params, x):
    """Logits [b, classes] of the classifier."""
    return x @ params["kernel"] + params["bias"][None]


def non_negative(params):
    """Non-negative heads |v| from unconstrained v (ours: LPIPS clips negative heads to 0 after each update)."""
    return jax.tree.map(jnp.abs, params)


def init_ranker(key):
    """Random weights of `rank`: [(kernel, bias), (kernel, bias), (kernel,)]."""
    he, widths = jax.nn.initializers.he_normal(), (5, HIDDEN, HIDDEN, 1)
    shapes = zip(jax.random.split(key, 3), widths[:-1], widths[1:], strict=True)
    *hidden, last = [he(k, shape) for k, *shape in shapes]
    return [(kernel, jnp.zeros(HIDDEN)) for kernel in hidden] + [(last,)]


def rank(params, d_a, d_b):
    """Logit [b] that b is nearer, from the two distances; antisymmetric in them (ours)."""
    return _rank(params, d_a, d_b) - _rank(params, d_b, d_a)


def _rank(params, a, b):
    """LPIPS's Dist2Logit layer: a small network on both distances, their difference and ratios."""
    x, (*hidden, (last,)) = jnp.stack([a, b, a - b, a / (b + EPS), b / (a + EPS)], -1), params
    for kernel, bias in hidden:
        x = jax.nn.leaky_relu(x @ kernel + bias[None], 0.2)
    return (x @ last)[:, 0]


def rank_loss(logit, answer):
    """Binary cross-entropy of each sample; answer is 1 where b is nearer, else 0."""
    return jax.nn.softplus(logit) - answer * logit


def cross_entropy(logits, labels):
    """Cross-entropy of each sample; 0 for the null label, which is not one of the classes."""
    return -(jax.nn.log_softmax(logits) * jax.nn.one_hot(labels, logits.shape[-1])).sum(-1)
