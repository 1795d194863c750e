"""Reading groups of parameters, in order, into a few reused buffers, on a thread, while earlier groups are computed with.

Invariant: no more than ``num_slots`` groups are in memory, a buffer is written again only after its group was given back, and
the thread ends with the ``with`` block, whatever happened in it.  Files are read, not mapped, so a file that shrinks is an
error and not a signal.  What a group is computed with is not this module's business.
"""

import contextlib
import hashlib
import mmap
import os
import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Self

import numpy as np

from sora_jax.storage.directory import STORED_DTYPES, Manifest, damaged, layer_of

ALIGNMENT = 64  # bytes; XLA takes aligned host memory without copying it
STALL_S = 300.0  # a group that takes longer to read is an error: a disk, or a network file system, that hangs
_PIECE_BYTES = 1 << 24  # read at a time; between pieces the thread notices that it should end


class Verified:
    """The parameter files whose checksums were compared, by identity, so that each is compared once; ``off`` compares none."""

    def __init__(self, *, off: bool = False):
        self.off = off
        self._seen: set[tuple[str, int, int, int, int]] = set()

    def check(self, path: str, status: os.stat_result, data: memoryview, sha256: str) -> bool:
        """Returns whether the bytes are those that the manifest promises."""
        identity = (path, status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
        if self.off or identity in self._seen:
            return True
        if hashlib.sha256(data).hexdigest() != sha256:
            return False
        self._seen.add(identity)
        return True


class Staging:
    """An iterator over groups of parameters: for each, its arrays by flat name, valid until the next one is asked for.

    Args:
      manifest: the network that the parameters belong to.
      groups: flat names of stored arrays; a group may occur more than once.
      num_slots: buffers.  With two, the next group is read while one is computed with; with one, reading waits.
      verified: which files need no comparison of checksums any more.
      around: entered around every read of a group, with its position and bytes, on the reading thread.
      stall_s: seconds that reading one group may take.
    """

    def __init__(
        self,
        manifest: Manifest,
        groups: Sequence[Sequence[str]],
        *,
        num_slots: int,
        verified: Verified,
        around: Callable[[int, int], AbstractContextManager[Any]] = lambda _position, _bytes: contextlib.nullcontext(),
        stall_s: float = STALL_S,
    ):
        self._around = around
        self._manifest, self._groups, self._verified, self._stall_s = manifest, groups, verified, stall_s
        self._num_slots = min(num_slots, len(groups))
        self._size = max((group_bytes(manifest, group) for group in groups), default=0)
        self._free: queue.SimpleQueue[memoryview | None] = queue.SimpleQueue()
        self._ready: queue.SimpleQueue[tuple[memoryview, Mapping[str, np.ndarray]] | BaseException] = queue.SimpleQueue()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._read_all, name=f"read {manifest.network}", daemon=True)

    def __enter__(self) -> Self:
        for _ in range(self._num_slots):
            self._free.put(memoryview(mmap.mmap(-1, max(self._size, mmap.PAGESIZE))))
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._free.put(None)
        self._thread.join(self._stall_s)  # a read that hangs is left to itself: its thread ends with it

    def __iter__(self) -> Iterator[Mapping[str, np.ndarray]]:
        """Yields the groups in order.

        Raises:
          ModelDirectoryError: a file is missing, unreadable, of the wrong size, or not what the manifest says.
          TimeoutError: reading a group does not end.
        """
        for group in self._groups:
            try:
                ready = self._ready.get(timeout=self._stall_s)
            except queue.Empty:
                layer = layer_of(group[0], self._manifest.layers)
                where = f"{self._manifest.network} layer {layer} in {self._manifest.path}"
                raise TimeoutError(f"{where} was not read within {self._stall_s:g} s; check the disk.") from None
            if isinstance(ready, BaseException):
                raise ready
            slot, arrays = ready
            del ready
            yield arrays
            del arrays
            self._free.put(slot)

    def _read_all(self) -> None:
        try:
            for position, group in enumerate(self._groups):
                slot = self._free.get()
                if slot is None:
                    return
                with self._around(position, group_bytes(self._manifest, group)):
                    arrays = self._read_group(group, slot)
                self._ready.put((slot, arrays))
                del arrays
        except _Stopped:
            pass
        except BaseException as error:  # handed to the consumer, whose error it is
            self._ready.put(error)

    def _read_group(self, group: Sequence[str], slot: memoryview) -> Mapping[str, np.ndarray]:
        arrays, offset = {}, 0
        for name in group:
            parameter = self._manifest.parameters[name]
            data = slot[offset : offset + parameter.nbytes]
            read_parameter(self._manifest, name, data, self._verified, self._stop)
            arrays[name] = np.frombuffer(data, STORED_DTYPES[parameter.dtype]).reshape(parameter.shape)
            offset += _aligned(parameter.nbytes)
        return arrays


def group_bytes(manifest: Manifest, group: Sequence[str]) -> int:
    """Returns the bytes that a group takes in a buffer."""
    return sum(_aligned(manifest.parameters[name].nbytes) for name in group)


def read_parameter(
    manifest: Manifest, name: str, into: memoryview, verified: Verified, stop: threading.Event | None = None
) -> None:
    """Fills ``into`` with the bytes of a stored array.

    Raises:
      ModelDirectoryError: the file is missing, unreadable, of the wrong size, or not what the manifest says.
    """
    parameter = manifest.parameters[name]
    with parameter_file(manifest, name) as descriptor:
        status = os.fstat(descriptor)
        done = _fill(descriptor, into, stop)
    if done != parameter.nbytes:
        raise damaged(manifest, name, f"ended at byte {done} while it was read")
    if not verified.check(str(manifest.chunk_path(name)), status, into, parameter.sha256):
        raise damaged(manifest, name, "was changed: its bytes do not have the manifest's checksum")


@contextlib.contextmanager
def parameter_file(manifest: Manifest, name: str) -> Iterator[int]:
    """Yields the descriptor of a stored array's file; what goes wrong with it is named.

    Raises:
      ModelDirectoryError: the file is missing, unreadable or of the wrong size.
    """
    expected = manifest.parameters[name].nbytes
    try:
        descriptor = os.open(manifest.chunk_path(name), os.O_RDONLY)
        try:
            size = os.fstat(descriptor).st_size
            if size != expected:
                raise damaged(manifest, name, f"has {size} bytes, expected {expected}")
            yield descriptor
        finally:
            os.close(descriptor)
    except OSError as error:
        raise damaged(manifest, name, error) from error


class _Stopped(Exception):
    """The consumer has left."""


def _fill(descriptor: int, into: memoryview, stop: threading.Event | None) -> int:
    done = 0
    while done < len(into):
        if stop is not None and stop.is_set():
            raise _Stopped
        count = os.preadv(descriptor, [into[done : done + _PIECE_BYTES]], done)
        if not count:
            break
        done += count
    return done


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT
