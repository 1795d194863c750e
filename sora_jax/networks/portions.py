"""A transformer block applied to a portion of its tokens at a time, where its activations would outweigh its weights.

A spatial block mixes tokens of one frame and a temporal block tokens of one place, so some frames, or some places, of one row
of the batch are a block's whole input.  Frames that merging joins stay in one portion.

Invariant: every token is computed once, by the block's own forward and from the tokens the whole block would see; the result
takes the place of the input, so two arrays of tokens exist at most.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
from jaxtyping import Array, Float

from sora_jax.networks import merging


class Portions(NamedTuple):
    """Along ``axis`` of the tokens: ``times`` portions of ``length``, and one of ``rest`` if that is not 0."""

    axis: int
    times: int
    length: int
    rest: int


def portions(shape: tuple[int, ...], most_tokens: int, *, temporal: bool, merge: merging.Merge | None) -> Portions | None:
    """Returns how tokens [B, T, S, D] are divided so that ``most_tokens`` are computed at a time; None: not at all.

    A single frame (two or three that are merged), or the frames of a single place, may be more than that.
    """
    rows, frames, places, _ = shape
    if rows * frames * places <= most_tokens:
        return None
    axis, total, each = (2, places, frames) if temporal else (1, frames, places)
    joined = None if temporal or merge is None or not (merge.spatial or merge.cross) else merge.odd
    most = max(1, most_tokens // each)
    if total <= most:
        return Portions(axis, 1, total, 0)
    lengths = list(_merged_lengths(total, max(2, most), joined) if joined else _lengths(total, most))
    return Portions(axis, *(lengths[0] if lengths else (1, total, 0)))


def _lengths(total: int, most: int) -> Iterator[tuple[int, int, int]]:
    """Yields count, length and rest: the largest length that leaves no rest, unless that is below half of ``most``."""
    for length in range(most, most // 2, -1):
        if total % length == 0:
            yield total // length, length, 0
    yield total // most, most, total % most


def _merged_lengths(total: int, most: int, odd: merging.Odd) -> Iterator[tuple[int, int, int]]:
    """Yields count, length and rest: whole pairs of frames, and a rest that can be merged by itself."""
    for length in range(most - most % 2, 1, -2):
        count, rest = divmod(total, length)
        if rest == 1:
            count, rest = count - 1, rest + length
        try:
            merging.check_frames(rest or length, odd)
        except ValueError:
            continue
        yield count, length, rest


def in_portions(
    forward: Callable[[Array, Array, Array | int, int], Array],
    x_BTSD: Float[Array, "B T S D"],
    divided: Portions,
) -> Float[Array, "B T S D"]:
    """Returns the tokens after ``forward(part, row, start, length)``, row by row and portion by portion, in their own place."""

    def update(x_BTSD: Array, row: Array, start: Array | int, length: int) -> Array:
        at: list[Array | int] = [row, 0, 0, 0]
        at[divided.axis] = start
        shape = [1, *x_BTSD.shape[1:]]
        shape[divided.axis] = length
        part = jax.lax.dynamic_slice(x_BTSD, at, shape)
        return jax.lax.dynamic_update_slice(x_BTSD, forward(part, row, start, length), at)

    def row(index: Array, x_BTSD: Array) -> Array:
        def portion(i: Array, x_BTSD: Array) -> Array:
            return update(x_BTSD, index, i * divided.length, divided.length)

        x_BTSD = jax.lax.fori_loop(0, divided.times, portion, x_BTSD)
        return update(x_BTSD, index, divided.times * divided.length, divided.rest) if divided.rest else x_BTSD

    return jax.lax.fori_loop(0, x_BTSD.shape[0], row, x_BTSD)
