"""A sampler written out: which sums of noise and outputs a network is called with, and which sum x0 is.

Samplers only add and scale, so that the coefficients say everything. `unroll` finds them by running the method's own
sampler on networks that answer with a unit vector each, and note what they are called with. Other programs then need a
network and a few numbers, but no noise schedule.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cddistill.generate import Student, noise_count
from cddistill.models.adapter import Branch
from cddistill.models.prompt import embed_ids
from cddistill.net import Denoiser, Net

LARGE = 1000.0  # scale of the second run, in which a sampler that clips is found out


class Call(NamedTuple):
    """What a network, and its branch if it has one, was called with, besides z and t, which they share."""

    nets: tuple[tuple[Callable, Any], ...]  # (apply, params) of the denoiser and of its branch
    given: tuple[tuple[tuple, dict], ...]  # arguments and options of each
    t: np.ndarray  # scalar
    z: Any  # float32 [basis]: coefficients of the noise and of the outputs of earlier calls

    def output(self, z, t, given):
        """The denoiser's output [1, h, w, c], with other inputs."""
        extra: dict[str, Any] = {}
        for (apply, params), (arguments, options) in reversed([*zip(self.nets, given, strict=True)]):
            out = apply(params, z, t.astype(self.t.dtype), *arguments, **options, **extra)
            extra = {"residuals": out}
        return out


class Unrolled(NamedTuple):
    """A student's network with its samplers as coefficients."""

    network: Callable[[dict[str, Any]], jax.Array]  # of `inputs`, by name: z, t, and what it takes of an example
    inputs: dict[str, np.ndarray]
    plans: dict[int, dict]  # by steps: {"noises": n, "calls": [{"t", "z", "given"}], "x0"}, as JSON has it

    @property
    def sources(self) -> set[str]:
        """What the network takes of an example: {"text.class_labels", "cond"}."""
        given = [call["given"].values() for plan in self.plans.values() for call in plan["calls"]]
        return {source for values in given for source in values if isinstance(source, str)}

    def run(self, steps: int, noise: np.ndarray, values: dict[str, np.ndarray], network) -> np.ndarray:
        """x0 [1, h, w, c] by a plan, from noise [n, 1, h, w, c]: what a page does. network takes a dict, as ours."""
        plan, basis = self.plans[steps], list(noise)
        total = lambda weights: sum(np.float32(w) * x for w, x in zip(weights, basis, strict=False) if w)
        for call in plan["calls"]:
            fed = {"z": total(call["z"]), "t": np.full(1, call["t"], np.float32)}
            for name, source in call["given"].items():
                like = self.inputs[name]
                fed[name] = values[source] if isinstance(source, str) else np.full_like(like, source)
            basis.append(np.asarray(network(fed)))
        return total(plan["x0"])


def unroll(student: Student, batch, steps: Sequence[int]) -> Unrolled:
    """The network and the plans of a student that is sampled in these numbers of steps, for one row of a batch.

    Raises ValueError for a sampler that does not only add and scale, such as one that clips x0, and for a network that
    takes what is not in an example.
    """
    probes = [varied(batch, turn) for turn in range(2)]
    found = [values(student, probe) for probe in probes]
    runs, bindings = {}, []
    for n in steps:
        both = [recorded(student, probe, n, scale) for probe, scale in zip(probes, (1.0, LARGE), strict=True)]
        check_sums(*both)
        runs[n] = both[0]
        bindings += [bound(*calls, *found) for calls in zip(*(calls for calls, _ in both), strict=True)]
    example = runs[steps[0]][0][0]
    names, fixed = inputs_of(bindings)
    leaves, tree = jax.tree.flatten(example.given)

    def network(inputs):
        at = lambda i: fixed[i] if names[i] is None else inputs[names[i]]
        return example.output(inputs["z"], inputs["t"], jax.tree.unflatten(tree, [at(i) for i in range(len(leaves))]))

    taken = {name: np.asarray(leaf) for name, leaf in zip(names, leaves, strict=True) if name}
    inputs = {"z": np.asarray(batch["x0"], np.float32), "t": np.zeros(1, np.float32)} | taken
    order, plans = iter(bindings), {}
    for n, (calls, x0) in runs.items():
        listed = [{"t": c.t.item(), "z": c.z.tolist(), "given": given(next(order), names)} for c in calls]
        plans[n] = {"noises": noise_count(student, batch, n), "calls": listed, "x0": x0.tolist()}
    return Unrolled(network, inputs, plans)


# ---- recording


@dataclasses.dataclass(frozen=True, eq=False)
class Recorder:
    """In the place of a network's apply: answers with something else than the network's output."""

    apply: Callable
    answer: Callable[[Call], Any]

    @property
    def module(self):
        """The network's own."""
        return getattr(self.apply, "module", None)

    def __call__(self, params, z, t, *arguments, residuals=None, **options):
        call = Call(((self.apply, params),), ((arguments, options),), np.asarray(t)[0], z)
        if residuals is not None:  # the call of a branch: its answer
            call = call._replace(nets=call.nets + residuals.nets, given=call.given + residuals.given)
        return self.answer(call)


