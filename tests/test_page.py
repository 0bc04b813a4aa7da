"""The page to play with: a sampler as sums, the folder, its JavaScript against Python and, slow, a browser."""

import contextlib
import dataclasses
import functools
import http.server
import json
import os
import shutil
import subprocess
import tarfile
import threading
import types

import jax
import numpy as np
import pytest
import tiny
from PIL import Image
from test_latent import CLIP, UNET, VAE

from cddistill import api, commands, config, data, generate, io, models, page, sampling, sharding, unrolled
from cddistill.data import TASKS, images
from cddistill.diffusion import DDPM
from cddistill.generate import Student
from cddistill.models import tokenizer
from cddistill.models.clip import CLIPTextModel
from cddistill.models.init import init_params_numpy, weight_shapes
from cddistill.models.schedulers import write_scheduler
from cddistill.models.vae import AutoencoderKL

pytestmark = pytest.mark.usefixtures("one_device")

RED = Image.new("RGB", (8, 8), (200, 30, 30))
POCKET = models.resolve("pocket") / "tokenizer"
PROMPTS = (
    *(
        "",
        "a red circle",
        "It's the 2nd CAT, isn't it?!",
        "naïve Ünïcödé \u0130stanbul ΣΑΣ",
        "汉字 😀 a\tb\n c",
        "x" * 40,
    ),
    *("<|endoftext|> ends", "don't 'll '' \u00a0\u0085 12,5 %", "word " * 100),
)


# --- a sampler as sums


def student(name, **changes):
    method = dataclasses.replace(tiny.VARIANTS[name], **changes)
    state = tiny.start(name)
    return Student(method, sharding.make_mesh(), tiny.frozen(), state.nets, state.nets)


def row():
    """The first example of a batch."""
    batch = tiny.make_batch()
    return {name: jax.tree.map(lambda x: x[:1], batch[name]) for name in (*generate.INPUTS[:4], "index")}


@pytest.mark.parametrize(
    ("name", "changes", "calls", "taken"),
    [
        ("finetune", {"guidance": 3.0}, 4, {"text.class_labels", "null.class_labels", "cond"}),
        pytest.param("dmd2", {}, 2, {"text.class_labels"}, marks=pytest.mark.slow),
        pytest.param("lcm", {}, 2, {"text.class_labels"}, marks=pytest.mark.slow),
    ],
)
def test_the_sums_are_the_sampler(name, changes, calls, taken):
    """DDIM with guidance and a branch; with noise after a step; with a boundary condition and embedded guidance."""
    steps = 2
    made, batch = student(name, **changes), row()
    found = unrolled.unroll(made, batch, (steps,))
    plan = json.loads(json.dumps(found.plans))[str(steps)]
    assert len(plan["calls"]) == calls
    assert plan["noises"] == (1 if name == "finetune" else 2)
    noise = np.asarray(generate.noises(3, batch["index"], batch["x0"].shape[1:], plan["noises"]))[0][:, None]
    x0 = found.run(steps, noise, unrolled.values(made, batch), jax.jit(found.network))
    expected = generate.sample(made, batch, steps, 3, decode=False)
    assert np.std(expected) > 0.2
    np.testing.assert_allclose(x0, expected, atol=1e-4)  # sums in another order
    assert found.sources == taken


class Clipping(types.SimpleNamespace):
    """A method whose sampler clips x0, as DDIMScheduler's default does."""

    def nfe(self, steps):
        return steps

    def requires(self):
        return types.SimpleNamespace(text_encoder=False)

    def sample(self, n, noise, batch, step_noise, steps):
        denoise = sampling.clipped(lambda z, t: n.teacher(z, t, batch["text"]), 1.0)
        return sampling.ddim(denoise, n.teacher.schedule, noise, sampling.timesteps(n.teacher.schedule, steps, 1.0))


def test_a_sampler_that_clips_is_refused():
    made = Student(Clipping(), sharding.make_mesh(), tiny.frozen(), {}, {})
    with pytest.raises(ValueError, match="does not only add and scale, .*: set clip_sample to false"):
        unrolled.unroll(made, row(), (2,))


