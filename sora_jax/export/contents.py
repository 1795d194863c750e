"""The files of an export, each compared with its recorded sha256 before anything reads it.

Invariant: `Contents` hands out a path only of a file that lies inside the folder, is listed, and has the recorded bytes;
once in a process for each identity of a file (device, inode, size and times), so that loading a stage again costs nothing.
What the bytes mean is not known here.
"""

import contextlib
import dataclasses
import functools
import hashlib
import os
import re
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path

from sora_jax.export.entries import FileEntry

_FORBIDDEN = re.compile(r"[\x00-\x1f\x7f\\:]")  # control characters, and what other systems take for a separator or a drive

Identity = tuple[int, ...]


class ExportFileError(ValueError):
    """A file of an export is missing, damaged, or not what the manifest says of it."""


@dataclasses.dataclass(frozen=True)
class Contents:
    """An exported folder and what its manifest says of its files.

    Attributes:
      folder: where the files are.
      files: size and checksum by path relative to the folder; None while the folder is being written and has no manifest.
    """

    folder: Path
    files: Mapping[str, FileEntry] | None

    def path(self, name: str) -> Path:
        """Returns the path of a verified file.

        Raises:
          ExportFileError: the file is not listed, lies outside the folder, is missing, or has other bytes than recorded.
        """
        path = self.folder / checked_name(name)
        if self.files is None:
            return path
        if name not in self.files:
            raise ExportFileError(f"{path} is not among the files that the manifest lists; export again.")
        if not path.resolve().is_relative_to(self.folder.resolve()):
            raise ExportFileError(f"{path} is a link that leaves the exported folder; copy the file itself there.")
        entry, identity = self.files[name], _identity(path)
        if _size(identity) != entry["bytes"]:
            raise ExportFileError(f"{path} has {_size(identity)} bytes, expected {entry['bytes']}; {_REMEDY}")
        if _sha256(path, identity) != entry["sha256"]:
            raise ExportFileError(f"{path} has other bytes than recorded (sha256); {_REMEDY}")
        return path

    @contextlib.contextmanager
    def reading(self, name: str) -> Iterator[Path]:
        """Yields the path of a verified file that must not change while the body reads it.

        Raises:
          ExportFileError: see `path`; also if the file changed.
        """
        path = self.path(name)
        before = _identity(path)
        yield path
        if _identity(path) != before:
            raise ExportFileError(f"{path} was changed while it was being read; {_REMEDY}")

    def package(self, name: str) -> Path:
        """Returns the path of a folder whose files are all verified; it holds no others.

        Raises:
          ExportFileError: see `path`; also if the folder holds a file that is not listed.
        """
        path = self.folder / checked_name(name)
        if self.files is None:
            return path
        listed = {file for file in self.files if file.startswith(name + "/")}
        if not listed or not path.is_dir():
            raise ExportFileError(f"{path} is missing, or no folder that the manifest lists; {_REMEDY}")
        for file in sorted(listed):
            self.path(file)
        for inner in path.rglob("*"):
            if not inner.is_dir() and str(inner.relative_to(self.folder)) not in listed:
                raise ExportFileError(f"{inner} is not among the files that the manifest lists; remove it, or export again.")
        return path

    def check_sizes(self) -> None:
        """Refuses a folder where a listed file is missing or has another size; reads none of them.

        Raises:
          ExportFileError: names the first such file.
        """
        for name, entry in (self.files or {}).items():
            path = self.folder / checked_name(name)
            try:
                size = _size(_identity(path))
            except FileNotFoundError:
                raise ExportFileError(f"{path} is missing; {_REMEDY}") from None
            if size != entry["bytes"]:
                raise ExportFileError(f"{path} has {size} bytes, expected {entry['bytes']}; {_REMEDY}")


_REMEDY = "copy the whole folder again, or export again."


def checked_name(name: str) -> str:
    """Returns a relative path that stays where it belongs, as it stands in a manifest.

    Raises:
      ExportFileError: it is absolute, leads upwards, or is no path that every system reads alike.
    """
    if _FORBIDDEN.search(name) or any(part in ("", ".", "..") for part in name.split("/")):
        raise ExportFileError(f"the manifest names the file {name!r}; expected a plain path inside the exported folder.")
    return name


def _identity(path: Path) -> Identity:
    """Returns what changes when a file is replaced or written to.

    Raises:
      ExportFileError: it is no regular file; a pipe would never end.
      OSError: there is none, or it may not be read.
    """
    found = os.stat(path)
    if not stat.S_ISREG(found.st_mode):
        raise ExportFileError(f"{path} is not a regular file; {_REMEDY}")
    return found.st_size, found.st_dev, found.st_ino, found.st_mtime_ns, found.st_ctime_ns


def _size(identity: Identity) -> int:
    return identity[0]


@functools.lru_cache(maxsize=4096)
def _sha256(path: Path, _: Identity) -> str:
    """Returns the checksum of a file of an identity, read once."""
    return file_sha256(path)


def file_sha256(path: Path) -> str:
    """Returns the checksum of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
