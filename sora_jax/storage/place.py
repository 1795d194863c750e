"""Where a network's files lie, as far as reading is concerned: a folder on this machine.

Invariant: a name leads to a regular file inside the folder or is refused: no symbolic link is followed, no device or pipe is
opened, and nothing is read without a limit.  A place on a network is a `site.Site`, which answers the same questions but
`identity`; the reader decides what is done with the answers.
"""

import os
import stat
from pathlib import Path
from typing import Any

Identity = tuple[int, int, int, int, int]  # device, inode, bytes, and the nanoseconds of the last change of data and of inode


class NotRegular(OSError):
    """There is something, but no regular file: its ``strerror`` says what."""


class CutShort(NotRegular):
    """A file ends before the bytes that were asked for; it has ``size`` bytes, if that is known."""

    def __init__(self, size: int | None, path: str):
        super().__init__(0, "ends too early" if size is None else f"has {size} bytes, which are too few", path)
        self.size = size


class Unreachable(OSError):
    """A file on a network cannot be fetched: ``strerror`` says why, ``advice`` what may help."""

    def __init__(self, problem: str, path: str, advice: str):
        super().__init__(0, problem, path)
        self.advice = advice


class Folder:
    """A folder whose files are named by relative paths with slashes."""

    def __init__(self, path: str | os.PathLike[str]):
        self._path = Path(path)

    def locate(self, name: str) -> Path:
        """Returns the path of a file, as users and errors name it."""
        return self._path / name

    def text(self, name: str, limit: int) -> str:
        """Returns the text of a file of at most ``limit`` bytes.

        Raises:
          OSError: it is missing, unreadable, no regular file, or longer.
          UnicodeDecodeError: it is not UTF-8.
        """
        return self.data(name, limit).decode()

    def data(self, name: str, limit: int) -> bytes:
        """Returns the bytes of a file of at most ``limit`` bytes.

        Raises:
          OSError: it is missing, unreadable, no regular file, or longer.
        """
        self.identity(name)
        with open(self.locate(name), "rb") as file:
            data = file.read(limit + 1)
        if len(data) > limit:
            raise NotRegular(0, f"has more than {limit} bytes", str(self.locate(name)))
        return data

    def has(self, name: str) -> bool:
        """Returns whether there is such a file, or a link to one."""
        return self.locate(name).is_file()

    def identity(self, name: str) -> Identity:
        """Returns what changes whenever the file does.

        Raises:
          OSError: it is missing, or a link or something else than a file stands in its place or on the way to it.
        """
        path, parts = str(self._path), name.split("/")
        for depth, part in enumerate(parts, 1):
            path = f"{path}/{part}"
            status = os.lstat(path)
            if not (stat.S_ISREG if depth == len(parts) else stat.S_ISDIR)(status.st_mode):
                what = "a symbolic link, which is not followed" if stat.S_ISLNK(status.st_mode) else "of another kind"
                raise NotRegular(0, f"is not there: {path} is {what}" if depth < len(parts) else f"is {what}", path)
        return (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)

    def store(self, name: str) -> dict[str, Any]:
        """Returns tensorstore's key-value store of the files below a name."""
        return {"driver": "file", "path": f"{self.locate(name)}/"}
