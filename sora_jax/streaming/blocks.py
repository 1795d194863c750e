"""A block of the transformer from its stored arrays.

Invariant: stored int8 becomes float32 here, inside the program and inside the step, by the multiplication that loading does on
the host; the block forward itself is the resident one.
"""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from sora_jax.networks.merging import Merge
from sora_jax.networks.stdit3 import Conditioning
from sora_jax.storage.checkpoint import unflatten
from sora_jax.storage.quantisation import SCALE_SUFFIX, is_scale, scale_axis


def run_block(
    shell: Any, stored: Mapping[str, Array], x_BTSD: Float[Array, "B T S D"], conditioning: Conditioning, *, merge: Merge | None
) -> Float[Array, "B T S D"]:
    """Returns the tokens after the block with the shapes of ``shell`` and these stored arrays (by name)."""
    return unflatten(shell, dequantised(stored))(x_BTSD, conditioning, merge=merge)


def dequantised(stored: Mapping[str, Any]) -> dict[str, Any]:
    """Returns parameters by name, int8 multiplied out to float32."""
    flat = {}
    for name, array in stored.items():
        if name + SCALE_SUFFIX in stored:
            flat[name] = array.astype(jnp.float32) * jnp.expand_dims(stored[name + SCALE_SUFFIX], 1 - scale_axis(name))
        elif not is_scale(name, stored):
            flat[name] = array
    return flat
