"""A latent LPIPS of one's own, for autoencoders whose latents nobody has trained one on; in two runs.

    classify   cross-entropy of the labels of images, given their latents: moves the trunk, a VGG16 with group norms
    judge      a, b two random distortions of an image x;  is LPIPS-VGG(x, b) < LPIPS-VGG(x, a)?
               cross-entropy of that, given d(z_x, z_a) and d(z_x, z_b): moves the heads of d

The recipe is LPIPS's (Zhang et al. 2018, arXiv:1801.03924), on latents as in Kang et al. 2024 (arXiv:2405.05967). There
the answers are people's, who looked at the patches of BAPPS; here pixel LPIPS gives them. What else departs from it is
marked as ours. --mode=export writes the file that method.metric of Diffusion2GAN takes; docs/diffusion2gan.md has the
commands.
"""

import dataclasses

import jax
import jax.numpy as jnp

from cddistill import losses
from cddistill.distort import distort
from cddistill.method import Turn, check_choices, per_sample
from cddistill.models import latent_lpips
from cddistill.models.lpips import distance
from cddistill.net import Autoencoder, Net

MULTIPLES = (1, 2, 4, 8, 8)  # of `width`, by stage
STAGES = {  # which nets move, and down the mean of which score
    "classify": (("trunk", "classifier"), "cross_entropy"),
    "judge": (("heads", "ranker"), "rank_loss"),
}
HIDDEN = 32  # width of the ranker
EPS = 0.1  # in its ratios of distances


