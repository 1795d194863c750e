"""A second streamed pipeline of the same shapes compiles nothing, and one that is dropped leaves nothing behind."""

import contextlib
import gc
import shutil
import weakref
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest

from sora_jax.pipeline.pipeline import Pipeline
from sora_jax.storage.checkpoint import load_network, save_network
from sora_jax.streaming import callbacks
from sora_jax.streaming.network import STDiT3Stream
from tests.support import streamed

PROMPT = "a red circle moves right on a blue background"
COMPILED = "/jax/core/compile/backend_compile_duration"


@contextlib.contextmanager
def compilations() -> Iterator[list[str]]:
    """Yields a list that gets an entry for every program that XLA compiles meanwhile."""
    counted: list[str] = []

    def count(event: str, _duration: float, **_: object) -> None:
        if event == COMPILED:
            counted.append(event)

    jax.monitoring.register_event_duration_secs_listener(count)
    try:
        yield counted
    finally:
        jax.monitoring.unregister_event_duration_listener(count)


def test_compilations_are_counted() -> None:
    with compilations() as counted:
        jax.jit(lambda x: 3 * x + 17)(np.ones(5, np.float32))
    assert len(counted) >= 1


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two transformers of the same shapes with other values."""
    return [streamed.write_transformer(tmp_path_factory.mktemp("shapes"), seed=seed) for seed in (0, 1)]


@pytest.mark.parametrize("backend", ["host", pytest.param("mmap", marks=pytest.mark.slow)])
def test_a_second_stream_of_the_same_shapes_compiles_nothing_and_a_dropped_one_is_gone(
    directories: list[Path], backend: str
) -> None:
    def run(directory: Path, retained: int) -> tuple[np.ndarray, weakref.ref]:
        stream = STDiT3Stream(
            directory, backend=backend, retained=retained, portable=False, map_from_bytes=streamed.MAP_FROM_BYTES
        )
        with stream.open() as network:
            z = np.asarray(streamed.sample(network).z)
        return z, weakref.ref(stream.blocks)

    first, dropped = run(directories[0], retained=1)
    gc.collect()
    assert dropped() is None
    assert not callbacks._ANSWERS
    with compilations() as counted:
        again, _ = run(directories[0], retained=3)
        other, dropped = run(directories[1], retained=0)
    assert not counted
    np.testing.assert_array_equal(again, first)
    assert not np.array_equal(other, first), "the program kept the other's weights"
    gc.collect()
    assert dropped() is None


def test_two_open_streams_answer_their_own_programs(directories: list[Path]) -> None:
    streams = [STDiT3Stream(directory, backend="host", retained=1) for directory in directories]
    alone = []
    for stream in streams:
        with stream.open() as network:
            alone.append(np.asarray(streamed.sample(network).z))
    with streams[0].open() as first, streams[1].open() as second:
        together = [np.asarray(streamed.sample(network).z) for network in (second, first)]
    np.testing.assert_array_equal(together[1], alone[0])
    np.testing.assert_array_equal(together[0], alone[1])


def test_a_second_pipeline_with_a_budget_compiles_nothing(tiny_model: Path, tmp_path: Path) -> None:
    """Other values and another budget: all three networks and the sampler have their programs already."""
    first = Pipeline.from_pretrained(tiny_model, memory_budget="8GB")(PROMPT)
    other = shutil.copytree(tiny_model, tmp_path / "model")
    config, flat = load_network(other, "stdit3")
    turned = {name: -array if name.startswith("final.") else array for name, array in flat.items()}
    save_network(other, "stdit3", config, turned, overwrite=True)
    with compilations() as counted:
        pipe = Pipeline.from_pretrained(other, memory_budget="4GB")
        clip = pipe(PROMPT)
    assert not counted
    assert not np.array_equal(clip.latents, first.latents)
    dropped = weakref.ref(pipe.networks)
    del pipe
    gc.collect()
    assert dropped() is None
