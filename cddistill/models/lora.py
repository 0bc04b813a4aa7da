"""Low-rank adapters (LoRA, Hu et al. 2021) as separate nets: W + alpha / r * down @ up for selected kernels W.

A LoRA's parameters mirror the tree of the base network, with {"down": [..., in, r], "up": [..., r, out]} in place of a
kernel. A LoRA is a function from base weights to adapted weights. In a loss the student is adapt(n.teacher, n.student),
an ordinary Denoiser whose gradients go to down and up; teacher, fake score and student are one base and two LoRAs.
Applied to stored weights, lora(params) is the merge for export.

W + update is computed inside the program. The alternative, x @ W + (x @ down) @ up in every layer, would save the
gradient of W (a third of the FLOPs of forward and backward pass) and the memory of the sum. The compiler keeps one copy
of it for the backward pass, 1.07 times the adapted kernels (0.2 times in a forward pass alone): 5.1 GB in bfloat16 with
all of SDXL's blocks adapted, 1.9 GB with its attention. The alternative would also need two thin products per layer and
a second kind of network. Fully trained, SDXL has 41 GB of weights, gradients and moments, so the sum is affordable.
"""

import dataclasses
import difflib
import re
from pathlib import Path
from typing import Literal, NamedTuple

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from cddistill import io, progress
from cddistill.models import files, folders, peft
from cddistill.models.convert import abbreviate, from_torch, to_torch, torch_name, unflatten
from cddistill.models.ldm import unet_names
from cddistill.models.state_dict import bare_names
from cddistill.net import Net

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
BLOCKS = (  # every layer in the blocks, as in LCM-LoRA and DMD2
    *ATTENTION, "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "conv1", "conv2", "conv_shortcut",
    "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj",
)  # fmt: skip

LAYERS = {"attention": ATTENTION, "blocks": BLOCKS}  # as methods' options name them
LoraLayers = Literal["none", *LAYERS]

LORA_FILE = "pytorch_lora_weights.safetensors"  # the file name that diffusers expects
KOHYA_FILE = "lora_kohya.safetensors"  # for ComfyUI and A1111, which take any name
PREFIXES = {  # of layer names in files: diffusers' first, then kohya's trainer's
    "unet": ("unet.", "lora_unet_"),
    "text_encoder": ("text_encoder.", "lora_te_", "lora_te1_"),
    "text_encoder_2": ("text_encoder_2.", "lora_te2_"),
}
KEY = re.compile(  # the name in the middle is an adapter's, such as default
    r"(.+?)(?:(?:\.lora_|[._]lora\.|\.lora_linear_layer\.)(A|B|down|up)(?:\.\w+)?\.weight|\.(alpha))"
)
TEXT_ENCODER = re.compile(r"(base_model\.model\.)?(text_model\.|encoder\.layers\.)")  # in names without a prefix
OTHER_KINDS = {  # {pattern in a key: kind of adapter}
    "hada_": "LoHa", "lokr_": "LoKr", "boft_": "BOFT", "oft_": "OFT", "ia3_": "(IA)3", r"\.on_input": "(IA)3",
    "lora_mid": "LoCon with a Tucker core", r"\.diff(_b)?$": "full difference", "vera_lambda": "VeRA",
    "dora_scale": "DoRA", "lora_magnitude_vector": "DoRA", "lora_E": "AdaLoRA",
    "lora_embedding_": "LoRA of an embedding", "modules_to_save": "LoRA with retrained layers (modules_to_save)",
}  # fmt: skip


class Part(NamedTuple):
    """A file's LoRA for one network."""

    file: Path
    arrays: dict  # {key: down, up or alpha}, not yet read
    options: dict  # PEFT's, such as lora_alpha


