"""The command line on mistakes: exit status 2, one sentence, nothing written."""

import dataclasses
import errno
import os
import pathlib
import shutil
import signal
import subprocess
import sys

import pytest

import cddistill as package
from cddistill import config, io, main, sharding, typed
from cddistill.main import sentence
from cddistill.models import folders

ROOT = pathlib.Path(__file__).parents[1]


def cddistill(*flags, cwd):
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-m", "cddistill.main", *flags], env=env, cwd=cwd, capture_output=True, text=True
    )


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ([f"--config={ROOT}/configs/ccd_sr.py", "--config.optim.lrr=1"], "config key 'lrr': did you mean 'lr'?"),
        ([f"--config={ROOT}/configs/ccd_sr.py", "--mode=sample"], "needs --output"),
        ([f"--config={ROOT}/configs/ccd_sr.py", "--mode=export", "--output=student"], "holds no run: train first"),
    ],
)
def test_mistakes_exit_with_one_sentence(flags, sentence, tmp_path):
    done = cddistill(*flags, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("cddistill: ")
    assert sentence in last
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


# ---- arguments, in this process: a process of its own takes seconds


SR = "--config=configs/ccd_sr.py"
D2G = "--config=configs/dmd2_emoji.py"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "--config is missing"),
        ([SR, "--config.batch_sise=1"], "'batch_sise': did you mean 'batch_size'?"),
        ([SR, "--config.zzz=1"], "unknown config key"),
        ([SR, "--config.batch_size=many"], "batch_size"),
        (["--config=configs/nothing.py"], "nothing.py does not exist"),
        ([SR, "--config.lr=1e-3"], "unknown config key 'lr': did you mean --config.optim.lr?"),
        ([SR, "--config.ema_decay=0.9"], "'ema_decay': did you mean --config.method.ema_decay?"),
        ([SR, "--config.data.batch_size=3"], "'data.batch_size': did you mean --config.batch_size?"),
        ([D2G, "--config.optim.critics.lr=1"], "'optim.critics.lr': did you mean --config.optim"),
        ([SR, "--config.data.sise=3"], "unknown config key 'sise': did you mean 'size'? (--config.data.size)"),
        ([SR, "--config.learning_rate=1"], "'learning_rate': did you mean 'lr'? (--config.optim.lr)"),
        ([SR, "--batch-size=4"], "unknown option --batch-size: did you mean --config.batch_size?"),
        ([SR, "--config.nothing_like_it=3"], "unknown config key 'nothing_like_it': --help lists all"),
        (
            [SR, "--config.method.name=dmd2"],
            "the config file configs/ccd_sr.py chose the method codi: for dmd2 pass a config file of it, such as "
            "--config=configs/dmd2_emoji.py",
        ),
        ([f"{SR}:pe", "--config.method=dmd2"], "configs/ccd_sr.py chose the method codi: for dmd2"),
        ([D2G, "--config.method.name", "codi"], "chose the method dmd2: for codi pass a config file of it"),
        ([SR, "--config.method.name=dmd"], "unknown method.name 'dmd': did you mean 'dmd2'?"),
        ([SR, "--config.method.ratio=5"], "method.ratio is an option of dmd2, and the method is codi: leave"),
        ([D2G, "--config.method.num_ode=5"], "unknown config key 'num_ode'"),
        ([SR, "--config.steps.x=3"], "unknown config key 'x'"),
        ([SR, "--config.optim=3"], "config.optim is a group: set a field, such as --config.optim."),
        ([SR, "--batch_size=4"], "unknown option --batch_size: did you mean --config.batch_size?"),
        ([SR, "--optim.lr=4"], "unknown option --optim.lr: did you mean --config.optim.lr?"),
        ([SR, "--scale=2"], "unknown option --scale: did you mean --config.data.scale?"),
        ([SR, "--data_path=x"], "unknown option --data_path: did you mean --config.data.path?"),
        ([SR, "--learn=x"], "unknown option --learn: --help lists them all"),
        ([SR, "--wokdir=x"], "unknown option --wokdir: did you mean --workdir?"),
        (["--lr=3"], "unknown option --lr: did you mean --config.optim.lr?"),
        ([SR, "--mode=smaple"], "unknown --mode 'smaple': did you mean 'sample'?"),
        ([SR, "--mode=zzz"], "unknown --mode 'zzz': known: train, evaluate, sample"),
        ([SR, "--prompt=a"], "--prompt is for --mode=sample, not train"),
        ([SR, "--mode=evaluate", "--output=x"], "--output is for --mode=sample or export or encode or pairs"),
        ([SR, "--page"], "--page is for --mode=export, not train: leave it out"),
        ([SR, "--mode=export", "--onnxruntime_web=x"], "--onnxruntime_web is for --page: add it"),
        (
            [SR, "--mode=export", "--page", "--space"],
            "--space adds a page to a diffusers folder",
        ),
        ([SR, "--mode=export", "--page", "--push_to_hub=me/x"], "--push_to_hub is for a diffusers folder"),
        ([SR, "--mode=export", "--page", "--lora_rank=2"], "--lora_rank is for a diffusers folder"),
        ([SR, "--topology=h100:8"], "--topology is for --mode=plan, not train: leave it out"),
        ([SR, "--mode=encode", "--checkpoint=best"], "--checkpoint is for --mode=evaluate or sample or demo or export"),
        ([SR, "--config.steps=1.5"], "config.steps must be a whole number, not '1.5'"),
        ([SR, "--config.steps="], "config.steps must be a whole number, not ''"),
        ([SR, "--config.seed=1e400"], "config.seed must be a whole number"),
        ([SR, "--config.optim.lr=fast"], "config.optim.lr must be a number, not 'fast'"),
        ([SR, "--config.optim.lr=nan"], "config.optim.lr must be a number, not 'nan'"),
        ([SR, "--config.remat=maybe"], "config.remat must be true or false, not 'maybe'"),
        ([SR, "--noconfig.steps"], "config.steps must be a whole number, not 'false'"),
        ([SR, "again"], "unexpected argument 'again'"),
        (["--config=configs/ccd_sr"], "config file configs/ccd_sr does not exist; did you mean configs/ccd_sr.py?"),
        (["--config=ccd_rs.py"], "config file ccd_rs.py does not exist; did you mean configs/ccd_sr.py?"),
        (["--config=elsewhere/x.py"], "elsewhere/x.py does not exist; start in the folder that holds configs/"),
        (["--config=configs"], "config file configs is a folder: choose one of its files"),
        (["--config=configs/pretrained.py:huge"], "configs/pretrained.py has no variants: leave out :huge"),
        (["--config=configs/ccd_sr.py:huge"], "configs/ccd_sr.py has no variant 'huge': known are emoji, pe, pocket"),
    ],
)
def test_a_mistake_is_named_with_its_remedy(parsed, arguments, said):
    with pytest.raises(SystemExit) as stopped:
        parsed(*arguments)
    assert said in stopped.value.code
    assert "\n" not in stopped.value.code


