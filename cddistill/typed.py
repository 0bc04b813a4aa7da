"""Dataclasses from plain values or texts, with unknown names and wrong types said in one sentence."""

import ast
import dataclasses
import difflib
import inspect
import io
import math
import textwrap
import tokenize
import typing
from collections.abc import Iterable
from typing import Any

BOOLEANS = dict.fromkeys(("true", "t", "yes", "y", "on", "1"), True)
BOOLEANS |= dict.fromkeys(("false", "f", "no", "n", "off", "0"), False)


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
    """The value as an annotation has it: bool, int, float, str, or a tuple of them.

    Integers serve as floats, whole floats (1e3) as integers, lists and single values as tuples. Raises ValueError, with
    the name of the key, for anything else.
    """
    if typing.get_origin(kind) is tuple:
        values, kinds = value if isinstance(value, tuple | list) else (value,), typing.get_args(kind)
        kinds = kinds[:1] * len(values) if kinds[-1] is ... else kinds
        if len(kinds) != len(values):
            raise ValueError(f"{name} must be {len(kinds)} values, not {len(values)}: {value!r}")
        return tuple(fit(x, k, f"each of {name}") for x, k in zip(values, kinds, strict=True))
    if kind is float and type(value) is int:
        return float(value)
    if kind is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if not isinstance(value, kind) or (type(value) is bool and kind is not bool):
        raise ValueError(f"{name} must be {kind.__name__}, not {type(value).__name__} {value!r}")
    return value


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
    if name in table:
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
