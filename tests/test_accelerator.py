"""benchmarks/accelerator.py: its rows, budgets and files here; that every part runs is slow."""

import functools
import importlib
import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import jax
import pytest

from cddistill.models import attention
from cddistill.models.init import weight_shapes

BENCHMARKS = pathlib.Path(__file__).parents[1] / "benchmarks"
sys.path.append(str(BENCHMARKS))
accelerator, parts, shapes = map(importlib.import_module, ("accelerator", "accelerator_parts", "shapes"))
PART = """
import json, pathlib, sys, time
part = sys.argv[1].removeprefix("--part=")
seconds = float(sys.stdin.readline())
print(json.dumps({"work": part, "images_per_s": {"ours": 30.0, "theirs": 20.0}.get(part, 1.0)}), flush=True)
file = pathlib.Path(sys.argv[2].removeprefix("--output=")) / "accelerator.json"
while part == "waits" and not (file.exists() and "waits" in file.read_text()):
    time.sleep(0.01)
sys.exit(3) if part == "dies" else sys.stdin.read() if part == "hangs" else None
"""


@pytest.fixture
def rows_of(tmp_path, monkeypatch):
    """A run of parts whose processes are the script above, with what it printed, and its rows by part."""
    script = tmp_path / "part.py"
    script.write_text(PART)
    monkeypatch.setattr(accelerator, "__file__", str(script))
    fake = {name: accelerator.Part(60, None) for name in ("ours", "dies", "waits")}
    fake |= {"theirs": accelerator.Part(60, None, "ours"), "hangs": accelerator.Part(2, None)}
    monkeypatch.setattr(accelerator, "PARTS", fake)

    def run(*names, minutes=5):
        monkeypatch.setattr(sys, "argv", ["x", *names, f"--output={tmp_path}", f"--minutes={minutes}"])
        accelerator.main()
        rows = json.loads((tmp_path / "accelerator.json").read_text())["rows"]
        return {name: [row for row in rows if row["part"] == name] for name in fake}

    return run


def test_a_part_that_dies_or_hangs_costs_only_its_own_rows(rows_of, capsys):
    rows = rows_of("dies", "hangs", "ours")
    assert "status 3" in rows["dies"][-1]["error"]
    assert "not ready after 2 s" in rows["hangs"][-1]["error"]
    assert [row["work"] for name in ("dies", "ours") for row in rows[name] if "work" in row] == ["dies", "ours"]
    assert "| ours | ours | " in capsys.readouterr().out


def test_a_row_is_in_the_file_before_its_part_has_ended(rows_of):
    assert [row.get("work") for row in rows_of("waits")["waits"]] == ["waits"]


def test_rows_of_other_parts_stay_and_the_ratio_of_times_is_ours_over_theirs(rows_of):
    assert len(rows_of("dies", "ours")["dies"]) == 2
    rows = rows_of("theirs", "ours")
    assert rows["theirs"][0]["ours_over_theirs"] == pytest.approx(2 / 3)
    assert list(map(len, rows.values())) == [1, 2, 0, 1, 0]


def test_a_part_for_which_no_time_is_left_says_so(rows_of, monkeypatch):
    monkeypatch.setattr(accelerator, "LEAST", 100)
    with pytest.raises(SystemExit):
        rows_of("ours", minutes=1)
    later = iter((0.0, 50.0))
    monkeypatch.setattr(accelerator.time, "monotonic", lambda: next(later, 50.0))
    assert rows_of("ours", minutes=2)["ours"][0]["error"] == "not run: 70 s were left"


def test_an_unknown_part_is_refused_in_one_sentence(rows_of, capsys):
    with pytest.raises(SystemExit):
        rows_of("our")
    assert "unknown part 'our': known are ours, dies, waits, theirs, hangs" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("guess", "room", "fits", "seconds", "tried"),
    [
        (32, 8, 8, 1e9, [32, 16, 8]), (2, 16, 16, 1e9, [2, 16]), (2, 16, 16, 0.0, [2]), (2, 8, 64, 1e9, [2, 64]),
        (16, 8, 64, 1e9, [16, 8]),
    ],
)  # fmt: skip
def test_a_batch_is_halved_if_out_of_memory_and_raised_once_if_there_is_room(
    guess, room, fits, seconds, tried, tmp_path
):
    given, seen = parts.Given(True, tmp_path, 0.0, seconds), []

    def attempt(batch):
        seen.append(batch)
        if batch > room:
            raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 1 byte")
        yield {"batch": batch, "fits": fits}

    rows = [*parts.largest(given, guess, attempt)]
    assert seen == tried
    assert [row["batch"] for row in rows] == [batch for batch in tried if batch <= room]


