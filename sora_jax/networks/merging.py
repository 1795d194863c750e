"""Temporal dimension token merging (TDTM): attention over pairs of frames instead of frames.

Invariant: ``unmerge(merge(x)) == x`` where the two frames of every token are equal; the residual stream, the modulation
and the MLP always see every frame.  The sampler decides in which steps merging is on.

Source: arXiv 2502.04363 section 3.3; On-device-Sora opensora/models/stdit/merge.py and stdit3.py.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from sora_jax.networks.merge_rule import Merge, Odd, RopePositions, check_frames

__all__ = [
    "Merge",
    "Odd",
    "RopePositions",
    "check_frames",
    "frame_tokens",
    "merge",
    "query_positions",
    "token_positions",
    "unmerge",
]


def merge(x_BTSD: Float[Array, "B T S D"], *, odd: Odd) -> Float[Array, "B M S D"]:
    """Returns the mean of frames 2k and 2k+1 as token k.

    Raises:
      ValueError: see `check_frames`.
    """
    num_frames = x_BTSD.shape[1]
    check_frames(num_frames, odd)
    even = num_frames - num_frames % 2
    pairs = (x_BTSD[:, 0:even:2] + x_BTSD[:, 1:even:2]) * jnp.asarray(0.5, x_BTSD.dtype)
    if even == num_frames or odd == "released":
        return pairs
    return jnp.concatenate([pairs, x_BTSD[:, even:]], axis=1)


def unmerge(x_BMSD: Float[Array, "B M S D"], num_frames: int) -> Float[Array, "B T S D"]:
    """Returns every token once for each frame it stands for (see `frame_tokens`).

    Raises:
      ValueError: so many tokens do not come from so many frames.
    """
    num_tokens = x_BMSD.shape[1]
    if num_frames not in (2 * num_tokens - 1, 2 * num_tokens, 2 * num_tokens + 1):
        raise ValueError(f"{num_tokens} merged tokens cannot stand for {num_frames} frames.")
    repeated = jnp.repeat(x_BMSD, 2, axis=1)
    if num_frames > 2 * num_tokens:
        return jnp.concatenate([repeated, x_BMSD[:, -1:]], axis=1)
    return repeated[:, :num_frames]


def frame_tokens(num_frames: int, *, odd: Odd) -> Int[np.ndarray, "T"]:
    """Returns for every frame the index of its token.

    Raises:
      ValueError: see `check_frames`.
    """
    check_frames(num_frames, odd)
    num_tokens = num_frames // 2 if odd == "released" else (num_frames + 1) // 2
    return np.minimum(np.arange(num_frames) // 2, num_tokens - 1)


def token_positions(num_frames: int, merge_rule: Merge) -> Float[np.ndarray, "M"]:
    """Returns the RoPE position of every merged token, float64, in tokens or in frames as ``rope_positions`` says."""
    tokens = frame_tokens(num_frames, odd=merge_rule.odd)
    index = np.arange(tokens[-1] + 1, dtype=np.float64)
    if merge_rule.rope_positions == "merged":
        return index
    return np.minimum(2 * index + 0.5, num_frames - 1)


def query_positions(num_frames: int, merge_rule: Merge) -> Float[np.ndarray, "T"]:
    """Returns the RoPE position of every unmerged query, float64, on the scale of `token_positions`."""
    if merge_rule.rope_positions == "merged":
        return frame_tokens(num_frames, odd=merge_rule.odd).astype(np.float64)
    return np.arange(num_frames, dtype=np.float64)