@pytest.mark.parametrize(
    ("arguments", "field", "value"),
    [
        (["--config.steps=1e3"], "steps", 1000),
        (["--config.data.size", "64.0"], "data.size", 64),
        (["--config.steps=1_000"], "steps", 1000),
        (["--config.fsdp", "-1"], "fsdp", -1),
        (["--config.optim.lr=1e-3"], "optim.lr", 1e-3),
        (["--config.optim.lr=1"], "optim.lr", 1.0),
        (["--config.remat=Yes"], "remat", True),
        (["--config.remat=1"], "remat", True),
        (["--config.remat"], "remat", True),
        (["--config.flash=FALSE"], "flash", False),
        (["--noconfig.flash"], "flash", False),
        (["--config.sample_steps=1,4"], "sample_steps", (1, 4)),
        (["--config.sample_steps=(1, 4)"], "sample_steps", (1, 4)),
        (["--config.sample_steps=[4]"], "sample_steps", (4,)),
        (["--config.sample_steps=4"], "sample_steps", (4,)),
        (["--config.sample_steps=1e0,4"], "sample_steps", (1, 4)),
        (["--config.sample_steps=1", "--config.sample_steps=4"], "sample_steps", (1, 4)),
        (["--config.teacher_steps="], "teacher_steps", ()),
        (["--config.data.mixture=icons,emoji"], "data.mixture", ("icons", "emoji")),
        (["--config.teacher=a=b"], "teacher", "a=b"),
        (["--config.steps=3", "--config.steps=5"], "steps", 5),
        (["--config.method.name=codi", "--config.seed=4"], "seed", 4),
    ],
)
def test_values_are_read_by_the_type_of_their_field(parsed, arguments, field, value):
    for order in ([SR, *arguments], [*arguments, SR]):
        resolved = io.flatten(config.plain(parsed(*order)))[field]
        cls = config.owners()[field]
        kind = next(f.type for f in dataclasses.fields(cls) if f.name == field.rpartition(".")[2])
        fitted = typed.fit(resolved, kind, field)
        assert fitted == value
        assert type(fitted) is type(value)


