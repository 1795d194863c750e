"""A transformer streamed from a server: the bits of the folder, its blocks as they are needed, faults in one line, no hang."""

import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sora_jax.storage.directory import ModelDirectoryError, open_network
from sora_jax.storage.location import local_path
from sora_jax.streaming.network import STDiT3Stream
from tests.support import streamed
from tests.support.http_server import Handler, Request, Site, impatient, serving

__all__ = ["impatient"]  # a fixture
pytestmark = pytest.mark.usefixtures("little_optimised", "impatient")

LAYER, PARAMETER = "temporal_blocks.1", "mlp.fc1.kernel"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return streamed.write_transformer(tmp_path_factory.mktemp("original"))


@pytest.fixture(scope="module")
def served(original: Path) -> Iterator[Site]:
    with serving(shutil.copytree(original, original.with_name("served"))) as found:
        yield found


@pytest.fixture(scope="module")
def stream(served: Site) -> Iterator[STDiT3Stream]:
    """Used by all tests: each finds it working although the ones before did not end well."""
    yield STDiT3Stream(served.url, retained=1, stall_s=20)
    assert not [thread for thread in threading.enumerate() if thread.name == "layer-reader"]


@pytest.fixture(scope="module")
def expected(original: Path, impatient: None, little_optimised: None) -> np.ndarray:
    return sampled(STDiT3Stream(original, backend="host", retained=1))


def sampled(stream: STDiT3Stream, callback: Callable[[Any], Any] | None = None) -> np.ndarray:
    with stream.open() as network:
        return np.asarray(streamed.sample(network, callback=callback).z)


def test_the_bits_are_those_of_the_folder_and_each_block_is_fetched_as_it_is_needed(
    stream: STDiT3Stream, served: Site, expected: np.ndarray
) -> None:
    served.requests.clear()
    np.testing.assert_array_equal(sampled(stream), expected)
    manifest, evaluations = stream.blocks.reader.manifest, 3
    for number, layer in enumerate(stream.blocks.blocks):
        files = [request for request in served.requests if request.path.startswith(f"stdit3/{layer}/")]
        once = len(manifest.names(layer))
        if number == 0:  # retained
            assert len(files) == once + 1  # its table stays in memory besides: adaptive reuse decides by it, and reads no block
        else:  # and the first of them once more, read ahead for an evaluation that does not come
            assert evaluations * once <= len(files) <= (evaluations + 1) * once
        sizes = {manifest.parameters[name].file_bytes(2) for name in manifest.names(layer)}
        assert {request.num_bytes for request in files} == sizes


def hang(handler: Handler, request: Request) -> bool:
    if LAYER in request.path:
        threading.Event().wait(3)
    return False


def refuse(handler: Handler, request: Request) -> bool:
    if LAYER in request.path:
        handler.send(503, b"")
    return LAYER in request.path


def reset(handler: Handler, request: Request) -> bool:
    if LAYER in request.path:
        handler.reset()
    return LAYER in request.path


def turned(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[1003] ^= 0x80
    path.write_bytes(data)


FAULTS: dict[str, tuple[Callable[[Site, Path], Any], str]] = {
    "stall": (lambda site, _: setattr(site, "fault", hang), "too slow"),
    "503": (lambda site, _: setattr(site, "fault", refuse), "HTTP 503"),
    "reset": (lambda site, _: setattr(site, "fault", reset), "cannot be read"),
    "404": (lambda _, path: path.unlink(), "is missing"),
    "truncated": (lambda _, path: path.write_bytes(path.read_bytes()[:100]), "has 100 bytes, expected"),
    "changed": (lambda _, path: turned(path), "does not have the checksum that network.json records"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_during_the_run_is_one_line_and_the_next_run_works(
    stream: STDiT3Stream, served: Site, expected: np.ndarray, fault: str
) -> None:
    damage, problem = FAULTS[fault]
    path = local_path(open_network(served.folder, "stdit3").chunk_path(f"{LAYER}.{PARAMETER}"))
    data = path.read_bytes()

    def after_the_first_step(carry: Any) -> None:
        assert carry.step == 1, "another step ran to its end after the fault"
        damage(served, path)

    with pytest.raises(ModelDirectoryError) as raised:
        sampled(stream, after_the_first_step)
    message = str(raised.value)
    assert message.startswith(f"stdit3 layer {LAYER}: parameter file {served.url}/stdit3/{LAYER}/")
    assert problem in message
    assert "\n" not in message
    served.fault = lambda _handler, _request: False
    path.write_bytes(data)
    np.testing.assert_array_equal(sampled(stream), expected)


def test_maps_of_an_address_are_refused(served: Site) -> None:
    with pytest.raises(ValueError, match=rf"'mmap' maps local files, and {served.url}/stdit3 is none; use 'host'"):
        STDiT3Stream(served.url, backend="mmap", retained=0)
