"""Numbers as vectors: diffusion time and frame rate, the place of a token in the frame, the index of a frame.

Invariant: frequencies are NumPy values computed at trace time and angles are float32, whatever the compute dtype.  Nothing
here has parameters; the network decides what is added or multiplied.
"""

import math

import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float, Num

from sora_jax.networks.layers import lifted

SINUSOID_SIZE = 256
MAX_PERIOD = 10000.0


def sinusoid(value_B: Float[Array, "B"]) -> Float[Array, "B 256"]:
    """Returns cosines, then sines, of the value at 128 frequencies from 1 to nearly 1/10000, float32.

    At times near 1000 the last bit of a frequency moves an angle by 6e-5, so the exponents are rounded as in the source.
    """
    half = SINUSOID_SIZE // 2
    exponents = np.float32(-math.log(MAX_PERIOD)) * np.arange(half, dtype=np.float32) / np.float32(half)
    frequencies = jnp.asarray(np.exp(exponents.astype(np.float64)), jnp.float32)
    angle = value_B.astype(jnp.float32)[:, None] * frequencies[None]
    return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)


def position_embedding(height: int, width: int, size: int, *, scale: Float[Array, ""]) -> Float[Array, "H W D"]:
    """Returns the position of ``height`` x ``width`` tokens: half the channels for the column, then half for the row.

    ``scale`` is the root of the video's area in pixels over the side of the trained square, so that a token's coordinate
    means the same part of the picture at every resolution.

    Source: Open-Sora v1.2 opensora/models/layers/blocks.py PositionEmbedding2D.
    """
    base_size = round(math.sqrt(height * width))
    frequencies = jnp.asarray(MAX_PERIOD ** -(np.arange(0, size // 2, 2) / (size // 2)), jnp.float32)

    def encode(count: int) -> Array:
        coordinate = jnp.arange(count, dtype=jnp.float32) / scale * (base_size / count)
        angle = coordinate[:, None] * frequencies[None]
        return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)

    columns = jnp.broadcast_to(encode(width)[None], (height, width, size // 2))
    rows = jnp.broadcast_to(encode(height)[:, None], (height, width, size // 2))
    return jnp.concatenate([columns, rows], axis=-1)


def rotate(x: Float[Array, "*batch T K"], positions_T: Num[np.ndarray, "T"]) -> Float[Array, "*batch T K"]:
    """Returns ``x`` with its neighbouring pairs of channels rotated by angles proportional to the position (RoPE).

    Source: rotary-embedding-torch 0.5.3 (interleaved pairs, base 10000).
    """
    size = x.shape[-1]
    frequencies = MAX_PERIOD ** -(np.arange(0, size, 2) / size)
    angle = np.repeat(np.asarray(positions_T, np.float64)[:, None] * frequencies[None], 2, axis=-1)
    wide = x.astype(jnp.float32)
    pairs = rearrange(wide, "... (k two) -> ... k two", two=2)
    turned = jnp.stack([-pairs[..., 1], pairs[..., 0]], axis=-1).reshape(wide.shape)
    cosine, sine = (lifted(jnp.asarray(part, jnp.float32), x.ndim) for part in (np.cos(angle), np.sin(angle)))
    return (wide * cosine + turned * sine).astype(x.dtype)
