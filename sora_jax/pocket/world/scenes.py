"""Clips of one moving object, drawn from a few numbers each.

Invariant: the same scenes give the same pixels; a frame depends on its own index only, so any choice of frames can be
drawn and a short clip is the beginning of a longer one.  Captions are worded elsewhere.
"""

import dataclasses
import functools
import math
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Num, UInt8

from sora_jax.pocket.world.words import (
    ATTRIBUTES,
    BACKGROUNDS,
    COLOURS,
    GRADIENT_DEPTH,
    GROWTH_PX,
    MOTIONS,
    NUM_FRAMES,
    PALETTE,
    RADIUS_PX,
    SHAPES,
    SIZE_PX,
    TRAVEL_PX,
    Split,
    combinations,
)

_MARGIN_PX = 1.5  # an object stays this far inside the frame

# By motion: pixels a frame along x and y, radius a frame, each to be multiplied by the speed.
_OBLIQUE = math.sqrt(0.5)
_DIRECTION = np.array(
    [
        *((-1, 0, 0), (1, 0, 0), (0, -1, 0), (0, 1, 0), (0, 0, 0), (0, 0, 1), (0, 0, -1)),
        *((x * _OBLIQUE, y * _OBLIQUE, 0) for y in (-1, 1) for x in (-1, 1)),
    ],
    np.float32,
)

# By shape: reach to the left and right, up, down, in radii.  A square's half side is 0.93 radii; a triangle is
# equilateral with its corners 1.3 radii from its centre.
_SQUARE, _TRIANGLE = 0.93, 1.3
_REACH = np.array([(1, 1, 1), (_SQUARE, _SQUARE, _SQUARE), (_TRIANGLE * math.sqrt(0.75), _TRIANGLE, _TRIANGLE / 2)], np.float32)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Scenes:
    """A batch of scenes; every field has shape [B].  A pytree: scenes can be arguments of a jitted training step."""

    # indices into the tuples of world.ATTRIBUTES (speed is 0 where the object is still)
    shape: Any
    colour: Any
    background: Any
    motion: Any
    speed: Any
    size: Any
    shading: Any
    # direction of the light's fall, in radians (read only where the background is a gradient)
    angle: Any
    # centre and radius of the object in frame 0, in pixels
    x_px: Any
    y_px: Any
    radius_px: Any

    def __len__(self) -> int:
        return len(self.shape)

    def __getitem__(self, chosen: Any) -> Self:
        """Returns the selected scenes (a slice or an index array), again as a batch."""
        return jax.tree.map(lambda field: field[chosen], self)

    def attributes(self, index: int) -> dict[str, str]:
        """Returns all attributes of one scene by name; a still object has no speed."""
        values = {name: words[int(getattr(self, name)[index])] for name, words in ATTRIBUTES.items()}
        return {name: word for name, word in values.items() if name != "speed" or values["motion"] != "still"}


def sample_scenes(rng: np.random.Generator, num: int, *, split: Split = "training", num_frames: int = NUM_FRAMES) -> Scenes:
    """Returns random scenes (numpy fields), uniform over the split's combinations, inside the frame for ``num_frames``.

    A black background is always plain.  Where a long clip leaves no room (51 fast frames of a large object), the
    object starts and ends equally far over the edge.
    """
    shape, colour, background, motion = _table(split)[rng.integers(len(_table(split)), size=num)].T
    still = motion == MOTIONS.index("still")
    speed = np.where(still, 0, rng.integers(2, size=num))
    size = rng.integers(2, size=num)
    shading = np.where(background == BACKGROUNDS.index("black"), 0, rng.integers(2, size=num))
    last = num_frames - 1
    middle_px = rng.uniform(*np.array(RADIUS_PX)[size].T)
    growth_px = _DIRECTION[motion, 2] * np.array(GROWTH_PX)[speed] * last
    reach = _REACH[shape] * (middle_px + np.abs(growth_px) / 2)[:, None] + _MARGIN_PX
    travel = _DIRECTION[motion, :2] * np.array(TRAVEL_PX)[speed, None] * last
    return Scenes(
        shape=shape,
        colour=colour,
        background=background,
        motion=motion,
        speed=speed,
        size=size,
        shading=shading,
        angle=rng.uniform(0, 2 * np.pi, num).astype(np.float32),
        x_px=_start(rng, reach[:, 0], reach[:, 0], travel[:, 0]),
        y_px=_start(rng, reach[:, 1], reach[:, 2], travel[:, 1]),
        radius_px=(middle_px - growth_px / 2).astype(np.float32),
    )


