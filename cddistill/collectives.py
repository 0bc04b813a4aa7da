"""What a compiled program sends between devices."""

import math
import re

COLLECTIVE = re.compile(
    r" = (\(?[a-z0-9]+\[.*?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\("
)
ARRAY = re.compile(r"[a-z]+(\d+)\[([\d,]*)\]")


def collectives(program: str) -> dict[str, tuple[int, int]]:
    """{kind: (number, bytes that a device receives)} of an optimised HLO program, `compiled.as_text()`.

    What is in a loop counts once.
    """
    found = {}
    for result, kind in COLLECTIVE.findall(program):
        sizes = [
            int(bits) // 8 * math.prod(int(n) for n in dims.split(",") if n) for bits, dims in ARRAY.findall(result)
        ]
        number, total = found.get(kind, (0, 0))
        found[kind] = number + 1, total + sum(sizes)
    return found
