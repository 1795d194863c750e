"""Streamed sampling: the same bits whatever is retained, the same numbers as in memory, and no read too many."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sora_jax.devices import attention_choice
from sora_jax.sampling.adaptive import Reuse
from sora_jax.sampling.leap import Leap
from sora_jax.sampling.reuse import REUSE, Plan
from sora_jax.sampling.sampler import Result, Sampler, _run
from sora_jax.streaming.network import STDiT3Stream
from sora_jax.streaming.prefetch import LOADING
from sora_jax.streaming.profile import Profile
from tests.support import streamed
from tests.support.streamed import MAP_FROM_BYTES, NUM_BLOCKS

BACKENDS: dict[str, dict[str, Any]] = {
    "mmap": {"backend": "mmap", "map_from_bytes": MAP_FROM_BYTES},
    "host": {"backend": "host"},
}
NUM_STEPS = 10
ACROSS = 1e-6  # between programs: XLA may fuse differently; measured 0
EVERY_STEP = Plan.evaluate_at(range(NUM_STEPS), NUM_STEPS)
NO_LEAP = dataclasses.replace(Leap.dynamic(), min_share=1.0)  # the same program, never leaping
# One program per back-end has everything in it: guidance, merging, masked frames, dynamic leap and a plan.
EVERYTHING: dict[str, Any] = {
    "num_steps": NUM_STEPS,
    "guidance": 3.0,
    "merge_steps": 3,
    "frame_weights": np.asarray([[0.0, 0.5, 1.0, 1.0, 1.0]], np.float32),
    "leap": Leap.dynamic(),
    "plan": EVERY_STEP,
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return streamed.write_transformer(tmp_path_factory.mktemp("streamed"))


@pytest.fixture(scope="module")
def in_memory(directory: Path) -> Result:
    return streamed.sample(streamed.resident(directory), **EVERYTHING)


@pytest.fixture(scope="module", params=["mmap", pytest.param("host", marks=pytest.mark.slow)])  # host: as a portable callback
def stream(request: pytest.FixtureRequest, directory: Path) -> STDiT3Stream:
    return STDiT3Stream(directory, **BACKENDS[request.param])


@pytest.fixture(scope="module")
def nothing_retained(stream: STDiT3Stream) -> Result:
    stream.retention.count = 0
    with stream.open() as network:
        return streamed.sample(network, **EVERYTHING)


def blocks_read(stream: STDiT3Stream, run: Any) -> tuple[Any, float]:
    """Returns what ``run(network)`` returned, and the bytes it read in units of a block."""
    before = stream.blocks.bytes_read
    with stream.open() as network:
        result = run(network)
    layer = stream.blocks.reader.manifest.layer_bytes(stream.blocks.blocks[0])
    return result, (stream.blocks.bytes_read - before) / layer


@pytest.mark.parametrize("retained", range(NUM_BLOCKS + 1))
def test_every_retention_gives_the_numbers_of_the_resident_network(stream, nothing_retained, in_memory, retained):
    stream.retention.count = retained
    programs = _run._cache_size()
    result, read = blocks_read(stream, lambda network: streamed.sample(network, **EVERYTHING))
    assert _run._cache_size() == programs, "another retention compiled another program"
    np.testing.assert_array_equal(result.z, nothing_retained.z)
    assert np.linalg.norm(result.z - in_memory.z) <= ACROSS * np.linalg.norm(in_memory.z)
    np.testing.assert_array_equal(result.trace.leapt_NB, in_memory.trace.leapt_NB)
    assert result.trace.leapt_NB.any()
    assert 0 < result.trace.merged_N.sum() < len(result.trace.merged_N)

    evaluations = result.batch_evaluations
    assert evaluations < NUM_STEPS
    wanted = NUM_BLOCKS + (evaluations - 1) * (NUM_BLOCKS - retained)
    assert wanted <= read <= wanted + min(2, NUM_BLOCKS - retained)


@pytest.mark.parametrize("retained", [0, 3])
def test_reused_steps_read_nothing_but_what_is_read_ahead(stream, retained):
    stream.retention.count = retained
    options = {**EVERYTHING, "leap": NO_LEAP}
    plan = Plan.evaluate_at([0, 2, 3, 5, 6], NUM_STEPS)
    result, read = blocks_read(stream, lambda network: streamed.sample(network, **{**options, "plan": plan}))
    assert result.batch_evaluations == 5
    wanted = NUM_BLOCKS + 4 * (NUM_BLOCKS - retained)
    assert wanted <= read <= wanted + 2


def wait_until_settled(stream: STDiT3Stream) -> None:
    """Waits until nothing is being read, and nothing more to be read ahead."""
    prefetcher = stream.blocks._prefetcher
    with prefetcher._condition:
        assert prefetcher._condition.wait_for(
            lambda: prefetcher._next() is None and all(slot.state != LOADING for slot in prefetcher._slots), timeout=30
        )


# The rules reuse at some of the steps of this model: the thresholds were read off what a run measured.
ADAPTIVE = {"input": Reuse.by_input(0.8, extrapolate=True), "first block": Reuse.by_first_block(0.38)}


@pytest.fixture(scope="module", params=ADAPTIVE)
def adaptive(request: pytest.FixtureRequest, directory: Path) -> tuple[Reuse, Result]:
    """A rule and the sampling by it in memory."""
    rule = ADAPTIVE[request.param]
    return rule, streamed.sample(streamed.resident(directory), num_steps=NUM_STEPS, guidance=3.0, reuse=rule)


@pytest.mark.ci
@pytest.mark.parametrize("stream", ["mmap", pytest.param("host", marks=pytest.mark.slow)], indirect=True)
@pytest.mark.parametrize("retained", [0, 1])
@pytest.mark.parametrize("slower", ["reading", "computing"])
def test_steps_that_reuse_by_a_rule_read_no_block_or_the_first_alone(stream, adaptive, retained, slower, monkeypatch):
    rule, in_memory = adaptive
    stream.retention.count = retained
    if slower == "computing":  # every block computes until everything that may be read ahead has been
        arrive = stream.blocks.arrive

        def arrive_late(index: int, outputs: Any) -> None:
            wait_until_settled(stream)
            arrive(index, outputs)

        monkeypatch.setattr(stream.blocks, "arrive", arrive_late)
    options = {"num_steps": NUM_STEPS, "guidance": 3.0, "reuse": rule}
    result, read = blocks_read(stream, lambda network: streamed.sample(network, **options))
    np.testing.assert_array_equal(result.trace.why_N, in_memory.trace.why_N)
    np.testing.assert_allclose(result.trace.change_N, in_memory.trace.change_N, rtol=1e-4)
    assert np.linalg.norm(result.z - in_memory.z) <= ACROSS * np.linalg.norm(in_memory.z)

    reused = int((result.trace.kind_N == REUSE).sum())
    full = NUM_STEPS - reused
    assert 2 <= reused <= NUM_STEPS - 3, result.trace.change_N
    first_only = rule.watched == "first_block"
    assert result.batch_evaluations == full + first_only * reused / NUM_BLOCKS
    wanted = NUM_BLOCKS + (full - 1) * (NUM_BLOCKS - retained) + (first_only and not retained) * reused
    assert wanted <= read <= wanted + 2


def test_a_smaller_budget_holds_from_the_next_block_on(stream, nothing_retained):
    stream.retention.count = NUM_BLOCKS
    held: list[int] = []

    def lower(carry: Any) -> None:
        held.append(len(stream.blocks.retained))
        if carry.step == 2:
            stream.retention.count = 1

    result, read = blocks_read(stream, lambda network: streamed.sample(network, callback=lower, **EVERYTHING))
    np.testing.assert_array_equal(result.z, nothing_retained.z)
    assert held[:2] == [NUM_BLOCKS, NUM_BLOCKS]
    assert set(held[2:]) == {1}
    wanted = NUM_BLOCKS + (result.batch_evaluations - 2) * (NUM_BLOCKS - 1)
    assert wanted <= read <= wanted + 2


def test_what_was_read_ahead_is_let_go_with_the_run(stream):
    stream.retention.count = 2
    with stream.open() as network:
        streamed.sample(network, **EVERYTHING)
        assert stream.blocks.retained == ("spatial_blocks.0", "temporal_blocks.0")
    assert stream.blocks.retained == ()
    assert stream.blocks._prefetcher.holding() == set()
    with pytest.raises(RuntimeError, match="not open"):
        streamed.sample(network, **EVERYTHING)


@pytest.mark.ci
def test_the_portable_callback_delivers_the_same(directory, in_memory):
    stream = STDiT3Stream(directory, backend="host", portable=True, retained=1)
    result, _ = blocks_read(stream, lambda network: streamed.sample(network, **EVERYTHING))
    assert np.linalg.norm(result.z - in_memory.z) <= ACROSS * np.linalg.norm(in_memory.z)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["mmap", "host"])
def test_portion_by_portion_the_numbers_and_every_retention_are_the_same(directory, in_memory, monkeypatch, backend):
    """What many tokens do: a frame, or a place, of one row of the batch at a time."""
    monkeypatch.setattr(attention_choice, "STREAMED_BYTES", 1)
    stream, results = STDiT3Stream(directory, **BACKENDS[backend]), []
    for retained in (0, NUM_BLOCKS):
        stream.retention.count = retained
        results.append(blocks_read(stream, lambda network: streamed.sample(network, **EVERYTHING))[0].z)
    np.testing.assert_array_equal(*results)
    assert np.linalg.norm(results[0] - in_memory.z) <= ACROSS * np.linalg.norm(in_memory.z)


def test_the_profile_is_a_trace_of_every_block(stream, tmp_path):
    stream.retention.count, stream.profile = 1, Profile()
    result, read = blocks_read(stream, lambda network: streamed.sample(network, **EVERYTHING))
    profile, stream.profile = stream.profile, None
    evaluations = int(result.batch_evaluations)
    events = json.loads(profile.save(tmp_path / "trace.json").read_text())["traceEvents"]
    by_lane = {lane: [event for event in events if event.get("cat") == lane] for lane in ("load", "wait", "compute")}
    assert len(by_lane["compute"]) == evaluations * NUM_BLOCKS
    assert len(by_lane["load"]) == read
    assert len(by_lane["wait"]) == NUM_BLOCKS + (evaluations - 1) * (NUM_BLOCKS - 1)
    for lane in by_lane.values():
        ends = [event["ts"] + event["dur"] for event in lane]
        assert all(end <= later["ts"] + 0.01 for end, later in zip(ends[:-1], lane[1:], strict=True))


@pytest.mark.parametrize(
    ("stored", "backend"),
    [
        pytest.param("int8", "mmap", marks=pytest.mark.ci),
        pytest.param("bfloat16", "host", marks=pytest.mark.slow),
        pytest.param("int8", "host", marks=pytest.mark.slow),
        pytest.param("bfloat16", "mmap", marks=pytest.mark.slow),
    ],
)
def test_stored_bfloat16_and_int8_stream_too(tmp_path, stored, backend):
    directory = streamed.write_transformer(tmp_path, dtype=stored)
    expected = np.asarray(streamed.sample(streamed.resident(directory)).z)
    stream = STDiT3Stream(directory, retained=1, **BACKENDS[backend])
    result, read = blocks_read(stream, streamed.sample)
    assert np.linalg.norm(result.z - expected) <= ACROSS * np.linalg.norm(expected)
    assert NUM_BLOCKS + 2 * (NUM_BLOCKS - 1) <= read <= NUM_BLOCKS + 2 * (NUM_BLOCKS - 1) + 2


def temporary_bytes(network: Any, *, merge_steps: int | None) -> int:
    sampler = Sampler.create(streamed.velocity(network), streamed.schedule(3), merge_steps=merge_steps)
    leaves, structure = jax.tree.flatten((sampler, sampler.start(streamed.noise()), jnp.int32(3)))
    program = jax.jit(lambda leaves: _run(*structure.unflatten(leaves))).lower(leaves).compile()
    return program.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize(
    ("stored", "compute", "backend"),
    [
        pytest.param("int8", "float32", "mmap", marks=pytest.mark.ci),
        *(
            pytest.param(stored, compute, backend, marks=pytest.mark.slow)
            for stored in ("float32", "bfloat16", "int8")
            for compute in ("float32", "bfloat16")
            for backend in BACKENDS
            if (stored, compute, backend) != ("int8", "float32", "mmap")
        ),
    ],
)
@pytest.mark.parametrize("merge_steps", [None, pytest.param(2, marks=pytest.mark.slow)])
def test_no_work_on_weights_is_moved_out_of_its_block(tmp_path, stored, compute, backend, merge_steps):
    """Temporary memory of a program is that of a block, not of all: one dequantised or cast layer, and activations."""
    width = 128
    directory = streamed.write_transformer(tmp_path, dtype=stored, width=width)
    stream = STDiT3Stream(directory, dtype=compute, **BACKENDS[backend])
    with stream.open() as network:
        found = temporary_bytes(network, merge_steps=merge_steps)
    numbers = sum(np.prod(leaf.shape) for leaf in stream.blocks.program.results(0).values() if len(leaf.shape) == 2)
    cast = {"float32": 0, "bfloat16": 2}[compute] if stored == compute else 4 if compute == "float32" else 2
    delivered = stream.blocks.reader.manifest.layer_bytes("spatial_blocks.0") if backend == "host" else 0
    activations = 40 * 4 * width * 30 + 4 * width * width
    assert found <= 1.1 * (numbers * cast + delivered) + activations, jax.tree.map(int, (found, numbers, delivered))
