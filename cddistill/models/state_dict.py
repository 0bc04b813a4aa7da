"""A network's state dict in what a trainer saved: among other entries, and with the names that wrappers add removed."""

import re

from cddistill.typed import brief

MOST_NESTED = 10  # levels of dicts around a state dict, or of wrappers around a network
MOST_TENSORS = 50_000
MOST_NAMED = 3  # state dicts in an error
WRAPPER = re.compile(r"module|model|net|network|params|state_dict|(\w+_)?ema(_\w+)?")  # first part of every name
INSIDE = re.compile(r"(?<![^.])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")  # anywhere in a name
# Tensors that are no weights: counters of averages, and the noise schedule that samplers register as buffers.
BUFFERS = re.compile(
    r"n_averaged|num_updates|decay|initted|(global_)?step|betas|logvar|posterior_\w+|(\w+_)?alphas_cumprod(_prev)?"
)
ENTRIES = re.compile(  # of a checkpoint, which say nothing about the weights
    r"[^.]*(optim|sched|scaler|callback|loops|hyper|hparams|args|config|random|rng|metric)[^.]*|opt", re.IGNORECASE
)

REMEDY = "save the network's state_dict() with torch.save, or better as safetensors"


class Ignored:
    """Stands for an object that is no tensor. Unpickling makes it and sets its state, and nothing is kept."""

    def __new__(cls, *args, **kwargs):
        return super().__new__(cls)

    def __setstate__(self, state):
        pass


def find(saved, tensor: type, file, level: int = 0) -> dict:
    """The only state dict, {name: tensor}, in a saved dict: itself, or under a key such as "state_dict" or "model".

    Numbers, strings and the states of optimizers, schedulers and random generators beside it are ignored. Raises
    ValueError naming the file and the entry for anything else, and for several state dicts.
    """
    if level > MOST_NESTED:  # perhaps a dict that holds itself
        raise ValueError(f"{file} holds dicts in dicts, {MOST_NESTED} levels deep: {REMEDY}")
    if not isinstance(saved, dict):
        raise ValueError(f"{file} holds a {type(saved).__name__}, not a state dict: {REMEDY}")
    held = among(saved, tensor)
    other = [k for k, x in held.items() if not (isinstance(k, str) and isinstance(x, tensor))]
    nested = [k for k in other if isinstance(held[k], dict) and held[k]]
    if nested == [*held] and len(held) == 1:
        return find(held[nested[0]], tensor, file, level + 1)
    if nested == [*held] and len(held) > 1:
        names = " and ".join(brief(name).strip("'") for name in nested[:MOST_NAMED])
        raise ValueError(f"{file} holds the state dicts {names}: save the one that you want as a file of its own")
    if other or (saved and not held):
        name = next(iter(other or saved))
        sentence = f"{file} is not a plain state dict: its {brief(name)} is of type {type(saved[name]).__name__}"
        raise ValueError(f"{sentence}, not a tensor; {REMEDY}")
    return held


def among(saved: dict, tensor: type) -> dict:
    """The entries that may be weights, or hold some; of those that hold them, no more than an error names."""
    held, plain, nested = {}, set(), 0
    for name, x in saved.items():
        if isinstance(name, str) and ENTRIES.fullmatch(name):
            continue
        whole = isinstance(x, tensor)
        if whole or not is_plain(x, plain):
            held[name], nested = x, nested + (not whole)
        if nested == MOST_NAMED:
            break
    return held


def is_plain(x, known: set) -> bool:
    """Whether a value is a number, a string, nothing, or a list or dict of these, which may hold each other.

    known has the ids of lists and dicts that are; those that are found are added to it.
    """
    waiting, seen = [x], set()
    while waiting:
        x = waiting.pop()
        if isinstance(x, dict) or type(x) in (list, tuple):  # a tensor is a NamedTuple
            if id(x) not in seen and id(x) not in known:
                seen.add(id(x))
                waiting.extend(x.values() if isinstance(x, dict) else x)
        elif not isinstance(x, int | float | str | Ignored | None):
            return False
    known |= seen
    return True


def is_average(name: str) -> bool:
    """Whether a name is of an average beside the network itself, such as "model_ema.conv.weight"."""
    first, dot, _ = name.partition(".")
    return bool(dot) and "ema" in first.split("_")


def bare_names(tensors: dict, file, level: int = 0) -> dict:
    """The tensors under the names of the network itself, without the buffers that are no weights.

    "module." (DataParallel), "model." (Lightning), "ema." and the like are removed where every name has them, also in
    combination; "_orig_mod." (torch.compile) and FSDP's anywhere. Raises ValueError for a network beside its average.
    """
    if level > MOST_NESTED or len(tensors) > MOST_TENSORS:
        limits = f"{MOST_TENSORS} tensors, or names in {MOST_NESTED} wrappers"
        raise ValueError(f"{file} holds more than {limits}: {REMEDY}")
    weights = {name: x for name, x in tensors.items() if not BUFFERS.fullmatch(name)}
    bare = {INSIDE.sub("", name): x for name, x in weights.items()}
    if len(bare) < len(weights):
        raise ValueError(f"{file} holds tensors twice, with and without _orig_mod: save the state dict again")
    first = {name.partition(".")[0] for name in bare}
    if len(first) == 1 and WRAPPER.fullmatch(*first) and all("." in name for name in bare):
        return bare_names({name.partition(".")[2]: x for name, x in bare.items()}, file, level + 1)
    if average := next(filter(is_average, bare), None):
        raise ValueError(
            f"{file} holds a network and its average ({average}): save the one that you want as a state dict of its own"
        )
    return bare
