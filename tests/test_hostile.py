"""Hostile values, arrays and records: each is refused in one sentence that names it, before anything is loaded."""

import copy
import dataclasses
import functools
import re
import sys

import pytest
from absl import flags

from cddistill import config, main, typed
from cddistill.data import DataConfig
from cddistill.data.loader import option_classes
from cddistill.methods import METHODS

NAN, INF = float("nan"), float("inf")
ABSURD = [  # (method, key, value, what it must be)
    ("codi", "steps", 0, "at least 1"),
    ("codi", "steps", -5, "at least 1"),
    ("codi", "steps", 2**31, "32 bits"),
    ("codi", "steps", 1e300, "32 bits"),
    ("codi", "steps", NAN, "int, not float nan"),
    ("codi", "batch_size", 0, "at least 1"),
    ("codi", "batch_size", 10**9, "at least 1 and at most 1048576"),
    ("codi", "accumulate", 0, "at least 1"),
    ("codi", "seed", -1, "at least 0 and below 2147483548"),
    ("codi", "seed", NAN, "int, not float nan"),
    ("codi", "keep", 0, "at least 1"),
    ("codi", "log_every", -10, "at least 1"),
    ("codi", "checkpoint_every", 0, "at least 1"),
    ("codi", "eval_every", 0, "at least 1"),
    ("codi", "eval_images", -1, "at least 0"),
    ("codi", "fsdp", 0, "-1, or at least 1"),
    ("codi", "fsdp", -2, "-1, or at least 1"),
    ("codi", "lora_scale", NAN, "a finite number"),
    ("codi", "lora_scale", -INF, "a finite number"),
    ("codi", "lora_scale", 1e39, "a finite number that float32 holds"),
    ("codi", "sample_steps", (), "at least one value"),
    ("codi", "sample_steps", (4, 0), "at least 1"),
    ("codi", "sample_steps", (10**9,), "at most 10000"),
    ("codi", "teacher_steps", (-1,), "at least 1"),
    ("codi", "baseline_steps", (0,), "at least 1"),
    ("codi", "teacher_guidance", NAN, "a finite number"),
    ("codi", "teacher_guidance", -3.0, "at least 0"),
    ("codi", "teacher_sampler", "euler", "one of ddim, heun, dpm_solver_pp"),
    ("codi", "parallel", "gpu", "one of jit, pmap"),
    ("codi", "dtype", "float8", "one of float32, bfloat16"),
    ("codi", "encode_dtype", "bfloat16", "one of float16, float32"),
    ("codi", "encode_epochs", 0, "at least 1"),
    ("codi", "num_pairs", 0, "at least 1"),
    ("codi", "pairs_shard", -1, "at least 1"),
    ("codi", "pairs_batch", 0, "at least 1"),
    ("codi", "teacher", "emo\0ji", "without zero bytes"),
    ("codi", "init_from_run", ["a"], "str, not list"),
    ("codi", "optim.lr", -1e-4, "at least 0"),
    ("codi", "optim.lr", NAN, "a finite number"),
    ("codi", "optim.lr", INF, "a finite number"),
    ("codi", "optim.lr", True, "float, not bool"),
    ("codi", "optim.betas", (2.0, 3.0), "at least 0 and below 1"),
    ("codi", "optim.betas", (0.9, 1.0), "at least 0 and below 1"),
    ("codi", "optim.betas", (0.9, 0.99, 0.999), "2 values, not 3"),
    ("codi", "optim.betas", (), "2 values, not 0"),
    ("codi", "optim.betas", (NAN, 0.9), "a finite number"),
    ("codi", "optim.eps", 0.0, "above 0"),
    ("codi", "optim.eps", -1e-8, "above 0"),
    ("codi", "optim.weight_decay", -0.1, "at least 0"),
    ("codi", "optim.clip", -1.0, "at least 0"),
    ("codi", "optim.clip", NAN, "a finite number"),
    ("codi", "optim.warmup", -1, "at least 0"),
    ("codi", "optim.cycles", 0, "at least 1"),
    ("codi", "optim.decay", "sine", "one of constant, cosine, linear"),
    ("dmd2", "optim.critic.lr", -1.0, "at least 0"),
    ("dmd2", "optim.critic.decay", "sine", "one of constant, cosine, linear"),
    ("codi", "data.size", 0, "at least 1"),
    ("codi", "data.size", 10**6, "at most 16384"),
    ("codi", "data.num_classes", 0, "at least 1"),
    ("codi", "data.scale", 0, "at least 1"),
    ("codi", "data.source", ["emoji"], "one of emoji, "),
    ("codi", "data.task", None, "one of none, "),
    ("codi", "data.hole", "star", "one of rectangles, brush, half"),
    ("codi", "data.crop", "native", "one of resize, random"),
    ("codi", "data.split", "folders", "one of auto, hash, fill, all"),
    ("codi", "data.degradation", "jpeg", "one of bicubic, realesrgan"),
    ("codi", "data.depth_files", "cm", "one of inverse, metres"),
    ("codi", "data.canny_sigma", (2.0, 1.0), "(low, high)"),
    ("codi", "data.canny_sigma", (1e9, 1e9), "at most 100"),
    ("codi", "data.canny_low", (0.1,), "2 values, not 1"),
    ("codi", "data.canny_high", (-1.0, 0.3), "at least 0"),
    ("codi", "data.x0_shape", (64, 64), "height, width and channels"),
    ("codi", "data.x0_shape", (64, 64, 0), "at least 1"),
    ("codi", "data.mixture", (), "at least one value"),
    ("codi", "method.ema_decay", 2.0, "at least 0 and below 1"),
    ("codi", "method.ema_decay", 1.0, "at least 0 and below 1"),
    ("codi", "method.ema_decay", -0.5, "at least 0 and below 1"),
    ("codi", "method.ema_decay", NAN, "a finite number"),
    ("codi", "method.delta_t", 0, "at least 1 and below 1000"),
    ("codi", "method.delta_t", 5000, "at least 1 and below 1000"),
    ("codi", "method.grid_size", 1, "0, or at least 2 and at most 1000"),
    ("codi", "method.grid_size", -5, "0, or at least 2 and at most 1000"),
    ("codi", "method.snr_gamma", -1.0, "at least 0"),
    ("codi", "method.signal_weight", -1.0, "at least 0"),
    ("codi", "method.consistency_weight", INF, "a finite number"),
    ("codi", "method.guidance", NAN, "a finite number"),
    ("codi", "method.guidance_range", (4.0, 2.0), "(low, high)"),
    ("codi", "method.guidance_range", (1.0, 2.0, 3.0), "2 values, not 3"),
    ("codi", "method.grid_power", 0.0, "above 0"),
    ("codi", "method.text_dropout", 1.5, "at least 0 and at most 1"),
    ("codi", "method.space", "x", "one of eps, x0"),
    ("diffusion", "method.ema_decay", 2.0, "at least 0 and below 1"),
    ("diffusion", "method.text_dropout", -0.1, "at least 0 and at most 1"),
    ("diffusion", "method.image_dropout", 2.0, "at least 0 and at most 1"),
    ("diffusion", "method.grid_power", -1.0, "above 0"),
    ("diffusion", "method.guidance", -INF, "a finite number"),
    ("lcm", "method.grid_size", 0, "at least 2"),
    ("lcm", "method.guidance_range", (0.5, 2.0), "at least 1"),
    ("lcm", "method.embedding_width", 3, "0, or at least 4"),
    ("lcm", "method.embedding_width", 2, "0, or at least 4"),
    ("lcm", "method.lora_rank", 0, "at least 1"),
    ("lcm", "method.lora_alpha", 0.0, "above 0"),
    ("lcm", "method.ema_decay", 1.5, "at least 0 and below 1"),
    ("gd", "method.halvings", 10**9, "at least 1 and at most 20"),
    ("gd", "method.halvings", 0, "at least 1"),
    ("gd", "method.halve_every", 0, "at least 1"),
    ("gd", "method.first_steps", -64, "at least 1"),
    ("dmd2", "method.ratio", 0, "at least 1"),
    ("dmd2", "method.dm_range", (980, 20), "(low, high)"),
    ("dmd2", "method.fake_range", (0, 1000), "at least 0 and below 1000"),
    ("dmd2", "method.student_timesteps", (), "at least one value"),
    ("dmd2", "method.student_timesteps", (249, 999), "falling"),
    ("dmd2", "method.student_timesteps", (1000, 499), "at least 0 and below 1000"),
    ("dmd2", "method.gan_weight", -1.0, "at least 0"),
    ("dmd2", "method.real_guidance", NAN, "a finite number"),
    ("dmd2", "method.lora_rank", -1, "at least 1"),
    ("diffusion2gan", "method.time", 1000, "at least 0 and below 1000"),
    ("diffusion2gan", "method.mix_share", 1.5, "at least 0 and at most 1"),
    ("diffusion2gan", "method.r1_every", 0, "at least 1"),
    ("diffusion2gan", "method.r1_noise", 0.0, "above 0"),
    ("diffusion2gan", "method.r1_weight", -1.0, "at least 0"),
    ("diffusion2gan", "method.warmup", -1, "at least 0"),
    ("autoencoder", "method.channels", (), "at least one value"),
    ("autoencoder", "method.channels", (24, 0), "at least 8"),
    ("autoencoder", "method.channels", (20,), "a multiple of 8"),
    ("autoencoder", "method.layers", 10**9, "at most 100"),
    ("autoencoder", "method.layers", -1, "at least 1"),
    ("autoencoder", "method.latent_channels", 0, "at least 1"),
    ("autoencoder", "method.lpips_every", 0, "at least 1"),
    ("autoencoder", "method.lpips_crop", -8, "at least 0"),
    ("autoencoder", "method.kl_weight", -1.0, "at least 0"),
    ("latent_lpips", "method.width", 5, "a multiple of 2"),
    ("latent_lpips", "method.pools", (3, 6), "at least 1 and at most 5"),
    ("latent_lpips", "method.classes", 0, "at least 1"),
    ("pretrained", "method.timesteps", (100, 900), "falling"),
    ("pretrained", "method.timesteps", (-1,), "at least 0"),
    ("pretrained", "method.embedded_guidance", NAN, "a finite number"),
    ("pretrained", "method.image_guidance", -1.0, "at least 0"),
]


