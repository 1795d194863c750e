"""The entries of a zip file, believed only where directory, local headers and bytes agree.

Python's ``zipfile`` is written to read as many archives as possible; this reader takes only what ``torch.save`` and ordinary
zip programs write.  Invariant: every byte of the file belongs to exactly one entry, to its headers or to the directory, so that
no header can move an entry's bytes; sizes are compared with limits before anything is read.  What entries mean is not known
here, and the CRC-32 of entries that are not read here is compared by the caller, who reads them.
"""

import dataclasses
import struct
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path

from convert_weights.errors import SourceError, printable
from convert_weights.source_file import OpenFile

STORED, _DEFLATED = 0, 8
_ENCRYPTED = 0x0001 | 0x0040 | 0x2000
_DESCRIPTOR = 0x0008
_UTF8 = 0x0800
_MAX_ENTRIES = 1 << 17
_MAX_DIRECTORY_BYTES = 16 << 20
_MAX_COMMENT_BYTES = 0xFFFF
_FULL16, _FULL32 = 0xFFFF, 0xFFFFFFFF

_END = struct.Struct("<4s4H2LH")
_END64 = struct.Struct("<4sQ2H2L4Q")
_LOCATOR = struct.Struct("<4sLQL")
_CENTRAL = struct.Struct("<4s6H3L5H2L")
_LOCAL = struct.Struct("<4s5H3L2H")


@dataclasses.dataclass(frozen=True)
class Entry:
    """One file in the archive: ``start`` is the offset of its (stored or compressed) bytes."""

    name: str
    method: int
    crc: int
    stored_bytes: int
    size: int
    start: int


@dataclasses.dataclass(frozen=True)
class Archive:
    """All entries by name; ``has_checksums`` is False where none has a CRC-32, as by torch's option."""

    entries: Mapping[str, Entry]
    has_checksums: bool


@dataclasses.dataclass(frozen=True)
class _Listed:
    """An entry as the directory describes it."""

    raw_name: bytes
    flags: int
    method: int
    crc: int
    stored_bytes: int
    size: int
    header_offset: int

    @property
    def name(self) -> str:
        return printable(self.raw_name.decode("utf-8" if self.flags & _UTF8 else "cp437", "backslashreplace"))


def read_archive(file: OpenFile) -> Archive:
    """Returns the entries of a zip file.

    Raises:
      SourceError: it is no zip file, is truncated, encrypted or damaged, or its headers contradict each other.
    """
    start, listed = _directory(file)
    entries: dict[str, Entry] = {}
    ordered = sorted(listed, key=lambda entry: entry.header_offset)
    ends = [entry.header_offset for entry in ordered[1:]] + [start]
    if ordered[0].header_offset:
        raise _damaged(file.path, f"{ordered[0].header_offset} bytes stand before its first entry")
    for entry, end in zip(ordered, ends, strict=True):
        if entry.name in entries:
            raise _damaged(file.path, f"the entry {entry.name} occurs twice")
        data = _check_local(file, entry, end)
        entries[entry.name] = Entry(entry.name, entry.method, entry.crc, entry.stored_bytes, entry.size, data)
    # torch.save without checksums (torch.serialization.set_crc32_options(False)) writes 0 for every entry.
    return Archive(entries, any(entry.crc for entry in entries.values()))


def read_entry(file: OpenFile, archive: Archive, entry: Entry, *, max_bytes: int) -> bytes:
    """Returns the contents of a small entry, unpacked and compared with its CRC-32.

    Raises:
      SourceError: it is longer than ``max_bytes``, or damaged.
    """
    if max(entry.size, entry.stored_bytes) > max_bytes:
        raise SourceError(
            f"{file.path}: its entry {entry.name} has {max(entry.size, entry.stored_bytes)} bytes; refused above {max_bytes}."
        )
    content = file.read_bytes(entry.start, entry.stored_bytes)
    if entry.method == _DEFLATED:
        content = _inflate(file.path, entry, content)
    if archive.has_checksums and zlib.crc32(content) != entry.crc:
        raise _damaged(file.path, f"the CRC-32 of its entry {entry.name} differs from the recorded one")
    return content


