"""float16 as float32 or bfloat16, bit for bit as NumPy casts it and twice as fast.

NumPy casts half floats one by one.  Both other types hold every one of them up to rounding, so that integer arithmetic on whole
arrays does the same: float32 has wider fields, and bfloat16 drops three bits of the fraction, to the nearest or the even one.

Invariant: every finite value has the bits of ``astype``; infinities and NaN, which no weight may be, become something else.
"""

import numpy as np

from sora_jax.storage.arrays import STORED_DTYPES

_SIGN, _SIZE = 0x8000, 0x7FFF
_BIAS = 127 - 15  # between the exponents of both others and of float16
_LEAST_NORMAL = 0x0400


def widened(values: np.ndarray, stored: str) -> np.ndarray:
    """Returns float16 values as ``stored``, ``float32`` or ``bfloat16``, in an array of their own."""
    bits = values.view(np.uint16)
    return _as_float32(bits) if stored == "float32" else _as_bfloat16(values, bits)


def _as_float32(bits: np.ndarray) -> np.ndarray:
    """Fractions move by 13 bits; the product with a power of two moves the exponent, and makes subnormal numbers normal."""
    wide = bits.astype(np.uint32)
    out = wide & np.uint32(_SIZE)
    out <<= np.uint32(13)
    numbers = out.view(np.float32)
    numbers *= np.float32(2.0**_BIAS)
    wide &= np.uint32(_SIGN)
    wide <<= np.uint32(16)
    out |= wide
    return numbers


def _as_bfloat16(values: np.ndarray, bits: np.ndarray) -> np.ndarray:
    size = bits & np.uint16(_SIZE)
    out = size >> np.uint16(3)
    out &= np.uint16(1)
    out += size
    out += np.uint16(3)
    out >>= np.uint16(3)
    out += np.uint16(_BIAS << 7)
    out |= bits & np.uint16(_SIGN)
    numbers, small = out.view(STORED_DTYPES["bfloat16"]), size < _LEAST_NORMAL
    numbers[small] = values[small].astype(numbers.dtype)
    return numbers
