"""Configs: every shipped one resolves, and errors name the wrong key or value."""

import importlib.util
import pathlib
import re
import runpy

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from cddistill import build, config, config_files, io, models
from cddistill.diffusion import DDPM
from cddistill.methods import METHODS
from cddistill.methods.codi import CoDi
from cddistill.net import Autoencoder, Denoiser
from cddistill.step import init_state

CONFIGS = pathlib.Path(__file__).parents[1] / "configs"


def load(spec):
    """The ConfigDict of "name" or "name:variant"."""
    name, _, variant = spec.partition(":")
    module = importlib.util.spec_from_file_location(name, CONFIGS / f"{name}.py")
    loaded = importlib.util.module_from_spec(module)
    module.loader.exec_module(loaded)
    return loaded.get_config(variant) if variant else loaded.get_config()


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.py")), ids=lambda p: p.stem)
def test_every_config_and_variant_resolves_and_documents_its_command(path):
    for variant in runpy.run_path(str(path)).get("VARIANTS", ("",)):
        assert config.resolve(load(f"{path.stem}:{variant}")).run.steps > 0
    assert f"--config=configs/{path.name}" in path.read_text().split('"""')[1]


@pytest.mark.parametrize(
    ("name", "follower", "followed", "value"),
    [
        ("pretrained", "method.scheduler", "teacher", "elsewhere"),
        ("latent_lpips", "method.classes", "data.num_classes", 5),
        ("latent_lpips_pocket", "method.classes", "data.num_classes", 5),
        ("latent_lpips_sd15", "method.classes", "data.num_classes", 5),
    ],
)
def test_a_field_follows_another_one_and_not_the_reverse(name, follower, followed, value):
    """`--config.method.scheduler=FOLDER` formerly changed the teacher, too."""
    c = load(name)
    flat = lambda: io.flatten(c.to_dict())
    before = flat()
    assert before[follower] == before[followed]
    c.update_from_flattened_dict({follower: value})
    assert flat() == before | {follower: value}
    c = load(name)
    c.update_from_flattened_dict({followed: value})
    assert flat()[follower] == value


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"batchsize": 3}, "unknown config key batchsize: did you mean 'batch_size'"),
        ({"optim": {"lrr": 1.0}}, "unknown config key optim.lrr: did you mean 'optim.lr'"),
        ({"method": {"name": "codi", "spce": "x0"}}, "unknown config key method.spce: did you mean 'method.space'"),
        ({"method": {"ratio": 5}}, "method.ratio is an option of dmd2, and the method is codi: leave it out"),
        ({"method": {"name": "dmd2"}}, "is an option of .*, and the method is dmd2: .* a config file with that method"),
        ({"method": "codi"}, "method holds options and cannot be 'codi': give a dict of them"),
        ({"optim": 1e-4}, "optim holds options and cannot be 0.0001: give a dict of them"),
        ({"method": {"name": "cody"}}, "unknown method.name 'cody': did you mean 'codi'"),
        ({"steps": "many"}, "steps must be int, not str 'many'"),
        ({"steps": 0}, "steps=0 must be at least 1"),
        ({"steps": 1.5}, "steps must be int, not float 1.5"),
        ({"steps": True}, "steps must be int, not bool True"),
        ({"remat": 1}, "remat must be bool, not int 1"),
        ({"seed": -1}, "seed=-1 must be at least 0 and below 2147483548"),
        ({"seed": 2**31 - 1}, "seed=2147483647 must be at least 0 and below 2147483548"),
        ({"sample_steps": ("a", 4)}, r"sample_steps\[0\] must be int, not str 'a'"),
        ({"sample_steps": 0}, r"sample_steps\[0\]=0 must be at least 1"),
        ({"optim": {"betas": 0.9}}, "optim.betas must be 2 values, not 1: 0.9"),
        ({"lr": 1.0}, "unknown config key lr: did you mean 'optim.lr'"),
        ({"ratio": 5}, "unknown config key ratio: did you mean 'method.ratio'"),
        ({"data": {"batch_size": 5}}, "unknown config key data.batch_size: did you mean 'batch_size'"),
        (
            {"optim": {"student": {"warm_up": 5}}},
            "unknown config key optim.student.warm_up: did you mean 'optim.warmup'",
        ),
        ({"unlike_any_other": 5}, "unknown config key unlike_any_other: --help lists all"),
        ({"dtype": "float8"}, "dtype='float8' must be one of float32, bfloat16"),
        ({"teacher_sampler": "euler"}, "teacher_sampler='euler' must be one of ddim, heun, dpm_solver_pp"),
        ({"pairs_shard": 0}, "pairs_shard=0 must be at least 1"),
        ({"data": {"task": "colorize"}}, "data.task='colorize' must be one of"),
        ({"data": {"size": 30, "task": "sr"}}, "30 must be divisible by data.scale 4"),
        ({"optim": {"student": {"lr": "high"}}}, "optim.student.lr must be float"),
    ],
)
def test_config_errors_name_the_key_and_value(change, sentence):
    base = config.plain(config.defaults("codi"))
    merged = base | {k: base[k] | v if isinstance(v, dict) else v for k, v in change.items() if k in base}
    merged |= {k: v for k, v in change.items() if k not in base}
    with pytest.raises(ValueError, match=sentence.replace("(", r"\(")):
        config.resolve(merged)


