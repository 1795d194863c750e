"""Names, shapes, types and byte ranges of the tensors in a GGUF file, and the numbers of its metadata.

The values are decoded by the ``gguf`` package (`encodings`); its reader maps the whole file and believes its header, so the
header is read here. Invariant: every length and count was compared with the bytes that are there before it is believed, and the
tensors fill the file behind the header, each from the next multiple of the alignment. What names mean is decided by the tables.
Source: the GGUF specification, versions 2 and 3.
"""

import dataclasses
import struct
from collections.abc import Mapping
from typing import Any

from convert_weights.encodings import encoding_of, gguf_type
from convert_weights.errors import SourceError, printable
from convert_weights.pickle_machine import ITEM_BYTES
from convert_weights.recognise import HEAD_BYTES, what_is
from convert_weights.safetensors_header import contiguous_strides
from convert_weights.source_file import OpenFile
from convert_weights.torch_zip import Tensor

MAGIC = b"GGUF"
_MAX_HEADER_BYTES = 32 << 20  # a tokenizer of 250,000 pieces has 10 MB
_PIECE_BYTES = 1 << 14
_MAX_FIELDS, _MAX_TENSORS, _MAX_KEY_BYTES, _MAX_TEXT_BYTES = 1 << 12, 1 << 15, 1 << 12, 1 << 10
_MAX_DIMENSIONS = 4
_MAX_EXTENT = 1 << 40
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


@dataclasses.dataclass(frozen=True)
class GGUFFile:
    """The tensors by name, and the metadata that are single numbers or short texts."""

    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, Any]


def read_gguf(file: OpenFile) -> GGUFFile:
    """Returns where the tensors of a file lie.

    Raises:
      SourceError: it is no GGUF file, is truncated, has a type that cannot be decoded, or contradicts itself.
    """
    path, size = file.path, file.identity.size
    head = file.read_bytes(0, min(HEAD_BYTES, size))
    if not head.startswith(MAGIC):
        raise SourceError(f"{path} {what_is(head) or 'is no GGUF file (it does not begin with GGUF)'}.")
    cursor = _Cursor(file)
    cursor.skip(len(MAGIC))
    version, tensors, fields = cursor.number("I"), cursor.number("Q"), cursor.number("Q")
    if version not in (2, 3):
        raise SourceError(f"{path} has GGUF version {version}; versions 2 and 3 of little-endian files are read.")
    if tensors > _MAX_TENSORS or fields > _MAX_FIELDS:
        raise cursor.malformed(f"{tensors} tensors and {fields} fields are more than a model has")
    metadata = _metadata(cursor, fields)
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or not 1 <= alignment <= 1 << 16 or alignment & (alignment - 1):
        raise cursor.malformed(f"an alignment of {printable(alignment, 40)}")
    found: dict[str, Tensor] = {}
    spans: list[tuple[int, int, str]] = []
    for _ in range(tensors):
        name, tensor, nbytes = _tensor(cursor)
        if name in found:
            raise cursor.malformed(f"{printable(name)} occurs twice")
        found[name] = tensor
        spans.append((tensor.offset, nbytes, name))
    start = _aligned(cursor.at, alignment)
    _check_filled(cursor, spans, size - start, alignment)
    placed = {name: dataclasses.replace(tensor, offset=start + tensor.offset) for name, tensor in found.items()}
    return GGUFFile(placed, metadata)


def _metadata(cursor: "_Cursor", count: int) -> dict[str, Any]:
    metadata: dict[str, Any] = {}
    seen: set[str] = set()
    for _ in range(count):
        key, kind = cursor.text(_MAX_KEY_BYTES), cursor.number("I")
        if key in seen:
            raise cursor.malformed(f"the field {printable(key)} occurs twice")
        seen.add(key)
        value = cursor.value(kind)
        if value is not None:
            metadata[key] = value
    return metadata


