"""Memory that was freed is returned to the operating system."""

import pathlib
import platform

import pytest

from cddistill import memory


def resident() -> float:
    """MB that this process has in use."""
    return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * 4096 / 1e6


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's malloc keeps it")
def test_what_was_freed_below_a_living_object_is_returned():
    pieces = [bytes(5000) for _ in range(40_000)]
    pieces = pieces[-1:]  # the heap cannot shrink from its end
    held = resident()
    memory.trim()
    assert resident() < held - 100, (held, len(pieces))
