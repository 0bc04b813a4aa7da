"""The page in the browser: controls by task, pictures and sentences; with gradio, through client and browser."""

import contextlib
import dataclasses
import importlib.util
import os
import re
import runpy
import shutil
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest
import tiny
import yaml
from commands import ROOT
from PIL import Image

import cddistill
from cddistill import api, commands, config, demo, main, models, space, train
from cddistill.data import TASKS
from cddistill.methods import METHODS, UNTRAINED
from cddistill.models import adapter
from cddistill.models.schedulers import Sampling, write_scheduler

pytestmark = pytest.mark.usefixtures("one_device")
RED = Image.new("RGB", (9, 9), (200, 30, 30))


@pytest.fixture(scope="module")
def branched(tmp_path_factory):
    """A teacher's folder with a ControlNet of three channels, and one with four, for holes."""
    root, found = tmp_path_factory.mktemp("branched"), {}
    for channels in (3, 4):
        folder, net = tiny.save_teacher(root / str(channels))
        branch = tiny.disturbed(adapter.make_branch(net, jax.random.key(0), cond_channels=channels))
        models.save(folder, "controlnet", branch.params, branch.apply.module.to_config(), dtype=np.float32)
        found[channels] = folder
    return found


def model_for(task, branched):
    """A conditional model of 8 px in two steps, with a task by name."""
    model = api.load(branched[4 if task == "inpaint" else 3])
    return dataclasses.replace(model, task=TASKS[task](**({"scale": 2} if task == "sr" else {})), steps=2)


# ---- controls


@pytest.mark.parametrize(
    ("task", "takes", "shown", "kind", "text"),
    [
        ("none", {"text": True}, "prompt negative_prompt steps guidance seed", "", "prompt"),
        ("none", {"classes": 9}, "label steps guidance seed", "", ""),
        ("none", {}, "steps seed", "", ""),
        ("sr", {"image": True}, "image tiles steps image_guidance seed", "picture", ""),
        ("inpaint", {"image": True, "text": True}, "prompt negative_prompt image steps guidance image_guidance seed",
         "brush", "prompt"),
        ("edit", {"image": True, "text": True}, "prompt negative_prompt image steps guidance image_guidance seed",
         "picture", "instruction"),
        ("depth", {"image": True}, "image steps image_guidance seed", "file", ""),
        ("canny", {"image": True}, "image steps image_guidance seed", "picture", ""),
    ],
)  # fmt: skip
def test_controls_follow_from_the_task_and_the_method(task, takes, shown, kind, text):
    takes = {"text": False, "classes": 0, "image": False} | takes
    found = demo.controls(TASKS[task](), UNTRAINED(guidance=3.0), 64, (1, 2), **takes)
    assert found.shown == tuple(shown.split())
    assert (found.image, found.text, found.slider) == (kind, text, task == "sr")
    assert found.guidance == (3.0 if "guidance" in shown.split() else None)
    of_dmd2 = demo.controls(TASKS[task](), METHODS["dmd2"](), 64, (1,), **takes)
    assert not {"guidance", "negative_prompt", "image_guidance"} & {*of_dmd2.shown}


def test_notes_and_suffixes_are_those_of_the_task():
    found = demo.controls(TASKS["depth"](), METHODS["dmd2"](), 64, (1,), False, 0, True)
    assert ".npy" in found.suffixes
    assert "64 x 64" in found.note
    assert demo.controls(None, UNTRAINED(), 64, (1,), False, 0, True).image_label == "condition"


def test_only_steps_that_a_student_allows_are_offered(teacher, tmp_path):
    model = api.load(teacher)
    assert demo.steps_of(model) == (1, 2, 4, 50)
    student = lambda method: dataclasses.replace(model, student=model.student._replace(method=method), steps=1)
    assert demo.steps_of(student(METHODS["dmd2"](student_timesteps=(999, 499)))) == (1, 2)
    assert demo.steps_of(student(METHODS["gd"](first_steps=8, halvings=2))) == (2, 4)
    assert demo.steps_of(student(METHODS["diffusion2gan"]())) == (1,)
    shutil.copytree(teacher, tmp_path / "own")
    write_scheduler(tmp_path / "own", tiny.teacher().schedule, "v", timesteps=(999, 600, 300))
    assert demo.steps_of(api.load(tmp_path / "own")) == (3,)


