"""Softmax attention in several forms with one signature: the same result, other arrays in memory.

A form is a frozen dataclass that is called: hashable, so that it can be a static field of a module and part of every compile
key.  It refuses with `NotImplementedError` what it cannot do.  Here are the two forms of plain XLA, which every platform and
every export target takes; ``attention_kernels`` holds those of one platform.  Which form runs is decided outside.

Invariant: the dtype of the queries decides the compute dtype; logits, their softmax and the sums over keys are float32.
Nothing here has parameters or knows which network calls it.
"""

import dataclasses
import functools
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Bool, Float

from sora_jax.networks.layers import precision_of

_HIDDEN = -3e4  # added to the logits of keys that may not be seen, within float16's range
LEAST_QUERIES = 64  # smaller blocks take other matrix products on a CPU, with other bits


@runtime_checkable
class Attention(Protocol):
    """A form of softmax attention; equal forms make equal programs."""

    def __call__(
        self,
        q_BNSK: Float[Array, "B N S K"],
        k_BNLK: Float[Array, "B N L K"],
        v_BNLK: Float[Array, "B N L K"],
        *,
        scale: float,
        bias: Float[Array, "#B #N #S L"] | None = None,
        mask: Bool[Array, "#B #N #S L"] | None = None,
        half_range: bool = False,
    ) -> Float[Array, "B N S K"]:
        """Returns for every query the average of the values, weighted by the softmax of its logits over the keys.

        Args:
          q_BNSK: queries.
          k_BNLK: keys.
          v_BNLK: values.
          scale: factor of the products of queries and keys.
          bias: added to the float32 logits.
          mask: True where a key may be seen; at least one key of every query must be.
          half_range: computes in a way that stays within float16's range (see `DTypePolicy`).

        Raises:
          NotImplementedError: the form cannot do this; the message says why.
        """
        ...


@dataclasses.dataclass(frozen=True)
class Dense:
    """All logits at once; with ``breaker`` they are split and joined before the softmax, which changes no value.

    The weights are normalised after the product with the values, which is cheaper by L/K and equal in exact arithmetic.
    With ``half_range`` before it, as the sum of values may be large, and the mask is added, as a number that float16 holds
    and at the mask's own shape: converters know this form, and the others write the mask out in full.
    """

    breaker: bool = False

    def __call__(
        self,
        q_BNSK: Float[Array, "B N S K"],
        k_BNLK: Float[Array, "B N L K"],
        v_BNLK: Float[Array, "B N L K"],
        *,
        scale: float,
        bias: Float[Array, "#B #N #S L"] | None = None,
        mask: Bool[Array, "#B #N #S L"] | None = None,
        half_range: bool = False,
    ) -> Float[Array, "B N S K"]:
        """Returns the averages of the values, see `Attention`."""
        product = functools.partial(jnp.einsum, precision=precision_of(q_BNSK.dtype), preferred_element_type=jnp.float32)
        logits = product("bnsk,bnlk->bnsl", q_BNSK * jnp.asarray(scale, q_BNSK.dtype), k_BNLK)
        if bias is not None:
            logits = logits + bias
        if mask is not None and half_range:
            logits = logits + jnp.where(mask, 0.0, _HIDDEN)
        elif mask is not None:
            logits = jnp.where(mask, logits, jnp.finfo(jnp.float32).min)
        if self.breaker and logits.shape[-1] > 1:  # what a runtime cannot look through, it does not fuse
            logits = jnp.concatenate(jnp.split(logits, [logits.shape[-1] // 2], axis=-1), axis=-1)
        weights = jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True))
        total = jnp.sum(weights, axis=-1, keepdims=True)
        if half_range:
            return product("bnsl,bnlk->bnsk", (weights / total).astype(v_BNLK.dtype), v_BNLK).astype(q_BNSK.dtype)
        out = product("bnsl,bnlk->bnsk", weights.astype(v_BNLK.dtype), v_BNLK)
        return (out / total).astype(q_BNSK.dtype)


DENSE = Dense()


@dataclasses.dataclass(frozen=True)
class Chunked:
    """The logits of ``queries`` queries at a time, at most: a loop over blocks of them, each of which is dense.

    Blocks are equally long and no shorter than `LEAST_QUERIES`; the last may overlap the one before, whose rows it computes
    again.  Every row is reduced whole, so on a CPU the bits are those of the dense form.  With ``unrolled`` they are written
    one after the other, for export targets that have no loops.  ``breaker`` as in `Dense`.

    Raises:
      ValueError: ``queries`` is below `LEAST_QUERIES`.
    """

    queries: int = 256
    unrolled: bool = False
    breaker: bool = False

    def __post_init__(self) -> None:
        if self.queries < LEAST_QUERIES:
            raise ValueError(f"chunks of {self.queries} queries; expected at least {LEAST_QUERIES}.")

    def __call__(
        self,
        q_BNSK: Float[Array, "B N S K"],
        k_BNLK: Float[Array, "B N L K"],
        v_BNLK: Float[Array, "B N L K"],
        *,
        scale: float,
        bias: Float[Array, "#B #N #S L"] | None = None,
        mask: Bool[Array, "#B #N #S L"] | None = None,
        half_range: bool = False,
    ) -> Float[Array, "B N S K"]:
        """Returns the averages of the values, see `Attention`."""
        length = q_BNSK.shape[2]
        dense = functools.partial(Dense(self.breaker), scale=scale, half_range=half_range)
        if length <= self.queries:
            return dense(q_BNSK, k_BNLK, v_BNLK, bias=bias, mask=mask)
        count = -(-length // self.queries)
        size = max(LEAST_QUERIES, -(-length // count))
        starts = [min(i * size, length - size) for i in range(count)]

        def block(rows: dict[str, Array]) -> Array:
            return dense(rows["q"], k_BNLK, v_BNLK, bias=rows.get("bias"), mask=rows.get("mask"))

        given = {name: rows for name, rows in (("q", q_BNSK), ("bias", bias), ("mask", mask)) if rows is not None}
        parts = [  # what belongs to the queries of each block; a single row belongs to all
            {name: rows if rows.shape[2] == 1 else rows[:, :, start : start + size] for name, rows in given.items()}
            for start in starts
        ]
        done = (count - 1) * size  # rows before the last block, which computes some of them again
        if self.unrolled:
            *before, last = [block(part) for part in parts]
            return jnp.concatenate([*before, last[:, :, done - length :]], axis=2)
        out = jax.lax.map(block, jax.tree.map(lambda *rows: jnp.stack(rows), *parts))
        whole = rearrange(out[:-1], "c b n s k -> b n (c s) k")
        return jnp.concatenate([whole, out[-1][:, :, done - length :]], axis=2)
