"""Diffusion2GAN's discriminator: initialised from the teacher, heads, second derivatives; GAN losses."""

import functools

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_models import SD1, SDXL
from tiny import randn

from cddistill import losses, models
from cddistill.diffusion import DDPM
from cddistill.models.unet import Apply, UNet2DConditionModel
from cddistill.models.unet_discriminator import Head, UNetDiscriminator, make_discriminator
from cddistill.net import Denoiser

TEXT = {
    "block_out_channels": [8, 16], "norm_num_groups": 4, "layers_per_block": 1, "cross_attention_dim": 6,
    "down_block_types": ["DownBlock2D", "DownBlock2D"], "up_block_types": ["UpBlock2D", "UpBlock2D"],
    "attention_head_dim": 2,
}  # fmt: skip
ADM = {
    "_class_name": "DhariwalUNet", "img_resolution": 8, "label_dim": 3, "model_channels": 8, "channel_mult": [1, 2],
    "num_blocks": 0, "attn_resolutions": [4], "channels_per_head": 8,
}  # fmt: skip
SONG = {
    "_class_name": "SongUNet", "img_resolution": 8, "label_dim": 3, "model_channels": 8, "channel_mult": [2, 1],
    "num_blocks": 0, "attn_resolutions": [], "encoder_type": "skip", "decoder_type": "skip",
}  # fmt: skip
KINDS = {
    "text": (TEXT, jnp.int32(7), randn(2, 2, 3, 6)),
    "adm": (ADM, jnp.float32(0.3), {"class_labels": jnp.array([0, 3])}),
    "song": (SONG, jnp.float32(0.3), {"class_labels": jnp.array([0, 3])}),
}
FLAT = {  # one level each, with attention in the middle: for tests that compile slowly
    "text": TEXT | {"block_out_channels": [8], "down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"],
                    "layers_per_block": 0},
    "adm": ADM | {"channel_mult": [1], "attn_resolutions": []},
}  # fmt: skip


@functools.cache
def made(kind):
    """(teacher, discriminator, (x, t, text, z)) of a tiny network."""
    config, t, text = KINDS[kind]
    teacher, channels = models.init(config, zero_out=False), 4 if kind == "text" else 3
    x, z = randn(0, 2, 8, 8, channels), randn(1, 2, 8, 8, channels)
    return teacher, jax.jit(make_discriminator)(teacher, jax.random.key(0)), (x, t, text, z)


@functools.cache
def flat(kind):
    """(teacher, discriminator with one logit map) of a single level."""
    teacher = models.init(FLAT[kind], zero_out=False, remat=True)
    return teacher, make_discriminator(teacher, jax.random.key(0), scales=False)


def weights(net):
    return flax.traverse_util.flatten_dict(net.params)


def judged(disc, x, t, text, z):
    """Logits of these and, in the second half of the batch, with another z."""
    twice = lambda tree: jax.tree.map(lambda a: jnp.concatenate([a, a]), tree)
    return disc(twice(x), t, twice(text), jnp.concatenate([z, z + 1.0]))


compiled = jax.jit(judged)


def look(disc, *data):
    """(logits, logits with another z)."""
    logits = [np.asarray(x) for x in compiled(disc, *data)]
    return [x[:2] for x in logits], [x[2:] for x in logits]


@functools.cache
def seen(kind):
    """(logits, logits with another z) at step 0."""
    _, disc, data = made(kind)
    return look(disc, *data)


def apart(a, b):
    """The largest difference between the maps of each pair."""
    return np.array([np.abs(x - y).max() for x, y in zip(a, b, strict=True)])


# All networks have the same interface, `level_input` and levels, so a second one is a slow test.
BOTH = ["text", pytest.param("song", marks=pytest.mark.slow)]


@pytest.mark.slow
@pytest.mark.parametrize("kind", BOTH)
def test_initial_features_are_the_teachers(kind):
    """Three maps of logits per level, coarsest first: the heads on Denoiser.decoder_features."""
    teacher, disc, (x, t, text, _) = made(kind)
    heads = [disc.params[f"heads_{j}_{part}"] for j in (0, 1) for part in ("before", "skip", "after")]

    @jax.jit
    def judge(teacher, heads):
        features = jax.tree.leaves(teacher.decoder_features(x, t, text))
        return [Head().apply({"params": p}, h) for p, h in zip(heads, features, strict=True)]

    logits, _ = seen(kind)
    assert [x.shape for x in logits] == [(2, size, size, 1) for size in (4, 4, 4, 8, 8, 8)]
    assert {x.dtype for x in logits} == {jnp.dtype("float32")}
    assert apart(logits, judge(teacher, heads)).max() < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("kind", BOTH)
