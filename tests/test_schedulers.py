"""Scheduler configs: the same alphas, timesteps and whole trajectories as in PyTorch diffusers."""

import dataclasses
import functools
import json
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden import make_schedulers as golden

from cddistill import diffusion, sampling
from cddistill.diffusion import DDPM
from cddistill.models import schedulers
from cddistill.models.schedulers import Sampling
from cddistill.net import Denoiser

RECORDED = np.load(Path(golden.__file__).parent / "schedulers.npz")
THEIRS = json.loads((Path(golden.__file__).parent / "defaults.json").read_text())["schedulers"]
ALL = golden.CONFIGS | golden.STUDENTS
NOISE, FRESH = jnp.asarray(golden.NOISE), jnp.asarray(golden.FRESH)


@pytest.fixture
def write(tmp_path):
    """write(config) -> path of a scheduler_config.json."""

    def write(config):
        (tmp_path / "scheduler_config.json").write_text(json.dumps(config))
        return tmp_path / "scheduler_config.json"

    return write


def recorded(name, kind):
    """{number of steps: rows (t, z...) of its evaluations and (-1, x0...)}."""
    rows = RECORDED[f"{name}/{kind}"]
    parts = np.split(rows, np.flatnonzero(rows[:, 0] == -1) + 1)[:-1]
    evaluations = [len(part) - 1 for part in parts]
    return dict(zip([n // 2 + 1 for n in evaluations] if "heun" in name else evaluations, parts, strict=True))


def loop(step, carry, xs):
    """jax.lax.scan in Python, to record every evaluation."""
    for x in xs:
        carry, _ = step(carry, x)
    return carry, None


def trajectory(how, schedule, predicts, n):
    """The same rows from `sampling.sample`."""
    times, rows = how.times(schedule, n), []
    table = dict(zip(np.asarray(times).tolist(), np.transpose(schedule.alpha_sigma(times)), strict=True))

    def denoise(z, t):
        z, (alpha, sigma) = np.asarray(z), table[float(t)]
        rows.append(np.append(np.float32(t), z))
        return diffusion.predict(predicts, golden.network(z, np.cos(np.float32(t) / 1000)), z, alpha, sigma)

    with mock.patch("jax.lax.scan", loop):
        x0 = sampling.sample(how, denoise, schedule, NOISE, n, lambda i: FRESH[i])
    return np.array([*rows, np.append(np.float32(-1), x0)])


def read(path):
    return *schedulers.read_scheduler(path), schedulers.read_sampling(path)


@pytest.mark.parametrize("name", [k.split("/")[0] for k in RECORDED if k.endswith("alphas_cumprod")])
def test_alphas_equal_diffusers(name, write):
    theirs = RECORDED[f"{name}/alphas_cumprod"]
    schedule, _ = schedulers.read_scheduler(write(golden.CONFIGS[name] | {"prediction_type": "v_prediction"}))
    alpha, sigma = schedule.alpha_sigma(jnp.arange(len(theirs)))
    assert schedule.num_timesteps == len(theirs)
    np.testing.assert_allclose(alpha**2, theirs, rtol=1e-5, atol=1e-6)  # theirs is a float32 product of 1000 numbers
    np.testing.assert_allclose(sigma**2, 1.0 - theirs, rtol=1e-5, atol=1e-6)
    assert alpha[-1] == np.sqrt(theirs[-1]) or not schedule.zero_snr  # 0 or 2^-12, exactly


# alphas_cumprod at timesteps 500 and 999 of diffusers' classes without any option.
LINEAR, SD_LINEAR = (0.07779665, 4.0358304e-05), (0.16077163, 1.5789628e-03)  # betas to 0.02, and Stable Diffusion's
SCALED = (0.27633247, 4.6600951e-03)
ALPHAS = dict.fromkeys(
    ("DDIMScheduler", "DDIMInverseScheduler", "DDIMParallelScheduler", "DDPMScheduler", "DDPMParallelScheduler",
     "PNDMScheduler", "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "LMSDiscreteScheduler",
     "DPMSolverMultistepScheduler", "DPMSolverMultistepInverseScheduler", "DPMSolverSinglestepScheduler",
     "DEISMultistepScheduler", "UniPCMultistepScheduler", "SASolverScheduler"), LINEAR,
) | dict.fromkeys(
    ("HeunDiscreteScheduler", "KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler", "DPMSolverSDEScheduler"),
    SD_LINEAR,
) | {"LCMScheduler": SCALED, "TCDScheduler": SCALED}  # fmt: skip


@pytest.mark.parametrize("name", ALPHAS)
def test_what_a_file_leaves_out_is_as_in_its_class(name, write):
    """Only the class is given; every option of the class, written out at its default, changes nothing."""
    bare, full = ({"_class_name": name} | options for options in ({}, THEIRS[name]))
    (schedule, predicts), own = schedulers.read_scheduler(write(bare)), THEIRS[name]
    alpha, _ = schedule.alpha_sigma(jnp.array([500, 999]))
    np.testing.assert_allclose(alpha**2, ALPHAS[name], rtol=1e-4)  # theirs is a float32 product of 1000 numbers
    assert (schedule.num_timesteps, predicts) == (1000, "eps")
    assert schedulers.read_scheduler(write(full)) == (schedule, predicts)
    _, config = schedulers.read_config(write(bare))
    assert {k: v for k, v in config.items() if k in own} == {k: own[k] for k in config if k in own}
    if name in schedulers.SUPPORTED:
        assert schedulers.read_sampling(write(full)) == schedulers.read_sampling(write(bare))


def test_every_scheduler_of_another_process_is_refused_by_name(write):
    """All classes that diffusers has, and one that it has not; sampling refuses them, too."""
    others = {*THEIRS} - {*ALPHAS} | {"MyScheduler"}
    assert {"EDMEulerScheduler", "FlowMatchEulerDiscreteScheduler", "CMStochasticIterativeScheduler"} < others
    for name in sorted(others):
        for reads in (schedulers.read_scheduler, schedulers.read_sampling):
            with pytest.raises(ValueError, match=f"scheduler_config.json: .* {name!r} is not supported, .*DDIMSch"):
                reads(write({"_class_name": name} | THEIRS.get(name, {})))


@pytest.mark.parametrize("name", ALPHAS)
def test_zero_snr_is_read_where_the_class_knows_it(name, write):
    """2^-12 where diffusers divides by alpha."""
    path = write({"_class_name": name, "rescale_betas_zero_snr": True, "prediction_type": "v_prediction"})
    if "rescale_betas_zero_snr" not in THEIRS[name]:
        with pytest.raises(ValueError, match=f"rescale_betas_zero_snr = True is not supported for {name}, which"):
            schedulers.read_scheduler(path)
        return
    alpha, _ = schedulers.read_scheduler(path)[0].alpha_sigma(jnp.array([999]))
    divides = name.startswith(("Euler", "DPMSolver", "UniPC"))
    np.testing.assert_array_equal(alpha, [2.0**-12 if divides else 0.0])


@pytest.mark.parametrize("name", golden.CONFIGS)
def test_timesteps_equal_diffusers(name, write):
    schedule, _, how = read(write(golden.CONFIGS[name] | {"prediction_type": "v_prediction"}))
    most = how.original_inference_steps if how.sampler == "lcm" else schedule.num_timesteps
    times = [how.times(schedule, n) for n in golden.GRIDS if n <= most]
    np.testing.assert_array_equal(np.concatenate(times), RECORDED[f"{name}/times"])
    assert all(t.dtype == (jnp.float32 if (t % 1).any() else jnp.int32) for t in times)


@pytest.mark.parametrize("name", ALL)
def test_trajectories_equal_diffusers(name, write, parity):
    """Euler at zero SNR is less exact: diffusers' z/alpha is in the thousands, so float32 keeps 1e-4. What a network
    predicts concerns single steps only: its second kind is sampled in up to four of them."""
    for kind in golden.kinds(ALL[name]):
        schedule, predicts, how = read(write(ALL[name] | {"prediction_type": kind}))
        most = 100 if kind == golden.kinds(ALL[name])[0] else 4
        for n, theirs in recorded(name, kind).items():
            if n > most:
                continue
            ours = trajectory(how, schedule, predicts, n)
            np.testing.assert_array_equal(ours[:, 0], theirs[:, 0])  # the network gets the same t, and below the same z
            parity(name, "trajectory", ours[:, 1:], theirs[:, 1:], 3e-4 if name == "euler zero snr" else None)


def test_ddim_with_eta_equals_diffusers(write, parity):
    schedule, predicts, how = read(write(golden.DDIM | golden.LEADING))
    for n, theirs in recorded("ddim eta", "epsilon").items():
        ours = trajectory(dataclasses.replace(how, eta=golden.ETA), schedule, predicts, n)
        np.testing.assert_array_equal(ours[:, 0], theirs[:, 0])
        parity("ddim eta", "trajectory", ours[:, 1:], theirs[:, 1:])


@pytest.mark.parametrize("name", ["sd15", "euler", "lcm"])
def test_sampling_compiles_with_a_real_denoiser(name, write):
    """One program, in which the network gets t per sample, in the dtype of the timesteps."""
    schedule, predicts, how = read(write(golden.CONFIGS[name] | {"prediction_type": "v_prediction"}))
    seen = []

    def apply(params, z, t):
        seen.append(t)
        return golden.network(z, diffusion.like(jnp.cos(t / 1000.0), z))

    net = Denoiser({}, apply, schedule, predicts)
    draw = jax.jit(lambda noise, fresh: sampling.sample(how, net, schedule, noise, 25, lambda i: fresh[i]))
    x0 = draw(NOISE, FRESH)
    np.testing.assert_allclose(x0.ravel(), recorded(name, "v_prediction")[25][-1, 1:], atol=1e-5)
    assert seen[0].shape == (2,)
    assert seen[0].dtype == (jnp.float32 if name == "euler" else jnp.int32)


def test_eulers_method_is_ddim():
    """In y = z/alpha and k = sigma/alpha, Euler's y + (k_s - k) eps is DDIM's step, so one function serves both."""
    schedule = DDPM()
    times = Sampling(spacing="linspace", fractional=True).times(schedule, 7)
    net = Denoiser({}, lambda p, z, t: jnp.sin(3.0 * z) + diffusion.like(t, z) / 1000, schedule, "eps")
    alpha, sigma = schedule.alpha_sigma(times)
    y, k = NOISE / alpha[0], jnp.append(sigma / alpha, 0.0)
    for i, t in enumerate(times):
        y = y + (k[i + 1] - k[i]) * net(y * alpha[i], t).eps
    np.testing.assert_allclose(jax.jit(lambda: sampling.ddim(net, schedule, NOISE, times))(), y, atol=3e-5)


def test_timesteps_of_students_round_trip_and_sample_as_in_diffusers(write, tmp_path):
    """write_scheduler writes the configs that golden/ sampled in diffusers with timesteps=config["_timesteps"]. The
    tolerance at zero SNR is 1e-3, as diffusers has alpha = 2^-12 and we 0."""
    cosine = DDPM(beta_schedule="squaredcos_cap_v2", zero_snr=True)
    for name, schedule, tolerance in (("student", DDPM(), 1e-5), ("student zero snr", cosine, 1e-3)):
        times = golden.STUDENT["_timesteps"]
        schedulers.write_scheduler(tmp_path, schedule, "v", timesteps=jnp.array(times))
        path = tmp_path / "scheduler" / "scheduler_config.json"
        written = json.loads(path.read_text())
        assert written == golden.STUDENTS[name] | {
            "prediction_type": "v_prediction",
            "beta_start": 0.00085,
            "beta_end": 0.012,
        }
        back, predicts, how = read(path)
        assert (dataclasses.replace(back, last_alpha=0.0), predicts, how.timesteps) == (schedule, "v", tuple(times))
        np.testing.assert_array_equal(how.times(back), times)
        np.testing.assert_array_equal(how.times(back, 4), times)
        np.testing.assert_array_equal(how.times(back, 2), [999, 499])  # others: by spacing
        net = Denoiser({}, lambda p, z, t: golden.network(z, diffusion.like(jnp.cos(t / 1000.0), z)), schedule, "v")
        x0 = jax.jit(functools.partial(sampling.ddim, net, schedule))(NOISE, jnp.array(times))
        np.testing.assert_allclose(x0.ravel(), recorded(name, "v_prediction")[4][-1, 1:], atol=tolerance)


@pytest.mark.parametrize(
    ("schedule", "predicts"),
    [
        (DDPM(), "eps"),
        (DDPM(zero_snr=True), "v"),
        (DDPM(50, "squaredcos_cap_v2", 0.0001, 0.02), "x0"),
        (DDPM(3, trained_betas=(0.1, 0.2, 0.3)), "v"),
    ],
)
def test_schedules_round_trip(tmp_path, schedule, predicts):
    """Without timesteps of its own a student samples on the trailing grid, to x0, unclipped."""
    schedulers.write_scheduler(tmp_path, schedule, predicts)
    *back, how = read(tmp_path / "scheduler" / "scheduler_config.json")
    assert back == [schedule, predicts]
    assert how == Sampling(stride=True)
    np.testing.assert_array_equal(how.times(schedule, 3), schedule.grid(3))


def test_without_a_file_the_schedule_is_stable_diffusions(tmp_path, caplog):
    assert read(tmp_path / "none.json") == (DDPM(), "eps", Sampling())
    assert (
        "none.json is missing: Stable Diffusion 1.x's schedule and prediction of the noise are assumed" in caplog.text
    )
    np.testing.assert_array_equal(Sampling().times(DDPM(), 4), [999, 749, 499, 249])
    net = Denoiser({}, lambda p, z, t: 0.3 * z, DDPM(), "v")
    ours = sampling.sample(Sampling(), net, DDPM(), NOISE, 4)
    np.testing.assert_array_equal(ours, sampling.ddim(net, DDPM(), NOISE, DDPM().grid(4)))


def test_pndm_is_replaced_by_ddim_with_a_warning(write, caplog):
    assert schedulers.read_sampling(write(golden.SD15)).sampler == "ddim"
    assert "PNDM is not supported, sampling with DDIM at its timesteps" in caplog.text


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"_class_name": "UniPCMultistepScheduler"}, "_class_name 'UniPCMultistepScheduler' is not supported, only"),
        (golden.EULER | {"use_karras_sigmas": True}, "use_karras_sigmas = True is not supported, only False"),
        (golden.HEUN | {"use_exponential_sigmas": True}, "use_exponential_sigmas = True is not supported"),
        (golden.HEUN | golden.ZERO_SNR, "rescale_betas_zero_snr = True is not supported"),
        (golden.HEUN | {"clip_sample": True}, "clip_sample = True is not supported"),
        (golden.EULER | {"interpolation_type": "log_linear"}, "interpolation_type = 'log_linear' is not supported"),
        (golden.EULER | {"final_sigmas_type": "sigma_min"}, "final_sigmas_type = 'sigma_min' is not supported"),
        (golden.EULER | {"timestep_type": "continuous"}, "timestep_type = 'continuous' is not supported"),
        (
            golden.DPM | {"algorithm_type": "sde-dpmsolver++"},
            r"'sde-dpmsolver\+\+' is not supported, only dpmsolver\+\+",
        ),
        (golden.DPM | {"solver_order": 3}, "solver_order = 3 is not supported, only 1, 2"),
        (golden.DPM | {"solver_type": "heun"}, "solver_type = 'heun' is not supported"),
        (golden.DPM | {"lambda_min_clipped": -5.1}, "lambda_min_clipped = -5.1 is not supported"),
        (golden.DPM | {"use_flow_sigmas": True}, "use_flow_sigmas = True is not supported"),
        (golden.DDIM | {"thresholding": True}, "thresholding = True is not supported"),
        (golden.DDIM | {"timestep_spacing": "even"}, "timestep_spacing = 'even' is not supported, only leading, lin"),
        (
            golden.DDIM | {"_timesteps": [30, 999]},
            r"timesteps \[30, 999\] are not strictly decreasing integers in \[0, 99\d",
        ),
        (golden.DDIM | {"_timesteps": [1000]}, "timesteps .* decreasing"),
        (golden.DDIM | {"_timesteps": [9.5]}, "timesteps .* are not strictly decreasing integers"),
    ],
)
def test_unsupported_sampling_is_refused(write, config, sentence):
    with pytest.raises(ValueError, match=f"scheduler_config.json: .*{sentence}"):
        schedulers.read_sampling(write(config))


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        (golden.DDIM | {"beta_schedule": "sigmoid"}, "beta_schedule = 'sigmoid' is not supported, only scaled_linear"),
        (golden.DDIM | {"prediction_type": "flow"}, "prediction_type = 'flow' is not supported, only epsilon"),
        (
            golden.DDIM | {"trained_betas": [0.1, 0.2]},
            "trained_betas has 2 numbers, but num_train_timesteps = 1000",
        ),
        (golden.DDIM | {"trained_betas": "betas.npy"}, "trained_betas = 'betas.npy' is not a list"),
        (golden.DDIM | golden.ZERO_SNR, "with rescale_betas_zero_snr .* epsilon cannot recover x0"),
        (golden.DDIM | {"sigma_data": 0.5}, "sigma_data = 0.5 is not supported: remove it if it has no effect on DDIM"),
        (golden.EULER | {"snr_shift_scale": 3.0, "shift": 2}, "shift = 2, snr_shift_scale = 3.0 is not supported"),
        (golden.DPM | {"use_flow_sigmas": True}, "use_flow_sigmas = True is not supported, only False"),
        (
            golden.EULER | {"timestep_type": "continuous"},
            "timestep_type = 'continuous' is not supported, only discrete",
        ),
        (
            golden.DDIM | {"variance_type": "learned_range"},
            "variance_type = 'learned_range' is not supported, only None",
        ),
        (golden.DDIM | {"predict_epsilon": False}, "predict_epsilon = False is not supported"),
        (golden.DDIM | {"prediction_type": None}, "prediction_type = None is not supported"),
        (golden.DDIM | {"beta_start": "0.00085"}, "beta_start = '0.00085' is not a number"),
        (golden.DDIM | {"beta_end": 1.2}, "beta_end = 1.2 must be above 0 and below 1"),
        (golden.DDIM | {"num_train_timesteps": 0}, "num_train_timesteps = 0 must be at least 1"),
        (golden.DDIM | {"num_train_timesteps": 1000.0}, "num_train_timesteps = 1000.0 is not an integer"),
        (golden.DDIM | {"rescale_betas_zero_snr": "true"}, "rescale_betas_zero_snr = 'true' is not true or false"),
        ({"_class_name": ["DDIMScheduler"]}, r"the scheduler's _class_name \['DDIMScheduler'\] is not supported"),
    ],
)
def test_unsupported_schedules_are_refused(write, config, sentence):
    with pytest.raises(ValueError, match=f"scheduler_config.json: {sentence}"):
        schedulers.read_scheduler(write(config))


