"""The devices that a plan is for: those that there are, or others that only a compiler knows."""

import contextlib
import importlib.util
import math
import re
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies

from cddistill.devices import PEAKS, TPUS, Peak, kind_of
from cddistill.typed import nearest

TOPOLOGY = re.compile(r"([\w-]+):(\d+(?:x\d+)*)")
MOST = 4096  # devices


class Target(NamedTuple):
    """Devices to compile for, and what is known of them."""

    kind: str  # a key of devices.PEAKS, "cpu", or what JAX calls it
    devices: list[Any]  # of jax, some of them without hardware
    compiler: str  # the platform that programs are compiled for: "cpu", "gpu" or "tpu"
    memory: float | None  # bytes of a device
    peak: Peak | None = None

    @property
    def is_tpu(self) -> bool:
        return self.kind in TPUS


def target(topology: str = "", memory: str = "") -> Target:
    """The devices of "v5p:2x2x2" or "h100:8", or those of this process for ""; `memory`, in GB, is each one's.

    TPUs are compiled for where libtpu is installed (extra tpu); for others, as many CPU devices stand in. Call it
    before anything has run on a device. Raises ValueError, naming what it can be, for anything else.
    """
    given = in_bytes(memory) if memory else None
    if not topology:
        devices = jax.devices()
        kind = kind_of(devices[0].device_kind)
        peak = PEAKS.get(kind)
        stats = devices[0].memory_stats() if hasattr(devices[0], "memory_stats") else None
        own = (stats or {}).get("bytes_limit") or (peak and peak.memory)
        return Target(kind or devices[0].device_kind, devices, devices[0].platform, given or own, peak)
    kind, number = parsed(topology)
    known = given or (PEAKS[kind].memory if kind in PEAKS else None)
    jax.config.update("jax_platforms", "cpu")
    if kind in TPUS and importlib.util.find_spec("libtpu"):
        return Target(kind, of_tpu(topology), "tpu", known, PEAKS[kind])
    return Target(kind, fake(number), "cpu", known, PEAKS.get(kind))


def in_bytes(memory: str) -> float:
    """GB as bytes; ValueError for what is no positive number."""
    try:
        value = float(memory)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise ValueError(f"--device-memory={memory} must be a positive number, the GB that a device has, such as 80")
    return value * 1e9


def parsed(topology: str) -> tuple[str, int]:
    """(kind, number of devices) of a topology; ValueError for one that is none."""
    form, kinds = TOPOLOGY.fullmatch(topology.lower()), [*PEAKS, "cpu"]
    if form is None:
        raise ValueError(f"--topology={topology} must be a kind and its numbers, such as v5p:2x2x2 or h100:8")
    if form[1] not in kinds:
        near = nearest(form[1], kinds)
        hint = f"did you mean {near!r}?" if near else "it must be one of"
        raise ValueError(f"--topology={topology} has the unknown kind {form[1]!r}: {hint} ({', '.join(kinds)})")
    number = math.prod(map(int, form[2].split("x")))
    if not 1 <= number <= MOST:
        raise ValueError(f"--topology={topology} has {number} devices, and must have 1 to {MOST}")
    return form[1], number


def of_tpu(topology: str) -> list[Any]:
    """TPU devices that only the compiler knows; ValueError for a shape that there is not."""
    try:
        return list(topologies.get_topology_desc(topology.lower(), platform="tpu").devices)
    except Exception as error:  # any error of libtpu's, whose texts are long
        said = " ".join(str(error).split())[:200]
        raise ValueError(f"--topology={topology} is not known to libtpu ({said}): try another shape") from error


def fake(number: int) -> list[Any]:
    """CPU devices that share this machine."""
    with contextlib.suppress(RuntimeError):  # where devices are there already
        jax.config.update("jax_num_cpu_devices", number)
    devices = jax.devices("cpu")
    if len(devices) < number:
        raise ValueError(f"this process has {len(devices)} CPU devices, and the plan is for {number}: start it anew")
    return devices[:number]
