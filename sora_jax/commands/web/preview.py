"""A picture of latents that are not decoded: the clean latents that a step predicts, three of their channels as colours.

Invariant: it reads the sampler's state and changes nothing; colours are those of the latents, not of the clip.
"""

import numpy as np

from sora_jax.sampling.state import Carry

_SIDE_PX = 192
_TIMESTEPS = 1000.0


def preview(carry: Carry) -> np.ndarray:
    """Returns uint8 [h, w, 3]: the middle latent frame that the last step's velocity leads to, enlarged."""
    step = int(carry.step)
    time = float(carry.trace.time_N[step - 1]) / _TIMESTEPS if step and len(carry.trace.time_N) else 0.0
    z_THWC = np.asarray(carry.z_in[0] + time * carry.v[0], np.float32)
    picture = z_THWC[len(z_THWC) // 2][..., :3]
    low, high = np.percentile(picture, (2, 98))
    pixels = (255 * np.clip((picture - low) / max(float(high - low), 1e-6), 0, 1)).astype(np.uint8)
    times = max(1, _SIDE_PX // max(pixels.shape[:2]))
    return pixels.repeat(times, axis=0).repeat(times, axis=1)