def test_options_without_effect_on_the_process_are_ignored(write):
    harmless = {"use_karras_sigmas": True, "thresholding": True, "variance_type": "fixed_large",
                "algorithm_type": "deis", "tensor_format": "pt", "solver_p": None, "predict_epsilon": True,
                "interpolation_type": "log_linear", "_anything": 1}  # fmt: skip
    config = golden.DDIM | {"_class_name": "DDPMScheduler"}
    assert schedulers.read_scheduler(write(config | harmless)) == schedulers.read_scheduler(write(config))
    replaced = {"beta_start": 0.2, "_use_default_values": ["beta_start"]}  # diffusers drops such values
    assert schedulers.read_scheduler(write(config | replaced))[0].beta_start == 0.0001


def test_the_class_is_that_of_the_pipeline_as_in_diffusers(tmp_path, caplog):
    """model_index.json decides; a file without a class, in no pipeline, is refused."""
    (tmp_path / "scheduler").mkdir()
    path = tmp_path / "scheduler" / "scheduler_config.json"
    path.write_text("{}")
    with pytest.raises(ValueError, match='config.json does not name its class: add "_class_name", such as "DDIMSched'):
        schedulers.read_scheduler(path)

    def index(name):
        (tmp_path / "model_index.json").write_text(json.dumps({"scheduler": ["diffusers", name]}))

    index("LCMScheduler")
    assert schedulers.read_scheduler(path) == (DDPM(), "eps")  # its default betas are Stable Diffusion's
    assert schedulers.read_sampling(path).sampler == "lcm"
    path.write_text(json.dumps(golden.HEUN))
    index("FlaxDDIMScheduler")
    assert schedulers.read_sampling(path).sampler == "ddim"
    assert "says HeunDiscreteScheduler, but model_index.json says DDIMScheduler, which is used" in caplog.text
    index("EDMEulerScheduler")
    with pytest.raises(ValueError, match=r"model_index.json: the scheduler's _class_name 'EDMEulerScheduler' is not"):
        schedulers.read_scheduler(path)


