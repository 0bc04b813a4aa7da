"""Attention and its kernels; the options dtype, remat and flash of every network."""

import functools
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pallas_api
from jax.experimental.pallas.ops.tpu import flash_attention
from jax.extend.core import jaxprs_in_params
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from cddistill import models, sharding
from cddistill.models import attention as module
from cddistill.models import convert
from cddistill.models.attention import attention, kernel, loop, pallas, xla
from cddistill.models.configured import POLICIES, rematerialised
from cddistill.models.init import weight_shapes
from cddistill.step import TrainState

UNET = {
    "block_out_channels": [8], "down_block_types": ["CrossAttnDownBlock2D"], "up_block_types": ["CrossAttnUpBlock2D"],
    "mid_block_type": None, "layers_per_block": 1, "norm_num_groups": 4, "cross_attention_dim": 8,
    "attention_head_dim": 2,
}  # fmt: skip
SELF = {"down_block_types": ["AttnDownBlock2D"], "up_block_types": ["AttnUpBlock2D"]}
BRANCH = {k: v for k, v in UNET.items() if k != "up_block_types"} | {"mid_block_type": "UNetMidBlock2D"}
BRANCH |= {"conditioning_embedding_out_channels": [4, 8]}
KARRAS = {"img_resolution": 16, "model_channels": 8, "channel_mult": [1], "num_blocks": 1, "attn_resolutions": [16]}
VAE = {"block_out_channels": [8], "norm_num_groups": 4}
TINY = {f"{half}_block_out_channels": [8, 8] for half in ("encoder", "decoder")}
TINY |= {f"num_{half}_blocks": [1, 1] for half in ("encoder", "decoder")}
CLIP = {
    "vocab_size": 20, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "projection_dim": 8, "max_position_embeddings": 128,
}  # fmt: skip
PRODUCTS = ("dot_general", "conv_general_dilated")
NETWORKS = {
    "unet": UNET | {"_class_name": "UNet2DConditionModel"},
    "unet_self": UNET | SELF | {"_class_name": "UNet2DConditionModel"},
    "controlnet": BRANCH | {"_class_name": "ControlNetModel"},
    "mu_blend": BRANCH | {"_class_name": "MuBlendModel"},
    "adm": KARRAS | {"_class_name": "DhariwalUNet", "channels_per_head": 4},
    "ncsnpp": KARRAS | {"_class_name": "SongUNet", "embedding_type": "fourier", "encoder_type": "residual"},
    "vae": VAE | {"_class_name": "AutoencoderKL"},
    "tiny_vae": TINY | {"_class_name": "AutoencoderTiny"},
    "clip": CLIP | {"architectures": ["CLIPTextModelWithProjection"], "model_type": "clip_text_model"},
}


def randn(seed, *shape, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def qkv(b=1, q_len=256, k_len=128, heads=2, width=8, dtype=jnp.float32):
    shapes = (b, q_len, heads, width), (b, k_len, heads, width), (b, k_len, heads, width)
    return tuple(randn(i, *shape, dtype=dtype) for i, shape in enumerate(shapes))


def mesh_of(platform, shape=(1, 1), kind=AxisType.Auto):
    """An abstract mesh of devices this machine lacks: programs can be lowered for it."""
    return AbstractMesh(shape, ("data", "fsdp"), (kind,) * 2, abstract_device=AbstractDevice(platform, 1, platform))


def lowered(f, mesh, *args, platform="tpu"):
    """The StableHLO of f, traced inside a mesh (or none), for a platform."""

    def inside(*args):
        with jax.sharding.use_abstract_mesh(mesh):
            return f(*args)

    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), args)
    return jax.jit(inside if mesh else f).trace(*shapes).lower(lowering_platforms=(platform,)).as_text()


def equations(jaxpr):
    """All equations of a jaxpr, including those of nested jaxprs."""
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in jaxprs_in_params(eqn.params):
            yield from equations(inner)


@pytest.fixture
def interpreted(monkeypatch):
    """Pallas kernels run in interpret mode, and are selected on the CPU mesh as on a TPU."""
    flash_attention.flash_attention.clear_cache()
    monkeypatch.setattr(pallas_api, "pallas_call", functools.partial(pallas_api.pallas_call, interpret=True))
    monkeypatch.setattr(module, "kernel", lambda platform, *sizes: kernel("tpu", *sizes))
    yield
    flash_attention.flash_attention.clear_cache()


