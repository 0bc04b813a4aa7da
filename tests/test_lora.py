"""LoRA: equal to PyTorch diffusers, trained over a shared base, read from files of every style, bad files refused."""

import functools
import json
import re
from pathlib import Path

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import safetensors.numpy
from golden import make_clip, make_models
from golden import make_lora as golden

from cddistill import models
from cddistill.diffusion import DDPM
from cddistill.method import Turn
from cddistill.models import clip, convert, ldm, lora
from cddistill.models.init import weight_shapes
from cddistill.models.unet import Apply, UNet2DConditionModel
from cddistill.net import Denoiser
from cddistill.step import init_state, train_step

RECORDED = np.load(Path(golden.__file__).parent / "lora.npz")
SMALL = make_models.SD | {
    "block_out_channels": [8], "down_block_types": ["CrossAttnDownBlock2D"], "mid_block_type": None,
    "up_block_types": ["CrossAttnUpBlock2D"], "attention_head_dim": 2,
}  # fmt: skip


def torch_shapes(module):
    """{PyTorch name: shape} of a network's weights."""
    shapes = flax.traverse_util.flatten_dict(weight_shapes(module))
    return {convert.torch_name(p): convert.to_torch(p, np.empty(s.shape)).shape for p, s in shapes.items()}


@functools.cache
def recorded_net(name):
    """The network that make_lora.py built under this name."""
    module = UNet2DConditionModel.from_config((make_models.UNETS | {"small": SMALL})[name])
    return Denoiser(weights_of(module), Apply(module), DDPM(), "eps")


@functools.cache
def encoder():
    return clip.CLIPTextModel.from_config(make_clip.L)


def weights_of(module):
    """The weights that make_lora.py gave to diffusers or transformers."""
    shapes = flax.traverse_util.flatten_dict(weight_shapes(module))
    arrays = make_models.weights(torch_shapes(module))
    return convert.unflatten(convert.match(arrays, shapes, convert.torch_name, convert.from_torch, "golden"))


@functools.cache
def files():
    """{style: (name of its UNet, tensors, metadata)}, as make_lora.py gave them to diffusers."""
    unets = (torch_shapes(recorded_net(name).apply.module) for name in ("sd15", "sdxl"))
    return golden.lora_files(*unets, torch_shapes(encoder()))


def written(folder, tensors, metadata=None):
    """Write these to a LoRA file; returns its path."""
    safetensors.numpy.save_file(tensors, folder / "lora.safetensors", metadata=metadata)
    return folder / "lora.safetensors"


def read_style(folder, style):
    """(network, its LoRA) of one of the files."""
    name, tensors, metadata = files()[style]
    bases = {"unet": recorded_net(name).params} | ({"text_encoder": None} if style == "kohya" else {})
    return recorded_net(name), lora.read_lora(written(folder, tensors, metadata), bases)["unet"]


def nhwc(x):
    return np.moveaxis(x, 1, -1)


def inputs(name):
    x = make_models.inputs(make_models.UNETS[name])
    return nhwc(x.pop("sample")), x.pop("timestep"), x


def assert_close(ours, theirs, tolerance=1e-5):
    np.testing.assert_allclose(ours, theirs, atol=tolerance * np.abs(theirs).max(), rtol=0)


@functools.cache
def program(name):
    """(gradients with respect to weights and z_t of the mean square of the output, output): one compile per network."""
    z_t, t, text = inputs(name)
    apply = recorded_net(name).apply

    @functools.partial(jax.grad, argnums=(0, 1), has_aux=True)
    def gradients(params, z_t):
        out = apply(params, z_t, t, text)
        return (out**2).mean(), out

    return lambda params: jax.jit(gradients)(params, z_t)


