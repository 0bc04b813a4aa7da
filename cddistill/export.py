"""A trained student for other programs: a diffusers pipeline folder, StableHLO, or ONNX; a metric, for other runs."""

import functools
import importlib.util
import json
import pathlib
import shutil
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np

from cddistill import data, models
from cddistill.build import Parts, arrays, options, sampler
from cddistill.diffusion import DDPM
from cddistill.evals import grids
from cddistill.method import Generator, fresh
from cddistill.models import latent_lpips, lora, schedulers
from cddistill.step import TrainState, namespace

ROLES = {"backbone": "unet", "student": "unet", "branch": "controlnet"}  # net -> its folder in a pipeline
CARD = """---
library_name: diffusers
tags: [cddistill, {method}, few-step, distillation]
---
# {method} student of {teacher}, {steps} steps

Distilled with cddistill's method `{method}` from `{teacher}`; task `{task}` on `{source}`, {updates} updates of
{batch} images. The teacher's licence applies to its weights and to what was made of them.

## Sampling

{how}

## Scores

{scores}

## Configuration

```json
{config}
```
"""
IN_TORCH = """`scheduler/` holds the student's own times, {times}. With PyTorch diffusers:

```python
pipe = diffusers.DiffusionPipeline.from_pretrained(FOLDER)
pipe(..., guidance_scale={guidance}, timesteps=pipe.scheduler.config["_timesteps"])
```"""
HERE_ONLY = "No scheduler of diffusers samples this student; cddistill does, in {steps} steps."


def export(parts: Parts, state: TrainState, output: str, config: dict, scores: dict | None = None) -> str:
    """Write the averaged student to `output` and check it; returns what was found, in a sentence.

    `output` is a folder (diffusers), or a file *.stablehlo or *.onnx; of a metric, a file *.safetensors. Raises
    ValueError, before anything is written, for what the form cannot hold and in a run of several hosts.
    """
    if jax.process_count() > 1:
        raise ValueError(
            "--mode=export runs in one process: start it on one host without CDDISTILL_COORDINATOR (on a TPU pod with "
            "JAX_PLATFORMS=cpu); checkpoints are restored onto any number of devices"
        )
    path = pathlib.Path(output)
    if isinstance(parts.experiment.method, Generator) == (path.suffix == ".safetensors"):
        raise ValueError(f"--output={output}: a metric leaves as *.safetensors, a student in any other form")
    if path.suffix in FILES:
        return FILES[path.suffix](parts, state, path)
    return pipeline(parts, state, path, config, scores or {})


def pipeline(parts: Parts, state: TrainState, folder: pathlib.Path, config: dict, scores: dict) -> str:
    """A diffusers folder of the student's nets, the rest of the teacher's pipeline, scheduler and model card."""
    run, method, teacher = parts.experiment.run, parts.experiment.method, parts.frozen["teacher"]
    how = None
    if isinstance(teacher.schedule, DDPM):
        how = method.sampling(teacher.schedule, max(run.sample_steps))
        own = {"timesteps": how.timesteps, "sampler": how.sampler} if how else {}
        schedulers.write_scheduler(folder, teacher.schedule, teacher.predicts, **own)
    nets, source = state.ema or state.nets, models.resolve(run.teacher)
    changed = {ROLES[name]: lora.whole(teacher, nets[name]) for name in ROLES.keys() & nets.keys()}
    if run.lora:
        changed = {"unet": teacher} | changed | merged_encoders(source, run)
    kept = {p.name: p for p in source.iterdir() if p.is_dir() and p.name != "scheduler"}
    if run.controlnet:
        kept["controlnet"] = models.convert.inside(models.resolve(run.controlnet, "controlnet"), "controlnet")
    for name in kept.keys() - changed.keys():
        shutil.copytree(kept[name], folder / name, dirs_exist_ok=True)
    for name, net in changed.items():
        models.save(folder, name, net.params, net.module.to_config())
    index = source / "model_index.json"
    if index.is_file():
        write_index(folder, json.loads(index.read_text()), branch=(folder / "controlnet").is_dir())
    (folder / "README.md").write_text(card(config, scores, max(run.sample_steps), how))
    said = f"read back, images differ by at most {reread(parts, state, folder):.2g} of 1 (weights are float16)"
    if how is None or not all(importlib.util.find_spec(name) for name in ("torch", "diffusers")):
        return said
    return f"{said}; PyTorch diffusers' differ by at most {in_torch(parts, state, folder, how.guidance):.2g}"


def merged_encoders(source, run) -> dict:
    """Those of the teacher's text encoders that the run's LoRA is for, with it in them."""
    encoders = {p.name: models.load(source, p.name) for p in source.glob("text_encoder*") if p.is_dir()}
    merged = lora.merge(run.lora, encoders, run.lora_scale)
    return {name: net for name, net in merged.items() if net is not encoders[name]}


