"""A page in the browser to play with a model (--mode=demo, extra demo): what it asks for follows from task and method.

Pictures come from `api.sample_each`, as those of --mode=sample do. Only `build` and `serve` need gradio.
"""

import dataclasses
import functools
import html
import importlib.util
import os
import threading
import time
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from cddistill import api, commands, config, memory
from cddistill.data import TASKS
from cddistill.data.contracts import Task
from cddistill.evals import grids
from cddistill.method import Generator
from cddistill.methods import UNTRAINED

OFFERED = (1, 2, 4)  # numbers of steps, besides those of the model itself
LARGEST = "32mb"  # of an upload
FIELDS = ("prompt", "negative_prompt", "label", "image", "tiles", "steps", "guidance", "image_guidance", "seed")
POLICY = "default-src 'self' data: blob: 'unsafe-inline' 'unsafe-eval'"  # the browser loads nothing from elsewhere


@dataclasses.dataclass(frozen=True)
class Controls:
    """What a page asks for and how it shows the result."""

    steps: tuple[int, ...]
    text: str = ""  # label of the text; "": the model takes none
    classes: int = 0  # number of class labels; 0: none
    image: Literal["", "picture", "brush", "file"] = ""  # how the condition is given; "": there is none
    image_label: str = ""
    suffixes: tuple[str, ...] = ()  # of files, for "file"
    tiles: bool = False  # whether images may keep their own size
    guidance: float | None = None  # scale of the method; None: it samples without
    image_guidance: float | None = None
    slider: bool = False  # the condition and the result as one picture with a line to move; else side by side
    note: str = ""  # what happens to an input

    @property
    def shown(self) -> tuple[str, ...]:
        """FIELDS that the page has."""
        has = {
            "prompt": self.text, "negative_prompt": self.text and self.guidance is not None, "label": self.classes,
            "image": self.image, "tiles": self.tiles, "steps": True, "guidance": self.guidance is not None,
            "image_guidance": self.image_guidance is not None, "seed": True,
        }  # fmt: skip
        return tuple(name for name in FIELDS if has[name])


def controls(
    task: Task | None, method: Generator, size: int, steps: tuple[int, ...], text: bool, classes: int, image: bool
) -> Controls:
    """The controls for a task and a method at `size` px. text, classes and image say what the model takes; task is None
    for networks from a folder, whose condition is an image of the output's size."""
    own = task or TASKS["none"]()
    scale = getattr(method, "guidance", None) if text or classes else None
    return Controls(
        steps=steps,
        text="" if not text else "instruction" if isinstance(task, TASKS["edit"]) else "prompt",
        classes=classes,
        image=own.input_control if image else "",
        image_label=own.input_label if image else "",
        suffixes=own.input_suffixes if image else (),
        tiles=image and isinstance(task, TASKS["sr"]),
        guidance=scale,
        image_guidance=getattr(method, "image_guidance", None) if image else None,
        slider=image and isinstance(task, TASKS["sr"]),
        note=own.input_note(size) if image and own.input_control != "brush" else "",
    )


def controls_of(model: api.Model) -> Controls:
    """The controls of a loaded model."""
    text, module = model.pipeline.prompts is not None, model.student.frozen["teacher"].module
    classes = model.null_label if not text and getattr(module, "conditional", True) else 0
    image = api.takes_image(model)
    return controls(model.task, model.student.method, model.size, steps_of(model), text, classes, image)


def steps_of(model: api.Model) -> tuple[int, ...]:
    """Numbers of steps in which a model can be sampled: a folder with timesteps of its own only in their number."""
    method, schedule = model.student.method, model.student.frozen["teacher"].schedule
    if isinstance(method, UNTRAINED) and model.pipeline.sampling().timesteps:
        return (model.steps,)

    def allowed(steps):
        try:
            method.sampling(schedule, steps)
        except ValueError:
            return False
        return True

    return tuple(sorted(filter(allowed, {*OFFERED, model.steps})))


def opened(settings, name: str | None, workdir, checkpoint: str = "latest") -> api.Model:
    """The model of a page: what `api.load` takes by its name or, with a config, what --mode=sample would sample. With
    both, a folder with the task of the config."""
    if settings is None:
        return api.load(name or str(workdir), checkpoint=checkpoint)
    if not name:
        return api.open_model(settings, workdir, checkpoint)
    model, task = api.load(name, checkpoint=checkpoint), config.resolve(settings).data.task
    return dataclasses.replace(model, task=task) if api.takes_image(model) and model.task is None else model


def open_folder(folder, task: str, options: dict[str, Any], **scales: float) -> api.Model:
    """An exported student in its folder, with the task (and its options) and the guidance scales that it was trained
    for: for the app.py of an export."""
    model = api.load(folder)
    method = dataclasses.replace(model.student.method, **scales)
    known = TASKS[task](**{key: tuple(x) if isinstance(x, list) else x for key, x in options.items()})
    model = dataclasses.replace(model, student=model.student._replace(method=method))
    return dataclasses.replace(model, task=known) if api.takes_image(model) else model


