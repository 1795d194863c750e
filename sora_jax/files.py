"""Files that are whole or absent: every output is written under a temporary name next to its target, then published.

Invariant: a path that the user sees never names a half-written file, and an existing file is replaced only on request.
Temporary names are random and made anew, so that no link that was put there before is followed; what a dead process left
under such a name is removed by the next one that writes into the folder.  This module knows nothing about videos or networks.
"""

import contextlib
import errno
import functools
import hashlib
import math
import os
import re
import secrets
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

_PARTIAL = re.compile(r"\..*\.([0-9a-f]{8})-([0-9]+)-([0-9]+)-[0-9a-f]{8}\.partial", re.DOTALL)
_MAX_NAME_BYTES = 100  # of the target's name in a temporary one; file systems allow 255
_REPLACED = ".sora-jax-replaced"
_ADVICE = {
    errno.EACCES: "check the permissions of the file and of its folders",
    errno.EPERM: "check the permissions of the file and of its folders",
    errno.EROFS: "choose a folder on a disk that can be written",
    errno.ENOSPC: "make room and run the same command again",
    errno.EDQUOT: "make room within your quota and run the same command again",
    errno.EIO: "the disk or the network drive failed; check it before trying again",
    errno.EMFILE: "allow more open files (ulimit -n 4096)",
    errno.ELOOP: "symbolic links point at each other",
    errno.ESTALE: "the network drive lost the file; mount it again",
}
# Leftovers of another machine or an earlier boot, whose processes cannot be seen from here.
_ABANDONED_S = 24 * 3600.0


@contextlib.contextmanager
def whole_file(path: str | os.PathLike[str], *, overwrite: bool = False) -> Iterator[Path]:
    """Yields a temporary path; what was written there (file or folder) becomes ``path`` on success.

    The temporary path has the target's own name, in a new folder next to the target that nobody else may enter.  On any
    exception, Ctrl-C included, it is removed and ``path`` is left as it was.

    Raises:
      FileExistsError: ``path`` exists and ``overwrite`` is False; also when it appeared while the body ran.
    """
    path = Path(path)
    if not overwrite:
        refuse_existing(path)
    remove_leftovers(path.parent)
    folder = path.parent / _partial_name(path.name)
    try:
        folder.mkdir(0o700)
    except OSError as error:  # the hidden name would tell the user nothing
        raise type(error)(error.errno, error.strerror, str(path)) from error
    try:
        yield folder / path.name
        _publish(folder / path.name, path, overwrite)
    finally:
        _remove(folder)


@contextlib.contextmanager
def whole_folder(path: str | os.PathLike[str], *, overwrite: bool = False) -> Iterator[Path]:
    """Yields an empty folder, which becomes ``path`` on success, as `whole_file` does it; on any exception it is removed.

    Whenever the process dies while it replaces a folder, the old or the new one is whole, and `remove_leftovers` gives it
    its name.  What a library wrote for its owner alone becomes readable to whom the umask allows.

    Raises:
      FileExistsError: ``path`` exists and ``overwrite`` is False; also when it appeared while the body ran.
    """
    with whole_file(path, overwrite=overwrite) as temporary:
        temporary.mkdir()
        yield temporary
        _open_to_readers(temporary)


