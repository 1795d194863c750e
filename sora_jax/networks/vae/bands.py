"""Images computed in bands of rows, where the features of whole images would be most of a process's memory.

Invariant: every row of the output is computed from the same rows of the input as without bands; statistics that span an image
are taken of the whole image before.  The result takes no more than the input and the output, and two bands.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

HALO = 1  # rows that a convolution of size 3 sees beyond its own


class Bands(NamedTuple):
    """How rows are divided: ``number`` bands of ``rows``; the last one may overlap the one before."""

    number: int
    rows: int


def bands(shape: tuple[Any, ...], most_bytes: int | None, itemsize: int) -> Bands | None:
    """Returns how images [N, h, w, C] are divided so that a band has at most half of ``most_bytes``; None: not at all.

    A single row may be more than that.  Lengths may be symbolic, as an export leaves them, where there is no limit.
    """
    if most_bytes is None:
        return None
    images, height, width, channels = shape
    row_bytes = images * width * channels * itemsize
    if row_bytes * height <= most_bytes:
        return None
    most = max(1, most_bytes // 2 // row_bytes)
    number = -(-height // most)
    rows = -(-height // number)
    return Bands(number, rows) if height > rows + 2 * HALO else None


def in_bands(
    forward: Callable[..., Array], divided: Bands, *images: Float[Array, "N h w _"], factor: int = 1
) -> Float[Array, "N H W O"]:
    """Returns ``forward(*images)`` computed in bands of rows; it must see no more than one row beyond its own.

    Args:
      forward: images of any height to images ``factor`` times as high; what lies beyond the first and the last row is zero.
      divided: from `bands`.
      images: with equally many rows.
      factor: rows of the output for each row of the input.
    """
    height, seen = images[0].shape[1], divided.rows + 2 * HALO
    part = jax.eval_shape(forward, *(jax.ShapeDtypeStruct(_with_rows(x, seen), x.dtype) for x in images))
    # Every row is written.  A value of the input makes XLA allocate this now; zeros it would allocate when the program begins.
    out = jnp.broadcast_to(images[0][0, 0, 0, 0].astype(part.dtype), _with_rows(part, factor * height))

    def band(i: Array, out: Array) -> Array:
        first = jnp.minimum(i * divided.rows, height - divided.rows)
        start = jnp.clip(first - HALO, 0, height - seen)  # at the edge of the image the band keeps the edge's zeros
        computed = forward(*(jax.lax.dynamic_slice_in_dim(x, start, seen, axis=1) for x in images))
        own = jax.lax.dynamic_slice_in_dim(computed, factor * (first - start), factor * divided.rows, axis=1)
        return jax.lax.dynamic_update_slice_in_dim(out, own, factor * first, axis=1)

    return jax.lax.fori_loop(0, divided.number, band, out)


def _with_rows(x: Array | jax.ShapeDtypeStruct, rows: int) -> tuple[int, ...]:
    return (x.shape[0], rows, *x.shape[2:])
