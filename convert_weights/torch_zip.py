"""Names, shapes and byte ranges of the tensors in a PyTorch ``.pt``/``.pth``/``.bin`` file, read without executing it.

A file written by ``torch.save`` (since PyTorch 1.6) is a zip archive of raw storages and one pickle that says how tensors
lie in them.  PyTorch's own ``weights_only`` loader is not used: it needs PyTorch, it materialises every tensor (or maps the
file whole, which counts as memory), and it does call constructors.  Invariant: a tensor's numbers are compared with its storage
and the storage's with its zip entry before they are believed.  Values of tensors, and the CRC-32 of their storages, are read
elsewhere.
"""

import dataclasses
import math
from pathlib import Path
from typing import Any

from convert_weights.errors import SourceError
from convert_weights.pickle_machine import ITEM_BYTES, MAX_PICKLE_BYTES, Machine, Storage
from convert_weights.recognise import HEAD_BYTES, what_is
from convert_weights.source_file import OpenFile
from convert_weights.zip_directory import STORED, Archive, read_archive, read_entry

_MAX_BYTEORDER_BYTES = 64
MAX_DIMENSIONS = 16  # arrays of networks have at most 5


@dataclasses.dataclass(frozen=True)
class Tensor:
    """Where a tensor lies: ``offset`` in bytes from the start of the file, ``strides`` in elements."""

    dtype: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Extent:
    """Bytes of a file whose CRC-32 is known: from ``start`` up to ``stop``; ``name`` says in errors what they are."""

    name: str
    start: int
    stop: int
    crc: int


@dataclasses.dataclass(frozen=True)
class TorchFile:
    """What was saved, as nested dictionaries, lists and tuples whose leaves are numbers, strings and ``Tensor``.

    Attributes:
      tree: the saved object.
      extents: the storages in file order with their CRC-32; empty where the file has none.
      has_checksums: whether the file has CRC-32.
    """

    tree: Any
    extents: tuple[Extent, ...]
    has_checksums: bool


def read_tree(path: Path) -> Any:
    """Returns what was saved in a file; see ``read_torch_file``."""
    with OpenFile(path) as file:
        return read_torch_file(file).tree


def read_torch_file(file: OpenFile) -> TorchFile:
    """Returns what was saved.

    Raises:
      SourceError: the file is not a zip-format PyTorch file, is truncated, or its pickle wants anything but tensors.
    """
    if answer := what_is(file.read_bytes(0, min(HEAD_BYTES, file.identity.size))):
        raise SourceError(f"{file.path} {answer}.")
    archive = read_archive(file)
    pickles = [name for name in archive.entries if name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise SourceError(f"{file.path} is a zip file but not a PyTorch checkpoint ({len(pickles)} data.pkl entries).")
    root = pickles[0].removesuffix("data.pkl")
    if root + "byteorder" in archive.entries:
        entry = archive.entries[root + "byteorder"]
        if read_entry(file, archive, entry, max_bytes=_MAX_BYTEORDER_BYTES).strip() != b"little":
            raise SourceError(f"{file.path} was written on a big-endian machine; save it again on a little-endian one.")
    program = read_entry(file, archive, archive.entries[pickles[0]], max_bytes=MAX_PICKLE_BYTES)
    tree = Machine(file.path, _Locator(file.path, root, archive)).run(program)
    extents = (
        Extent(f"entry {entry.name}", entry.start, entry.start + entry.size, entry.crc)
        for entry in sorted(archive.entries.values(), key=lambda entry: entry.start)
        if entry.method == STORED and entry.size
    )
    return TorchFile(tree, tuple(extents) if archive.has_checksums else (), archive.has_checksums)


class _Locator:
    """Turns storages into byte ranges of the file."""

    def __init__(self, path: Path, root: str, archive: Archive):
        self._path, self._root, self._archive = path, root, archive
        self._declared: dict[str, Storage] = {}

    def tensor(self, storage: Any, offset: Any, shape: Any, strides: Any) -> Tensor:
        """Returns a tensor's description, after checking that it lies inside its storage.

        Raises:
          SourceError: it does not, or its numbers are none.
        """
        numbers = (offset, *(shape if type(shape) is tuple else "?"), *(strides if type(strides) is tuple else "?"))
        if not isinstance(storage, Storage) or any(type(n) is not int or n < 0 for n in numbers) or len(shape) != len(strides):
            raise SourceError(f"{self._path}: the shape or strides of a tensor are malformed.")
        if len(shape) > MAX_DIMENSIONS:
            raise SourceError(f"{self._path}: a tensor has {len(shape)} dimensions; refused above {MAX_DIMENSIONS}.")
        last = offset + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
        if math.prod(shape) and last >= storage.length:
            raise SourceError(
                f"{self._path}: a tensor of shape {shape} reaches beyond its storage of {storage.length} elements."
            )
        return Tensor(storage.dtype, self._start(storage) + offset * ITEM_BYTES[storage.dtype], shape, strides)

    def _start(self, storage: Storage) -> int:
        """Returns the file offset of a storage's first byte, after checking that the zip entry is all of it.

        Raises:
          SourceError: the entry is missing, compressed or of another size, or the storage was declared otherwise before.
        """
        declared = self._declared.setdefault(storage.key, storage)
        if declared != storage:
            raise SourceError(
                f"{self._path}: storage {storage.key!r} is declared twice, as {_size(declared)} and {_size(storage)}."
            )
        entry = self._archive.entries.get(f"{self._root}data/{storage.key}")
        if entry is None:
            raise SourceError(f"{self._path}: storage {storage.key!r} is missing; the file is truncated or damaged.")
        needed = storage.length * ITEM_BYTES[storage.dtype]
        if entry.method != STORED or entry.size != needed:
            raise SourceError(
                f"{self._path}: storage {storage.key!r} has {entry.size} bytes or is compressed; expected {needed} raw."
            )
        return entry.start


def _size(storage: Storage) -> str:
    return f"{storage.length} of {storage.dtype}"
