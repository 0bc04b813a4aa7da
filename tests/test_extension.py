"""User extensions: a method, a task and a data format, each one class and one line of a registry.

The method's net is called `generator`; its loss is consistency distillation (Song et al. 2023, alg. 2; LCM's without
the skip connection).
"""

import ast
import dataclasses
import json
import pathlib

import jax
import numpy as np
import pytest
from PIL import Image

from cddistill import commands, config, export, generate, health, models, sampling, train
from cddistill.data import SOURCES, TASKS, images
from cddistill.data.contracts import Source, Task
from cddistill.data.splits import members
from cddistill.losses import mse
from cddistill.method import Generator, Requires, Turn, normal, uniform
from cddistill.methods import METHODS
from cddistill.models import adapter
from cddistill.models.schedulers import Sampling
from cddistill.net import Adapted

pytestmark = pytest.mark.usefixtures("one_device")

ROOT = pathlib.Path(__file__).parents[1] / "cddistill"


@dataclasses.dataclass(frozen=True)
class Consistency(Generator):
    """One turn: the generator at t matches its average at s, one step of the teacher's ODE later."""

    gap: float = 0.02  # t - s as a fraction of the schedule

    mutable_on_resume = ("gap",)

    def init(self, key, frozen, batch):
        return {"generator": adapter.widen(frozen["teacher"], batch)}

    def turns(self):
        return {"consistency": Turn(moves=("generator",), loss=self.loss)}

    def ema(self):
        return {"generator": 0.9}

    def requires(self):
        return Requires(condition="latent")

    def exports(self):
        return {"unet": "generator"}

    def health_rules(self):
        far_off = health.Rule(("consistency/loss",), 1, lambda loss: bool(loss[0] >= 0.0), "a loss has been logged")
        return super().health_rules() | {"loss": far_off}

    def loss(self, n, batch, key):
        k_t, k_eps = jax.random.split(key)
        cond = adapter.condition("concat", batch)
        u = self.gap + (1.0 - self.gap) * uniform(k_t, batch["index"])
        t, s = n.teacher.schedule.at(u), n.teacher.schedule.at(u - self.gap)
        z_t = n.teacher.noise(batch["x0"], normal(k_eps, batch["index"], batch["x0"].shape[1:]), t)
        step = n.teacher(z_t, t, batch["text"])
        target = Adapted(n.generator_ema)(n.teacher.noise(step.x0, step.eps, s), s, batch["text"], cond).x0
        return mse(Adapted(n.generator)(z_t, t, batch["text"], cond).x0, jax.lax.stop_gradient(target)).mean(), {}

    def sample(self, n, noise, batch, step_noise, steps):
        student, cond = Adapted(n.generator_ema), adapter.condition("concat", batch)
        denoise = lambda z, t: student(z, t, batch["text"], cond)
        return sampling.lcm(denoise, n.teacher.schedule, noise, n.teacher.schedule.grid(steps), step_noise, None)

    def sampling(self, schedule, steps):
        return Sampling(sampler="lcm", timesteps=tuple(map(int, schedule.grid(steps))))


@dataclasses.dataclass(frozen=True)
class Colourise(Task):
    """Colourisation: the condition is the image's brightness."""

    gain: float = 1.0  # of the brightness

    def condition(self, element, rng):
        return np.clip(self.gain * element["target"].mean(-1, keepdims=True), 0, 1)

    def read(self, path, size):
        return np.float32(images.fit(images.read(path), size)).mean(-1, keepdims=True) / np.float32(255)

    def picture(self, cond):
        return cond.repeat(3, -1)

    def references(self, cond):
        return {"grey": self.picture(cond)}


@dataclasses.dataclass(frozen=True)
class Npz(Source):
    """A file of images and labels."""

    key: str = "images"  # of the images in the file

    def open(self, config, split):
        return NpzImages(np.load(config.path), self.key, split)


