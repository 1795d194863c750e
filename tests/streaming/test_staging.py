"""Reading parameters on a thread: the right bytes, a bounded number of buffers, faults that name layer and file, no leaks."""

import os
import threading
from pathlib import Path

import numpy as np
import pytest

from sora_jax.storage.checkpoint import save_network
from sora_jax.storage.directory import Manifest, ModelDirectoryError
from sora_jax.streaming.rows import read_rows
from sora_jax.streaming.staging import Staging, Verified, group_bytes
from tests.support.tiny_model import CONFIG, random_flat

GROUPS = [["block.0.attn.q.kernel", "block.0.attn_norm.scale"], ["block.0.mlp.wi_0.kernel"], ["final.scale"]]


@pytest.fixture(scope="module")
def flat() -> dict[str, np.ndarray]:
    return random_flat("t5")


@pytest.fixture
def manifest(tmp_path: Path, flat: dict[str, np.ndarray]) -> Manifest:
    return save_network(tmp_path, "t5", CONFIG.t5, flat)


def read(manifest: Manifest, *, num_slots: int = 2, verified: Verified | None = None, stall_s: float = 60.0) -> list[dict]:
    verified = Verified() if verified is None else verified
    with Staging(manifest, GROUPS, num_slots=num_slots, verified=verified, stall_s=stall_s) as staging:
        return [{name: array.copy() for name, array in arrays.items()} for arrays in staging]


@pytest.mark.parametrize("num_slots", [1, 2, 5])
def test_groups_arrive_in_order_with_the_stored_bytes(manifest: Manifest, flat: dict[str, np.ndarray], num_slots: int) -> None:
    found = read(manifest, num_slots=num_slots)
    assert [list(arrays) for arrays in found] == GROUPS
    for arrays in found:
        for name, array in arrays.items():
            np.testing.assert_array_equal(array, flat[name])
    assert not threads()


@pytest.mark.parametrize("num_slots", [1, 2])
def test_no_more_groups_are_read_than_there_are_slots(
    manifest: Manifest, num_slots: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    addresses, preadv = set(), os.preadv

    def recording(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        if not offset:
            addresses.add(np.frombuffer(buffers[0], np.uint8).ctypes.data)
        return preadv(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", recording)
    groups = [[GROUPS[0][0]], [GROUPS[1][0]]] * 6
    with Staging(manifest, groups, num_slots=num_slots, verified=Verified()) as staging:
        for arrays in staging:
            assert sum(array.nbytes for array in arrays.values()) <= max(group_bytes(manifest, group) for group in groups)
    assert len(addresses) == num_slots
    assert all(address % 64 == 0 for address in addresses)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-4])


def change(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[5] ^= 1
    path.write_bytes(data)


def replace_by_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


FAULTS = {
    "truncated": (truncate, r"has \d+ bytes, expected \d+"),
    "missing": (Path.unlink, "is missing"),
    "unreadable": (replace_by_folder, "has|cannot be read"),
    "changed": (change, "checksum"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_file_is_named_with_its_layer_and_leaves_no_thread(manifest: Manifest, fault: str) -> None:
    damage, message = FAULTS[fault]
    path = manifest.chunk_path("block.0.mlp.wi_0.kernel")
    good = path.read_bytes()
    damage(path)
    with pytest.raises(ModelDirectoryError, match=message) as raised:
        read(manifest)
    assert "layer block.0" in str(raised.value)
    assert str(path) in str(raised.value)
    assert "\n" not in str(raised.value)
    assert not threads()
    path.rmdir() if path.is_dir() else path.unlink(missing_ok=True)
    path.write_bytes(good)
    assert len(read(manifest)) == len(GROUPS)


def test_an_input_output_error_is_named(manifest: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: object) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "preadv", failing)
    with pytest.raises(ModelDirectoryError, match=r"layer block\.0: parameter file .* cannot be read \(Input/output error\)"):
        read(manifest)
    assert not threads()


def test_a_disk_that_hangs_is_an_error_and_not_a_hang(manifest: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    release, preadv = threading.Event(), os.preadv

    def hanging(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        release.wait(30)
        return preadv(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", hanging)
    with pytest.raises(TimeoutError, match=r"t5 layer block\.0 in .* was not read within 0\.2 s"):
        read(manifest, stall_s=0.2)
    release.set()
    for thread in threads():
        thread.join(10)
    assert not threads()


def test_leaving_early_ends_the_thread(manifest: Manifest) -> None:
    with Staging(manifest, GROUPS * 50, num_slots=2, verified=Verified()) as staging:
        assert list(next(iter(staging))) == GROUPS[0]
    assert not threads()


def test_a_checksum_is_compared_once_for_each_state_of_a_file_or_never(manifest: Manifest) -> None:
    verified = Verified()
    read(manifest, verified=verified)
    path = manifest.chunk_path(GROUPS[2][0])
    change(path)
    os.utime(path, ns=(1, 1))
    with pytest.raises(ModelDirectoryError, match="layer final"):
        read(manifest, verified=verified)
    assert len(read(manifest, verified=Verified(off=True))) == len(GROUPS)


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_only_the_rows_asked_for_are_read(
    tmp_path: Path, flat: dict[str, np.ndarray], dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = save_network(tmp_path, "t5", CONFIG.t5, flat, dtype=dtype)
    table, ids, sizes, preadv = flat["embed.embedding"], np.array([[3, 127, 3], [0, 5, 127]]), [], os.preadv

    def counting(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        sizes.append(sum(len(buffer) for buffer in buffers))
        return preadv(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", counting)
    rows = read_rows(manifest, "embed.embedding", ids)
    half_step = np.abs(table).max() / 127 / 2 if dtype == "int8" else 0
    np.testing.assert_allclose(rows, table[ids], rtol=0, atol=half_step * 1.01)
    scales = 4 * len(table) if dtype == "int8" else 0
    assert sum(sizes) == 4 * table.shape[1] * (1 if dtype == "int8" else 4) + scales  # four different rows
    with pytest.raises(ValueError, match=r"token ids 0 to 128 .* 0 to 127"):
        read_rows(manifest, "embed.embedding", np.array([0, 128]))


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("read ")]
