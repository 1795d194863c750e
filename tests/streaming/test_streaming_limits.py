"""A hard limit on memory, and Ctrl-C, in processes of their own."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks._support import streaming_model
from tests.support import streamed

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux, which says what a process holds"),
]
WIDTH = 512  # a layer of 17 MB stands out from what the allocator does

LIMITED = """
import resource, sys
import jax
import numpy as np
from pathlib import Path
from sora_jax.sampling.sampler import Sampler
from sora_jax.streaming.network import STDiT3Stream
from tests.support import streamed

def held(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))

stream = STDiT3Stream(sys.argv[1], backend="host", retained=0)
layer = stream.blocks.reader.manifest.layer_bytes(stream.blocks.blocks[0])
with stream.open() as network:
    sampler = Sampler.create(streamed.velocity(network), streamed.schedule(6))
    free = np.asarray(sampler.run(sampler.start(streamed.noise()), 6).z)  # warms up, with nothing retained
    minimum = held("VmHWM")
    budget = int(float(sys.argv[2]) * minimum) + int(float(sys.argv[3]) * layer)
    limit = held("VmSize") + budget - held("VmRSS")
    if sys.argv[4] == "planned":
        stream.retention.fixed_bytes = minimum
        stream.retention.budget = budget
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    limited = np.asarray(sampler.run(sampler.start(streamed.noise()), 6).z)
    assert np.array_equal(free, limited)
    print("retained", len(stream.blocks.retained))
"""

INTERRUPTED = """
import contextlib, signal, sys, time
from sora_jax.streaming.network import STDiT3Stream
from tests.support import streamed

@contextlib.contextmanager
def slow(layer, num_bytes):
    time.sleep(0.05)
    yield

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs start with it ignored
stream = STDiT3Stream(sys.argv[1], backend=sys.argv[2], retained=0, around=slow)
with stream.open() as network:
    streamed.sample(network, num_steps=200, callback=lambda carry: print(int(carry.step), flush=True))
"""


GUARDED = """
import contextlib, sys
from pathlib import Path
import jax
from benchmarks._support import streaming_model
from benchmarks._support.machine import memory
from sora_jax.streaming.network import STDiT3Stream
from sora_jax.process import resident_bytes

lowered, held = None, []

@contextlib.contextmanager
def watched(layer, num_bytes):
    if lowered is not None and layer == "spatial_blocks.4":
        stream.retention.budget = lowered
    if lowered is not None and layer in ("spatial_blocks.5", "temporal_blocks.5"):
        held.append(resident_bytes())
    yield

def peak_of(sampler, carry, until):
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    return jax.block_until_ready(sampler.run(carry, until)), memory()["peak_bytes"]

stream = STDiT3Stream(sys.argv[1], backend=sys.argv[2], around=watched)
retention, layer = stream.retention, stream.blocks.reader.manifest.layer_bytes(stream.blocks.blocks[0])
size = dict(frames=8, rows=16, columns=16, num_steps=8)  # 512 tokens in each of two rows
with stream.open() as network:
    retention.count = 0
    sampler, carry = streaming_model.make_sampler(network, **size)
    jax.block_until_ready(sampler.run(carry, 1))
    _, needed = peak_of(sampler, carry, 1)
retention.fixed_bytes = 0  # a plan that is far too low: it has more than twice the layers that fit retained
retention.budget = budget = needed + 5 * layer + layer // 2
assert retention.count >= 11, retention.count
with stream.open() as network:
    sampler, carry = streaming_model.make_sampler(network, **size)
    carry, first = peak_of(sampler, carry, 1)
    carry, later = peak_of(sampler, carry, 3)
    retained = len(stream.blocks.retained)
    lowered = needed + 2 * layer + layer // 2
    carry = jax.block_until_ready(sampler.run(carry, 4))
    carry, after = peak_of(sampler, carry, 6)
    print(*(int(number) for number in (needed, budget, first, later, retained)))
    print(*(int(number) for number in (lowered, max(held), after, len(stream.blocks.retained))))
"""


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return streamed.write_transformer(tmp_path_factory.mktemp("limited"), width=WIDTH)


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve blocks of the released width, 1 GB."""
    return streaming_model.write(tmp_path_factory.mktemp("wide"), num_blocks=12)


def child(script: str, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", script, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ
    )


@pytest.mark.parametrize(("share", "layers", "retained"), [(1.0, 0.0, 0), (1.0, 2.5, 2)])
def test_a_run_keeps_a_hard_limit(directory, share, layers, retained):
    process = child(LIMITED, str(directory), str(share), str(layers), "planned")
    output, errors = process.communicate(timeout=900)
    assert process.returncode == 0, errors
    assert output.split() == ["retained", str(retained)]


@pytest.mark.parametrize(
    ("plan", "error"),
    [("planned", "is too small: the transformer needs"), ("unplanned", "MemoryError|RESOURCE_EXHAUSTED: Out of memory")],
)
def test_less_than_the_minimum_is_refused_and_without_a_plan_an_error(directory, plan, error):
    process = child(LIMITED, str(directory), "0.8", "0", plan)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1, errors
    assert re.search(error, errors), errors


@pytest.mark.parametrize("backend", ["host", "mmap"])
def test_an_interrupt_ends_the_run_within_a_step(directory, backend):
    process = child(INTERRUPTED, str(directory), backend)
    assert process.stdout is not None
    for line in process.stdout:
        if int(line) == 3:
            break
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    start = time.monotonic()
    output, errors = process.communicate(timeout=120)
    assert process.returncode in (-signal.SIGINT, 1, 130)
    assert "KeyboardInterrupt" in errors.splitlines()[-1]
    assert len(output.splitlines()) <= 2, "steps went on after the interrupt"
    assert time.monotonic() - start < 60


@pytest.mark.parametrize("backend", ["host", "mmap"])
def test_measuring_keeps_the_budget_at_real_width_whatever_was_planned(wide, backend):
    """Peaks of VmHWM, forgotten in between; the budget is lowered while block 8 of 12 is read."""
    process = child(GUARDED, str(wide), backend)
    output, errors = process.communicate(timeout=900)
    assert process.returncode == 0, errors
    (_, budget, first, later, retained), (lowered, held, after, kept) = (
        [int(number) for number in line.split()] for line in output.splitlines()
    )
    assert max(first, later) <= budget, output
    assert retained in (4, 5), output
    assert held <= lowered, output  # two blocks on
    assert after <= lowered, output
    assert kept in (1, 2), output
