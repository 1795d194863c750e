"""Attributes of a clip from its pixels alone: what it shows, whatever its caption says.

Invariant: shares no code with the renderer's drawing; knows the words, their palette and what they mean in pixels.
A background plane is fitted to the border, the object is what differs from it, its shape shows in the angular symmetry
of its pixels and its motion in the track of its centre and its area.  Scoring against captions is done elsewhere.
"""

import dataclasses

import numpy as np
from jaxtyping import Bool, Complex, Float, Num

from sora_jax.pocket.world.words import BACKGROUNDS, COLOURS, GRADIENT_DEPTH, GROWTH_PX, PALETTE, RADIUS_PX, TRAVEL_PX

_BORDER_PX = 3  # width of the ring in which the background is fitted
_MIN_CONTRAST = 45.0  # RGB distance from which a pixel may belong to the object: 4.5 standard deviations of noise at 28 dB
_MIN_AREA_PX = 40  # a smaller object (radius 3.6) counts as absent

# Ideal symmetry (see ``symmetry``): square 0.43 at order 4, triangle 0.64 at order 3, all else 0; soft corners lower both.
_SYMMETRY_LIMIT = 0.15
# An object longer than wide by a third or more (order 2), or more scattered than this, has no shape.  Ideal compactness:
# circle 1, square 0.95, triangle 0.83.
_ELONGATION_LIMIT, _COMPACTNESS_LIMIT = 0.28, 0.7
# Directions, an eighth of a turn apart, from the x axis towards y, which points down.
_COMPASS = ("right", "down-right", "down", "down-left", "left", "up-left", "up", "up-right")
_AREA = {"circle": np.pi, "square": 4 * 0.93**2, "triangle": 0.75 * np.sqrt(3) * 1.3**2}  # in squared radii


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measurement:
    """Attributes of one clip; None where there is none: no object, a single image's motion, a still object's speed."""

    # words of world.ATTRIBUTES
    shape: str | None
    colour: str | None
    background: str
    motion: str | None
    speed: str | None
    size: str | None
    shading: str
    # pixels: pace is 1 for slow and 2 for fast, along the measured motion; position and radius are those of each frame
    pace: float
    radius_px: float
    centre_px: Float[np.ndarray, "t 2"]  # x, y; NaN where the object is absent
    radii_px: Float[np.ndarray, " t"]


def measure(video_thw3: Num[np.ndarray, "t h w 3"]) -> Measurement:
    """Returns the attributes of a clip of 64x64 pixels, uint8 or float in [-1, 1].

    Raises:
      ValueError: the array is not a clip of RGB frames, uint8 or float.
    """
    check_clip(video_thw3)
    pixels = to_levels(video_thw3)
    ground_hw3 = fit_background(pixels)
    background, shading = _name_background(ground_hw3)
    mask_thw, paint_3 = find_object(pixels, ground_hw3)
    area_t = mask_thw.sum((1, 2))
    seen = area_t >= _MIN_AREA_PX
    centre_t2 = _centres(mask_thw, area_t)
    if seen.sum() * 2 < len(seen):
        nothing = np.full(len(seen), np.nan)
        return Measurement(
            shape=None, colour=None, background=background, motion=None, speed=None, size=None, shading=shading,
            pace=0.0, radius_px=float("nan"), centre_px=np.full((len(seen), 2), np.nan), radii_px=nothing,
        )  # fmt: skip
    shape = _name_shape(mask_thw[seen], centre_t2[seen])
    radii_t = np.where(seen, np.sqrt(area_t / _AREA[shape or "circle"]), np.nan)
    motion, speed, pace = _name_motion(np.flatnonzero(seen), centre_t2[seen], radii_t[seen])
    radius = float(np.nanmean(radii_t))
    return Measurement(
        shape=shape,
        colour=_nearest(paint_3, len(COLOURS)),
        background=background,
        motion=motion,
        speed=speed,
        size="small" if radius < (RADIUS_PX[0][1] + RADIUS_PX[1][0]) / 2 else "large",
        shading=shading,
        pace=pace,
        radius_px=radius,
        centre_px=np.where(seen[:, None], centre_t2, np.nan),
        radii_px=radii_t,
    )


