"""Where the arrays of a checkpoint lie: safetensors, PyTorch zip files, and shards of either with an index.

``open_checkpoint`` reads headers only; ``Array.read`` reads values with ``preadv`` into the caller's buffer, so that memory
is bounded by that buffer.  Invariant: a file's size, header and index agree before any value is used.  What names mean is
decided by the tables, and nothing is written.
"""

import dataclasses
import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from convert_weights.rules import Header, numpy_dtype
from convert_weights.torch_zip import ITEM_BYTES, SourceError, Tensor, read_tree

SAFETENSORS_DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip
_MAX_HEADER_BYTES = 100 << 20
_TORCH_SUFFIXES = (".bin", ".pt", ".pth")
_SECTIONS = ("ema", "model_ema", "ema_model", "state_dict", "model", "module")
_WEIGHT_FILES = ("model", "diffusion_pytorch_model", "pytorch_model")


@dataclasses.dataclass(frozen=True)
class Array:
    """One array of a checkpoint: where its bytes lie, and how."""

    name: str
    file: Path
    tensor: Tensor

    @property
    def header(self) -> Header:
        """Shape and dtype."""
        return Header(self.tensor.shape, self.tensor.dtype)

    @property
    def contiguous(self) -> bool:
        """Whether the elements lie one after another in C order."""
        step, shape = 1, self.tensor.shape
        for size, stride in zip(reversed(shape), reversed(self.tensor.strides), strict=True):
            if size != 1 and stride != step:
                return False
            step *= size
        return True

    def read(self, file: "OpenFile", start: int, stop: int, buffer: np.ndarray) -> np.ndarray:
        """Returns rows ``start:stop`` (of the first axis), a view of ``buffer`` (uint8, at least as long as the rows)."""
        shape = (stop - start, *self.tensor.shape[1:]) if self.tensor.shape else ()
        dtype = numpy_dtype(self.tensor.dtype)
        row_bytes = math.prod(self.tensor.shape[1:]) * dtype.itemsize
        raw = buffer[: math.prod(shape) * dtype.itemsize]
        file.read(self.tensor.offset + start * row_bytes, raw)
        return raw.view(dtype).reshape(shape)

    def read_strided(self, file: "OpenFile") -> np.ndarray:
        """Returns the whole of an array whose elements do not lie in C order, as a new C-contiguous array."""
        last = sum((size - 1) * stride for size, stride in zip(self.tensor.shape, self.tensor.strides, strict=True))
        dtype = numpy_dtype(self.tensor.dtype)
        raw = np.empty((last + 1) * dtype.itemsize, np.uint8)
        file.read(self.tensor.offset, raw)
        strides = [stride * dtype.itemsize for stride in self.tensor.strides]
        return np.ascontiguousarray(np.lib.stride_tricks.as_strided(raw.view(dtype), self.tensor.shape, strides))


class OpenFile:
    """A source file open for positional reads; use as a context manager."""

    def __init__(self, path: Path):
        self._path = path
        self._descriptor = os.open(path, os.O_RDONLY)

    def __enter__(self) -> "OpenFile":
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)

    def read(self, offset: int, into: np.ndarray) -> None:
        """Fills ``into`` (uint8) with the bytes at ``offset``.

        Raises:
          SourceError: the file ends before.
        """
        view = memoryview(into)  # type: ignore[arg-type]
        while view:
            count = os.preadv(self._descriptor, [view], offset)
            if count == 0:
                raise SourceError(f"{self._path} ended at byte {offset} while it was being read; was it changed or truncated?")
            view, offset = view[count:], offset + count


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """The arrays of a checkpoint by name, in file order, and what was found beside them.

    Attributes:
      path: the source as given.
      folder: the folder of the weight files, where config.json and the tokenizer are.
      files: the weight files.
      arrays: every array.
      notes: what was chosen or skipped, for the user.
    """

    path: Path
    folder: Path
    files: tuple[Path, ...]
    arrays: Mapping[str, Array]
    notes: tuple[str, ...]

    @property
    def headers(self) -> dict[str, Header]:
        """Shapes and dtypes by name."""
        return {name: array.header for name, array in self.arrays.items()}