@dataclasses.dataclass(frozen=True)
class Update:
    """A LoRA as a function of base weights. Equal when alpha is, so equal LoRAs have one pytree structure."""

    alpha: float | None = None  # None is the rank r: the update is down @ up

    def scale_of_rank(self, rank: int) -> float:
        """alpha / r."""
        return 1.0 if self.alpha is None else self.alpha / rank

    def __call__(self, params, base, scale=1.0):
        """The base weights plus scale * alpha / r * down @ up in each adapted kernel, in the kernel's dtype.

        Raises ValueError if the base lacks an adapted kernel or has another shape there.
        """
        weights = flax.traverse_util.flatten_dict(base)
        for layer, (down, up) in factors(params).items():
            path, shape = (*layer, "kernel"), (*down.shape[:-1], up.shape[-1])
            if path not in weights or weights[path].shape != shape:
                theirs = f"the network's is {weights[path].shape}" if path in weights else "the network has none"
                raise ValueError(f"this LoRA is for another network: its {layer_name(layer)} is {shape}, {theirs}")
            # in float32 and rounded once: as a merged network with float32 weights computes in bfloat16
            update = scale * self.scale_of_rank(up.shape[-2]) * jnp.matmul(down, up, precision="highest")
            weights[path] = (weights[path] + update).astype(weights[path].dtype)
        return flax.traverse_util.unflatten_dict(weights)


def adapt(net, lora: Net, scale=1.0):
    """The net with a LoRA's update added to its weights; a Denoiser remains a Denoiser.

    Inside jit the sum is computed once, however often the result is called, and freed when no longer needed. Outside
    jit it is a second network in memory.
    """
    return net.replace(params=lora(net.params, scale))


def merge_if_lora(base, net):
    """adapt(base, net) if the net is a LoRA, else the net."""
    return adapt(base, net) if isinstance(net.apply, Update) else net


def make_lora(net, key, rank: int, alpha: float | None = None, targets: tuple[str, ...] = ATTENTION) -> Net:
    """A new LoRA for a net (Denoiser, branch, text encoder) without effect yet: lora(net.params) = net.params.

    As in PEFT, down is initialised to U(+-1/sqrt(fan_in)) and up to zero; alpha None is the rank. targets are ends of
    layer names, PyTorch's ("to_out.0") or ours ("to_out_0"). A k x k convolution gets a k x k down and a 1 x 1 up.
    Raises ValueError for a target that matches no layer and for a rank above a layer's full rank.
    """
    kernels = {layer: x.shape for layer, x in adaptable_kernels(net.params).items()}
    layers = sorted(matching_layers(kernels, targets))
    full = {layer: min(np.prod(kernels[layer][:-1]), kernels[layer][-1]) for layer in layers}
    if low := [f"{layer_name(layer)} ({full[layer]})" for layer in layers if not 0 < rank <= full[layer]]:
        raise ValueError(f"rank {rank} is not between 1 and the full rank of {abbreviate(low)}")
    shapes = [(*kernels[layer][:-1], rank) for layer in layers]
    ends = np.cumsum([np.prod(shape) for shape in shapes])
    uniform = jnp.split(jax.random.uniform(key, (ends[-1],), minval=-1.0), ends[:-1])  # one program, not hundreds
    params = {}
    for layer, shape, x in zip(layers, shapes, uniform, strict=True):
        params[*layer, "down"] = x.reshape(shape) / np.sqrt(np.prod(shape[:-1]), dtype=np.float32)
        params[*layer, "up"] = jnp.zeros((*(1,) * (len(shape) - 2), rank, kernels[layer][-1]))
    return Net(flax.traverse_util.unflatten_dict(params), Update(alpha))


def make_lora_of(net, layers: str, key, rank: int, alpha: float) -> Net:
    """`make_lora` for those of LAYERS[layers] that the net has; ValueError if it has none."""
    return make_lora(net, key, rank, alpha, present_targets(net, LAYERS[layers]))


