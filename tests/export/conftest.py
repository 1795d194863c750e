"""Exports whose groups of stages run in the process of the tests: what is imported and compiled serves all of them."""

import os

import pytest

from sora_jax.export import exporter, worker


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporter, "_run_process", lambda folder, names, meter: worker.run_group(folder, names, meter.advance))
    # A compile cache inside the export would be gone for the next test, and JAX opens only one.
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", os.environ.get("JAX_COMPILATION_CACHE_DIR", ""))