# ---- one picture


class Page:
    """A model with its controls, and what was compiled for it."""

    def __init__(self, model: api.Model):
        self.model, self.controls, self.compiled = model, controls_of(model), set()

    def warm_up(self) -> None:
        """Compile every number of steps, with the method's own guidance."""
        c, example = self.controls, example_input(self.model)
        for steps in c.steps:
            given = {"prompt": "a", "label": 0, "image": example, "guidance": c.guidance, "seed": 0}
            given |= {"image_guidance": c.image_guidance, "steps": steps}
            self.generate({name: x for name, x in given.items() if name in c.shown})

    def generate(self, values: dict[str, Any]) -> tuple[np.ndarray | None, np.ndarray, str]:
        """(condition, result, facts): pictures uint8 [h, w, 3] and a line of text, from the values of the controls.

        Raises ValueError, in the words of --mode=sample, for inputs that it refuses.
        """
        given = {name: values[name] for name in ("prompt", "label") if values.get(name) is not None}
        if values.get("negative_prompt"):
            given["negative_prompt"] = values["negative_prompt"]
        if self.controls.image:
            if values.get("image") is None:
                raise ValueError(f"{self.model.name} generates from an image: pass one")
            given["image"] = holed(values["image"]) if self.controls.image == "brush" else values["image"]
        steps, tiles = int(values["steps"]), bool(values.get("tiles"))
        if values["seed"] is None:
            raise ValueError("the seed is empty: write a whole number, 0 say")
        if steps not in self.controls.steps:
            raise ValueError(f"steps are {', '.join(map(str, self.controls.steps))}, not {steps}: choose one of them")
        scales = values.get("guidance"), values.get("image_guidance")
        call = functools.partial(api.sample_each, self.model, given, 1, steps, *scales, values["seed"], tiles)
        cond = api.condition(self.model, given["image"], tiles) if "image" in given else None
        key = (steps, *scales, "negative_prompt" in given, cond.shape if tiles else None)
        if key not in self.compiled:
            call()
            self.compiled.add(key)
        start = time.perf_counter()
        (made,) = call()
        took = time.perf_counter() - start
        found = grids.to_uint8(made[None], "the picture")[0]
        return self.picture(cond), found, self.facts(steps, scales, took, found.shape, tiles)

    def picture(self, cond: np.ndarray | None) -> np.ndarray | None:
        """A condition [h, w, c] as an image, uint8 [h, w, 3]."""
        if cond is None:
            return None
        shown = (self.model.task or TASKS["none"]()).picture(cond[None])
        return grids.to_uint8(np.broadcast_to(shown, (*shown.shape[:3], 3)), "the condition")[0]

    def facts(self, steps: int, scales, took: float, shape, tiles: bool) -> str:
        """The line below a picture: time, network calls, size."""
        student = api.guided(api.guided(self.model.student, scales[0]), scales[1], "image_guidance")
        calls, where = student.method.nfe(steps), " for each tile" if tiles else ""
        plural = "s" if calls != 1 else ""
        size = f"{shape[1]} x {shape[0]} px"
        return f"{took * 1000:.0f} ms, {calls} network call{plural}{where}, {steps} step{'s'[: steps > 1]}, {size}"


def holed(value: dict[str, Any] | Image.Image) -> Image.Image:
    """The editor's picture, transparent where it was painted, as --mode=sample takes the hole of an inpainting."""
    if isinstance(value, Image.Image):
        return value
    if value.get("background") is None:
        raise ValueError("there is no image: pass one")
    image = value["background"].convert("RGBA")
    alpha = np.asarray(image.getchannel("A"))
    for layer in value.get("layers") or ():
        painted = layer.convert("RGBA").getchannel("A").resize(image.size, Image.Resampling.NEAREST)
        alpha = np.where(np.asarray(painted) >= 128, np.uint8(0), alpha)
    image.putalpha(Image.fromarray(alpha))
    return image