# ---- pictures


def test_pictures_are_those_of_sample_and_calls_are_counted(teacher):
    page = demo.Page(dataclasses.replace(api.load(teacher), steps=4))
    cond, found, facts = page.generate({"label": 3, "steps": 2, "guidance": 3.0, "seed": 5})
    expected = cddistill.sample(page.model, label=3, steps=2, guidance=3.0, seed=5)[0]
    np.testing.assert_array_equal(found, np.rint(expected * 255))
    assert cond is None
    assert re.fullmatch(r"\d+ ms, 4 network calls, 2 steps, 8 x 8 px", facts)
    assert facts.endswith(
        page.generate({"label": 3, "steps": 2, "guidance": 1.0, "seed": 5})[2].partition(", ")[2]
    ) is (False)


def test_every_number_of_steps_is_compiled_once_before_the_first_picture(teacher, monkeypatch):
    page, calls = demo.Page(dataclasses.replace(api.load(teacher), steps=2)), []
    page.controls = dataclasses.replace(page.controls, steps=(1, 2))
    sample = api.sample_each
    monkeypatch.setattr(api, "sample_each", lambda *given: calls.append(given[3]) or sample(*given))
    page.warm_up()
    assert calls == [1, 1, 2, 2]
    page.generate({"label": 1, "steps": 2, "guidance": 1.0, "seed": 0})
    assert calls == [1, 1, 2, 2, 2]
    page.generate({"label": 1, "steps": 2, "guidance": 2.0, "seed": 0})
    assert calls == [1, 1, 2, 2, 2, 2, 2]


@pytest.mark.parametrize("task", ["sr", "inpaint", "edit", "depth", "canny"])
def test_conditions_of_every_task_are_read_as_in_sampling(task, branched):
    page = demo.Page(model_for(task, branched))
    image = demo.example_input(page.model)
    values = {"image": image, "steps": 2, "guidance": 1.0, "seed": 1}
    cond, found, _ = page.generate(values)
    expected = cddistill.sample(page.model, image=image, steps=2, seed=1)[0]
    np.testing.assert_array_equal(found, np.rint(expected * 255))
    assert cond.shape == (8, 8, 3)
    assert cond.dtype == np.uint8


def test_what_was_painted_is_the_hole():
    layer = Image.new("RGBA", (9, 9))
    layer.paste((128, 128, 128, 255), (0, 0, 9, 4))
    found = demo.holed({"background": RED, "layers": [layer], "composite": RED})
    alpha = np.asarray(found)[..., 3]
    assert (alpha[:4] == 0).all()
    assert (alpha[4:] == 255).all()
    np.testing.assert_array_equal(np.asarray(found)[..., :3], np.asarray(RED))


# ---- sentences


def test_wrong_inputs_are_the_sentences_of_sampling(branched, tmp_path):
    paint, enlarge = demo.Page(model_for("inpaint", branched)), demo.Page(model_for("sr", branched))
    own = {"steps": 2, "seed": 0}
    untouched = {"background": RED, "layers": [], "composite": RED}
    with pytest.raises(ValueError, match="the hole of the image is empty: white in the mask, or transparent"):
        paint.generate(own | {"image": untouched})
    with pytest.raises(ValueError, match="there is no image"):
        paint.generate(own | {"image": untouched | {"background": None}})
    RED.crop((0, 0, 3, 3)).save(tmp_path / "small.png")
    values = own | {"image": str(tmp_path / "small.png"), "tiles": True}
    with pytest.raises(ValueError, match="3 x 3 px, and a tile 4 x 4") as refused:
        enlarge.generate(values)
    assert demo.in_words(refused.value, values).startswith("small.png is 3 x 3 px")
    with pytest.raises(ValueError, match="generates from an image: pass one"):
        enlarge.generate(own | {"image": None})
    with pytest.raises(ValueError, match="steps are 1, 2, 4, not 3"):
        demo.Page(dataclasses.replace(enlarge.model, steps=4)).generate(own | {"image": RED, "steps": 3})
    with pytest.raises(ValueError, match="the seed is empty"):
        enlarge.generate({"image": RED, "steps": 2, "seed": None})