def write_index(folder, index: dict, branch: bool) -> None:
    """model_index.json: the teacher's, with the student's scheduler, and with a ControlNet if there is a branch."""
    written = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    index["scheduler"] = ["diffusers", written["_class_name"]]
    if branch:
        index["controlnet"] = ["diffusers", "ControlNetModel"]
        index["_class_name"] = index["_class_name"].replace("Pipeline", "ControlNetPipeline")
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")


def card(config: dict, scores: dict, steps: int, how) -> str:
    """README.md of an exported student."""
    sampling = HERE_ONLY.format(steps=steps)
    if how is not None:
        sampling = IN_TORCH.format(times=how.timesteps, guidance=how.guidance)
    names = list(dict.fromkeys(name for values in scores.values() for name in values["metrics"]))
    lines = [f"| | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for row, values in scores.items():
        cells = [f"{m[0]:.4g} ± {m[1]:.2g}" if (m := values["metrics"].get(name)) else "" for name in names]
        lines.append(f"| {row}, {values['n']} images | {' | '.join(cells)} |")
    return CARD.format(
        method=config["method"]["name"],
        teacher=config["teacher"],
        task=config["data"]["task"],
        source=config["data"]["source"],
        steps=steps,
        updates=config["steps"],
        batch=config["batch_size"],
        how=sampling,
        scores="\n".join(lines) if scores else "Not evaluated.",
        config=json.dumps(config, indent=2),
    )


def reread(parts: Parts, state: TrainState, folder) -> float:
    """The largest difference between images of the student and of what is read back from the folder."""
    run, nets = parts.experiment.run, dict(state.ema or state.nets)
    draw = functools.partial(sampler(parts), batch=few(parts), steps=max(run.sample_steps), seed=run.seed)
    before = draw(state)
    for name in ROLES.keys() & nets.keys():
        nets[name] = models.load(folder, ROLES[name], **options(run))
    return float(np.abs(before - draw(state.replace(nets=nets, ema=nets))).max())


def in_torch(parts: Parts, state: TrainState, folder, guidance: float) -> float:
    """The largest difference between what the student draws here and what PyTorch diffusers draws from the folder.

    Both start from the same noise. Latents, where the student makes them, are compared undecoded.
    """
    inputs, seed = noise_and(few(parts)), parts.experiment.run.seed
    ours = jax.jit(drawing(parts, state, decode=False))(inputs)
    anew = fresh(jax.random.key(seed), np.arange(len(ours)), ours.shape[1:])  # as `drawing` does
    return float(np.abs(ours - torch_draw(folder, inputs, guidance, anew)).max())


def torch_draw(folder, inputs, guidance: float, anew) -> np.ndarray:
    """x0 [b, h, w, c] that PyTorch diffusers makes of these inputs with an exported student's nets and scheduler.

    anew(i) is the noise [b, h, w, c] to add behind step i, where the scheduler adds any.
    """
    import diffusers
    import torch

    def part(cls, name):
        return cls.from_pretrained(str(folder), subfolder=name, torch_dtype=torch.float32).eval()

    def tensor(x):
        return torch.tensor(np.moveaxis(x, -1, 1) if x.ndim == 4 else x)

    unet = part(diffusers.UNet2DConditionModel, "unet")
    branch = part(diffusers.ControlNetModel, "controlnet") if (folder / "controlnet").is_dir() else None
    written = schedulers.read_json(folder / "scheduler" / "scheduler_config.json")
    scheduler = getattr(diffusers, written["_class_name"]).from_pretrained(str(folder), subfolder="scheduler")
    scheduler.set_timesteps(timesteps=list(written["_timesteps"]))

    def call(z, t, text):
        text, extra = {"encoder_hidden_states": None} | jax.tree.map(tensor, text), {}
        if branch is not None:
            down, mid = branch(z, t, controlnet_cond=tensor(inputs["cond"]), return_dict=False, **text)
            extra = {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
        elif "cond" in inputs:  # further input channels
            z = torch.cat([z, tensor(inputs["cond"])], 1)
        return unet(z, t, **text, **extra).sample

    z = tensor(inputs["noise"])
    with torch.no_grad():
        for i, t in enumerate(scheduler.timesteps):
            out = call(z, t, inputs["text"])
            if guidance != 1.0:
                null = call(z, t, inputs["null"])
                out = null + guidance * (out - null)
            stepped = scheduler.step(out, t, z)
            z = stepped.prev_sample
            if "denoised" in stepped and (after := scheduler.timesteps[i + 1 : i + 2]).numel():
                z = scheduler.add_noise(stepped.denoised, tensor(np.asarray(anew(i))), after)
    return np.moveaxis(z.numpy(), 1, -1)


def stablehlo(parts: Parts, state: TrainState, path: pathlib.Path) -> str:
    """One file with weights and program, for CPU, GPU and TPU and any batch: `jax.export.deserialize(...).call`."""
    inputs, draw = noise_and(few(parts)), jax.jit(drawing(parts, state))
    (b,) = jax.export.symbolic_shape("b")
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct((b, *x.shape[1:]), x.dtype), inputs)
    exported = jax.export.export(draw, platforms=("cpu", "cuda", "tpu"))(shapes)
    grids.replace(path, bytes(exported.serialize()))
    back = jax.export.deserialize(bytearray(path.read_bytes())).call(inputs)
    takes = ", ".join(f"{jax.tree_util.keystr(k)} {list(x.shape[1:])}" for k, x in jax.tree.leaves_with_path(inputs))
    return (
        f"read back, images differ by at most {np.abs(back - draw(inputs)).max():.2g} of 1; it takes one dict of "
        f"[b, ...] arrays: {takes}; JAX {jax.__version__} or newer reads it"
    )


def onnx(parts: Parts, state: TrainState, path: pathlib.Path) -> str:
    """One ONNX file for a batch of one; its inputs are the leaves of `noise_and`, in order of their names."""
    missing = [name for name in ("jax2onnx", "onnxruntime") if not importlib.util.find_spec(name)]
    if missing:
        raise ValueError(f"{' and '.join(missing)} not installed: pip install 'cddistill[onnx]' to export to ONNX")
    import jax2onnx
    import onnxruntime

    inputs = jax.tree.map(lambda x: x[:1], noise_and(few(parts)))
    draw = drawing(parts, state)
    leaves, tree = jax.tree.flatten(inputs)
    names = [".".join(str(k.key) for k in keys) for keys, _ in jax.tree.leaves_with_path(inputs)]
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in leaves]
    path.parent.mkdir(parents=True, exist_ok=True)
    jax2onnx.to_onnx(
        lambda *leaves: draw(jax.tree.unflatten(tree, leaves)),
        inputs=shapes,
        input_names=names,
        output_names=["image"],
        model_name=parts.experiment.method.__class__.__name__,
        return_mode="file",
        output_path=str(path),
    )
    quiet = onnxruntime.SessionOptions()
    quiet.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), quiet, providers=["CPUExecutionProvider"])
    taken = {i.name for i in session.get_inputs()}
    (image,) = session.run(None, {name: x for name, x in zip(names, leaves, strict=True) if name in taken})
    error = np.abs(image - jax.jit(draw)(inputs)).max()
    return f"onnxruntime's image differs by at most {error:.2g} of 1 (keep {path.name}.data beside it if there is one)"


