"""Calls from a compiled program to the host that deliver arrays.

Invariant: the host function sees numpy arrays only, runs once for every time the program passes it, and not before the arrays
it receives are complete. It must fill every output: on the CPU these are the program's own buffers, uninitialised. A program
holds no host function: it gets a number, by which it finds whoever is `answering` when it runs, so that one program
serves all, and none of them outlives its use.
"""

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import io_callback
from jax.experimental.buffer_callback import buffer_callback
from jaxtyping import Array, Bool, Int

Outputs = Mapping[str, np.ndarray]
Answer = Callable[[int, Outputs], None]
Number = Int[Array, ""] | Int[np.ndarray, ""]  # on the host, and traced

GATE = {"passed": jax.ShapeDtypeStruct((), np.int32)}
PASSED = 1

_NUMBERS = itertools.count()
_ANSWERS: dict[int, Answer] = {}  # of those who are answering now


@contextlib.contextmanager
def answering(answer: Answer) -> Iterator[Int[np.ndarray, ""]]:
    """Yields the number by which programs call ``answer(index, outputs)`` while the block runs."""
    number = next(number for number in (count % 2**31 for count in _NUMBERS) if number not in _ANSWERS)
    _ANSWERS[number] = answer
    try:
        yield np.asarray(number, np.int32)
    finally:
        del _ANSWERS[number]


def host_call(
    number: Number,
    results: Mapping[str, jax.ShapeDtypeStruct],
    index: Int[Array, ""] | int,
    after: Array,
    *,
    portable: bool,
) -> dict[str, Array]:
    """Returns the arrays that the answer of a number fills on the host, for ``index``, once ``after`` is computed.

    ``portable`` goes through `io_callback`, which every platform has and which copies once more; without it the function
    writes into the program's buffers, on the CPU.
    """
    element = after.ravel()[0]

    def make(number: Any, index: Any, _element: Any) -> dict[str, np.ndarray]:
        outputs = {name: np.empty(result.shape, result.dtype) for name, result in results.items()}
        _answer(number, index, outputs)
        return outputs

    index = jax.numpy.asarray(index, np.int32)
    if portable:
        return io_callback(make, dict(results), number, index, element)
    return buffer_callback(_fill, dict(results), has_side_effect=True)(number, index, element)


def opened(number: Number, index: int, after: Array, *, portable: bool) -> Bool[Array, ""]:
    """Always True, but only after the host function has returned; XLA cannot see that, so it waits."""
    return host_call(number, GATE, index, after, portable=portable)["passed"] == PASSED


def _fill(_context: Any, outputs: Any, number: Any, index: Any, _element: Any) -> None:
    _answer(number, index, {name: np.asarray(outputs[name]) for name in outputs})


def _answer(number: Any, index: Any, outputs: Outputs) -> None:
    answer = _ANSWERS.get(int(np.asarray(number)))
    if answer is None:
        raise RuntimeError("the streamed transformer is not open; sample within its `open` block.")
    answer(int(np.asarray(index)), outputs)
