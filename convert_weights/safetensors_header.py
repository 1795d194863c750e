"""Names, shapes and byte ranges of the arrays in a safetensors file.

Invariant: the arrays fill the file behind the header without a gap and without an overlap, and every number of the header was
compared with that before it is believed.  Values are read elsewhere; the format has no checksum of them.
"""

import math
from pathlib import Path
from typing import Any

from convert_weights.encodings import FLOAT8
from convert_weights.errors import SourceError, printable
from convert_weights.json_text import parse_object
from convert_weights.pickle_machine import ITEM_BYTES
from convert_weights.recognise import HEAD_BYTES, what_is
from convert_weights.source_file import OpenFile
from convert_weights.torch_zip import MAX_DIMENSIONS, Tensor

SAFETENSORS_DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
}  # fmt: skip
_MAX_HEADER_BYTES = 8 << 20  # 30 KB for a thousand arrays
_MAX_SIZE = 1 << 63
_FIELDS = {"dtype", "shape", "data_offsets"}


def read_safetensors(file: OpenFile) -> dict[str, Tensor]:
    """Returns where the arrays of a file lie.

    Raises:
      SourceError: it is no safetensors file, is truncated, or its header contradicts itself or the file's size.
    """
    path, size = file.path, file.identity.size
    if answer := what_is(file.read_bytes(0, min(HEAD_BYTES, size))):
        raise SourceError(f"{path} {answer}.")
    length = int.from_bytes(file.read_bytes(0, min(8, size)), "little")
    if size < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
        raise SourceError(f"{path} is truncated or not a safetensors file (header of {length} bytes in a file of {size}).")
    entries = parse_object(file.read_bytes(8, length), path, "a safetensors file: its header is malformed")
    entries.pop("__metadata__", None)
    tensors: dict[str, Tensor] = {}
    spans: list[tuple[int, int, str]] = []
    for name, entry in entries.items():
        tensors[name], stop = _entry(path, name, entry, 8 + length)
        spans.append((tensors[name].offset, stop, name))
    end = 8 + length
    for start, stop, name in sorted(spans):
        if start != end:
            raise SourceError(
                f"{path}: {printable(name)} starts at byte {start}, expected {end}; arrays overlap or leave a gap."
            )
        end = stop
    if end != size:
        raise SourceError(f"{path} has {size} bytes, its header describes {end}; it is truncated or has been appended to.")
    return tensors


def _entry(path: Path, name: str, entry: Any, base: int) -> tuple[Tensor, int]:
    """Returns an array's description and where its bytes end."""
    if not isinstance(entry, dict) or entry.keys() != _FIELDS:
        raise _malformed(path, name, f"expected the fields {', '.join(sorted(_FIELDS))}")
    label, shape, span = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(label, str) or label not in SAFETENSORS_DTYPES:
        raise _malformed(path, name, f"dtype {printable(label)}")
    if not _are_sizes(span) or len(span) != 2 or not _are_sizes(shape) or len(shape) > MAX_DIMENSIONS:
        raise _malformed(path, name, f"shape {printable(shape)} in bytes {printable(span)}")
    dtype, (start, stop) = SAFETENSORS_DTYPES[label], span
    if stop - start != math.prod(shape) * (1 if dtype in FLOAT8 else ITEM_BYTES[dtype]):
        raise _malformed(path, name, f"shape {shape} of {dtype} in bytes {start} to {stop}")
    return Tensor(dtype, base + start, tuple(shape), contiguous_strides(tuple(shape))), base + stop


def _are_sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(n) is int and 0 <= n < _MAX_SIZE for n in values)


def _malformed(path: Path, name: str, problem: str) -> SourceError:
    return SourceError(f"{path}: its header is malformed ({printable(name)}: {problem}).")


def contiguous_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the strides of C order, in elements."""
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