def of_difference(base, net, rank: int) -> Net:
    """The LoRA of at most this rank with which base comes nearest to net: the truncated SVD of each kernel's change.

    Biases, norms and embeddings stay base's, and kernels that are equal get no update. Raises ValueError for a net with
    other layers than base, and for a rank below 1.
    """
    before, after = adaptable_kernels(base.params), adaptable_kernels(net.params)
    shapes = [{layer: x.shape for layer, x in kernels.items()} for kernels in (before, after)]
    if other := sorted(layer_name(layer) for layer, _ in shapes[0].items() ^ shapes[1].items()):
        raise ValueError(f"no LoRA of one network is the other: {abbreviate([*dict.fromkeys(other)])} differ in shape")
    if rank < 1:
        raise ValueError(f"a LoRA's rank is at least 1, not {rank}")
    params = {}
    for layer, kernel in progress.each("decomposing", after.items()):
        change = np.asarray(kernel, np.float32) - np.asarray(before[layer], np.float32)
        if change.any():
            u, s, v = np.linalg.svd(change.reshape(-1, change.shape[-1]), full_matrices=False)
            root, r = np.sqrt(s[:rank]), min(rank, len(s))
            params[*layer, "down"] = (u[:, :rank] * root).reshape(*change.shape[:-1], r)
            params[*layer, "up"] = (root[:, None] * v[:rank]).reshape(*(1,) * (change.ndim - 2), r, change.shape[-1])
    return Net(flax.traverse_util.unflatten_dict(params), Update())


def factors(params) -> dict:
    """{layer: (down, up)} of a LoRA's parameters."""
    flat = flax.traverse_util.flatten_dict(params)
    return {path[:-1]: (flat[path], flat[*path[:-1], "up"]) for path in flat if path[-1] == "down"}


def adaptable_kernels(params) -> dict:
    """{layer: kernel} of a network's linear layers and convolutions."""
    flat = flax.traverse_util.flatten_dict(params)
    return {path[:-1]: x for path, x in flat.items() if path[-1] == "kernel" and x.ndim in (2, 4)}


def present_targets(net, targets) -> tuple[str, ...]:
    """The targets that match some layer's name; ValueError if none does."""
    names = [f".{layer_name(layer)}" for layer in adaptable_kernels(net.params)]
    found = tuple(t for t in targets if any(name.endswith(f".{t}") for name in names))
    if not found:
        raise ValueError(f"this network has no layers for a LoRA of {', '.join(targets)}")
    return found


def layer_name(layer: tuple[str, ...]) -> str:
    """PyTorch's name of the layer at a Flax path."""
    return torch_name((*layer, "kernel")).removesuffix(".weight")


def matching_layers(layers, targets) -> set:
    """Layers whose names end in a target, matched at dots as in PEFT; ValueError for a target without a match."""
    names, found = {layer: layer_name(layer) for layer in layers}, set()
    if not targets:
        raise ValueError("no targets: name the layers that a LoRA is for, such as to_q")
    for target in (layer_name((target,)) for target in targets):
        hits = {layer for layer, name in names.items() if f".{name}".endswith(f".{target}")}
        if not hits:
            ends = {re.search(r"[a-z_]\w*(\.\d+)?$", name)[0] for name in names.values()}
            nearest = difflib.get_close_matches(target, sorted(ends), 1, cutoff=0.0)
            raise ValueError(f"no layer's name ends in the LoRA target {target!r}; the nearest one is {nearest[0]!r}")
        found |= hits
    return found


def read_lora(path, bases: dict) -> dict[str, Net]:
    """Load the LoRAs of a file, or of the folder that holds it, per network: {"unet": Net}.

    bases maps "unet", "text_encoder", "text_encoder_2" to the weights (or shapes) of the base network, or to None to
    skip that network's part of the file. Supports the names of diffusers (lora.down, processor.to_q_lora), of PEFT
    (lora_A; adapter_model.safetensors or .bin beside adapter_config.json, also in subfolders named after the networks)
    and of kohya's trainer (lora_unet_..., with block names of diffusers or of LDM, as for SDXL). up is multiplied by
    alpha / r or, for rsLoRA, alpha / sqrt(r), from the file's alpha tensors or PEFT's options, so alpha is None; ranks
    may differ. Raises ValueError naming the keys that match no layer, have a wrong shape or belong to another adapter
    (LoHa, DoRA ...), and the options that a plain LoRA does not have.
    """
    parts = read_parts(path)
    if missing := sorted({part for part, base in bases.items() if base is not None} - {*parts}):
        raise ValueError(f"{path} holds nothing for {', '.join(missing)}, only for {', '.join(sorted(parts))}")
    if extra := sorted({*parts} - {*bases}):
        raise ValueError(f"{path} also adapts {', '.join(extra)}: pass its weights too, or None to skip it")
    wanted = {part: adaptable_kernels(base) for part, base in bases.items() if base is not None}
    return {part: Net(read_part(parts[part], part, kernels), Update()) for part, kernels in wanted.items()}