def test_options_may_lie_in_a_file(parsed, tmp_path):
    (tmp_path / "more").write_text("--noconfig.flash\n")
    (tmp_path / "options").write_text(f"# mine\n\n{SR}\n--config.steps=7\n--flagfile={tmp_path}/more\n")
    for given in ([f"--flagfile={tmp_path}/options"], ["--flagfile", f"{tmp_path}/options"]):
        settings = parsed("--config.steps=3", *given, "--config.seed=2")
        assert (settings.steps, settings.seed, settings.flash) == (7, 2, False)


@pytest.mark.parametrize("given", ["--flagfile=gone", "--flagfile=tests", "--flagfile=docs/ccd_sr.png", "--flagfile"])
def test_a_file_of_options_that_cannot_be_read_is_named(parsed, given):
    with pytest.raises(SystemExit, match=rf"^{given} cannot be read \(.+\): it names a text file with an option"):
        parsed(SR, given)


def test_a_common_field_sets_those_of_every_turn_and_a_reference_its_owner(parsed):
    settings = parsed(D2G, "--config.optim.lr=0.5", "--config.optim.critic.lr=0.25")
    optim = config.resolve(settings).optim
    assert (optim["student"].lr, optim["critic"].lr) == (0.5, 0.25)
    assert parsed("--config=configs/pretrained.py", "--config.teacher=x").method.scheduler == "x"


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (
            "c = defaults('codi'); c.lr = 3; return c",
            "mine.py, line 3: unknown config key 'lr': did you mean 'optim.lr'?",
        ),
        ("c = defaults('codi'); c.optim.lrr = 3; return c", "unknown config key 'lrr': did you mean 'optim.lr'?"),
        ("c = defaults('codi'); c.method.ratio = 3; return c", "did you mean 'method.ratio'? (of the method dmd2)"),
        ("c = defaults('codi'); c.steps = 1.5; return c", "mine.py, line 3: steps must be int, not float 1.5"),
        ("return defaults('cody')", "mine.py, line 3: unknown method.name 'cody': did you mean 'codi'?"),
        ("return undefined", "mine.py, line 3: NameError: name 'undefined' is not defined"),
        ("return 3", "mine.py returned int: it must return a config"),
        ("return (", "mine.py, line 3: '(' was never closed"),
    ],
)
def test_a_mistake_in_a_config_file_is_named_with_its_line(parsed, tmp_path, body, said):
    (tmp_path / "mine.py").write_text(f"from cddistill.config import defaults\ndef get_config():\n    {body}\n")
    with pytest.raises(SystemExit) as stopped:
        parsed(f"--config={tmp_path}/mine.py")
    assert said in stopped.value.code


