"""Large files that are on the disk when a function returns, and locks that the system releases when a process dies.

Invariant: no function here follows a symbolic link in the place of the file it writes.  What is written is decided elsewhere;
small files are replaced by `files.write_durably`.
"""

import contextlib
import fcntl
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from sora_jax.files import synchronise
from sora_jax.storage.directory import ModelDirectoryError

_LARGE_BYTES = 1 << 20


@contextlib.contextmanager
def locked(path: Path, what: str, *, wait: bool = False) -> Iterator[None]:
    """Holds a lock file; it is removed in the end.

    Raises:
      ModelDirectoryError: another process holds it, and ``wait`` is False.
    """
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            os.close(descriptor)
            raise ModelDirectoryError(f"another process is writing {what}; wait for it to end.") from None
        # The holder before us may have removed the file between our open and our lock.
        if path.exists() and os.path.samestat(os.fstat(descriptor), path.stat()):
            break
        os.close(descriptor)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)


@contextlib.contextmanager
def created(path: Path) -> Iterator[int]:
    """Yields the descriptor of a file that is new or emptied; a link in its place is not followed."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o644)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def write_all(descriptor: int, data: memoryview) -> None:
    """Writes all bytes, however many the system takes at a time."""
    while data:
        data = data[os.write(descriptor, data) :]


def sync_all(paths: Sequence[Path]) -> None:
    """Waits until files and folders are on the disk.

    Linux's ``sync`` waits for everything, which for hundreds of small files takes a tenth of the time of ``fsync`` on each;
    large files are synchronised one by one all the same, because only ``fsync`` reports a failure.
    """
    for path in paths:
        if sys.platform != "linux" or path.stat().st_size >= _LARGE_BYTES:
            synchronise(path)
    if sys.platform == "linux":
        os.sync()