def read_lora_for(path, nets: dict) -> dict[str, Net]:
    """`read_lora` for those of a pipeline's nets, by subfolder name, that the file adapts."""
    return read_lora(path, {part: nets[part].params if part in nets else None for part in read_parts(path)})


def merge(path, nets: dict, scale: float = 1.0) -> dict:
    """A pipeline's nets, keys "unet", "text_encoder", "text_encoder_2", with scale times a LoRA file merged in.

    Nets that the file does not adapt are unchanged. Raises ValueError as `read_lora` does.
    """
    loras = read_lora_for(path, nets)
    add = jax.jit(lambda net, lora: adapt(net, lora, scale))
    return nets | {part: add(nets[part], lora) for part, lora in loras.items()}


def read_parts(path) -> dict[str, Part]:
    """The parts of a LoRA, at a path or embedded, by network; nothing but headers is read."""
    parts = {}
    for file in lora_files(folders.shipped(path) or io.local(path)):
        arrays = bare_names(files.read(file).tensors, file)
        refuse_other_kinds(arrays, file)
        owners = {key: part_of(key, file) for key in arrays}
        published = any(key.startswith(peft.PREFIX) for key in arrays) or file.name in peft.FILES
        for part in {*owners.values()}:
            own = {key: x for key, x in arrays.items() if owners[key] == part}
            prefix = f"{part}." if any(key.startswith(f"{part}.") for key in own) else ""
            options = peft.beside(file) if published else peft.header(file, prefix)
            parts[part] = Part(file, own, options)
    return parts


def lora_files(path: Path) -> list[Path]:
    """The weight file at a path or in the folder there, or those in PEFT's folders; ValueError if there is none."""
    if path.is_dir():
        names = LORA_FILE, *peft.FILES
        folders = [path, *(path / part for part in PREFIXES)]
        found = [next((f / name for name in names if (f / name).is_file()), None) for f in folders]
        found = found[:1] if found[0] else [file for file in found if file]
        loose = files.choose(p.name for p in path.iterdir())
        return found or lora_files(path / (loose or LORA_FILE))
    if not path.is_file():
        raise ValueError(f"{path} is missing: expected a LoRA as a safetensors file, or {' or '.join(peft.FILES)}")
    return [path]


def refuse_other_kinds(arrays, file) -> None:
    """Raise ValueError for adapters that are not a plain down @ up."""
    for key in arrays:
        for pattern, kind in OTHER_KINDS.items():
            if re.search(pattern, key):
                raise ValueError(f"{file} is a {kind} ({key}), not a plain LoRA: merge it into its model and load that")


def part_of(key: str, file: Path) -> str:
    """The network that a file's key belongs to: by its prefix, the folder's name or, without these, the layer's."""
    if part := next((part for part, prefixes in PREFIXES.items() if key.startswith(prefixes)), None):
        return part
    if file.parent.name in PREFIXES:
        return file.parent.name
    return "text_encoder" if TEXT_ENCODER.match(key) else "unet"