# --- the folder


def package(folder, version=page.RUNTIME_VERSION):
    """A folder like node_modules/onnxruntime-web."""
    (folder / "dist").mkdir(parents=True)
    (folder / "package.json").write_text(json.dumps({"version": version}))
    for name in page.RUNTIME_FILES:
        (folder / "dist" / name).write_text(name)
    return folder


def denoiser(folder, classes):
    """A folder with a network of pixels that takes the condition as input channels, and so many classes."""
    given = tiny.UNET | {"in_channels": 6, "sample_size": 8, "num_class_embeds": classes + 1}
    net = models.init(given, 0, tiny.teacher().schedule, "v", False)
    models.save(folder, "unet", net.params, net.module.to_config(), dtype=np.float32)
    write_scheduler(folder, net.schedule, net.predicts)
    return folder


@pytest.fixture(scope="module")
def enlarger(tmp_path_factory):
    """For emoji."""
    return denoiser(tmp_path_factory.mktemp("enlarger"), 9)


@pytest.fixture(scope="module")
def modeller(tmp_path_factory):
    """For scenes, which have depth and 24 classes."""
    return denoiser(tmp_path_factory.mktemp("modeller"), 24)


def settings(folder, task="sr", size=8):
    c = config.defaults("pretrained")
    c.update(teacher=str(folder), sample_steps=(1, 2), batch_size=8)
    c.data.update(task=task, size=size)
    return c


def by_jax(f, inputs, path):
    """In the place of export.to_onnx, which takes minutes."""
    path.write_bytes(b"onnx")
    return jax.jit(f)


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(page.export, "to_onnx", by_jax)
    monkeypatch.setattr(page.export, "check_onnx", lambda: None)


@pytest.mark.usefixtures("quick")
def test_the_folder(enlarger, tmp_path, capsys):
    c, out = settings(enlarger), tmp_path / "demo"
    commands.export_page(c, tmp_path / "run", str(out), runtime=str(package(tmp_path / "npm")))
    said = capsys.readouterr().out
    assert float(said.split("at most ")[1].split()[0]) < 1e-4, said
    found = json.loads((out / "manifest.json").read_text())
    assert found["title"] == "run"
    assert found["shape"] == [8, 8, 3]
    assert found["condition"] == {"kind": "sr", "size": 8, "small": 2}
    assert found["text"] == {"kind": "label", "labels": 9}
    assert [*found["plans"]] == ["1", "2"]
    assert [call["t"] for call in found["plans"]["2"]["calls"]] == [999, 499]
    assert [*found["networks"]] == ["denoiser"]
    assert found["networks"]["denoiser"]["cond"] == {"type": "float32", "shape": [1, 8, 8, 3]}
    expected = [*page.FILES, "denoiser.onnx", "examples", "manifest.json", page.RUNTIME]
    assert sorted(x.name for x in out.iterdir()) == sorted(expected)
    assert sorted(x.name for x in (out / page.RUNTIME).iterdir()) == sorted([*page.RUNTIME_FILES, "LICENSE"])
    truth = data.examples(config.resolve(c).data, "validation", 4)["x0"] * 0.5 + 0.5
    pictures = [np.asarray(Image.open(out / x["image"])) for x in found["examples"]]
    np.testing.assert_allclose(np.stack(pictures) / 255, truth, atol=0.5 / 255 + 1e-6)
    for name in page.FILES:
        assert "//cdn" not in (text := (out / name).read_text())
        assert "https://" not in text, name


@pytest.mark.usefixtures("quick")
def test_networks_that_draw_another_picture_are_refused(enlarger, tmp_path, monkeypatch):
    wrong = lambda f, inputs, path: lambda given: f(given) * 1.5
    monkeypatch.setattr(page.export, "to_onnx", wrong)
    c, runtime = settings(enlarger), str(package(tmp_path / "npm"))
    c.sample_steps = (1,)
    with pytest.raises(ValueError, match=r"draw another picture than the student: they differ by up to 0\.\d+ of 1"):
        commands.export_page(c, tmp_path / "run", str(tmp_path / "demo"), runtime=runtime)
    assert not [*(tmp_path / "demo").iterdir()]