@pytest.mark.parametrize(
    "style", ["kohya", *(pytest.param(x, marks=pytest.mark.slow) for x in ("peft", "dotted", "processor", "kohya_xl"))]
)
def test_files_of_every_style_equal_diffusers(style, tmp_path, parity):
    net, adapter = read_style(tmp_path, style)
    (_, grad), out = program(files()[style][0])(lora.adapt(net, adapter).params)
    assert 2 * len(lora.factors(adapter.params)) == RECORDED[f"{style}/num"]
    parity(f"UNet with a LoRA of style {style}", "output", out, nhwc(RECORDED[f"{style}/out"]))
    parity(f"UNet with a LoRA of style {style}", "input gradient", grad, nhwc(RECORDED[f"{style}/grad"]))


def test_gradients_of_down_and_up_equal_diffusers(tmp_path, parity):
    net, adapter = read_style(tmp_path, "peft")
    (of_weights, _), _ = program("sd15")(lora.adapt(net, adapter).params)
    _, backward = jax.vjp(lambda params: adapter.apply(params, net.params), adapter.params)
    options, grads = json.loads(files()["peft"][2]["lora_adapter_metadata"]), {}
    for layer, (down, up) in lora.factors(backward(of_weights)[0]).items():
        name = lora.layer_name(layer)
        alpha = options["unet.alpha_pattern"].get(name, options["unet.lora_alpha"])
        grads |= {(f"{name}.A",): down, (f"{name}.B",): up * alpha / golden.RANK}
    parity.weights("UNet with a LoRA of style peft", grads, RECORDED["peft/grad_norm"], name_of=lambda path: path[0])


def test_a_text_encoders_lora_equals_diffusers(tmp_path, parity):
    tensors, params = files()["kohya"][1], weights_of(encoder())
    loras = lora.read_lora(written(tmp_path, tensors), {"text_encoder": params, "unet": None})
    assert list(loras) == ["text_encoder"]
    assert 2 * len(lora.factors(loras["text_encoder"].params)) == RECORDED["kohya/num_text"]
    apply, ids = clip.Apply(encoder()), make_clip.token_ids(make_clip.L)
    out = jax.jit(apply)(loras["text_encoder"](params), ids).last_hidden_state
    parity("Text encoder with a LoRA of style kohya", "output", out, RECORDED["kohya/text"])


LAYERS = {"block": {"to_q": (4, 6), "to_out_0": (6, 4), "conv1": (3, 3, 4, 6), "proj_in": (1, 1, 6, 4)}}


def tree(layers=LAYERS, dtype=jnp.float32):
    """A network's weights without the network."""
    rng = np.random.default_rng(0)
    draw = lambda shape: {"kernel": jnp.asarray(rng.normal(size=shape), dtype), "bias": jnp.zeros(shape[-1])}
    return jax.tree.map(draw, layers, is_leaf=lambda x: isinstance(x, tuple))


def net_of(params):
    return Denoiser(params, print, DDPM(), "eps")  # never called


def moved_lora(params, rank=2, alpha=None, targets=("to_q", "to_out.0", "conv1", "proj_in")):
    """A LoRA whose up is no longer zero."""
    adapter = lora.make_lora(net_of(params), jax.random.key(0), rank, alpha, targets)
    return jax.tree.map(lambda x: x + 0.1 * jnp.cos(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape), adapter)


def test_a_new_lora_has_no_effect_and_pytorchs_initialisation():
    params = tree({"to_q": (400, 300), "conv1": (3, 3, 40, 30)})
    make = functools.partial(lora.make_lora, net_of(params), rank=20, targets=("to_q", "conv1"))
    adapter = make(jax.random.key(0))
    assert all(map(jnp.array_equal, jax.tree.leaves(adapter(params)), jax.tree.leaves(params)))
    assert adapter.params["conv1"]["down"].shape == (3, 3, 40, 20)
    assert adapter.params["conv1"]["up"].shape == (1, 1, 20, 30)
    for name in ("to_q", "conv1"):
        down, fan_in = adapter.params[name]["down"], np.prod(params[name]["kernel"].shape[:-1])
        assert 0.99 < np.abs(down).max() * np.sqrt(fan_in) <= 1.0
        np.testing.assert_allclose([down.mean(), down.std()], [0.0, (3 * fan_in) ** -0.5], atol=0.04 * fan_in**-0.5)
    other = jax.jit(make)(jax.random.key(1))
    assert jax.tree.structure(other) == jax.tree.structure(adapter)
    assert jnp.abs(other.params["to_q"]["down"] - adapter.params["to_q"]["down"]).max() > 1e-3
    assert jax.tree.structure(make(jax.random.key(0), alpha=1.0)) != jax.tree.structure(adapter)


