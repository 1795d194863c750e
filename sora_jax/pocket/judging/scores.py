"""Scores of clips against their captions, as rates with intervals and tables of confusion.

Invariant: only what a caption names is scored; an attribute that could not be measured counts as wrong.  What a clip
shows is ``sora_jax.pocket.judging.measure``'s work.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from sora_jax.pocket.judging.measure import Measurement
from sora_jax.pocket.world.words import ATTRIBUTES, GROWTH_PX, NUM_FRAMES, RADIUS_PX, SIZE_PX

Attributes = Mapping[str, str]
Pair = tuple[Measurement, Measurement]

# An object begins where its reference has it if its centre is this near: the judge itself errs by 0.5 pixels, the smallest
# object
# has a radius of 6.
POSITION_PX = 3.0

_FOUR = ("colour", "background", "shape", "motion")


@dataclasses.dataclass(frozen=True)
class Rate:
    """A count and its total."""

    count: int
    total: int

    @property
    def share(self) -> float:
        """Share in 0..1; NaN of nothing."""
        return self.count / self.total if self.total else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of the share.

        Source: E. B. Wilson, JASA 22 (1927) 209.
        """
        if not self.total:
            return math.nan, math.nan
        z2 = 1.96**2 / self.total
        middle = (self.share + z2 / 2) / (1 + z2)
        half = math.sqrt(self.share * (1 - self.share) * z2 + z2**2 / 4) / (1 + z2)
        return max(middle - half, 0.0), min(middle + half, 1.0)

    def to_dict(self) -> dict[str, int | float | None]:
        """Returns count, total, share and interval, JSON-ready."""
        low, high = self.interval if self.total else (None, None)
        return {
            "count": self.count,
            "total": self.total,
            "share": self.share if self.total else None,
            "low": low,
            "high": high,
        }


def score(
    measurements: Sequence[Measurement], asked: Sequence[Attributes], *, pairs: Sequence[Pair] | None = None
) -> dict[str, Rate]:
    """Returns the rates by name.

    Each attribute: right among the clips whose caption names it.  ``all four``: colour, background, shape and motion;
    ``all three``: without motion, which a single image has not.
    ``colour and motion``: an object of the named colour moves as captioned.  ``swapped``: object and background in each other's
    colour.  ``slow < fast``: the pairs (slow, fast) in which the slow one is slower; without ``pairs`` the first slow and
    the first fast clip of a motion, the second ones and so on.

    Raises:
      ValueError: the two sequences differ in length.
    """
    if len(measurements) != len(asked):
        raise ValueError(f"{len(measurements)} measurements for {len(asked)} captions; expected as many.")
    clips = list(zip(measurements, asked, strict=True))
    rates = {name: _all_right(clips, (name,)) for name in ATTRIBUTES}
    rates["all four"] = _all_right(clips, _FOUR)
    rates["all three"] = _all_right(clips, _FOUR[:3])
    rates["colour and motion"] = _all_right(clips, ("colour", "motion"))
    coloured = [(seen, ask) for seen, ask in clips if "colour" in ask and "background" in ask]
    rates["swapped"] = _rate([(seen.colour, seen.background) == (ask["background"], ask["colour"]) for seen, ask in coloured])
    rates["slow < fast"] = _rate([_pace(slow) < _pace(fast) for slow, fast in (_pairs(clips) if pairs is None else pairs)])
    return rates


def kept(
    measurements: Sequence[Measurement], asked: Sequence[Attributes], start_px: Float[np.ndarray, "N 2"]
) -> dict[str, Rate]:
    """Returns how many clips keep what their reference frame shows.

    ``position kept``: the object begins where the frame has it (``start_px``: x, y), to within ``POSITION_PX``.
    ``colour, shape, position kept``: all three.
    """
    clips = list(zip(measurements, asked, strict=True))
    near = [math.dist(seen.centre_px[0], start) <= POSITION_PX for seen, start in zip(measurements, start_px, strict=True)]
    same = [seen.colour == ask["colour"] and seen.shape == ask["shape"] for seen, ask in clips]
    both = [one and other for one, other in zip(near, same, strict=True)]
    return {"position kept": _rate(near), "colour, shape, position kept": _rate(both)}


def continued(before: Sequence[Measurement], after: Sequence[Measurement]) -> dict[str, Rate]:
    """Returns how many clips continue as they ended, from measurements before and after the joint.

    ``position kept``: the centre of the object's first frame is at most ``POSITION_PX`` from that of the last one before.
    """
    parts = list(zip(before, after, strict=True))
    near = [math.dist(one.centre_px[-1], other.centre_px[0]) <= POSITION_PX for one, other in parts]
    same = [(one.colour, one.shape) == (other.colour, other.shape) and other.shape is not None for one, other in parts]
    both = [one and other for one, other in zip(near, same, strict=True)]
    ground = [one.background == other.background for one, other in parts]
    return {"background kept": _rate(ground), "position kept": _rate(near), "colour, shape, position kept": _rate(both)}