@functools.cache
def _table(split: Split) -> np.ndarray:
    words = (SHAPES, COLOURS, BACKGROUNDS, MOTIONS)
    return np.array([[names.index(word) for names, word in zip(words, one, strict=True)] for one in combinations(split)])


def _start(rng: np.random.Generator, before: np.ndarray, after: np.ndarray, travel: np.ndarray) -> np.ndarray:
    low = before - np.minimum(travel, 0)
    high = SIZE_PX - after - np.maximum(travel, 0)
    return (low + (high - low) * np.where(high > low, rng.uniform(size=len(low)), 0.5)).astype(np.float32)


def render(scenes: Scenes, frames: Num[Array, "#B t"] | np.ndarray) -> Float[Array, "B t h w 3"]:
    """Returns the selected frames of every scene in [-1, 1], float32; jittable.

    ``frames`` holds frame indices, for every scene its own row or one row for all.
    """
    light_Bthw, cover_Bthw = _background_light(scenes)[:, None], _cover(scenes, jnp.asarray(frames, jnp.float32))
    palette = jnp.asarray(PALETTE, jnp.float32)
    channels = []
    for channel in range(3):
        ground = palette[scenes.background, channel][:, None, None, None] * light_Bthw
        paint = palette[scenes.colour, channel][:, None, None, None]
        channels.append(ground + cover_Bthw * (paint - ground))
    return jnp.stack(channels, -1) / 127.5 - 1


@jax.jit
def render_uint8(scenes: Scenes, frames: Num[Array, "#B t"] | np.ndarray) -> UInt8[Array, "B t h w 3"]:
    """Returns ``render`` rounded to 8 bits: what a video file would hold."""
    return jnp.round((render(scenes, frames) + 1) * 127.5).astype(jnp.uint8)


def all_frames(num_frames: int = NUM_FRAMES) -> np.ndarray:
    """Returns the frame indices of a whole clip, one row for all scenes."""
    return np.arange(num_frames, dtype=np.float32)[None]


def _background_light(scenes: Scenes) -> Float[Array, "B h w"]:
    """Returns the share of the background's colour at each pixel: 1, or falling linearly to the gradient's dark end."""
    centred = (jnp.arange(SIZE_PX, dtype=jnp.float32) + 0.5) / SIZE_PX - 0.5
    cos, sin = jnp.cos(scenes.angle)[:, None, None], jnp.sin(scenes.angle)[:, None, None]
    along = (centred[None, None, :] * cos + centred[None, :, None] * sin) / (jnp.abs(cos) + jnp.abs(sin))
    return 1 - GRADIENT_DEPTH * (along + 0.5) * (jnp.asarray(scenes.shading)[:, None, None] > 0)


def _cover(scenes: Scenes, frames: Float[Array, "#B t"]) -> Float[Array, "B t h w"]:
    """Returns how much of each pixel the object covers: its signed distance through an edge one pixel wide."""
    direction = jnp.asarray(_DIRECTION)[scenes.motion]
    travel = direction[:, :2] * jnp.asarray(TRAVEL_PX, jnp.float32)[scenes.speed][:, None]
    growth = direction[:, 2] * jnp.asarray(GROWTH_PX, jnp.float32)[scenes.speed]
    x_Bt = jnp.asarray(scenes.x_px)[:, None] + travel[:, :1] * frames
    y_Bt = jnp.asarray(scenes.y_px)[:, None] + travel[:, 1:] * frames
    radius = (jnp.asarray(scenes.radius_px)[:, None] + growth[:, None] * frames)[..., None, None]
    centre = jnp.arange(SIZE_PX, dtype=jnp.float32) + 0.5
    x = centre[None, None, None, :] - x_Bt[..., None, None]
    y = centre[None, None, :, None] - y_Bt[..., None, None]
    circle = jnp.sqrt(x * x + y * y) - radius
    square = jnp.maximum(jnp.abs(x), jnp.abs(y)) - _SQUARE * radius
    # the lower side, and the two upper sides at once by symmetry
    triangle = jnp.maximum(y, math.sqrt(0.75) * jnp.abs(x) - 0.5 * y) - _TRIANGLE / 2 * radius
    shape = jnp.asarray(scenes.shape)[:, None, None, None]
    distance = jnp.where(shape == 0, circle, jnp.where(shape == 1, square, triangle))
    return jnp.clip(0.5 - distance, 0, 1)