class NpzImages:
    def __init__(self, file, key, split):
        self.pictures, self.labels = file[key], file["labels"]
        self.rows = [int(name) for name in members(map(str, range(len(self.labels))), split)]
        self.num_labels = int(self.labels.max()) + 1

    def __len__(self):
        return len(self.rows)

    def element(self, i, rng):
        row = self.rows[i]
        return {"image": self.pictures[row], "label": self.labels[row], "caption": f"picture {row}"}


@pytest.fixture(scope="module")
def registered():
    """Adds each of them to its registry."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(METHODS, "consistency", Consistency)
        patch.setitem(TASKS, "colourise", Colourise)
        patch.setitem(SOURCES, "npz", Npz)
        yield


@pytest.fixture(scope="module")
def run(registered, teacher, tmp_path_factory):
    """(settings, workdir) of a run that was stopped and resumed."""
    folder = tmp_path_factory.mktemp("stranger")
    rng = np.random.default_rng(0)
    pictures, labels = rng.integers(0, 255, (200, 8, 8, 3), np.uint8), rng.integers(0, 9, 200)
    np.savez(folder / "pictures.npz", pictures=pictures, labels=labels)
    settings = config.defaults("consistency")
    settings.update(teacher=str(teacher), steps=2, batch_size=8, log_every=1, checkpoint_every=1, eval_every=2)
    settings.update(sample_steps=(2,), eval_images=8, report=False)
    settings.data.update(source="npz", task="colourise", path=str(folder / "pictures.npz"), key="pictures", size=8)
    train.train(settings, folder / "run")
    settings.update(steps=4)
    settings.method.gap = 0.05  # in mutable_on_resume
    train.train(settings, folder / "run")
    return settings, folder / "run"


def test_an_added_method_trains_and_resumes(run):
    _, workdir = run
    records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if "consistency/loss" in r] == [1, 2, 3, 4]
    assert any("val/psnr" in r for r in records)  # the default best_metric of a task


def test_evaluation_uses_its_references_and_health_rules(run):
    settings, workdir = run
    commands.evaluate_run(settings, workdir)
    assert [*json.loads((workdir / "scores.json").read_text())] == ["grey", "student, 2 steps"]
    assert "a loss has been logged" in (workdir / "report.html").read_text()


def test_sampling_reads_the_condition_from_a_file(run, tmp_path):
    settings, workdir = run
    Image.new("RGB", (20, 30), (200, 30, 30)).save(tmp_path / "in.png")
    commands.sample(settings, workdir, str(tmp_path / "in.png"), str(tmp_path / "out.png"))
    assert Image.open(tmp_path / "out.png").size == (8, 8)


def test_export_writes_the_trained_generator(run, tmp_path):
    """Regression: a net not called backbone, student or branch was skipped and the teacher exported instead."""
    settings, workdir = run
    commands.export_run(settings, workdir, str(tmp_path / "out"))
    parts, state = commands.finished(settings, workdir)
    written = models.load(tmp_path / "out").params
    for a, b in zip(jax.tree.leaves(state.ema["generator"].params), jax.tree.leaves(written), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-3)  # float16
    assert written["conv_in"]["kernel"].shape[2] == parts.frozen["teacher"].params["conv_in"]["kernel"].shape[2] + 1


def test_an_exported_program_takes_all_noise_as_input(run, tmp_path):
    """Equal inputs give equal images, other seeds other images, and the result is that of --mode=sample."""
    settings, workdir = run
    commands.export_run(settings, workdir, str(tmp_path / "out.stablehlo"))
    program = jax.jit(jax.export.deserialize(bytearray((tmp_path / "out.stablehlo").read_bytes())).call)
    parts, state = commands.finished(settings, workdir)
    batch = {k: v for k, v in generate.example(parts).items() if k != "x0"}
    rows = jax.tree.map(lambda x: np.repeat(x, 3, 0), batch)
    index = rows.pop("index")
    noise = lambda seed: np.asarray(generate.noises(seed, index, (8, 8, 3), 2))
    images = program(rows | {"noise": noise(5)})
    np.testing.assert_array_equal(images[0], images[1])
    np.testing.assert_array_equal(images, program(rows | {"noise": noise(5)}))
    assert np.abs(images - program(rows | {"noise": noise(6)})).max() > 1e-3
    after = noise(5).copy()
    after[:, 1] = noise(6)[:, 1]  # only the noise added after the first step
    assert np.abs(images - program(rows | {"noise": after})).max() > 1e-3
    whole = rows | {"x0": np.zeros((3, 8, 8, 3), "f"), "index": index}
    sampled = generate.sample(generate.student_of(parts, state), whole, 2, seed=5)
    np.testing.assert_allclose(images, sampled, atol=1e-5)


@pytest.mark.slow
def test_large_weights_lie_beside_an_exported_program(run, tmp_path, monkeypatch, capsys):
    """A program's own file ends at 2 GB."""
    settings, workdir = run
    monkeypatch.setattr(export, "MOST_INSIDE", 1000)
    commands.export_run(settings, workdir, str(tmp_path / "out.stablehlo"))
    said = capsys.readouterr().out
    assert float(said.split("at most ")[1].split()[0]) < 1e-5, said
    assert "the arrays of out.stablehlo.safetensors as a dict, and one dict of" in said
    assert (tmp_path / "out.stablehlo").stat().st_size < (tmp_path / "out.stablehlo.safetensors").stat().st_size


