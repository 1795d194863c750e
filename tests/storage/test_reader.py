"""Reading arrays: the right bytes by either way, each compared once for every state of its file, faults that name it."""

import dataclasses
import errno
import hashlib
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorstore as ts

from sora_jax.storage import arrays, checksums, in_order, pieces
from sora_jax.storage import reader as reader_module
from sora_jax.storage.buffers import ALIGNMENT, Buffer, group_bytes
from sora_jax.storage.checkpoint import save_network
from sora_jax.storage.directory import Manifest, ModelDirectoryError
from sora_jax.storage.reader import Reader, Stopped
from tests.support.stored import as_format_1
from tests.support.tiny_model import CONFIG, random_flat

GROUP = ["block.0.attn.q.kernel", "block.0.attn_norm.scale", "block.0.mlp.wi_0.kernel"]
TABLE = "embed.embedding"  # 128 rows
FORMATS = [1, 2]


@pytest.fixture(scope="module")
def flat() -> dict[str, np.ndarray]:
    return random_flat("t5")


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Most matrices of a toy network have several blocks, as at full size."""
    monkeypatch.setattr(arrays, "BLOCK_BYTES", 512)


@pytest.fixture
def manifest(tmp_path: Path, flat: dict[str, np.ndarray], small_blocks: None) -> Manifest:
    return save_network(tmp_path, "t5", CONFIG.t5, flat)


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The sizes of everything that is hashed to be compared."""
    sizes: list[int] = []
    sha256 = checksums._sha256

    def counting(raw: memoryview) -> str:
        sizes.append(len(raw))
        return sha256(raw)

    monkeypatch.setattr(checksums, "_sha256", counting)
    monkeypatch.setattr(checksums, "_CLOCK_NS", 0)  # these files were written just now, and stay as they are
    return sizes


