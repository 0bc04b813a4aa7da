"""A page to play with a student in a browser: its networks in ONNX's format, and JavaScript that runs them.

The page holds no schedule: manifest.json has the method's own sampler as coefficients, see `unrolled`. Its noise is
JAX's, written again in JavaScript, so a seed gives the picture that it gives in Python. Nothing is loaded from
elsewhere: onnxruntime-web is copied into the folder.
"""

import base64
import hashlib
import json
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np

from cddistill import data, export, generate, io, progress
from cddistill.build import Parts
from cddistill.evals import grids
from cddistill.generate import Student
from cddistill.models import tokenizer
from cddistill.models.prompt import embed_ids
from cddistill.net import Autoencoder, Net, in_float32
from cddistill.step import TrainState
from cddistill.unrolled import Unrolled, unroll, values

TEMPLATE = Path(__file__).parent / "web"
FILES = ("index.html", "page.mjs", "engine.mjs", "edges.mjs")
TOLERANCE = 2 / 255  # of the ONNX networks' picture from the student's, in any channel of any pixel
MOST_BYTES = 2**30  # of weights: a file of ONNX's ends at 2 GB, and a browser's memory at 4
EXAMPLES = 4  # pictures of the validation split that come with the page
KNOWN = {f"{text}.{name}" for text in ("text", "null") for name in ("encoder_hidden_states", "class_labels")}
KNOWN |= {"cond", "cond_latent"}  # what engine.mjs and the page's networks make

RUNTIME = "onnxruntime-web"
OPTION = "onnxruntime_web"  # of the command line
RUNTIME_VERSION = "1.30.0"
RUNTIME_DIGEST = "q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02Vb7QmRMDs1SigqR4CXAfKYQ=="  # SHA-512
RUNTIME_FILES = ("ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm")


class Program(NamedTuple):
    """A network of the page: f({name: array}) -> array, with an example of its inputs."""

    f: Callable[[dict[str, Any]], jax.Array]
    inputs: dict[str, np.ndarray]

    def described(self) -> dict[str, dict]:
        """Type and shape of each input."""
        return {name: {"type": x.dtype.name, "shape": list(x.shape)} for name, x in self.inputs.items()}


def write(parts: Parts, state: TrainState, folder: Path, name: str, runtime: str = "") -> str:
    """Write the page of a student to a folder; returns what was checked.

    runtime is where onnxruntime-web lies, see `copy_runtime`. Raises ValueError, before anything slow, for a student
    that was not trained or that no browser can run, and in the end if the page's networks draw another picture than
    the student by more than TOLERANCE.
    """
    export.check_trained(parts, state)
    copy_runtime(folder / RUNTIME, runtime)
    student = whole_in_float32(generate.student_of(parts, state))
    batch = jax.tree.map(lambda x: np.asarray(x[:1]), export.example_inputs(parts))
    unrolled = unroll(student, batch, sorted({*parts.experiment.run.sample_steps}))
    programs = programs_of(parts, student, batch, unrolled)
    written = progress.each("networks as ONNX", programs.items())
    networks = {key: export.to_onnx(*program, folder / f"{key}.onnx") for key, program in written}
    largest = check(student, batch, unrolled, networks, parts.experiment.run.seed)
    manifest = {
        "title": name,
        "shape": batch["x0"].shape[1:],
        "networks": {key: program.described() for key, program in programs.items()},
        "plans": unrolled.plans,
        "text": text_of(parts, batch, unrolled.sources, folder),
        "condition": condition_of(parts, batch, unrolled.sources),
        "examples": examples_of(parts, unrolled.sources, folder),
    }
    for file in FILES:
        shutil.copyfile(TEMPLATE / file, folder / file)
    io.write_atomic(folder / "manifest.json", json.dumps(manifest))
    return (
        f"its networks' pictures differ by at most {largest:.2g} of 1 from the student's in float32; "
        "run `python -m http.server` in it, and open the address that is printed"
    )


def whole_in_float32(student: Student) -> Student:
    """The student with weights and layers in float32, the only floats of a browser's WebAssembly."""

    def full(net):
        if isinstance(net, Autoencoder):
            return net.replace(encoder=in_float32(net.encoder), decoder=in_float32(net.decoder))
        return net.in_float32() if isinstance(net, Net) else net

    cast = lambda x: x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x
    groups = ({name: jax.tree.map(cast, full(net)) for name, net in group.items()} for group in student[2:])
    return Student(student.method, student.mesh, *groups)


