"""Where the arrays of a checkpoint lie: safetensors, PyTorch zip files, shards of either with an index, and GGUF files.

``open_checkpoint`` reads headers only; values are read by `source_array`.  Invariant: a file's size, header and index agree
before any value is used.  What names mean is decided by the tables, and nothing is written.
"""

import dataclasses
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from convert_weights.errors import SourceError, printable, some, unreadable
from convert_weights.gguf_header import read_gguf
from convert_weights.json_text import read_object
from convert_weights.rules import Header
from convert_weights.safetensors_header import read_safetensors
from convert_weights.scales import with_scales
from convert_weights.source_array import Array
from convert_weights.source_file import Identity, OpenFile
from convert_weights.torch_zip import Extent, Tensor, read_torch_file

_MAX_INDEX_BYTES = 8 << 20
_MAX_ARRAYS = 1 << 15  # the largest network here has about a thousand
_MAX_NAME = 500
_TORCH_SUFFIXES = (".bin", ".pt", ".pth")
WEIGHT_SUFFIXES = (".safetensors", *_TORCH_SUFFIXES, ".gguf")
SAFETENSORS, PYTORCH, GGUF = "safetensors", "PyTorch", "GGUF"
_SECTIONS = ("ema", "model_ema", "ema_model", "state_dict", "model", "module")
_WEIGHT_FILES = ("model", "diffusion_pytorch_model", "pytorch_model")


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """The arrays of a checkpoint by name, in file order, and the files that hold them.

    Attributes:
      path: the source as the caller named it.
      folder: the folder of the weight files, where config.json and the tokenizer are.
      files: the weight files, with the identity that each had when its header was read.
      arrays: every array.
      notes: what was taken or skipped, for the user.
      extents: the byte ranges with a known CRC-32, by file.
      sections: which state dict was taken, by file; for files that are not one themselves.
      format: ``safetensors``, ``PyTorch`` or ``GGUF``.
      metadata: the numbers and short texts of a GGUF file.
      faults: what is wrong with scales, to be reported with what is wrong with the arrays.
    """

    path: Path
    folder: Path
    files: Mapping[Path, Identity]
    arrays: Mapping[str, Array]
    notes: tuple[str, ...]
    extents: Mapping[Path, tuple[Extent, ...]]
    sections: Mapping[Path, str]
    format: str = SAFETENSORS
    metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    faults: tuple[str, ...] = ()

    @property
    def headers(self) -> dict[str, Header]:
        """Shapes and dtypes by name."""
        return {name: array.header for name, array in self.arrays.items()}

    def open(self, path: Path) -> OpenFile:
        """Returns one of the files, open, after checking that it is still the one whose header was read."""
        return OpenFile(path, self.files[path])


def open_checkpoint(source: str | os.PathLike[str], *, section: str | None = None) -> Checkpoint:
    """Returns where the arrays of a checkpoint lie.

    Args:
      source: a weight file, an index file, or a folder of one checkpoint.
      section: which state dict of a training checkpoint to take (``ema``, ``model`` ...); default: EMA where there is one.

    Raises:
      SourceError: nothing usable is there, or a file is unsafe, truncated, damaged or disagrees with the index.
    """
    path = Path(source)
    reader = _Reader(section)
    try:
        chosen, notes = choose_file(path) if path.is_dir() else (path, [])
        if not chosen.is_file():
            raise SourceError(f"{path} does not exist; expected a weight file, an index file or a folder of one checkpoint.")
        reader.notes += notes
        if chosen.name.endswith(".index.json"):
            reader.read_index(chosen)
        else:
            reader.read_file(chosen)
    except OSError as error:
        raise unreadable(error, path) from error
    if not reader.arrays:
        raise SourceError(f"{chosen} holds no arrays.")
    order = {file: i for i, file in enumerate(reader.files)}
    placed = sorted(reader.arrays.values(), key=lambda array: (order[array.file], array.tensor.offset))
    arrays, faults = with_scales({array.name: array for array in placed})
    return Checkpoint(
        path,
        chosen.parent,
        reader.files,
        arrays,
        tuple(reader.notes),
        reader.extents,
        reader.sections,
        reader.format,
        reader.metadata,
        faults,
    )


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
    return dataclasses.replace(
        checkpoint,
        files={**checkpoint.files, **other.files},
        arrays={**checkpoint.arrays, **prefixed},
        notes=checkpoint.notes + other.notes,
        extents={**checkpoint.extents, **other.extents},
        sections={**checkpoint.sections, **other.sections},
        faults=checkpoint.faults + other.faults,
    )


def is_source(path: str | os.PathLike[str]) -> bool:
    """Returns whether a path looks like a source of weights: a file's name, a folder's files, or folders with a config.json."""
    path = Path(path)
    if not path.is_dir():
        return path.suffix in WEIGHT_SUFFIXES or path.name.endswith(".index.json")
    places = [place for place in (path, path / "model") if place.is_dir()]
    if any(file.suffix in WEIGHT_SUFFIXES or file.name.endswith(".index.json") for place in places for file in place.iterdir()):
        return True
    return any(file.is_file() for pattern in ("*", "*/*") for file in path.glob(f"{pattern}/config.json"))