@pytest.mark.parametrize("stride", [1, 2])
def test_a_convolution_is_updated_by_a_convolution_and_a_1x1_convolution(stride):
    params, x = tree(), jnp.sin(jnp.arange(2 * 8 * 8 * 4.0)).reshape(2, 8, 8, 4)
    adapter = moved_lora(params, rank=2, alpha=5.0)
    conv = functools.partial(jax.lax.conv_general_dilated, dimension_numbers=("NHWC", "HWIO", "NHWC"))
    strided = functools.partial(conv, window_strides=(stride, stride), padding="SAME")
    down, up = adapter.params["block"]["conv1"]["down"], adapter.params["block"]["conv1"]["up"]
    expected = strided(x, params["block"]["conv1"]["kernel"])
    expected += 0.5 * 5.0 / 2 * conv(strided(x, down), up, (1, 1), "VALID")
    ours = strided(x, lora.adapt(net_of(params), adapter, scale=0.5).params["block"]["conv1"]["kernel"])
    assert_close(ours, expected)


def test_a_bfloat16_base_is_summed_in_float32_and_gradients_stay_float32():
    params = tree(dtype=jnp.bfloat16)
    adapter = moved_lora(params)
    ours, (down, up) = adapter(params)["block"]["to_q"]["kernel"], adapter.params["block"]["to_q"].values()
    base = params["block"]["to_q"]["kernel"]
    assert ours.dtype == jnp.bfloat16
    assert jnp.array_equal(ours, (base.astype(jnp.float32) + down @ up).astype(jnp.bfloat16))
    assert not jnp.array_equal(ours, base + (down @ up).astype(jnp.bfloat16))
    grads = jax.grad(lambda p: (adapter.apply(p, params)["block"]["to_q"]["kernel"] ** 2).sum().astype(jnp.float32))
    assert {x.dtype for x in jax.tree.leaves(grads(adapter.params))} == {jnp.dtype("float32")}


def size(tree):
    return sum(x.nbytes for x in jax.tree.leaves(tree))


@pytest.mark.slow
def test_teacher_fake_score_and_student_share_one_base():
    """Two turns of a distillation: the step takes the base once, and the state has only down and up."""
    teacher, x = recorded_net("small"), np.random.default_rng(0)
    make = functools.partial(lora.make_lora, teacher, rank=2, targets=("to_q", "to_out.0", "conv1", "time_emb_proj"))
    nets = {"student": make(jax.random.key(0)), "fake": make(jax.random.key(1))}
    batch = {"x0": x.normal(size=(2, 8, 8, 4)).astype(np.float32), "text": x.normal(size=(2, 5, 12)).astype(np.float32)}

    def predict(net, batch):
        return net(batch["x0"], 500, batch["text"])

    def fake_loss(n, batch, key):
        return ((predict(lora.adapt(n.teacher, n.fake), batch).x0 - batch["x0"]) ** 2).mean(), {}

    def student_loss(n, batch, key):
        target = predict(n.teacher, batch).x0 - predict(lora.adapt(n.teacher, n.fake), batch).x0
        return (predict(lora.adapt(n.teacher, n.student), batch).x0 * target).mean(), {}

    turns = {"fake": Turn(("fake",), fake_loss), "student": Turn(("student",), student_loss)}
    optimizers, ema = dict.fromkeys(turns, optax.sgd(1.0)), {"student": 0.5}
    state, frozen = init_state(nets, turns, optimizers, ema), {"teacher": teacher}
    step = jax.jit(functools.partial(train_step, turns=turns, optimizers=optimizers, ema=ema), static_argnums=3)
    compiled = step.lower(state, frozen, batch, ("fake", "student")).compile()
    memory = compiled.memory_analysis()
    assert size(state) < 0.5 * size(teacher)
    assert memory.argument_size_in_bytes == size((state, frozen, batch))  # the base once, not three times
    assert memory.output_size_in_bytes < 2 * size(state)  # a step does not return the base

    for expected in (["up"], ["down", "up"]):  # up starts at 0, so down's first gradient is 0
        before, (state, _) = state, compiled(state, frozen, batch)
        changed = jax.tree.map(lambda a, b: bool((a != b).any()), before.nets, state.nets)
        for name in turns:
            halves = flax.traverse_util.flatten_dict(changed[name].params)
            assert sorted({path[-1] for path, moved in halves.items() if moved}) == expected


