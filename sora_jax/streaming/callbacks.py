"""Calls from a compiled program to the host that deliver arrays.

Invariant: the host function sees numpy arrays only, runs once for every time the program passes it, and not before the arrays
it is given are complete.  It must fill every output: on the CPU these are the program's own buffers, uninitialised.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import io_callback
from jax.experimental.buffer_callback import buffer_callback
from jaxtyping import Array, Bool, Int

Outputs = Mapping[str, np.ndarray]

GATE = {"passed": jax.ShapeDtypeStruct((), np.int32)}
PASSED = 1


def host_call(
    function: Callable[[int, Outputs], None],
    results: Mapping[str, jax.ShapeDtypeStruct],
    index: Int[Array, ""] | int,
    after: Array,
    *,
    portable: bool,
) -> dict[str, Array]:
    """Returns the arrays that ``function(index, outputs)`` fills on the host once ``after`` is computed.

    ``portable`` goes through `io_callback`, which every platform has and which copies once more; without it the function
    writes into the program's buffers, on the CPU.
    """
    element = after.ravel()[0]

    def fill(_context: Any, outputs: Any, index: Any, _element: Any) -> None:
        function(int(np.asarray(index)), {name: np.asarray(outputs[name]) for name in outputs})

    def make(index: Any, _element: Any) -> dict[str, np.ndarray]:
        outputs = {name: np.empty(result.shape, result.dtype) for name, result in results.items()}
        function(int(index), outputs)
        return outputs

    index = jax.numpy.asarray(index, np.int32)
    if portable:
        return io_callback(make, dict(results), index, element)
    return buffer_callback(fill, dict(results), has_side_effect=True)(index, element)


def opened(function: Callable[[int, Outputs], None], index: int, after: Array, *, portable: bool) -> Bool[Array, ""]:
    """Returns True once the host function, which has nothing to deliver, has returned; the compiler cannot know that it is."""
    return host_call(function, GATE, index, after, portable=portable)["passed"] == PASSED
