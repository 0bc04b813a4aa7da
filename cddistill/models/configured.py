"""Networks whose fields are the keys of their config.json: what is read, what is refused, what is written."""

import dataclasses
import types
import typing
from typing import Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp


class Configured(nn.Module):
    """The fields below are a run's; those that a network adds are its config's, and their types are checked."""

    dtype: Any = jnp.float32
    remat: bool = False  # recompute the inside of each block, or layer, in the backward pass
    flash: bool = True  # attention by a fused kernel where there is one; it has no second derivative

    supported: ClassVar[dict] = {}  # option: the only values supported, be it a field or not
    no_effect: ClassVar[set] = set()  # options that may have any value: they change no number here

    @classmethod
    def from_config(cls, config: dict, **ours):
        """The module of a config.json, as diffusers, transformers or `to_config` write it.

        `ours` are dtype, remat and flash. Keys with a leading underscore are ignored. Raises ValueError naming every
        option that is unknown, or whose value is not supported.
        """
        hints = {name: cls.__dataclass_fields__[name].type for name in cls().options()}
        config = {k: v for k, v in config.items() if not k.startswith("_") and k not in cls.no_effect}

        def known(k, v):
            return v in cls.supported[k] if k in cls.supported else k in hints and fits(v, hints[k])

        if bad := sorted(f"{k} = {v!r}" for k, v in config.items() if not known(k, v)):
            said = f"{cls.__name__} does not support {', '.join(bad)}"
            raise ValueError(f"{said}; {cls.__module__} lists what it supports")
        module = cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in config.items() if k in hints}, **ours)
        module.check()
        return module

    def options(self) -> dict:
        """The fields that are keys of a config."""
        ours = Configured.__dataclass_fields__
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in ours}

    def to_config(self) -> dict:
        """The config.json of this module, as diffusers reads it."""
        return {"_class_name": type(self).__name__, **self.options()}

    def check(self):
        """Raise ValueError for options that do not agree with each other."""


def fits(value, hint) -> bool:
    """Whether a value is of a type, by the little of the language of types that fields use."""
    if isinstance(hint, types.UnionType):
        return any(fits(value, x) for x in typing.get_args(hint))
    if typing.get_origin(hint) is tuple:
        return isinstance(value, list | tuple) and all(fits(x, typing.get_args(hint)[0]) for x in value)
    return isinstance(value, int | float if hint is float else hint)
