"""Dataclasses from plain values or texts; unknown names, wrong types and values out of range are one sentence.

A field's annotation says what it may be: a type, Literal["a", "b"], or Annotated[float, within(least=0, below=1)].
"""

import ast
import dataclasses
import difflib
import inspect
import io
import math
import operator
import textwrap
import tokenize
import typing
from collections.abc import Callable, Iterable
from typing import Annotated, Any, Literal, NamedTuple

BOOLEANS = dict.fromkeys(("true", "t", "yes", "y", "on", "1"), True)
BOOLEANS |= dict.fromkeys(("false", "f", "no", "n", "off", "0"), False)
BOUNDS = {
    "least": ("at least", operator.ge),
    "above": ("above", operator.gt),
    "below": ("below", operator.lt),
    "most": ("at most", operator.le),
    "multiple": ("a multiple of", lambda x, n: x % n == 0),
}
FLOAT32_MAX = 3.4e38


class Limit(NamedTuple):
    """What a field may be, beside its type."""

    words: str  # after "must be"
    allows: Callable[[Any], bool]


def within(off: float | None = None, **bounds: float) -> Limit:
    """Numbers within BOUNDS, `within(least=0, below=1)`; also the number `off`, by which an option is switched off."""
    words = " and ".join(f"{BOUNDS[name][0]} {bound}" for name, bound in bounds.items())
    return Limit(
        words if off is None else f"{off}, or {words}",
        lambda x: x == off or all(BOUNDS[name][1](x, bound) for name, bound in bounds.items()),
    )


Count = Annotated[int, within(least=1)]
Natural = Annotated[int, within(least=0)]
Width = Annotated[int, within(least=1, most=2**16)]  # channels, or a rank
SamplingSteps = Annotated[int, within(least=1, most=10_000)]
NonNegative = Annotated[float, within(least=0)]
Positive = Annotated[float, within(above=0)]
Share = Annotated[float, within(least=0, most=1)]
Decay = Annotated[float, within(least=0, below=1)]  # of a moving average, per step
SOME = Limit("at least one value", bool)
RISING = Limit("a range (low, high), with low at most high", lambda x: x[0] <= x[1])
FALLING = Limit("falling numbers", lambda x: list(x) == sorted({*x}, reverse=True))


def make(cls, values: dict[str, Any], prefix: str):
    """cls(**values) of a dataclass; see `check_types`. `prefix` stands before a key's name in messages, "data."."""
    return cls(**check_types(cls, values, prefix))


def check_types(cls, values: dict[str, Any], prefix: str) -> dict[str, Any]:
    """The values as a dataclass takes them, see `fit`; ValueError for a name that is no field, or a wrong type."""
    fields, checked = {f.name: f for f in dataclasses.fields(cls)}, {}
    for name, value in values.items():
        choose(f"config key {prefix}{name}", {f"{prefix}{k}": k for k in fields}, f"{prefix}{name}")
        checked[name] = fit(value, fields[name].type, f"{prefix}{name}")
    return checked


def fit(value, kind, name: str):
    """The value as an annotation has it: bool, int, float, str or a tuple of them, with a Limit or of a Literal.

    Integers serve as floats, whole floats (1e3) as integers, lists and single values as tuples. Raises ValueError, with
    the name of the key, for anything else; integers have 32 bits, floats are finite.
    """
    origin, inside = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated:
        value = fit(value, inside[0], name)
        if broken := [limit for limit in inside[1:] if not limit.allows(value)]:
            raise ValueError(f"{name}={brief(value)} must be {broken[0].words}")
        return value
    if origin is Literal:
        if fit(value, str, name) not in inside:
            raise ValueError(f"{name}={brief(value)} must be one of {', '.join(inside)}")
        return value
    if origin is tuple:
        values = value if isinstance(value, tuple | list) else (value,)
        kinds = inside[:1] * len(values) if inside[-1] is ... else inside
        if len(kinds) != len(values):
            raise ValueError(f"{name} must be {len(kinds)} values, not {len(values)}: {brief(value)}")
        return tuple(fit(x, k, f"{name}[{i}]") for i, (x, k) in enumerate(zip(values, kinds, strict=True)))
    if kind is float and type(value) is int:
        value = float(value) if abs(value) < FLOAT32_MAX else math.inf
    if kind is int and isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, kind) or (type(value) is bool and kind is not bool):
        raise ValueError(f"{name} must be {kind.__name__}, not {type(value).__name__} {brief(value)}")
    if broken := [said for of, said, holds in HELD if kind is of and not holds(value)]:
        raise ValueError(f"{name}={brief(value)} must be {broken[0]}")
    return value