def metric(parts: Parts, state: TrainState, path: pathlib.Path) -> str:
    """A metric as one file, which method.metric of Diffusion2GAN takes."""
    net = jax.device_get(parts.experiment.method.metric(SimpleNamespace(**state.nets)))
    back = latent_lpips.load(latent_lpips.save(net, path))
    same = jax.tree.all(jax.tree.map(np.array_equal, back.params, net.params))
    return f"LatentLPIPS of the family {back.apply.family}, read back, {'the same' if same else 'NOT the same'} weights"


FILES = {".stablehlo": stablehlo, ".onnx": onnx, ".safetensors": metric}  # all but these are folders


def drawing(parts: Parts, state: TrainState, decode: bool = True):
    """inputs -> images [b, h, w, c] in [0, 1] (or x0), a pure function with the averaged student inside it."""
    method, run = parts.experiment.method, parts.experiment.run
    state = jax.device_get(SimpleNamespace(step=0, ema=state.ema, nets=state.nets).__dict__)
    frozen = jax.device_get(parts.frozen)

    def draw(inputs):
        n = namespace(SimpleNamespace(step=0, ema=state["ema"]), frozen, state["nets"])
        noise = inputs["noise"]
        batch = inputs | {"index": jnp.arange(noise.shape[0])}
        x0 = method.sample(n, noise, batch, jax.random.key(run.seed), max(run.sample_steps))
        return n.autoencoder.images(x0) if decode else x0

    return draw


def few(parts: Parts):
    """Four validation examples."""
    return arrays(data.examples(parts.experiment.data, "validation", 4))


def noise_and(batch):
    """What a student draws from: unit noise [b, h, w, c], and the batch's text, null and cond."""
    noise = np.random.default_rng(0).standard_normal(batch["x0"].shape).astype(np.float32)
    return {"noise": noise} | {k: batch[k] for k in ("text", "null", "cond") if k in batch}
