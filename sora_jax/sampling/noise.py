"""Noise of a sampling: sample b of a batch draws from its own key, so a batch equals its samples run alone.

Invariant: the generator is pinned (threefry2x32), whatever JAX's default becomes; stream 0 is the initial latent and
stream 1 + i the noise of step i.
"""

import operator

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, UInt

GENERATOR = "threefry2x32"


def initial_noise(seed: int, shape: tuple[int, ...], dtype: DTypeLike = jnp.float32) -> Float[Array, "B ..."]:
    """Returns the starting latents [B, ...]; sample b depends on ``seed + b`` and on the shape of one sample only."""
    return _draw_compiled(as_seed(seed), shape, jnp.asarray(0, jnp.uint32), dtype)


def as_seed(seed: int) -> UInt[Array, ""]:
    """Returns the seed as a runtime scalar.

    Raises:
      ValueError: the seed does not fit 32 bits.
    """
    try:
        number = operator.index(seed)
    except TypeError:
        number = -1
    if isinstance(seed, bool) or not 0 <= number < 2**32:
        raise ValueError(f"seed is {seed!r}; expected a whole number from 0 to {2**32 - 1}.")
    return jnp.asarray(number, jnp.uint32)


def draw(
    seed: UInt[Array, ""], shape: tuple[int, ...], stream: UInt[Array, ""], dtype: DTypeLike = jnp.float32
) -> Float[Array, "B ..."]:
    """Returns standard normal values [B, ...] of one stream; seeds wrap around at 2^32."""

    def one(offset: UInt[Array, ""]) -> Float[Array, "..."]:
        key = jax.random.fold_in(jax.random.key(seed + offset, impl=GENERATOR), stream)
        return jax.random.normal(key, shape[1:], dtype)

    return jax.vmap(one)(jnp.arange(shape[0], dtype=jnp.uint32))


_draw_compiled = jax.jit(draw, static_argnums=(1, 3))
