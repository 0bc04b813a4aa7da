# ---
# jupyter:
#   accelerator: GPU
#   colab:
#     name: quickstart.ipynb
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
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/OWNER/cddistill/blob/main/notebooks/quickstart.ipynb)
#
# # Quickstart: distil, look, use your own picture
#
# A diffusion model needs about 50 network calls for a picture. Here a student of it learns to enlarge pictures from 8 to 32
# px in 1 to 4 calls ([CoDi](https://arxiv.org/abs/2310.01407)). Teacher and data, both of emoji, come with the package:
# nothing is downloaded. 8 minutes on 2 CPU cores.
#
# Outputs that are saved here are of a run on a CPU with `STEPS = 3000`, `EVAL_IMAGES = 32`: 8 minutes of training in
# an earlier run, which the cell "Train" loaded and scored. A tenth of the steps is not enough to see anything.

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
STEPS = 3000  # @param {type:"integer"}
EVAL_IMAGES = 0  # @param {type:"integer"}
WORKDIR = "runs/quickstart"  # @param {type:"string"}
# @markdown `EVAL_IMAGES`: test images to score, 0 for all. A run whose `WORKDIR` exists is resumed.

# %% cellView="form" tags=["device"]
# @title Device and time
import jax

DEVICE = jax.devices()[0]
MINUTES = {"cpu": 8}  # as measured; other devices were not
print(f"{jax.device_count()} x {DEVICE.device_kind}; minutes: {MINUTES.get(DEVICE.platform, 'not measured here')}")

# %% [markdown]
# ## Train
#
# A config is a file of the package, here `configs/ccd_sr.py`; everything in it can be changed by name. `fit` trains, writes
# checkpoints, scores the student on pictures of the test split, and resumes if it is called again.

# %%
import cddistill

looks = max(STEPS // 12, 1)  # steps between two looks at the validation split
settings = cddistill.configure("ccd_sr", steps=STEPS, eval_every=looks, eval_images=EVAL_IMAGES)
workdir = f"{WORKDIR}/{STEPS}"
student = cddistill.fit(settings, workdir)
student

# %%
import matplotlib.pyplot as plt

records = cddistill.records(workdir)
figure, axes = plt.subplots(1, 2, figsize=(9, 3))
for axis, name in zip(axes, ("student/loss", "val/psnr"), strict=True):
    shown = [(r["step"], r[name]) for r in records if name in r]
    axis.plot(*zip(*shown, strict=True), marker="." if len(shown) < 20 else "")
    axis.set(xlabel="step", title=name)

# %% [markdown]
# ## Look
#
# Test pictures, which training has not seen: the input, enlarged by bicubic interpolation, the student in 1, 2 and 4 network
# calls, and the original.

# %%
test = cddistill.examples(settings, n=8)
rows = {"bicubic": test["condition"]}
for steps in (1, 2, 4):
    rows[f"student, {steps} step{'s' * (steps > 1)}"] = cddistill.sample(student, image=test["condition"], steps=steps)
cddistill.grid(rows | {"original": test["image"]})

# %% [markdown]
# ## Your own picture
#
# Upload one (on Colab: the folder symbol on the left) and write its name here. Without one, a drawing is used. Pictures are made
# small, 8 x 8 px, and the student invents what is missing; it has only ever seen emoji.

# %% cellView="form"
# @title Your picture {run: "auto"}
YOUR_PICTURE = ""  # @param {type:"string"}
SAMPLE_STEPS = 4  # @param {type:"slider", min:1, max:8, step:1}
SEEDS = 4  # @param {type:"slider", min:1, max:8, step:1}
from PIL import Image, ImageDraw

if YOUR_PICTURE:
    picture = Image.open(YOUR_PICTURE)
else:
    picture = Image.new("RGB", (64, 64), "white")
    pen = ImageDraw.Draw(picture)
    pen.ellipse((8, 8, 56, 56), "gold")
    pen.ellipse((20, 22, 28, 32), "black")
    pen.ellipse((36, 22, 44, 32), "black")
    pen.arc((20, 26, 44, 48), 20, 160, "black", 3)
cddistill.grid(cddistill.sample(student, image=[picture] * SEEDS, steps=SAMPLE_STEPS), columns=SEEDS)

# %% [markdown]
# `report.html` in the workdir has the scores, the pictures and where the time went. `cddistill.save(workdir, "student")` writes
# the student as a folder for PyTorch diffusers. Next: [tasks](tasks.ipynb), [your own teacher](your_teacher.ipynb).
