"""The safetensors file of a stage's weights that StableHLO and ONNX artefacts read, and its int8 form.

int8 matrices have a float32 scale for each output, under the same name with a suffix; the rest is stored as it is.

Invariant: a header is believed only where its numbers agree with each other and with the size of the file.  Whether the bytes
are those that were exported is `contents`' business.
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sora_jax.export.contents import ExportFileError
from sora_jax.storage.quantisation import SCALE_SUFFIX, is_quantised, quantise, scale_axis

# The last two stand in test vectors only: token ids and pixels.
DTYPES = {"F32": np.float32, "F16": np.float16, "I8": np.int8, "I32": np.int32, "U8": np.uint8}
_MAX_HEADER_BYTES = 100_000_000


def write(path: Path, arrays: Mapping[str, np.ndarray], *, stage: str) -> None:
    """Writes the arrays, and whose they are: two stages of one program have arrays of the same names and shapes."""
    from safetensors.numpy import save_file

    save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, path, metadata={"stage": stage})


@dataclasses.dataclass(frozen=True)
class Index:
    """The header of a file.

    Attributes:
      entries: by name: ``dtype``, ``shape`` and ``data_offsets``, which follow each other without a gap.
      start: the byte that offsets count from.
      stage: whose weights they are; None where the file does not say.
    """

    entries: Mapping[str, Mapping[str, Any]]
    start: int
    stage: str | None

    @property
    def specs(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Dtype and shape by name."""
        return {name: (np.dtype(DTYPES[entry["dtype"]]).name, tuple(entry["shape"])) for name, entry in self.entries.items()}


def index(path: Path) -> Index:
    """Returns the header of a file; its numbers agree with each other and with the size of the file.

    Raises:
      ExportFileError: they do not, or it is no safetensors file.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > min(size - 8, _MAX_HEADER_BYTES):
            raise ExportFileError(f"{path} announces a header of {length} bytes in a file of {size}; export again.")
        text = file.read(length)
    try:
        entries = json.loads(text)
        stage = entries.pop("__metadata__", {}).get("stage")
        end = _end_of_arrays(entries)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ExportFileError(
            f"{path} has no header of safetensors ({type(error).__name__}: {error}); export again."
        ) from error
    if end != size - 8 - length:
        raise ExportFileError(f"{path} has {size - 8 - length} bytes of values, its header says {end}; export again.")
    return Index(entries, 8 + length, stage)


def _end_of_arrays(entries: Any) -> int:
    """Returns the bytes that the arrays take, which must lie one after the other; nothing is known of the entries yet."""
    end = 0
    for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
        begin, after = entry["data_offsets"]
        shape = entry["shape"]
        if not isinstance(shape, list) or not all(type(length) is int and length >= 0 for length in shape):
            raise ValueError(f"array {name} has shape {shape!r}")
        nbytes = math.prod(shape) * np.dtype(DTYPES[entry["dtype"]]).itemsize
        if type(begin) is not int or begin != end or after != begin + nbytes:
            raise ValueError(f"array {name} of {nbytes} bytes lies at {begin!r} to {after!r}, expected from {end}")
        end = after
    return end


def read(path: Path) -> dict[str, np.ndarray]:
    """Returns the arrays of a safetensors file, read and not mapped: pages of a map would count as memory a second time.

    Raises:
      ExportFileError: see `index`.
    """
    found = index(path)
    arrays = {}
    for name, entry in found.entries.items():
        count, begin = math.prod(entry["shape"]), found.start + entry["data_offsets"][0]
        arrays[name] = np.fromfile(path, DTYPES[entry["dtype"]], count=count, offset=begin).reshape(entry["shape"])
    return arrays


def stored_arrays(params: Mapping[str, np.ndarray], *, int8: bool) -> dict[str, np.ndarray]:
    """Returns the arrays that parameters are stored as: see `stored_specs`."""
    stored = {}
    for name, array in params.items():
        if int8 and is_quantised(name, array.shape):
            stored[name], stored[name + SCALE_SUFFIX] = quantise(name, array)
        else:
            stored[name] = array
    return stored


def stored_specs(abstract: Mapping[str, jax.ShapeDtypeStruct], *, int8: bool) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the arguments an artefact takes in place of the parameters: int8 matrices have a scale with them."""
    specs = {}
    for name, spec in abstract.items():
        if int8 and is_quantised(name, spec.shape):
            specs[name] = jax.ShapeDtypeStruct(spec.shape, jnp.int8)
            specs[name + SCALE_SUFFIX] = jax.ShapeDtypeStruct((spec.shape[scale_axis(name)],), jnp.float32)
        else:
            specs[name] = spec
    return specs


def restored(stored: Mapping[str, jax.Array], abstract: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    """Returns the parameters of stored arguments, inside the program."""
    params = {}
    for name, spec in abstract.items():
        value = stored[name]
        if name + SCALE_SUFFIX in stored:
            scale = jnp.expand_dims(stored[name + SCALE_SUFFIX], 1 - scale_axis(name))
            value = (value.astype(jnp.float32) * scale).astype(spec.dtype)
        params[name] = value
    return params
