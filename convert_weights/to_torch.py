"""A network of a model directory as a PyTorch checkpoint: upstream's names, layouts and config.json.

Invariant: what was stored without loss comes back bit for bit, in the source's own spelling of names, shapes and dtype;
a network that was trained here gets the usual spelling.  The tokenizer and the defaults of generation go with it, so that
converting the folder gives the same model again.  One array is in memory at a time.
"""

import json
import os
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from convert_weights import companions, table
from convert_weights.readers import GGUF
from convert_weights.rules import Header, Rule, common_prefix, numpy_dtype, sources_of
from convert_weights.safetensors_header import SAFETENSORS_DTYPES
from convert_weights.source_config import to_upstream
from sora_jax import files
from sora_jax.storage.directory import Manifest, ModelDirectoryError
from sora_jax.storage.quantisation import SCALE_SUFFIX, dequantise, is_scale
from sora_jax.storage.reader import Reader

_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}


def to_torch(manifest: Manifest, folder: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
    """Writes ``model.safetensors``, ``config.json`` and what travels with the network into ``folder``.

    float32 that came from bfloat16 or float16 is written as such again; int8 is written as float32, which is not what it
    was made from.  The weights are written last: where they are, everything is, and an interrupted command can be repeated.

    Returns:
      the path of the weights.

    Raises:
      ModelDirectoryError: a file exists with other content and ``overwrite`` is False, or an array is damaged.
      SourceError: the tokenizer that model.json names is missing.
    """
    folder = Path(folder)
    path = folder / "model.safetensors"
    small = companions.export(manifest)
    small["config.json"] = (json.dumps(to_upstream(manifest.network, manifest.config), indent=2) + "\n").encode()
    _check_target(folder, path, small, overwrite)
    folder.mkdir(parents=True, exist_ok=True)
    entries = _entries(manifest)
    with files.whole_file(path, overwrite=overwrite) as temporary:
        with open(temporary, "xb") as file:
            file.write(_header(entries))
            for piece in _values(manifest, entries):
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
        for name, content in small.items():
            files.write_durably(folder / name, content)
    return path


def _check_target(folder: Path, path: Path, small: Mapping[str, bytes], overwrite: bool) -> None:
    for place in (folder, *folder.parents):
        if place.exists() and not place.is_dir():
            raise ModelDirectoryError(f"{place} is a file; expected a folder for PyTorch's files, or a new name.")
    kept = [folder / name for name, content in small.items() if _holds_other(folder / name, content)]
    for existing in [path] * os.path.lexists(path) + kept:
        if not overwrite:
            raise ModelDirectoryError(f"{existing} exists; pass --overwrite to replace it.")


def _holds_other(path: Path, content: bytes) -> bool:
    """Returns whether something else than ``content`` has a name already."""
    if not os.path.lexists(path):
        return False
    return path.is_symlink() or not path.is_file() or path.stat().st_size != len(content) or path.read_bytes() != content


class _Entry:
    """One array to write: from a parameter (with its rule), from recorded bytes, or again from another entry."""

    def __init__(self, name: str, header: Header, *, target: str = "", rule: Rule | None = None, raw: bytes = b""):
        self.name, self.header, self.target, self.rule, self.raw = name, header, target, rule, raw

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.header.shape, dtype=np.int64)) * numpy_dtype(self.header.dtype).itemsize


def _entries(manifest: Manifest) -> list[_Entry]:
    rules, _ = table(manifest.network, manifest.config)
    recorded = [entry.source["name"] for entry in manifest.parameters.values() if entry.source]
    prefix = common_prefix(recorded)
    own = [name for name in manifest.parameters if not is_scale(name, manifest.parameters)]
    entries = [_parameter_entry(manifest, name, rules, prefix) for name in own]
    by_name = {entry.name: entry for entry in entries}
    for name, tied_to in manifest.origin.get("tied", {}).items():
        other = by_name[tied_to.removeprefix(prefix)]
        entries.append(_Entry(name.removeprefix(prefix), other.header, target=other.target, rule=other.rule))
    constants = manifest.origin.get("constants", {})
    for name, value in constants.items():
        header = Header(tuple(value["shape"]), value["dtype"])
        entries.append(_Entry(name.removeprefix(prefix), header, raw=bytes.fromhex(value["hex"])))
    if not recorded:
        for rule in rules:
            if rule.expected is not None:
                header = Header(rule.expected.shape, rule.expected.dtype.name)
                entries.append(_Entry(rule.source, header, raw=rule.expected.tobytes()))
    return entries


def _parameter_entry(manifest: Manifest, target: str, rules: list[Rule], prefix: str) -> _Entry:
    parameter = manifest.parameters[target]
    candidates = sources_of(rules, target)
    stored = "float32" if parameter.dtype == "int8" else parameter.dtype
    if parameter.source is None:
        name, rule = candidates[0]
        # The shape is that of the first spelling: computed on an array that takes no memory.
        shape = rule.transform.inverse(np.broadcast_to(np.int8(0), parameter.shape)).shape
        return _Entry(name, Header(shape, stored), target=target, rule=rule)
    own = parameter.source["name"].removeprefix(prefix)
    own = own if manifest.origin.get("format") != GGUF else candidates[0][0]  # PyTorch has other names
    name, rule = next(((source, rule) for source, rule in candidates if source == own), (own, candidates[0][1]))
    lossless = stored == "float32" and parameter.dtype != "int8" and parameter.source.get("exact", True)
    return _Entry(
        name,
        Header(tuple(parameter.source["shape"]), parameter.source["dtype"] if lossless else stored),
        target=target,
        rule=rule,
    )


def _header(entries: list[_Entry]) -> bytes:
    fields: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for entry in entries:
        span = [offset, offset + entry.nbytes]
        fields[entry.name] = {"dtype": _NAMES[entry.header.dtype], "shape": list(entry.header.shape), "data_offsets": span}
        offset += entry.nbytes
    text = json.dumps(fields, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _values(manifest: Manifest, entries: list[_Entry]) -> Iterator[Any]:
    reader = Reader(manifest)
    for entry in entries:
        if entry.rule is None:
            yield entry.raw
            continue
        if manifest.parameters[entry.target].dtype == "int8":
            scale = entry.target + SCALE_SUFFIX
            stored = reader.arrays([entry.target, scale])
            array = dequantise(entry.target, stored[entry.target], stored[scale])
        else:
            array = reader.arrays([entry.target])[entry.target]
        array = entry.rule.transform.inverse(array.astype(numpy_dtype(entry.header.dtype), copy=False))
        yield np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
