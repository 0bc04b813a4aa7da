"""Reference outputs of PyTorch diffusers' schedulers: python tests/golden/make_schedulers.py

Recorded with torch 2.13.0 (CPU), diffusers 0.42.1. The network is `network`, noise comes from a numpy seed, here and in
the tests, so schedulers.npz holds only tables and trajectories. Neither torch nor diffusers is needed to run the tests.
"""

from pathlib import Path

import numpy as np

SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "num_train_timesteps": 1000}
ZERO_SNR = SD | {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
SD15 = SD | {
    "_class_name": "PNDMScheduler", "_diffusers_version": "0.6.0", "clip_sample": False, "set_alpha_to_one": False,
    "skip_prk_steps": True, "steps_offset": 1, "trained_betas": None,
}  # fmt: skip
SD21 = SD15 | {"_class_name": "DDIMScheduler", "prediction_type": "v_prediction"}
SDXL = SD15 | {
    "_class_name": "EulerDiscreteScheduler", "interpolation_type": "linear", "prediction_type": "epsilon",
    "sample_max_value": 1.0, "timestep_spacing": "leading", "use_karras_sigmas": False,
}  # fmt: skip
DDIM = SD | {"_class_name": "DDIMScheduler", "clip_sample": False}
EULER = SD | {"_class_name": "EulerDiscreteScheduler"}
ANCESTRAL = SD | {"_class_name": "EulerAncestralDiscreteScheduler"}
HEUN = SD | {"_class_name": "HeunDiscreteScheduler"}
DPM = SD | {"_class_name": "DPMSolverMultistepScheduler"}
COSINE = {"beta_schedule": "squaredcos_cap_v2"}
BETAS = {"trained_betas": np.linspace(0.001, 0.03, 300).round(6).tolist(), "num_train_timesteps": 300}
LEADING, TRAILING = {"timestep_spacing": "leading", "steps_offset": 1}, {"timestep_spacing": "trailing"}
LINSPACE = {"timestep_spacing": "linspace"}
CONFIGS = {  # scheduler_config.json as shipped or as users write them; what they leave out is up to diffusers
    "sd15": SD15,
    "sd21": SD21,
    "sdxl": SDXL,
    "ddim": {"_class_name": "DDIMScheduler"},  # clips; betas are linear
    "ddim leading": DDIM | LEADING,
    "ddim linspace": DDIM | LINSPACE | {"set_alpha_to_one": False},
    "ddim trailing": DDIM | TRAILING | {"clip_sample": True, "clip_sample_range": 0.4},
    "ddim cosine": DDIM | TRAILING | COSINE,
    "ddim betas": DDIM | BETAS,
    "ddim zero snr": DDIM | ZERO_SNR,
    "euler": EULER,
    "euler trailing": EULER | TRAILING,
    "euler zero snr": EULER | ZERO_SNR,
    "ancestral": ANCESTRAL,
    "ancestral leading": ANCESTRAL | LEADING,
    "heun": HEUN,
    "heun leading": HEUN | LEADING,
    "heun trailing": HEUN | TRAILING,
    "heun defaults": {"_class_name": "HeunDiscreteScheduler"},
    "dpm": DPM,
    "dpm leading": DPM | LEADING,
    "dpm trailing": DPM | TRAILING,
    "dpm first order": DPM | LINSPACE | {"solver_order": 1},
    "dpm zero snr": DPM | ZERO_SNR,
    "lcm": {"_class_name": "LCMScheduler"},
    "lcm clipped": SD | {"_class_name": "LCMScheduler", "original_inference_steps": 40, "timestep_scaling": 0.001,
                         "clip_sample": True, "clip_sample_range": 0.4},
}  # fmt: skip
STEPS = (1, 2, 4, 10, 25)
GRIDS = (1, 2, 3, 4, 7, 8, 15, 20, 30, 48, 50, 100, 122, 250, 300)  # as far as there are so many
STUDENT = {  # what write_scheduler writes for a student with times of its own
    "_class_name": "DPMSolverMultistepScheduler", "solver_order": 1, "_timesteps": [999, 486, 176, 30],
    "timestep_spacing": "trailing", "rescale_betas_zero_snr": False, **SD,
}  # fmt: skip
STUDENTS = {"student": STUDENT, "student zero snr": STUDENT | ZERO_SNR | COSINE}
NOISE = np.random.default_rng(0).standard_normal((2, 3)).astype(np.float32)
FRESH = np.random.default_rng(1).standard_normal((25, 2, 3)).astype(np.float32)  # of each step
ETA = 0.6  # of "ddim eta"


def kinds(config: dict) -> tuple[str, ...]:
    """The prediction types recorded for a config."""
    if config.get("rescale_betas_zero_snr"):
        return ("v_prediction", "sample")
    return ("epsilon", "v_prediction")


def network(z, cos_t):
    """The output of a toy network, in any framework; cos_t is cos(t / 1000)."""
    return 0.3 * z * cos_t + 0.1


def run(scheduler, **options):
    """Rows (t, z...) for every network call, with z as the network receives it; the last row is (-1, x0...)."""
    import torch

    z, rows = torch.from_numpy(NOISE) * scheduler.init_noise_sigma, []
    for i, t in enumerate(scheduler.timesteps):
        seen = scheduler.scale_model_input(z, t)
        rows.append(np.append(np.float32(t), seen.numpy().ravel()))
        if options:
            options["variance_noise"] = torch.from_numpy(FRESH[i])
        out = network(seen, np.cos(np.float32(t) / np.float32(1000)))
        z = scheduler.step(out, t, z, **options).prev_sample
    return [*rows, np.append(np.float32(-1), z.numpy().ravel())]


def main():
    """Run diffusers and write schedulers.npz next to this file."""
    import diffusers
    import torch
    from diffusers.schedulers import scheduling_euler_ancestral_discrete, scheduling_lcm

    def make(config):
        name = config["_class_name"].replace("PNDM", "DDIM")
        return getattr(diffusers, name).from_config(config)

    def steps(config, n, **options):
        fresh = iter(FRESH)
        for module in (scheduling_euler_ancestral_discrete, scheduling_lcm):
            module.randn_tensor = lambda *args, **kwargs: torch.from_numpy(next(fresh))
        scheduler = make(config)
        scheduler.set_timesteps(n)
        return run(scheduler, **options)

    out = {}
    for name, config in CONFIGS.items():
        scheduler = make(config)
        if name in ("sd15", "sd21", "sdxl", "ddim zero snr", "euler zero snr", "ddim cosine", "ddim betas", "lcm"):
            out[f"{name}/alphas_cumprod"] = scheduler.alphas_cumprod.numpy()
        for kind in kinds(config):
            rows = [row for n in STEPS for row in steps(config | {"prediction_type": kind}, n)]
            out[f"{name}/{kind}"] = np.array(rows, np.float32)
        times = []
        for n in GRIDS:
            if config["_class_name"] != "LCMScheduler" or n <= config.get("original_inference_steps", 50):
                scheduler.set_timesteps(n)
                own = scheduler.timesteps.tolist()
                if "Heun" in config["_class_name"]:
                    own = own[:1] + own[1::2]  # it lists all but the first twice
                times += own[:n]  # a trailing grid of, say, 122 has a 123rd time, -1, by rounding
        out[f"{name}/times"] = np.array(times, np.float32)
    for kind in ("epsilon", "v_prediction"):
        config = DDIM | LEADING | {"prediction_type": kind}
        out[f"ddim eta/{kind}"] = np.array([row for n in STEPS for row in steps(config, n, eta=ETA)], np.float32)
    for name, config in STUDENTS.items():
        for kind in kinds(config):
            scheduler = make(config | {"prediction_type": kind})
            scheduler.set_timesteps(timesteps=scheduler.config["_timesteps"])
            out[f"{name}/{kind}"] = np.array(run(scheduler), np.float32)
    np.savez_compressed(Path(__file__).parent / "schedulers.npz", **out)
    print({k: (v.shape, float(np.abs(v).max())) for k, v in out.items()})


if __name__ == "__main__":
    main()
