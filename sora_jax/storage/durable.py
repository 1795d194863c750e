"""Files that are on the disk when a function returns, and locks that the system releases when a process dies.

Invariant: no function here follows a symbolic link in the place of the file it writes, and temporary names cannot be guessed.
What is written is decided elsewhere.
"""

import contextlib
import fcntl
import os
import secrets
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from sora_jax.storage.directory import ModelDirectoryError

_LARGE_BYTES = 1 << 20
_NEW = ".new"  # ends the name of a file that is about to replace another


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


def write_durably(path: Path, text: str) -> None:
    """Replaces a small file so that it has its old or its new content whatever happens; to be called under a lock."""
    for left in path.parent.glob(f".{path.name.lstrip('.')}.*{_NEW}"):
        left.unlink(missing_ok=True)  # of a process that died
    temporary = path.with_name(f".{path.name.lstrip('.')}.{secrets.token_hex(8)}{_NEW}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o644)
    try:
        try:
            write_all(descriptor, memoryview(text.encode()))
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


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
            sync(path)
    if sys.platform == "linux":
        os.sync()


def sync(path: Path) -> None:
    """Waits until a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
