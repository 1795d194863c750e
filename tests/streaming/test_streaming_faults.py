"""What goes wrong with files while they are streamed: one line that names layer and file, no hang, and the next call works."""

import contextlib
import errno
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sora_jax.storage.directory import ModelDirectoryError
from sora_jax.streaming.hosted import HostedBlocks
from sora_jax.streaming.network import STDiT3Stream
from tests.support import streamed

pytestmark = pytest.mark.usefixtures("little_optimised")

LAYER, PARAMETER = "temporal_blocks.1", "mlp.fc1.kernel"
SLOW_S = 0.05


class Faults:
    """What happens around the reads of layers; entered by the streams of this module."""

    def __init__(self) -> None:
        self.before: Callable[[str], Any] = lambda _layer: None

    @contextlib.contextmanager
    def __call__(self, layer: str, num_bytes: int) -> Iterator[None]:
        self.before(layer)
        yield


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return streamed.write_transformer(tmp_path_factory.mktemp("original"))


@pytest.fixture(scope="module")
def faults() -> Faults:
    return Faults()


@pytest.fixture(scope="module", params=["host", "mmap"])
def stream(request: pytest.FixtureRequest, original: Path, faults: Faults) -> Iterator[STDiT3Stream]:
    """A stream of a copy, used by all tests of a back-end: each finds it working although the ones before did not end well."""
    directory = original.with_name(f"damaged-{request.param}")
    shutil.copytree(original, directory)
    yield STDiT3Stream(
        directory, backend=request.param, retained=1, map_from_bytes=streamed.MAP_FROM_BYTES, around=faults, stall_s=20
    )
    assert not [thread for thread in threading.enumerate() if thread.name == "layer-reader"]


@pytest.fixture(scope="module")
def expected(stream: STDiT3Stream) -> np.ndarray:
    return sampled(stream)


@pytest.fixture(autouse=True)
def works_afterwards(stream: STDiT3Stream, expected: np.ndarray, original: Path, faults: Faults) -> Iterator[None]:
    """Puts the file back as it was after a test, and samples."""
    yield
    faults.before = lambda _layer: None
    path = chunk(stream)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    shutil.copyfile(original / path.relative_to(directory_of(stream)), path)
    np.testing.assert_array_equal(sampled(stream), expected)


def directory_of(stream: STDiT3Stream) -> Path:
    return stream.blocks.reader.manifest.path.parent


def chunk(stream: STDiT3Stream) -> Path:
    return stream.blocks.reader.manifest.chunk_path(f"{LAYER}.{PARAMETER}")


def sampled(stream: STDiT3Stream, callback: Callable[[Any], Any] | None = None) -> np.ndarray:
    with stream.open() as network:
        return np.asarray(streamed.sample(network, callback=callback).z)


def after_the_first_step(action: Callable[[], Any]) -> Callable[[Any], None]:
    def callback(carry: Any) -> None:
        assert carry.step == 1, "another step ran to its end after the fault"
        action()

    return callback


def expect_fault(stream: STDiT3Stream, problem: str, *, callback: Callable[[Any], Any] | None = None) -> None:
    with pytest.raises(ModelDirectoryError) as raised:
        sampled(stream, callback)
    message = str(raised.value)
    assert f"layer {LAYER}" in message
    assert problem in message
    assert str(chunk(stream)) in message
    assert "\n" not in message


def test_truncated_before_opening(stream):
    os.truncate(chunk(stream), 100)
    expect_fault(stream, "has 100 bytes, expected 4112; convert stdit3 again")


def test_truncated_during_the_run(stream):
    expect_fault(stream, "has 100 bytes", callback=after_the_first_step(lambda: os.truncate(chunk(stream), 100)))


def test_truncated_while_it_is_read(stream, faults):
    """After the check before reading: tensorstore, or populating pages beyond the end, fails."""
    reads = []

    def truncate(layer: str) -> None:
        reads.append(layer)
        if reads.count(LAYER) == 2:
            os.truncate(chunk(stream), 0)

    faults.before = truncate
    expect_fault(stream, "has 0 bytes, expected 4112")
    assert reads.count(LAYER) == 2


def test_removed_before_opening(stream):
    chunk(stream).unlink()
    expect_fault(stream, "is missing")


def test_removed_during_the_run(stream):
    expect_fault(stream, "is missing", callback=after_the_first_step(chunk(stream).unlink))


def other(data: bytes) -> bytes:
    """The file with the sign of one number turned."""
    return data[:1003] + bytes([data[1003] ^ 0x80]) + data[1004:]


def write_over(path: Path, data: bytes) -> None:
    path.write_bytes(data)