def test_writing_unsupported_schedules_and_timesteps_is_refused(tmp_path):
    with pytest.raises(ValueError, match="diffusers folders hold DDPM schedules, not EDM"):
        schedulers.write_scheduler(tmp_path, diffusion.EDM(), "x0")
    for times in ([], [1000, 3], [5, 5], [3, 7], [1.5]):
        with pytest.raises(ValueError, match=r"timesteps .* are not strictly decreasing integers in \[0, 999\]"):
            schedulers.write_scheduler(tmp_path, DDPM(), "eps", timesteps=times)


@pytest.mark.parametrize(
    ("how", "n", "sentence"),
    [
        (Sampling(), None, "no timesteps of its own: pass the number of steps"),
        (Sampling(), 0, "this scheduler cannot sample in 0 steps, only in 1 to 1000"),
        (Sampling(), 1001, "cannot sample in 1001 steps"),
        (Sampling(sampler="lcm", spacing="lcm"), 51, "this scheduler cannot sample in 51 steps, only in 1 to 50"),
        (Sampling(spacing="leading", skip_last=True), 1000, "only in 1 to 999"),
        (Sampling(spacing="leading", steps_offset=1), 1000, r"timesteps 1 to 1000 lie outside \[0, 999\]"),
    ],
)
def test_impossible_numbers_of_steps_are_refused(how, n, sentence):
    with pytest.raises(ValueError, match=sentence):
        how.times(DDPM(), n)