HELD = (
    (int, "an integer of 32 bits", lambda x: -(2**31) <= x < 2**31),
    (float, "a finite number that float32 holds", lambda x: abs(x) <= FLOAT32_MAX),
    (str, "a text without zero bytes", lambda x: "\0" not in x),
)
"""What every value of a type must be."""


def brief(value) -> str:
    """A value as Python writes it, cut after 60 characters; Python itself refuses to write integers of 5,000 digits."""
    text = f"{value:#x}" if isinstance(value, int) and value.bit_length() > 64 else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def parse(texts: list[str], like, name: str):
    """The value of one option of the command line, of the type of `like`, from the texts that it was given.

    A tuple is given as 1,4 or (1,4), or piece by piece; of anything else the last text counts. 1e3 is an integer.
    Raises ValueError, with the name of the option, for a text that is no such value.
    """
    if isinstance(like, tuple):
        pieces = ",".join(text.strip().strip("()[]") for text in texts).split(",")
        return tuple(literal(piece.strip()) for piece in pieces if piece.strip())
    text = texts[-1].strip()
    if isinstance(like, bool):
        if text.lower() not in BOOLEANS:
            raise ValueError(f"{name} must be true or false, not {text!r}")
        return BOOLEANS[text.lower()]
    if isinstance(like, int | float):
        try:
            return fit(number(text), type(like), name)
        except ValueError:
            raise ValueError(
                f"{name} must be {'a whole number' if isinstance(like, int) else 'a number'}, not {text!r}"
            ) from None
    return texts[-1]


def number(text: str) -> int | float:
    """A text as an integer, else as a finite float; ValueError for anything else."""
    try:
        return int(text)
    except ValueError:
        value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is not finite")
    return value


def literal(text: str):
    """A number, a boolean or a quoted text as Python writes it; any other text is itself."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def choose(what: str, table: dict[str, Any], name):
    """table[name], or a ValueError naming the nearest entry."""
    if isinstance(name, str) and name in table:
        return table[name]
    near = difflib.get_close_matches(str(name), table, 1, 0.5)
    hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(table)}"
    raise ValueError(f"unknown {what if str(name) in what else f'{what} {name!r}'}: {hint}")


def nearest(name: str, known: Iterable[str]) -> str:
    """The dotted path that a name most likely means; "" for none.

    One with the same last part ("lr" is "optim.lr", and so is "learning_rate", by its initials), else one that is spelt
    alike; of several, one in the same group, then the shortest.
    """
    last, group = (lambda path: path.rpartition(".")[2]), (lambda path: path.partition(".")[0])
    paths = sorted(known, key=lambda path: (group(path) != group(name), path.count(".")))
    words = last(name).split("_")
    initials = "".join(word[:1] for word in words) if len(words) > 1 else ""
    for part, meant in ((str, name), (last, last(name)), (last, initials)):
        if same := [path for path in paths if part(path) == meant]:
            return same[0]
    if alike := difflib.get_close_matches(name, paths, 1, 0.8):
        return alike[0]
    alike = difflib.get_close_matches(last(name), map(last, paths), 1, 0.75)
    return next((path for path in paths if last(path) in alike), "")


def comments(cls) -> dict[str, str]:
    """{field: the comment behind it in the source of a dataclass}; {} where the source is not installed."""
    try:
        source = textwrap.dedent(inspect.getsource(cls))
    except OSError:
        return {}
    body = ast.parse(source).body[0].body
    starts = [min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", ()))]) for node in body]
    owner = {}  # line -> field
    for node, first, after in zip(body, starts, [*starts[1:], len(source.splitlines()) + 1], strict=True):
        if isinstance(node, ast.AnnAssign):
            owner |= dict.fromkeys(range(first, after), node.target.id)
    found = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT and (field := owner.get(token.start[0])):
            found.setdefault(field, []).append(token.string.lstrip("# "))
    return {field: " ".join(parts) for field, parts in found.items()}