@functools.cache
def defaults(method):
    """The config of a method as a dict."""
    return config.plain(config.defaults(method))


def refused(method, key, value):
    """The sentence with which a config of this method is refused if this key has this value."""
    *groups, field = key.split(".")
    settings = node = copy.deepcopy(defaults(method))
    for group in groups:
        node = node[group]
    node[field] = value
    with pytest.raises(ValueError, match=f"^{re.escape(key)}") as error:
        config.resolve(settings)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 300
    return str(error.value)


@pytest.mark.parametrize(("method", "key", "value", "said"), ABSURD, ids=lambda x: str(x)[:24])
def test_an_absurd_value_of_a_config_is_one_sentence_with_its_key(method, key, value, said):
    assert said in refused(method, key, value)


@pytest.mark.parametrize("cls", [config.Run, config.OptimConfig, DataConfig, *option_classes(), *METHODS.values()])
def test_no_number_of_a_config_may_be_absurd(cls):
    """Also of fields that are added later: nothing is NaN or infinite, and no whole number is -1 billion."""
    for field in dataclasses.fields(cls):
        wrong = {int: (NAN, INF, -(10**9), 10**5000), float: (NAN, INF, -INF, 10**400), tuple: ((NAN,), {}, [[1], [2]])}
        for value in wrong.get(type(field.default), ()):
            with pytest.raises(ValueError, match=f"^{field.name}.* must be .{{,200}}$"):
                typed.fit(value, field.type, field.name)


