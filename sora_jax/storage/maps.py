"""Read-only maps of stored arrays, whose pages are read and compared before a layer is used and dropped afterwards.

Invariant: what this module tells the system about pages changes no value.  A page that is not there when it is needed is read
by the system then, so wrong or late advice costs time or memory, never a bit; what a file holds is compared when its pages are
first read and whenever it changed.  Only files that begin with the bytes of their array in order are mapped, and only large
ones: the others are read into memory.
What cannot be prevented: a file that is cut short, or overwritten in place, while its layer computes.  The first ends the
process (SIGBUS), the second is noticed only at the next read; replace models by renaming, as `convert` does.
"""

import errno
import mmap
import os
from collections.abc import Iterable

import numpy as np

from sora_jax.storage.checksums import Digests, blocks_of
from sora_jax.storage.directory import Manifest, damaged
from sora_jax.storage.in_order import is_in_order
from sora_jax.storage.location import local_path
from sora_jax.storage.place import Identity
from sora_jax.storage.reader import DIFFERS, Reader

MAP_FROM_BYTES = 1 << 16  # smaller arrays are read: a mapping costs a file descriptor and a page

_POPULATE_READ = 22  # MADV_POPULATE_READ, Linux 5.14; not among Python's names
_PIECE_BYTES = 1 << 23  # Python holds its lock while the system reads a piece


class MappedLayer:
    """A layer's arrays as maps of their files where large, as copies where small.

    Args:
      reader: the network's reader.
      layer: the layer's name.
      map_from_bytes: arrays from this size on are mapped.

    Raises:
      ModelDirectoryError: a file is missing, unreadable or not what the manifest says.
    """

    def __init__(self, reader: Reader, layer: str, *, map_from_bytes: int = MAP_FROM_BYTES):
        self._reader, self._layer = reader, layer
        self._maps: dict[str, mmap.mmap] = {}
        self._mapped: dict[str, np.ndarray] = {}
        self._inodes: dict[str, tuple[int, int]] = {}
        self._compared: dict[str, Identity] = {}
        names = reader.manifest.names(layer)
        reader.check(names)
        for name in names:
            if reader.manifest.parameters[name].nbytes >= map_from_bytes:
                self._map(name)
        self._arrays = reader.arrays([name for name in names if name not in self._maps]) | self._mapped

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        """The arrays by flat name, sorted, read-only; of the mapped ones nothing is read yet."""
        return dict(sorted(self._arrays.items()))

    def populate(self) -> None:
        """Reads the pages of all maps, and compares what they hold with the manifest unless that is known.

        Raises:
          ModelDirectoryError: a file is missing, unreadable, changed or damaged.
        """
        found = self._follow()
        with (
            self._reader.comparing(self._mapped, self._mapped) as comparison,
            self._reader.watched(self._layer, self._mapped),
        ):
            for name, array in self._mapped.items():
                self._read_pages(name, array.nbytes)
                for block, data in enumerate(blocks_of(array, self._reader.manifest.parameters[name])):
                    comparison.add(name, block, data)
        self._compared = found

    def is_unchanged(self) -> bool:
        """Returns whether the mapped files are still those whose values were compared.

        Raises:
          ModelDirectoryError: a file is missing, or of another size.
        """
        return self._reader.check(self._mapped) == self._compared

    def release(self) -> None:
        """Drops the pages of all maps; they are read again when they are needed."""
        for mapping in self._maps.values():
            mapping.madvise(mmap.MADV_DONTNEED)

    def _map(self, name: str) -> None:
        """Maps a file that begins with its array; another is left to be read."""
        parameter = self._reader.manifest.parameters[name]
        try:
            with open(local_path(self._reader.manifest.chunk_path(name)), "rb", buffering=0) as file:
                if not is_in_order(file.fileno(), parameter):
                    return
                status = os.fstat(file.fileno())
                self._maps[name] = mapping = mmap.mmap(file.fileno(), parameter.nbytes, access=mmap.ACCESS_READ)
        except OSError as error:
            raise damaged(self._reader.manifest, name, error) from error
        count = parameter.nbytes // parameter.numpy_dtype.itemsize
        self._mapped[name] = np.frombuffer(mapping, parameter.numpy_dtype, count).reshape(parameter.shape)
        self._inodes[name] = (status.st_dev, status.st_ino)

    def _follow(self) -> dict[str, Identity]:
        """Returns what distinguishes the files from others; a file that replaced the mapped one must hold the same values."""
        found = self._reader.check(self._mapped)
        for name, identity in found.items():
            if identity[:2] != self._inodes[name]:
                self._reader.verify(name)
                parameter = self._reader.manifest.parameters[name]
                digests = Digests(parameter.block_bytes)
                digests.update(self._mapped[name].reshape(-1).view(np.uint8).data)
                if tuple(digests.blocks) != parameter.checksums:
                    raise damaged(self._reader.manifest, name, DIFFERS)
                self._inodes[name] = identity[:2]
        return found

    def _read_pages(self, name: str, num_bytes: int) -> None:
        try:
            for start in range(0, num_bytes, _PIECE_BYTES):
                self._maps[name].madvise(_POPULATE_READ, start, min(_PIECE_BYTES, num_bytes - start))
        except OSError as error:
            self._reader.check([name])  # cut short during the read
            raise damaged(self._reader.manifest, name, error) from error


def are_mappable(manifest: Manifest, names: Iterable[str], map_from_bytes: int = MAP_FROM_BYTES) -> bool:
    """Returns whether all large ones of some arrays are stored in the order of their bytes, so that they can be mapped.

    Raises:
      ModelDirectoryError: a file is missing or unreadable.
    """
    for name in names:
        parameter = manifest.parameters[name]
        if parameter.nbytes >= map_from_bytes:
            try:
                with open(local_path(manifest.chunk_path(name)), "rb", buffering=0) as file:
                    if not is_in_order(file.fileno(), parameter):
                        return False
            except OSError as error:
                raise damaged(manifest, name, error) from error
    return True


def can_map() -> bool:
    """Returns whether this system reads the pages of a mapping on request and says whether that went well."""
    if not hasattr(mmap, "MADV_DONTNEED"):
        return False
    try:
        with mmap.mmap(-1, mmap.PAGESIZE) as probe:
            probe.madvise(_POPULATE_READ)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return False
    return True
