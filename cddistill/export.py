"""A trained student for other programs: a diffusers pipeline folder, StableHLO or ONNX; or the file a method writes."""

import functools
import importlib.util
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from cddistill import data, generate, io, models, progress, space
from cddistill.build import Parts, initial, updates
from cddistill.checks import described
from cddistill.generate import Student
from cddistill.method import Generator
from cddistill.models import adapter, lora
from cddistill.models.fingerprint import leaf_sum
from cddistill.models.prompt import embed_ids
from cddistill.net import Net
from cddistill.step import TrainState


def export(
    parts: Parts, state: TrainState, output: str, config: dict, scores: dict | None = None, page: bool = False,
    rank: int = 0,
) -> str:  # fmt: skip
    """Write the averaged weights of what was trained to `output` and read it back; returns what was checked.

    `output` is a folder (diffusers), a file *.stablehlo or *.onnx, or what the method itself writes. With `page` the
    folder is also a Space of the Hugging Face hub; with a rank the student is first reduced to a LoRA of it. Raises
    ValueError, before anything is written, for a form that this method does not have, and if training changed none of
    the weights that would be exported. In a run of several hosts one calls this, with parts `build.of_one_host`.
    """
    path, method = Path(output), parts.experiment.method
    check_form(method, path)
    check_trained(parts, state)
    if path.suffix in PROGRAMS:
        return PROGRAMS[path.suffix](
            generate.student_of(parts, state), example_inputs(parts), parts.experiment.run, path
        )
    if isinstance(method, Generator):
        return pipeline_folder(parts, state, path, config, scores or {}, page, rank)
    config = parts.experiment.data
    batch = generate.encoded(parts, data.examples(config, data.shown(config), STATISTICS))
    return method.export_file(generate.student_of(parts, state).n(), batch, path)


def check_form(method, path: Path) -> None:
    """ValueError if this method is not exported in the form that a path names."""
    generates = isinstance(method, Generator)
    if (path.suffix in PROGRAMS and not generates) or (path.suffix == ".safetensors" and generates):
        raise ValueError(
            f"--output={path}: a generator is exported as a folder, *.stablehlo or *.onnx, a metric as *.safetensors"
        )


def check_trained(parts: Parts, state: TrainState) -> None:
    """ValueError if an exported net, or its average, is bit for bit what it was at step 0: usually the teacher."""
    exported = [*parts.experiment.method.exports().values()]
    if not exported:
        return
    sums = lambda nets: {name: jax.tree.map(leaf_sum, nets[name].params) for name in exported if name in nets}
    start = jax.jit(lambda frozen: sums(initial(parts.experiment, parts.batch, frozen).nets))(parts.frozen)
    equal = lambda name, now: jax.tree.all(jax.tree.map(np.array_equal, start[name], now))
    same = sorted({name for nets in (state.nets, state.ema) for name, now in sums(nets).items() if equal(name, now)})
    if same:
        raise ValueError(
            f"nothing to export: the weights of {' and '.join(same)} are those of step 0 (the teacher's); train first, "
            "with a learning rate above 0"
        )


def exported_nets(parts: Parts, state: TrainState) -> dict:
    """The trained nets by role, averages where there are any."""
    return {name: state.ema.get(name, net) for name, net in state.nets.items()}


# ---- a diffusers folder


def pipeline_folder(
    parts: Parts, state: TrainState, folder: Path, config: dict, scores: dict, page: bool = False, rank: int = 0
) -> str:
    """The trained parts, the rest of the teacher's pipeline, scheduler and model card."""
    run, method, teacher = parts.experiment.run, parts.experiment.method, parts.frozen["teacher"]
    how = described(method, teacher.schedule, run.sample_steps)
    if page and method.exports():
        space.check(how, in_diffusers(parts, how))
    nets = exported_nets(parts, state)
    trained = {part: nets[name] for part, name in method.exports().items()}
    images, reduced = generated(generate.student_of(parts, state), example_inputs(parts), run), ""
    if rank:
        trained, state = low_rank(parts, state, rank)
        whole, images = images, generated(generate.student_of(parts, state), example_inputs(parts), run)
        reduced = f"as a LoRA of rank {rank}, images differ by {np.abs(images - whole).mean():.2g} of 1 on average; "
    parts.pipeline.write(folder, teacher, trained, how, run.controlnet)
    io.write_atomic(folder / "README.md", card(parts, state, config, scores, how, page, rank))
    if page:
        task = parts.experiment.data.task
        space.write(folder, config["data"]["task"], task, space.scales(method, how))
    written = reread(parts, state, folder, images)
    found = f"{reduced}read back, images differ by at most {written:.2g} of 1 (weights are float16)"
    if not in_diffusers(parts, how) or not all(importlib.util.find_spec(name) for name in ("torch", "diffusers")):
        return found
    return f"{found}; PyTorch diffusers' differ by at most {torch_difference(parts, state, folder, how.guidance):.2g}"