def _inflate(path: Path, entry: Entry, content: bytes) -> bytes:
    machine = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        unpacked = machine.decompress(content, entry.size + 1)
    except zlib.error as error:
        raise _damaged(path, f"its entry {entry.name} cannot be unpacked ({error})") from error
    if len(unpacked) != entry.size or not machine.eof or machine.unused_data:
        raise _damaged(path, f"its entry {entry.name} does not unpack to the {entry.size} bytes that it declares")
    return unpacked


def _damaged(path: Path, problem: str) -> SourceError:
    return SourceError(f"{path} is a damaged zip file: {problem}.")


def _directory(file: OpenFile) -> tuple[int, list[_Listed]]:
    """Returns where the directory begins, and its entries."""
    end_offset, count, nbytes, start = _end_record(file)
    if count > _MAX_ENTRIES or nbytes > _MAX_DIRECTORY_BYTES:
        raise _damaged(file.path, f"its directory claims {count} entries in {nbytes} bytes")
    if start + nbytes != end_offset:
        raise _damaged(file.path, f"its directory should end at byte {start + nbytes}, and ends at {end_offset}")
    listed = list(_listed(file.path, file.read_bytes(start, nbytes)))
    if len(listed) != count or not listed:
        raise _damaged(file.path, f"its directory holds {len(listed)} entries and claims {count}")
    return start, listed


def _end_record(file: OpenFile) -> tuple[int, int, int, int]:
    """Returns where the directory must end, and its number of entries, length and start."""
    size = file.identity.size
    tail = file.read_bytes(max(0, size - _END.size - _MAX_COMMENT_BYTES), min(size, _END.size + _MAX_COMMENT_BYTES))
    at = tail.rfind(b"PK\x05\x06")
    while at >= 0 and (len(tail) - at < _END.size or at + _END.size + _END.unpack_from(tail, at)[-1] != len(tail)):
        at = tail.rfind(b"PK\x05\x06", 0, at)
    if at < 0:
        raise SourceError(
            f"{file.path} is truncated, or not in PyTorch's zip format (files from before PyTorch 1.6 must be saved again)."
        )
    _, disk, first_disk, here, count, nbytes, start, _ = _END.unpack_from(tail, at)
    end = size - len(tail) + at
    if disk or first_disk or here != count:
        raise _damaged(file.path, "it is one part of several")
    if end >= _LOCATOR.size and (locator := file.read_bytes(end - _LOCATOR.size, _LOCATOR.size))[:4] == b"PK\x06\x07":
        return _end_record64(file, end - _LOCATOR.size, locator, (count, nbytes, start))
    return end, count, nbytes, start


def _end_record64(
    file: OpenFile, locator_offset: int, locator: bytes, short: tuple[int, int, int]
) -> tuple[int, int, int, int]:
    _, disk, offset, disks = _LOCATOR.unpack(locator)
    if disk or disks != 1 or offset + _END64.size != locator_offset:
        raise _damaged(file.path, "its end records contradict each other")
    signature, length, _, _, disk, first_disk, here, count, nbytes, start = _END64.unpack(file.read_bytes(offset, _END64.size))
    fits = all(
        few in (many, full) for few, many, full in zip(short, (count, nbytes, start), (_FULL16, _FULL32, _FULL32), strict=True)
    )
    if signature != b"PK\x06\x06" or length != _END64.size - 12 or disk or first_disk or here != count or not fits:
        raise _damaged(file.path, "its end records contradict each other")
    return offset, count, nbytes, start


def _listed(path: Path, directory: bytes) -> Iterator[_Listed]:
    at = 0
    while at < len(directory):
        if len(directory) - at < _CENTRAL.size or directory[at : at + 4] != b"PK\x01\x02":
            raise _damaged(path, f"its directory is malformed at byte {at}")
        _, _, _, flags, method, _, _, crc, stored, size, n, e, c, disk, _, _, header = _CENTRAL.unpack_from(directory, at)
        raw_name = directory[at + _CENTRAL.size : at + _CENTRAL.size + n]
        extra = directory[at + _CENTRAL.size + n : at + _CENTRAL.size + n + e]
        at += _CENTRAL.size + n + e + c
        if at > len(directory) or disk:
            raise _damaged(path, "its directory is malformed")
        size, stored, header = _widened(path, extra, (size, stored, header))
        entry = _Listed(raw_name, flags, method, crc, stored, size, header)
        _check_listed(path, entry)
        yield entry