def replace(path: Path, data: bytes) -> None:
    path.with_suffix(".new").write_bytes(data)
    path.with_suffix(".new").rename(path)


CHECKSUM = "does not have the checksum that network.json records; convert stdit3 again with --overwrite"


def test_changed_before_the_first_read(stream):
    write_over(chunk(stream), other(chunk(stream).read_bytes()))
    expect_fault(stream, CHECKSUM)


@pytest.mark.parametrize("change", [write_over, replace])
@pytest.mark.parametrize("retained", [1, streamed.NUM_BLOCKS])
def test_changed_during_the_run(stream, change, retained):
    """One text, whichever back-end notices; a retained block of the host's is memory, which a file no longer changes."""
    stream.retention.count = retained
    data = other(chunk(stream).read_bytes())
    try:
        if retained > 1 and isinstance(stream.blocks, HostedBlocks):
            sampled(stream, lambda carry: change(chunk(stream), data) if carry.step == 1 else None)
        else:
            expect_fault(stream, CHECKSUM, callback=after_the_first_step(lambda: change(chunk(stream), data)))
    finally:
        stream.retention.count = 1


@pytest.mark.parametrize("change", [write_over, replace])
def test_written_again_with_the_same_values_during_the_run(stream, expected, change):
    data = chunk(stream).read_bytes()
    found = sampled(stream, lambda carry: change(chunk(stream), data) if carry.step == 1 else None)
    np.testing.assert_array_equal(found, expected)


def test_the_whole_model_replaced_during_the_run(stream, original, tmp_path):
    """Another generation of the network: named as such, and not as damage."""
    directory = shutil.copytree(original, tmp_path / "model")
    backend = "host" if isinstance(stream.blocks, HostedBlocks) else "mmap"
    second = STDiT3Stream(directory, backend=backend, retained=1, map_from_bytes=streamed.MAP_FROM_BYTES)

    def convert_again(carry: Any) -> None:
        if carry.step == 1:
            streamed.write_transformer(directory, seed=1)

    with pytest.raises(ModelDirectoryError, match=r"/stdit3 was replaced or removed after it was opened; open the model again"):
        sampled(second, convert_again)


@pytest.mark.parametrize(("code", "text"), [(errno.EACCES, "Permission denied"), (errno.EIO, "Input/output error")])
def test_unreadable(stream, faults, code, text):
    def refuse(layer: str) -> None:
        if layer == LAYER:
            raise OSError(code, os.strerror(code), str(chunk(stream)))

    faults.before = refuse
    expect_fault(stream, text)


def test_an_error_that_is_not_of_the_file_comes_out_as_it_was(stream, faults):
    class Unexpected(Exception):
        pass

    def fail(layer: str) -> None:
        if layer == LAYER:
            raise Unexpected("as it was")

    faults.before = fail
    with pytest.raises(Unexpected, match=r"^as it was$"):
        sampled(stream)


def test_an_interrupt_in_the_reading_thread_ends_the_run(stream, faults):
    def interrupt(layer: str) -> None:
        if layer == LAYER:
            raise KeyboardInterrupt

    faults.before = interrupt
    with pytest.raises(KeyboardInterrupt):
        sampled(stream)


def test_an_interrupt_between_two_steps_ends_the_run(stream):
    def interrupt(_carry: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sampled(stream, interrupt)


def test_a_slow_disk_only_takes_longer(stream, faults, expected):
    faults.before = lambda _layer: time.sleep(SLOW_S)
    np.testing.assert_array_equal(sampled(stream), expected)


def test_a_disk_that_does_not_answer_is_an_error(stream, faults, original):
    answers = threading.Event()

    def hang(layer: str) -> None:
        if layer == LAYER:
            assert answers.wait(60)

    faults.before = hang
    stream.blocks._prefetcher.stall_s = 0.2
    try:
        with pytest.raises(TimeoutError, match=rf"layer {LAYER} .* was not read within 0.2 s"):
            sampled(stream)
    finally:
        answers.set()
        stream.blocks._prefetcher.stall_s = 20
    deadline = time.monotonic() + 10
    while any(thread.name == "layer-reader" for thread in threading.enumerate()):
        assert time.monotonic() < deadline, "the reading thread did not end with its read"
        time.sleep(0.01)


def test_one_stream_serves_one_run_at_a_time(stream):
    with stream.open(), pytest.raises(RuntimeError, match="in use by another run"), stream.open():
        pass


def test_two_runs_on_one_directory(stream, expected):
    second = STDiT3Stream(directory_of(stream), backend="host", retained=0)
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(sampled, [stream, second]))
    np.testing.assert_array_equal(results[0], expected)
    assert np.linalg.norm(results[1] - expected) <= 1e-6 * np.linalg.norm(expected)
