"""The picture that the page shows while a clip is made: the middle of what a step predicts, enlarged.

Invariant: the picture is the pipeline's preview (`Progress.preview`), whose pixels become squares and nothing else.
"""

import numpy as np
from jaxtyping import UInt8

_SIDE_PX = 192


def enlarged(pictures_BThw3: UInt8[np.ndarray, "B T h w 3"]) -> UInt8[np.ndarray, "h w 3"]:
    """Returns the middle latent frame of the first clip, at least about 192 pixels wide or high."""
    picture = pictures_BThw3[0, pictures_BThw3.shape[1] // 2]
    times = max(1, _SIDE_PX // max(picture.shape[:2]))
    return picture.repeat(times, axis=0).repeat(times, axis=1)
