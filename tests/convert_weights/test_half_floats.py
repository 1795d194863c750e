"""Every float16 number there is, as float32 and as bfloat16."""

import numpy as np
import pytest

from convert_weights.half_floats import widened
from sora_jax.storage.arrays import STORED_DTYPES


@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
def test_every_finite_number_has_the_bits_of_a_cast(stored: str) -> None:
    every = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    finite = every[np.isfinite(every)]
    found, expected = widened(finite, stored), finite.astype(STORED_DTYPES[stored])
    assert found.dtype == expected.dtype
    np.testing.assert_array_equal(found.view(np.uint8), expected.view(np.uint8))
    rows = widened(finite.reshape(64, -1), stored)
    np.testing.assert_array_equal(rows.view(np.uint8), expected.reshape(64, -1).view(np.uint8))
