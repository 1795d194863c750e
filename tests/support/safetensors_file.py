"""A safetensors file as arrays, for machines that have JAX and not the safetensors package.

Invariant: the header's names, dtypes, shapes and offsets are followed as they stand; what does not fit is a ValueError.
"""

import json
from pathlib import Path

import ml_dtypes
import numpy as np

_DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "U8": "u1", "BOOL": "?"}


def load_file(path: Path) -> dict[str, np.ndarray]:
    """Returns the tensors by name."""
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    entries = json.loads(data[8:start])
    entries.pop("__metadata__", None)
    tensors = {}
    for name, entry in entries.items():
        first, last = entry["data_offsets"]
        dtype = np.dtype(ml_dtypes.bfloat16 if entry["dtype"] == "BF16" else _DTYPES[entry["dtype"]])
        tensors[name] = np.frombuffer(data[start + first : start + last], dtype).reshape(entry["shape"])
    return tensors