def check_clip(video: np.ndarray) -> None:
    """Refuses what is not a clip of RGB frames.

    Raises:
      ValueError: the shape or the dtype is another one.
    """
    if video.ndim != 4 or video.shape[-1] != 3 or not len(video) or min(video.shape[1:3]) <= 2 * _BORDER_PX:
        raise ValueError(f"clip has shape {video.shape}; expected (frames, height, width, 3).")
    if video.dtype != np.uint8 and not np.issubdtype(video.dtype, np.floating):
        raise ValueError(f"clip has dtype {video.dtype}; expected uint8, or a float type with levels in [-1, 1].")


def to_levels(video: np.ndarray) -> Float[np.ndarray, "t h w 3"]:
    """Returns a clip in levels 0..255, in a type that is fit for arithmetic."""
    if video.dtype == np.uint8:
        return video.astype(np.float32)
    return (np.clip(video.astype(np.float32), -1, 1) + 1) * 127.5


def fit_background(pixels: Float[np.ndarray, "t h w 3"]) -> Float[np.ndarray, "h w 3"]:
    """Returns the background's levels (0..255) at every pixel: per channel the plane nearest to the border's pixels.

    Least absolute deviations, so that an object on a part of the border does not bend the plane.
    """
    num_frames, height, width, _ = pixels.shape
    y, x = np.meshgrid(np.linspace(-1, 1, height), np.linspace(-1, 1, width), indexing="ij")
    basis_hw3 = np.stack([np.ones_like(x), x, y], -1).astype(np.float32)
    ring = np.ones((height, width), bool)
    ring[_BORDER_PX:-_BORDER_PX, _BORDER_PX:-_BORDER_PX] = False
    chosen = pixels[np.unique(np.linspace(0, num_frames - 1, 7).astype(int))]
    basis, levels = np.tile(basis_hw3[ring], (len(chosen), 1)), chosen[:, ring].reshape(-1, 3)
    weight = np.ones(len(levels), np.float32)
    plane = np.zeros((3, 3), np.float32)
    for _ in range(8):
        weighted = basis * weight[:, None]
        plane = np.linalg.solve(weighted.T @ basis, weighted.T @ levels)
        weight = 1 / (np.linalg.norm(levels - basis @ plane, axis=1) + 2)
    return basis_hw3 @ plane


def _name_background(ground_hw3: Float[np.ndarray, "h w 3"]) -> tuple[str, str]:
    """Returns colour and shading; the colour is that of the brightest corner, where a gradient has lost no light."""
    corners = ground_hw3[[0, 0, -1, -1], [0, -1, 0, -1]]
    light = corners.sum(1)
    brightest = int(light.argmax())
    background = _nearest(corners[brightest], len(BACKGROUNDS))
    lost = 1 - light.min() / max(light[brightest], 1.0)
    return background, "gradient" if background != "black" and lost > GRADIENT_DEPTH / 2 else "plain"


def find_object(
    pixels: Float[np.ndarray, "t h w 3"], ground_hw3: Float[np.ndarray, "h w 3"]
) -> tuple[Bool[np.ndarray, "t h w"], Float[np.ndarray, " 3"]]:
    """Returns the pixels that the object covers by half or more, and its colour (levels 0..255)."""
    difference = pixels - ground_hw3
    distance = np.sqrt(np.einsum("thwc,thwc->thw", difference, difference))
    candidates = _without_specks(distance > _MIN_CONTRAST)
    if not candidates.any():
        return candidates, np.zeros(3, np.float32)
    # The edge is a mixture; two pixels further in there is pure paint.
    core = _eroded(_eroded(candidates))
    paint_3 = np.median(pixels[core if core.any() else candidates], axis=0)
    contrast_hw3 = paint_3 - ground_hw3
    share = np.einsum("thwc,hwc->thw", difference, contrast_hw3) / np.maximum((contrast_hw3**2).sum(-1), 1.0)
    return _without_specks(share > 0.5), paint_3