def low_rank(parts: Parts, state: TrainState, rank: int) -> tuple[dict[str, Net], TrainState]:
    """({"unet": the LoRA of a rank that is nearest to a fully trained student}, the state with the two merged).

    Raises ValueError for students that are not a network of their teacher's shape.
    """
    exported, teacher = parts.experiment.method.exports(), parts.frozen["teacher"]
    net = exported_nets(parts, state).get(exported.get("unet"))
    if {*exported} != {"unet"} or isinstance(net.apply, lora.Update):
        raise ValueError(
            "--lora_rank is for students whose whole denoiser was trained, and nothing else: leave it out, or train one"
        )
    update = lora.of_difference(teacher, net, rank)
    nets = {exported["unet"]: lora.adapt(teacher, update)}
    return {"unet": update}, state.replace(nets=state.nets | nets, ema=state.ema | nets)


def card(parts: Parts, state: TrainState, config: dict, scores: dict, how, page: bool = False, rank: int = 0) -> str:
    """README.md of an exported student: what was trained for how many updates, how to sample it, and its scores."""
    import jinja2

    run, method, step = parts.experiment.run, parts.experiment.method, int(state.step)
    exported = {*method.exports().values()}
    scores = {row: x for row, x in scores.items() if x.get("step", run.steps) == step}  # not of another checkpoint
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("cddistill", "."), trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    return environment.get_template("card.md.j2").render(
        config=config,
        settings=json.dumps(config, indent=2),
        step=step,
        rank=rank,
        updates=max((updates(turn, step) for turn in method.turns().values() if exported & {*turn.moves}), default=0),
        steps=max(run.sample_steps),
        how=how,
        scores=scores,
        columns=list(dict.fromkeys(name for row in scores.values() for name in row["metrics"])),
        torch=torch_inputs(parts, how),
        page=space.front_matter(f"{config['method']['name']} student") if page else {},
    )


def torch_inputs(parts: Parts, how) -> dict | None:
    """What the card's example in PyTorch depends on; None for students that diffusers cannot sample."""
    method, batch, vae = parts.experiment.method, example_inputs(parts), parts.frozen["autoencoder"]
    labels, b = {*batch["text"]} == {"class_labels"}, len(batch["index"])
    branch = "controlnet" in method.exports() or bool(parts.experiment.run.controlnet)
    cond = adapter.condition("controlnet" if branch else "concat", batch)
    concat = method.requires().condition == "latent"
    latent = vae.params is not None and vae.encoder.module
    if not in_diffusers(parts, how) or (not labels and (concat or not parts.pipeline.has("text_encoder"))):
        return None
    if labels and getattr(latent, "latents_mean", None) is not None:
        return None
    shape = lambda x: f"{b}, {x.shape[3]}, {x.shape[1]}, {x.shape[2]}"
    return {
        "pipeline": not labels, "branch": branch, "labels": labels, "rows": b, "x0": shape(batch["x0"]),
        "scheduler": {"ddim": "DPMSolverMultistepScheduler", "lcm": "LCMScheduler"}[how.sampler],
        "null": int(batch["null"]["class_labels"][0]) if labels else None,
        "cond": shape(cond) if branch or concat else None, "vae": type(latent).__name__ if latent else None,
    }  # fmt: skip


def in_diffusers(parts: Parts, how) -> bool:
    """Whether diffusers has the student's networks and a scheduler for it."""
    nets = [parts.abstract.nets[name] for name in parts.experiment.method.exports().values()]
    return how is not None and not any(isinstance(net.module, adapter.MuBlendModel) for net in nets)


def reread(parts: Parts, state: TrainState, folder: Path, images: np.ndarray) -> float:
    """The largest difference between images of the student and of the nets that are read back from the folder."""
    nets, before = exported_nets(parts, state), generate.student_of(parts, state)
    for part, name in parts.experiment.method.exports().items():
        nets[name] = models.load(folder, part, **parts.pipeline.options)
    after = before._replace(nets=nets, ema={name: nets[name] for name in state.ema})
    return difference(images, after, example_inputs(parts), parts.experiment.run)