def test_an_empty_instruction_is_refused_by_sampling_too(branched):
    model = model_for("edit", branched)
    with pytest.raises(ValueError, match="the instruction is empty: say what to change"):
        cddistill.sample(model, image=RED, prompt=" ")
    with pytest.raises(ValueError, match="the instruction is empty: say what to change"):
        demo.Page(model).generate({"image": RED, "prompt": "", "steps": 2, "seed": 0})
    with pytest.raises(ValueError, match="no text encoder"):  # words get further
        cddistill.sample(model, image=RED, prompt="make it blue")


def test_only_expected_errors_become_sentences():
    assert demo.in_words(RuntimeError("RESOURCE_EXHAUSTED: out of memory"), {}).startswith("the device is full")
    assert demo.in_words(TypeError("a fault"), {}) is None


# ---- the command line


def test_a_page_needs_no_config_if_its_model_is_named(parsed, monkeypatch):
    served = []
    monkeypatch.setattr(demo, "check_installed", lambda: None)
    monkeypatch.setattr(demo, "opened", lambda *given: given)
    monkeypatch.setattr(demo, "serve", lambda *given: served.append(given))
    assert parsed("--mode=demo", "--model=pocket", "--port=8000") is None
    main.main(None)
    assert served == [((None, "pocket", None, "latest"), "127.0.0.1", 8000)]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--mode=demo"], "--config is missing"),
        (["--mode=demo", "--model=pocket", "--config.seed=1"], "--config is missing"),
        (["--config=configs/ccd_sr.py", "--model=pocket"], "--model is for --mode=demo, not train"),
        (["--config=configs/ccd_sr.py", "--mode=sample", "--space"], "--space is for --mode=export, not sample"),
    ],
)
def test_wrong_options_are_refused(arguments, said, parsed):
    with pytest.raises(SystemExit, match=re.escape(said)):
        parsed(*arguments)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--port=0"], "--port=0 must be at least 1 and at most 65535"),
        (["--port=many"], "--port must be a whole number"),
        (["--workdir=runs/x"], "--model and --workdir both name a model"),
        ([], "gradio is not installed: pip install 'cddistill[demo]'"),
    ],
)
def test_what_is_wrong_is_said_before_a_model_is_read(arguments, said, parsed, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, find=importlib.util.find_spec: (
        None if name == "gradio" else find(name)))  # fmt: skip
    monkeypatch.setattr(demo, "opened", lambda *given: 1 / 0)
    parsed("--mode=demo", "--model=pocket", *arguments)
    with pytest.raises(ValueError, match=re.escape(said)):
        main.main(None)


def test_a_config_gives_a_folder_its_task(branched):
    settings = config.defaults("dmd2")
    settings.data.update(task="sr", scale=2, size=8)
    assert demo.opened(settings, str(branched[3]), None).task == TASKS["sr"](scale=2)
    assert demo.opened(None, str(branched[3]), None).task is None


# ---- a Space


def test_the_app_opens_the_folder_that_it_lies_in_with_its_task(branched, tmp_path, monkeypatch):
    folder, served = shutil.copytree(branched[3], tmp_path / "student"), []
    task = TASKS["canny"](canny_sigma=(1.0, 1.0))
    space.write(folder, "canny", task, space.scales(UNTRAINED(guidance=2.0), Sampling(guidance=3.0)))
    monkeypatch.setattr(demo, "serve", served.append)
    runpy.run_path(str(folder / "app.py"))
    (model,) = served
    assert (model.task, model.student.method.guidance) == (task, 3.0)
    assert cddistill.sample(model, image=RED, steps=1).shape == (1, 8, 8, 3)
    assert f"cddistill[demo]=={cddistill.__version__}" in (folder / "requirements.txt").read_text()


def test_the_student_of_an_embedded_scale_keeps_it():
    assert space.scales(METHODS["lcm"](guidance=6.0), Sampling()) == {"guidance": 1.0, "embedded_guidance": 6.0}
    assert space.scales(UNTRAINED(guidance=2.0), None) == {"guidance": 2.0}
    with pytest.raises(ValueError, match="--space is for students that a scheduler of diffusers samples"):
        space.check(None, True)


