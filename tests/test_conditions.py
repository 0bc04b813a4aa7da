"""Conditioning: extra input channels, pretrained ControlNets, LoRAs merged into a teacher."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from cddistill import build, checks, commands, config, models
from cddistill.methods import METHODS
from cddistill.methods.pretrained import Pretrained
from cddistill.models import adapter, lora
from cddistill.net import Adapted

KEY = jax.random.key(0)
x0_of = jax.jit(lambda net, branch, *inputs: Adapted(net, branch)(*inputs).x0)  # branch may be None


@pytest.fixture(scope="module")
def batch():
    return tiny.make_batch(size=4)


def test_widened_network_equals_the_teacher_at_init_and_has_condition_gradients(batch):
    teacher, t = tiny.teacher(), jnp.array([3, 100, 500, 900])
    wide = adapter.widen(teacher, batch)
    assert wide.apply.module.in_channels == 6
    seen = jax.jit(lambda n: Adapted(n)(batch["x0"], t, batch["text"], batch["cond"]))
    alone = jax.jit(lambda n: n(batch["x0"], t, batch["text"]).x0)(teacher)
    np.testing.assert_allclose(seen(wide).x0, alone, atol=1e-6)
    grad = jax.jit(jax.grad(lambda n: (seen(n).eps ** 2).sum()))(wide).params["conv_in"]["kernel"]
    assert np.abs(grad[:, :, 3:]).min() > 0
    other = x0_of(tiny.disturbed(wide), None, batch["x0"], t, batch["text"], batch["cond"][::-1])
    assert not np.allclose(seen(tiny.disturbed(wide)).x0, other)


def test_teacher_that_already_takes_the_condition_is_copied(batch):
    wide = tiny.disturbed(adapter.widen(tiny.teacher(), batch))
    again = adapter.widen(wide, batch)
    jax.tree.map(np.testing.assert_array_equal, again, wide)
    held = {x.unsafe_buffer_pointer() for x in jax.tree.leaves(wide)}
    assert not held & {x.unsafe_buffer_pointer() for x in jax.tree.leaves(again)}  # either may be donated


def test_conditions_that_cannot_be_concatenated_are_refused(batch):
    with pytest.raises(ValueError, match=r"needs a condition of x0's size, \(8, 8\), not \(16, 16\)"):
        adapter.widen(tiny.teacher(), batch | {"cond": np.zeros((4, 16, 16, 3), "f")})
    wide = adapter.widen(tiny.teacher(), batch)
    with pytest.raises(ValueError, match="in_channels 3 or 4"):
        adapter.widen(wide, batch | {"cond": np.zeros((4, 8, 8, 1), "f")})
    with pytest.raises(ValueError, match="leaves nothing to train"):
        METHODS["codi"](adapter="concat", freeze_backbone=True)


def test_pretrained_editing_network_uses_the_condition(batch):
    n = SimpleNamespace(teacher=tiny.disturbed(adapter.widen(tiny.teacher(), batch)))
    draw = jax.jit(lambda b: Pretrained().sample(n, tiny.randn(0, 4, 8, 8, 3), b, None, 1))
    other = batch | {"cond": batch["cond"][::-1]}
    assert np.abs(draw(batch) - draw(other)).min() > 0
    checks.check_shapes(n.teacher, batch)
    with pytest.raises(ValueError, match="in_channels = 6 but z_t"):
        checks.check_shapes(n.teacher, {k: x for k, x in batch.items() if k != "cond"})


def test_pretrained_network_is_sampled_with_a_controlnet(batch):
    teacher = tiny.teacher()
    branch = tiny.disturbed(adapter.make_branch(teacher, jax.random.key(0)))
    n = SimpleNamespace(teacher=teacher, controlnet=branch)
    noise = tiny.randn(0, 4, 8, 8, 3)
    got = jax.jit(lambda: Pretrained().sample(n, noise, batch, None, 1))()
    expected = x0_of(teacher, branch, noise, teacher.schedule.grid(1), batch["text"], batch["cond"])
    np.testing.assert_allclose(got, expected, atol=1e-4)


@pytest.mark.parametrize("method", [Pretrained, METHODS["diffusion"]])
def test_text_and_image_have_guidance_scales_of_their_own(method, batch):
    """InstructPix2Pix, eq. 3, in one step, where the sample is the guided x0."""
    net, noise = tiny.disturbed(adapter.widen(tiny.teacher(), batch)), tiny.randn(0, 4, 8, 8, 3)
    n, t = SimpleNamespace(teacher=net, backbone_ema=net), net.schedule.grid(1)
    calls = [(batch["null"], 0 * batch["cond"]), (batch["null"], batch["cond"]), (batch["text"], batch["cond"])]
    nothing, image, both = (x0_of(net, None, noise, t, text, cond) for text, cond in calls)
    options = {"adapter": "concat"} if method is not Pretrained else {}
    drawn = method(guidance=7.5, image_guidance=1.5, **options)
    got = jax.jit(lambda: drawn.sample(n, noise, batch, None, 1))()
    np.testing.assert_allclose(got, nothing + 1.5 * (image - nothing) + 7.5 * (both - image), atol=1e-4)
    assert drawn.nfe(4) == 12
    assert dataclasses.replace(drawn, image_guidance=1.0).nfe(4) == 8


def test_image_guidance_needs_an_image(batch):
    n, noise = SimpleNamespace(teacher=tiny.teacher()), tiny.randn(0, 4, 8, 8, 3)
    with pytest.raises(ValueError, match="image_guidance is for networks that take a conditioning image"):
        Pretrained(image_guidance=1.5).sample(n, noise, batch, None, 1)
    for options in ({"image_guidance": 1.5}, {"image_dropout": 0.1}):
        with pytest.raises(ValueError, match="are for a conditioning image: set method.adapter"):
            METHODS["diffusion"](**options)


def test_a_dropped_condition_is_zero(batch):
    """With image_dropout 1 the loss is that of conditions of zeros; with 0.5, of some."""
    n = SimpleNamespace(teacher=tiny.teacher(), backbone=tiny.disturbed(adapter.widen(tiny.teacher(), batch)))
    loss = lambda rate, batch: METHODS["diffusion"](adapter="concat", image_dropout=rate).loss(n, batch, KEY)[0]
    loss = jax.jit(loss, static_argnums=0)
    blind = loss(0.0, adapter.without_condition(batch))
    assert loss(1.0, batch) == pytest.approx(float(blind), rel=1e-5)
    assert len({float(loss(rate, batch)) for rate in (0.0, 0.5, 1.0)}) == 3


@pytest.mark.parametrize("method", ["codi", "diffusion"])
def test_student_branch_is_initialised_from_the_controlnet(method, batch):
    teacher = tiny.teacher()
    given = tiny.disturbed(adapter.make_branch(teacher, jax.random.key(0)))
    student = METHODS[method](adapter="controlnet", freeze_backbone=True)
    nets = student.init(jax.random.key(1), {"teacher": teacher, "controlnet": given}, batch)
    jax.tree.map(np.testing.assert_array_equal, nets["branch"], given)
    assert nets["branch"].params["conv_in"]["kernel"] is not given.params["conv_in"]["kernel"]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """(teacher's folder, ControlNet's folder, LoRA file, the LoRA)."""
    folder = tmp_path_factory.mktemp("files")
    teacher, net = tiny.save_teacher(folder / "teacher")
    branch = tiny.disturbed(adapter.make_branch(net, jax.random.key(0)))
    models.save(folder, "controlnet", branch.params, branch.apply.module.to_config(), dtype=np.float32)
    made = tiny.disturbed(lora.make_lora(net, jax.random.key(0), 2, targets=("conv1", "conv2")), scale=0.3)
    return teacher, folder / "controlnet", lora.save_lora(folder / "lora", {"unet": made}, np.float32), made


def settings(method, teacher, **run):
    c = config.defaults(method)
    c.update(teacher=str(teacher), batch_size=8, sample_steps=(2,), **run)
    c.data.update(size=8, task="sr", scale=2)
    return c


def test_lora_is_merged_into_the_teacher_and_the_export(files, tmp_path):
    teacher, _, file, made = files
    c = settings("pretrained", teacher, lora=str(file), lora_scale=0.5)
    c.data.task = "none"
    expected = made(models.load(teacher).params, 0.5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6),
        build.build(config.resolve(c)).frozen["teacher"].params, expected,
    )  # fmt: skip
    commands.export_run(c, tmp_path / "run", str(tmp_path / "out"))
    written = models.load(tmp_path / "out").params
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-3), written, expected)


def test_controlnet_is_loaded_and_exported(files, tmp_path):
    teacher, controlnet, _, _ = files
    c = settings("pretrained", teacher, controlnet=str(controlnet))
    frozen = build.build(config.resolve(c)).frozen
    assert isinstance(frozen["controlnet"].apply.module, models.CONTROLNETS)
    commands.export_run(c, tmp_path / "run", str(tmp_path / "out"))
    held = (tmp_path / "out" / "controlnet" / models.convert.TORCH_FILE).read_bytes()
    assert held == (controlnet / models.convert.TORCH_FILE).read_bytes()
    c.controlnet = str(teacher / "unet")
    with pytest.raises(ValueError, match="not a ControlNetModel or MuBlendModel"):
        build.build(config.resolve(c))


def test_lora_for_another_network_is_refused(files, tmp_path):
    teacher, _, _, made = files
    wrong = dataclasses.replace(made, params={"mid_block": {"nowhere": made.params["mid_block"]["resnets_0"]["conv1"]}})
    c = settings("pretrained", teacher, lora=str(lora.save_lora(tmp_path, {"unet": wrong})))
    with pytest.raises(ValueError, match="has no place for"):
        build.build(config.resolve(c))