def test_z_and_resized_images_have_no_effect_but_a_gradient_at_first(kind):
    _, disc, data = made(kind)
    assert apart(*seen(kind)).max() < 1e-6

    @jax.jit
    @jax.grad
    def slopes(disc):
        logits = judged(disc, *data)
        return (losses.gan(logits, True) + losses.gan(logits, False)).sum()

    grads = slopes(disc)
    new = [path for path in weights(disc) if path[-2] in ("conv_z", "conv_x_1")]
    assert len(new) == 4
    for path in new:
        assert not np.any(weights(disc)[path])
        assert np.abs(weights(grads)[path]).max() > 1e-6


def test_logits_depend_on_z_resized_images_and_text():
    """z affects all maps, the resized image all but the finest skip, text all but the skips."""
    _, disc, (x, t, text, z) = made("text")

    def taught(name):
        weights = jax.tree.map(lambda w: w + 0.1, disc.params[name])
        return look(disc.replace(params=disc.params | {name: weights}), x, t, text, z)

    logits, others = taught("conv_z")
    np.testing.assert_array_equal(apart(logits, others) > 1e-3, [True] * 6)
    logits, others = taught("conv_x_1")
    np.testing.assert_array_equal(apart(logits, seen("text")[0]) > 1e-3, [True] * 4 + [False, True])
    assert apart(logits, others).max() < 1e-6
    logits, _ = look(disc, x, t, text[::-1], z)
    np.testing.assert_array_equal(apart(logits, seen("text")[0]) > 1e-3, [True, False, True] * 2)


def test_text_may_be_a_dict():
    _, disc, (x, t, text, z) = made("text")
    trace = lambda text: str(jax.make_jaxpr(lambda text: disc(x, t, text, z))(text))
    assert trace(text) == trace({"encoder_hidden_states": text})


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_copies_of_the_teachers_without_its_last_layers(kind):
    teacher, disc, _ = made(kind)
    held, ours = weights(teacher), weights(disc)
    assert {".".join(path[:-1]) for path in held.keys() - ours.keys()} == {
        "text": {"conv_norm_out", "conv_out"},
        "adm": {"out_norm", "out_conv"},
        "song": {f"dec.{size}_aux_{layer}" for size in ("4x4", "8x8") for layer in ("norm", "conv")},
    }[kind]
    new = {path[0] if path[0].startswith("heads") else path[-2] for path in ours.keys() - held.keys()}
    heads = {f"heads_{j}_{part}" for j in (0, 1) for part in ("before", "skip", "after")}
    assert new == heads | {"conv_z", "conv_x_1"}
    for path in held.keys() & ours.keys():
        np.testing.assert_array_equal(held[path], ours[path])


def test_weights_share_no_buffer_with_the_teacher():
    """Also outside of jit, so that either may be donated."""
    held, ours = ({x.unsafe_buffer_pointer() for x in jax.tree.leaves(net)} for net in flat("adm"))
    assert not held & ours


@pytest.mark.parametrize(
    ("options", "new", "count"),
    [
        ({"noise": False}, {"conv_x_1"}, 6),
        ({"scales": False}, {"conv_z", "heads_1_after"}, 1),
        ({"noise": False, "scales": False}, {"heads_1_after"}, 1),
    ],
)
def test_ablations_remove_their_layers_and_heads(options, new, count):
    """Without scales only the finest level's output has a head; without noise z may be omitted."""
    teacher, _, (x, t, text, z) = made("text")
    disc = jax.eval_shape(functools.partial(make_discriminator, **options), teacher, jax.random.key(0))
    names = {*disc.params} - {*teacher.params}
    assert {name for name in names if count == 1 or not name.startswith("heads")} == new
    given = (z,) if options.get("noise", True) else ()
    logits = jax.eval_shape(lambda d: d(x, t, text, *given), disc)
    assert [x.shape for x in logits][-1] == (2, 8, 8, 1)
    assert len(logits) == count


@pytest.mark.parametrize(
    ("config", "teacher", "more", "sizes"),
    [
        (SD1, 859_520_964, 26_653_832, (8, 16, 32, 64)),
        pytest.param(SDXL, 2_567_463_684, 17_749_893, (16, 32, 64), marks=pytest.mark.slow),
    ],
)
def test_logits_and_parameter_counts_of_the_real_models(config, teacher, more, sizes):
    """K = 12 for Stable Diffusion 1.5 and 9 for SDXL, which also takes sizes and pooled text; nothing is computed."""
    module = UNetDiscriminator.from_config(config)
    _, kwargs = module.example()
    x, t = jnp.zeros((1, 64, 64, 4)), jnp.zeros(1)
    logits, variables = jax.eval_shape(lambda: module.init_with_output(jax.random.key(0), x, t, x, **kwargs))
    assert [x.shape for x in logits] == [(1, size, size, 1) for size in sizes for _ in range(3)]
    assert sum(x.size for x in jax.tree.leaves(variables)) == teacher + more


def test_discriminators_of_editing_models_take_the_output():
    """x and z have the channels of the output, the image to edit has the others of the input."""
    disc = jax.eval_shape(lambda: make_discriminator(models.init(TEXT | {"in_channels": 8}), jax.random.key(0)))
    assert [disc.params[name]["kernel"].shape[2] for name in ("conv_in", "conv_z", "conv_x_1")] == [8, 4, 4]
    _, _, (x, t, text, z) = made("text")
    assert len(jax.eval_shape(lambda d: d(x, t, {"encoder_hidden_states": text, "concat": x}, z), disc)) == 6


