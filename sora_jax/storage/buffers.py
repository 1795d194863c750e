"""Memory that arrays are read into: mappings of their own, which go back to the system when the last array is dropped.

Invariant: every array begins at a multiple of `ALIGNMENT` bytes, from which JAX's CPU takes it without a copy.  Contents are
undefined until they are read.
"""

import errno
import mmap
from collections.abc import Mapping

import numpy as np

from sora_jax.storage.arrays import Parameter

ALIGNMENT = 64  # bytes


class Buffer:
    """Memory for arrays that are there together; reused for others by asking for their `arrays`.

    Raises:
      MemoryError: the system does not give that much.
    """

    def __init__(self, num_bytes: int):
        self.num_bytes = num_bytes
        try:
            self._memory = mmap.mmap(-1, max(num_bytes, mmap.PAGESIZE), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError as error:
            if error.errno != errno.ENOMEM:
                raise
            raise MemoryError(f"no memory for the {num_bytes} bytes of parameters that are needed together") from error
        if hasattr(mmap, "MADV_HUGEPAGE"):  # fewer page faults; advice that a system may not take
            try:
                self._memory.madvise(mmap.MADV_HUGEPAGE)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise

    def arrays(self, parameters: Mapping[str, Parameter]) -> dict[str, np.ndarray]:
        """Returns an array for each parameter, by name.

        Raises:
          ValueError: they need more memory than there is.
        """
        if group_bytes(parameters) > self.num_bytes:
            raise ValueError(f"{group_bytes(parameters)} bytes do not fit into {self.num_bytes}.")
        arrays, offset = {}, 0
        for name, parameter in parameters.items():
            count = parameter.nbytes // parameter.numpy_dtype.itemsize
            arrays[name] = np.frombuffer(self._memory, parameter.numpy_dtype, count, offset).reshape(parameter.shape)
            offset += _aligned(parameter.nbytes)
        return arrays


def group_bytes(parameters: Mapping[str, Parameter]) -> int:
    """Returns the bytes that arrays take in a buffer."""
    return sum(_aligned(parameter.nbytes) for parameter in parameters.values())


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT
