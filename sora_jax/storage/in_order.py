"""A stored array whose local file begins with its bytes in order: read by the system straight into the caller's memory.

Invariant: such a file was opened without following a link, and its index says that its blocks follow each other; in format 1
they always do.  Any other is left to tensorstore (`pieces`), which takes the index's word and one copy more of every byte.
What was read is not compared here.
"""

import os

import numpy as np

from sora_jax.storage.arrays import Parameter, shard_index
from sora_jax.storage.pieces import Piece, Reading


def is_in_order(descriptor: int, parameter: Parameter) -> bool:
    """Returns whether a file begins with the bytes of its array, as its index says; in format 1 it always does."""
    if parameter.rows is None:
        return True
    index = shard_index(parameter.nbytes, len(parameter.checksums))
    return os.pread(descriptor, len(index), parameter.nbytes) == index


class FileInOrder:
    """An open file that begins with an array; to be closed."""

    def __init__(self, descriptor: int):
        self._descriptor = descriptor

    def read(self, piece: Piece, target: np.ndarray) -> Reading:
        """Reads a piece into ``target`` and returns when it is there.

        Raises:
          OSError: the system cannot read it.
          ValueError: the file ends before.
        """
        view, offset = memoryview(target), piece.start  # type: ignore[arg-type]
        while view:
            count = os.preadv(self._descriptor, [view], offset)
            if not count:
                raise ValueError(f"ends {len(view)} bytes too early")
            view, offset = view[count:], offset + count
        return DONE

    def close(self) -> None:
        """Closes the file."""
        os.close(self._descriptor)


class _Done:
    """A reading that has ended."""

    def result(self) -> None:
        """Does nothing: there is nothing to wait for."""


DONE = _Done()


def open_in_order(path: str | os.PathLike[str], parameter: Parameter) -> FileInOrder | None:
    """Returns the file of an array, open, or None if it is in another order.

    Raises:
      OSError: the system cannot open or read it, or it is a link.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        in_order = is_in_order(descriptor, parameter)
    except BaseException:
        os.close(descriptor)
        raise
    if in_order:
        return FileInOrder(descriptor)
    os.close(descriptor)
    return None