def test_precision_and_remat_are_the_teachers_and_attention_is_never_fused():
    teacher, _, (x, t, text, z) = made("text")
    like = UNet2DConditionModel.from_config(TEXT, dtype=jnp.bfloat16, remat=True, flash=True)
    disc = jax.eval_shape(make_discriminator, teacher.replace(apply=Apply(like)), jax.random.key(0))
    assert (disc.module.dtype, disc.module.remat, disc.module.flash) == (jnp.bfloat16, True, False)
    logits = jax.eval_shape(lambda d: d(x, t, text, z), disc)
    assert {y.dtype for y in logits} == {jnp.dtype("float32")}


def test_unsupported_teachers_and_wrong_noise_are_refused():
    toy = Denoiser({}, lambda p, z, t, text: z, DDPM(), "x0")
    with pytest.raises(ValueError, match="needs a teacher that is one of UNet2DConditionModel, DhariwalUNet, SongUNet"):
        make_discriminator(toy, jax.random.key(0))
    _, disc, (x, t, text, z) = made("text")
    for wrong, shape in ((None, ""), (z[:1], "1, 8, 8, 4")):
        with pytest.raises(ValueError, match=rf"z must have x's shape, \(2, 8, 8, 4\), not \({shape}\)"):
            jax.eval_shape(disc.apply, disc.params, x, t, text, wrong)


# ---- the losses


def test_gan_losses_are_log_sigmoids():
    maps = randn(0, 3, 4, 4, 1), 5.0 * randn(1, 3, 2, 2, 1)
    for real, sign in ((True, 1.0), (False, -1.0)):
        expected = np.mean([-np.log(1 / (1 + np.exp(-sign * np.asarray(x)))).mean((1, 2, 3)) for x in maps], 0)
        np.testing.assert_allclose(losses.gan(maps, real), expected, rtol=1e-6)
    assert np.isfinite(losses.gan((jnp.full((1, 2, 2, 1), -500.0),), True)).all()


def test_r1_of_a_linear_score_is_its_squared_weight_norm():
    w, x = randn(0, 4, 4, 2), randn(1, 3, 4, 4, 2)
    expected = np.full(3, (w**2).sum())
    np.testing.assert_allclose(losses.r1(lambda x: (x * w[None]).sum((1, 2, 3)), x), expected, rtol=1e-5)
    # two maps: the sum of their means, here of w x and of 2 w x at every pixel
    maps = losses.r1(lambda x: (x * w[None], 2.0 * x * w[None]), x)
    np.testing.assert_allclose(maps, expected * (3.0 / w.size) ** 2, rtol=1e-5)


def test_r1_is_computed_per_sample():
    x = randn(1, 3, 4, 4, 2)
    score = lambda x: (jnp.sin(x) * x).sum((1, 2, 3))
    before, after = losses.r1(score, x), losses.r1(score, x.at[1].add(1.0))
    np.testing.assert_array_equal(before[jnp.array([0, 2])], after[jnp.array([0, 2])])
    assert before[1] != after[1]


def test_approximate_r1_equals_r1_in_expectation():
    """A linear logit <w, x>: E <w, sigma eps>^2 = sigma^2 |w|^2; over maps, the mean."""
    w, x, eps = randn(0, 8), jnp.zeros((20_000, 8)), randn(1, 20_000, 8)
    got = losses.approximate_r1(lambda x: (x @ w[:, None], 3.0 * x @ w[:, None]), x, 0.1 * eps)
    np.testing.assert_allclose(got[:5], 5.0 * (0.1 * eps @ w)[:5] ** 2, rtol=1e-4)
    np.testing.assert_allclose(got.mean(), 5.0 * 0.01 * (w**2).sum(), rtol=0.05)


@pytest.mark.slow  # test_diffusion2gan.py has the penalty of a tiny network
@pytest.mark.parametrize("kind", ["text", "adm"])
def test_r1_has_a_gradient_through_attention_and_remat(kind):
    """Against a finite difference, away from the initial weights."""
    _, t, text = KINDS[kind]
    _, disc = flat(kind)
    x = randn(0, 2, 4, 4, 4 if kind == "text" else 3)
    leaves, tree = jax.tree.flatten(disc)
    direction = jax.tree.unflatten(tree, [randn(i, *leaf.shape) for i, leaf in enumerate(leaves)])

    @jax.jit
    @jax.value_and_grad
    def penalty(step):
        net = jax.tree.map(lambda p, d: p + step * d, disc, direction)
        return losses.r1(lambda x: net(x, t, text, x), x).sum()

    (less, _), (value, slope), (more, _) = map(penalty, (0.0099, 0.01, 0.0101))
    assert value > 0
    np.testing.assert_allclose(slope, (more - less) / 2e-4, rtol=0.02)