def _tensor(cursor: "_Cursor") -> tuple[str, Tensor, int]:
    """Returns a tensor's name, its description with the offset behind the header, and its bytes."""
    name = cursor.text(_MAX_KEY_BYTES)
    dimensions = cursor.number("I")
    if dimensions > _MAX_DIMENSIONS:
        raise cursor.malformed(f"{printable(name)} has {dimensions} dimensions")
    shape = tuple(cursor.number("Q") for _ in range(dimensions))[::-1]  # the fastest axis comes first in the file
    kind, offset = cursor.number("I"), cursor.number("Q")
    if any(not 0 < extent < _MAX_EXTENT for extent in shape):
        raise cursor.malformed(f"{printable(name)} has shape {printable(shape, 80)}")
    try:
        dtype = gguf_type(kind)
    except SourceError as error:
        raise SourceError(f"{cursor.path}: {error}") from None
    except ValueError as error:
        raise cursor.malformed(f"{printable(name)}: {printable(error, 100)}") from None
    encoding = encoding_of(dtype)
    block, block_bytes = (encoding.block, encoding.block_bytes) if encoding else (1, ITEM_BYTES[dtype])
    if (shape[-1] if shape else 1) % block:
        raise cursor.malformed(f"{printable(name)} has rows of {shape[-1]} values; {dtype} packs {block} together")
    values = 1
    for extent in shape:
        values *= extent
    return name, Tensor(dtype, offset, shape, contiguous_strides(shape)), values // block * block_bytes


def _check_filled(cursor: "_Cursor", spans: list[tuple[int, int, str]], room: int, alignment: int) -> None:
    end = 0
    for offset, nbytes, name in sorted(spans):
        if offset != _aligned(end, alignment):
            raise cursor.malformed(
                f"{printable(name)} starts at byte {offset} of the values, expected {_aligned(end, alignment)}; "
                "tensors overlap or leave a gap"
            )
        end = offset + nbytes
    if room not in (end, _aligned(end, alignment)):
        raise SourceError(
            f"{cursor.path} has {max(room, 0)} bytes of values, its header describes {end}; it is truncated or has been "
            "appended to."
        )


def _aligned(offset: int, alignment: int) -> int:
    return -(-offset // alignment) * alignment


class _Cursor:
    """The bytes of a header, read from the front a piece at a time; refuses to go beyond the end of the file, or a limit."""

    def __init__(self, file: OpenFile):
        self.path, self.at = file.path, 0
        self._file, self._content = file, bytearray()
        self._size = min(file.identity.size, _MAX_HEADER_BYTES)

    def malformed(self, problem: str) -> SourceError:
        """Returns the error of a header that cannot be true."""
        return SourceError(f"{self.path}: its GGUF header is malformed ({problem}).")

    def skip(self, count: int) -> int:
        """Moves ahead and returns where it stood; what was moved over is in memory."""
        before = self.at
        if count > self._size - before:
            raise SourceError(f"{self.path} is truncated, or its header is longer than {_MAX_HEADER_BYTES} bytes.")
        self.at += count
        if self.at > len(self._content):
            end = min(max(self.at, len(self._content) + _PIECE_BYTES), self._size)
            self._content += self._file.read_bytes(len(self._content), end - len(self._content))
        return before

    def number(self, code: str) -> Any:
        """Returns the next number of a type of `struct`."""
        return struct.unpack_from("<" + code, self._content, self.skip(struct.calcsize("<" + code)))[0]

    def text(self, limit: int) -> str:
        """Returns the next text, which has at most ``limit`` bytes."""
        length = self.number("Q")
        if length > limit:
            raise self.malformed(f"a name of {length} bytes")
        return self._text(self.skip(length))

    def value(self, kind: int) -> Any:
        """Returns the next value if it is a number or a short text; passes over any other and returns None."""
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind == _STRING:
            length = self.number("Q")
            start = self.skip(length)
            return (
                bytes(self._content[start : self.at]).decode("utf-8", "backslashreplace") if length <= _MAX_TEXT_BYTES else None
            )
        if kind != _ARRAY:
            raise self.malformed(f"a value of type {kind}")
        item, count = self.number("I"), self.number("Q")
        if item in _SCALARS:
            self.skip(count * struct.calcsize("<" + _SCALARS[item]))
        elif item == _STRING:
            if count > self._size // 8:
                raise self.malformed(f"an array of {count} texts")
            for _ in range(count):
                self.skip(self.number("Q"))
        else:
            raise self.malformed(f"an array of values of type {item}")
        return None

    def _text(self, start: int) -> str:
        return bytes(self._content[start : self.at]).decode("utf-8", "backslashreplace")