@pytest.mark.parametrize("causal", [False, True])
def test_attention_equals_numpy_softmax(causal):
    q, k, v = qkv(2, 7, 7 if causal else 5)
    weights = np.exp(np.einsum("blhd,bmhd->bhlm", q, k) / np.sqrt(8))
    weights = np.tril(weights) if causal else weights
    expected = np.einsum("bhlm,bmhd->blhd", weights / weights.sum(-1, keepdims=True), v)
    np.testing.assert_allclose(attention(q, k, v, causal), expected, atol=1e-5)


def test_softmax_is_float32_under_bfloat16():
    jaxpr = jax.make_jaxpr(attention)(*qkv(dtype=jnp.bfloat16))
    assert {eqn.outvars[0].aval.dtype for eqn in equations(jaxpr.jaxpr) if eqn.primitive.name == "exp"} == {
        jnp.dtype("float32")
    }


@pytest.mark.parametrize(
    ("expected", "platform", "dtype", "sizes"),
    [
        ("pallas", "tpu", "bfloat16", (4096, 4096, 64)),
        ("pallas", "tpu", "float32", (128, 256, 128)),
        ("xla", "tpu", "bfloat16", (4096, 77, 64)),  # 77 text tokens
        ("xla", "tpu", "bfloat16", (64, 128, 64)),
        ("xla", "tpu", "bfloat16", (4096, 4096, 160)),  # Stable Diffusion 1's lowest levels
        ("cudnn", "gpu", "bfloat16", (4096, 4096, 64)),
        ("cudnn", "gpu", "float16", (64, 78, 128)),
        ("xla", "gpu", "bfloat16", (4096, 77, 64)),
        ("xla", "gpu", "float32", (4096, 4096, 64)),
        ("xla", "gpu", "bfloat16", (4096, 4096, 136)),
        ("xla", "gpu", "bfloat16", (4096, 4096, 20)),
        ("loop", "cpu", "bfloat16", (4096, 4096, 64)),
        ("loop", "cpu", "float32", (4096, 4096, 512)),  # an autoencoder's
        ("loop", "cpu", "float32", (4096, 77, 64)),
        ("loop", "cpu", "float32", (50, 50, 64)),
    ],
)
def test_kernel_is_selected_by_platform_dtype_and_sizes(expected, platform, dtype, sizes, monkeypatch):
    monkeypatch.setattr(module, "cudnn_runs", lambda: True)
    assert kernel(platform, jnp.dtype(dtype), *sizes) == expected
    monkeypatch.setattr(module, "cudnn_runs", lambda: False)
    assert kernel(platform, jnp.dtype(dtype), *sizes) == expected.replace("cudnn", "xla")


@pytest.mark.parametrize(("found", "runs"), [(["9.0", "8.0"], True), (["8.0", "7.5"], False), (["12.1"], True)])
def test_cudnn_needs_ampere(found, runs, monkeypatch):
    class GPU:
        def __init__(self, capability):
            self.compute_capability = capability

    assert not module.cudnn_runs()  # no GPU here
    monkeypatch.setattr(jax, "devices", lambda platform: [GPU(capability) for capability in found])
    assert module.cudnn_runs() == runs


@pytest.mark.parametrize(("dtype", "atol"), [("float32", 2e-6), ("bfloat16", 0.02)])  # bfloat16 has 8 bits
def test_pallas_outputs_and_gradients_equal_xla(dtype, atol, interpreted):
    inputs, weight = qkv(q_len=1024, k_len=128, dtype=jnp.dtype(dtype)), randn(3, 1, 1024, 2, 8)

    def both(f):
        scalar = lambda *x: (f(*x).astype(jnp.float32) * weight).mean(1).sum()
        return jax.jit(lambda *x: (f(*x), *jax.grad(scalar, (0, 1, 2))(*x)))

    for a, b in zip(both(pallas)(*inputs), both(xla)(*inputs), strict=True):
        assert a.dtype == jnp.dtype(dtype)
        np.testing.assert_allclose(a.astype("f"), b.astype("f"), atol=atol * np.abs(b).max().astype("f"))


