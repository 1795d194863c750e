"""Test vectors of an export: inputs and outputs by which a host in another language, or a device, is proven.

Every function has a safetensors file with the arrays of a real evaluation, as JAX computes it in float32 (`check` says how near
an artefact comes).  ``vectors/host.json`` has what a host does itself (`host_vectors`), ``vectors/clip.safetensors`` one clip,
``vectors/given.safetensors`` one whose first frame is given.

Invariant: vectors come from JAX and the pipeline, never from the artefacts that they test.  They are files of the export as all
others: listed, and compared with their checksum before they are read.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sora_jax.export import weight_file
from sora_jax.export.contents import Contents, ExportFileError
from sora_jax.export.entries import FunctionEntry, TensorEntry
from sora_jax.export.opening import refuse_other_name
from sora_jax.export.phases import base_name

FOLDER = "vectors"
HOST_FILE, CLIP_FILE, GIVEN_FILE = f"{FOLDER}/host.json", f"{FOLDER}/clip.safetensors", f"{FOLDER}/given.safetensors"
CLIP, GIVEN = "the clip", "the clip with a given frame"  # whose arrays they are, in the file's header
_IN, _OUT = "in/", "out/"

Arrays = dict[str, np.ndarray]


def write_function(
    folder: Path, stage: str, function: str, inputs: Mapping[str, np.ndarray], outputs: Mapping[str, Any]
) -> str:
    """Writes inputs and reference outputs of a function, and returns the name of the file."""
    name = f"{FOLDER}/{stage}.{function}.safetensors"
    (folder / FOLDER).mkdir(exist_ok=True)
    arrays = {_IN + key: np.asarray(array) for key, array in inputs.items()}
    arrays |= {_OUT + key: np.asarray(array) for key, array in outputs.items()}
    weight_file.write(folder / name, arrays, stage=f"{stage} {function}")
    return name


def read_function(contents: Contents, stage: str, function: FunctionEntry) -> tuple[Arrays, Arrays]:
    """Returns inputs and expected outputs of a function.

    Raises:
      ExportFileError: the file is damaged, or has other arrays than the function.
    """
    base = base_name(function["name"], function.get("attention"))  # forms of attention share their vectors
    arrays = read(contents, function.get("vectors", ""), f"{stage} {base}")
    path = contents.folder / function.get("vectors", "")
    return _declared(path, arrays, _IN, function["inputs"]), _declared(path, arrays, _OUT, function["outputs"])


def read(contents: Contents, name: str, of: str) -> Arrays:
    """Returns the arrays of a file of vectors.

    Raises:
      ExportFileError: it is damaged, or those of something else.
    """
    with contents.reading(name) as path:
        refuse_other_name(path, "vectors of", weight_file.index(path).stage, of)
        return weight_file.read(path)


def _declared(path: Path, arrays: Arrays, prefix: str, tensors: list[TensorEntry]) -> Arrays:
    found = {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}
    shapes = {name: list(array.shape) for name, array in found.items()}
    expected = {tensor["name"]: tensor["shape"] for tensor in tensors}
    if shapes != expected:
        raise ExportFileError(f"{path} has arrays {shapes}; the manifest says {expected}.")
    return found
