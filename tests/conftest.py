"""What every test starts from: the CPU, no silent rank promotion, and shapes checked at every annotated boundary.

Matmul precision is left as the library sets it, so that a tolerance measures the product and not a test setting.
JAX_PLATFORMS in the environment overrides the CPU, for the tests marked gpu.
"""

import os
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jaxtyping
import pytest

import tests.support.typecheck  # noqa: F401  # the import hook finds the checker by this name

jax.config.update("jax_numpy_rank_promotion", "raise")
pytest.register_assert_rewrite("tests.support.sources")
jaxtyping.install_import_hook("sora_jax", "tests.support.typecheck.check")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model directory at toy width; tests that damage a model copy it first."""
    from tests.support.tiny_model import write_model

    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def small_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Conversion takes several slices for most matrices of a toy network, as at full size."""
    import convert_weights.values

    monkeypatch.setattr(convert_weights.values, "_SLICE_BYTES", 16384)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("torch"):
        pytest.importorskip("torch", reason="the reference extra (torch, transformers, diffusers) is not installed")
    if item.get_closest_marker("gpu") and jax.default_backend() == "cpu":
        pytest.skip("no accelerator: JAX sees only the CPU")