def test_numbers_and_tuples_may_be_written_in_other_ways():
    """1e3 for an integer, an integer for a float, a list or a single value for a tuple."""
    run = config.resolve({"method": {"name": "codi"}, "steps": 1e3, "lora_scale": 2, "sample_steps": [4, 1e0]}).run
    assert (run.steps, run.lora_scale, run.sample_steps) == (1000, 2.0, (4, 1))
    assert isinstance(run.steps, int)
    assert isinstance(run.lora_scale, float)
    assert config.resolve({"method": {"name": "codi"}, "sample_steps": 4}).run.sample_steps == (4,)


def test_every_field_of_a_config_is_known_by_its_class():
    for name in METHODS:
        for key in io.flatten(config.plain(config.defaults(name))):
            group, _, field = key.partition(".")
            assert (f"optim.{field.rpartition('.')[2]}" if group == "optim" else key) in config.owners(), key


@pytest.mark.parametrize(("field", "known"), [("sampler", "ddim, heun"), ("adapter", "none, controlnet")])
def test_options_of_the_diffusion_method_are_checked(field, known):
    with pytest.raises(ValueError, match=f"method.{field}='other' must be one of {known}"):
        config.resolve({"method": {"name": "diffusion", field: "other"}})


RELEASED = {"preset": "released"}


@pytest.mark.parametrize(
    ("changes", "values"),
    [
        ({}, ("adapted", "eps", 1)),
        ({"preset": "paper"}, ("adapted", "eps", 1)),
        (RELEASED, ("teacher", "x0", 20)),
        (RELEASED | {"delta_t": 50}, ("teacher", "x0", 50)),
        ({"delta_t": 50} | RELEASED, ("teacher", "x0", 50)),
        (RELEASED | {"ode": "adapted", "delta_t": 1}, ("adapted", "x0", 1)),  # also at their defaults
        ({"ode": "adapted", "delta_t": 1} | RELEASED, ("adapted", "x0", 1)),
    ],
)
@pytest.mark.parametrize("written", ["in a config file", "on the command line", "as a dict"])
def test_a_preset_sets_the_fields_that_are_not_set_themselves(written, changes, values):
    settings = config.defaults("codi") if written != "as a dict" else {"method": {"name": "codi"} | changes}
    if written == "in a config file":
        settings.method.update(changes)
    elif written == "on the command line":
        texts = [(f"method.{field}", str(value)) for field, value in changes.items()]
        settings = config_files.override(settings, texts, "configs/ccd_sr.py")
    method = config.resolve(settings).method
    assert (method.ode, method.space, method.delta_t) == values
    stored = config.plain(settings)  # a config that is written has the values themselves
    assert config.resolve(stored).method == method
    if written != "as a dict":
        assert stored["method"]["ode"] == method.ode


