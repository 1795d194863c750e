"""PyTorch files whose archive lies: CRC-32, local headers and directory are compared, and small entries have limits."""

import io
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from convert_weights.checkpoint import convert_checkpoint
from convert_weights.errors import SourceError
from convert_weights.readers import open_checkpoint
from convert_weights.source_file import OpenFile
from convert_weights.torch_zip import read_torch_file, read_tree
from tests.convert_weights.test_hostile_sources import refused, torch_source
from tests.support import sources


def _entries(path: Path) -> list[zipfile.ZipInfo]:
    return _entries_of(path.read_bytes())


def _entries_of(content: bytes) -> list[zipfile.ZipInfo]:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return archive.infolist()


def _listed_at(content: bytes, entry: zipfile.ZipInfo) -> int:
    """Returns where the directory describes an entry."""
    name = entry.filename.encode()
    at = content.find(b"PK\x01\x02")
    while content[at + 46 : at + 46 + struct.unpack_from("<H", content, at + 28)[0]] != name:
        at = content.find(b"PK\x01\x02", at + 46)
    return at


def _data_start(content: bytes, entry: zipfile.ZipInfo) -> int:
    name, extra = struct.unpack_from("<HH", content, entry.header_offset + 26)
    return entry.header_offset + 30 + name + extra


@pytest.mark.parametrize("position", [0, -1])
def test_a_flipped_bit_in_a_storage_is_refused(tmp_path: Path, position: int) -> None:
    path = torch_source(tmp_path / "source")
    content = bytearray(path.read_bytes())
    entry = next(entry for entry in _entries(path) if entry.filename.endswith("data/3"))
    content[_data_start(content, entry) + position % entry.file_size] ^= 1
    path.write_bytes(content)
    refused(path, tmp_path / "model", "entry pytorch_model/data/3 has another CRC-32 than recorded; download it again")


def _without_checksums(content: bytes) -> bytearray:
    """Returns a zip file as torch writes it with ``set_crc32_options(False)``: zero in place of every CRC-32."""
    changed = bytearray(content)
    for signature, offset in ((b"PK\x03\x04", 14), (b"PK\x01\x02", 16)):
        at = changed.find(signature)
        while at >= 0:
            changed[at + offset : at + offset + 4] = bytes(4)
            at = changed.find(signature, at + 4)
    return changed


def test_a_file_without_checksums_stays_readable_and_says_so(tmp_path: Path) -> None:
    path = torch_source(tmp_path / "source")
    path.write_bytes(_without_checksums(path.read_bytes()))
    assert open_checkpoint(path).notes == ("pytorch_model.bin has no checksums; damage to its values cannot be noticed",)
    convert_checkpoint("t5", path, tmp_path / "model")
    sources.expect_converted(tmp_path / "model", "t5")


def test_one_storage_without_its_checksum_is_refused_where_others_have_theirs(tmp_path: Path) -> None:
    path = torch_source(tmp_path / "source")
    content = bytearray(path.read_bytes())
    entry = next(entry for entry in _entries(path) if entry.filename.endswith("data/3"))
    at = _listed_at(content, entry)
    content[at + 16 : at + 20] = content[entry.header_offset + 14 : entry.header_offset + 18] = bytes(4)
    content[_data_start(content, entry)] ^= 1
    path.write_bytes(content)
    refused(path, tmp_path / "model", "has another CRC-32 than recorded")


@pytest.mark.torch
@pytest.mark.parametrize("checksums", [True, False])
def test_torch_save_with_and_without_checksums(tmp_path: Path, checksums: bool) -> None:
    import torch

    tensors = {name: torch.from_numpy(array) for name, array in sources.state_dict("t5").items()}
    path = torch_source(tmp_path / "source", {})
    torch.serialization.set_crc32_options(checksums)
    try:
        torch.save(tensors, path)
    finally:
        torch.serialization.set_crc32_options(True)
    with OpenFile(path) as file:
        assert read_torch_file(file).has_checksums is checksums
    convert_checkpoint("t5", path, tmp_path / "model")
    sources.expect_converted(tmp_path / "model", "t5")


def _lengthen_extra(content: bytearray, entry: zipfile.ZipInfo) -> None:
    """Claims four more bytes of extra field in the local header, which shifts every value of the storage by one."""
    content[entry.header_offset + 28] += 4


