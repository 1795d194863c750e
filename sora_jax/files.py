"""Files that are whole or absent: every output is written under a temporary name beside its target, then published.

Invariant: a path handed to the user never names a half-written file, and an existing file is replaced only on request.
This module knows nothing about videos or networks.
"""

import contextlib
import fcntl
import hashlib
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

_JUST_BEGUN_S = 60  # a folder this young may belong to a process that has not locked it yet


@contextlib.contextmanager
def whole_file(path: str | os.PathLike[str], *, overwrite: bool = False) -> Iterator[Path]:
    """Yields a temporary path beside ``path``; the file written there becomes ``path`` on success.

    On any exception, Ctrl-C included, the temporary path is removed and ``path`` is left as it was.

    Raises:
      FileExistsError: ``path`` exists and ``overwrite`` is False; also when it appeared while the body ran.
    """
    path = Path(path)
    if not overwrite:
        refuse_existing(path)
    temporary = _beside(path, "partial")
    try:
        yield temporary
        _publish(temporary, path, overwrite)
    finally:
        _remove(temporary)


@contextlib.contextmanager
def whole_folder(path: str | os.PathLike[str], *, overwrite: bool = False) -> Iterator[Path]:
    """Yields an empty folder beside ``path``, which becomes ``path`` on success; on any exception it is removed.

    The folder is locked for as long as it is written, so that the next call tells what a dead process left behind; that is
    removed here.  A replaced folder is moved aside first, and goes when the new one has its name: whenever the process
    dies, one of the two is whole on the disk, and `recover_folder` gives it its name back.  What a library wrote for its
    owner alone becomes readable to whom the umask allows.

    Raises:
      FileExistsError: ``path`` exists and ``overwrite`` is False; also when it appeared while the body ran.
    """
    path = Path(path)
    recover_folder(path)
    if not overwrite:
        refuse_existing(path)
    temporary = _beside(path, "partial")
    temporary.mkdir(parents=True)
    descriptor = os.open(temporary, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield temporary
        _open_to_readers(temporary)
        _publish_folder(temporary, path, overwrite)
    finally:
        os.close(descriptor)
        _remove(temporary)


def recover_folder(path: Path) -> None:
    """Removes what dead processes left of `whole_folder`; if one died while it replaced ``path``, the old folder is back."""
    for aside in path.parent.glob(_pattern(path, "replaced")):
        if not path.exists() and _is_abandoned(aside):
            os.rename(aside, path)
    for suffix in ("partial", "replaced"):
        for left in path.parent.glob(_pattern(path, suffix)):
            if _is_abandoned(left):
                shutil.rmtree(left, ignore_errors=True)


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
    probe = folder / f".probe{_own_suffix('partial')}"
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


def _beside(path: Path, suffix: str) -> Path:
    """Returns a hidden name beside ``path`` that nobody can guess, and that tells whose it is."""
    return path.with_name(f".{_short(path.name)}{_own_suffix(suffix)}")


def _short(name: str) -> str:
    """Returns a name that leaves room for a suffix; of two long names two different ones."""
    return name if len(name) <= 60 else f"{name[:51]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def _own_suffix(suffix: str) -> str:
    return f".{os.getpid()}-{secrets.token_hex(4)}.{suffix}"


def _pattern(path: Path, suffix: str) -> str:
    name = _short(path.name).translate({ord(special): f"[{special}]" for special in "[*?"})
    return f".{name}.[0-9]*-[0-9a-f]*.{suffix}"


def _is_abandoned(folder: Path) -> bool:
    """Returns whether the process that made a folder is gone: nobody holds its lock, and it was not begun just now."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:  # gone meanwhile, somebody else's, or no folder
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        begun = os.fstat(descriptor).st_mtime
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks: the number of the process has to do
        return not _is_alive(_maker(folder))
    finally:
        os.close(descriptor)
    # Numbers of processes are given out again, at once where there are few: the number alone proves nothing.
    return not _is_alive(_maker(folder)) or time.time() - begun > _JUST_BEGUN_S


def _maker(folder: Path) -> int:
    """Returns the number of the process that a temporary name carries."""
    return int(folder.name.rpartition("-")[0].rpartition(".")[2])


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's
        return True
    return True


def _open_to_readers(folder: Path) -> None:
    """Gives everything in a folder the rights that the folder itself was made with, as the umask wants them."""
    rights = folder.stat().st_mode & 0o777
    for path in folder.rglob("*"):
        if not path.is_symlink():
            path.chmod(rights if path.is_dir() else rights & 0o666)


def _publish_folder(temporary: Path, path: Path, overwrite: bool) -> None:
    if not (overwrite and (path.exists() or path.is_symlink())):
        refuse_existing(path)  # rename would replace an empty folder
        os.rename(temporary, path)
        return
    aside = _beside(path, "replaced")
    os.rename(path, aside)
    try:
        os.rename(temporary, path)
    except OSError:
        os.rename(aside, path)
        raise
    with contextlib.suppress(OSError):
        _remove(aside)


def _publish(temporary: Path, path: Path, overwrite: bool) -> None:
    if overwrite:
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
