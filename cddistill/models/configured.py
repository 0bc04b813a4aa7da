"""Networks whose fields are the keys of their config.json: reading, validating and writing it."""

import dataclasses
import types
import typing
from typing import Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp

# Keys that libraries and trainers add to any config.json: the state of an average of weights (diffusers' EMAModel), the
# dtype of the file, the library's version. None of them changes the network.
NOTES = {"decay", "inv_gamma", "min_decay", "optimization_step", "power", "update_after_step", "use_ema_warmup",
         "dtype", "torch_dtype", "transformers_version"}  # fmt: skip


class Configured(nn.Module):
    """Base of all ported networks. The fields below belong to a run; a subclass adds the keys of its config.json."""

    dtype: Any = jnp.float32
    remat: bool = False  # recompute each block's activations in the backward pass
    flash: bool = True  # use fused attention kernels, which have no second derivative

    supported: ClassVar[dict] = {}  # {option: supported values}, for fields and other options
    no_effect: ClassVar[set] = set()  # options that are ignored: they do not change the output

    @classmethod
    def from_config(cls, config: dict, **run_options):
        """The module for a config.json of diffusers, transformers or `to_config`.

        run_options are dtype, remat and flash. Keys with a leading underscore and NOTES are ignored. Raises ValueError
        naming every option that is unknown or has an unsupported value.
        """
        hints = {name: cls.__dataclass_fields__[name].type for name in cls().options()}
        ignored = NOTES | cls.no_effect
        config = {k: v for k, v in config.items() if not k.startswith("_") and k not in ignored}

        def known(k, v):
            return v in cls.supported[k] if k in cls.supported else k in hints and has_type(v, hints[k])

        if bad := ", ".join(sorted(f"{k} = {v!r}" for k, v in config.items() if not known(k, v))):
            raise ValueError(f"{cls.__name__} does not support {bad}; {cls.__module__} lists what it supports")
        options = {k: as_tuple(v) for k, v in config.items() if k in hints}
        module = cls(**options, **run_options)
        module.check()
        return module

    def options(self) -> dict:
        """The fields that are keys of config.json."""
        run_options = Configured.__dataclass_fields__
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in run_options}

    def to_config(self) -> dict:
        """This module's config.json, in diffusers' format."""
        return {"_class_name": type(self).__name__, **self.options()}

    def check(self):
        """Raise ValueError for options that contradict each other."""


def as_tuple(value):
    """A list, and the lists in it, as tuples."""
    return tuple(map(as_tuple, value)) if isinstance(value, list | tuple) else value


def has_type(value, hint) -> bool:
    """Whether a value has a type hint of the kinds that fields use: classes, unions and tuples of one type."""
    if isinstance(hint, types.UnionType):
        return any(has_type(value, x) for x in typing.get_args(hint))
    if typing.get_origin(hint) is tuple:
        return isinstance(value, list | tuple) and all(has_type(x, typing.get_args(hint)[0]) for x in value)
    if isinstance(value, bool):  # an int to Python, but not in a config
        return hint is bool
    return isinstance(value, int | float if hint is float else hint)
