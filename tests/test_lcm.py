"""LCM's loss against an independent writing of its algorithm 1, its guidance input, LoRA and conditional students."""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from cddistill import config
from cddistill.diffusion import EDM, ddpm_alphas
from cddistill.method import normal, uniform
from cddistill.methods import METHODS
from cddistill.models import lora, make_branch
from cddistill.net import Adapted
from cddistill.step import init_state

KEY = jax.random.key(3)


def nets_of(method, **frozen):
    """The argument n of the loss, its trained nets and averages jittered."""
    held = tiny.frozen() | frozen
    init = lambda held, batch: init_state(method.init(jax.random.key(0), held, batch), {}, {}, method.ema())
    state = tiny.jitter(jax.tree.map(np.asarray, jax.jit(init)(held, tiny.make_batch())))
    return SimpleNamespace(step=0, **held, **state.nets, **{f"{k}_ema": v for k, v in state.ema.items()})


def by_hand(n, batch, key, scales, student, target):
    """Algorithm 1 with index arithmetic, as released code writes it: DDIM timesteps 19, 39 ... 999, skip 20.

    student(z, t, w) and target(z, t, w) are raw network outputs; everything predicts v.
    """
    k_t, k_eps, _ = jax.random.split(key, 3)
    index, x0 = batch["index"], batch["x0"]
    t = (np.floor(np.asarray(uniform(k_t, index)) * 50).astype(int) + 1) * 20 - 1
    s = np.maximum(t - 20, 0)
    alphas = ddpm_alphas(n.teacher.schedule)[:, None, None, None]
    sigmas = np.sqrt(1 - alphas**2)
    z_t = alphas[t] * x0 + sigmas[t] * np.asarray(normal(k_eps, index, x0.shape[1:]))

    def split(v, z, t):
        return alphas[t] * z - sigmas[t] * v, alphas[t] * v + sigmas[t] * z

    apply = jax.jit(lambda text: n.teacher.apply(n.teacher.params, z_t, t, text))
    teacher = lambda text: split(np.asarray(apply(text)), z_t, t)
    (x_c, e_c), (x_u, e_u) = teacher(batch["text"]), teacher(batch["null"])
    w = (np.asarray(scales) - 1)[:, None, None, None]  # the paper's w
    z_s = alphas[s] * (x_c + w * (x_c - x_u)) + sigmas[s] * (e_c + w * (e_c - e_u))

    def consistent(net, z, t):
        scaled = 10.0 * t[:, None, None, None]
        skip, out = 0.25 / (scaled**2 + 0.25), scaled / np.sqrt(scaled**2 + 0.25)
        return skip * z + out * split(np.asarray(net(jnp.float32(z), t)), z, t)[0]

    return ((consistent(student, z_t, t) - consistent(target, z_s, s)) ** 2).mean()


@pytest.mark.parametrize("embedding_width", [4, pytest.param(0, marks=pytest.mark.slow)])
def test_the_loss_is_algorithm_1(embedding_width):
    method, batch = METHODS["lcm"](embedding_width=embedding_width), tiny.make_batch()
    n = nets_of(method)
    scales = 3 + 12 * uniform(jax.random.split(KEY, 3)[2], batch["index"])
    text = dict(batch["text"])
    if embedding_width:
        angles = 1000 * (np.asarray(scales)[:, None] - 1) * np.array([[1, 1e-4]])  # of width 4
        text["timestep_cond"] = np.float32(np.concatenate([np.sin(angles), np.cos(angles)], 1))
    apply = jax.jit(lambda params, z, t: n.backbone.apply(params, z, t, text))
    raw = lambda net: functools.partial(apply, net.params)
    expected = by_hand(n, batch, KEY, scales, raw(n.backbone), raw(n.backbone_ema))
    loss, metrics = jax.jit(lambda key: method.loss(n, batch, key))(KEY)
    assert metrics == {}
    np.testing.assert_allclose(loss, expected, rtol=2e-4)  # sinusoids of thousands in float32


