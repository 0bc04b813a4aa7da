# ---
# jupyter:
#   accelerator: GPU
#   colab:
#     name: dmd2_health.ipynb
#     provenance: []
#   jupytext:
#     formats: ipynb,py:percent
#     notebook_metadata_filter: accelerator,colab
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/OWNER/cddistill/blob/main/notebooks/dmd2_health.ipynb)
#
# # DMD2, healthy and sick
#
# [DMD2](https://arxiv.org/abs/2405.14867) trains a student against a second network that follows it, and fails in ways that a loss
# curve does not show. The package looks for signs of them in its metrics. Here a healthy run and a sick one are trained side by
# side from the embedded emoji teacher, and the alarms name the cause.
#
# Outputs that are saved here are of a run on a CPU with `SICKNESS = "GAN weight x 100"`, `STEPS = 150`, `LOG_EVERY = 5`.
# The healthy run is an earlier one, which the cell loaded.

# %% cellView="form" tags=["install"]
# @title Install
# On Colab: the source, and what it needs on this runtime's processor. Elsewhere, or a second time: nothing.
import importlib.util
import os
import shutil
import subprocess
import sys

if importlib.util.find_spec("cddistill") is None:
    if not os.path.exists("cddistill-source"):
        repository = "https://github.com/OWNER/cddistill"
        subprocess.run(["git", "clone", "--depth=1", repository, "cddistill-source"], check=True)
    tpu = any(map(os.path.exists, ("/dev/accel0", "/dev/vfio/0")))
    processor = "tpu" if tpu else "gpu" if shutil.which("nvidia-smi") else ""
    extras = ",".join(filter(None, ("eval", processor)))
    command = [sys.executable, "-m", "pip", "install", "--quiet", f"./cddistill-source[{extras}]"]
    subprocess.run(command, check=True)
    importlib.invalidate_caches()

# %% cellView="form" tags=["parameters"]
# @title Settings
SICKNESS = "ratio 1 at 10 times the rate"  # @param ["ratio 1 at 10 times the rate", "critic not training", "critic's rate x 100", "GAN weight x 100", "guidance of 30", "student frozen"]
STEPS = 250  # @param {type:"integer"}
LOG_EVERY = 10  # @param {type:"integer"}
WORKDIR = "runs/health"  # @param {type:"string"}
# @markdown The thresholds of the rules were set with a record every 10 steps; some need 20 records.

# %% cellView="form" tags=["device"]
# @title Device and time
import jax

DEVICE = jax.devices()[0]
MINUTES = {}  # as measured; other devices were not
print(f"{jax.device_count()} x {DEVICE.device_kind}; minutes: {MINUTES.get(DEVICE.platform, 'not measured here')}")

# %% [markdown]
# ## Train both
#
# The alarms are printed while a run trains, when they are first raised.

# %%
import cddistill

FAULTS = {
    "ratio 1 at 10 times the rate": {"method": {"ratio": 1}, "optim": {"student": {"lr": 3e-3}}},
    "critic not training": {"optim": {"critic": {"lr": 0.0}}},
    "critic's rate x 100": {"optim": {"critic": {"lr": 3e-2}}},
    "GAN weight x 100": {"method": {"gan_weight": 0.3}},
    "guidance of 30": {"method": {"real_guidance": 30.0}},
    "student frozen": {"optim": {"student": {"lr": 0.0}}},
}
students, workdirs, looks = {}, {}, max(STEPS // 5, 1)  # steps between two looks at the validation split
for name, changes in {"healthy": {}, SICKNESS: FAULTS[SICKNESS]}.items():
    settings = cddistill.configure(
        "dmd2_emoji", steps=STEPS, log_every=LOG_EVERY, report=False, eval_every=looks, **changes
    )
    workdirs[name] = f"{WORKDIR}/{'_'.join(name.split())}_{STEPS}"
    students[name] = cddistill.fit(settings, workdirs[name])

# %% [markdown]
# ## What the rules say

# %%
for name, workdir in workdirs.items():
    print(f"{name}: {'no sign of a failing run' if not cddistill.alarms(workdir) else ''}")
    for alarm in cddistill.alarms(workdir):
        print(f"  from step {alarm.step}: {alarm.name}: {alarm.words}")

# %% [markdown]
# ## What they look at
#
# The fake score's error in its own turn and at the student's; the mean brightness of samples; the share of the GAN in the student's
# gradient; how different samples are from each other.

# %%
import matplotlib.pyplot as plt

NAMES = ("critic/eps_error", "critic/sample_mean", "student/gan_share", "val/diversity")
figure, axes = plt.subplots(1, len(NAMES), figsize=(14, 3))
for axis, metric in zip(axes, NAMES, strict=True):
    for name, workdir in workdirs.items():
        found = [(r["step"], r[metric]) for r in cddistill.records(workdir) if r.get(metric) is not None]
        if found:
            axis.plot(*zip(*found, strict=True), label=name, marker=".")
    axis.set(title=metric, xlabel="step")
axes[0].legend()
figure.tight_layout()

# %% [markdown]
# ## What comes out
#
# One step, the same noise and classes; the teacher takes 50 steps of two calls.

# %%
labels = [0, 1, 2, 3, 4, 5, 6, 7]
rows = {name: cddistill.sample(student, label=labels, steps=1) for name, student in students.items()}
teacher = cddistill.sample(cddistill.load("emoji"), label=labels, steps=50, guidance=2.0)
cddistill.grid(rows | {"teacher, 50 steps": teacher})