def _rename_local(content: bytearray, entry: zipfile.ZipInfo) -> None:
    content[entry.header_offset + 30] ^= 1


def _method_local(content: bytearray, entry: zipfile.ZipInfo) -> None:
    content[entry.header_offset + 8] = 8


def _size_local(content: bytearray, entry: zipfile.ZipInfo) -> None:
    content[entry.header_offset + 22] ^= 4


def _encrypt(content: bytearray, entry: zipfile.ZipInfo) -> None:
    at = _listed_at(content, entry)
    content[at + 8] |= 1
    content[entry.header_offset + 6] |= 1


def _unknown_method(content: bytearray, entry: zipfile.ZipInfo) -> None:
    at = _listed_at(content, entry)
    content[at + 10] = 99


def _duplicate(content: bytearray, entry: zipfile.ZipInfo) -> None:
    """Renames the storage behind it to its name, in both headers."""
    name = entry.filename.encode()
    listed = _listed_at(content, next(e for e in _entries_of(content) if e.filename == entry.filename[:-1] + "4"))
    local = struct.unpack_from("<L", content, listed + 42)[0]
    content[listed + 46 : listed + 46 + len(name)] = content[local + 30 : local + 30 + len(name)] = name


def _gap(content: bytearray, entry: zipfile.ZipInfo) -> None:
    """Moves the directory, and with it every later header, away from the end of the last entry."""
    at = content.find(b"PK\x01\x02")
    content[at:at] = b"some"
    end = content.rfind(b"PK\x05\x06")
    content[end + 16 : end + 20] = struct.pack("<L", struct.unpack_from("<L", content, end + 16)[0] + 4)


@pytest.mark.parametrize(
    ("change", "report"),
    [
        (_lengthen_extra, "data/3 contradicts the directory|extra field"),
        (_rename_local, "data/3 contradicts the directory"),
        (_method_local, "data/3 contradicts the directory"),
        (_size_local, "data/3 contradicts the directory"),
        (_encrypt, "is an encrypted zip file .its entry pytorch_model/data/3"),
        (_unknown_method, "data/3 is packed by method 99, which torch.save does not use"),
        (_duplicate, "data/3 occurs twice"),
        (_gap, "4 bytes behind its entry pytorch_model/version belong to no entry"),
    ],
)
def test_headers_that_contradict_each_other_are_refused(
    tmp_path: Path, change: Callable[[bytearray, zipfile.ZipInfo], None], report: str
) -> None:
    """With and without CRC-32: the headers alone give the lie away."""
    for name, checksums in (("with", True), ("without", False)):
        path = torch_source(tmp_path / name)
        entry = next(entry for entry in _entries(path) if entry.filename.endswith("data/3"))
        content = bytearray(path.read_bytes()) if checksums else _without_checksums(path.read_bytes())
        change(content, entry)
        path.write_bytes(content)
        refused(path, tmp_path / "model", report)


def _deflated(path: Path, name: str, content: bytes, others: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for other, text in others.items():
            archive.writestr(other, text)
        archive.writestr(name, content)
    return path


def test_small_entries_are_read_with_a_limit(tmp_path: Path) -> None:
    """3 GB of spaces in place of ``byteorder`` are 3 MB in the file."""
    program = pickle.dumps({}, protocol=2)
    path = _deflated(tmp_path / "a.pt", "a/byteorder", b" " * 10_000_000, {"a/data.pkl": program})
    with pytest.raises(SourceError, match="its entry a/byteorder has 10000000 bytes; refused above 64"):
        read_tree(path)
    path = _deflated(tmp_path / "b.pt", "a/data.pkl", b"]" * (65 << 20), {})
    with pytest.raises(SourceError, match=r"its entry a/data\.pkl has 68157440 bytes; refused above 67108864"):
        read_tree(path)


def test_an_entry_that_does_not_unpack_is_refused(tmp_path: Path) -> None:
    path = _deflated(tmp_path / "a.pt", "a/data.pkl", pickle.dumps(list(range(300)), protocol=2), {})
    (entry,) = _entries(path)
    content = bytearray(path.read_bytes())
    for offset in range(0, entry.compress_size, 7):
        changed = bytearray(content)
        changed[_data_start(content, entry) + offset] ^= 0xFF
        path.write_bytes(changed)
        with pytest.raises(SourceError, match=r"cannot be unpacked|does not unpack|has another CRC|differs from the recorded"):
            read_tree(path)
