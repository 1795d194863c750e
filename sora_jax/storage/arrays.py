"""One stored array: what its manifest entry says, and the zarr3 file that holds it.

Invariant: the file of a parameter begins with the raw little-endian bytes of the array in C order, whoever of us wrote it.  In
format 2 an index of its blocks of rows follows, so that tensorstore reads any block alone, from disk or over a network; in
format 1 nothing does.  Nothing here opens a file.
"""

import dataclasses
import math
import struct
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

FORMATS = (1, 2)  # that are read; the last is written
STORED_DTYPES = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "int8": np.dtype(np.int8),
}
BLOCK_BYTES = 4 << 20  # of a block of rows, at most, unless a row alone is larger

_ENTRY = struct.Struct("<QQ")  # of the index: a block's offset and length


@dataclasses.dataclass(frozen=True)
class Parameter:
    """One stored array.

    Attributes:
      shape: the array's shape; every extent is at least 1.
      dtype: a key of `STORED_DTYPES`.
      sha256: checksum of the array's bytes in C order; empty where only its blocks have theirs.
      source: name, shape and dtype of the PyTorch array it was made from, if any.
      rows: rows of axis 0 in a block that has a checksum of its own (1 where there is no axis); None: all.
      blocks: sha256 of every block, in order; empty where the only block is the array.
    """

    shape: tuple[int, ...]
    dtype: str
    sha256: str
    source: Mapping[str, Any] | None = None
    rows: int | None = None
    blocks: tuple[str, ...] = ()

    @property
    def numpy_dtype(self) -> np.dtype:
        """The dtype in memory."""
        return STORED_DTYPES[self.dtype]

    @property
    def nbytes(self) -> int:
        """Size of the raw bytes."""
        return math.prod(self.shape) * self.numpy_dtype.itemsize

    @property
    def checksums(self) -> tuple[str, ...]:
        """The sha256 of every block."""
        return self.blocks or (self.sha256,)

    @property
    def block_bytes(self) -> int:
        """Size of a block; all are alike."""
        return self.nbytes // len(self.checksums)

    def file_bytes(self, format_version: int) -> int:
        """Returns the size of its file."""
        return self.nbytes + (_ENTRY.size * len(self.checksums) if format_version > 1 else 0)

    def to_dict(self) -> dict[str, Any]:
        """Returns the JSON object of this parameter."""
        fields: dict[str, Any] = {"shape": list(self.shape), "dtype": self.dtype}
        if self.sha256:
            fields["sha256"] = self.sha256
        if self.rows is not None:
            fields |= {"rows": self.rows, "blocks": list(self.checksums)}
        return fields | ({"source": dict(self.source)} if self.source else {})


def rows_of_a_block(shape: tuple[int, ...], dtype: str) -> int:
    """Returns the rows in a block as we write it: the largest divisor of axis 0 whose block has at most `BLOCK_BYTES`.

    One row where a row alone is larger; 1 where the array has no axis and is one block.
    """
    if not shape:
        return 1
    most = BLOCK_BYTES // (math.prod(shape[1:]) * STORED_DTYPES[dtype].itemsize)
    return next(rows for rows in range(max(1, min(most, shape[0])), 0, -1) if shape[0] % rows == 0)


def num_blocks(shape: tuple[int, ...], rows: int) -> int:
    """Returns how many blocks of ``rows`` rows an array has."""
    return shape[0] // rows if shape else 1


def shard_index(num_bytes: int, count: int) -> bytes:
    """Returns the index of ``count`` blocks that lie one after the other in the first ``num_bytes`` bytes of a file."""
    size = num_bytes // count
    return b"".join(_ENTRY.pack(block * size, size) for block in range(count))


def chunk_name(shape: tuple[int, ...]) -> str:
    """Returns the path of the only file inside an array's directory, apart from its metadata."""
    return "/".join(["c", *("0" for _ in shape)])


def array_metadata(shape: tuple[int, ...], dtype: str, rows: int | None) -> dict[str, Any]:
    """Returns the ``zarr.json`` of a parameter: one uncompressed file, in format 2 of blocks of ``rows`` rows."""
    return {
        "chunk_grid": {"configuration": {"chunk_shape": list(shape)}, "name": "regular"},
        "chunk_key_encoding": {"name": "default"},
        "codecs": [_raw(STORED_DTYPES[dtype].itemsize) if rows is None else _sharded(shape, dtype, rows)],
        "data_type": dtype,
        "fill_value": 0 if dtype == "int8" else 0.0,
        "node_type": "array",
        "shape": list(shape),
        "zarr_format": 3,
    }


def describes(metadata: Any, parameter: Parameter) -> bool:
    """Returns whether a ``zarr.json`` describes a parameter; what it leaves out has zarr's default."""
    expected = array_metadata(parameter.shape, parameter.dtype, parameter.rows)
    if not isinstance(metadata, dict):
        return False
    fields = {name: value for name, value in metadata.items() if name not in ("attributes", "dimension_names")}
    if not fields.get("storage_transformers"):
        fields.pop("storage_transformers", None)
    if fields.get("chunk_key_encoding") == {"name": "default", "configuration": {"separator": "/"}}:
        fields["chunk_key_encoding"] = {"name": "default"}
    match fields.get("codecs"):
        case [{"name": "sharding_indexed", "configuration": dict(configuration)}]:
            fields["codecs"] = [{"name": "sharding_indexed", "configuration": {"index_location": "end", **configuration}}]
    return fields == expected


def _raw(itemsize: int) -> dict[str, Any]:
    return {"name": "bytes", "configuration": {"endian": "little"}} if itemsize > 1 else {"name": "bytes"}


def _sharded(shape: tuple[int, ...], dtype: str, rows: int) -> dict[str, Any]:
    return {
        "name": "sharding_indexed",
        "configuration": {
            "chunk_shape": [rows, *shape[1:]] if shape else [],
            "codecs": [_raw(STORED_DTYPES[dtype].itemsize)],
            "index_codecs": [_raw(_ENTRY.size)],
            "index_location": "end",
        },
    }