# ---- networks


def programs_of(parts: Parts, student: Student, batch, unrolled: Unrolled) -> dict[str, Program]:
    """The page's networks by the names of their files. ValueError for inputs that a page has no controls for."""
    check_inputs(parts, batch, unrolled.sources)
    autoencoder, task = student.frozen["autoencoder"], parts.experiment.data.task
    programs = {"denoiser": Program(unrolled.network, unrolled.inputs)}
    if autoencoder.params is not None:
        programs["decoder"] = Program(lambda x: autoencoder.images(x["x0"]), {"x0": unrolled.inputs["z"]})
    if "cond_latent" in unrolled.sources:
        cond = {"cond": batch["cond"]}
        programs["encoder"] = Program(primitive(lambda x: task.encode(autoencoder, x["cond"]), cond), cond)
    if "text.encoder_hidden_states" in unrolled.sources:
        trained = student.method.requires().text_encoder
        encoder = student.n().text_encoder_ema if trained else parts.pipeline.prompts.nets[0].in_float32()
        ids = {"input_ids": parts.pipeline.prompts.tokenize([""])[0]}
        programs["text_encoder"] = Program(lambda x: embed_ids(encoder, x["input_ids"])["encoder_hidden_states"], ids)
    return programs


def primitive(f, inputs):
    """f in JAX's primitive operations: jax2onnx replaces jax.image.resize by an operation that picks other pixels."""
    traced = jax.extend.core.jaxpr_as_fun(jax.make_jaxpr(f)(inputs))
    return lambda given: traced(*jax.tree.leaves(given))[0]


def check_inputs(parts: Parts, batch, sources: set[str]) -> None:
    """ValueError for a student that is too large, or that takes what a page cannot give it."""
    prompts, (height, width) = parts.pipeline.prompts, batch["x0"].shape[1:3]
    texts = {source for source in sources if "class_labels" not in source and "cond" not in source}
    size = 4 * sum(x.size for x in jax.tree.leaves(parts.frozen["teacher"].params))  # in float32
    problem = {
        f"its denoiser has {size / 2**30:.1f} GiB of weights, and 1 is the most": size > MOST_BYTES,
        f"it takes {', '.join(sorted(sources - KNOWN))}, as students of SDXL do": not sources <= KNOWN,
        f"{parts.pipeline.name} has no text encoder for its prompts": bool(texts) and prompts is None,
        f"its conditions are {height} x {width}, and a page's are square": "cond" in sources and height != width,
    }
    for why, here in problem.items():
        if here:
            raise ValueError(f"this student cannot be put on a page ({why}): export a folder or *.onnx instead")


def check(student: Student, batch, unrolled: Unrolled, networks: dict[str, Callable], seed: int) -> float:
    """The largest difference between pictures of the page's networks and of the student, in [0, 1].

    Raises ValueError if it is larger than TOLERANCE, or if pictures are not finite.
    """
    given, differences = values(student, batch), []
    if "encoder" in networks:
        given |= {"cond_latent": networks["encoder"]({"cond": batch["cond"]})}
    decode = networks.get("decoder", lambda x: np.clip(x["x0"] * 0.5 + 0.5, 0, 1))
    for steps, plan in unrolled.plans.items():
        noise = np.asarray(generate.noises(seed, batch["index"], batch["x0"].shape[1:], plan["noises"]))
        image = decode({"x0": unrolled.run(steps, noise[0][:, None], given, networks["denoiser"])})
        differences.append(np.abs(image - generate.sample(student, batch, steps, seed, what="")).max())
    if not max(differences) <= TOLERANCE:  # NaN is not
        raise ValueError(
            f"the networks that were written draw another picture than the student: they differ by up to "
            f"{max(differences):.2g} of 1; export another --checkpoint, or another form"
        )
    return float(max(differences))


# ---- what the page shows