def changed(net, seed=0, only=None):
    """The net with noise of its weights' size on every weight, or on those of one layer."""
    flat, rng = flax.traverse_util.flatten_dict(net.params), np.random.default_rng(seed)
    noise = lambda x: np.std(x) * rng.standard_normal(x.shape).astype(np.float32)
    flat = {path: x + noise(x) if only in (None, path[:-1]) else x for path, x in flat.items()}
    return net.replace(params=flax.traverse_util.unflatten_dict(flat))


def test_the_lora_of_a_difference_is_its_best_approximation(tmp_path):
    """Of full rank it is the difference; of a lower one the singular values that are left out are its error."""
    base = recorded_net("small")
    net, before = changed(base), lora.adaptable_kernels(base.params)
    for rank in (1, 3, 10_000):
        update = lora.of_difference(base, net, rank)
        file = lora.save_lora(tmp_path / str(rank), {"unet": update}, np.float32)  # ranks differ from layer to layer
        after = lora.adapt(base, lora.read_lora(file, {"unet": base.params})["unet"])
        for layer, kernel in lora.adaptable_kernels(net.params).items():
            found, flat = lora.adaptable_kernels(after.params)[layer], (-1, kernel.shape[-1])
            left = np.linalg.svd((kernel - before[layer]).reshape(flat), compute_uv=False)[rank:]
            np.testing.assert_allclose(np.square(kernel - found).sum(), np.square(left).sum(), rtol=1e-3, atol=1e-8)
    assert any(kernel.ndim == 4 for kernel in before.values())


def test_kernels_that_did_not_change_get_no_update():
    base = recorded_net("small")
    layer = next(iter(lora.adaptable_kernels(base.params)))
    assert {*lora.factors(lora.of_difference(base, changed(base, only=layer), 2).params)} == {layer}


def test_networks_of_other_shapes_have_no_difference():
    base = recorded_net("small")
    with pytest.raises(ValueError, match=r"no LoRA of one network is the other: .*conv_in.* differ in shape"):
        lora.of_difference(base, recorded_net("sd15"), 2)
    with pytest.raises(ValueError, match="rank is at least 1, not 0"):
        lora.of_difference(base, base, 0)


def test_saved_files_have_diffusers_names_and_round_trip(tmp_path):
    net, adapter = read_style(tmp_path, "peft")
    file = lora.save_lora(tmp_path, {"unet": adapter}, dtype=np.float32)
    held = safetensors.numpy.load_file(file)
    assert [f"{k} {x.shape}" for k, x in sorted(held.items())] == RECORDED["saved"].tolist()  # names and shapes
    back = lora.read_lora(tmp_path, {"unet": net.params})["unet"]
    assert jax.tree.structure(back) == jax.tree.structure(adapter)
    assert all(map(jnp.array_equal, jax.tree.leaves(back), jax.tree.leaves(adapter)))


def test_alpha_is_multiplied_into_saved_weights(tmp_path):
    params = tree()
    adapter = moved_lora(params, rank=2, alpha=5.0)
    file = lora.save_lora(tmp_path, {"unet": adapter, "text_encoder": moved_lora(params)})
    assert {x.dtype for x in safetensors.numpy.load_file(file).values()} == {np.dtype(np.float16)}
    back = lora.read_lora(tmp_path, {"unet": params, "text_encoder": params})["unet"]
    for ours, theirs in zip(jax.tree.leaves(back(params)), jax.tree.leaves(adapter(params)), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-3)  # float16 has 11 bits


