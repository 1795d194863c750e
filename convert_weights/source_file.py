"""A source file, open for positional reads, that notices when it is changed under the reader's hands.

Invariant: every byte that a conversion uses comes from the file whose size, times and inode were seen when its header was
read; ``check_unchanged`` says at the end that they are still the same.  What the bytes mean is not known here.
"""

import dataclasses
import os
import stat
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from convert_weights.errors import SourceError, unreadable

# The kernel stamps files with the time of its last tick; a file younger than that could change without a new stamp.
_TICK_NS = 10_000_000


@dataclasses.dataclass(frozen=True)
class Identity:
    """What distinguishes a file from another one, and from itself after a change."""

    device: int
    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int

    @classmethod
    def of(cls, found: os.stat_result) -> "Identity":
        """Returns the identity in what ``stat`` found."""
        return cls(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


class OpenFile:
    """An open source file; use as a context manager.

    Args:
      path: a regular file, or a link to one.
      expected: the identity that the file had when its header was read.
      settle: wait until a change would show in the file's times, for a file that was written just now.

    Raises:
      SourceError: it cannot be opened, is no regular file, or is not the one that was expected.
    """

    def __init__(self, path: Path, expected: Identity | None = None, *, settle: bool = False):
        self.path = path
        try:
            # Without O_NONBLOCK, a named pipe in place of a file would wait for its writer.
            self._descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            raise unreadable(error, path) from error
        try:
            found = os.fstat(self._descriptor)
            if not stat.S_ISREG(found.st_mode):
                raise SourceError(f"{path} is not a regular file.")
            if settle and 0 <= time.time_ns() - found.st_mtime_ns < _TICK_NS:
                time.sleep(_TICK_NS / 1e9)
                found = os.fstat(self._descriptor)
            self.identity = Identity.of(found)
            if expected not in (None, self.identity):
                raise self._changed()
        except BaseException:
            os.close(self._descriptor)
            raise

    def __enter__(self) -> "OpenFile":
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)

    def read(self, offset: int, into: np.ndarray) -> None:
        """Fills ``into`` (uint8) with the bytes at ``offset``.

        Raises:
          SourceError: the file ends before, or the system cannot read it.
        """
        self._fill(memoryview(into), offset)  # type: ignore[arg-type]

    def read_bytes(self, offset: int, count: int) -> bytes:
        """Returns ``count`` bytes at ``offset``, with the errors of ``read``; the caller has checked the count."""
        buffer = bytearray(count)
        self._fill(memoryview(buffer), offset)
        return bytes(buffer)

    def pieces(self, buffer: np.ndarray) -> Iterator[memoryview]:
        """Yields the file from beginning to end, piece by piece in ``buffer`` (uint8)."""
        view, offset = memoryview(buffer), 0  # type: ignore[arg-type]
        while count := self._read_some(view, offset):
            yield view[:count]
            offset += count

    def check_unchanged(self) -> None:
        """Refuses a file that is no longer what it was when it was opened.

        Raises:
          SourceError: size, times or inode differ, or another file has its name now.
        """
        try:
            now = (Identity.of(os.fstat(self._descriptor)), Identity.of(os.stat(self.path)))
        except OSError as error:
            raise self._changed() from error
        if any(identity != self.identity for identity in now):
            raise self._changed()

    def _fill(self, view: memoryview, offset: int) -> None:
        while view:
            count = self._read_some(view, offset)
            if count == 0:
                raise SourceError(f"{self.path} ended at byte {offset} while it was being read; was it changed or truncated?")
            view, offset = view[count:], offset + count

    def _read_some(self, view: memoryview, offset: int) -> int:
        try:
            return os.preadv(self._descriptor, [view], offset)
        except OSError as error:
            raise unreadable(error, self.path) from error

    def _changed(self) -> SourceError:
        return SourceError(f"{self.path} was changed while it was being read; try again when nothing writes to it.")
