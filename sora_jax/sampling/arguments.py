"""Checks of Python arguments: whole numbers, finite numbers, one number for each sample.

Invariant: a value that passes is what its name promises; one that does not is refused in one line that says what it is, what
was expected and how to mend it.  Values that JAX traces pass unseen, because nobody can read them on the host.
"""

import math
import operator
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

# One value for the whole batch, or a sequence or array with one for each sample.
PerSample = bool | int | float | Sequence[int] | Sequence[float] | np.ndarray | jax.Array


def whole(name: str, value: Any, *, least: int, most: int | None = None) -> int:
    """Returns ``value`` as an int.

    Raises:
      ValueError: it is no whole number, or out of range.
    """
    try:
        number = None if isinstance(value, bool | np.bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None:
        raise ValueError(f"{name} is {value!r}; expected a whole number of at least {least}.")
    if number < least:
        raise ValueError(f"{name} is {number}; expected {f'at least {least}' if least else '0 or more'}.")
    if most is not None and number > most:
        raise ValueError(f"{name} is {number}; expected at most {most}.")
    return number


def finite(name: str, value: Any) -> float:
    """Returns ``value`` as a float.

    Raises:
      ValueError: it is no number (a string, a bool), or not finite.
    """
    is_number = isinstance(value, int | float | np.number) or (
        isinstance(value, np.ndarray | jax.Array) and value.ndim == 0 and np.issubdtype(value.dtype, np.number)
    )
    if isinstance(value, bool) or not is_number or isinstance(value, complex | np.complexfloating):
        raise ValueError(f"{name} is {value!r}; expected a number.")
    if not math.isfinite(value):
        raise ValueError(f"{name} is {float(value)}; expected a finite number.")
    return float(value)


def each(name: str, value: Any) -> tuple[Any, ...] | None:
    """Returns the values of a sequence or array with one for each sample, or None where ``value`` stands for all samples.

    Raises:
      ValueError: it has no values, or more than one axis.
    """
    if isinstance(value, str | bytes) or not isinstance(value, Sequence | np.ndarray | jax.Array):
        return None
    if np.ndim(value) == 0:
        return None
    if np.ndim(value) != 1 or len(value) == 0:
        raise ValueError(f"{name} has shape {np.shape(value)}; expected one number, or one for each sample of the batch.")
    return tuple(value.tolist() if isinstance(value, np.ndarray | jax.Array) else value)


def is_traced(tree: Any) -> bool:
    """Returns whether some array of a tree is being traced by jit, vmap or grad."""
    return any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(tree))


def shown(value: Any) -> str:
    """Returns how an error names a value: its repr where that is short, else its type."""
    text = repr(value)
    return text if len(text) <= 60 and "\n" not in text else f"a {type(value).__name__}"