@pytest.mark.parametrize(("dtype", "atol"), [("float32", 2e-6), ("bfloat16", 0.02)])
@pytest.mark.parametrize(("sizes", "looped"), [((2, 512, 384), True), ((1, 50, 7), False)])
def test_the_loop_over_queries_equals_xla(dtype, atol, sizes, looped):
    """Its output, and first and second derivatives, with fewer temporaries."""
    inputs, mesh = qkv(*sizes, dtype=jnp.dtype(dtype)), sharding.make_mesh()

    def all_of(f):
        scalar = lambda *x: (f(*x).astype(jnp.float32) ** 2).sum()
        first = jax.grad(scalar, (0, 1, 2))
        second = jax.grad(lambda *x: (first(*x)[0].astype(jnp.float32) ** 2).sum(), 1)
        return jax.jit(sharding.inside(mesh, lambda *x: (f(*x), *first(*x), second(*x)))), jax.jit(first)

    (ours, first), (theirs, plain) = all_of(loop), all_of(xla)
    for a, b in zip(ours(*inputs), theirs(*inputs), strict=True):
        assert a.dtype == jnp.dtype(dtype)
        np.testing.assert_allclose(a.astype("f"), b.astype("f"), atol=atol * np.abs(b).max().astype("f"))
    temporaries = lambda f: f.lower(*inputs).compile().memory_analysis().temp_size_in_bytes
    on_mesh = jax.make_jaxpr(sharding.inside(mesh, attention))(*inputs)
    assert ("scan" in str(on_mesh)) == looped
    if looped:
        assert temporaries(first) < 0.8 * temporaries(plain)


@pytest.mark.parametrize(
    ("length", "weights", "size"),
    [
        (1024, 2**14, 64),
        (1024, 2**13, 128),
        (1024, 2**11, 256),
        (4096, 2**22, 64),
        (192, 1, 64),
        (77, 1, 77),
        (200, 1, 200),
    ],
)
def test_as_many_queries_at_a_time_as_a_cache_holds(length, weights, size):
    assert module.at_a_time(length, weights) == size


def test_attention_on_a_mesh_is_sharded_by_row_and_equals_xla(interpreted):
    mesh = sharding.make_mesh(fsdp=2)
    inputs = qkv(8)
    place = lambda f: jax.jit(sharding.inside(mesh, lambda *x: (f(*x), *jax.grad(total(f), (0, 1, 2))(*x))))
    total = lambda f: lambda *x: (f(*x) ** 2).sum()
    ours = place(attention)(*sharding.put_rows(mesh, inputs))
    for a, b in zip(ours, place(xla)(*inputs), strict=True):
        assert a.sharding.is_equivalent_to(sharding.by_row(mesh), 4)
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_kernel_needs_a_mesh_and_a_divisible_batch():
    has_kernel = lambda mesh, b=4, **kwargs: (
        "tpu_custom_call" in lowered(functools.partial(attention, **kwargs), mesh, *qkv(b))
    )
    assert has_kernel(mesh_of("tpu", (2, 2)))
    assert has_kernel(mesh_of("tpu"), b=3)
    assert not has_kernel(mesh_of("tpu", (2, 2)), b=3)
    assert not has_kernel(mesh_of("tpu", (2, 2)), flash=False)
    assert not has_kernel(mesh_of("cpu", (2, 2)))
    assert not has_kernel(mesh_of("tpu", kind=AxisType.Explicit))
    assert not has_kernel(None)
    causal = functools.partial(attention, causal=True)
    assert "tpu_custom_call" not in lowered(causal, mesh_of("tpu"), *qkv(1, 128, 128))