def recorded(student: Student, batch, steps: int, scale: float) -> tuple[list[Call], np.ndarray]:
    """The calls of a denoiser in one run of the sampler, and the coefficients of x0.

    Noise and outputs are unit vectors along the height of z, times scale.
    """
    count = noise_count(student, batch, steps)
    size, calls = count + student.method.nfe(steps), []

    def vector(k):
        x = np.zeros((1, size, 1, batch["x0"].shape[-1]), np.float32)
        x[:, k] = scale
        return jnp.asarray(x)

    def answer(call):
        calls.append(call._replace(z=np.asarray(call.z)[0, :, 0, 0] / scale))
        return vector(count + len(calls) - 1)

    def watched(net):
        branch = isinstance(net.module, Branch)
        recorder = Recorder(net.apply, (lambda call: call) if branch else answer)
        return net.replace(apply=recorder) if branch or isinstance(net, Denoiser) else net

    nets = {k: watched(x) if isinstance(x, Net) else x for k, x in vars(student.n()).items()}
    after = lambda i: vector(min(int(i) + 1, count - 1))  # what is added after the last step counts nothing
    with jax.disable_jit():  # a sampler's loop becomes one of Python
        x0 = student.method.sample(SimpleNamespace(**nets), vector(0), batch, after, steps)
    return calls, np.asarray(x0)[0, :, 0, 0] / scale


def varied(batch, turn: int):
    """A batch of the same shapes in which no two arrays are equal, nor those of two turns."""
    rng = np.random.default_rng(turn)
    leaves, tree = jax.tree.flatten(batch)
    whole = lambda x, i: np.full(x.shape, 1 + i + turn * len(leaves), x.dtype)  # labels and ids of tokens
    drawn = lambda x: rng.random(x.shape).astype(x.dtype)
    new = [drawn(x) if np.issubdtype(x.dtype, np.floating) else whole(x, i) for i, x in enumerate(leaves)]
    return jax.tree.unflatten(tree, new)


def values(student: Student, batch) -> dict[str, np.ndarray]:
    """What an example has for a network, by name: {"text.class_labels": ..., "cond": ...}; texts embedded, if the
    student has a text encoder of its own."""
    given = {name: batch[name] for name in ("text", "null", "cond", "cond_latent") if name in batch}
    if student.method.requires().text_encoder:
        embedded = functools.partial(embed_ids, student.n().text_encoder_ema)
        given |= {name: embedded(given[name]["input_ids"]) for name in ("text", "null")}
    named = jax.tree.leaves_with_path(given)
    return {jax.tree_util.keystr(path, simple=True, separator="."): np.asarray(leaf) for path, leaf in named}


# ---- which inputs the calls have


def check_sums(first, second) -> None:
    """ValueError unless both runs of a sampler have the same coefficients."""
    pairs = [(a.z, b.z) for a, b in zip(first[0], second[0], strict=True)] + [(first[1], second[1])]
    if not all(np.allclose(a, b, rtol=1e-3, atol=1e-4) for a, b in pairs):
        raise ValueError(
            "this sampler does not only add and scale, as one on a page must: set clip_sample to false in the "
            "scheduler, if that is the reason"
        )


def bound(first: Call, second: Call, found_first, found_second) -> list[str | np.ndarray]:
    """Where each array that a call was given comes from: its name in an example, or the array if it never changes."""

    def source(a, b):
        for name, value in found_first.items():
            if np.array_equal(a, value) and np.array_equal(b, found_second[name]):
                return name
        if np.array_equal(a, b):
            return a
        raise ValueError("this student's network takes what is neither its text nor its condition: no page has that")

    leaves = [[np.asarray(x) for x in jax.tree.leaves(call.given)] for call in (first, second)]
    return [source(a, b) for a, b in zip(*leaves, strict=True)]


def inputs_of(bindings) -> tuple[list[str | None], list[Any]]:
    """(for each array, the name of the network's input that it is, or None; and its value, if it never changes).

    Arrays that are the same in all calls, as a text for network and branch is, are one input.
    """
    names, fixed = [], []
    for column in zip(*bindings, strict=True):
        named = [source for source in column if isinstance(source, str)]
        same = not named and all(np.array_equal(x, column[0]) for x in column)
        if not named and not same:
            raise ValueError("this student's network takes a number that changes from call to call: no page has that")
        names.append(named[0] if named else None)
        fixed.append(None if named else column[0])
    return names, fixed


def given(binding, names) -> dict[str, str | float]:
    """{input: its name in an example, or the number that fills it} of one call."""
    sources: dict[str, str | float] = {}
    for name, source in zip(names, binding, strict=True):
        if name is None:
            continue
        if not isinstance(source, str) and (source != source.flat[0]).any():
            raise ValueError(f"this student's network takes a fixed {name} in some calls: no page has that")
        sources[name] = source if isinstance(source, str) else source.flat[0].item()
    return sources