@pytest.fixture(params=["by the system", "through tensorstore"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The class that reads: files in order are read by the system; here also through tensorstore, as others are."""
    if request.param == "by the system":
        return in_order.FileInOrder
    monkeypatch.setattr(reader_module, "open_in_order", lambda *_: None)
    return pieces.StoredArray


def stored(manifest: Manifest, format_version: int) -> Manifest:
    return as_format_1(manifest) if format_version == 1 else manifest


def block_sums(array: np.ndarray, parameter: arrays.Parameter) -> tuple[str, ...]:
    return tuple(hashlib.sha256(block).hexdigest() for block in checksums.blocks_of(array, parameter))


def read(manifest: Manifest, names: list[str] = GROUP) -> dict[str, np.ndarray]:
    return Reader(manifest).arrays(names)


@pytest.mark.parametrize("format_version", FORMATS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_arrays_have_the_stored_bits_in_memory_of_their_own(
    tmp_path: Path, flat: dict[str, np.ndarray], small_blocks: None, way: Any, dtype: str, format_version: int
) -> None:
    written = save_network(tmp_path, "t5", CONFIG.t5, flat, dtype=dtype)
    manifest = stored(written, format_version)
    found = read(manifest, list(manifest.parameters))
    for name, array in found.items():
        assert block_sums(array, manifest.parameters[name]) == manifest.parameters[name].checksums
        assert array.ctypes.data % ALIGNMENT == 0
        assert not array.flags.writeable
    before = found[TABLE].tobytes()
    path = manifest.chunk_path(TABLE)
    path.write_bytes(bytes(path.stat().st_size))
    assert found[TABLE].tobytes() == before


def test_blocks_are_the_largest_divisors_within_the_limit() -> None:
    rows = {shape: arrays.rows_of_a_block(shape, "float32") for shape in [(), (7,), (32128, 4096), (4096, 10240), (3, 1 << 21)]}
    assert rows == {(): 1, (7,): 7, (32128, 4096): 251, (4096, 10240): 64, (3, 1 << 21): 1}
    assert arrays.rows_of_a_block((32128, 4096), "int8") == 1004


def test_memory_besides_the_callers_is_a_few_blocks(
    tmp_path: Path, flat: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch, way: Any
) -> None:
    """No more pieces are being read at a time than fit into the limit, whatever the size of the array."""
    monkeypatch.setattr(arrays, "BLOCK_BYTES", 64)
    monkeypatch.setattr(reader_module, "IN_FLIGHT_BYTES", 256)
    manifest = save_network(tmp_path, "t5", CONFIG.t5, flat)
    under_way, most, begin = 0, 0, way.read

    class Watched:
        def __init__(self, reading: pieces.Reading, size: int):
            self.reading, self.size = reading, size

        def result(self) -> None:
            nonlocal under_way
            self.reading.result()
            under_way -= self.size

    def watched(self: Any, piece: pieces.Piece, target: np.ndarray) -> Watched:
        nonlocal under_way, most
        under_way += piece.nbytes
        most = max(most, under_way)
        return Watched(begin(self, piece, target), piece.nbytes)

    monkeypatch.setattr(way, "read", watched)
    read(manifest, [TABLE])
    assert (most, under_way) == (256, 0)
    for _ in Reader(manifest).pieces(TABLE):
        pass
    assert (most, under_way) == (256, 0)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-4])


def change(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[5] ^= 1
    path.write_bytes(data)


def replace_by_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def replace_by_link(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))
    path.symlink_to("elsewhere")


def link_the_folder(path: Path) -> None:
    path.parent.rename(path.parent.with_name("elsewhere"))
    path.parent.symlink_to("elsewhere")


def replace_by_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def damage_the_index(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:-8] + bytes(8))


FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (truncate, r"has \d+ bytes, expected \d+; convert t5 again"),
    "missing": (Path.unlink, "is missing; convert t5 again"),
    "a folder": (replace_by_folder, "is of another kind; convert t5 again"),
    "a link": (replace_by_link, "is a symbolic link, which is not followed; convert t5 again"),
    "in a linked folder": (link_the_folder, "is not there: .* is a symbolic link, which is not followed"),
    "a pipe": (replace_by_pipe, "is of another kind"),
    "changed": (change, r"does not have the checksum that network\.json records; convert t5 again with --overwrite"),
    "index": (damage_the_index, r"cannot be read \(|does not have the checksum"),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("what", ["whole", "rows", "verified"])
def test_a_faulty_file_is_named_with_its_layer_in_one_line(manifest: Manifest, way: Any, fault: str, what: str) -> None:
    damage, message = FAULTS[fault]
    path = manifest.chunk_path(TABLE)
    damage(path)
    reader = Reader(manifest)
    ways: dict[str, Callable[[], object]] = {
        "whole": lambda: reader.arrays([GROUP[0], TABLE]),
        "rows": lambda: reader.rows(TABLE, np.arange(128)),
        "verified": lambda: reader.verify(TABLE),
    }
    with pytest.raises(ModelDirectoryError, match=message) as raised:
        ways[what]()
    assert str(raised.value).startswith("t5 layer embed: parameter file ")
    assert str(path) in str(raised.value)
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 600


ADVICE = {
    errno.EIO: "check the disk",
    errno.EACCES: "give this user the right",
    errno.EMFILE: "allow more open files (ulimit -n 4096)",
}


@pytest.mark.parametrize(("code", "advice"), ADVICE.items())
def test_an_error_of_the_system_is_repeated_and_conversion_not_advised(
    manifest: Manifest, monkeypatch: pytest.MonkeyPatch, way: Any, code: int, advice: str
) -> None:
    class Failing:
        def result(self) -> None:
            raise ValueError(f"UNKNOWN: Failed to read: \"/x\" [os_error_code='{code}']")

    def preadv(*_: object) -> int:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(pieces.StoredArray, "read", lambda *_: Failing())
    monkeypatch.setattr(os, "preadv", preadv)
    with pytest.raises(ModelDirectoryError) as raised:
        read(manifest)
    assert f"cannot be read ({os.strerror(code)}); {advice}" in str(raised.value)
    assert "convert" not in str(raised.value)


@pytest.mark.parametrize("format_version", FORMATS)
def test_a_checksum_is_compared_once_for_each_state_of_a_file(
    manifest: Manifest, hashed: list[int], format_version: int
) -> None:
    manifest = stored(manifest, format_version)
    size = sum(manifest.parameters[name].nbytes for name in GROUP)
    read(manifest)
    assert sum(hashed) == size
    read(manifest)
    read(Reader(manifest).manifest)
    assert sum(hashed) == size
    path = manifest.chunk_path(GROUP[0])
    os.utime(path, ns=(1, 1))  # nothing but the time
    read(manifest)
    assert sum(hashed) == size + manifest.parameters[GROUP[0]].nbytes
    change(path)
    with pytest.raises(ModelDirectoryError, match="checksum"):
        read(manifest)


def test_a_file_written_just_now_is_compared_again(
    manifest: Manifest, hashed: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It could be written again within the same tick of the file system's clock."""
    monkeypatch.setattr(checksums, "_CLOCK_NS", 3600 * 10**9)
    read(manifest)
    read(manifest)
    assert sum(hashed) == 2 * sum(manifest.parameters[name].nbytes for name in GROUP)


def lying(manifest: Manifest, name: str, **wrong: Any) -> Manifest:
    """A manifest that says something else of one array."""
    parameters = {**manifest.parameters, name: dataclasses.replace(manifest.parameters[name], **wrong)}
    return dataclasses.replace(manifest, parameters=parameters)


def test_what_is_known_of_a_file_holds_for_one_checksum_only(manifest: Manifest, hashed: list[int]) -> None:
    read(manifest)
    with pytest.raises(ModelDirectoryError, match="checksum"):
        read(lying(manifest, GROUP[1], sha256="0" * 64, blocks=()))


@pytest.mark.parametrize("was_known", [False, True])
def test_bytes_that_change_while_they_are_read_are_compared_as_they_were_read(
    manifest: Manifest, hashed: list[int], was_known: bool
) -> None:
    path = manifest.chunk_path(GROUP[2])
    if was_known:
        read(manifest)
        hashed.clear()

    class Changing(Reader):
        def _fill(self, *args: object) -> None:
            super()._fill(*args)
            change(path)

    found = Changing(manifest).arrays(GROUP)  # what was read is right
    assert block_sums(found[GROUP[2]], manifest.parameters[GROUP[2]]) == manifest.parameters[GROUP[2]].checksums
    assert sum(hashed) == sum(manifest.parameters[name].nbytes for name in (GROUP[2:] if was_known else GROUP))
    with pytest.raises(ModelDirectoryError, match="checksum"):
        read(manifest)


def test_a_network_that_was_replaced_is_an_error_and_no_mixture(
    tmp_path: Path, manifest: Manifest, flat: dict[str, np.ndarray]
) -> None:
    reader = Reader(manifest)
    reader.arrays(GROUP[:1])
    save_network(tmp_path, "t5", CONFIG.t5, {name: 2 * array for name, array in flat.items()}, overwrite=True)
    for read_on in (lambda: reader.arrays(GROUP), lambda: reader.rows(TABLE, np.array([3]))):
        with pytest.raises(ModelDirectoryError, match=r"/t5 was replaced or removed after it was opened; open the model again"):
            read_on()


@pytest.mark.parametrize("format_version", FORMATS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_only_the_blocks_of_the_rows_asked_for_are_read(
    tmp_path: Path,
    flat: dict[str, np.ndarray],
    small_blocks: None,
    monkeypatch: pytest.MonkeyPatch,
    way: Any,
    dtype: str,
    format_version: int,
) -> None:
    manifest = stored(save_network(tmp_path, "t5", CONFIG.t5, flat, dtype=dtype), format_version)
    monkeypatch.setattr(checksums, "_CLOCK_NS", 0)
    table, ids, starts, begin = flat[TABLE], np.array([[3, 127, 3], [0, 5, 127]]), [], Reader._begun

    def counting(self: Reader, stored: Any, request: reader_module.Request) -> pieces.Reading:
        name, piece, _ = request
        if name == TABLE:
            starts.append((piece.start, piece.stop))
        return begin(self, stored, request)

    monkeypatch.setattr(Reader, "_begun", counting)
    reader = Reader(manifest)
    for time in ("first", "second"):
        starts.clear()
        rows = reader.rows(TABLE, ids)
        tolerance = {"float32": 0.0, "bfloat16": 2.0**-8, "int8": 1 / 254}[dtype]
        assert np.abs(rows.astype(np.float32) - table[ids]).max() <= tolerance * np.abs(table).max()
        row_bytes = table.shape[1] * manifest.parameters[TABLE].numpy_dtype.itemsize
        block = arrays.rows_of_a_block(table.shape, manifest.parameters[TABLE].dtype) * row_bytes
        assert block < table.shape[0] * row_bytes
        wanted = [(at * row_bytes // block * block, at * row_bytes // block * block + block) for at in (0, 127)]
        if format_version == 1 and time == "first":  # its only checksum is the whole's
            assert starts[0][0] == 0
            assert starts[-1][1] == table.shape[0] * row_bytes
        else:
            assert starts == wanted
    with pytest.raises(ValueError, match=r"token ids 0 to 128 .* 0 to 127"):
        reader.rows(TABLE, np.array([0, 128]))


def test_verifying_reads_everything_again(manifest: Manifest) -> None:
    read(manifest)
    name, path = GROUP[0], manifest.chunk_path(GROUP[0])
    status = path.stat()
    change(path)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(ModelDirectoryError, match="checksum"):
        Reader(manifest).verify(name)


def test_verifying_compares_the_checksum_of_the_whole_too(manifest: Manifest) -> None:
    with pytest.raises(ModelDirectoryError, match="checksum"):
        Reader(lying(manifest, TABLE, sha256="0" * 64)).verify(TABLE)


def test_a_reading_nobody_waits_for_ends_at_the_next_piece(manifest: Manifest) -> None:
    answers = iter([False, False, True])
    parameters = Reader(manifest).parameters(GROUP)
    with pytest.raises(Stopped):
        Reader(manifest).read(Buffer(group_bytes(parameters)).arrays(parameters), stop=lambda: next(answers))


def test_a_failed_read_writes_into_the_callers_memory_no_more(
    manifest: Manifest, monkeypatch: pytest.MonkeyPatch, way: Any
) -> None:
    """What is still under way is waited for, because the memory will be used again."""
    parameters = Reader(manifest).parameters([TABLE])
    arrays_of = Buffer(group_bytes(parameters)).arrays(parameters)
    begin, pending = way.read, []

    class Counted:
        def __init__(self, reading: pieces.Reading, fails: bool):
            self.reading, self.fails = reading, fails
            pending.append(self)

        def result(self) -> None:
            pending.remove(self)
            self.reading.result()
            if self.fails:
                raise ValueError("DATA_LOSS: torn")

    monkeypatch.setattr(way, "read", lambda self, piece, target: Counted(begin(self, piece, target), piece.start == 0))
    with pytest.raises(ModelDirectoryError, match=r"cannot be read \(DATA_LOSS: torn\)"):
        Reader(manifest).read(arrays_of)
    assert not pending


def test_what_tensorstore_wrote_in_another_order_is_read_too(manifest: Manifest, flat: dict[str, np.ndarray]) -> None:
    """Blocks written one by one, the last first: tensorstore places them as they come."""
    path = manifest.array_path(TABLE)
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{path}/"}}
    store = ts.open(spec, open=True).result()
    rows = manifest.parameters[TABLE].rows
    reversed_file = manifest.chunk_path(TABLE).read_bytes()
    size = manifest.parameters[TABLE].block_bytes
    count = len(manifest.parameters[TABLE].blocks)
    blocks = [reversed_file[block * size : (block + 1) * size] for block in range(count)]
    index = b"".join(((count - 1 - block) * size).to_bytes(8, "little") + size.to_bytes(8, "little") for block in range(count))
    manifest.chunk_path(TABLE).write_bytes(b"".join(reversed(blocks)) + index)
    np.testing.assert_array_equal(store.read().result(), flat[TABLE])
    np.testing.assert_array_equal(read(manifest, [TABLE])[TABLE], flat[TABLE])
    ids = np.array([0, rows, 127])
    np.testing.assert_array_equal(Reader(manifest).rows(TABLE, ids), flat[TABLE][ids])
    Reader(manifest).verify(TABLE)


def test_files_are_closed(manifest: Manifest) -> None:
    def count() -> int:
        return len(os.listdir("/proc/self/fd"))

    read(manifest)
    before = count()
    read(manifest)
    answers = iter([False, False, True])
    parameters = Reader(manifest).parameters(GROUP)
    with pytest.raises(Stopped):
        Reader(manifest).read(Buffer(group_bytes(parameters)).arrays(parameters), stop=lambda: next(answers))
    assert count() == before


def test_threads_read_the_same_arrays_at_once(manifest: Manifest, flat: dict[str, np.ndarray]) -> None:
    results: list[dict[str, np.ndarray]] = []
    threads = [threading.Thread(target=lambda: results.append(read(manifest, list(flat)))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4
    for found in results:
        for name, array in flat.items():
            np.testing.assert_array_equal(found[name], array)