def neighbours(mask_thw: Bool[np.ndarray, "t h w"]) -> np.ndarray:
    """Returns how many of the 3x3 pixels around each one are set; outside the frame the border repeats."""
    padded = np.pad(mask_thw.astype(np.uint8), ((0, 0), (1, 1), (1, 1)), mode="edge")
    rows = padded[:, :-2] + padded[:, 1:-1] + padded[:, 2:]
    return rows[:, :, :-2] + rows[:, :, 1:-1] + rows[:, :, 2:]


def _without_specks(mask_thw: Bool[np.ndarray, "t h w"]) -> Bool[np.ndarray, "t h w"]:
    return mask_thw & (neighbours(mask_thw) >= 4)


def _eroded(mask_thw: Bool[np.ndarray, "t h w"]) -> Bool[np.ndarray, "t h w"]:
    return neighbours(mask_thw) == 9


def _centres(mask_thw: Bool[np.ndarray, "t h w"], area_t: np.ndarray) -> Float[np.ndarray, "t 2"]:
    columns, rows = mask_thw.sum(1), mask_thw.sum(2)
    x = columns @ (np.arange(mask_thw.shape[2]) + 0.5)
    y = rows @ (np.arange(mask_thw.shape[1]) + 0.5)
    return np.stack([x, y], 1) / np.maximum(area_t, 1)[:, None]


def _name_shape(mask_thw: Bool[np.ndarray, "t h w"], centre_t2: Float[np.ndarray, "t 2"]) -> str | None:
    frame, y, x = np.nonzero(mask_thw)
    z = (x + 0.5 - centre_t2[frame, 0]) + 1j * (y + 0.5 - centre_t2[frame, 1])
    area_t = np.bincount(frame)
    compactness = (area_t**2).sum() / (2 * np.pi * (z * z.conj()).real.sum())
    two, three, four = symmetry(z)
    if two > _ELONGATION_LIMIT or compactness < _COMPACTNESS_LIMIT:
        return None
    if max(three, four) < _SYMMETRY_LIMIT:
        return "circle"
    return "triangle" if three > four else "square"


def symmetry(z: Complex[np.ndarray, " n"]) -> tuple[float, float, float]:
    """Returns |sum z^k| / sum |z|^k for k = 2, 3, 4 over an object's pixels, as complex numbers from its centre."""
    square, distance = z * z, abs(z)
    powers = ((square, distance**2), (square * z, distance**3), (square * square, distance**4))
    two, three, four = (float(abs(moment.sum()) / size.sum()) for moment, size in powers)
    return two, three, four


def _name_motion(frame: np.ndarray, centre_t2: np.ndarray, radii_t: np.ndarray) -> tuple[str | None, str | None, float]:
    """Returns motion, speed and pace from the slopes of centre and radius over time."""
    if len(frame) < 2:
        return None, None, 0.0
    track = np.concatenate([centre_t2, radii_t[:, None]], 1)
    when = frame - frame.mean()
    slopes = when @ (track - track.mean(0)) / (when @ when)
    x, y, growth = slopes / np.array([TRAVEL_PX[0], TRAVEL_PX[0], GROWTH_PX[0]])
    travel = float(np.hypot(x, y))
    pace = max(travel, abs(float(growth)))
    if pace < 0.5:
        return "still", None, pace
    speed = "slow" if pace < 1.5 else "fast"
    if pace > travel:
        return "grow" if growth > 0 else "shrink", speed, pace
    return _COMPASS[round(float(np.arctan2(y, x)) / (np.pi / 4)) % 8], speed, pace


def _nearest(levels_3: np.ndarray, num_colours: int) -> str:
    return BACKGROUNDS[int(((np.array(PALETTE[:num_colours]) - levels_3) ** 2).sum(1).argmin())]
