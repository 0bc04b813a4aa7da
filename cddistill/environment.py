"""What a run ran on: versions, devices, hosts, and the environment variables that change its programs."""

import contextlib
import datetime
import importlib.metadata
import os
import platform
import re
import socket
from pathlib import PurePath
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

import cddistill
from cddistill import io, sharding

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
OPTIONAL = ("libtpu", "jax-cuda12-plugin")
VARIABLES = re.compile(  # none of them holds a secret
    "(XLA|LIBTPU|JAX|TPU|MEGASCALE|NCCL|CUDA|TENSORSTORE|CDDISTILL)_.+|TF_CPP_MIN_LOG_LEVEL|SLURM_JOB_(ID|NODELIST)"
)
FILE = "environment.json"
LONGEST_NAME = 256  # bytes of a host's name, of which POSIX allows 255


def versions() -> dict[str, str]:
    """Versions of the packages that compute, those of the devices if they are installed, and the devices."""
    found = {"cddistill": cddistill.__version__} | {name: importlib.metadata.version(name) for name in PACKAGES}
    for name in OPTIONAL:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    devices = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    return found | {"python": platform.python_version(), "devices": devices}


def hosts() -> list[str]:
    """The names of the run's hosts, by process; every host must call this."""
    name = np.zeros(LONGEST_NAME, np.uint8)
    own = os.fsencode(socket.gethostname())[:LONGEST_NAME]
    name[: len(own)] = bytearray(own)
    every = multihost_utils.process_allgather(name) if jax.process_count() > 1 else name
    return [os.fsdecode(bytes(row).rstrip(b"\0")) for row in np.reshape(every, (-1, LONGEST_NAME))]


def describe() -> dict[str, Any]:
    """This process's environment, with the names of all hosts; every host must call this."""
    variables = {key: value for key, value in sorted(os.environ.items()) if VARIABLES.fullmatch(key)}
    return {"versions": versions(), "hosts": hosts(), "platform": platform.platform(), "variables": variables}


def record(workdir: PurePath, step: int) -> None:
    """Add the environment of a run that starts, or resumes, at this step to environment.json, if it is another.

    Every host must call this; host 0 writes its own. Raises ValueError if the file is damaged.
    """
    path, now = workdir / FILE, describe()
    if not sharding.is_host0():
        return
    known = io.read_json(path, "delete it", environments=list)["environments"] if path.is_file() else []
    if known and {**known[-1], **now} == known[-1]:
        return
    time = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    io.write_json(path, {"environments": [*known, {"from_step": step, "time": time, **now}]})