# ---- config files


@pytest.mark.parametrize(
    ("body", "said", "traceback"),
    [
        ("return [1]", "returned list: it must return a config", ()),
        ("return None", "returned NoneType: it must return a config", ()),
        ("yield 1", "returned generator: it must return a config", ()),
        ("c = defaults('codi'); c.data = None; return c", "data holds options and cannot be None", ()),
        ("c = defaults('codi'); c.method = None; return c", "method holds options and cannot be None", ()),
        ("return {'method': {'name': ['codi'], 'ratio': 1}}", "unknown method.name ['codi']: did you mean 'codi'?", ()),
        ("return {'method': {'name': 'codi'}, 1: 2}", "hostile.py: TypeError: '<' not supported", ()),
        ("c = {}; c['a'] = c; return c", "hostile.py: RecursionError: maximum recursion depth exceeded", ()),
        ("return get_config(1)", "hostile.py, line 3: TypeError: get_config()", ("    return get_config(1)",)),
        ("raise OSError('no\\ndisk')", "hostile.py, line 3: OSError: no disk", ("in get_config", "OSError: no")),
        ("import sys; sys.exit(0)", "hostile.py, line 3: it ends the program (SystemExit(0))", ("SystemExit: 0",)),
        ("return 1 / 0", "hostile.py, line 3: ZeroDivisionError: division by zero", ("    return 1 / 0",)),
        ("return '\0'", "hostile.py, line ", ()),
    ],
)
def test_a_config_file_that_makes_no_config_is_one_sentence_after_its_own_traceback(
    body, said, traceback, tmp_path, monkeypatch, capfd
):
    monkeypatch.setattr(main.os, "_exit", sys.exit)
    (tmp_path / "hostile.py").write_text(f"from cddistill.config import defaults\ndef get_config():\n    {body}\n")
    with pytest.raises(SystemExit) as stopped:
        main.app.run(main.guarded, ["cddistill", f"--config={tmp_path}/hostile.py"], main.parse)
    flags.FLAGS.unparse_flags()
    *own, sentence = capfd.readouterr().err.strip().splitlines()
    assert stopped.value.code == 2
    assert sentence.startswith("cddistill: ")
    assert said in sentence
    assert bool(own) == bool(traceback)
    assert all(any(part in line for line in own) for part in traceback)
    assert not any("main.py" in line for line in own)
