"""FLOPs of a traced program, by its matrix products and convolutions; nothing is compiled.

The compiler's own count, `compiled.cost_analysis()`, takes what is in a loop once. Here it counts as often as the loop
runs; only a `while` loop whose length is known at run time alone counts once.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple


class Count(NamedTuple):
    """FLOPs of a program, over all devices together."""

    flops: float  # a multiplication and an addition are two
    unknown_loops: int = 0  # loops that were counted as if they ran once


def count(jaxpr) -> Count:
    """The FLOPs of a jaxpr, as of jax.jit(f).trace(*args).jaxpr, and of all that it calls."""
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)  # a closed one
    total, unknown = 0.0, 0
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        if name == "dot_general":
            total += dot(equation)
        elif name == "conv_general_dilated":
            total += convolution(equation)
        inner = [count(x) for x in subprograms(params)]
        if not inner:
            continue
        if name == "cond":
            inner = [max(inner)]  # one branch is taken
        times = repeats(name, params)
        total += times * sum(x.flops for x in inner)
        unknown += sum(x.unknown_loops for x in inner) + (name == "while" and sum(x.flops for x in inner) > 0)
    return Count(total, unknown)


def repeats(name: str, params: dict[str, Any]) -> float:
    """How often an equation runs its subprograms, over all devices."""
    if name == "scan":
        return params["length"]
    if name == "pallas_call":
        return math.prod(params["grid_mapping"].grid)
    if name == "shard_map":
        axes = params.get("newly_manual_axes") or params["manual_axes"]  # JAX's name for it changes
        return math.prod(n for axis, n in params["mesh"].shape.items() if axis in axes)
    return 1


def subprograms(params: dict[str, Any]) -> Iterator[Any]:
    """The jaxprs among an equation's parameters; of a custom derivative, that of the function itself."""
    for value in params.values():
        for x in value if isinstance(value, list | tuple) else (value,):
            if hasattr(x, "eqns") or hasattr(getattr(x, "jaxpr", None), "eqns"):
                yield x


def dot(equation) -> float:
    """2 x the elements of the result x the length of the contracted axes."""
    (contracted, _), _ = equation.params["dimension_numbers"]
    shape = equation.invars[0].aval.shape
    return 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(shape[i] for i in contracted)


def convolution(equation) -> float:
    """2 x the elements of the result x the taps of the kernel that meet the input, over its input channels.

    Of an input with holes (lhs_dilation, as in the gradient of a strided convolution) one tap in `dilation` is no zero.
    """
    kernel, numbers = equation.invars[1].aval.shape, equation.params["dimension_numbers"].rhs_spec
    taps = math.prod(kernel[i] for i in numbers[1:])
    holes = math.prod(equation.params["lhs_dilation"])
    return 2.0 * math.prod(equation.outvars[0].aval.shape) * taps / holes