def test_the_version_of_gradio_is_one():
    version = space.SDK["sdk_version"]
    assert f"gradio=={version}\n" in (ROOT / "constraints.txt").read_text()
    least, below = re.search(r'"gradio>=([\d.]+),<([\d.]+)"', (ROOT / "setup.py").read_text()).groups()
    number = lambda text: [int(x) for x in text.split(".")]
    assert number(least) <= number(version) < number(below)


def test_a_space_is_a_folder(tmp_path):
    with pytest.raises(ValueError, match=r"--space is for an export as a folder, and --output=.*onnx is a file"):
        commands.export_run({}, tmp_path / "run", f"{tmp_path}/x.onnx", space=True)


@pytest.fixture(scope="module")
def exported(branched, tmp_path_factory):
    """A run that enlarges in one step, run/, and its Space, out/."""
    c, folder = config.defaults("dmd2"), tmp_path_factory.mktemp("exported")
    c.update(teacher=str(branched[3]), controlnet=str(branched[3] / "controlnet"), steps=2, batch_size=8)
    c.update(sample_steps=(1,), report=False, checkpoint_every=2)
    c.data.update(size=8, task="sr", scale=2)
    c.method.update(adapter="controlnet", ratio=1)
    train.train(c, folder / "run")
    commands.export_run(c, folder / "run", str(folder / "out"), space=True)
    return folder


@pytest.mark.slow
def test_an_exported_space_draws_the_runs_pictures(exported, monkeypatch):
    served = []
    card = yaml.safe_load((exported / "out" / "README.md").read_text().split("---\n")[1])
    assert card["title"] == "dmd2 student"
    assert {key: card[key] for key in space.SDK} == space.SDK
    assert card["library_name"] == "diffusers"
    assert "python app.py" in (exported / "out" / "README.md").read_text()
    monkeypatch.setattr(demo, "serve", served.append)
    runpy.run_path(str(exported / "out" / "app.py"))
    assert demo.controls_of(served[0]).slider
    drawn = [cddistill.sample(m, label=1, image=RED, steps=1, seed=3) for m in (api.load(exported / "run"), *served)]
    np.testing.assert_allclose(*drawn, atol=2e-2)


@contextlib.contextmanager
def space_of(folder):
    """The address of a Space whose requirements are here: its app.py runs as on the hub, in another process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = os.environ | {"SYSTEM": "spaces", "SPACE_ID": "user/student", "PYTHONPATH": str(ROOT), "XLA_FLAGS": ""}
    env |= {"GRADIO_SERVER_NAME": "0.0.0.0", "GRADIO_SERVER_PORT": str(port)}
    command, how = [sys.executable, "-u", "app.py"], {"cwd": folder, "env": env, "text": True}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **how) as app:
        try:
            said = []
            while not (said and said[-1].startswith("open http")):
                said.append(app.stdout.readline())
                assert said[-1], "".join(said)
            yield f"http://127.0.0.1:{port}"
        finally:
            app.terminate()


@pytest.mark.slow
def test_a_space_that_is_started_draws_the_runs_pictures(exported, tmp_path):
    pytest.importorskip("gradio", reason="needs the extra demo")
    import gradio_client

    check = [sys.executable, "-m", "pip", "install", "--dry-run", "--no-index", "-r", "requirements.txt"]
    ran = subprocess.run(check, cwd=exported / "out", capture_output=True, text=True)
    assert not ran.returncode, ran.stderr
    assert "Would install" not in ran.stdout
    RED.save(tmp_path / "in.png")
    given = gradio_client.handle_file(str(tmp_path / "in.png"))
    with space_of(exported / "out") as address:
        client = gradio_client.Client(address, verbose=False, download_files=str(tmp_path))
        (_, after), facts = client.predict(1, given, False, 1, 1.0, 1.0, 3, api_name="/generate")
        with pytest.raises(Exception, match="generates from an image: pass one"):
            client.predict(1, None, False, 1, 1.0, 1.0, 3, api_name="/generate")
    expected = cddistill.sample(api.load(exported / "run"), label=1, image=RED, steps=1, seed=3)[0]
    np.testing.assert_allclose(np.asarray(Image.open(after)) / 255, expected, atol=2e-2)
    assert np.std(expected) > 0.03
    assert re.fullmatch(r"\d+ ms, 1 network call, 1 step, 8 x 8 px", facts)


# ---- with gradio


@pytest.fixture
def served():
    """served(model) is the page's app, on a free port."""
    pytest.importorskip("gradio", reason="needs the extra demo")
    apps = []

    def start(model):
        apps.append(demo.serve(model, "127.0.0.1", None, block=False))
        return apps[-1]

    yield start
    for app in apps:
        app.close(verbose=False)


