"""Softmax attention.

Invariant: the dtype of the queries decides the compute dtype; logits, their softmax and the sums over keys are float32.
Nothing here has parameters or knows which network calls it.
"""

import functools

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from sora_jax.networks.layers import precision_of

_HIDDEN = -3e4  # added to the logits of keys that may not be seen, within float16's range


def attention(
    q_BNSK: Float[Array, "B N S K"],
    k_BNLK: Float[Array, "B N L K"],
    v_BNLK: Float[Array, "B N L K"],
    *,
    scale: float,
    bias: Float[Array, "#B #N #S L"] | None = None,
    mask: Bool[Array, "#B #N #S L"] | None = None,
    half_range: bool = False,
) -> Float[Array, "B N S K"]:
    """Softmax attention; ``mask`` is True where a key may be seen, ``bias`` is added to the float32 logits.

    The weights are normalised after the product with the values, which is cheaper by L/K and equal in exact arithmetic.
    With ``half_range`` (see `DTypePolicy`) before it, as the sum of values may be large, and the mask is added, as a number
    that float16 holds and at the mask's own shape: converters know this form, and the others write the mask out in full.
    """
    product = functools.partial(jnp.einsum, precision=precision_of(q_BNSK.dtype), preferred_element_type=jnp.float32)
    logits = product("bnsk,bnlk->bnsl", q_BNSK * jnp.asarray(scale, q_BNSK.dtype), k_BNLK)
    if bias is not None:
        logits = logits + bias
    if mask is not None and half_range:
        logits = logits + jnp.where(mask, 0.0, _HIDDEN)
    elif mask is not None:
        logits = jnp.where(mask, logits, jnp.finfo(jnp.float32).min)
    weights = jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True))
    total = jnp.sum(weights, axis=-1, keepdims=True)
    if half_range:
        return product("bnsl,bnlk->bnsk", (weights / total).astype(v_BNLK.dtype), v_BNLK).astype(q_BNSK.dtype)
    out = product("bnsl,bnlk->bnsk", weights.astype(v_BNLK.dtype), v_BNLK)
    return (out / total).astype(q_BNSK.dtype)
