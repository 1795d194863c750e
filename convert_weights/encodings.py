"""Packed values of a checkpoint as float32: eight-bit floats, and the quantised blocks of GGUF files.

Invariant: a packed value is decoded once, to the float32 number that its format defines; the types of blocks are the ``gguf``
package's, which decodes them. Plain floats are no encoding and pass unchanged. Where the bytes lie is known by the readers.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

from convert_weights.errors import SourceError

FLOAT8 = {"float8_e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn), "float8_e5m2": np.dtype(ml_dtypes.float8_e5m2)}
# The types of GGUF that NumPy reads as they are, by the package's names.
GGUF_PLAIN = {
    "F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8",
}  # fmt: skip
_PLAIN = {*GGUF_PLAIN.values(), "uint8", "bool"}  # without a look at the package, which takes a while to import


@dataclasses.dataclass(frozen=True)
class Encoding:
    """How values are packed.

    Attributes:
      block: values that are packed together; a row has whole blocks.
      block_bytes: the bytes of a block.
      decode: turns uint8 (rows, bytes of a row) into float32 (rows, values of a row).
      exact: whether ``to-torch`` can write the values back as they were: a type of safetensors.
    """

    block: int
    block_bytes: int
    decode: Callable[[np.ndarray], np.ndarray]
    exact: bool


@functools.cache
def encoding_of(dtype: str) -> Encoding | None:
    """Returns how values of a dtype are packed; None for plain numbers, and for what cannot be decoded."""
    if dtype in FLOAT8:
        # Every byte's value: looking 256 of them up is faster than converting them.
        table = np.arange(256, dtype=np.uint8).view(FLOAT8[dtype]).astype(np.float32)
        return Encoding(1, 1, lambda raw: table[raw], True)
    return None if dtype in _PLAIN or not has_gguf() else _blocks(dtype)


@functools.cache
def has_gguf() -> bool:
    """Returns whether the ``gguf`` package is installed."""
    try:
        import gguf  # noqa: F401
    except ImportError:
        return False
    return True


def gguf_type(number: int) -> str:
    """Returns the dtype of a GGUF type number: one of ours, or the package's name of a type of blocks.

    Raises:
      SourceError: the package is not installed.
      ValueError: the package knows no such type, or cannot decode it.
    """
    if not has_gguf():
        raise SourceError("GGUF files are read with the gguf package; install it with: pip install 'sora_jax[gguf]'.")
    import gguf

    name = gguf.GGMLQuantizationType(number).name
    if name in GGUF_PLAIN:
        return GGUF_PLAIN[name]
    if encoding_of(name) is None:
        raise ValueError(f"values of type {name} cannot be decoded by gguf")
    return name


def _blocks(name: str) -> Encoding | None:
    import gguf

    if name not in gguf.GGMLQuantizationType.__members__:
        return None
    kind = gguf.GGMLQuantizationType[name]
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]

    def decode(raw: np.ndarray) -> np.ndarray:
        # Scales of hostile files overflow; what is not finite is counted and reported by the caller.
        with np.errstate(all="ignore"):
            return np.asarray(gguf.quants.dequantize(raw, kind), np.float32)

    try:
        decode(np.zeros((1, block_bytes), np.uint8))
    except NotImplementedError:
        return None
    return Encoding(block, block_bytes, decode, False)


def stored_layout(dtype: str, shape: tuple[int, ...], item_bytes: Callable[[str], Any]) -> tuple[np.dtype, tuple[int, ...]]:
    """Returns NumPy's dtype and the shape of an array's bytes as they lie in the file: for packed values bytes of rows."""
    encoding = encoding_of(dtype)
    if encoding is None:
        return item_bytes(dtype), shape
    if not shape:
        return np.dtype(np.uint8), ()
    return np.dtype(np.uint8), (*shape[:-1], shape[-1] // encoding.block * encoding.block_bytes)


def decoded(dtype: str, rows: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Returns packed rows as float32 of ``shape``, and plain ones as they are."""
    encoding = encoding_of(dtype)
    if encoding is None:
        return rows
    if not math.prod(shape):
        return np.empty(shape, np.float32)
    return encoding.decode(rows.reshape(-1, rows.shape[-1] if rows.ndim else 1)).reshape(shape)
