"""Eight fake CPU devices, strict ranks, and the tiny nets that the tests share."""

import os

FLAGS = " --xla_force_host_platform_device_count=8"
FLAGS += (
    " --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"  # compiling is what tests wait for
)
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + FLAGS
os.environ["JAX_PLATFORMS"] = "cpu"

import jax  # noqa: E402  (reads the variables above)
import pytest  # noqa: E402
from parity import parity, pytest_addoption, pytest_terminal_summary  # noqa: E402, F401  (a fixture and hooks)

jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="session", autouse=True)
def _cache(tmp_path_factory):
    """Programs compiled by one test serve the next."""
    jax.config.update("jax_compilation_cache_dir", str(tmp_path_factory.mktemp("cache")))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


@pytest.fixture(scope="session")
def teacher(tmp_path_factory):
    """A class-conditional teacher's folder, which no test writes to."""
    import tiny  # not above: it imports the package, which jaxtyping wants to be the first to do

    return tiny.save_teacher(tmp_path_factory.mktemp("teacher"))[0]


@pytest.fixture(scope="module", autouse=True)
def _programs():
    """No process holds the programs of all tests: gigabytes, and more maps of memory than a process may have."""
    yield
    jax.clear_caches()