def write_durably(path: str | os.PathLike[str], content: bytes) -> None:
    """Writes a small file, or replaces it, so that it has its old or its new content whatever happens.

    A link with that name is replaced, not followed.  The content is on the disk when the function returns.
    """
    path = Path(path)
    remove_leftovers(path.parent)
    temporary = path.parent / _partial_name(path.name)
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    try:
        with open(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    synchronise(path.parent)


def synchronise(path: str | os.PathLike[str]) -> None:
    """Waits until a file's content, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: str | os.PathLike[str], text: str, *, overwrite: bool = False) -> None:
    """Writes a text file (UTF-8), whole or not at all."""
    with whole_file(path, overwrite=overwrite) as temporary:
        temporary.write_text(text, encoding="utf-8")


def advice(error: OSError) -> str:
    """Returns what to do about an error of the system, to be put behind what it said; empty where that is clear."""
    known = _ADVICE.get(error.errno or 0)
    return f"; {known}" if known else ""


def refuse_missing(path: str | os.PathLike[str], what: str, *, remedy: str = "") -> None:
    """Raises FileNotFoundError unless ``path`` is a file; ``what`` says of what kind, ``remedy`` what to do."""
    path = Path(path)
    if not path.is_file():
        state = "is a folder" if path.is_dir() else "is no regular file" if path.exists() else "does not exist"
        raise FileNotFoundError(f"{what} {path} {state}{'; ' if remedy else ''}{remedy or '.'}")


def refuse_existing(*paths: Path) -> None:
    """Raises FileExistsError if one of the paths exists, naming the two ways out."""
    for path in paths:
        if path.exists() or path.is_symlink():
            raise FileExistsError(f"{path} exists; pass --overwrite (overwrite=True) or choose another name.")


def check_target(path: Path, *, overwrite: bool) -> None:
    """Proves that a file may be written at ``path``, creating its folder if it is missing.

    Raises:
      ValueError: the name is not UTF-8: it could neither be printed nor passed to other libraries.
      FileExistsError: ``path`` exists and ``overwrite`` is False.
      IsADirectoryError: ``path`` is a folder, which is never replaced by a file.
      OSError: the folder cannot be created or written.
    """
    check_name(path)
    if not overwrite:
        refuse_existing(path)
    _refuse_folder(path)
    refuse_unwritable(path.parent)


def check_name(path: Path) -> None:
    """Refuses a path that other libraries would take for another one, or that nobody could print.

    Raises:
      ValueError: it is not UTF-8, or has a zero byte.
    """
    if not is_utf8(str(path)):
        raise ValueError(f"{str(path)!r} is no name in UTF-8; choose another one.")
    if "\0" in str(path):
        raise ValueError(f"{str(path)!r} has a zero byte, which no name of a file can have; choose another one.")


@contextlib.contextmanager
def claimed(*paths: Path) -> Iterator[None]:
    """Claims the paths while the body runs, so that of two processes that would write to one path the later gives way at once.

    Raises:
      FileExistsError: another process has begun to write to one of the paths.
      OSError: the folder cannot be written.
    """
    with contextlib.ExitStack() as claims:
        for path in paths:
            claims.enter_context(_claimed(path))
        yield


@contextlib.contextmanager
def _claimed(path: Path) -> Iterator[None]:
    own = path.parent / _partial_name(path.name)
    own.touch(exist_ok=False)
    try:
        since = own.stat().st_mtime_ns, own.name
        for other, owner in _partials(path.parent):
            if _stem(other) == _stem(own) and _begun(other) < since and not _is_dead(other, owner):
                raise FileExistsError(f"another process is writing {path}; wait for it to end, or choose another name.")
        yield
    finally:
        own.unlink(missing_ok=True)


def _begun(partial: Path) -> tuple[int | float, str]:
    """Returns when a temporary name was made, by which two are put in order; one that is gone came last."""
    try:
        return partial.lstat().st_mtime_ns, partial.name
    except OSError:
        return math.inf, partial.name


def refuse_unwritable(folder: str | os.PathLike[str]) -> None:
    """Creates ``folder`` if it is missing and proves that a file can be written in it, leaving nothing behind.

    What dead processes had begun to write there is removed, so that a run that finds its work done clears up too.

    Raises:
      OSError: the folder cannot be created or written.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"cannot write into folder {folder}: it is a file.")
    probe = folder / _partial_name("probe")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        remove_leftovers(folder)
        probe.touch(exist_ok=False)
    except OSError as error:
        raise type(error)(error.errno, f"cannot write into folder {folder}: {error.strerror}") from error
    finally:
        with contextlib.suppress(OSError):
            probe.unlink()


def remove_partial(*folders: str | os.PathLike[str]) -> None:
    """Removes what this process has begun to write in the folders: for a process that ends without unwinding."""
    for folder in folders:
        for path, owner in _partials(Path(folder)):
            if owner == _owner():
                with contextlib.suppress(OSError):
                    _remove(path)


