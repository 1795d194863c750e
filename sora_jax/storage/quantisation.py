"""Stored int8: symmetric, one float32 scale per output column of a matrix and per row of an embedding.

Invariant: ``dequantise(name, *quantise(name, x))`` differs from ``x`` by at most half a scale, and rows of zeros stay zeros.
This is a storage format: nothing here computes with int8.
"""

from collections.abc import Container

import numpy as np
from jaxtyping import Float, Int8, Num

SCALE_SUFFIX = "_scale"


def is_quantised(name: str, shape: tuple[int, ...]) -> bool:
    """Returns whether a parameter is stored as int8: matrices and embeddings, but no norm, bias, table or convolution."""
    return len(shape) == 2 and name.rpartition(".")[2] in ("kernel", "embedding")


def is_scale(name: str, names: Container[str]) -> bool:
    """Returns whether one of a network's stored arrays, of all ``names``, is the scale of another."""
    return name.endswith(SCALE_SUFFIX) and name.removesuffix(SCALE_SUFFIX) in names


def scale_axis(name: str) -> int:
    """Returns the axis that has one scale per index: rows of an embedding, output columns of an (in, out) matrix."""
    return 0 if name.endswith("embedding") else 1


def quantise(name: str, array: Num[np.ndarray, "I O"]) -> tuple[Int8[np.ndarray, "I O"], Float[np.ndarray, "scales"]]:
    """Returns int8 values in the array's layout, and float32 scales."""
    if scale_axis(name) == 0:
        return quantise_rows(array)
    values, scale = quantise_rows(array.T)
    return np.ascontiguousarray(values.T), scale


def quantise_rows(rows: Num[np.ndarray, "R C"]) -> tuple[Int8[np.ndarray, "R C"], Float[np.ndarray, "R"]]:
    """Returns int8 rows and one float32 scale per row: round half to even, clip to 127, scale 1 where all is zero."""
    wide = rows.astype(np.float32, copy=False)
    peak = np.maximum(wide.max(axis=1), -wide.min(axis=1))
    scale = peak / np.float32(127)
    scale[scale == 0] = 1  # zeros, or subnormal numbers whose 127th part is zero
    values = wide / scale[:, None]
    np.rint(values, out=values)
    return np.clip(values, -127, 127, out=values).astype(np.int8), scale


def dequantise(name: str, values: np.ndarray, scale: np.ndarray, dtype: np.dtype | None = None) -> np.ndarray:
    """Returns ``values * scale`` in float32, or rounded to ``dtype``."""
    wide = values.astype(np.float32)
    wide *= np.expand_dims(scale, 1 - scale_axis(name))
    return wide if dtype is None else wide.astype(dtype, copy=False)
