"""Networks whose fields are the keys of their config.json: reading, validating and writing it."""

import dataclasses
import types
import typing
from typing import Annotated, Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from cddistill.typed import HELD, Limit, Width, brief, within

# Keys that libraries and trainers add to any config.json: the state of an average of weights (diffusers' EMAModel), the
# dtype of the file, the library's version. None of them changes the network.
NOTES = {"decay", "inv_gamma", "min_decay", "optimization_step", "power", "update_after_step", "use_ema_warmup",
         "dtype", "torch_dtype", "transformers_version"}  # fmt: skip

Layers = Annotated[int, within(least=1, most=100)]
Blocks = Annotated[int, within(least=0, most=100)]  # of a level, beside those that change its size
LEVELS = Limit("1 to 10 values", lambda x: 1 <= len(x) <= 10)  # each halves height and width
Widths = Annotated[tuple[Width, ...], LEVELS]  # channels per level
Entries = Annotated[int, within(least=1, most=2**24)]  # of an embedding table
Size = Annotated[int, within(least=1, most=2**14)]  # pixels
Sizes = Size | Annotated[tuple[Size, ...], Limit("a height and a width", lambda x: len(x) == 2)]
Multiple = Annotated[int, within(least=1, most=64)]
Kernel = Annotated[int, Limit("an odd number from 1 to 31", lambda x: 1 <= x <= 31 and x % 2 == 1)]
Epsilon = Annotated[float, within(above=0, most=1)]
Scale = Annotated[float, within(above=0, most=10**8)]
Shift = Annotated[float, within(least=-10_000, most=10_000)]
MOST_LAYERS = 400  # of a network's encoder; tracing more takes minutes


class Configured(nn.Module):
    """Base of all ported networks. The fields below belong to a run; a subclass adds the keys of its config.json."""

    dtype: Any = jnp.float32
    remat: bool | str = False  # recompute each block's activations in the backward pass; a text: a policy of POLICIES
    flash: bool = True  # use fused attention kernels, which have no second derivative

    supported: ClassVar[dict] = {}  # {option: supported values}, for fields and other options
    no_effect: ClassVar[set] = set()  # options that are ignored: they do not change the output

    @classmethod
    def from_config(cls, config: dict, **run_options):
        """The module for a config.json of diffusers, transformers or `to_config`.

        run_options are dtype, remat and flash. Keys with a leading underscore and NOTES are ignored. Raises ValueError
        naming the options that are unknown, have an unsupported value or one out of range, before anything is built.
        """
        hints = {name: cls.__dataclass_fields__[name].type for name in cls().options()}
        ignored = NOTES | cls.no_effect
        config = {k: v for k, v in config.items() if not k.startswith("_") and k not in ignored}

        def wrong(k, v):
            if k in cls.supported:
                return v not in cls.supported[k]
            return k not in hints or bool(fault(v, hints[k]))

        if bad := sorted(said(k, v, hints.get(k, Any)) for k, v in config.items() if wrong(k, v)):
            listed = ", ".join(bad[:5]) + (f" and {len(bad) - 5} more" if len(bad) > 5 else "")
            raise ValueError(f"{cls.__name__} does not support {listed}; {cls.__module__} lists what it supports")
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


def products_saveable(primitive, *avals, **params) -> bool:
    """Keep what convolutions and matrix products with weights give; norms and activations are cheap to recompute."""
    dots = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    return primitive is jax.lax.conv_general_dilated_p or dots(primitive, *avals, **params)


POLICIES = {  # what rematerialised blocks keep for the backward pass besides their inputs; most have JAX's names
    "nothing_saveable": jax.checkpoint_policies.nothing_saveable,
    "products_saveable": products_saveable,
    "dots_saveable": jax.checkpoint_policies.dots_saveable,
    "dots_with_no_batch_dims_saveable": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "offload_dots": jax.checkpoint_policies.offload_dot_with_no_batch_dims("device", "pinned_host"),
}


def rematerialised(cls, remat: bool | str):
    """The class of a block, whose activations the backward pass recomputes if remat is True or a key of POLICIES."""
    if not remat:
        return cls
    return nn.remat(cls, policy=None if remat is True else POLICIES[remat])


def as_tuple(value):
    """A list, and the lists in it, as tuples."""
    return tuple(map(as_tuple, value)) if isinstance(value, list | tuple) else value


def said(key: str, value, hint=Any) -> str:
    """An option in an error, with what it must be: "norm_num_groups = 0 (must be at least 1)"."""
    why = "" if hint is Any else fault(value, hint)
    name = key if key.isidentifier() and len(key) <= 60 else brief(key)
    return f"{name} = {brief(value)}" + (f" ({why})" if why.startswith("must") else "")


WORDS = {int: "an integer", float: "a number", bool: "true or false", str: "a text", types.NoneType: "null"}


def fault(value, hint) -> str:
    """Why a value does not have a type hint, "must be at least 1" or "is not an integer"; "" if it does.

    Hints are of the kinds that fields use: classes, unions, tuples of one type, and these with Limits.
    """
    origin, inside = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        faults = [fault(value, x) for x in inside]
        return "" if "" in faults else max(faults, key=lambda why: why.startswith("must"))
    if origin is Annotated:
        broken = (f"must be {limit.words}" for limit in inside[1:] if not limit.allows(value))
        return fault(value, inside[0]) or next(broken, "")
    if origin is tuple:
        if not isinstance(value, list | tuple):
            return "is not a list"
        return next((why for x in value if (why := fault(x, inside[0]))), "")
    if isinstance(value, bool) is not (hint is bool):  # an int to Python, but not in a config
        return f"is not {WORDS[hint]}"
    if not isinstance(value, int | float if hint is float else hint):
        return f"is not {WORDS[hint]}"
    return next((f"must be {words}" for of, words, holds in HELD if hint is of and not holds(value)), "")


def check_layers(layers: int, keys: str) -> None:
    """Raise ValueError for a network of too many layers, which these keys make."""
    if layers > MOST_LAYERS:
        raise ValueError(f"{keys} make {layers} layers in the encoder, more than {MOST_LAYERS}")


def check_groups(widths, groups: int) -> None:
    """Raise ValueError for block_out_channels that cannot be split into norm_num_groups."""
    for i, width in enumerate(widths):
        if width % groups:
            raise ValueError(
                f"block_out_channels[{i}] = {width} cannot be split into norm_num_groups = {groups} groups"
            )