@functools.cache
def remove_leftovers(folder: Path) -> None:
    """Removes what dead processes had begun to write in a folder; looks at each folder once in the life of this process.

    A folder whose replacement was interrupted between its two renames is completed instead.
    """
    for path, owner in _partials(folder):
        if _is_dead(path, owner):
            with contextlib.suppress(OSError):
                _complete(path)
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


Owner = tuple[str, int, int]


def _partial_name(name: str) -> str:
    """Returns a new temporary name, which identifies the process that writes it."""
    machine, process, start = _owner()
    stem = os.fsencode(name)[:_MAX_NAME_BYTES].decode("utf-8", "ignore")
    return f".{stem}.{machine}-{process}-{start}-{secrets.token_hex(4)}.partial"


def _stem(partial: Path) -> str:
    """Returns what a temporary name keeps of the target's."""
    return partial.name.removesuffix(".partial").rpartition(".")[0]


def _owner() -> Owner:
    """Returns what identifies this process among all others: machine and boot, number, and start time."""
    return _machine(), os.getpid(), _start_time(os.getpid()) or 0


def _partials(folder: Path) -> list[tuple[Path, Owner]]:
    """Returns what is being written, or was left, in a folder, with its owner."""
    found = []
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.endswith(".partial") and (match := _PARTIAL.fullmatch(entry.name)):
                machine, process, start = match.groups()
                found.append((folder / entry.name, (machine, int(process), int(start))))
    return found


def _is_dead(path: Path, owner: Owner) -> bool:
    machine, process, start = owner
    if machine == _machine():
        return not _is_alive(process, start)
    with contextlib.suppress(OSError):
        touched = max(entry.lstat().st_mtime for entry in (path, *path.rglob("*")))
        return time.time() - touched > _ABANDONED_S
    return False


def _is_alive(process: int, start: int) -> bool:
    found = _start_time(process)
    if found is not None:
        return found == start
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    return True


@functools.cache
def _machine() -> str:
    """Returns eight hexadecimal digits for this boot of this machine and, in a container, its own count of processes."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text("ascii")
        text = boot + os.readlink("/proc/self/ns/pid")
    except OSError:
        text = socket.gethostname()
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def _start_time(process: int) -> int | None:
    """Returns when a process began, in the kernel's ticks; None where the system does not tell."""
    try:
        return int(Path(f"/proc/{process}/stat").read_text("utf-8", "replace").rpartition(")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return None


def _publish(temporary: Path, path: Path, overwrite: bool) -> None:
    if temporary.is_dir() and not temporary.is_symlink():
        if not overwrite:
            refuse_existing(path)  # rename would replace an empty folder
            os.rename(temporary, path)
        elif path.exists() or path.is_symlink():
            _replace_folder(temporary, path)
        else:
            os.rename(temporary, path)
    elif overwrite:
        _refuse_folder(path)
        os.replace(temporary, path)
    else:
        _link(temporary, path)


def _replace_folder(temporary: Path, path: Path) -> None:
    """Gives a new folder the name of the old one, which is removed with the temporary folder, or gets its name back."""
    aside = temporary.parent / _REPLACED
    os.rename(path, aside)
    try:
        os.rename(temporary, path)
    except BaseException:
        if not os.path.lexists(path):
            os.rename(aside, path)
        raise


def _complete(partial: Path) -> None:
    """Finishes the replacement of a folder: where the old one was moved away, the new one is whole."""
    if partial.is_dir() and os.path.lexists(partial / _REPLACED):
        for new in partial.iterdir():
            target = partial.parent / new.name
            if new.name != _REPLACED and not os.path.lexists(target):
                os.rename(new, target)


def _open_to_readers(folder: Path) -> None:
    """Gives everything in a folder the rights that the folder itself was made with, as the umask wants them."""
    rights = folder.stat().st_mode & 0o777
    for path in folder.rglob("*"):
        if not path.is_symlink():
            path.chmod(rights if path.is_dir() else rights & 0o666)


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
