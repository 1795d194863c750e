"""Comparing what was read with the manifest's checksums, block by block, once for every state of a file.

Invariant: a block counts as known only while its file is the one, by every mark of the system, that its bytes were read from
and compared; what is known is state of the process, shared by all who read, and says nothing about values in memory.  Hashing
runs on threads while others read.
"""

import functools
import hashlib
import os
import threading
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from sora_jax.storage.arrays import Parameter
from sora_jax.storage.location import Location
from sora_jax.storage.place import Identity

_SMALL_BYTES = 1 << 16  # hashed at once: handing over to a thread takes longer
_CLOCK_NS = 20_000_000  # file systems mark changes no more finely; a file changed just now may change again unmarked
_MAX_THREADS = 8


class Mismatch(Exception):
    """A parameter's bytes are not those that its manifest records; its flat name is the argument."""


class Comparison:
    """The checksums of one reading of some parameters.

    Args:
      parameters: what the manifest says, by flat name.
      paths: their files.
      identities: identities of the files before the reading begins; none of files on a network, whose state comes with every
        block.
    """

    def __init__(self, parameters: Mapping[str, Parameter], paths: Mapping[str, Location], identities: Mapping[str, Identity]):
        self._parameters, self._paths, self._identities = parameters, paths, identities
        self._began_ns = time.time_ns()
        self._running: list[tuple[str, int, Future[str], str | None]] = []
        self._unseen: set[str] = set()

    def is_known(self, name: str, block: int, state: str | None = None) -> bool:
        """Returns whether a block was compared before; ``state`` is that of a file on a network, if the server told it."""
        known, key = _KNOWN.get(self._paths[name]), self._key(name, state)
        return known is not None and key is not None and known[:2] == key and block in known[2]

    def add(self, name: str, block: int, data: np.ndarray, state: str | None = None) -> None:
        """Takes a block that was read; its bytes must stay until the end.  One that is known is not hashed again."""
        if self.is_known(name, block, state):
            self.trust(name)
        else:
            self._running.append((name, block, _begin(data), state))

    def trust(self, name: str) -> None:
        """Takes note that known bytes of a parameter were not hashed again."""
        self._unseen.add(name)

    def add_digest(self, name: str, block: int, digest: str) -> None:
        """Takes the sha256 of a block whose bytes are not kept."""
        done: Future[str] = Future()
        done.set_result(digest)
        self._running.append((name, block, done, None))

    def end(self, identities: Mapping[str, Identity], arrays: Mapping[str, np.ndarray] | None = None) -> None:
        """Waits for the checksums, and remembers them for files that did not change.

        Args:
          identities: identities of the files after the reading.
          arrays: the whole arrays, if they are in memory: what was known of a file that changed is compared after all.

        Raises:
          Mismatch: a checksum differs, or a file changed and its bytes can no longer be compared.
        """
        changed = {name for name, identity in identities.items() if identity != self._identities[name]}
        for name in sorted(changed & self._unseen):
            if arrays is None:
                raise Mismatch(name)
            blocks = blocks_of(arrays[name], self._parameters[name])
            self._running += [(name, block, _begin(data), None) for block, data in enumerate(blocks)]
        for name, block, digest, _ in self._running:
            if digest.result() != self._parameters[name].checksums[block]:
                raise Mismatch(name)
        for name, block, _, state in self._running:
            if name not in changed:
                self._remember(name, block, state)

    def _remember(self, name: str, block: int, state: str | None) -> None:
        path, key = self._paths[name], self._key(name, state)
        if key is None or self._is_recent(name):
            return
        with _LOCK:
            known = _KNOWN.get(path)
            if known is None or known[:2] != key:
                known = _KNOWN[path] = (*key, set())
            known[2].add(block)

    def _is_recent(self, name: str) -> bool:
        """Returns whether a local file was changed so shortly before the reading that another change may leave no mark."""
        if name not in self._identities:
            return False
        *_, modified_ns, changed_ns = self._identities[name]
        return self._began_ns - max(modified_ns, changed_ns) < _CLOCK_NS

    def _key(self, name: str, state: str | None) -> tuple[Identity | str, tuple[str, ...]] | None:
        """Returns what known blocks of a file depend on; None where nothing tells its state."""
        identity = self._identities.get(name, state)
        return None if identity is None else (identity, self._parameters[name].checksums)


class Digests:
    """The sha256 of every block of an array, from its bytes as they come.

    Args:
      block_bytes: size of each block.

    Attributes:
      blocks: those of the blocks that are complete.
      count: bytes that came so far.
    """

    def __init__(self, block_bytes: int):
        self.blocks: list[str] = []
        self.count = 0
        self._size, self._block = block_bytes, hashlib.sha256()

    def update(self, raw: memoryview) -> None:
        """Takes the next bytes."""
        while raw:
            piece = raw[: self._size - self.count % self._size]
            self._block.update(piece)
            self.count += len(piece)
            raw = raw[len(piece) :]
            if self.count % self._size == 0:
                self.blocks.append(self._block.hexdigest())
                self._block = hashlib.sha256()


def blocks_of(array: np.ndarray, parameter: Parameter) -> list[np.ndarray]:
    """Returns the bytes of every block of an array that is contiguous in memory."""
    return np.split(array.reshape(-1).view(np.uint8), len(parameter.checksums))


def _begin(data: np.ndarray) -> Future[str]:
    raw = data.reshape(-1).view(np.uint8).data
    if len(raw) > _SMALL_BYTES:
        return hashing_threads().submit(_sha256, raw)
    done: Future[str] = Future()
    done.set_result(_sha256(raw))
    return done


def _sha256(raw: memoryview) -> str:
    return hashlib.sha256(raw).hexdigest()


@functools.cache
def hashing_threads() -> ThreadPoolExecutor:
    """Returns the threads of this process that compute checksums, one for each core."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return ThreadPoolExecutor(min(_MAX_THREADS, cores), thread_name_prefix="checksum")


os.register_at_fork(after_in_child=hashing_threads.cache_clear)  # a child has none of its parent's threads

_LOCK = threading.Lock()
_KNOWN: dict[Location, tuple[Identity | str, tuple[str, ...], set[int]]] = {}