@pytest.mark.parametrize(
    ("size", "shape", "prompts", "sources", "why"),
    [
        (2**28 + 1, (8, 8), True, set(), "1.0 GiB of weights"),
        (9, (8, 8), True, {"text.added_cond_kwargs.text_embeds"}, "as students of SDXL do"),
        (9, (8, 8), False, {"text.encoder_hidden_states"}, "small has no text encoder for its prompts"),
        (9, (8, 16), True, {"cond"}, "its conditions are 8 x 16"),
    ],
)
def test_what_has_no_page(size, shape, prompts, sources, why):
    weights = types.SimpleNamespace(params=jax.ShapeDtypeStruct((size,), np.float16))
    pipeline = types.SimpleNamespace(name="small", prompts=prompts or None)
    parts, batch = (
        types.SimpleNamespace(frozen={"teacher": weights}, pipeline=pipeline),
        {"x0": np.zeros((1, *shape, 3))},
    )
    with pytest.raises(ValueError, match=f"this student cannot be put on a page .*{why}"):
        page.check_inputs.__wrapped__(parts, batch, sources)


# --- onnxruntime-web


def test_without_npm_it_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(page.shutil, "which", lambda name: None)
    with pytest.raises(ValueError, match=r"npm is not installed: .*`npm pack onnxruntime-web@.*--onnxruntime_web=FILE"):
        page.copy_runtime(tmp_path / "out")


def test_npm_that_fails_is_quoted(tmp_path, monkeypatch):
    npm = tmp_path / "npm"
    npm.write_text("#!/bin/sh\necho 'npm error code ENOTFOUND' >&2\nexit 1\n")
    npm.chmod(0o755)
    monkeypatch.setattr(page.shutil, "which", lambda name: str(npm))
    with pytest.raises(ValueError, match=r"\(npm error code ENOTFOUND\): run `npm pack"):
        page.copy_runtime(tmp_path / "out")


def test_another_package_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"is onnxruntime-web 1\.2\.3, and a page needs 1\.30\.0: install that"):
        page.copy_runtime(tmp_path / "a", str(package(tmp_path / "old", "1.2.3")))
    tarball = tmp_path / "x.tgz"
    with tarfile.open(tarball, "w:gz") as archive:
        archive.add(package(tmp_path / "package"), "package")
    with pytest.raises(ValueError, match="is not onnxruntime-web .* as npm has it: download it again"):
        page.copy_runtime(tmp_path / "b", str(tarball))
    with pytest.raises(ValueError, match="nothing does not exist: give the tarball"):
        page.copy_runtime(tmp_path / "c", str(tmp_path / "nothing"))


def test_a_page_is_no_file(enlarger, tmp_path):
    with pytest.raises(ValueError, match="--page is a folder, and --output=page.onnx names a file"):
        commands.export_page(settings(enlarger), tmp_path, "page.onnx")


# --- JavaScript against Python


def node(code, given):
    """The JSON that a program in JavaScript returns for `given`; e is engine.mjs."""
    if shutil.which("node") is None:
        pytest.skip("node is not installed")
    engine = (page.TEMPLATE / "engine.mjs").as_uri()
    program = f"import * as e from {json.dumps(engine)}; import {{readFileSync}} from 'node:fs';"
    program += f"const given = JSON.parse(readFileSync(0)); process.stdout.write(JSON.stringify((() => {{{code}}})()));"
    command = ["node", "--input-type=module", "-e", program]
    ran = subprocess.run(command, input=json.dumps(given), capture_output=True, text=True)
    assert not ran.returncode, ran.stderr
    return json.loads(ran.stdout)


