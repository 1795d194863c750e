"""The clean latents that a step predicts: where its velocity leads in a straight line.

Invariant: the carry is read on the host and nothing of it is changed, so that a sampling has the same bits whether or not
anybody looks.
"""

import numpy as np
from jaxtyping import Float

from sora_jax.sampling.state import Carry


def predicted_clean(carry: Carry, num_timesteps: float) -> Float[np.ndarray, "B T ..."]:
    """Returns the latents at the end of the flow, as far as the last step can tell.

    A sample that is done, and a frame that is not sampled yet or never, have their latents; before the first step all have.
    ``num_timesteps`` is the time of pure noise.
    """
    z, step = np.asarray(carry.z, np.float32), int(carry.step)
    if not step:
        return z
    left = np.float32(np.asarray(carry.trace.time_N)[step - 1] / num_timesteps)
    predicted = np.asarray(carry.z_in, np.float32) + left * np.asarray(carry.v, np.float32)
    stays = np.broadcast_to(np.asarray(carry.done_B)[:, None], z.shape[:2])
    if carry.active_BT is not None:
        stays = stays | ~np.asarray(carry.active_BT)
    return np.where(stays.reshape(*stays.shape, *[1] * (z.ndim - 2)), z, predicted)
