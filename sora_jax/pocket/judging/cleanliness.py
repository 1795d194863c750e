"""Whether a clip is clean, whatever it shows: an even background that does not flicker, and at most one object.

Invariant: judged from the pixels alone, like ``measure``'s attributes.  This module has no limit for flicker and jumps: clips
are compared with rendered clips that went through the same codec.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Num

from sora_jax.pocket.judging.measure import Measurement, check_clip, find_object, fit_background, measure, neighbours, to_levels
from sora_jax.pocket.judging.scores import Rate

UNEVENNESS_LIMIT = (
    8.1  # levels: the 30 dB that the codec must reach, so that a clip within the limit is no worse than a coded plane
)
_EDGE_PX = 3  # pixels around the object that belong to its soft edge, not to the background


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cleanliness:
    """How even a clip's background is, and how many objects are in front of it.

    Attributes:
      unevenness: root mean square distance of the background's levels (0..255) from the plane fitted to them.
      flicker: mean change of the background's levels from one frame to the next; 0 of a single image.
      jump_px: the farthest that the object's centre moves from one frame to the next; 0 where there is none.
      single: whether there is no object in any frame, or in all frames one that has a shape.
    """

    unevenness: float
    flicker: float
    jump_px: float
    single: bool


def cleanliness(video_thw3: Num[np.ndarray, "t h w 3"]) -> Cleanliness:
    """Returns how clean a clip is; uint8, or float in [-1, 1].

    Raises:
      ValueError: the array is not a clip of RGB frames.
    """
    check_clip(video_thw3)
    pixels = to_levels(video_thw3)
    ground_hw3 = fit_background(pixels)
    object_thw, _ = find_object(pixels, ground_hw3)
    for _ in range(_EDGE_PX):
        object_thw = neighbours(object_thw) > 0
    away_thw3 = (pixels - ground_hw3)[~object_thw]
    both = ~object_thw[1:] & ~object_thw[:-1]
    change = np.abs(np.diff(pixels, axis=0))[both]
    seen = measure(video_thw3)
    moves = np.linalg.norm(np.diff(seen.centre_px, axis=0), axis=1)
    return Cleanliness(
        unevenness=float(np.sqrt(np.mean(away_thw3**2))) if away_thw3.size else float("inf"),
        flicker=float(change.mean()) if change.size else 0.0,
        jump_px=float(np.nanmax(moves)) if np.isfinite(moves).any() else 0.0,
        single=_is_single(seen),
    )


def _is_single(seen: Measurement) -> bool:
    absent = np.isnan(seen.centre_px[:, 0])
    return bool(absent.all()) or (seen.shape is not None and not absent.any())


def clean(clips: Sequence[Cleanliness], real: Sequence[Cleanliness]) -> dict[str, Rate]:
    """Returns how many clips are clean, in each respect and in all (``clean``).

    Background even to ``UNEVENNESS_LIMIT``; flicker and jumps no larger than in the worst of the ``real`` clips; one object of
    a known shape throughout, or none.
    """
    flicker, jump_px = (max(getattr(one, name) for one in real) for name in ("flicker", "jump_px"))
    rows = {
        "even background": [one.unevenness <= UNEVENNESS_LIMIT for one in clips],
        "no more flicker": [one.flicker <= flicker for one in clips],
        "no jump": [one.jump_px <= jump_px for one in clips],
        "one object or none": [one.single for one in clips],
    }
    rows["clean"] = [all(row) for row in zip(*rows.values(), strict=True)]
    return {name: Rate(sum(row), len(row)) for name, row in rows.items()}


def extremes(clips: Sequence[Cleanliness]) -> dict[str, float]:
    """Returns median and largest value of each measure."""
    result: dict[str, float] = {}
    for name in ("unevenness", "flicker", "jump_px"):
        values = [getattr(one, name) for one in clips]
        result |= {f"{name} median": round(float(np.median(values)), 4), f"{name} largest": round(max(values), 4)}
    return result
