"""Eight fake CPU devices, strict ranks, and the tiny nets and the compiled programs that the tests share."""

import contextlib
import functools
import gc
import os
import shutil
import subprocess
import tempfile

FLAGS = " --xla_force_host_platform_device_count=8"
FLAGS += " --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"  # tests wait for compiling:
FLAGS += " --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"  # these two save a third
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + FLAGS
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_TRACEBACK_IN_LOCATIONS_LIMIT"] = "0"  # a stack of frames at every operation: a sixth of the time

import jax  # noqa: E402  (reads the variables above)
import pytest  # noqa: E402
from jax._src.interpreters import mlir  # noqa: E402
from parity import parity, pytest_addoption, pytest_terminal_summary  # noqa: E402, F401  (a fixture and hooks)

jax.config.update("jax_numpy_rank_promotion", "raise")
gc.set_threshold(100_000, 50, 50)  # tracing makes many small objects that live: a tenth of its time went into looking


def pytest_configure(config):
    """Programs compiled by one process serve all others of the run, and those that tests start."""
    if not hasattr(config, "workerinput"):
        os.environ["JAX_COMPILATION_CACHE_DIR"] = programs = tempfile.mkdtemp(prefix="cddistill-tests-")
        config.add_cleanup(functools.partial(shutil.rmtree, programs, ignore_errors=True))
    jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


@pytest.fixture(scope="session", autouse=True)
def _keep_every_program():
    """Also the quick ones, of which there are many; a training run alone keeps those that take a second."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cddistill.train.cache_programs", lambda _: None)
        patch.setattr("cddistill.commands.cache_programs", lambda _: None)
        yield


@pytest.fixture(scope="session")
def teacher(tmp_path_factory):
    """A class-conditional teacher's folder, which no test writes to."""
    import tiny  # not above: it imports the package, which jaxtyping wants to be the first to do

    return tiny.save_teacher(tmp_path_factory.mktemp("teacher"))[0]


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MB."""
    yield from disk(tmp_path, "1m")


@pytest.fixture
def larger_disk(tmp_path):
    """A file system of 16 MB."""
    yield from disk(tmp_path, "16m")


def disk(tmp_path, size):
    """Mount a file system of this size, and unmount it."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting a small file system is not permitted here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture
def chromium():
    """A headless Chromium (extra test-browser): $CHROMIUM, or one on the path; skipped where there is none."""
    playwright = pytest.importorskip("playwright.sync_api", reason="needs the extra test-browser")
    names = (os.environ.get("CHROMIUM", "chromium"), "chromium-browser", "google-chrome")
    program = next(filter(None, map(shutil.which, names)), None)
    if program is None:
        pytest.skip("no Chromium is installed")
    with playwright.sync_playwright() as started:
        found = started.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield found
        found.close()


@contextlib.contextmanager
def first_devices(n):
    """Meshes of the first n of the eight devices, unless a test names others."""
    from cddistill import sharding  # not above: see `teacher`

    mesh = sharding.make_mesh
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "make_mesh", lambda fsdp=1, devices=None: mesh(fsdp, devices or jax.devices()[:n]))
        yield


@pytest.fixture(scope="module")
def two_devices():
    """Runs on two of the eight devices: as sharded, and compiled and run in less time."""
    with first_devices(2):
        yield


@pytest.fixture(scope="module")
def one_device():
    """Runs on one device, for tests of what does not depend on sharding: compiled in the least time."""
    with first_devices(1):
        yield


@pytest.fixture(scope="module", autouse=True)
def _programs():
    """No process holds the programs of all tests: gigabytes, and more maps of memory than a process may have.

    The programs of a file are lowered in one MLIR context; JAX makes one for each, which took longer than lowering an
    operation in it. A context keeps the constants of its programs, so it does not outlive the file.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mlir, "make_ir_context", functools.cache(mlir.make_ir_context))
        yield
    jax.clear_caches()


@pytest.fixture
def parsed(monkeypatch):
    """parsed(*arguments) is the config that they describe; a mistake is a SystemExit with its sentence."""
    from absl import flags

    from cddistill import main

    def refuse(error):
        raise SystemExit(main.sentence(error))

    monkeypatch.setattr(main, "fail", refuse)
    monkeypatch.chdir(os.path.dirname(os.path.dirname(__file__)))
    yield lambda *arguments: main.parse(["cddistill", *arguments])
    flags.FLAGS.unparse_flags()
