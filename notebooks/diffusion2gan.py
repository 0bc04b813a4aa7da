# ---
# jupyter:
#   accelerator: GPU
#   colab:
#     name: diffusion2gan.ipynb
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
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/OWNER/cddistill/blob/main/notebooks/diffusion2gan.ipynb)
#
# # Diffusion2GAN: pairs, a metric of one's own, a one-step student
#
# [Diffusion2GAN](https://arxiv.org/abs/2405.05967) first lets the teacher draw pictures from known noise, then teaches a student the way
# from that noise to that picture in one call. How alike two pictures are is measured by a latent LPIPS, which is trained here, too.
#
# Outputs that are saved here are of a run on a CPU with `NUM_PAIRS = 128`, `TEACHER_STEPS = 20`, `METRIC_STEPS = 600`, `STEPS = 200`:
# 14 minutes on two cores that other programs shared. The metric is of an earlier run, 12 minutes, which its cell loaded.

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
NUM_PAIRS = 512  # @param {type:"integer"}
TEACHER_STEPS = 50  # @param {type:"integer"}
METRIC_STEPS = 600  # @param {type:"integer"}
STEPS = 500  # @param {type:"integer"}
WITH_GAN = False  # @param {type:"boolean"}
WORKDIR = "runs/diffusion2gan"  # @param {type:"string"}
# @markdown The config has 2,048 pairs. `WITH_GAN` adds the discriminator, which takes three times as long.

# %% cellView="form" tags=["device"]
# @title Device and time
import jax

DEVICE = jax.devices()[0]
MINUTES = {}  # as measured; other devices were not
print(f"{jax.device_count()} x {DEVICE.device_kind}; minutes: {MINUTES.get(DEVICE.platform, 'not measured here')}")

# %% [markdown]
# ## 1. Pairs of noise and picture
#
# Interrupted, the cell goes on where it was; complete, it does nothing.

# %%
import cddistill

pairs = f"{WORKDIR}/pairs_{NUM_PAIRS}_{TEACHER_STEPS}"
sizes = {"num_pairs": NUM_PAIRS, "pairs_batch": min(NUM_PAIRS, 64), "teacher_steps": (TEACHER_STEPS,)}
settings = cddistill.configure("d2g_emoji", data={"pairs": pairs}, report=False, **sizes)
cddistill.make_pairs(settings)

# %% [markdown]
# ## 2. A metric
#
# First it learns to tell classes of emoji apart, then to judge like LPIPS-VGG which of two distorted pictures is nearer. It needs the
# weights of LPIPS: the extra `eval`.

# %%
classes, judge = f"{WORKDIR}/classify_{METRIC_STEPS}", f"{WORKDIR}/judge_{METRIC_STEPS}"
metric = f"{WORKDIR}/metric_{METRIC_STEPS}.safetensors"
short = {"eval_every": METRIC_STEPS, "report": False, "checkpoint_every": METRIC_STEPS}
cddistill.fit(cddistill.configure("latent_lpips", steps=METRIC_STEPS, **short), classes)
tuning = cddistill.configure("latent_lpips:judge", steps=max(METRIC_STEPS // 3, 1), init_from_run=classes, **short)
cddistill.fit(tuning, judge)
cddistill.save(judge, metric)

# %% [markdown]
# ## 3. The student

# %%
by_metric = {"regression": "latent_lpips", "metric": metric, "family": "emoji", "augment": "none"}
by_metric |= {} if WITH_GAN else {"gan_weight": 0.0}
changes = {"steps": STEPS, "eval_every": STEPS, "report": False, "method": by_metric, "data": {"pairs": pairs}}
settings = cddistill.configure("d2g_emoji", **changes)
student = cddistill.fit(settings, f"{WORKDIR}/student_{NUM_PAIRS}_{METRIC_STEPS}_{STEPS}_{WITH_GAN}")

# %% [markdown]
# ## Look
#
# The same noise for all, which no pair has: a student that has learned the teacher's way draws the same picture. The saved one, after 200
# steps, has the teacher's shapes and colours in one call, blurred. More pairs, more steps and `WITH_GAN` were not tried here.

# %%
labels = [0, 1, 2, 3, 4, 5, 6, 7]
one = cddistill.sample(student, label=labels, steps=1, seed=1)
many = cddistill.sample(cddistill.load("emoji"), label=labels, steps=TEACHER_STEPS, guidance=2.0, seed=1)
once = cddistill.sample(cddistill.load("emoji"), label=labels, steps=1, guidance=2.0, seed=1)
cddistill.grid({f"teacher, {TEACHER_STEPS} steps": many, "student, 1 step": one, "teacher, 1 step": once})