def choose_file(folder: Path) -> tuple[Path, list[str]]:
    """Returns the one checkpoint of a folder (or of its ``model`` subfolder), and a note on what is not read.

    Safetensors come before PyTorch files.

    Raises:
      SourceError: there is none, or several of which none has a usual name.
    """
    for place in (folder, folder / "model"):
        found = [
            candidate
            for suffix in (".safetensors", ".bin")
            for stem in _WEIGHT_FILES
            for candidate in (place / f"{stem}{suffix}.index.json", place / f"{stem}{suffix}")
            if candidate.is_file()
        ]
        others = sorted(file for file in (place.iterdir() if place.is_dir() else ()) if file.suffix in WEIGHT_SUFFIXES)
        if found:
            known = re.compile(r"(" + "|".join(_WEIGHT_FILES) + r")[-.]")
            strange = [file.name for file in others if not known.match(file.name)]
            skipped = [file.name for file in found[1:]] + strange
            return found[0], [f"read {found[0].name}; not read: {some(skipped, 20)}"] if skipped else []
        if len(others) == 1:
            return others[0], []
        if others:
            names = some([file.name for file in others])
            raise SourceError(f"{place} holds several checkpoints ({names}); name the file to convert.")
    raise SourceError(f"{folder} holds no weight file (.safetensors, .bin, .pt, .pth, .gguf, or an index of shards).")


class _Reader:
    """Collects the arrays of one file, or of the shards of an index."""

    def __init__(self, section: str | None):
        self._section = section
        self.arrays: dict[str, Array] = {}
        self.files: dict[Path, Identity] = {}
        self.extents: dict[Path, tuple[Extent, ...]] = {}
        self.sections: dict[Path, str] = {}
        self.notes: list[str] = []
        self.format = SAFETENSORS
        self.metadata: Mapping[str, Any] = {}

    def read_index(self, index: Path) -> None:
        """Reads every shard that an index names, and compares what it holds with the index."""
        weight_map = read_object(index, "an index of shards", max_bytes=_MAX_INDEX_BYTES).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map or any(type(shard) is not str for shard in weight_map.values()):
            raise SourceError(f"{index} is not an index of shards: expected weight_map, an object of names and their files.")
        shards: dict[str, set[str]] = {}
        for name, shard in weight_map.items():
            shards.setdefault(shard, set()).add(name)
        if any(not shard.isprintable() or Path(shard).name != shard for shard in shards):
            raise SourceError(f"{index} names shards outside its folder; refused.")
        missing = [shard for shard in shards if not (index.parent / shard).is_file()]
        if missing:
            raise SourceError(f"{index.parent} lacks {len(missing)} of {len(shards)} shards: {some(missing)}.")
        for shard, expected in shards.items():
            found = self.read_file(index.parent / shard)
            if found != expected:
                raise SourceError(
                    f"{index.parent / shard} disagrees with {index.name}: missing {sorted(expected - found)[:5]}, "
                    f"unlisted {sorted(found - expected)[:5]}."
                )

    def read_file(self, path: Path) -> set[str]:
        """Reads the header of a weight file, and returns the names of its arrays."""
        with OpenFile(path, settle=True) as file:
            self.files[path] = file.identity
            if path.suffix == ".safetensors":
                tensors: Mapping[str, Tensor] = read_safetensors(file)
            elif path.suffix in _TORCH_SUFFIXES:
                tensors, self.format = self._read_torch(file), PYTORCH
            elif path.suffix == ".gguf":
                found = read_gguf(file)
                tensors, self.format, self.metadata = found.tensors, GGUF, found.metadata
            else:
                raise SourceError(f"{path} is not a weight file ({', '.join(WEIGHT_SUFFIXES)}) or an index of shards.")
        if len(self.arrays) + len(tensors) > _MAX_ARRAYS:
            raise SourceError(f"{path} brings the checkpoint to more than {_MAX_ARRAYS} arrays; no network here has as many.")
        strange = next((name for name in tensors if len(name) > _MAX_NAME or not name.isprintable()), None)
        if strange is not None:
            raise SourceError(f"{path}: {printable(strange, 60)!r} is no name of an array.")
        self.arrays.update({name: Array(name, path, tensor, name) for name, tensor in tensors.items()})
        return set(tensors)

    def _read_torch(self, file: OpenFile) -> dict[str, Tensor]:
        saved = read_torch_file(file)
        self.extents[file.path] = saved.extents
        if not saved.has_checksums:
            self.notes.append(f"{file.path.name} has no checksums; damage to its values cannot be noticed")
        section = _choose_section(file.path, saved.tree, self._section)
        if section is None:
            return saved.tree
        self.sections[file.path] = section
        left = [str(name) for name in saved.tree if name != section]
        if left:
            self.notes.append(f"{file.path.name}: took the state dict {section!r}; not read: {some(left, 20)}")
        return saved.tree[section]


def _choose_section(path: Path, tree: Any, section: str | None) -> str | None:
    """Returns the name of the state dict inside a training checkpoint, or None where the file is one itself."""
    sections = {name: value for name, value in tree.items() if _is_state_dict(value)} if isinstance(tree, dict) else {}
    if section is None and _is_state_dict(tree):
        return None
    known = [name for name in ([section] if section else _SECTIONS) if name in sections]
    if not known:
        names = [printable(name) for name in sorted(map(str, sections))[:20]]
        raise SourceError(f"{path} does not hold {section or 'a state dict'}; it holds the state dicts {names}.")
    return known[0]


def _is_state_dict(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and bool(value)
        and all(isinstance(name, str) and isinstance(item, Tensor) for name, item in value.items())
    )