def test_the_presets_of_codi_are_the_paper_and_the_released_code():
    preset = lambda name: config.resolve({"method": {"name": "codi", "preset": name}}).method
    assert preset("paper") == CoDi()
    assert preset("released") == CoDi(
        ode="teacher", noise="predicted", space="x0", boundary="lcm", shared_t=False, delta_t=20, grid_size=50
    )


@pytest.mark.parametrize(
    ("method", "sentence"),
    [
        ({"name": "codi", "preset": "relesed"}, "unknown method.preset 'relesed': did you mean 'released'?"),
        ({"name": "codi", "preset": "draft"}, "unknown method.preset 'draft': known: paper, released"),
        ({"name": "codi", "preset": 1}, "method.preset must be str, not int 1"),
        ({"name": "dmd2", "preset": "released"}, "method.preset is an option of codi, and the method is dmd2"),
    ],
)
def test_unknown_presets_are_refused(method, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        config.resolve({"method": method})


def test_unknown_overrides_of_defaults_are_refused():
    """ml_collections itself refuses a misspelt override on the command line."""
    with pytest.raises(AttributeError, match='Did you mean "lr"'):
        config.defaults("codi").optim.lrr = 1.0


def test_a_turn_can_have_its_own_learning_rate():
    settings = config.plain(config.defaults("codi"))
    settings["optim"] |= {"student": {"lr": 7e-5}}
    assert config.resolve(settings).optim["student"].lr == 7e-5
    assert config.resolve(ConfigDict(settings)).optim["student"].lr == 7e-5


SD21 = {
    "in_channels": 4, "out_channels": 4, "block_out_channels": [320, 640, 1280, 1280], "cross_attention_dim": 1024,
    "attention_head_dim": [5, 10, 20, 20], "use_linear_projection": True,
}  # fmt: skip


@pytest.mark.slow
def test_sd21_config_traces_abstractly():
    """configs/ccd_sr.py:sd21 on Stable Diffusion 2.1's shapes: 865.9 M + 364.2 M weights; the step traces."""
    experiment = config.resolve(load("ccd_sr:sd21"))
    assert experiment.run.dtype == "bfloat16"
    assert experiment.run.remat
    module, params = models.abstract(SD21)
    module = module.clone(dtype=jax.numpy.bfloat16, remat=True)
    teacher = Denoiser(params, models.convert.Apply(module), DDPM(), "v")
    f32 = lambda *shape: jax.ShapeDtypeStruct(shape, np.float32)
    text = {"encoder_hidden_states": f32(2, 77, 1024)}
    batch = {"x0": f32(2, 64, 64, 4), "cond": f32(2, 512, 512, 3), "text": text, "null": text}
    batch["index"] = jax.ShapeDtypeStruct((2,), np.int32)
    frozen, method = {"teacher": teacher, "autoencoder": Autoencoder()}, experiment.method
    optimizers = build.make_optimizers(experiment)

    def initial(frozen):
        nets = method.init(jax.random.key(0), frozen, batch)
        return init_state(nets, method.turns(), optimizers, method.ema())

    state = jax.eval_shape(initial, frozen)
    count = {k: sum(x.size for x in jax.tree.leaves(v)) for k, v in state.nets.items()}
    assert count == {"backbone": 865_910_724, "branch": 364_228_240}
    from cddistill.step import train_step

    _, metrics = jax.eval_shape(
        lambda s, f, b: train_step(
            s, f, b, ("student",), turns=method.turns(), optimizers=optimizers, ema=method.ema()
        ),
        state, frozen, batch,
    )  # fmt: skip
    assert metrics["student/loss"].shape == ()


def test_turns_inherit_the_common_optimiser_unless_overridden():
    c = config.defaults("dmd2")
    c.optim.lr, c.optim.critic.lr = 3e-4, 1e-5
    c.optim.clip = 10.0
    optim = config.resolve(c).optim
    assert (optim["critic"].lr, optim["student"].lr) == (1e-5, 3e-4)
    assert optim["critic"].clip == optim["student"].clip == 10.0
    assert "critic" not in config.defaults("codi").optim