def test_an_error_that_is_not_of_memory_ends_the_search(tmp_path):
    with pytest.raises(ZeroDivisionError):
        next(parts.largest(parts.Given(True, tmp_path, 0.0, 60.0), 32, lambda batch: batch // 0))


def test_a_cycle_of_dmd2_is_its_ratio_of_critic_turns_and_one_of_the_student(tmp_path, monkeypatch):
    turns = [
        ("dmd2, critic", 2, 2.0),
        ("dmd2, student", 2, 5.0),
        ("dmd2, critic", 4, 9.0),
    ]  # the last batch is too large
    rows = [{"work": work, "batch": batch, "ms": [ms] * 3} for work, batch, ms in turns]
    monkeypatch.setattr(parts, "train_part", lambda *_: rows)
    *_, cycle = parts.dmd2(parts.Given(True, tmp_path, 0.0, 60.0))
    assert cycle["ms"] == [5 * 2.0 + 5.0] * 3
    assert cycle["images_per_s"] == pytest.approx(5 * 2 / 15e-3)


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA A100-SXM4-40GB", 312e12),
        ("NVIDIA L4", 121e12), ("NVIDIA L40S", None), ("TPU v5 lite", 197e12), ("TPU v5", 459e12), ("cpu", None),
    ],
)  # fmt: skip
def test_the_peak_is_that_of_the_device_or_unknown(kind, peak):
    assert parts.peak_flops(kind) == peak


@pytest.mark.parametrize(("factor", "agrees"), [(1.0, True), (1.01, False)])
def test_the_parity_row_tells_a_wrong_kernel_from_a_right_one(factor, agrees, tmp_path, monkeypatch):
    loop = attention.loop
    monkeypatch.setattr(attention, "loop", lambda q, k, v: factor * loop(q, k, v))
    (row,) = parts.parity(parts.Given(True, tmp_path, 0.0, 60.0))
    assert row["kernel"] == "loop"
    assert row["agrees"] == agrees
    assert {*row["off"]} == {"out", "dq", "dk", "dv"}


@pytest.mark.slow
def test_flops_are_those_that_pytorch_counts():
    """Of a training step of Stable Diffusion 2.1, products only; ours has also what is done element by element."""
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    from torch.utils.flop_counter import FlopCounterMode

    setup = shapes.Setup(shapes.unet("sd21"), 64, 1, "bfloat16")
    ours = importlib.import_module("jax_side").flops("unet", setup, ("student",))
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        unet = diffusers.UNet2DConditionModel(**setup.config)
        text = torch.zeros(1, shapes.TOKENS, 1024)
        unet(torch.zeros(1, 4, 64, 64), torch.zeros(1), text, return_dict=False)[0].sum().backward()
    assert ours == pytest.approx(counter.get_total_flops(), rel=0.05)


@pytest.mark.slow
def test_the_pytorch_side_of_dmd2_has_our_networks_and_each_turn_moves_its_own():
    pytest.importorskip("diffusers")
    torch_side, jax_side = map(importlib.import_module, ("torch_side", "jax_side"))
    setup = shapes.Setup(shapes.tiny_unet("sd15"), 4, 2, "float32")
    theirs, experiment = torch_side.DMD2(setup), jax_side.experiment_of("dmd2", setup)
    frozen = {"teacher": jax_side.denoiser(setup, weights=weight_shapes)}
    init = functools.partial(experiment.method.init, jax.random.key(0))
    ours = jax.eval_shape(init, frozen, jax_side.batch_of("dmd2", setup))
    nets = {name: [*getattr(theirs, name).parameters()] for name in ours}
    for name, weights in nets.items():
        assert sum(p.numel() for p in weights) == sum(x.size for x in jax.tree.leaves(ours[name])), name
    for turn, moved in ((theirs.critic_turn, {"fake", "disc"}), (theirs.student_turn, {"student"})):
        before = {name: [p.detach().clone() for p in weights] for name, weights in nets.items()}
        turn()
        changed = {name for name in nets if any((a != b).any() for a, b in zip(before[name], nets[name], strict=True))}
        assert changed == moved


@pytest.mark.slow
def test_every_part_runs_at_toy_size(tmp_path):
    have_torch = importlib.util.find_spec("torch") and importlib.util.find_spec("diffusers")
    names = [name for name in accelerator.PARTS if have_torch or "torch" not in name]
    command = [sys.executable, accelerator.__file__, *names, "--tiny", "--minutes=60", f"--output={tmp_path}"]
    subprocess.run(command, env=os.environ | {"XLA_FLAGS": ""}, check=True)  # one device
    rows = json.loads((tmp_path / "accelerator.json").read_text())["rows"]
    assert [row for row in rows if "error" in row] == []
    assert {row["part"] for row in rows} == {*names}
    assert (tmp_path / "pocket/unet/config.json").is_file()