def test_configs_of_the_package_need_no_checkout(parsed, tmp_path, monkeypatch):
    here = parsed(f"{SR}:sd21")
    monkeypatch.chdir(tmp_path)
    assert parsed("--config=cddistill:ccd_sr:sd21").to_dict() == here.to_dict()
    assert str(main.default_workdir()) == "runs/ccd_sr-sd21"
    with pytest.raises(SystemExit, match=r"ccd_sx\.py does not exist; did you mean .*ccd_sr\.py"):
        parsed("--config=cddistill:ccd_sx")


def test_a_config_file_without_others_beside_it_says_how_one_of_another_method_starts(parsed, tmp_path):
    (tmp_path / "mine.py").write_text("from cddistill.config import defaults\nget_config = lambda: defaults('codi')\n")
    with pytest.raises(SystemExit, match=r"for dmd2 pass a config file of it, one that starts from defaults\(.dmd2.\)"):
        parsed(f"--config={tmp_path}/mine.py", "--config.method.name=dmd2")


def test_a_config_file_without_get_config_and_a_home_folder_are_understood(parsed, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine.py").write_text("x = 1\n")
    with pytest.raises(SystemExit, match=r"mine\.py has no function get_config\(\)"):
        parsed("--config=~/mine.py")
    settings = parsed(SR, "--config.teacher=~/models/teacher", "--config.data.path=~/data")
    experiment = config.resolve(settings)
    assert experiment.run.teacher == f"{tmp_path}/models/teacher"
    assert experiment.data.path == f"{tmp_path}/data"
    assert config.plain(settings)["data"]["path"] == f"{tmp_path}/data"


@pytest.mark.parametrize("asked", ["--help", "-h", "--helpfull"])
def test_help_lists_options_and_fields_with_their_comments(parsed, capsys, asked):
    with pytest.raises(SystemExit) as stopped:
        parsed(asked)
    assert stopped.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.split()[:1] == ["--negative_prompt"] for line in lines)
    for field, comment in {
        "steps=1000": "updates of the first turn",
        "optim.warmup=0": "updates of linear warm-up from 0; a turn that is played every 5th step counts only its own",
        "data.scale=4": "factor from the low to the high resolution",
        "method.preset=": "paper or released: values of the fields that are not set themselves",
        "method.ratio=5": "critic updates per student update (paper: 5; SD 1.5: 10)",
    }.items():
        assert [line for line in lines if line.split()[:1] == [f"--config.{field}"] and line.endswith(comment)], field


def test_help_of_a_config_shows_its_values_and_only_its_method(parsed, capsys):
    with pytest.raises(SystemExit) as stopped:
        parsed(SR, "--config.steps=7", "--help")
    assert stopped.value.code == 0
    said = capsys.readouterr().out
    assert "--config.steps=7 " in said
    assert "--config.method.grid_power=2.5" in said
    assert "--config.method.ratio" not in said


def test_the_version_is_printed(parsed, capsys):
    with pytest.raises(SystemExit) as stopped:
        parsed("--version")
    assert stopped.value.code == 0
    assert capsys.readouterr().out == f"cddistill {package.__version__}\n"


@pytest.mark.parametrize("platform", ["cuda", pytest.param("tpu", marks=pytest.mark.slow), "abacus"])
def test_devices_that_are_not_there_are_one_sentence(platform):
    done = subprocess.run(
        [sys.executable, "-c", "from cddistill import sharding; sharding.check_devices()"],
        env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": platform},
        capture_output=True,
        text=True,
    )
    if not done.returncode:
        pytest.skip(f"there is a {platform} here")
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith(f"ValueError: JAX_PLATFORMS={platform} asks for devices that JAX cannot use here")
    assert "unset it" in last


