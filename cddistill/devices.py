"""What accelerators can do: one table of published peaks. A measurement is compared with it, and a plan computed."""

from typing import NamedTuple


class Peak(NamedTuple):
    """Published numbers of one device, as JAX counts devices."""

    flops: float  # dense bfloat16 FLOP/s, a multiplication and an addition counted as two
    memory: float  # bytes
    bandwidth: float  # bytes/s of its memory
    network: float  # bytes/s that it can receive from the devices beside it: all links of one direction


# TPUs: cloud.google.com/tpu/docs/v4, v5e, v5p, v6e, "System architecture": peak compute per chip (bf16), HBM capacity
# and bandwidth, half of the bidirectional inter-chip bandwidth. GPUs: NVIDIA's data sheets, without sparsity: A100 SXM,
# H100 SXM and H200 SXM (half of NVLink's total), L4 (half of PCIe 4.0 x16's). Memory is what the sheet says: a runtime
# keeps some of it, see `plan.USABLE`.
PEAKS = {
    "v4": Peak(275e12, 32 * 2**30, 1228e9, 300e9),
    "v5e": Peak(197e12, 16 * 2**30, 819e9, 200e9),
    "v5p": Peak(459e12, 95 * 2**30, 2765e9, 600e9),
    "v6e": Peak(918e12, 32 * 2**30, 1640e9, 400e9),
    "a100": Peak(312e12, 80e9, 2039e9, 300e9),
    "a100-40": Peak(312e12, 40e9, 1555e9, 300e9),
    "h100": Peak(989e12, 80e9, 3350e9, 450e9),
    "h200": Peak(989e12, 141e9, 4800e9, 450e9),
    "l4": Peak(121e12, 24e9, 300e9, 32e9),
}
# What JAX calls them, device.device_kind, in lower case, begins with one of these; longer names first.
KINDS = {
    "tpu v5 lite": "v5e", "tpu v5e": "v5e", "tpu v5p": "v5p", "tpu v5": "v5p", "tpu v4": "v4", "tpu v6 lite": "v6e",
    "tpu v6e": "v6e", "nvidia a100-sxm4-40gb": "a100-40", "nvidia a100-pcie-40gb": "a100-40", "nvidia a100": "a100",
    "nvidia h100": "h100", "nvidia h200": "h200", "nvidia l4": "l4",
}  # fmt: skip
TPUS = ("v4", "v5e", "v5p", "v6e")


def kind_of(device_kind: str) -> str:
    """The key of PEAKS for a device's device_kind, "NVIDIA H100 80GB HBM3": "h100"; "" if it is not in the table.

    "NVIDIA L40S" is no L4: what follows a name is no letter or digit.
    """
    name = device_kind.lower()
    for begin, kind in KINDS.items():
        if name.startswith(begin) and not name[len(begin) : len(begin) + 1].isalnum():
            return kind
    return ""


def peak_of(device_kind: str) -> Peak | None:
    """The peaks of a device by its device_kind; None if it is not in the table, such as a CPU."""
    return PEAKS.get(kind_of(device_kind))