def torch_difference(parts: Parts, state: TrainState, folder: Path, guidance: float) -> float:
    """The largest difference between x0 generated here and by PyTorch diffusers from the folder, from one noise."""
    run, batch = parts.experiment.run, example_inputs(parts)
    steps = max(run.sample_steps)
    ours = generate.sample(generate.student_of(parts, state), batch, steps, run.seed, decode=False)
    noise, after = generate.seeded(run.seed, batch["index"], ours.shape[1:])
    if parts.experiment.method.requires().text_encoder:
        encoder = exported_nets(parts, state)["text_encoder"]
        batch |= {name: jax.device_get(embed_ids(encoder, batch[name]["input_ids"])) for name in ("text", "null")}
    theirs = torch_sample(folder, batch | {"noise": np.asarray(noise)}, guidance, after)
    return float(np.abs(ours - theirs).max())


def torch_sample(folder: Path, inputs, guidance: float, noise_of) -> np.ndarray:
    """x0 [b, h, w, c] that PyTorch diffusers generates from these inputs with an exported student's folder.

    noise_of(i) is the noise [b, h, w, c] to add after step i, where the scheduler adds any.
    """
    import torch

    unet, branch, scheduler = torch_parts(folder)

    def tensor(x):
        return torch.tensor(np.moveaxis(x, -1, 1) if x.ndim == 4 else x)

    def call(z, t, text):
        text, extra = {"encoder_hidden_states": None} | jax.tree.map(tensor, text), {}
        if branch is not None:
            down, mid = branch(z, t, controlnet_cond=tensor(inputs["cond"]), return_dict=False, **text)
            extra = {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
        elif "cond" in inputs:  # further input channels
            z = torch.cat([z, tensor(adapter.condition("concat", inputs))], 1)
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
                z = scheduler.add_noise(stepped.denoised, tensor(np.asarray(noise_of(i))), after)
    return np.moveaxis(z.numpy(), 1, -1)


def torch_parts(folder: Path):
    """(UNet, ControlNet or None, scheduler at the student's timesteps) of a folder, as PyTorch diffusers loads them."""
    import diffusers
    import torch

    def part(cls, name):
        return cls.from_pretrained(str(folder), subfolder=name, torch_dtype=torch.float32).eval()

    branch = part(diffusers.ControlNetModel, "controlnet") if (folder / "controlnet").is_dir() else None
    written = io.read_json(folder / "scheduler" / "scheduler_config.json")
    scheduler = getattr(diffusers, written["_class_name"]).from_pretrained(str(folder), subfolder="scheduler")
    scheduler.set_timesteps(timesteps=list(written["_timesteps"]))
    return part(diffusers.UNet2DConditionModel, "unet"), branch, scheduler


# ---- programs


def example_inputs(parts: Parts):
    """Four validation examples."""
    examples = data.examples(parts.experiment.data, "validation", 4)
    return generate.batch_of(parts, examples)


def program(student: Student, batch, run):
    """(weights, inputs, f): f(weights, inputs) -> images [b, h, w, c] in [0, 1], and what it takes, as NumPy arrays.

    Weights are {name: array}. Inputs are examples of text, null and the condition, and "noise" [b, k, h, w, c]: the
    initial noise and, for samplers that add noise between steps, what step 1, 2 ... adds. `generate.noises` gives those
    of a seed. Nothing random is inside: equal inputs give equal images.
    """
    steps = max(run.sample_steps)
    count = generate.noise_count(student, batch, steps)
    leaves, tree = jax.tree.flatten_with_path(jax.device_get(student[2:]))
    weights = {jax.tree_util.keystr(path, simple=True, separator="."): np.asarray(x) for path, x in leaves}

    def f(weights, inputs):
        host = Student(student.method, student.mesh, *jax.tree.unflatten(tree, weights.values()))
        noise = inputs["noise"]
        after = lambda i: jax.lax.dynamic_index_in_dim(noise, jnp.minimum(i + 1, count - 1), 1, keepdims=False)
        given = inputs | {"index": jnp.arange(noise.shape[0])}
        return generate.images(host, given, noise[:, 0], after, steps)

    noise = generate.noises(run.seed, batch["index"], batch["x0"].shape[1:], count)
    return weights, {k: v for k, v in batch.items() if k not in ("x0", "index")} | {"noise": np.asarray(noise)}, f


def stablehlo(student: Student, batch, run, path: Path) -> str:
    """A program for CPU, GPU, TPU and any batch size: `jax.export.deserialize(...).call`.

    Its weights are in it, or in a file beside it, <name>.safetensors, if they take more than MOST_INSIDE bytes.
    """
    weights, inputs, f = program(student, batch, run)
    beside = (
        path.with_name(f"{path.name}.safetensors") if sum(x.nbytes for x in weights.values()) > MOST_INSIDE else None
    )
    (b,) = jax.export.symbolic_shape("b")
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct((b, *x.shape[1:]), x.dtype), inputs)
    takes = ", ".join(f"{jax.tree_util.keystr(k)} {list(x.shape[1:])}" for k, x in jax.tree.leaves_with_path(inputs))
    takes = f"one dict of [b, ...] arrays: {takes}"
    if beside:
        shapes, takes = (jax.eval_shape(lambda: weights), shapes), f"the arrays of {beside.name} as a dict, and {takes}"
        path.parent.mkdir(parents=True, exist_ok=True)
        safetensors.numpy.save_file(weights, beside)
        weights = safetensors.numpy.load_file(beside)
    else:
        f, shapes = functools.partial(f, weights), (shapes,)
    exported = jax.export.export(jax.jit(f), platforms=("cpu", "cuda", "tpu"))(*shapes)
    io.write_atomic(path, bytes(exported.serialize()))
    back = jax.export.deserialize(bytearray(path.read_bytes())).call(*([weights] if beside else []), inputs)
    return (
        f"read back, images differ by at most {difference(back, student, batch, run):.2g} of 1 from --mode=sample's; "
        f"it takes {takes}; JAX {jax.__version__} or newer reads it; "
        "cddistill.generate.noises(seed, ...) makes the noise of a seed"
    )