def test_samplers_that_add_noise_require_step_noise():
    net = Denoiser({}, lambda p, z, t: z, DDPM(), "v")
    with pytest.raises(ValueError, match="lcm adds noise between its steps: pass step_noise"):
        sampling.sample(Sampling(sampler="lcm", spacing="lcm"), net, DDPM(), NOISE, 2)
    with pytest.raises(ValueError, match="DDIM with eta = 0.5 adds noise at every step: pass step_noise"):
        sampling.sample(Sampling(eta=0.5), net, DDPM(), NOISE, 2)


def test_ddim_with_eta_1_samples_the_data_distribution():
    """N(0.7, 0.4^2), from its exact denoiser in 400 steps."""
    schedule = DDPM()

    def posterior_mean(params, z, t):
        alpha, sigma = (diffusion.like(c, z) for c in schedule.alpha_sigma(t))
        return 0.7 + alpha * 0.16 / (alpha**2 * 0.16 + sigma**2) * (z - alpha * 0.7)

    def draw(key):
        k_noise, k_fresh = jax.random.split(key)
        fresh = lambda i: jax.random.normal(jax.random.fold_in(k_fresh, i), (10_000, 1))
        net = Denoiser({}, posterior_mean, schedule, "x0")
        noise = jax.random.normal(k_noise, (10_000, 1))
        return noise, functools.partial(sampling.sample, Sampling(eta=1.0), net, schedule)(noise, 400, fresh)

    noise, x0 = jax.jit(draw)(jax.random.key(0))
    np.testing.assert_allclose([x0.mean(), x0.std()], [0.7, 0.4], atol=0.02)
    assert abs(np.corrcoef(noise.ravel(), x0.ravel())[0, 1]) < 0.2  # at eta = 0 it is 1