def has_room(seen: Measurement, num_frames: int) -> bool:
    """Returns whether the object could go on as it moved for ``num_frames`` more: inside the frame, at a size of this world."""
    path = np.concatenate([seen.centre_px, seen.radii_px[:, None]], axis=1)
    path = path[np.isfinite(path[:, 0])]
    if len(path) < 2:
        return False
    x, y, radius = path[-1] + (path[-1] - path[0]) * num_frames / (len(path) - 1)
    grown = GROWTH_PX[-1] * (NUM_FRAMES - 1) / 2  # from the middle of the world's longest clip to its end
    inside = all(radius <= at <= SIZE_PX - radius for at in (x, y))
    return bool(inside and RADIUS_PX[0][0] - grown <= radius <= RADIUS_PX[-1][-1] + grown)


def varied(measurements: Sequence[Measurement], others: Sequence[Measurement]) -> Rate:
    """Returns how many clips of one caption begin at different places, more than ``POSITION_PX`` apart, with another seed."""
    parts = zip(measurements, others, strict=True)
    return _rate([math.dist(one.centre_px[0], other.centre_px[0]) > POSITION_PX for one, other in parts])


def _all_right(clips: Sequence[tuple[Measurement, Attributes]], names: Sequence[str]) -> Rate:
    asked = [(seen, ask) for seen, ask in clips if all(name in ask for name in names)]
    return _rate([all(getattr(seen, name) == ask[name] for name in names) for seen, ask in asked])


def _rate(outcomes: Sequence[bool]) -> Rate:
    return Rate(sum(outcomes), len(outcomes))


def _pace(seen: Measurement) -> float:
    """Returns the pace; NaN, which compares as neither slower nor faster, if there is no object."""
    return math.nan if seen.motion is None else seen.pace


def _pairs(clips: Sequence[tuple[Measurement, Attributes]]) -> list[Pair]:
    groups: dict[tuple[str, str], list[Measurement]] = {}
    for seen, ask in clips:
        if "motion" in ask and "speed" in ask:
            groups.setdefault((ask["motion"], ask["speed"]), []).append(seen)
    motions = ATTRIBUTES["motion"]
    pairs = (zip(groups.get((motion, "slow"), ()), groups.get((motion, "fast"), ()), strict=False) for motion in motions)
    return [pair for motion in pairs for pair in motion]


def confusion(
    measurements: Sequence[Measurement], asked: Sequence[Attributes], attribute: str
) -> Int[np.ndarray, "asked seen"]:
    """Returns how often each asked word (rows) was seen as each word (columns; the last one: could not be measured)."""
    names = ATTRIBUTES[attribute]
    counts = np.zeros((len(names), len(names) + 1), int)
    for seen, ask in zip(measurements, asked, strict=True):
        if attribute in ask:
            value = getattr(seen, attribute)
            counts[names.index(ask[attribute]), names.index(value) if value else -1] += 1
    return counts


def confusions(measurements: Sequence[Measurement], asked: Sequence[Attributes]) -> dict[str, Any]:
    """Returns the confusion of every attribute, JSON-ready."""
    return {
        name: {"words": [*words, "none"], "counts": confusion(measurements, asked, name).tolist()}
        for name, words in ATTRIBUTES.items()
    }


def rates_text(rates: Mapping[str, Rate]) -> str:
    """Returns rates and intervals as a table, a line each."""
    width = max(map(len, rates))
    lines = [f"{'':{width}}{'share':>8}   95 % interval    count"]
    for name, rate in rates.items():
        low, high = rate.interval
        lines.append(f"{name:{width}}{rate.share:8.3f}   {low:.3f} .. {high:.3f}   {rate.count} of {rate.total}")
    return "\n".join(lines)


def confusions_text(tables: Mapping[str, Any]) -> str:
    """Returns what ``confusions`` returned as tables."""
    lines = []
    for name, table in tables.items():
        lines += [
            "",
            f"{name}: asked (rows), seen (columns)",
            " " * 12 + "".join(f"{word[:8]:>9}" for word in table["words"]),
        ]
        rows = zip(table["words"][:-1], table["counts"], strict=True)
        lines += [f"{word:12}" + "".join(f"{count:9d}" for count in row) for word, row in rows]
    return "\n".join(lines[1:])