def example_input(model: api.Model) -> Image.Image:
    """A grey ramp as an input of any task, its left half a hole for inpainting."""
    size = model.size
    ramp = Image.fromarray(np.tile(np.linspace(0, 255, size).astype(np.uint8), (size, 1)))
    if isinstance(model.task, TASKS["inpaint"]):
        ramp = ramp.convert("RGB")
        ramp.putalpha(Image.fromarray(np.uint8(255) * (np.indices((size, size))[1] >= size // 2).astype(np.uint8)))
    return ramp


def in_words(error: Exception, values: dict[str, Any]) -> str | None:
    """An expected error as the sentence that the page shows; None for any other."""
    if isinstance(error, RuntimeError) and memory.EXHAUSTED in str(error):
        return "the device is full: choose a smaller image"
    if not isinstance(error, ValueError | FloatingPointError | OSError):
        return None
    said, path = " ".join(str(error).split()), values.get("image")
    return said.replace(path, Path(path).name) if isinstance(path, str) else said


# ---- the page


def check_installed() -> None:
    """ValueError if gradio is not there."""
    if importlib.util.find_spec("gradio") is None:
        raise ValueError("gradio is not installed: pip install 'cddistill[demo]' to open a page")


def serve(model: api.Model, host: str | None = None, port: int | None = None, block: bool = True):
    """Compile, and show the page at http://host:port until the process is interrupted; with block=False return the
    gradio app. Without a host or port gradio's variables hold (GRADIO_SERVER_NAME, GRADIO_SERVER_PORT), as in a Space.

    Raises ValueError if gradio is not installed, or the port is taken.
    """
    check_installed()
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported
    page = Page(model)
    commands.say(
        f"{model.name}: compiling {', '.join(map(str, page.controls.steps))} steps; minutes for large networks"
    )
    page.warm_up()
    blocks = build(page)
    try:
        blocks.queue(api_open=True).launch(
            share=False, server_name=host, server_port=port, quiet=True, prevent_thread_lock=True, ssr_mode=False,
            footer_links=[], enable_monitoring=False, max_file_size=LARGEST, app_kwargs={"middleware": [middleware()]},
        )  # fmt: skip
    except OSError as error:
        raise ValueError(f"--port={port} of {host} cannot be opened: choose another --port or --host") from error
    print(f"open {blocks.local_url}", flush=True)
    if block:
        threading.Event().wait()
    return blocks


def middleware():
    """A header that forbids the browser to load anything from elsewhere."""
    from starlette.middleware import Middleware

    class Policy:
        def __init__(self, app):
            self.app = app

        async def __call__(self, scope, receive, send):
            async def with_policy(message):
                if message["type"] == "http.response.start":
                    message["headers"] = [*message["headers"], (b"content-security-policy", POLICY.encode())]
                await send(message)

            await self.app(scope, receive, with_policy)

    return Middleware(Policy)


def build(page: Page):
    """The page as gradio's Blocks."""
    import gradio as gr

    c = page.controls

    def clicked(*entered):
        values = dict(zip(c.shown, entered, strict=True))
        try:
            cond, found, facts = page.generate(values)
        except Exception as error:
            if (said := in_words(error, values)) is None:
                raise
            raise gr.Error(html.escape(said, quote=False), duration=None, print_exception=False) from error
        shown = (cond, found) if c.slider else found
        return (shown, facts) if c.slider or cond is None else (shown, cond, facts)

    with gr.Blocks(title="cddistill", analytics_enabled=False) as blocks:
        gr.Markdown(f"## {html.escape(Path(page.model.name).name)}\n\n{html.escape(c.note)}")
        with gr.Row():
            with gr.Column():
                known = inputs_of(gr, c)
                inputs = [known[name]() for name in c.shown]
                button = gr.Button("Generate", variant="primary")
            with gr.Column():
                outputs = outputs_of(gr, c)
        button.click(clicked, inputs, outputs, api_name="generate")
    return blocks


def inputs_of(gr, c: Controls) -> dict[str, Any]:
    """{field: a function that makes its control}."""
    picture = functools.partial(gr.Image, label=c.image_label, type="filepath", image_mode=None, format="png")
    image = {
        "picture": picture,
        "file": functools.partial(gr.File, label=c.image_label, type="filepath", file_types=[*c.suffixes]),
        "brush": functools.partial(
            gr.ImageEditor, label=c.image_label, type="pil", image_mode="RGBA", format="png", layers=False,
            transforms=(), sources=("upload", "clipboard"), brush=gr.Brush(colors=["#808080"], color_mode="fixed"),
        ),
    }  # fmt: skip
    classes = [("none", c.classes), *((str(i), i) for i in range(c.classes))]
    return {
        "prompt": functools.partial(gr.Textbox, label=c.text),
        "negative_prompt": functools.partial(gr.Textbox, label="negative prompt"),
        "label": functools.partial(gr.Dropdown, classes, value=c.classes, label="class"),
        "image": image.get(c.image, picture),
        "tiles": functools.partial(gr.Checkbox, label="keep the size of the image, in tiles"),
        "steps": functools.partial(gr.Radio, [*c.steps], value=c.steps[-1], label="steps"),
        "guidance": functools.partial(gr.Number, value=c.guidance, label="guidance (a new scale compiles again)"),
        "image_guidance": functools.partial(gr.Number, value=c.image_guidance, label="guidance of the image"),
        "seed": functools.partial(gr.Number, value=0, precision=0, label="seed"),
    }


def outputs_of(gr, c: Controls) -> list:
    """The result, the condition as the network sees it, and the line of facts."""
    if c.slider:
        shown = [gr.ImageSlider(label="input (left), result (right)", format="png", type="numpy")]
    else:
        labels = ["result", "what the network sees"] if c.image else ["result"]
        shown = [
            gr.Image(label=label, format="png", interactive=False, buttons=["download", "fullscreen"])
            for label in labels
        ]
    return [*shown, gr.Textbox(label="time", interactive=False)]