def test_files_of_kohyas_names_round_trip(tmp_path):
    net, adapter = read_style(tmp_path, "peft")
    rescaled = adapter.replace(apply=lora.Update(3.0))
    file = lora.save_kohya(tmp_path, {"unet": rescaled}, dtype=np.float32)
    held = safetensors.numpy.load_file(file)
    assert len(held) == 3 * len(lora.factors(adapter.params))
    assert all(re.fullmatch(r"lora_unet_\w+\.(lora_(up|down)\.weight|alpha)", key) for key in held)
    assert {float(x) for key, x in held.items() if key.endswith("alpha")} == {3.0}
    back = lora.read_lora(file, {"unet": net.params})["unet"]
    for ours, theirs in zip(jax.tree.leaves(back(net.params)), jax.tree.leaves(rescaled(net.params)), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-7)  # alpha / r is multiplied into one factor


@pytest.mark.slow
def test_diffusers_loads_files_of_kohyas_names(tmp_path):
    torch, diffusers, _ = (pytest.importorskip(name) for name in ("torch", "diffusers", "peft"))
    config = {
        "in_channels": 4, "out_channels": 4, "block_out_channels": [8, 8], "layers_per_block": 1, "norm_num_groups": 4,
        "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"], "attention_head_dim": 2, "cross_attention_dim": 8,
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    }  # fmt: skip
    net = models.init(config, 0, zero_out=False)
    models.save(tmp_path, "unet", net.params, net.apply.module.to_config(), dtype=np.float32)
    adapter = lora.make_lora(net, jax.random.key(1), 2, 3.0, lora.present_targets(net, lora.BLOCKS))
    adapter = adapter.replace(params=jax.tree.map(lambda x: x + 0.1, adapter.params))
    lora.save_kohya(tmp_path, {"unet": adapter}, dtype=np.float32)
    unet = diffusers.UNet2DConditionModel.from_pretrained(str(tmp_path), subfolder="unet")
    loader = diffusers.loaders.StableDiffusionLoraLoaderMixin
    state, alphas = loader.lora_state_dict(str(tmp_path), weight_name=lora.KOHYA_FILE, unet_config=unet.config)
    loader.load_lora_into_unet(state, network_alphas=alphas, unet=unet)
    z, text = np.random.default_rng(0).standard_normal((2, 8, 8, 4), np.float32), np.ones((2, 3, 8), np.float32)
    with torch.no_grad():
        theirs = unet(torch.tensor(np.moveaxis(z, -1, 1)), 7, encoder_hidden_states=torch.tensor(text)).sample
    call = lambda net: np.asarray(net.apply(net.params, z, np.full(2, 7), {"encoder_hidden_states": text}))
    np.testing.assert_allclose(call(lora.adapt(net, adapter)), np.moveaxis(theirs.numpy(), 1, -1), atol=1e-4)
    assert np.abs(call(net) - call(lora.adapt(net, adapter))).max() > 1e-2


def arrays(rank=2, name="block.to_q", down="lora.down.weight", up="lora.up.weight", shape=(4, 6)):
    return {
        f"unet.{name}.{down}": np.ones((rank, shape[0]), np.float32),
        f"unet.{name}.{up}": np.ones((shape[1], rank), np.float32),
    }


def test_alpha_comes_from_the_layer_then_the_metadata_then_the_rank(tmp_path):
    two = arrays() | arrays(name="block.to_out.0", shape=(6, 4))
    metadata = lambda **options: {"lora_adapter_metadata": json.dumps({f"unet.{k}": x for k, x in options.items()})}

    def ups(tensors, metadata=None):
        params = lora.read_lora(written(tmp_path, tensors, metadata), {"unet": tree()})["unet"].params["block"]
        return [float(params[name]["up"].max()) for name in ("to_q", "to_out_0")]

    assert ups(two) == [1.0, 1.0]
    assert ups(two | {"unet.block.to_q.alpha": np.array(6.0, np.float32)}) == [3.0, 1.0]
    assert ups(two | {"unet.block.to_q.alpha": np.ones(1)}, metadata(lora_alpha=8)) == [0.5, 4.0]
    assert ups(two, metadata(lora_alpha=8, alpha_pattern={"to_q": 3})) == [1.5, 4.0]
    np.testing.assert_allclose(ups(two, metadata(lora_alpha=8, use_rslora=True)), [8 / 2**0.5] * 2)


