"""Classifier-free guidance: from the velocities with and without caption to the one that a step follows.

Invariant: the result is ``u + scale (c - u)``; a scale may be one number, or one for each sample of the batch.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from sora_jax.sampling.arguments import each, finite, is_traced
from sora_jax.sampling.joining import expand

Scale = np.ndarray | Array  # a scalar, or [B]


def checked_scale(guidance: Any) -> np.ndarray | jax.Array | None:
    """Returns the scale as a runtime input, float32 unless it is traced; None stays None.

    Raises:
      ValueError: it is no finite number, nor a row of them.
    """
    if guidance is None or is_traced(guidance):
        return guidance
    values = each("guidance", guidance)
    if values is None:
        return np.asarray(finite("guidance", guidance), np.float32)
    return np.asarray([finite("guidance", value) for value in values], np.float32)


def guided(scale: Scale, unconditional: Float[Array, "B ..."], difference: Float[Array, "B ..."]) -> Float[Array, "B ..."]:
    """Returns the guided velocity; ``difference`` is conditional minus unconditional."""
    return unconditional + _like(scale, difference) * difference


def guided_from_conditional(
    scale: Scale, conditional: Float[Array, "B ..."], difference: Float[Array, "B ..."]
) -> Float[Array, "B ..."]:
    """Returns the same, ``c + (scale - 1) (c - u)``, where only the difference of an earlier step is known."""
    return conditional + (_like(scale, difference) - 1) * difference


def _like(scale: Scale, v: Array) -> Array:
    number = jnp.asarray(scale, v.dtype)
    return expand(number, v) if number.ndim else number