@pytest.mark.slow
def test_a_taken_port_is_one_sentence(served, teacher):
    app = served(model := dataclasses.replace(api.load(teacher), steps=1))
    with pytest.raises(ValueError, match=rf"--port={app.server_port} of 127.0.0.1 cannot be opened: choose another"):
        demo.serve(model, "127.0.0.1", app.server_port, block=False)


@pytest.mark.slow
def test_the_client_gets_the_pictures_of_sample_and_its_sentences(served, branched, tmp_path):
    import gradio_client

    model = dataclasses.replace(model_for("sr", branched), steps=4)
    client = gradio_client.Client(served(model).local_url, verbose=False, download_files=str(tmp_path))
    RED.save(tmp_path / "in.png")
    given = gradio_client.handle_file(str(tmp_path / "in.png"))
    (before, after), facts = client.predict(3, given, False, 4, 1.0, 1.0, 7, api_name="/generate")
    expected = cddistill.sample(model, label=3, image=RED, steps=4, seed=7)[0]
    np.testing.assert_array_equal(np.asarray(Image.open(after)), np.rint(expected * 255))
    assert Image.open(before).size == (8, 8)
    assert re.fullmatch(r"\d+ ms, 4 network calls, 4 steps, 8 x 8 px", facts)
    for values, said in (((3, None, False, 4, 1.0, 1.0, 7), "generates from an image: pass one"),
                         ((3, given, False, 4, -1.0, 1.0, 7), "guidance=-1.0 must be at least 0")):  # fmt: skip
        with pytest.raises(Exception, match=re.escape(said)):
            client.predict(*values, api_name="/generate")


def opened(chromium, app):
    """(the page, addresses of all that it asked for)."""
    page, asked = chromium.new_page(viewport={"width": 1000, "height": 900}), []
    page.set_default_timeout(60_000)
    page.on("request", lambda request: asked.append(request.url))
    page.goto(app.local_url)
    page.get_by_role("button", name="Generate").wait_for()
    return page, asked


@pytest.mark.slow
def test_the_browser_shows_a_picture_and_a_sentence_and_asks_nobody_else(served, chromium, branched, tmp_path):
    app = served(model_for("sr", branched))
    page, asked = opened(chromium, app)
    page.get_by_role("button", name="Generate").click()
    page.get_by_text("generates from an image: pass one").wait_for()
    RED.save(tmp_path / "in.png")
    page.locator("input[type=file]").first.set_input_files(str(tmp_path / "in.png"))
    page.locator("img[src*='in.png']").first.wait_for()
    page.get_by_role("button", name="Generate").click()
    page.wait_for_function("[...document.querySelectorAll('textarea')].some(x => / ms, /.test(x.value))")
    assert page.locator("img[src*='image.png']").count() == 2
    assert {url for url in asked if not url.startswith((app.local_url, "data:", "blob:"))} == set()


@pytest.mark.slow
def test_the_brush_of_inpainting_makes_the_hole(served, chromium, branched, tmp_path):
    page, _ = opened(chromium, served(model_for("inpaint", branched)))
    RED.resize((256, 256)).save(tmp_path / "in.png")
    page.locator("input[type=file]").first.set_input_files(str(tmp_path / "in.png"))
    canvas = page.locator("canvas").first
    page.wait_for_timeout(2000)  # the editor draws
    page.get_by_role("button", name="Generate").click()
    page.get_by_text("the hole of the image is empty").wait_for()
    box = canvas.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x - 40, y)
    page.mouse.down()
    page.mouse.move(x + 40, y, steps=10)
    page.mouse.up()
    page.get_by_role("button", name="Generate").click()
    page.wait_for_function("[...document.querySelectorAll('textarea')].some(x => / ms, /.test(x.value))")
