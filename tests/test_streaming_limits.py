"""A hard limit on memory, and Ctrl-C, in processes of their own."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests import streamed

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
from sora_jax.sampler import Sampler
from sora_jax.streaming.network import STDiT3Stream
from tests import streamed

def held(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))

stream = STDiT3Stream(sys.argv[1], backend="host", retained=0)
layer = stream.blocks.source.num_bytes(stream.blocks.blocks[0])
with stream.open() as network:
    sampler = Sampler.create(streamed.velocity(network), streamed.schedule(6))
    free = np.asarray(sampler.run(sampler.start(streamed.noise()), 6).z)  # warms up, with nothing retained
    minimum = held("VmHWM")
    budget = int(float(sys.argv[2]) * minimum) + int(float(sys.argv[3]) * layer)
    limit = held("VmSize") + budget - held("VmRSS")
    stream.retention.fixed_bytes = minimum
    stream.retention.budget = budget
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    limited = np.asarray(sampler.run(sampler.start(streamed.noise()), 6).z)
    assert np.array_equal(free, limited)
    print("retained", len(stream.blocks.retained))
"""

INTERRUPTED = """
import contextlib, sys, time
from sora_jax.streaming.network import STDiT3Stream
from tests import streamed

@contextlib.contextmanager
def slow(layer, num_bytes):
    time.sleep(0.05)
    yield

stream = STDiT3Stream(sys.argv[1], backend=sys.argv[2], retained=0, around=slow)
with stream.open() as network:
    streamed.sample(network, num_steps=200, callback=lambda carry: print(int(carry.step), flush=True))
"""


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return streamed.write_transformer(tmp_path_factory.mktemp("limited"), width=WIDTH)


def child(script: str, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", script, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ
    )


@pytest.mark.parametrize(("share", "layers", "retained"), [(1.0, 0.0, 0), (1.0, 2.5, 2)])
def test_a_run_keeps_a_hard_limit(directory, share, layers, retained):
    process = child(LIMITED, str(directory), str(share), str(layers))
    output, errors = process.communicate(timeout=900)
    assert process.returncode == 0, errors
    assert output.split() == ["retained", str(retained)]


def test_less_than_the_minimum_is_refused(directory):
    process = child(LIMITED, str(directory), "0.8", "0")
    _, errors = process.communicate(timeout=900)
    assert process.returncode == 1
    assert "is too small: the transformer needs" in errors.splitlines()[-1]


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