# ---- errors


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device; free some space, or"),
        (OSError(errno.EROFS, "Read-only file system", "/a/b"), "/a/b: Read-only file system; choose another place"),
        (PermissionError(errno.EACCES, "Permission denied", "/a"), "/a: Permission denied; change its permissions"),
        (shutil.Error([("a", "b/c", "[Errno 28] No space")]), "b/c cannot be written ([Errno 28] No space): free some"),
        (OSError("one\n  two"), "one two"),
    ],
)
def test_os_errors_become_one_sentence(error, said):
    assert sentence(error).startswith(said)


@pytest.mark.parametrize(
    ("mode", "hint"),
    [("train", "lower batch_size=32, raise accumulate=1, set remat=True"), ("sample", "set decode_batch=1")],
)
def test_a_full_device_is_one_sentence_that_says_what_to_change(parsed, monkeypatch, mode, hint):
    def full(settings):
        raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 26500000000 bytes.\n\nBuffer assignment: ...")

    monkeypatch.setattr(main, "main", full)
    settings = parsed(SR, f"--mode={mode}", "--config.batch_size=32")
    with pytest.raises(SystemExit) as stopped:
        main.guarded(settings)
    said = stopped.value.code
    assert "is full (it was asked for 26500000000 bytes): " in said
    assert hint in said
    assert said.endswith("; --mode=plan says what a config needs")


def test_other_errors_of_jax_keep_their_traceback(parsed, monkeypatch):
    def broken(settings):
        raise RuntimeError("INTERNAL: ptxas exited with code 1")

    monkeypatch.setattr(main, "main", broken)
    with pytest.raises(RuntimeError, match="ptxas"):
        main.guarded(None)


def test_damage_of_what_ships_with_the_package_says_to_reinstall(tmp_path, monkeypatch):
    shutil.copytree(folders.ASSETS / "pocket", tmp_path / "models" / "assets" / "pocket")
    monkeypatch.setattr(folders, "ASSETS", tmp_path / "models" / "assets")
    monkeypatch.setattr(package, "__file__", str(tmp_path / "__init__.py"))
    weights = tmp_path / "models" / "assets" / "pocket" / "unet" / "diffusion_pytorch_model.safetensors"
    for damage in (lambda: weights.write_bytes(weights.read_bytes()[:-99]), weights.unlink):
        damage()
        with pytest.raises((ValueError, OSError)) as raised:
            package.load("pocket")
        said = sentence(raised.value)
        assert str(weights.parent) in said
        assert "part of this package" in said
        assert said.endswith(": reinstall cddistill")
    assert "reinstall" not in sentence(ValueError("runs/pocket/unet is truncated"))


# ---- signals

STUCK = "import hashlib; hashlib.pbkdf2_hmac('sha256', b'', b'', 2**31 - 1)"  # in C for minutes, as XLA's compiler is


def test_sigterm_ends_the_program_while_it_compiles():
    """Python then runs no handler. What a handler does is in test_trust.py."""
    stuck = f"print(1, flush=True); {STUCK}"
    work = f"from cddistill import main\nmain.app.run = lambda *_, **__: exec({stuck!r})\nmain.run()"
    process = subprocess.Popen(
        [sys.executable, "-c", work],
        env=os.environ | {"PYTHONPATH": str(ROOT), "CDDISTILL_GRACE": "0.1"},
        stdout=-1,
        stderr=-2,
        text=True,
    )
    process.stdout.readline()
    process.send_signal(signal.SIGTERM)
    try:
        out, _ = process.communicate(timeout=300)
    finally:
        process.kill()
    assert (process.returncode, out) == (143, "")


def test_hosts_end_together(monkeypatch):
    """A host whose mode has ended waits for the others: see also two_hosts.py."""
    waited = []
    monkeypatch.setattr(main, "main", lambda _: 143)
    monkeypatch.setattr(sharding, "wait_for_others", lambda: waited.append(True))
    assert main.guarded(None) == 143
    assert waited == [True]
