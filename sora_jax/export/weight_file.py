"""The safetensors file of a stage's weights that StableHLO and ONNX artefacts read, and its int8 form.

int8 matrices have a float32 scale for each output beside them, under the same name with a suffix; the rest is stored as it is.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sora_jax.storage.quantisation import SCALE_SUFFIX, is_quantised, quantise, scale_axis

DTYPES = {"F32": np.float32, "F16": np.float16, "I8": np.int8}


def write(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes the arrays."""
    from safetensors.numpy import save_file

    save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, path)


def index(path: Path) -> tuple[dict[str, Any], int]:
    """Returns the entries of a file by name (dtype, shape, data_offsets), and the byte that offsets count from."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        entries = json.loads(file.read(length))
    entries.pop("__metadata__", None)
    return entries, 8 + length


def read(path: Path) -> dict[str, np.ndarray]:
    """Returns the arrays of a safetensors file, read and not mapped: pages of a map would count as memory a second time."""
    entries, start = index(path)
    arrays = {}
    for name, entry in entries.items():
        count, begin = math.prod(entry["shape"]), start + entry["data_offsets"][0]
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
    """Returns the arguments an artefact takes in place of the parameters: int8 matrices have a scale beside them."""
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