def test_cudnn_kernels_are_lowered_for_gpus(monkeypatch):
    """JAX's checks of the GPU are mocked: the kernel is lowered, not run."""
    run = functools.partial(lowered, jax.grad(lambda *x: attention(*x).astype(jnp.float32).sum()), platform="cuda")
    inputs = qkv(4, 64, 78, dtype=jnp.bfloat16)
    assert "cudnn" not in run(mesh_of("gpu", (2, 2)), *inputs)
    monkeypatch.setattr(module, "cudnn_runs", lambda: True)
    monkeypatch.setattr("jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version", lambda: 91900)
    text = run(mesh_of("gpu", (2, 2)), *inputs)
    assert "__cudnn$fmhaSoftmax(" in text
    assert "__cudnn$fmhaSoftmaxBackward(" in text
    assert "cudnn" not in run(mesh_of("gpu"), *qkv(4))  # float32


def test_second_derivatives_need_flash_false(interpreted):
    mesh = sharding.make_mesh(fsdp=2)
    (q, *kv), kwargs = qkv(8), {"flash": False}

    def penalty(q):  # a gradient penalty, as of a discriminator
        return (jax.grad(lambda q: (attention(q, *kv, **kwargs) ** 2).sum())(q) ** 2).sum()

    grad = jax.jit(sharding.inside(mesh, jax.grad(penalty)))(q)
    d = randn(9, *q.shape)
    slope = (jax.jit(penalty)(q + 1e-2 * d) - jax.jit(penalty)(q - 1e-2 * d)) / 2e-2
    np.testing.assert_allclose((grad * d).sum(), slope, rtol=1e-2)
    kwargs["flash"] = True
    with pytest.raises(NotImplementedError):
        jax.eval_shape(sharding.inside(mesh, jax.grad(penalty)), q)


@pytest.mark.parametrize("parallel", ["jit", "pmap"])
def test_drivers_set_the_abstract_mesh(parallel):
    seen = []

    def step(state, frozen, batch, play, axis=None):
        seen.append(jax.sharding.get_abstract_mesh())
        return state, {"loss": batch["x"].mean()}

    state = TrainState(jnp.zeros((), jnp.int32), {}, {}, {})
    driver = sharding.make_driver(parallel, step, sharding.make_mesh(), state)
    driver.step(driver.put_state(state), driver.put_frozen({}), driver.put_batch({"x": np.ones((8, 1), "f")}), ())
    assert seen[0].size == 8
    assert seen[0].abstract_device.platform == "cpu"


def test_exports_contain_no_kernel():
    (b,) = jax.export.symbolic_shape("b")
    shapes = [jax.ShapeDtypeStruct((b, *x.shape[1:]), x.dtype) for x in qkv()]
    with jax.sharding.use_abstract_mesh(mesh_of("tpu")):  # the batch size is symbolic
        exported = jax.export.export(jax.jit(attention), platforms=("cpu", "cuda", "tpu"))(*shapes)
    assert "tpu_custom_call" not in exported.mlir_module()
    np.testing.assert_allclose(exported.call(*qkv(2)), xla(*qkv(2)), atol=1e-6)


@functools.cache
def weights(name):
    """Random weights of a network, none of them zero."""
    shapes, seeds = weight_shapes(convert.build(NETWORKS[name])), itertools.count()

    def draw(x):
        noise = np.random.default_rng(next(seeds)).normal(size=x.shape).astype("f")
        return noise / np.sqrt(np.prod(x.shape[:-1])) if len(x.shape) > 1 else 0.5 + 0.1 * noise

    return jax.tree.map(draw, shapes)


def call(name, **ours):
    """params -> all outputs of a network in one vector."""
    network, rng = convert.build(NETWORKS[name], **ours), np.random.default_rng(7)
    x = lambda *shape: rng.normal(size=shape).astype("f")
    text, t = {"encoder_hidden_states": x(1, 5, 8)}, np.array([3])
    args, kwargs = {
        "unet": ((x(1, 16, 8, 4), t), text),
        "unet_self": ((x(1, 16, 8, 4), t), {}),
        "controlnet": ((x(1, 16, 8, 4), t, x(1, 32, 16, 3)), text),
        "mu_blend": ((x(1, 16, 8, 4), t, x(1, 32, 16, 3)), text),
        "adm": ((x(1, 16, 8, 3), np.ones(1, "f")), {}),
        "ncsnpp": ((x(1, 16, 8, 3), np.ones(1, "f")), {}),
        "vae": ((x(1, 16, 8, 3),), {}),
        "tiny_vae": ((x(1, 32, 16, 3),), {}),
        "clip": ((rng.integers(0, 20, (1, 128)),), {}),
    }[name]

    def run(params):
        out = network.apply({"params": params}, *args, **kwargs)
        return jnp.concatenate([jnp.asarray(x, jnp.float32).ravel() for x in jax.tree.leaves(out)])

    return run


