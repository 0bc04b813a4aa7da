# ---
# jupyter:
#   accelerator: GPU
#   colab:
#     name: tasks.ipynb
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
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/OWNER/cddistill/blob/main/notebooks/tasks.ipynb)
#
# # Five tasks: one method, five kinds of condition
#
# Inpainting, editing by instruction, super-resolution, depth to image and edges to image, distilled by
# [CoDi](https://arxiv.org/abs/2310.01407) from `pocket`, a small Stable Diffusion at 64 px that comes with the package. It has no
# students for these tasks yet, so short ones are trained here; more steps make them better.
#
# Outputs that are saved here are of a run on a CPU with `TASK = "inpaint"`, `STEPS = 1500`: 17 minutes of training on one core,
# in an earlier run, which the cell "Train" loaded.

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
TASK = "all"  # @param ["all", "inpaint", "edit", "sr", "depth", "canny"]
STEPS = 400  # @param {type:"integer"}
WORKDIR = "runs/tasks"  # @param {type:"string"}
# @markdown The configs have 4,000 steps. A student whose workdir exists is resumed or, if it is complete, loaded.

# %% cellView="form" tags=["device"]
# @title Device and time
import jax

DEVICE = jax.devices()[0]
MINUTES = {}  # as measured; other devices were not
print(f"{jax.device_count()} x {DEVICE.device_kind}; minutes: {MINUTES.get(DEVICE.platform, 'not measured here')}")

# %% [markdown]
# ## Train

# %%
import cddistill

CONFIGS = {
    "inpaint": "ccd_inpaint",
    "edit": "ccd_edit",
    "sr": "ccd_sr:pocket",
    "depth": "ccd_depth",
    "canny": "ccd_canny",
}
chosen = [*CONFIGS] if TASK == "all" else [TASK]
settings, students = {}, {}
for task in chosen:
    settings[task] = cddistill.configure(
        CONFIGS[task], steps=STEPS, report=False, eval_every=STEPS, checkpoint_every=STEPS
    )
    students[task] = cddistill.fit(settings[task], f"{WORKDIR}/{task}_{STEPS}")

# %% [markdown]
# ## Look
#
# Test images. `depth` and `canny` get no prompt here, `edit` gets its instruction. Move the slider: on Colab the cell runs again.

# %% cellView="form"
# @title Steps of the student {run: "auto"}
SAMPLE_STEPS = 4  # @param {type:"slider", min:1, max:8, step:1}
GUIDED_BY_PROMPT = True  # @param {type:"boolean"}
from IPython.display import display

for task, student in students.items():
    test = cddistill.examples(settings[task], n=8)
    prompts = test["caption"] if GUIDED_BY_PROMPT or task == "edit" else None
    rows = {f"{task}: given": test["condition"][..., :3]}
    for steps in sorted({1, SAMPLE_STEPS}):
        name = f"student, {steps} step{'s' * (steps > 1)}"
        rows[name] = cddistill.sample(student, image=test["condition"], prompt=prompts, steps=steps)
    display(cddistill.grid(rows | {"original": test["image"]}))
    if task == "edit":
        print(*test["caption"], sep="\n")

# %% [markdown]
# ## Your own picture
#
# For inpainting the hole is where the picture is transparent; for depth the picture is a map, near is bright; for edges they are
# taken from it.

# %% cellView="form"
# @title Your picture {run: "auto"}
YOUR_PICTURE = ""  # @param {type:"string"}
YOUR_PROMPT = ""  # @param {type:"string"}
if YOUR_PICTURE:
    for student in students.values():
        made = cddistill.sample(student, image=YOUR_PICTURE, prompt=YOUR_PROMPT, n=4, steps=SAMPLE_STEPS)
        display(cddistill.grid(made, columns=4))
