# ---
# jupyter:
#   accelerator: GPU
#   colab:
#     name: add_a_method.ipynb
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
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/OWNER/cddistill/blob/main/notebooks/add_a_method.ipynb)
#
# # Add a method
#
# A method of distillation is one class: which networks it trains, with which loss, and how it samples. This notebook defines one in
# a cell, trains it, and runs the package's contract tests on it. It needs the source: a clone of the repository.
#
# The method regresses the teacher's ODE: from a noisy picture at time t the student predicts in one call where K steps of the teacher
# arrive ([Luhman and Luhman 2021](https://arxiv.org/abs/2101.02388) do so from pure noise, and with the teacher's whole path).
#
# Outputs that are saved here are of a run on a CPU with `STEPS = 60`.

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
STEPS = 600  # @param {type:"integer"}
EVERY_LAYOUT = False  # @param {type:"boolean"}
WORKDIR = "runs/add_a_method"  # @param {type:"string"}
# @markdown `EVERY_LAYOUT`: also compare one device with eight in three ways, some minutes more.

# %% cellView="form" tags=["device"]
# @title Device and time
import jax

DEVICE = jax.devices()[0]
MINUTES = {}  # as measured; other devices were not
print(f"{jax.device_count()} x {DEVICE.device_kind}; minutes: {MINUTES.get(DEVICE.platform, 'not measured here')}")

# %% [markdown]
# ## The method

# %%
# %%writefile ode_map.py
"""Regression of the teacher's ODE: G(z_t, t) = x0 after K DDIM steps of the teacher from z_t.

z_t = alpha x0 + sigma eps;  z <- K steps of DDIM with the teacher, from t to 0;  |G(z_t, t) - sg(x0(z))|^2
"""

import dataclasses
from typing import Annotated

import jax
import jax.numpy as jnp

from cddistill import sampling
from cddistill.losses import mse
from cddistill.method import Generator, Turn, normal, uniform
from cddistill.models.schedulers import Sampling
from cddistill.typed import Decay, within


@dataclasses.dataclass(frozen=True)
class OdeMap(Generator):
    """Hyper-parameters, with their ranges."""

    inner_steps: Annotated[int, within(least=1)] = 4  # K, the teacher's steps
    ema_decay: Decay = 0.99

    def init(self, key, frozen, batch):
        return {"student": jax.tree.map(jnp.copy, frozen["teacher"])}

    def turns(self):
        return {"student": Turn(moves=("student",), loss=self.loss)}

    def ema(self):
        return {"student": self.ema_decay}

    def exports(self):
        return {"unet": "student"}

    def loss(self, n, batch, key):
        k_t, k_eps = jax.random.split(key)
        u = uniform(k_t, batch["index"])
        at = lambda part: n.teacher.schedule.at(u * part)
        z_t = z = n.teacher.noise(batch["x0"], normal(k_eps, batch["index"], batch["x0"].shape[1:]), at(1.0))
        for i in range(self.inner_steps):
            step = n.teacher(z, at(1.0 - i / self.inner_steps), batch["text"])
            z = n.teacher.noise(step.x0, step.eps, at(1.0 - (i + 1) / self.inner_steps))
        target = jax.lax.stop_gradient(step.x0)
        return mse(n.student(z_t, at(1.0), batch["text"]).x0, target).mean(), {}

    def sample(self, n, noise, batch, step_noise, steps):
        schedule = n.teacher.schedule
        denoise = lambda z, t: n.student_ema(z, t, batch["text"])
        return sampling.lcm(denoise, schedule, noise, schedule.grid(steps), step_noise, scaling=None)

    def sampling(self, schedule, steps):
        return Sampling(sampler="lcm", timesteps=tuple(map(int, schedule.grid(steps))))


# %% [markdown]
# ## Train it
#
# In the package this is a file in `cddistill/methods/` and a line in its `__init__.py`. Configs, the command line, checkpoints, health
# rules, evaluation and export then know the method and its options.

# %%
import importlib

import cddistill
import ode_map
from cddistill.config import defaults

importlib.reload(ode_map)  # if the cell above has been changed
cddistill.METHODS["ode_map"] = ode_map.OdeMap
settings = defaults("ode_map")
settings.update(teacher="emoji", steps=STEPS, batch_size=8, eval_every=STEPS, checkpoint_every=STEPS, report=False)
settings.optim.lr = 3e-4
student = cddistill.fit(settings, f"{WORKDIR}/{STEPS}")
teacher, labels = cddistill.load("emoji"), [0, 1, 2, 3, 4, 5, 6, 7]
rows = {f"student, {n}": cddistill.sample(student, label=labels, steps=n, seed=1) for n in (1, 2, 4)}
cddistill.grid(rows | {f"teacher, {n}": cddistill.sample(teacher, label=labels, steps=n, seed=1) for n in (4, 50)})

# %% [markdown]
# ## Test it
#
# Losses are finite, a step changes only the nets of its turn, resuming is exact to the bit, samples do not depend on their place in a
# batch, the loss falls. What these tests cannot see, such as a flipped sign, needs a world with a known solution: see
# `CONTRIBUTING.md`.

# %%
import pathlib

places = (pathlib.Path(cddistill.__file__).parents[1], pathlib.Path("cddistill-source").resolve())
tests = next((place / "tests" for place in places if (place / "tests" / "test_methods.py").is_file()), None)
if tests is None:
    raise FileNotFoundError("the tests are not installed with the package: clone the repository and start from there")
pathlib.Path("add_ode_map.py").write_text("import ode_map, tiny\ntiny.VARIANTS['ode_map'] = ode_map.OdeMap()\n")
here = os.pathsep.join(filter(None, (os.getcwd(), os.environ.get("PYTHONPATH"))))
which = "not weights" if EVERY_LAYOUT else "not slow"
command = [
    sys.executable,
    "-m",
    "pytest",
    "-q",
    "--color=no",
    "-o",
    "addopts=",
    "-W",
    "ignore",
    "-m",
    which,
    "-k",
    "ode_map",
]
done = subprocess.run(
    [*command, "-p", "no:cacheprovider", "add_ode_map.py", str(tests / "test_methods.py")],
    capture_output=True, text=True, env=os.environ | {"PYTHONPATH": here},
)  # fmt: skip
print(done.stdout[-1500:], done.stderr[-1500:])
