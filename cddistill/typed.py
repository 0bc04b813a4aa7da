"""Dataclasses from plain values, with unknown names and wrong types said in one sentence."""

import dataclasses
import difflib
from typing import Any


def make(cls, values: dict[str, Any], prefix: str):
    """cls(**values) of a dataclass; see `check_types`. `prefix` stands before a key's name in messages, "data."."""
    return cls(**check_types(cls, values, prefix))


def check_types(cls, values: dict[str, Any], prefix: str) -> dict[str, Any]:
    """The values as a dataclass takes them; ValueError for a name that is no field or a type other than its default's.

    Integers serve where floats are due, lists where tuples are.
    """
    fields, checked = {f.name: f for f in dataclasses.fields(cls)}, {}
    for name, value in values.items():
        choose(f"config key {prefix}{name}", {f"{prefix}{k}": k for k in fields}, f"{prefix}{name}")
        default = fields[name].default
        if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        elif isinstance(default, tuple) and isinstance(value, list):
            value = tuple(value)
        elif type(value) is not type(default):
            raise ValueError(f"{prefix}{name} must be {type(default).__name__}, not {type(value).__name__} {value!r}")
        checked[name] = value
    return checked


def choose(what: str, table: dict[str, Any], name):
    """table[name], or a ValueError naming the nearest entry."""
    if name in table:
        return table[name]
    near = difflib.get_close_matches(str(name), table, 1, 0.5)
    hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(table)}"
    raise ValueError(f"unknown {what if str(name) in what else f'{what} {name!r}'}: {hint}")