def test_the_student_equals_the_teacher_at_first_and_takes_the_scale_later():
    method, batch = METHODS["lcm"](embedding_width=4), tiny.make_batch()
    start = method.init(KEY, tiny.frozen(), batch)["backbone"]
    assert start.module.time_cond_proj_dim == 4
    predict = jax.jit(lambda net, scales: method.predict(net, batch["x0"], 500, batch["text"], None, scales).x0)
    call = lambda net, scale: predict(net, jnp.full(16, scale))
    teacher = jax.jit(lambda net: net(batch["x0"], 500, batch["text"]).x0)(tiny.teacher())
    np.testing.assert_allclose(call(start, 8.0), teacher, atol=1e-6)
    moved = nets_of(method).backbone
    assert np.abs(call(moved, 8.0) - call(moved, 3.0)).max() > 1e-4


def test_no_gradient_reaches_the_target():
    method, batch = METHODS["lcm"](embedding_width=4), tiny.make_batch()
    n = nets_of(method)

    def loss(online, target):
        n.backbone, n.backbone_ema = online, target
        return method.loss(n, batch, KEY)[0]

    online, target = jax.jit(jax.grad(loss, (0, 1)))(n.backbone, n.backbone_ema)
    assert max(np.abs(x).max() for x in jax.tree.leaves(online)) > 0
    assert all((np.asarray(x) == 0).all() for x in jax.tree.leaves(target))


def test_a_lora_student_starts_as_the_teacher_and_is_exported_as_a_lora():
    method, batch = METHODS["lcm"](student_lora="blocks", lora_rank=2, embedding_width=0), tiny.make_batch()
    net = method.init(KEY, tiny.frozen(), batch)["backbone"]
    merged = lora.merge_if_lora(tiny.teacher(), net)
    assert merged is not net
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), merged.params, tiny.teacher().params)
    n = nets_of(method)
    assert np.isfinite(jax.jit(lambda key: method.loss(n, batch, key)[0])(KEY))


def test_a_conditional_teacher_is_distilled():
    """Stage two of CM-II: the frozen teacher sees the condition through its ControlNet."""
    method, batch = METHODS["lcm"](adapter="controlnet", embedding_width=0), tiny.make_batch()
    controlnet = make_branch(tiny.teacher(), KEY)
    n = nets_of(method, controlnet=controlnet)
    assert {"backbone", "branch"} == {*method.turns()["student"].moves}
    guided = lambda z, scales: method.guided_teacher(n, batch, batch["cond"], scales)(z, 500).x0
    plain = lambda z: Adapted(n.teacher, n.controlnet)(z, 500, batch["text"], batch["cond"]).x0
    found = jax.jit(guided)(batch["x0"], jnp.full(16, 1.0))
    np.testing.assert_allclose(found, jax.jit(plain)(batch["x0"]), atol=1e-6)
    assert np.isfinite(jax.jit(lambda key: method.loss(n, batch, key)[0])(KEY))


def test_the_timesteps_are_those_of_lcm():
    times = METHODS["lcm"]().sampling(tiny.teacher().schedule, 4).timesteps
    assert times == (999, 759, 499, 259)  # diffusers' LCMScheduler


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"student_lora": "blocks"}, "set method.embedding_width=0"),
        ({"adapter": "concat"}, "set method.embedding_width=0"),
        ({"adapter": "concat", "student_lora": "blocks", "embedding_width": 0}, "cannot be combined"),
        ({"distance": "l3"}, "method.distance='l3' must be one of"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        config.resolve({"method": {"name": "lcm"} | options})


def test_teachers_that_do_not_fit_are_refused():
    batch = tiny.make_batch()
    with pytest.raises(ValueError, match="takes the condition: fine-tune one first"):
        METHODS["lcm"](adapter="controlnet", embedding_width=0).init(KEY, tiny.frozen(), batch)
    with pytest.raises(ValueError, match="defined on a DDPM schedule's"):
        METHODS["lcm"]().init(KEY, {"teacher": tiny.teacher().replace(schedule=EDM())}, batch)