def test_names_without_a_prefix_belong_to_the_unet(tmp_path):
    net, adapter = read_style(tmp_path, "processor")
    bare = {key.removeprefix("unet."): x for key, x in files()["processor"][1].items()}
    other = lora.read_lora(written(tmp_path, bare), {"unet": net.params})["unet"]
    assert jax.tree.all(jax.tree.map(jnp.array_equal, other, adapter))


def test_original_layer_names_of_the_real_networks():
    """Of SD 1.5 (up_blocks.0 has no attention) and SDXL; the latter are those of published LoRAs."""
    resnets = lambda side, blocks, n: [f"{side}_blocks.{b}.resnets.{j}.conv1" for b in range(blocks) for j in range(n)]
    sd15 = {
        "down_blocks.0.attentions.0.proj_in": "input_blocks.1.1.proj_in",
        "down_blocks.2.attentions.1.proj_in": "input_blocks.8.1.proj_in",
        "down_blocks.2.downsamplers.0.conv": "input_blocks.9.0.op",
        "down_blocks.3.resnets.1.conv1": "input_blocks.11.0.in_layers.2",
        "up_blocks.0.upsamplers.0.conv": "output_blocks.2.1.conv",
        "up_blocks.1.upsamplers.0.conv": "output_blocks.5.2.conv",
        "up_blocks.1.attentions.0.proj_in": "output_blocks.3.1.proj_in",
        "up_blocks.3.attentions.2.proj_out": "output_blocks.11.1.proj_out",
    }
    sdxl = {
        "down_blocks.0.downsamplers.0.conv": "input_blocks.3.0.op",
        "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q":
            "input_blocks.4.1.transformer_blocks.0.attn1.to_q",
        "down_blocks.2.attentions.1.proj_in": "input_blocks.8.1.proj_in",
        "mid_block.attentions.0.proj_out": "middle_block.1.proj_out",
        "up_blocks.0.attentions.0.proj_in": "output_blocks.0.1.proj_in",
        "up_blocks.0.upsamplers.0.conv": "output_blocks.2.2.conv",
        "up_blocks.2.resnets.2.conv_shortcut": "output_blocks.8.0.skip_connection",
    }  # fmt: skip
    for known, n in ((sd15, 4), (sdxl, 3)):
        attended = [f"up_blocks.{b}.attentions.0.proj_in" for b in range(n - 3, n - 1)]
        ours = ldm.unet_names([*known, *attended, *resnets("down", n, 2), *resnets("up", n, 3)])
        assert {name: ours[name] for name in known} == known


@pytest.mark.parametrize(
    ("rank", "targets", "sentence"),
    [
        (5, ("to_q",), r"rank 5 is not between 1 and the full rank of block.to_q \(4\)"),
        (0, ("to_q",), "rank 0 is not between"),
        (2, ("to_q", "to_oout_0"), "ends in the LoRA target 'to_oout.0'; the nearest one is 'to_out.0'"),
        (2, ("o_q",), "LoRA target 'o_q'; the nearest one is 'to_q'"),
        (2, (), "no targets"),
    ],
)
def test_bad_ranks_and_targets_are_refused(rank, targets, sentence):
    with pytest.raises(ValueError, match=sentence):
        lora.make_lora(net_of(tree()), jax.random.key(0), rank, targets=targets)


def test_targets_may_be_parameter_paths():
    make = functools.partial(lora.make_lora, net_of(tree()), jax.random.key(0), 1)
    assert list(lora.factors(make(targets=("to_out_0",)).params)) == [("block", "to_out_0")]
    assert list(lora.factors(make(targets=("block.to_q",)).params)) == [("block", "to_q")]