def open_checkpoint(source: str | os.PathLike[str], *, section: str | None = None) -> Checkpoint:
    """Returns where the arrays of a checkpoint lie.

    Args:
      source: a weight file, an index file, or a folder of one checkpoint.
      section: which state dict of a training checkpoint to take (``ema``, ``model`` ...); default: EMA where there is one.

    Raises:
      SourceError: nothing usable is there, or a file is unsafe, truncated, damaged or disagrees with the index.
    """
    path = Path(source)
    try:
        chosen, notes = _choose_file(path) if path.is_dir() else (path, [])
        if not chosen.is_file():
            raise SourceError(f"{path} does not exist; expected a weight file, an index file or a folder of one checkpoint.")
        if chosen.name.endswith(".index.json"):
            arrays, files = _read_index(chosen, section, notes)
        else:
            arrays, files = _read_file(chosen, section, notes), [chosen]
    except OSError as error:
        raise SourceError(f"{error.filename or path} cannot be read: {error.strerror or error}.") from error
    if not arrays:
        raise SourceError(f"{chosen} holds no arrays.")
    order = {file: i for i, file in enumerate(files)}
    placed = sorted(arrays.values(), key=lambda array: (order[array.file], array.tensor.offset))
    return Checkpoint(path, chosen.parent, tuple(files), {array.name: array for array in placed}, tuple(notes))


def merge(checkpoint: Checkpoint, other: Checkpoint, prefix: str) -> Checkpoint:
    """Returns both checkpoints as one, the names of the other with a prefix.

    Raises:
      SourceError: a name is in both.
    """
    prefixed = {prefix + name: dataclasses.replace(array, name=prefix + name) for name, array in other.arrays.items()}
    twice = checkpoint.arrays.keys() & prefixed.keys()
    if twice:
        raise SourceError(
            f"{checkpoint.path} and {other.path} both hold {len(twice)} arrays, such as {min(twice)}; give one of them."
        )
    files = (*checkpoint.files, *(file for file in other.files if file not in checkpoint.files))
    return dataclasses.replace(
        checkpoint, files=files, arrays={**checkpoint.arrays, **prefixed}, notes=checkpoint.notes + other.notes
    )


def _choose_file(folder: Path) -> tuple[Path, list[str]]:
    """Returns the one checkpoint of a folder (or of its ``model`` subfolder): safetensors first, then PyTorch files."""
    for place in (folder, folder / "model"):
        found = [
            candidate
            for suffix in (".safetensors", ".bin")
            for stem in _WEIGHT_FILES
            for candidate in (place / f"{stem}{suffix}.index.json", place / f"{stem}{suffix}")
            if candidate.is_file()
        ]
        others = sorted(
            file for file in (place.iterdir() if place.is_dir() else ()) if file.suffix in (".safetensors", *_TORCH_SUFFIXES)
        )
        if found:
            known = re.compile(r"(" + "|".join(_WEIGHT_FILES) + r")[-.]")
            strange = [file.name for file in others if not known.match(file.name)]
            skipped = [file.name for file in found[1:]] + strange
            return found[0], [f"read {found[0].name}; not read: {', '.join(skipped)}"] if skipped else []
        if len(others) == 1:
            return others[0], []
        if others:
            names = ", ".join(file.name for file in others)
            raise SourceError(f"{place} holds several checkpoints ({names}); name the file to convert.")
    raise SourceError(f"{folder} holds no weight file (.safetensors, .bin, .pt, .pth, or an index of shards).")


