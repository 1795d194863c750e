"""The pass that makes a Core ML program float16, in a form that takes little memory for large matrices.

Invariant: what becomes float16 is what coremltools' own pass would make float16.  That pass searches a constant for values
beyond float16 with three int64 arrays of the constant's size: 4 GB for the embedding of T5-XXL.

Importing this module registers the pass, which coremltools allows once in a process.
"""

from typing import Any

import coremltools
import numpy as np
from coremltools.converters.mil.mil.passes.pass_registry import register_pass

REPLACED = "common::add_fp16_cast"
NAME = "sora_jax::add_float16_cast"

_LARGEST = 65504.0  # of float16
_INFINITE = 1e38  # from here on coremltools takes a value for infinite


@register_pass(namespace="sora_jax")
class add_float16_cast(coremltools.transform.FP16ComputePrecision):  # noqa: N801  # the class names the pass
    """Casts to float16 wherever no constant is beyond its range."""

    @staticmethod
    def fp16_overflow(op: Any) -> bool:
        """Returns whether an input of the operation is a constant with finite values that float16 does not have."""
        given = (var for value in op.inputs.values() for var in (value if isinstance(value, list | tuple) else [value]))
        return any(_overflows(var.op.val.val) for var in given if _is_float32_constant(var))


def _is_float32_constant(var: Any) -> bool:
    return var.op is not None and var.op.op_type == "const" and var.is_tensor_or_scalar_of(dtype="fp32")


def _overflows(values: Any) -> bool:
    size = np.abs(np.asarray(values))
    return bool(np.any((size > _LARGEST) & (size < _INFINITE)))