@dataclasses.dataclass(frozen=True)
class LatentMetric:
    """Hyper-parameters of a latent LPIPS; the defaults are those of published ones."""

    stage: str = "classify"  # then "judge", with start_from=<workdir of the first>
    family: str = ""  # name of the autoencoder, which the exported file will bear
    width: int = 64  # channels of the first stage, of 1, 2, 4, 8 and 8 times as many; half as many groups per norm
    pools: tuple[int, ...] = (3, 4)  # stages that end in a max-pool; images instead of latents: (1, 2, 3, 4)
    classes: int = 9  # labels are 0 ... classes - 1; the same as data.num_classes
    strength: float = 1.0  # of the distortions (ours)
    tune: bool = False  # "judge" moves the trunk too: LPIPS's "tune", where this is its "lin"

    def __post_init__(self):
        check_choices(self, {"stage": tuple(STAGES)})
        if self.width < 2 or self.width % 2:
            raise ValueError(f"method.width must be an even number, not {self.width}: group norms take half as many")
        if not {*self.pools} <= {1, 2, 3, 4, 5}:
            raise ValueError(f"method.pools {self.pools} are stages of five, such as (3, 4)")
        if self.strength <= 0.0:
            raise ValueError(f"method.strength {self.strength} leaves nothing to compare: it must be above 0")

    def init(self, key, frozen, batch):
        """A trunk of random weights and, by stage, a classifier, or equal heads and what compares two distances."""
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
        """LatentLPIPS without heads; ValueError for a family that has no name, or other latents."""
        if not (family := self.family):
            raise ValueError("method.family is empty: name the autoencoder, as the exported file will")
        known = latent_lpips.FAMILIES.get(family)
        if known and known.channels != channels:
            raise ValueError(f"the family {family} has {known.channels} channels, and these latents have {channels}")
        convs = latent_lpips.init_convs(key, channels, [self.width * m for m in MULTIPLES])
        layout = latent_lpips.LatentLPIPS(family, self.pools, pooled=False, groups=self.width // 2)
        return Net({"convs": convs}, layout)

    def turns(self):
        trunk = ("trunk",) if self.tune and self.stage == "judge" else ()
        return {self.stage: Turn(moves=STAGES[self.stage][0] + trunk, loss=self.loss)}

    def ema(self):
        return {}

    @property
    def labels(self) -> int:
        """Number of classes of the labels that the loss needs; 0 if it needs none."""
        return self.classes if self.stage == "classify" else 0

    @property
    def lpips(self) -> bool:
        """Whether the loss needs n.lpips."""
        return self.stage == "judge"

    def loss(self, n, batch, key):
        """The mean over the batch of what `scores` says of each image."""
        means = {name: x.mean() for name, x in self.scores(n, batch, key).items()}
        return means.pop(STAGES[self.stage][1]), means

    def scores(self, n, batch, key):
        """Of each image [b]: its loss, and whether the net is right about it, 0 or 1."""
        return {"classify": self.classify, "judge": self.judge}[self.stage](n, batch, key)

    def metric(self, n) -> Net:
        """The metric, as the nets n.trunk and n.heads are now."""
        if self.stage == "classify":
            raise ValueError("stage 'classify' is half of a metric: train 'judge' with start_from=<this workdir> first")
        return n.trunk.replace(params=n.trunk.params | {"heads": n.heads()})

    # ---- the two stages

    def classify(self, n, batch, key):
        """Labels from the mean over pixels of the last map (ours: VGG's own classifier has three layers)."""
        z, labels = n.autoencoder.encode(self.images(batch)), batch["text"]["class_labels"]
        logits = n.classifier(n.trunk.apply.maps(n.trunk.params, z)[-1].astype(jnp.float32).mean((1, 2)))
        return {
            "cross_entropy": cross_entropy(logits, labels),
            "accuracy": jnp.float32(logits.argmax(-1) == labels),
        }

    def judge(self, n, batch, key):
        """Which of two distortions is nearer, by LPIPS-VGG and by the metric; beside it, two that are not trained."""
        x = self.images(batch)
        a, b = (distort(x, per_sample(k, batch["index"]), self.strength) for k in jax.random.split(key))
        answer = jnp.float32(n.lpips(x, b) < n.lpips(x, a))
        z = n.autoencoder.encode(jnp.stack([x, a, b], 1).reshape(-1, *x.shape[1:]))  # in one call for all three
        (z_x, *others), (f_x, *features) = apart([z]), apart(n.trunk.apply.features(n.trunk.params, z))

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
        """x0, which must be images."""
        if (shape := batch["x0"].shape)[-1] != 3:
            raise ValueError(f"a metric is trained on images, and x0 is {shape}: take data that is not encoded yet")
        return batch["x0"]


def apart(maps) -> list[list]:
    """Maps [3 b, ...] of x, a, b and again x, a, b ... as three lists of maps [b, ...]."""
    return [[m.reshape(-1, 3, *m.shape[1:])[:, i] for m in maps] for i in range(3)]


def linear(params, x):
    """The classifier."""
    return x @ params["kernel"] + params["bias"][None]


def non_negative(params):
    """Heads from free numbers v: |v|, where LPIPS sets what is negative to 0 after each step (ours)."""
    return jax.tree.map(jnp.abs, params)


def init_ranker(key):
    """Layers of `rank`."""
    he, widths = jax.nn.initializers.he_normal(), (5, HIDDEN, HIDDEN, 1)
    shapes = zip(jax.random.split(key, 3), widths[:-1], widths[1:], strict=True)
    *hidden, last = [he(k, shape) for k, *shape in shapes]
    return [(kernel, jnp.zeros(HIDDEN)) for kernel in hidden] + [(last,)]


def rank(params, d_a, d_b):
    """Logit [b] that b is nearer, given both distances; of (b, a) it is the opposite (ours)."""
    return _rank(params, d_a, d_b) - _rank(params, d_b, d_a)


def _rank(params, a, b):
    """LPIPS's Dist2Logit."""
    x, (*hidden, (last,)) = jnp.stack([a, b, a - b, a / (b + EPS), b / (a + EPS)], -1), params
    for kernel, bias in hidden:
        x = jax.nn.leaky_relu(x @ kernel + bias[None], 0.2)
    return (x @ last)[:, 0]


def rank_loss(logit, answer):
    """Binary cross-entropy of each pair; answer is 1 where b is nearer."""
    return jax.nn.softplus(logit) - answer * logit


def cross_entropy(logits, labels):
    """Of each sample; 0 for the null label, which is none of the classes."""
    return -(jax.nn.log_softmax(logits) * jax.nn.one_hot(labels, logits.shape[-1])).sum(-1)
