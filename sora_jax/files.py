"""Files that are whole or absent: every output is written under a temporary name beside its target, then published.

Invariant: a path handed to the user never names a half-written file, and an existing file is replaced only on request.
This module knows nothing about videos or networks.
"""

import contextlib
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path


@contextlib.contextmanager
def whole_file(path: str | os.PathLike[str], *, overwrite: bool = False) -> Iterator[Path]:
    """Yields a temporary path beside ``path``; what was written there (file or folder) becomes ``path`` on success.

    On any exception, Ctrl-C included, the temporary path is removed and ``path`` is left as it was.

    Raises:
      FileExistsError: ``path`` exists and ``overwrite`` is False; also when it appeared while the body ran.
    """
    path = Path(path)
    if not overwrite:
        refuse_existing(path)
    temporary = path.with_name(f".{path.name[:60]}{_partial_suffix()}")
    try:
        yield temporary
        _publish(temporary, path, overwrite)
    finally:
        _remove(temporary)


def write_text(path: str | os.PathLike[str], text: str, *, overwrite: bool = False) -> None:
    """Writes a text file (UTF-8), whole or not at all."""
    with whole_file(path, overwrite=overwrite) as temporary:
        temporary.write_text(text, encoding="utf-8")


def refuse_missing(path: str | os.PathLike[str], what: str, *, remedy: str = "") -> None:
    """Raises FileNotFoundError unless ``path`` is a file; ``what`` says of what kind, ``remedy`` what to do."""
    if not Path(path).is_file():
        state = "is a folder" if Path(path).is_dir() else "does not exist"
        raise FileNotFoundError(f"{what} {path} {state}{'; ' if remedy else ''}{remedy or '.'}")


def refuse_existing(*paths: Path) -> None:
    """Raises FileExistsError if one of the paths exists, naming the two ways out."""
    for path in paths:
        if path.exists() or path.is_symlink():
            raise FileExistsError(f"{path} exists; pass --overwrite (overwrite=True) or choose another name.")


def check_target(path: Path, *, overwrite: bool) -> None:
    """Proves that a file may be written at ``path``, creating its folder if it is missing.

    Raises:
      ValueError: the name is not UTF-8: it could be neither printed nor handed to other libraries.
      FileExistsError: ``path`` exists and ``overwrite`` is False.
      IsADirectoryError: ``path`` is a folder, which is never replaced by a file.
      OSError: the folder cannot be created or written.
    """
    if not is_utf8(str(path)):
        raise ValueError(f"{str(path)!r} is no name in UTF-8; choose another one.")
    if not overwrite:
        refuse_existing(path)
    _refuse_folder(path)
    refuse_unwritable(path.parent)


def refuse_unwritable(folder: str | os.PathLike[str]) -> None:
    """Creates ``folder`` if it is missing and proves that a file can be written in it, leaving nothing behind.

    Raises:
      OSError: the folder cannot be created or written.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"cannot write into folder {folder}: it is a file.")
    probe = folder / f".probe{_partial_suffix()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
    except OSError as error:
        raise type(error)(error.errno, f"cannot write into folder {folder}: {error.strerror}") from error
    finally:
        with contextlib.suppress(OSError):
            probe.unlink()


def remove_partial(*folders: str | os.PathLike[str]) -> None:
    """Removes what this process has begun to write in the folders: for a process that ends without unwinding."""
    for folder in folders:
        for path in Path(folder).glob(f".*.{os.getpid()}-*.partial"):
            with contextlib.suppress(OSError):
                _remove(path)


def is_utf8(text: str) -> bool:
    """Returns whether a text can be printed and stored; what the shell hands over in another encoding cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def numbered(path: Path, beside: Callable[[Path], Path] = lambda path: path) -> Path:
    """Returns the first of ``path``, ``name_2``, ``name_3``, ... that is free, as is the file ``beside`` it."""
    candidate, number = path, 2
    while any(taken.exists() or taken.is_symlink() for taken in (candidate, beside(candidate))):
        candidate = path.with_name(f"{path.stem}_{number}{path.suffix}")
        number += 1
    return candidate


def _partial_suffix() -> str:
    return f".{os.getpid()}-{secrets.token_hex(4)}.partial"


def _publish(temporary: Path, path: Path, overwrite: bool) -> None:
    if temporary.is_dir():
        if overwrite:
            _remove(path)
        else:
            refuse_existing(path)  # rename would replace an empty folder
        os.rename(temporary, path)
    elif overwrite:
        _refuse_folder(path)
        os.replace(temporary, path)
    else:
        _link(temporary, path)


def _refuse_folder(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        raise IsADirectoryError(f"{path} is a folder; choose another name or remove it.")


def _link(temporary: Path, path: Path) -> None:
    """Gives the file its final name; unlike rename, a hard link never replaces what another process put there."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        refuse_existing(path)
        raise
    except OSError:  # a file system without hard links
        refuse_existing(path)
        os.rename(temporary, path)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