def text_of(parts: Parts, batch, sources: set[str], folder: Path) -> dict | None:
    """The control for text: {"kind": "prompt", "instruction": whether it is one}, with tokenizer.json, or {"kind":
    "label", "labels": n}, or None."""
    if "text.encoder_hidden_states" in sources:
        prompts = parts.pipeline.prompts
        tokens = tokenizer.described(prompts.tokenizers[0], prompts.tokenize([""])[0].shape[1])
        io.write_atomic(folder / "tokenizer.json", json.dumps(tokens))
        return {"kind": "prompt", "instruction": isinstance(parts.experiment.data.task, data.TASKS["edit"])}
    if "text.class_labels" in sources:
        return {"kind": "label", "labels": int(batch["null"]["class_labels"][0])}
    return None


def condition_of(parts: Parts, batch, sources: set[str]) -> dict | None:
    """The control for the condition, and how it is made of a picture; None for a student without one."""
    if not sources & {"cond", "cond_latent"}:
        return None
    size = batch["cond"].shape[1]
    return {"size": size} | parts.experiment.data.task.in_browser(size)


def examples_of(parts: Parts, sources: set[str], folder: Path) -> list[dict[str, str]]:
    """Pictures to start from, written to examples/, and texts: [{"image": "examples/0.png", "text": ...}]."""
    config = parts.experiment.data
    found = data.examples(config, "validation", EXAMPLES)
    texts = found.get("caption") if "text.encoder_hidden_states" in sources else None
    rows = [{"text": text} for text in texts] if texts else [{} for _ in found["x0"]]
    if not sources & {"cond", "cond_latent"}:
        return [row for row in rows if row]
    whole = config.task.input_is_target and "imageless" not in found
    pictures = generate.targets(parts, found) if whole else config.task.picture(found["cond"])
    for i, picture in enumerate(grids.to_uint8(pictures)):
        rows[i]["image"] = f"examples/{i}.png"
        grids.save_image(folder / rows[i]["image"], np.repeat(picture, 3 // picture.shape[-1], -1))
    return rows


# ---- onnxruntime-web


def copy_runtime(folder: Path, source: str = "") -> None:
    """Copy what a page needs of onnxruntime-web, and its licence.

    source is the tarball of RUNTIME_VERSION or the folder node_modules/onnxruntime-web; without one, npm downloads the
    tarball, or takes it from its cache. Raises ValueError for another version, and if there is no npm.
    """
    folder.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(source).expanduser() if source else packed(Path(scratch))
        package = place if place.is_dir() else unpacked(place, Path(scratch))
        version = io.read_json(package / "package.json", f"pass the folder of {RUNTIME}").get("version")
        if version != RUNTIME_VERSION:
            raise ValueError(f"{place} is {RUNTIME} {version}, and a page needs {RUNTIME_VERSION}: install that")
        for name in RUNTIME_FILES:
            shutil.copyfile(package / "dist" / name, folder / name)
    shutil.copyfile(TEMPLATE / f"LICENSE.{RUNTIME}", folder / "LICENSE")


def packed(folder: Path) -> Path:
    """The tarball, by npm. ValueError, with what to do, if there is no npm or it fails."""
    remedy = f"run `npm pack {RUNTIME}@{RUNTIME_VERSION}` where it works, and pass the file as --{OPTION}=FILE"
    npm = shutil.which("npm")
    if npm is None:
        raise ValueError(f"a page needs the npm package {RUNTIME}, and npm is not installed: install it, or {remedy}")
    command = [npm, "pack", f"{RUNTIME}@{RUNTIME_VERSION}", "--prefer-offline", "--pack-destination", str(folder)]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    found = [*folder.glob("*.tgz")]
    if ran.returncode or not found:
        why = next((line for line in ran.stderr.splitlines() if "npm error" in line), "no file").strip()
        raise ValueError(f"npm did not get {RUNTIME} {RUNTIME_VERSION} ({why}): {remedy}")
    return found[0]


def unpacked(tarball: Path, folder: Path) -> Path:
    """The files that are needed of a tarball whose bytes are known."""
    if not tarball.is_file():
        raise ValueError(f"--{OPTION}={tarball} does not exist: give the tarball, or its folder in node_modules/")
    if base64.b64encode(hashlib.sha512(tarball.read_bytes()).digest()).decode() != RUNTIME_DIGEST:
        raise ValueError(f"{tarball} is not {RUNTIME} {RUNTIME_VERSION} as npm has it: download it again")
    with tarfile.open(tarball) as archive:
        for name in ("package.json", *(f"dist/{name}" for name in RUNTIME_FILES)):
            archive.extract(f"package/{name}", folder, filter="data")
    return folder / "package"
