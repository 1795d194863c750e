"""The scales of eight-bit floats, as ComfyUI writes them: one number next to each matrix.

Invariant: a number that is used as a scale is no array of its own any more, and in a file that has scales no eight-bit array is
read without one. The numbers themselves are read with the values.
"""

import dataclasses
import math
from collections.abc import Mapping

from convert_weights.encodings import FLOAT8
from convert_weights.source_array import Array

# `layer.weight` is multiplied with the number of `layer.scale_weight`; newer files have `layer.weight_scale`.
_NAMES = ("scale_weight", "weight_scale")
_MARK = "scaled_fp8"


def with_scales(arrays: Mapping[str, Array]) -> tuple[dict[str, Array], tuple[str, ...]]:
    """Returns the arrays, those of eight-bit floats with their scales, and a fault for each that lacks one.

    A scale that belongs to no such array, or is not one float32 number, stays an array that no network knows.
    """
    kept = dict(arrays)
    for name, array in arrays.items():
        stem = name.removesuffix("weight")
        found = [scale for scale in (arrays.get(stem + spelling) for spelling in _NAMES) if scale is not None]
        if stem == name or array.tensor.dtype not in FLOAT8 or len(found) != 1:
            continue
        if found[0].tensor.dtype == "float32" and math.prod(found[0].tensor.shape) == 1:
            kept[name] = dataclasses.replace(array, scale=found[0])
            del kept[found[0].name]
    scaled = any(array.scale for array in kept.values()) or any(name.split(".")[-1] == _MARK for name in kept)
    lacking = [name for name, array in kept.items() if array.tensor.dtype in FLOAT8 and not array.scale] if scaled else []
    lacking = [name for name in lacking if name.split(".")[-1] != _MARK]
    return kept, tuple(
        f"{name}: has no scale ({_NAMES[0]}), although the file is of scaled {kept[name].tensor.dtype}" for name in lacking
    )
