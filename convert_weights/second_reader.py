"""Reads a checkpoint once more through readers that are not ours, and compares every array with what ours gives.

Safetensors files go through the ``safetensors`` package, GGUF files through the reader of ``gguf``, and PyTorch files
(and safetensors with eight-bit floats, which NumPy lacks) through PyTorch in a child process, where it is installed.

Invariant: nothing of our own readers is used for the second reading, so a fault that conversion and verification
share does not hide.  What the arrays become is compared elsewhere.
"""

import hashlib
import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import safetensors

from convert_weights.encodings import FLOAT8, GGUF_PLAIN
from convert_weights.errors import printable
from convert_weights.readers import Checkpoint
from convert_weights.source_array import Array

_SLICE_BYTES = 4 << 20


class Digest(NamedTuple):
    """What two readers must agree on: dtype, shape, and sha256 of the bytes in C order."""

    dtype: str
    shape: tuple[int, ...]
    sha256: str


class ReadError(Exception):
    """The second reader cannot read the file."""


def differences(
    checkpoint: Checkpoint,
    names: Collection[str],
    further: Collection[Array] = (),
    *,
    note: Callable[[str], None] = lambda text: None,
) -> list[str]:
    """Returns a line for each array that a second reader reads differently from ours.

    Args:
      checkpoint: the source.
      names: the arrays to compare.
      further: arrays of other sources, whose files are among the checkpoint's.
      note: called with the reader of each file, or that there is none for it.
    """
    faults = []
    for path in checkpoint.files:
        wanted = [*(checkpoint.arrays[name] for name in names), *further]
        wanted += [array.scale for array in wanted if array.scale]
        arrays = [array for array in wanted if array.file == path]
        try:
            reader, second = _second(path, checkpoint.sections.get(path), arrays)
        except ReadError as error:
            faults.append(f"source: {path} cannot be read by a second reader ({printable(error)})")
            continue
        note(f"{path.name}: read again by {reader}" if reader else f"{path.name}: not read again, PyTorch is not installed")
        if reader:
            faults += [
                f"source: {array.name} is read differently by {reader}"
                for array in arrays
                if second.get(array.key) != _ours(checkpoint, array)
            ]
    return faults


def _ours(checkpoint: Checkpoint, array: Array) -> Digest:
    digest = hashlib.sha256()
    row_bytes = array.nbytes // max(array.tensor.shape[0] if array.tensor.shape else 1, 1)
    step = max(1, _SLICE_BYTES // max(row_bytes, 1))
    with checkpoint.open(array.file) as file:
        for rows in array.slices(file, np.empty(max(row_bytes * step, 1), np.uint8), step):
            digest.update(_bytes(rows))
    return Digest(array.tensor.dtype, array.tensor.shape, digest.hexdigest())


def _bytes(rows: np.ndarray) -> memoryview:
    return np.ascontiguousarray(rows).reshape(-1).view(np.uint8).data


def _second(path: Path, section: str | None, arrays: Collection[Array]) -> tuple[str, dict[str, Digest]]:
    """Returns the name of the second reader, empty if there is none, and what it reads."""
    keys = {array.key for array in arrays}
    if path.suffix == ".gguf":
        return "gguf", _through_gguf(path, keys)
    if path.suffix == ".safetensors" and not any(array.tensor.dtype in FLOAT8 for array in arrays):
        return f"safetensors {safetensors.__version__}", _through_safetensors(path, keys)
    if importlib.util.find_spec("torch") is None:
        return "", {}
    return "PyTorch", _through_torch(path, section)


def _through_safetensors(path: Path, keys: Iterable[str]) -> dict[str, Digest]:
    found = {}
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            for key in set(file.keys()) & set(keys):
                rows = file.get_slice(key)
                shape = tuple(rows.get_shape())
                digest = hashlib.sha256()
                if 0 in shape or not shape:
                    whole = file.get_tensor(key)
                    dtype = whole.dtype.name
                    digest.update(_bytes(whole))
                else:
                    dtype = rows[0:1].dtype.name
                    step = max(1, _SLICE_BYTES // max(rows[0:1].nbytes, 1))
                    for start in range(0, shape[0], step):
                        digest.update(_bytes(rows[start : min(start + step, shape[0])]))
                found[key] = Digest(dtype, shape, digest.hexdigest())
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise ReadError(f"safetensors: {error}") from error
    return found


def _through_gguf(path: Path, keys: Collection[str]) -> dict[str, Digest]:
    import gguf

    try:
        found = {}
        for tensor in gguf.GGUFReader(path).tensors:
            if tensor.name in keys:
                shape = tuple(int(extent) for extent in reversed(tensor.shape))
                rows = tensor.data.reshape(len(tensor.data), -1) if tensor.data.ndim else tensor.data.reshape(1, 1)
                digest = hashlib.sha256()
                step = max(1, _SLICE_BYTES // max(rows[0].nbytes, 1))
                for start in range(0, len(rows), step):
                    digest.update(_bytes(rows[start : start + step]))
                dtype = GGUF_PLAIN.get(tensor.tensor_type.name, tensor.tensor_type.name)
                found[tensor.name] = Digest(dtype, shape, digest.hexdigest())
    except (OSError, ValueError, KeyError, IndexError, OverflowError, MemoryError) as error:
        raise ReadError(f"gguf: {error}") from error
    return found


def _through_torch(path: Path, section: str | None) -> dict[str, Digest]:
    # -P: the folder of the program, which holds this package's modules, is not searched for PyTorch's.
    program = [sys.executable, "-P", str(Path(__file__).with_name("torch_digests.py")), str(path), section or ""]
    done = subprocess.run(program, capture_output=True, text=True, check=False)
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
        raise ReadError(f"PyTorch: {last[0]}")
    fields = [json.loads(line) for line in done.stdout.splitlines()]
    return {name: Digest(dtype, tuple(shape), sha256) for name, dtype, shape, sha256 in fields}