def test_a_seed_has_the_noise_of_python():
    code = "return given.map((seed) => e.noises(seed, 240, 3).map((x) => [...x]))"
    seeds = [0, 7, 2**31 - 1]
    expected = [generate.noises(seed, np.arange(1), (8, 10, 3), 3)[0].reshape(3, -1) for seed in seeds]
    assert np.std(expected) > 0.9
    np.testing.assert_allclose(node(code, seeds), expected, atol=1e-5)  # XLA's erf_inv is in float32


def test_texts_have_the_tokens_of_python():
    ours = tokenizer.load(POCKET)
    code = "const encode = e.tokenizer(given.spec); return given.texts.map((text) => [...encode(text)])"
    found = node(code, {"spec": tokenizer.described(ours, 77), "texts": PROMPTS})
    assert found == ours(PROMPTS)["input_ids"]


def test_a_tokenizer_of_another_kind_is_refused():
    other = tokenizer.load(POCKET)
    other.bpe.normalizer = tokenizer.normalizers.NFC()
    with pytest.raises(ValueError, match="this tokenizer's normalizer is not CLIP's"):
        tokenizer.described(other, 77)


CONDITION = """return given.map(([kind, {data, h, w}, spec, mask]) => {
  const hole = mask && {data: mask, h: spec.size, w: spec.size, c: 1};
  return [...e.CONDITIONS[kind]({data, h, w, c: 3}, spec, hole).data];
})"""


def test_conditions_are_those_of_python(tmp_path):
    rng = np.random.default_rng(0)
    low = Image.fromarray(rng.integers(0, 256, (9, 7, 3), np.uint8)).resize((37, 50), Image.Resampling.BICUBIC)
    lines = Image.fromarray(np.repeat(rng.choice([0, 255], (16, 16, 1)), 3, -1).astype(np.uint8))
    grey = low.convert("L")
    hole = np.zeros((16, 16), np.uint8)
    hole[3:9, 4:] = 255
    square = low.crop((0, 0, 32, 32))
    square.putalpha(Image.fromarray(255 - hole).resize((32, 32), Image.Resampling.NEAREST))
    cases = {"sr": low, "edit": low, "inpaint": square, "depth": grey, "canny": lines}
    assert {*cases} == {name for name, task in TASKS.items() if task.conditional}
    given, expected = [], []
    for name, image in cases.items():
        task = TASKS[name]()
        cond, spec = task.read(image, 16), {"size": 16} | task.in_browser(16)
        expected.append(cond)
        pixels = np.asarray(images.read(image))
        mask = cond[..., 3].ravel().tolist() if name == "inpaint" else None
        picture = {"data": pixels.ravel().tolist(), "h": pixels.shape[0], "w": pixels.shape[1]}
        given.append([spec["kind"], picture, spec, mask])
    for name, found, cond in zip(cases, node(CONDITION, given), expected, strict=True):
        assert np.std(cond) > 0.05, name
        np.testing.assert_allclose(np.reshape(found, cond.shape), cond, atol=2 / 255, err_msg=name)  # Pillow's rounding
        assert np.abs(np.reshape(found, cond.shape) - cond).mean() < 0.2 / 255, name


CENTRAL = [1.0, 0.1, 0.25]  # of Canny's ranges: sigma, low, high


def test_edges_are_those_of_python():
    """Of noise, and of even areas, in which rounding decides which of two equal neighbours is the edge."""
    rng = np.random.default_rng(4)
    shapes = np.full((48, 48, 3), 30, np.uint8)
    shapes[8:30, 9:38], shapes[38:] = (200, 30, 40), 255
    shapes[np.hypot(*(np.mgrid[:48, :48] - 30)) < 11] = (20, 220, 90)
    pictures = [shapes, rng.integers(0, 256, (48, 48, 3), np.uint8), np.uint8(rng.random((48, 48, 1)) * shapes)]
    settings = [CENTRAL, [0.0, 0.0, 0.3], [2.3, 0.02, 0.05]]
    found, expected = [], []
    for picture in pictures:
        for sigma, low, high in settings:
            task = TASKS["canny"](canny_sigma=(sigma,) * 2, canny_low=(low,) * 2, canny_high=(high,) * 2)
            expected.append(task.read(Image.fromarray(picture), 48))
            spec = {"size": 48, "edges": [sigma, low, high]}
            found.append(["canny", {"data": picture.ravel().tolist(), "h": 48, "w": 48}, spec, None])
    assert all(0.02 < cond.mean() < 0.5 for cond in expected)
    np.testing.assert_array_equal(np.reshape(node(CONDITION, found), np.shape(expected)), expected)


