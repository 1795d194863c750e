"""What every test starts from: the CPU, no silent rank promotion, and shapes checked at every annotated boundary.

Matmul precision is left as the library sets it, so that a tolerance measures the product and not a test setting.
JAX_PLATFORMS in the environment overrides the CPU, for the tests marked gpu.  The workers of one run, and the processes that
tests start, share a folder of compiled programs, so that none compiles what another has; JAX_COMPILATION_CACHE_DIR in the
environment keeps them for the next run too.
"""

import atexit
import gc
import os
import shutil
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jaxtyping
import pytest

import tests.support.typecheck  # noqa: F401  # the import hook finds the checker by this name

jax.config.update("jax_numpy_rank_promotion", "raise")
pytest.register_assert_rewrite("tests.support.sources")
# Where arrays are computed, shapes and types are checked at every call.  Elsewhere mypy checks types, and a check of every call
# that a reader or a command makes would be half of the time of their tests.
COMPUTING = ("devices", "inputs", "metrics", "networks", "pipeline", "planning", "pocket", "sampling", "streaming")
SHAPED = ["storage.quantisation", "export.host_program", *COMPUTING]
jaxtyping.install_import_hook([f"sora_jax.{name}" for name in SHAPED], "tests.support.typecheck.check")

if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # workers of pytest-xdist inherit it, as do other processes
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="sora_jax-compiled-")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
COMPILED = os.environ["JAX_COMPILATION_CACHE_DIR"]
LITTLE_OPTIMISED_LEFT = threading.Event()  # their programs are in this process, see `little_optimised`
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
jax.config.update("jax_compilation_cache_dir", COMPILED)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model directory at toy width; tests that damage a model copy it first."""
    from tests.support.tiny_model import write_model

    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(autouse=True)
def _compiled_programs_stay_shared() -> Iterator[None]:
    """Undoes what a command under test did to JAX's cache: ``--compile-cache`` holds for the process."""
    yield
    os.environ["JAX_COMPILATION_CACHE_DIR"] = COMPILED
    if jax.config.jax_compilation_cache_dir != COMPILED:
        jax.config.update("jax_compilation_cache_dir", COMPILED)


@pytest.fixture(scope="module")
def little_optimised() -> Iterator[None]:
    """Programs of a module's tests are compiled in half of the time and run slower.

    For tests of behaviour, and of numbers within a tolerance.  Tests of bits, of agreement with the reference, of memory and of
    compiled texts take the compiler as users have it.
    """
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
    LITTLE_OPTIMISED_LEFT.set()


def forget_programs() -> None:
    """Forgets every program of this process, those that the package keeps itself too."""
    from sora_jax.pipeline import open_model
    from sora_jax.streaming import segment_loop

    jax.clear_caches()
    for programs in (open_model._compiled, segment_loop._compiled):
        programs.cache_clear()


@pytest.fixture
def small_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Conversion takes several slices for most matrices of a toy network, as at full size."""
    import convert_weights.values

    monkeypatch.setattr(convert_weights.values, "_SLICE_BYTES", 16384)


def pytest_itemcollected(item: pytest.Item) -> None:
    """Makes every test marked ``ci`` a slow one, so that one mark is enough."""
    if item.get_closest_marker("ci"):
        item.add_marker("slow")


def pytest_collection_finish() -> None:
    """Takes what was imported out of every later garbage collection, which would visit some million objects each time."""
    gc.collect()
    gc.freeze()


def pytest_runtest_setup(item: pytest.Item) -> None:
    if LITTLE_OPTIMISED_LEFT.is_set() and "little_optimised" not in item.fixturenames:
        forget_programs()
        LITTLE_OPTIMISED_LEFT.clear()
    if item.get_closest_marker("torch"):
        pytest.importorskip("torch", reason="the reference extra (torch, transformers, diffusers) is not installed")
    if item.get_closest_marker("gpu") and jax.default_backend() == "cpu":
        pytest.skip("no accelerator: JAX sees only the CPU")
