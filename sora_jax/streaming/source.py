"""The files of a network's layers: what they must be, whether they still are, and reading them.

Invariant: between `LayerSource.begin` and the next, every byte of a layer comes from the file that was found first: size,
modification time and inode are compared before and after each read, and its checksum at the first.  A fault is one line that
names layer and file.  Which layer is read when is decided elsewhere.
"""

import contextlib
import dataclasses
import errno
import hashlib
import itertools
import math
import mmap
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np

from sora_jax.storage.directory import STORED_DTYPES, Manifest, ModelDirectoryError, damaged
from sora_jax.streaming.staging import ALIGNMENT

Identity = tuple[int, int, int]  # modification time in ns, inode, device
Around = Callable[[str, int], AbstractContextManager[Any]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerFile:
    """One stored array of a layer; ``name`` is what follows the layer in its flat name."""

    layer: str
    name: str
    path: Path
    shape: tuple[int, ...]
    dtype: np.dtype
    nbytes: int
    sha256: str


class LayerSource:
    """The files of a network, by layer.

    Args:
      manifest: of the network.
      verify: compare checksums when a layer is first read.
      around: entered around every read of a layer, with its name and bytes, on the reading thread: a benchmark limits the
        rate with it, a test injects faults.
    """

    def __init__(self, manifest: Manifest, *, verify: bool = True, around: Around | None = None):
        self.manifest = manifest
        self.verify = verify
        self.around = around or (lambda _layer, _bytes: contextlib.nullcontext())
        self._files = {layer: tuple(_layer_files(manifest, layer)) for layer in manifest.layers}
        self._found: dict[Path, Identity] = {}
        self._verified: dict[Path, Identity] = {}

    def files(self, layer: str) -> Sequence[LayerFile]:
        """Returns the files of a layer, sorted by name."""
        return self._files[layer]

    def num_bytes(self, layer: str) -> int:
        """Returns the stored bytes of a layer."""
        return sum(file.nbytes for file in self._files[layer])

    def begin(self) -> None:
        """Takes the files as they are now for those that must not change; raises if one is missing or has another size."""
        self._found.clear()
        for layer in self._files:
            self.check(layer)

    def check(self, layer: str) -> None:
        """Sees that every file of the layer is the one that was found first.

        Raises:
          ModelDirectoryError: one is missing, unreadable, of the wrong size, or another than before.
        """
        for file in self._files[layer]:
            try:
                status = os.stat(file.path)
            except OSError as error:
                raise self.fault(file, error) from error
            if status.st_size != file.nbytes:
                raise self.fault(file, f"has {status.st_size} bytes, expected {file.nbytes}")
            identity = (status.st_mtime_ns, status.st_ino, status.st_dev)
            if self._found.setdefault(file.path, identity) != identity:
                where = f"{self.manifest.network} layer {file.layer}: parameter file {file.path}"
                raise ModelDirectoryError(f"{where} was changed during the run; run again.")

    @contextlib.contextmanager
    def reading(self, layer: str) -> Iterator[None]:
        """Wraps the read of a layer: checked before and after, and any system error named.

        Raises:
          ModelDirectoryError: the read failed, or the files are not those that were found first.
        """
        self.check(layer)
        try:
            with self.around(layer, self.num_bytes(layer)):
                yield
        except OSError as error:
            raise self.fault(self._named_by(error, layer), error) from error
        self.check(layer)

    def read(self, layer: str, arrays: Mapping[str, np.ndarray]) -> None:
        """Reads a layer into ``arrays`` (see `staging`), by name; nothing but them is written, however large the layer.

        Raises:
          ModelDirectoryError: a file is missing, unreadable, damaged or changed.
        """
        with self.reading(layer):
            for file in self._files[layer]:
                self._fill(file, arrays[file.name].reshape(-1).view(np.uint8).data)
            self.verify_layer(layer, arrays)

    def _fill(self, file: LayerFile, target: memoryview) -> None:
        try:
            with open(file.path, "rb", buffering=0) as opened:
                while len(target):
                    count = opened.readinto(target)
                    if not count:
                        raise self.fault(file, f"ends {len(target)} bytes too early")
                    target = target[count:]
        except OSError as error:
            raise self.fault(file, error) from error

    def verify_layer(self, layer: str, arrays: Mapping[str, np.ndarray]) -> None:
        """Compares the checksums of those of ``arrays`` whose files have not been compared as they are now.

        Raises:
          ModelDirectoryError: one differs.
        """
        for file in self._files[layer] if self.verify else ():
            identity = self._found[file.path]
            if file.name not in arrays or self._verified.get(file.path) == identity:
                continue
            raw = np.ascontiguousarray(arrays[file.name]).reshape(-1).view(np.uint8)
            if hashlib.sha256(raw.data).hexdigest() != file.sha256:
                raise self.fault(file, "does not have the checksum of its manifest")
            self._verified[file.path] = identity

    def fault(self, file: LayerFile, problem: str | OSError) -> ModelDirectoryError:
        """Returns the error for a file that is not what the manifest says."""
        return damaged(self.manifest, f"{file.layer}.{file.name}", problem)

    def _named_by(self, error: OSError, layer: str) -> LayerFile:
        files = self._files[layer]
        return next((file for file in files if str(file.path) == str(error.filename)), files[0])


def staging(files: Sequence[LayerFile]) -> dict[str, np.ndarray]:
    """Returns uninitialised arrays for a layer in one mapping of its own, which goes back to the system when they are dropped.

    Raises:
      MemoryError: the system does not give that much.
    """
    sizes = [-(-file.nbytes // ALIGNMENT) * ALIGNMENT for file in files]
    try:
        memory = mmap.mmap(-1, max(sum(sizes), mmap.PAGESIZE), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        if error.errno != errno.ENOMEM:
            raise
        raise MemoryError(f"no memory for the {sum(sizes)} bytes of layer {files[0].layer}") from error
    offsets = [0, *itertools.accumulate(sizes)]
    return {
        file.name: np.frombuffer(memory, file.dtype, math.prod(file.shape), offset).reshape(file.shape)
        for file, offset in zip(files, offsets, strict=False)
    }


def _layer_files(manifest: Manifest, layer: str) -> Iterator[LayerFile]:
    for name in manifest.names(layer):
        parameter = manifest.parameters[name]
        yield LayerFile(
            layer=layer,
            name=name.removeprefix(layer + "."),
            path=manifest.chunk_path(name),
            shape=parameter.shape,
            dtype=STORED_DTYPES[parameter.dtype],
            nbytes=parameter.nbytes,
            sha256=parameter.sha256,
        )