@pytest.mark.parametrize(
    ("task", "options", "expected"),
    [
        ("edit", {}, {"kind": "image"}),
        ("depth", {}, {"kind": "depth", "metres": False}),
        ("depth", {"depth_files": "metres"}, {"kind": "depth", "metres": True}),
        ("canny", {}, {"kind": "canny", "edges": CENTRAL}),
        ("canny", {"canny_sigma": (1.0, 3.0)}, {"kind": "canny", "edges": [2.0, *CENTRAL[1:]]}),
    ],
)
def test_how_a_condition_is_made_is_told(task, options, expected):
    shown = types.SimpleNamespace(task_name=task, task=TASKS[task](**options))
    parts = types.SimpleNamespace(experiment=types.SimpleNamespace(data=shown))
    found = page.condition_of.__wrapped__(parts, {"cond": np.zeros((1, 8, 8, 3))}, {"cond"})
    assert found == {"size": 8} | expected


def test_a_png_of_16_bits_is_found(tmp_path):
    deep, shallow = tmp_path / "deep.png", tmp_path / "shallow.png"
    Image.fromarray(np.full((4, 4), 300, np.uint16)).save(deep)
    RED.convert("L").save(shallow)
    given = [[*path.read_bytes()[:25]] for path in (deep, shallow)]
    assert node("return given.map((bytes) => e.deepPng(bytes))", [*given, [0] * 25, []]) == [True, False, False, False]


def test_what_cannot_be_a_condition_is_a_sentence():
    flat, coloured = ({"data": data, "h": 4, "w": 4} for data in ([7] * 48, [*range(48)]))
    code = "return given.map(([kind, x, spec, mask]) => { try { " + CONDITION.replace(
        "given", "[[kind, x, spec, mask]]"
    )
    cases = [["depth", x, {"size": 4}, None] for x in (flat, coloured)]
    cases += [["inpaint", flat, {"size": 4}, [x] * 16] for x in (0, 1)]
    said = node(code[:-1] + ") } catch (error) { return error.message } })", cases)
    assert "constant" in said[0]
    assert "a depth map is grey" in said[1]
    assert "Paint over a part" in said[2]
    assert "leave some of it" in said[3]


# --- in a browser: extras test-browser and onnx, a Chromium, and ONNXRUNTIME_WEB=the tarball that `npm pack` made


@pytest.fixture
def browser(chromium):
    """A Chromium, where pages can be exported."""
    pytest.importorskip("jax2onnx", reason="needs the extra onnx")
    if "ONNXRUNTIME_WEB" not in os.environ:
        pytest.skip("needs ONNXRUNTIME_WEB, the package's tarball or folder")
    return chromium


class Quiet(http.server.SimpleHTTPRequestHandler):
    """Python's own server of files."""

    def log_message(self, *_):
        return


