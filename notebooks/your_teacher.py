# ---
# jupyter:
#   accelerator: GPU
#   colab:
#     name: your_teacher.ipynb
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
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/OWNER/cddistill/blob/main/notebooks/your_teacher.ipynb)
#
# # Your teacher: distil Stable Diffusion on your own images
#
# From any Stable Diffusion 1.x, 2.x or XL (a Hub id, a folder, or one file) to a student in one to four steps that PyTorch diffusers
# runs: images are encoded once, a LoRA or a branch beside the frozen teacher is trained, and the result is exported. Take a GPU
# runtime. **Not run at this size by us**: with `TEACHER = "pocket"`, the small Stable Diffusion of the package, it runs on a CPU.
#
# Outputs that are saved here are of a run on a CPU with `TEACHER = "pocket"`, `SIZE = 64`, `NUM_IMAGES = 24`, `STEPS = 6`, `BATCH = 4`.

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
TEACHER = "stable-diffusion-v1-5/stable-diffusion-v1-5"  # @param {type:"string"}
IMAGES = ""  # @param {type:"string"}
SIZE = 512  # @param {type:"integer"}
NUM_IMAGES = 200  # @param {type:"integer"}
METHOD = "LoRA DMD2"  # @param ["LoRA DMD2", "PE-CoDi"]
STEPS = 500  # @param {type:"integer"}
BATCH = 2  # @param {type:"integer"}
RANK = 16  # @param {type:"integer"}
WORKDIR = "runs/your_teacher"  # @param {type:"string"}
# @markdown `IMAGES`: a folder of images, each with its caption in a `.txt` beside it; empty: drawings that come with the package.
# @markdown PE-CoDi trains a branch for inpainting, DMD2 a LoRA of `RANK` for prompts.

# %% cellView="form" tags=["device"]
# @title Device and time
import jax

DEVICE = jax.devices()[0]
MINUTES = {}  # as measured; other devices were not
print(f"{jax.device_count()} x {DEVICE.device_kind}; minutes: {MINUTES.get(DEVICE.platform, 'not measured here')}")

# %% [markdown]
# ## Images

# %%
import pathlib

import numpy as np
from PIL import Image

import cddistill

if not IMAGES:
    IMAGES = f"{WORKDIR}/images"
    pathlib.Path(IMAGES).mkdir(parents=True, exist_ok=True)
    drawings = cddistill.examples(cddistill.configure("ccd_inpaint"), n=NUM_IMAGES, split="train")
    for i, (image, caption) in enumerate(zip(drawings["image"], drawings["caption"], strict=True)):
        path = pathlib.Path(IMAGES, f"{i:04}.png")
        if not path.exists():
            Image.fromarray(np.uint8(image * 255 + 0.5)).resize((SIZE, SIZE)).save(path)
            path.with_suffix(".txt").write_text(caption)
print(len([*pathlib.Path(IMAGES).iterdir()]), "files in", IMAGES)

# %% [markdown]
# ## Encode them once
#
# Latents and embeddings, so that no step runs the VAE or the text encoder. A condition that is random, such as a hole, is drawn
# four times for each image.

# %%
config = {"LoRA DMD2": "dmd2_sd15", "PE-CoDi": "ccd_inpaint:sd15"}[METHOD]
slug = f"{WORKDIR}/{METHOD.replace(' ', '_')}"
common = {"teacher": TEACHER, "steps": STEPS, "batch_size": BATCH, "report": False, "sample_steps": (1,)}
common |= {"eval_every": STEPS, "checkpoint_every": STEPS, "eval_images": 8, "accumulate": 1}
common["dtype"] = "float32" if DEVICE.platform == "cpu" else "bfloat16"
epochs = 4 if METHOD == "PE-CoDi" else 1
raw = {"source": "folder", "path": IMAGES, "size": SIZE, "split": "fill"}
cddistill.encode_data(cddistill.configure(config, **common, data=raw, encode_epochs=epochs), f"{slug}_encoded")

# %% [markdown]
# ## Distil
#
# DMD2: student and fake score are two LoRAs over one base. PE-CoDi: the backbone is frozen, and its branch is as a ControlNet.

# %%
lora = {
    "student_lora": "attention",
    "fake_lora": "attention",
    "lora_rank": RANK,
    "student_timesteps": (999,),
    "ratio": 2,
}
own = {"method": lora} if METHOD == "LoRA DMD2" else {}
rates = {"lr": 1e-4, "warmup": 0}
settings = cddistill.configure(
    config, **common, **own, optim=rates, data={"source": "arrays", "path": f"{slug}_encoded"}
)
student = cddistill.fit(settings, f"{slug}_{STEPS}")
student

# %%
PROMPTS = ["a big red ball and a small blue cube", "red apple, noto style", "a big green cube", "grinning cat"]
if METHOD == "LoRA DMD2":
    made = cddistill.sample(student, prompt=PROMPTS, steps=1, seed=1)
else:
    given = cddistill.configure("ccd_inpaint:sd15", **common, data=raw)
    test = cddistill.examples(given, n=2, split="train")
    made = cddistill.sample(student, image=test["condition"], prompt=test["caption"], steps=4)
cddistill.grid(made, columns=4)

# %% [markdown]
# ## Export, and use it in PyTorch
#
# The folder is an ordinary diffusers pipeline, with a model card that has the lines to use it. The same noise gives the same
# picture.

# %%
folder = f"{slug}_{STEPS}_student"
if not pathlib.Path(folder).exists():
    cddistill.save(f"{slug}_{STEPS}", folder)
print(*sorted(str(path.relative_to(folder)) for path in pathlib.Path(folder).rglob("*") if path.is_file()), sep="\n")

# %%
if METHOD != "LoRA DMD2":
    print(f"See {folder}/README.md for the lines that use it.")
elif importlib.util.find_spec("torch") is None or importlib.util.find_spec("diffusers") is None:
    print("PyTorch and diffusers are not installed here: pip install torch diffusers transformers")
else:
    import diffusers
    import torch
    from IPython.display import display

    pipe = diffusers.DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    noise = np.asarray(cddistill.noises(1, np.arange(len(PROMPTS)), student.shape, 1))[:, 0]
    latents = torch.from_numpy(np.ascontiguousarray(noise.transpose(0, 3, 1, 2)))
    timesteps = list(pipe.scheduler.config["_timesteps"])
    theirs = pipe(PROMPTS, guidance_scale=1.0, timesteps=timesteps, latents=latents, output_type="np").images
    print(f"largest difference from JAX: {np.abs(theirs - made).max():.2g} of 1; the export is in float16")
    display(cddistill.grid({"JAX": made, "PyTorch": theirs}))