def _check_listed(path: Path, entry: _Listed) -> None:
    if entry.flags & _ENCRYPTED:
        raise SourceError(f"{path} is an encrypted zip file (its entry {entry.name}); unpack it and save the weights again.")
    if entry.method not in (STORED, _DEFLATED):
        raise _damaged(path, f"its entry {entry.name} is packed by method {entry.method}, which torch.save does not use")
    if entry.method == STORED and entry.stored_bytes != entry.size:
        raise _damaged(path, f"its entry {entry.name} is stored in {entry.stored_bytes} bytes and claims {entry.size}")


def _widened(path: Path, extra: bytes, numbers: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the numbers with those that fill 32 bits replaced by the 64-bit ones of the extra field."""
    wide = _extra_fields(path, extra).get(1, b"")
    full = sum(number == _FULL32 for number in numbers)
    if len(wide) < 8 * full:
        raise _damaged(path, "a 64-bit size is missing")
    values = iter(struct.unpack_from(f"<{full}Q", wide))
    return tuple(next(values) if number == _FULL32 else number for number in numbers)


def _extra_fields(path: Path, extra: bytes) -> dict[int, bytes]:
    fields: dict[int, bytes] = {}
    at = 0
    while at < len(extra):
        if len(extra) - at < 4:
            raise _damaged(path, "an extra field of a header is malformed")
        kind, length = struct.unpack_from("<2H", extra, at)
        if kind in fields or at + 4 + length > len(extra):
            raise _damaged(path, "an extra field of a header is malformed")
        fields[kind] = extra[at + 4 : at + 4 + length]
        at += 4 + length
    return fields


def _check_local(file: OpenFile, entry: _Listed, end: int) -> int:
    """Returns where an entry's bytes begin, after comparing its local header with the directory.

    Args:
      file: the archive.
      entry: what the directory says.
      end: where the next entry, or the directory, begins: the bytes must reach up to there.
    """
    problem = f"the local header of its entry {entry.name} contradicts the directory"
    if entry.header_offset + _LOCAL.size > end:
        raise _damaged(file.path, problem)
    header = file.read_bytes(entry.header_offset, _LOCAL.size)
    signature, _, flags, method, _, _, crc, stored, size, name_bytes, extra_bytes = _LOCAL.unpack(header)
    start = entry.header_offset + _LOCAL.size + name_bytes + extra_bytes
    if signature != b"PK\x03\x04" or start + entry.stored_bytes > end or name_bytes != len(entry.raw_name):
        raise _damaged(file.path, problem)
    rest = file.read_bytes(entry.header_offset + _LOCAL.size, name_bytes + extra_bytes)
    extra = rest[name_bytes:]
    size, stored = _widened(file.path, extra, (size, stored))
    described = (crc, stored, size)
    expected = (entry.crc, entry.stored_bytes, entry.size)
    later = bool(flags & _DESCRIPTOR)  # sizes and CRC-32 follow the bytes; the header may hold zeros
    marked = _ENCRYPTED | _DESCRIPTOR
    if (
        rest[:name_bytes] != entry.raw_name
        or method != entry.method
        or (flags ^ entry.flags) & marked
        or (described != expected and not (later and not any(described)))
    ):
        raise _damaged(file.path, problem)
    gap = end - start - entry.stored_bytes
    if gap and not (later and gap <= 24 and file.read_bytes(end - gap, gap) in _descriptors(*expected)):
        raise _damaged(file.path, f"{gap} bytes behind its entry {entry.name} belong to no entry")
    return start


def _descriptors(crc: int, stored: int, size: int) -> list[bytes]:
    """Returns what may follow an entry's bytes: CRC-32 and sizes, with and without a signature, in 32 or 64 bits."""
    found = [struct.pack("<LQQ", crc, stored, size)]
    if max(stored, size) <= _FULL32:
        found.append(struct.pack("<3L", crc, stored, size))
    return [signature + text for signature in (b"PK\x07\x08", b"") for text in found]