@contextlib.contextmanager
def opened(browser, folder):
    """The page of a folder; fails if it asks for anything that is not in the folder, or raises."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=folder))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address, asked, raised = f"http://127.0.0.1:{server.server_port}/", [], []
    try:
        tab = browser.new_page()
        tab.on("request", lambda request: asked.append(request.url))
        tab.on("pageerror", lambda error: raised.append(error))
        tab.goto(address)
        tab.wait_for_selector("main:not([hidden])", timeout=60_000)
        yield tab
        assert not raised
        assert any(url.endswith(".wasm") for url in asked)
        assert [url for url in asked if not url.startswith((address, "data:", "blob:"))] == []
    finally:
        server.shutdown()


def generated(tab, steps):
    """Press the button; the pixels of the result."""
    tab.select_option("#steps", str(steps))
    tab.click("#go")
    tab.wait_for_function("!document.getElementById('go').disabled")
    assert tab.inner_text("#status") == ""
    assert tab.inner_text("#time").endswith(" ms a picture")
    return pixels(tab, "after")[..., :3]


def pixels(tab, canvas):
    """Those of a canvas, uint8 [h, w, 4]."""
    read = "(x) => [x.height, x.width, [...x.getContext('2d').getImageData(0, 0, x.width, x.height).data]]"
    h, w, data = tab.eval_on_selector(f"#{canvas}", read)
    return np.array(data, np.uint8).reshape(h, w, 4)


def exported(c, folder):
    with jax.numpy_rank_promotion("allow"):  # jax2onnx adds biases without reshaping them
        commands.export_page(c, folder / "run", str(folder / "demo"), runtime=os.environ["ONNXRUNTIME_WEB"])
    return folder / "demo"


def close(found, expected):
    """At most one of 255 apart, from rounding, and rarely."""
    apart = np.abs(np.int32(found) - np.int32(expected))
    assert np.std(expected) > 10
    assert apart.max() <= 1
    assert (apart > 0).mean() < 0.02


@pytest.mark.slow
def test_a_browser_enlarges_as_python_does(browser, enlarger, tmp_path):
    """A person's file, through --mode=sample and through the page."""
    rng = np.random.default_rng(3)
    Image.fromarray(rng.integers(0, 256, (2, 2, 3), np.uint8)).save(tmp_path / "in.png")
    c = settings(enlarger)
    c.seed = 11
    commands.sample(c, tmp_path / "run", str(tmp_path / "in.png"), str(tmp_path / "out.png"))
    with opened(browser, exported(c, tmp_path)) as tab:
        tab.click("#go")
        assert tab.inner_text("#status") == "Choose a picture first."
        chosen(tab, tmp_path / "in.png")
        tab.fill("#seed", "11")
        found = generated(tab, 2)
        close(found, Image.open(tmp_path / "out.png").convert("RGB"))
        tab.fill("#slider", "60")
        assert tab.eval_on_selector("#after", "(x) => x.style.clipPath") == "inset(0px 0px 0px 60%)"
        tab.fill("#seed", "12")
        assert np.abs(np.int32(generated(tab, 2)) - found).max() > 10
        tab.locator("#examples img").nth(1).click()
        generated(tab, 1)
        bad = tmp_path / "bad.png"
        bad.write_text("no picture")
        tab.set_input_files("#file", str(bad))
        tab.wait_for_selector("#status.error")
        assert "cannot be read as a picture" in tab.inner_text("#status")


@pytest.mark.slow
def test_a_browser_draws_a_class_as_python_does(browser, teacher, tmp_path):
    """A student without a condition: no picture is asked for, and there is no slider."""
    c = settings(teacher, "none")
    api.sample_prompts(c, tmp_path / "run", [], str(tmp_path / "out.png"), labels=[3])
    with opened(browser, exported(c, tmp_path)) as tab:
        assert not any(map(tab.is_visible, ("#file", "#slider", "#prompt", "#brush")))
        tab.select_option("#label", "3")
        close(generated(tab, 2), Image.open(tmp_path / "out.png").convert("RGB"))


def drawn(c, folder, image, texts=()):
    """An image, saved as in.png, by --mode=sample: the pixels of out.png."""
    image.save(folder / "in.png")
    files = {"output": str(folder / "out.png"), "source": str(folder / "in.png")}
    api.sample_run(c, folder / "run", prompts=texts, **files)
    return Image.open(files["output"]).convert("RGB")


def choose(tab, file):
    """A person's file, in the browser's own dialogue."""
    with tab.expect_file_chooser() as asked:
        tab.click("#file")
    asked.value.set_files(str(file))


def chosen(tab, file):
    """A picture; waits until it shows."""
    tab.eval_on_selector("#before", "(x) => { x.width = 1 }")
    choose(tab, file)
    tab.wait_for_function("document.getElementById('before').getContext('2d').getImageData(0, 0, 1, 1).data[3] === 255")


