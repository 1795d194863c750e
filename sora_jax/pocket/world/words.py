"""What exists in the world of the pocket model: attribute names, colours, and the split into training and unseen.

Invariant: whether a combination of shape, colour, background and motion is unseen depends on its words alone, so that it stays
in its split when the world grows. Nothing is drawn, measured or worded here.
"""

import hashlib
import itertools
from typing import Literal, get_args

SHAPES = ("circle", "square", "triangle")
COLOURS = ("red", "green", "blue", "yellow", "magenta", "cyan", "orange", "white")
BACKGROUNDS = (*COLOURS, "black")
MOTIONS = ("left", "right", "up", "down", "still", "grow", "shrink", "up-left", "up-right", "down-left", "down-right")
SPEEDS = ("slow", "fast")
SIZES = ("small", "large")
SHADINGS = ("plain", "gradient")

# Every attribute of a clip, in the order in which tables report them.
ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "shape": SHAPES,
    "colour": COLOURS,
    "background": BACKGROUNDS,
    "motion": MOTIONS,
    "speed": SPEEDS,
    "size": SIZES,
    "shading": SHADINGS,
}

# sRGB, 0..255, in the order of BACKGROUNDS; any two are at least 95 apart in one channel.
PALETTE: tuple[tuple[int, int, int], ...] = (
    (225, 20, 35),
    (20, 165, 45),
    (30, 50, 225),
    (255, 225, 20),
    (225, 30, 215),
    (0, 205, 225),
    (255, 125, 0),
    (255, 255, 255),
    (0, 0, 0),
)

SIZE_PX = 64  # height and width of a frame
NUM_FRAMES = 34  # two micro-frames of the codec: ten latent frames
FPS = 24

# What the words mean.  The radius of a square is its half side / 0.93, of a triangle its circumradius / 1.3.
RADIUS_PX = ((9.0, 10.5), (13.0, 14.5))  # small, large: range of the radius in the middle of the clip
TRAVEL_PX = (0.4, 0.8)  # slow, fast: pixels a frame
GROWTH_PX = (0.09, 0.18)  # slow, fast: change of the radius a frame
GRADIENT_DEPTH = 0.55  # share of the light that a gradient has lost at its dark end

Split = Literal["training", "unseen", "all"]
Combination = tuple[str, str, str, str]

_UNSEEN_SHARE = 0.15


def is_unseen(shape: str, colour: str, background: str, motion: str) -> bool:
    """Returns whether the combination is kept out of training (about 15 % are)."""
    digest = hashlib.blake2b(f"{shape} {colour} {background} {motion}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little") < _UNSEEN_SHARE * 2**32


def combinations(split: Split) -> list[Combination]:
    """Returns (shape, colour, background, motion) of every combination in the split; colour and background differ.

    Raises:
      ValueError: no split has that name.
    """
    if split not in get_args(Split):
        raise ValueError(f"split {split!r} does not exist; expected one of {', '.join(get_args(Split))}.")
    every = itertools.product(SHAPES, COLOURS, BACKGROUNDS, MOTIONS)
    return [one for one in every if one[1] != one[2] and (split == "all" or is_unseen(*one) == (split == "unseen"))]
