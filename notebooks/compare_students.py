# ---
# jupyter:
#   accelerator: GPU
#   colab:
#     name: compare_students.ipynb
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
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/OWNER/cddistill/blob/main/notebooks/compare_students.ipynb)
#
# # Compare students: steps against quality
#
# Few-step students that others have made (LCM, Turbo, DMD2: any diffusers folder or Hub id) sampled as their own scheduler says, and
# scored with the same prompts, noise and images. The first folder may be the teacher.
#
# Published students need a GPU and are downloaded: `FOLDERS = "SimianLuo/LCM_Dreamshaper_v7, stabilityai/sd-turbo"` with `IMAGES` of
# your own. **Not run by us.** As it is, the notebook draws the curve of the embedded teacher `pocket`.
#
# Outputs that are saved here are of a run on a CPU with `STEPS = "1, 2, 4, 8"`, `NUM_IMAGES = 32`: far too few images to rank anything.

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
FOLDERS = "pocket"  # @param {type:"string"}
STEPS = "1, 2, 4, 8, 16"  # @param {type:"string"}
GUIDANCE = 1.0  # @param {type:"number"}
IMAGES = ""  # @param {type:"string"}
NUM_IMAGES = 200  # @param {type:"integer"}
WORKDIR = "runs/compare_students"  # @param {type:"string"}
# @markdown `IMAGES`: a folder of images with captions, which are the prompts; empty: the embedded icons and scenes, 64 px.

# %% cellView="form" tags=["device"]
# @title Device and time
import jax

DEVICE = jax.devices()[0]
MINUTES = {}  # as measured; other devices were not
print(f"{jax.device_count()} x {DEVICE.device_kind}; minutes: {MINUTES.get(DEVICE.platform, 'not measured here')}")

# %% [markdown]
# ## Score each
#
# KID compares the generated images with the real ones of the test split, 0 is best. It needs the extra `eval`.

# %%
import cddistill

folders = [name.strip() for name in FOLDERS.split(",") if name.strip()]
numbers = tuple(int(text) for text in STEPS.split(","))
models, scores, settings = {}, {}, {}
for folder in folders:
    models[folder] = cddistill.load(folder)
    own = {"source": "folder", "path": IMAGES, "split": "fill"} if IMAGES else {"source": "mixture", "num_classes": 33}
    settings[folder] = cddistill.configure(
        "pretrained",
        teacher=folder,
        sample_steps=numbers,
        eval_images=NUM_IMAGES,
        method={"guidance": GUIDANCE},
        data=own | {"size": models[folder].size},
    )
    scores[folder] = cddistill.evaluate(settings[folder], f"{WORKDIR}/{folder.replace('/', '_')}")

# %% [markdown]
# ## Steps against quality

# %%
import matplotlib.pyplot as plt

rows = {folder: [scores[folder][f"student, {n} step{'s' * (n > 1)}"] for n in numbers] for folder in folders}
metrics = [name for name in rows[folders[0]][0] if name.startswith("KID")] or [*rows[folders[0]][0]][:1]
figure, axis = plt.subplots(figsize=(6, 3.5))
for folder, found in rows.items():
    means, errors = zip(*(row[metrics[0]] for row in found), strict=True)
    axis.errorbar(numbers, means, errors, marker="o", capsize=3, label=folder)
axis.set(xlabel="steps", ylabel=metrics[0], xscale="log", xticks=numbers, xticklabels=numbers)
axis.legend()
axis.minorticks_off()

# %% [markdown]
# ## Look
#
# The same noise in every row.

# %%
from IPython.display import display

for folder, model in models.items():
    prompts = cddistill.examples(settings[folder], n=8)["caption"]
    draw = lambda n, model=model, prompts=prompts: cddistill.sample(model, prompt=prompts, steps=n, guidance=GUIDANCE)
    display(cddistill.grid({f"{folder}, {n}": draw(n) for n in numbers}))