def read_part(own: Part, part: str, kernels: dict) -> dict:
    """One network's LoRA as a nested dict; ValueError for any name or shape that does not match its kernels."""
    names, found, unknown, file = file_names(part, kernels), {}, [], own.file
    for key, x in own.arrays.items():
        match = KEY.fullmatch(key.replace(peft.PREFIX, ""))
        layer = names.get(match[1]) if match else None
        if layer is None:
            unknown.append(key)
            continue
        factor = {"A": "down", "B": "up"}.get(match[2], match[2] or match[3])
        if factor in found.setdefault(layer, {}):
            raise ValueError(f"{file} holds {factor} of {layer_name(layer)} twice, once as {key}")
        found[layer][factor] = x
    if unknown:
        raise ValueError(f"{file} has {abbreviate(sorted(unknown))}, which this {part} has no place for")
    flat = {}
    for layer, given in found.items():
        if not {"down", "up"} <= {*given}:
            raise ValueError(f"{file} has only {' and '.join(sorted(given))} of {layer_name(layer)}: it is incomplete")
        down, up = (from_torch(("kernel",), np.asarray(given[name], np.float32)) for name in ("down", "up"))
        shape, rank = kernels[layer].shape, down.shape[-1]
        if (down.shape, up.shape) != ((*shape[:-1], rank), (*(1,) * (len(shape) - 2), rank, shape[-1])):
            raise ValueError(
                f"{file} is for another network: {layer_name(layer)} has down {down.shape} and up {up.shape} "
                f"(channels-last), its kernel is {shape}"
            )
        scale = peft.scale(own.options, layer_name(layer), rank, file)
        scale = np.asarray(given["alpha"]).item() / rank if "alpha" in given else scale
        flat |= {(*layer, "down"): down, (*layer, "up"): up * scale}
    return unflatten(flat)


def file_names(part: str, layers) -> dict:
    """{name: layer} for every spelling of a layer in files, generated from our names so that none is ambiguous."""
    dotted, *kohya = PREFIXES[part]
    ours = {layer_name(layer): layer for layer in layers}
    ldm, names = unet_names(ours), {}
    for name, layer in ours.items():
        processor = re.sub(r"\.(to_q|to_k|to_v|to_out)(\.0)?$", r".processor.\1", name)
        bare = {name, processor, name.removeprefix("text_model.")}  # transformers 5 leaves that out
        spellings = bare | {dotted + n for n in bare}
        spellings |= {prefix + n.replace(".", "_") for prefix in kohya for n in (name, ldm[name])}
        names |= dict.fromkeys(spellings, layer)
    return names


def save_lora(folder, loras: dict[str, Net], dtype=np.float16) -> Path:
    """Write LoRAs for load_lora_weights(folder) of diffusers' pipelines; returns the file.

    loras are {"unet": lora} and so on, as from `read_lora`. The file has no alpha: lora_B is multiplied by alpha / r.
    """
    tensors = {}
    for part, layer, down, up, scale in every_layer(loras):
        name = PREFIXES[part][0] + layer
        tensors[f"{name}.lora_A.weight"] = torch_kernel(down, dtype)
        tensors[f"{name}.lora_B.weight"] = torch_kernel(np.asarray(up, np.float32) * scale, dtype)
    return save_tensors(Path(folder) / LORA_FILE, tensors)


def save_kohya(folder, loras: dict[str, Net], dtype=np.float16) -> Path:
    """Write LoRAs under the names of kohya's trainer, lora_unet_..., with alpha; returns the file.

    loras are as in `save_lora`. ComfyUI and A1111 read these names, as do diffusers and `read_lora`.
    """
    tensors = {}
    for part, layer, down, up, scale in every_layer(loras):
        name = PREFIXES[part][1] + layer.replace(".", "_")
        tensors[f"{name}.lora_down.weight"] = torch_kernel(down, dtype)
        tensors[f"{name}.lora_up.weight"] = torch_kernel(up, dtype)
        tensors[f"{name}.alpha"] = np.array(scale * up.shape[-2], np.float32)
    return save_tensors(Path(folder) / KOHYA_FILE, tensors)


def every_layer(loras: dict[str, Net]):
    """(part, dotted name of a layer, down, up, alpha / r) of each layer of some LoRAs."""
    for part, lora in loras.items():
        for layer, (down, up) in factors(jax.device_get(lora.params)).items():
            yield part, layer_name(layer), down, up, lora.apply.scale_of_rank(up.shape[-2])


def torch_kernel(x, dtype) -> np.ndarray:
    """A factor as PyTorch lays it out."""
    return np.array(to_torch(("kernel",), np.asarray(x)), dtype, order="C")


def save_tensors(file: Path, tensors: dict[str, np.ndarray]) -> Path:
    """Write a safetensors file that PyTorch's programs read."""
    file.parent.mkdir(parents=True, exist_ok=True)
    safetensors.numpy.save_file(tensors, file, metadata={"format": "pt"})
    file.chmod(0o644)  # safetensors creates files that only their owner can read
    return file