@pytest.mark.parametrize("name", NETWORKS)
def test_matmuls_and_convolutions_run_in_bfloat16(name):
    def halves(f):  # which operands of every product are bfloat16
        found = [eqn for eqn in equations(jax.make_jaxpr(f)(weights(name)).jaxpr) if eqn.primitive.name in PRODUCTS]
        if name in ("adm", "ncsnpp"):  # the embedding, a vector per image, is float32
            found = [eqn for eqn in found if eqn.invars[0].aval.ndim > 2]
        return [[x.aval.dtype == jnp.bfloat16 for x in eqn.invars] for eqn in found]

    run = call(name, dtype=jnp.bfloat16)
    forward, both = halves(run), halves(jax.grad(lambda params: run(params).sum()))
    assert len(both) > len(forward) > 5
    assert all(map(all, forward))
    assert all(map(any, both))  # XLA's gradients of the attention weights are float32


# The others are made of the same blocks as these two: slow.
@pytest.mark.parametrize(
    "name",
    ["tiny_vae", *(pytest.param(x, marks=pytest.mark.slow) for x in ("unet", "adm", "vae", "controlnet", "mu_blend"))],
)
def test_remat_equals_plain_and_bfloat16_is_close(name):
    policies = ["products_saveable"] if name == "tiny_vae" else POLICIES

    def outputs(params):
        each = (jax.vjp(call(name, remat=remat), params) for remat in (False, True, *policies))
        return [(out, backward(jnp.cos(out))) for out, backward in each], call(name, dtype=jnp.bfloat16)(params)

    ((out, grads), *others), half = jax.jit(outputs)(weights(name))
    for again in others:
        close = lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * (1 + np.abs(a).max()))
        jax.tree.map(close, (out, grads), again)
    assert 1e-4 < np.abs(half - out).max() / np.abs(out).max() < 0.1  # bfloat16 has 8 bits


class Products(nn.Module):
    """A convolution, a product with weights and one of two activations."""

    @nn.compact
    def __call__(self, x):
        h = nn.Dense(4)(jnp.sin(nn.Conv(4, (3, 3))(x)))
        return jnp.sin(jnp.einsum("bhwc,bhvc->bhwv", jnp.sin(h), h))


@pytest.mark.parametrize(
    ("remat", "again"),
    [(False, 0), (True, 3), ("nothing_saveable", 3), ("products_saveable", 1), ("dots_saveable", 0)]
    + [("dots_with_no_batch_dims_saveable", 2), ("offload_dots", 2)],
)
def test_a_policy_of_remat_says_which_products_are_computed_again(remat, again):
    """Three forward; backward two of activations, two of the weights' product, and the convolution's kernel."""
    x, block = jnp.ones((1, 4, 4, 4)), rematerialised(Products, remat)()
    params = block.init(jax.random.key(0), x)
    grads = jax.make_jaxpr(jax.grad(lambda params: block.apply(params, x).sum()))(params)
    assert sum(eqn.primitive.name in PRODUCTS for eqn in equations(grads.jaxpr)) == 8 + again


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_use_kernels_unless_flash_is_false(name):
    has_kernel = lambda flash: "tpu_custom_call" in lowered(call(name, flash=flash), mesh_of("tpu"), weights(name))
    assert has_kernel(True) == (name not in ("tiny_vae", "clip"))  # no attention; causal attention
    assert not has_kernel(False)


def test_flash_option_reaches_loaded_networks_and_branches(tmp_path):
    teacher = models.init(NETWORKS["unet"], flash=False)
    models.save(tmp_path, "unet", teacher.params, teacher.apply.module.to_config())
    assert [models.load(tmp_path, flash=flash).apply.module.flash for flash in (True, False)] == [True, False]
    branch = jax.eval_shape(functools.partial(models.make_branch, teacher), jax.random.key(0))
    assert not branch.apply.module.flash