def refused(tab, file, said):
    """A file of which the page says why it cannot take it; nothing is drawn of it, nor of the one before."""
    choose(tab, file)
    tab.locator("#status", has_text=said).wait_for()
    tab.click("#go")
    assert tab.inner_text("#status") == "Choose a picture first."


@pytest.mark.slow
def test_a_browser_takes_a_depth_map_as_python_does(browser, modeller, tmp_path):
    """A grey picture; colours, 16 bits and a constant map are refused."""
    ramp = Image.fromarray(np.add.outer(np.arange(0, 160, 20), np.arange(8) * 9).astype(np.uint8))
    c = settings(modeller, "depth")
    c.data.update(source="scenes", num_classes=24)
    expected = drawn(c, tmp_path, ramp)
    with opened(browser, exported(c, tmp_path)) as tab:
        assert tab.inner_text("#file-hint") == "Depth map, a grey picture: near is bright"
        chosen(tab, tmp_path / "in.png")
        close(generated(tab, 2), expected)
        cond = TASKS["depth"]().read(ramp, 8)
        close(pixels(tab, "before")[..., :3], np.rint(cond * 255))
        RED.save(tmp_path / "red.png")
        refused(tab, tmp_path / "red.png", "a depth map is grey")
        RED.convert("L").save(tmp_path / "flat.png")
        refused(tab, tmp_path / "flat.png", "The map is constant")
        Image.fromarray(np.asarray(ramp, np.uint16) * 9).save(tmp_path / "deep.png")
        refused(tab, tmp_path / "deep.png", "This PNG has 16 bits")
        tab.locator("#examples img").nth(1).click()
        tab.wait_for_function("document.getElementById('status').textContent === ''")
        assert np.std(generated(tab, 1)) > 10


@pytest.mark.slow
def test_a_browser_takes_edges_as_python_does(browser, enlarger, tmp_path):
    """From a photograph, and a picture of edges as it is."""
    photograph = Image.new("RGB", (8, 8), (20, 30, 60))
    photograph.paste((220, 200, 90), (3, 2, 8, 6))
    c = settings(enlarger, "canny")
    taken = TASKS["canny"]().read(photograph, 8)
    lines = Image.fromarray(np.uint8(taken.transpose(1, 0, 2) * 255))
    expected = [drawn(c, tmp_path, image) for image in (photograph, lines)]
    with opened(browser, exported(c, tmp_path)) as tab:
        assert "of which edges are taken; one in pure black and white, of 8 x 8" in tab.inner_text("#file-hint")
        for image, wanted, cond in zip((photograph, lines), expected, (taken, lines), strict=True):
            image.save(tmp_path / "in.png")
            chosen(tab, tmp_path / "in.png")
            close(generated(tab, 2), wanted)
            np.testing.assert_array_equal(pixels(tab, "before")[..., :3] > 0, np.asarray(cond) > 0)
        assert np.abs(np.int32(expected[0]) - np.int32(expected[1])).max() > 10


