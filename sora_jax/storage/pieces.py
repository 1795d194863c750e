"""One stored array as tensorstore has it: opened without asking the disk, read a piece at a time into memory that is there.

Invariant: a piece lies within a block, and pieces follow each other without gaps in the order of the array's bytes.  In format
2 a piece is a block, which tensorstore finds by the file's index; in format 1 it is a range of the file's bytes.  What was read
is not compared here.
"""

import dataclasses
import functools
import os
import re
from typing import Any, Protocol, runtime_checkable

import numpy as np

from sora_jax.storage.arrays import Parameter, array_metadata, chunk_name, num_blocks, rows_of_a_block

_SYSTEM_ERROR = re.compile(r"os_error_code='(\d+)'")


@runtime_checkable
class Reading(Protocol):
    """A read under way."""

    def result(self) -> Any:
        """Returns when it is done; raises what went wrong."""


@dataclasses.dataclass(frozen=True)
class Piece:
    """Bytes ``start`` to ``stop`` of an array, part of its block number ``block``."""

    block: int
    start: int
    stop: int
    begins_block: bool
    ends_block: bool

    @property
    def nbytes(self) -> int:
        """Its size."""
        return self.stop - self.start


def pieces_of(parameter: Parameter) -> list[Piece]:
    """Returns the pieces of an array in order."""
    rows = parameter.rows or rows_of_a_block(parameter.shape, parameter.dtype)
    count = num_blocks(parameter.shape, rows)
    size, in_block = parameter.nbytes // count, count // len(parameter.checksums)
    return [
        Piece(
            block=number // in_block,
            start=number * size,
            stop=(number + 1) * size,
            begins_block=number % in_block == 0,
            ends_block=(number + 1) % in_block == 0,
        )
        for number in range(count)
    ]


class StoredArray:
    """An array to be read.

    Args:
      parameter: what the manifest says of it.
      kvstore: tensorstore's key-value store of the array's folder.
      context: tensorstore's limits; None: those of local files.
    """

    def __init__(self, parameter: Parameter, kvstore: dict[str, Any], context: Any = None):
        import tensorstore as ts

        context = _context() if context is None else context
        self._parameter = parameter
        self._key = chunk_name(parameter.shape)
        self._store: Any = None
        if parameter.rows is None:
            self._bytes = ts.KvStore.open(kvstore, context=context).result()
        else:
            metadata = array_metadata(parameter.shape, parameter.dtype, parameter.rows)
            spec = {"driver": "zarr3", "kvstore": kvstore, "metadata": metadata, "fill_missing_data_reads": False}
            self._store = ts.open(spec, context=context, open=True, read=True, assume_metadata=True).result()

    def read(self, piece: Piece, target: np.ndarray) -> Reading:
        """Begins to read a piece into ``target``, bytes that must stay until it is done."""
        import tensorstore as ts

        if self._store is None:
            return _Bytes(self._bytes.read(self._key, byte_range=slice(piece.start, piece.stop)), target)
        shape, rows = self._parameter.shape, self._parameter.rows or 1
        block = target.view(self._parameter.numpy_dtype).reshape((rows, *shape[1:]) if shape else ())
        store = self._store[piece.block * rows : (piece.block + 1) * rows] if shape else self._store
        return ts.array(block).write(store)

    def close(self) -> None:
        """Does nothing: tensorstore opens files for each read."""


class _Bytes:
    """A read of bytes, which tensorstore hands over in memory of its own."""

    def __init__(self, future: Any, target: np.ndarray):
        self._future, self._target = future, target

    def result(self) -> None:
        found = np.frombuffer(self._future.result().value, np.uint8)
        if found.size != self._target.size:
            raise ValueError(f"ends {self._target.size - found.size} bytes too early")
        self._target[...] = found


def problem_of(error: Exception) -> str | OSError:
    """Returns what went wrong with a read: the system's error if there was one, also where tensorstore reports it."""
    if isinstance(error, OSError):
        return error
    found = _SYSTEM_ERROR.search(str(error))
    if found:
        return OSError(int(found[1]), os.strerror(int(found[1])))
    text = str(error).split(" [", 1)[0].rpartition('": ')[2]
    return f"cannot be read ({text})"


@functools.cache
def _context() -> Any:
    import tensorstore as ts

    limits = {name: {"limit": 4} for name in ("file_io_concurrency", "data_copy_concurrency")}
    return ts.Context({"cache_pool": {"total_bytes_limit": 0}, **limits})
