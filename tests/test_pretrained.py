"""Pretrained few-step students: sampled with their folder's scheduler, evaluated without training."""

import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

import cddistill
from cddistill import commands, config, data, models, outline, sampling, sharding, train
from cddistill.methods.pretrained import Pretrained
from cddistill.models.guidance import guidance_embedding

pytestmark = pytest.mark.usefixtures("one_device")


def folder(tmp_path, **scheduler):
    """A tiny network with these scheduler options."""
    tiny.save_teacher(tmp_path)
    path = tmp_path / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | scheduler))
    return tmp_path


def draw(method, net, steps, key=0):
    batch = tiny.make_batch()
    n = SimpleNamespace(teacher=net)
    return jax.jit(lambda noise: method.sample(n, noise, batch, tiny.step_noise(noise, key), steps))(
        tiny.randn(0, 16, 8, 8, 3)
    )


def test_the_folders_scheduler_selects_the_sampler(tmp_path):
    """LCM adds new noise between steps, so its samples depend on the key; those of DDIM do not."""
    path = folder(tmp_path, _class_name="LCMScheduler", rescale_betas_zero_snr=False, beta_schedule="scaled_linear")
    net, lcm = models.load(path), Pretrained(scheduler=str(path))
    assert not np.allclose(draw(lcm, net, 2, key=0), draw(lcm, net, 2, key=1))
    np.testing.assert_array_equal(draw(lcm, net, 1, key=0), draw(lcm, net, 1, key=1))
    np.testing.assert_array_equal(draw(Pretrained(), net, 2, key=0), draw(Pretrained(), net, 2, key=1))


@pytest.mark.parametrize("name", ["", "unet", "unet/diffusion_pytorch_model.safetensors", "scheduler"])
def test_the_scheduler_is_found_from_any_part_of_the_folder(tmp_path, name):
    options = {"_class_name": "LCMScheduler", "rescale_betas_zero_snr": False, "original_inference_steps": 20}
    how = Pretrained(scheduler=str(folder(tmp_path, **options) / name)).sampling(None, 4)
    assert (how.sampler, how.original_inference_steps) == ("lcm", 20)


def test_own_timesteps_apply_to_their_number_of_steps():
    net, method = tiny.teacher(), Pretrained(timesteps=(399,))
    assert method.sampling(net.schedule, 1).timesteps == (399,)
    assert method.sampling(net.schedule, 2).timesteps is None
    batch, noise = tiny.make_batch(), tiny.randn(0, 16, 8, 8, 3)
    expected = jax.jit(
        lambda z: sampling.ddim(lambda z, t: net(z, t, batch["text"]), net.schedule, z, jnp.array([399]))
    )
    np.testing.assert_allclose(draw(method, net, 1), expected(noise), atol=1e-5)


def test_the_guidance_embedding_is_that_of_lcm():
    """Sinusoids of 1000 (w - 1), all sines first: by hand for width 4 at w = 1.002."""
    got = guidance_embedding(jnp.array([1.002]), 4)
    np.testing.assert_allclose(got, [[np.sin(2), np.sin(2e-4), np.cos(2), np.cos(2e-4)]], atol=1e-3)


def test_guidance_doubles_network_evaluations():
    assert Pretrained().nfe(4) == 4
    assert Pretrained(guidance=2.0).nfe(4) == 8


def test_a_pretrained_student_can_be_evaluated_but_not_trained(tmp_path):
    settings = config.defaults("pretrained")
    path = str(folder(tmp_path / "teacher"))
    settings.update(teacher=path, batch_size=8, sample_steps=(2,), eval_images=8)
    settings.method.scheduler = path
    settings.data.size = 8
    commands.evaluate_run(settings, tmp_path / "run")
    assert json.loads((tmp_path / "run" / "scores.json").read_text())["student, 2 steps"]["nfe"] == 2
    assert (tmp_path / "run" / "report.html").is_file()
    with pytest.raises(ValueError, match="trains nothing"):
        train.train(settings, tmp_path / "run")


def test_the_embedded_student_enlarges_with_its_own_branch():
    """emoji_codi: nearer to held-out images than bicubic copies are, in two steps."""
    settings = config.defaults("pretrained")
    settings.data.task = "sr"
    rows = data.examples(config.resolve(settings).data, "test", 16)
    model = cddistill.load("emoji_codi")
    images = cddistill.sample(model, image=list(rows["cond"]), label=[int(x) for x in rows["label"]])
    truth = rows["x0"] / 2 + 0.5
    assert model.steps == 2
    assert np.square(images - truth).mean() < 0.85 * np.square(rows["cond"] - truth).mean()


@pytest.mark.parametrize(("teacher", "task", "has_branch"), [("emoji_codi", "sr", True), ("emoji", "none", False)])
def test_what_is_not_trained_is_sampled_with_the_controlnet_of_its_folder(teacher, task, has_branch):
    settings = config.defaults("pretrained")
    settings.teacher, settings.data.task = teacher, task
    frozen = outline.outline(config.resolve(settings), sharding.make_mesh()).parts.frozen
    assert ("controlnet" in frozen) is has_branch


@pytest.mark.parametrize(
    ("teacher", "task", "said"),
    [
        ("emoji", "sr", "data.task=sr has a conditioning image, and emoji takes none: set config.controlnet"),
        ("emoji_codi", "none", "emoji_codi takes a conditioning image, and data.task=none has none"),
    ],
)
def test_a_condition_needs_a_network_that_takes_it(tmp_path, teacher, task, said):
    settings = config.defaults("pretrained")
    settings.teacher, settings.data.task = teacher, task
    with pytest.raises(ValueError, match=said):
        commands.evaluate_run(settings, tmp_path)
