"""Masked sampling: each latent frame has a weight that says from which time on it is sampled.

Weight 1 samples a frame from noise, weight 0 keeps it exact, and a weight w in between lets it join at time w, re-noised
to that time: image to video, extension and editing are frame weights.

Invariant: a frame that is not active leaves a step with the bits it entered with.  Nothing here knows the velocity.

Source: Open-Sora v1.2 schedulers/rf RFLOW.sample (mask, x_mask, noise_added).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float


def active_frames(weight_BT: Float[Array, "B T"], t: Float[Array, ""], num_timesteps: float) -> Bool[Array, "B T"]:
    """Returns which frames a step at time ``t`` samples; ``num_timesteps`` is the time of pure noise."""
    return weight_BT * num_timesteps >= t


def begin(weight_BT: Float[Array, "B T"]) -> Bool[Array, "B T"]:
    """Returns which frames count as noisy before the first step: the initial latents of weight 1 are noise already."""
    return weight_BT == 1


def join(
    z_BTX: Float[Array, "B T ..."],
    joining_BT: Bool[Array, "B T"],
    t: Float[Array, ""],
    draw_fn: Callable[[], Float[Array, "B T ..."]],
) -> Float[Array, "B T ..."]:
    """Returns the latents with joining frames moved to time ``t`` (flow units) along the line to their noise.

    Noise is drawn only in a step in which some frame joins.
    """

    def renoised() -> Float[Array, "B T ..."]:
        signal = 1 - t
        return jnp.where(expand(joining_BT, z_BTX), signal * z_BTX + (1 - signal) * draw_fn(), z_BTX)

    return jax.lax.cond(jnp.any(joining_BT), renoised, lambda: z_BTX)


def all_joined(weight_BT: Float[Array, "B T"], active_BT: Bool[Array, "B T"]) -> Bool[Array, "B"]:
    """Returns for each sample whether every frame that will ever be sampled is active."""
    return jnp.all(active_BT | (weight_BT <= 0), axis=1)


def expand(x: Array, like: Array) -> Array:
    """Returns ``x`` with trailing axes of length 1 up to the rank of ``like``."""
    return x.reshape(x.shape + (1,) * (like.ndim - x.ndim))


def smallest_legal_leap(weight_BT: Float[np.ndarray, "B T"], times: Float[np.ndarray, "N"], num_timesteps: float) -> int:
    """Returns the first step at which every frame with a positive weight is active, else the last step."""
    positive = weight_BT[weight_BT > 0]
    joined = (np.float32(num_timesteps) * np.min(positive, initial=1.0).astype(np.float32)) >= times
    return int(np.argmax(joined)) if joined.any() else len(times) - 1


def joining_steps(
    weight_BT: Float[np.ndarray, "B T"], times: Float[np.ndarray, "N"], num_timesteps: float
) -> Bool[np.ndarray, "N"]:
    """Returns for each step whether some frame joins in it, as the compiled program decides."""
    threshold = weight_BT.ravel() * np.float32(num_timesteps)
    active = threshold[None] >= times[:, None]
    before = np.concatenate([weight_BT.reshape(1, -1) == 1, active[:-1]])
    return (active & ~before).any(axis=1)