def onnx(student: Student, batch, run, path: Path) -> str:
    """One ONNX file for a batch of one; its inputs are the leaves of the program's inputs, in order of their names."""
    check_onnx()
    batch = jax.tree.map(lambda x: x[:1], batch)
    weights, inputs, f = program(student, batch, run)
    leaves, tree = jax.tree.flatten(inputs)
    names = [".".join(str(k.key) for k in keys) for keys, _ in jax.tree.leaves_with_path(inputs)]
    call = lambda given: f(weights, jax.tree.unflatten(tree, [given[name] for name in names]))
    given = dict(zip(names, leaves, strict=True))
    with progress.counting("writing ONNX"):
        network = to_onnx(call, given, path, "image", "standard")
    image = network(given)
    return (
        f"onnxruntime's image differs by at most {difference(image, student, batch, run):.2g} of 1 from "
        f"--mode=sample's (keep {path.name}.data beside it if there is one)"
    )


def check_onnx() -> None:
    """ValueError if the packages that write and read ONNX files are not installed."""
    missing = [name for name in ("jax2onnx", "onnxruntime") if not importlib.util.find_spec(name)]
    if missing:
        raise ValueError(f"{' and '.join(missing)} not installed: pip install 'cddistill[onnx]' to export to ONNX")


def to_onnx(f, inputs: dict[str, np.ndarray], path: Path, output: str = "out", mode: str = "web"):
    """Write f({name: array}) -> array as an ONNX file for these shapes; returns the same function by onnxruntime.

    mode is jax2onnx's: "web" for one file, "standard" if large weights may lie beside it.
    """
    import jax2onnx
    import onnxruntime

    path.parent.mkdir(parents=True, exist_ok=True)
    jax2onnx.to_onnx(
        lambda *leaves: f(dict(zip(inputs, leaves, strict=True))),
        inputs=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in inputs.values()],
        input_names=[*inputs],
        output_names=[output],
        model_name=path.stem,
        return_mode="file",
        output_path=str(path),
        export_mode=mode,
    )
    quiet = onnxruntime.SessionOptions()
    quiet.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), quiet, providers=["CPUExecutionProvider"])
    used = {i.name for i in session.get_inputs()}
    return lambda given: session.run(None, {name: x for name, x in given.items() if name in used})[0]


def difference(images, student: Student, batch, run) -> float:
    """The largest difference from what --mode=sample generates."""
    return float(np.abs(images - generated(student, batch, run)).max())


def generated(student: Student, batch, run) -> np.ndarray:
    """What --mode=sample generates, [b, h, w, c] in [0, 1]. Raises ValueError if it is not finite."""
    images = generate.sample(student, batch, max(run.sample_steps), run.seed)
    if not np.isfinite(images).all():
        raise ValueError("images of this student are not finite (NaN or infinity): export another --checkpoint")
    return images


MOST_INSIDE = 2**30  # bytes of weights in a program's own file, whose format ends at 2 GB
STATISTICS = 512  # training examples for a method's own file
PROGRAMS = {".stablehlo": stablehlo, ".onnx": onnx}
FILES = (*PROGRAMS, ".safetensors")  # everything else is a folder, whatever dots its name has