@pytest.mark.parametrize("untrained", ["nets", "ema"])
def test_exporting_untrained_weights_is_refused(run, tmp_path, monkeypatch, untrained):
    """The weights or their averages: with a learning rate of 0 the latter still change by rounding."""
    parts, state = commands.finished(*run)
    state = state.replace(**{untrained: getattr(parts.init(), untrained)})
    monkeypatch.setattr(commands, "finished", lambda *_: (parts, state))
    with pytest.raises(ValueError, match="nothing to export: the weights of generator are those of step 0"):
        commands.export_run(*run, str(tmp_path / "out"))
    assert not (tmp_path / "out" / "unet").exists()


def test_a_generator_must_name_the_nets_it_exports(run):
    class Silent(Consistency):
        def exports(self):
            return {}

    class Wrong(Consistency):
        def exports(self):
            return {"unet": "student"}

    from cddistill import checks

    with pytest.raises(ValueError, match="Silent.exports is empty"):
        checks.check_exports(Silent())
    with pytest.raises(ValueError, match="Wrong.exports names student, which it does not train"):
        checks.check_exports(Wrong())


def test_a_checkpoint_is_chosen_by_name_or_step(run):
    settings, workdir = run
    weights = lambda which: jax.tree.leaves(commands.finished(settings, workdir, which)[1].nets)
    newest, earlier = weights("latest"), weights("3")
    assert any(not np.array_equal(a, b) for a, b in zip(newest, earlier, strict=True))
    for a, b in zip(newest, weights("4"), strict=True):
        np.testing.assert_array_equal(a, b)
    weights("best")
    with pytest.raises(ValueError, match=r"--checkpoint=7 is neither latest, best nor one of the steps \["):
        weights("7")
    with pytest.raises(ValueError, match="--checkpoint=newest is neither latest, best"):
        weights("newest")


def test_no_other_code_names_a_method_task_or_source():
    """Only its own file and its line in the registry do."""
    names = ({*METHODS} | {*TASKS} | {*SOURCES}) - {"none"}

    own = [ROOT / "methods", ROOT / "data" / "tasks", ROOT / "data" / "sources"]
    for path in ROOT.rglob("*.py"):
        if any(folder in path.parents for folder in own):
            continue
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("cddistill"):
                assert not node.module.startswith(
                    ("cddistill.methods.", "cddistill.data.tasks.", "cddistill.data.sources.")
                ), path
            if isinstance(node, ast.Compare):
                said = {x.value for x in ast.walk(node) if isinstance(x, ast.Constant) and isinstance(x.value, str)}
                assert not said & names, f"{path} compares with {said & names}"