def pipeline(folder, channels):
    """A tiny pipeline with prompts and pocket's tokenizer; its denoiser takes so many channels."""
    shutil.copytree(POCKET, folder / "tokenizer")
    net = models.init(UNET | {"in_channels": channels}, 0, zero_out=False)
    models.save(folder, "unet", net.params, net.module.to_config())
    words = io.read_json(POCKET / "vocab.json")
    clip = CLIP | {"vocab_size": len(words), "eos_token_id": words[tokenizer.END]}
    for name, module in {
        "vae": AutoencoderKL.from_config(VAE),
        "text_encoder": CLIPTextModel.from_config(clip),
    }.items():
        models.save(folder, name, init_params_numpy(weight_shapes(module), 1), module.to_config())
    write_scheduler(folder, DDPM(), "eps")
    index = {"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "UNet2DConditionModel"]}
    index |= {"vae": ["diffusers", "AutoencoderKL"], "scheduler": ["diffusers", "DDIMScheduler"]}
    index |= {"text_encoder": ["transformers", "CLIPTextModel"], "tokenizer": ["transformers", "CLIPTokenizer"]}
    io.write_json(folder / "model_index.json", index)
    return folder


@pytest.fixture(scope="module")
def painter(tmp_path_factory):
    """For inpainting: latents, a mask, and the latents of the picture."""
    return pipeline(tmp_path_factory.mktemp("painter"), 9)


@pytest.fixture(scope="module")
def editor(tmp_path_factory):
    """As InstructPix2Pix: latents, and those of the picture to edit."""
    return pipeline(tmp_path_factory.mktemp("editor"), 8)


@pytest.mark.slow
@pytest.mark.timeout(1800)  # jax2onnx takes minutes
def test_a_browser_edits_as_python_does(browser, editor, tmp_path):
    """An instruction, without which nothing is drawn, and a person's picture, that is seen before the result."""
    c, picture = settings(editor, "edit", 16), RED.resize((16, 16))
    c.data.source = "icon_edits"
    picture.paste((30, 60, 200), (4, 2, 12, 9))
    expected = drawn(c, tmp_path, picture, ["Make it BLUE"])
    with opened(browser, exported(c, tmp_path)) as tab:
        assert tab.inner_text("#text-row").strip() == "Instruction"
        assert tab.inner_text("#file-hint") == "Picture to edit"
        tab.locator("#examples img").first.click()
        assert tab.input_value("#prompt") == data.examples(config.resolve(c).data, "validation", 1)["caption"][0]
        chosen(tab, tmp_path / "in.png")
        tab.fill("#prompt", " ")
        tab.click("#go")
        tab.wait_for_selector("#status.error")
        assert tab.inner_text("#status").startswith("The instruction is empty")
        tab.fill("#prompt", "Make it BLUE")
        close(generated(tab, 2), expected)
        np.testing.assert_array_equal(pixels(tab, "before")[..., :3], picture)
        assert tab.is_visible("#slider")


@pytest.mark.slow
@pytest.mark.timeout(1800)  # jax2onnx takes minutes
def test_a_browser_paints_as_python_does(browser, painter, tmp_path):
    """A hole that the mouse paints, a prompt, guidance, latents: all networks of a page."""
    c = settings(painter, "inpaint", 16)
    c.method.guidance = 3.0
    with opened(browser, exported(c, tmp_path)) as tab:
        tab.locator("#examples img").first.click()
        tab.fill("#prompt", "A Red circle, 2nd")
        tab.click("#go")
        tab.wait_for_selector("#status.error")
        assert tab.inner_text("#status").startswith("Paint over a part")
        box = tab.locator("#hole").bounding_box()
        at = lambda x, y: (box["x"] + x * box["width"], box["y"] + y * box["height"])
        tab.mouse.move(*at(0.3, 0.5))
        tab.mouse.down()
        tab.mouse.move(*at(0.6, 0.5), steps=4)
        tab.mouse.up()
        hole = pixels(tab, "hole")[..., 3] > 0
        assert 0.1 < hole.mean() < 0.6
        found = generated(tab, 2)
    parts, state = commands.finished(c, tmp_path / "run")
    examples = data.examples(parts.experiment.data, "validation", 1)
    batch = {k: v for k, v in generate.encoded(parts, examples).items() if k in ("x0", "null", "index")}
    masked = TASKS["inpaint"]().read(with_hole(examples["x0"][0], hole), 16)
    batch |= {"cond": masked[None], "text": parts.pipeline.prompts(["A Red circle, 2nd"])}
    student = generate.student_of(parts, state)
    expected = generate.sample(student, generate.conditioned(parts, batch), 2, 0)[0]
    close(found, np.rint(expected * 255))


def with_hole(x0, hole):
    """A picture of pixels in [-1, 1] that is transparent in the hole."""
    image = Image.fromarray(np.rint(x0 * 127.5 + 127.5).astype(np.uint8))
    image.putalpha(Image.fromarray(np.uint8(~hole) * 255))
    return image