def test_another_networks_lora_is_refused():
    adapter = moved_lora(tree())
    with pytest.raises(ValueError, match=r"another network: its block.to_q is \(4, 6\), the network's is \(4, 8\)"):
        adapter(tree({"block": LAYERS["block"] | {"to_q": (4, 8)}}))
    with pytest.raises(ValueError, match=r"its block.conv1 is \(3, 3, 4, 6\), the network has none"):
        adapter(tree({"block": {"to_q": (4, 6), "to_out_0": (6, 4)}}))


@pytest.mark.parametrize(
    ("tensors", "sentence"),
    [
        (arrays(name="block.to_k"), "has unet.block.to_k.lora.down.weight, unet.block.to_k.lora.up.weight, which"),
        ({"loss": np.ones(1)}, "has loss, which this unet has no place for"),
        (arrays(up="lora.up.bias"), "has unet.block.to_q.lora.up.bias, which"),
        (dict([*arrays().items()][:1]), "only down of block.to_q: it is incomplete"),
        (arrays() | arrays(down="lora_A.weight", up="lora_B.weight"), "down of block.to_q twice"),
        (arrays(shape=(4, 8)), r"block.to_q has down \(4, 2\) and up \(2, 8\) .* its kernel is \(4, 6\)"),
        (arrays(name="block.conv1"), r"block.conv1 has down \(4, 2\) and up \(2, 6\) .* its kernel is \(3, 3, 4, 6\)"),
        (arrays() | {"text_encoder.a.lora_A.weight": np.ones((2, 2))}, "also adapts text_encoder: pass its weights"),
        ({"lora_te2_a.lora_down.weight": np.ones((2, 2))}, "holds nothing for unet, only for text_encoder_2"),
        ({"lora_unet_block_to_q.hada_w1_a": np.ones((4, 2))}, r"is a LoHa \(lora_unet_block_to_q.hada_w1_a\)"),
        (arrays() | {"unet.block.to_q.dora_scale": np.ones((6, 1))}, "is a DoRA .*: merge it"),
        (arrays() | {"unet.block.conv1.lora_mid.weight": np.ones((2, 2, 3, 3))}, "is a LoCon with a Tucker core"),
    ],
)  # fmt: skip
def test_bad_files_are_refused(tensors, sentence, tmp_path):
    with pytest.raises(ValueError, match=sentence):
        lora.read_lora(written(tmp_path, tensors), {"unet": tree()})


@pytest.mark.parametrize(
    ("key", "kind"),
    [
        ("block.to_q.lokr_w1", "LoKr"), ("block.to_q.ia3_l", r"\(IA\)3"), ("lora_unet_block_to_q.on_input", r"\(IA\)3"),
        ("block.to_q.boft_R", "BOFT"), ("block.to_q.oft_blocks", "OFT"), ("block.to_q.diff_b", "full difference"),
        ("base_model.model.block.to_q.lora_magnitude_vector", "DoRA"), ("block.to_q.lora_E", "AdaLoRA"),
        ("base_model.model.conv_in.modules_to_save.default.weight", r"LoRA with retrained layers \(modules_to_save\)"),
    ],
)  # fmt: skip
def test_other_adapters_are_refused_by_name(key, kind, tmp_path):
    with pytest.raises(ValueError, match=rf"lora\.safetensors is a {kind} \(.*\), not a plain LoRA: merge it"):
        lora.read_lora(written(tmp_path, arrays() | {key: np.ones((2, 2), np.float32)}), {"unet": tree()})


def test_missing_and_broken_files_are_refused(tmp_path):
    with pytest.raises(ValueError, match="pytorch_lora_weights.safetensors is missing"):
        lora.read_lora(tmp_path, {"unet": tree()})
    (tmp_path / "x.safetensors").write_bytes(b"not at all")
    with pytest.raises(ValueError, match="truncated or not a safetensors file"):
        lora.read_lora(tmp_path / "x.safetensors", {"unet": tree()})