def _read_index(index: Path, section: str | None, notes: list[str]) -> tuple[dict[str, Array], list[Path]]:
    try:
        weight_map = json.loads(index.read_text("utf-8"))["weight_map"]
        shards = list(dict.fromkeys(weight_map.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise SourceError(f"{index} is not an index of shards ({type(error).__name__}: {error}).") from error
    if any(Path(shard).name != shard for shard in shards):
        raise SourceError(f"{index} names shards outside its folder; refused.")
    missing = [shard for shard in shards if not (index.parent / shard).is_file()]
    if missing:
        raise SourceError(f"{index.parent} lacks {len(missing)} of {len(shards)} shards: {', '.join(missing)}.")
    arrays: dict[str, Array] = {}
    for shard in shards:
        found = _read_file(index.parent / shard, section, notes)
        expected = {name for name, file in weight_map.items() if file == shard}
        if found.keys() != expected:
            raise SourceError(
                f"{index.parent / shard} disagrees with {index.name}: missing {sorted(expected - found.keys())[:5]}, "
                f"unlisted {sorted(found.keys() - expected)[:5]}."
            )
        arrays.update(found)
    return arrays, [index.parent / shard for shard in shards]


def _read_file(path: Path, section: str | None, notes: list[str]) -> dict[str, Array]:
    if path.suffix == ".safetensors":
        tensors: Mapping[Any, Any] = _read_safetensors(path)
    elif path.suffix in _TORCH_SUFFIXES:
        tensors = _choose_section(path, read_tree(path), section, notes)
    else:
        raise SourceError(f"{path} is not a weight file (.safetensors, .bin, .pt, .pth) or an index of shards.")
    return {name: Array(name, path, tensor) for name, tensor in tensors.items()}


def _choose_section(path: Path, tree: Any, section: str | None, notes: list[str]) -> dict[str, Tensor]:
    """Returns the state dict inside a training checkpoint, or the file's own if it is one."""
    sections = {name: value for name, value in tree.items() if _is_state_dict(value)} if isinstance(tree, dict) else {}
    if section is None and _is_state_dict(tree):
        return tree
    known = [name for name in ([section] if section else _SECTIONS) if name in sections]
    if not known:
        wanted = section or "a state dict"
        raise SourceError(f"{path} does not hold {wanted}; it holds the state dicts {sorted(map(str, sections))}.")
    left = [str(name) for name in tree if name != known[0]]
    if left:
        notes.append(f"{path.name}: took the state dict {known[0]!r}; not read: {', '.join(left)}")
    return sections[known[0]]


def _is_state_dict(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and bool(value)
        and all(isinstance(name, str) and isinstance(item, Tensor) for name, item in value.items())
    )


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
            raise SourceError(f"{path} is truncated or not a safetensors file (header of {length} bytes in a file of {size}).")
        text = file.read(length)
    try:
        entries = json.loads(text, object_pairs_hook=_unique)
        entries.pop("__metadata__", None)
        tensors = {name: _safetensors_entry(entry, 8 + length) for name, entry in entries.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise SourceError(f"{path}: its header is malformed ({type(error).__name__}: {error}).") from error
    end = 8 + length
    for name, (tensor, stop) in sorted(tensors.items(), key=lambda item: (item[1][0].offset, item[1][1])):
        if tensor.offset != end:
            raise SourceError(f"{path}: {name} starts at byte {tensor.offset}, expected {end}; arrays overlap or leave a gap.")
        end = stop
    if end != size:
        raise SourceError(f"{path} has {size} bytes, its header describes {end}; it is truncated or has been appended to.")
    return {name: tensor for name, (tensor, _) in tensors.items()}


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)} occurs twice")
    return fields


def _safetensors_entry(entry: Any, base: int) -> tuple[Tensor, int]:
    start, stop = entry["data_offsets"]
    shape = tuple(entry["shape"])
    if entry["dtype"] not in SAFETENSORS_DTYPES:
        raise ValueError(f"dtype {entry['dtype']}")
    dtype = SAFETENSORS_DTYPES[entry["dtype"]]
    if any(type(n) is not int or n < 0 for n in (start, stop, *shape)) or stop - start != math.prod(shape) * ITEM_BYTES[dtype]:
        raise ValueError(f"shape {list(shape)} of {dtype} in bytes {start} to {stop}")
    return Tensor(dtype, base + start, shape, contiguous_strides(shape)), base + stop


def contiguous_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the strides of C order, in elements."""
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


def file_pieces(path: Path, buffer: np.ndarray) -> Iterator[memoryview]:
    """Yields a file's bytes from beginning to end, piece by piece in ``buffer`` (uint8)."""
    with open(path, "rb", buffering=0) as file:
        view = memoryview(buffer)  # type: ignore[arg-type]
        while count := file.readinto(view):
            yield view[:count]
