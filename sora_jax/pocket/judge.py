"""Scores of clips against what was asked for, and the command that prints them.

Invariant: only what a caption names is scored; an attribute that could not be measured counts as wrong.  What a clip
shows is ``sora_jax.pocket.measure``'s work.
"""

import argparse
import dataclasses
import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int

from sora_jax.pocket.measure import Measurement, measure
from sora_jax.pocket.scenes import Scenes, all_frames, render_uint8, sample_scenes
from sora_jax.pocket.world import ATTRIBUTES

__all__ = ["Rate", "confusion", "main", "measure", "score"]

Asked = Mapping[str, str]
_FOUR = ("colour", "background", "shape", "motion")
_BATCH = 16  # clips rendered at a time


@dataclasses.dataclass(frozen=True)
class Rate:
    """So many of so many."""

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


def score(measurements: Sequence[Measurement], asked: Sequence[Asked]) -> dict[str, Rate]:
    """Returns the rates by name.

    Each attribute: right among the clips that were asked for it.  ``all four``: colour, background, shape and motion.
    ``swapped``: object and background in each other's colour.  ``slow < fast``: of the first slow and the first fast clip of
    a motion, the second ones and so on, the pairs in which the slow one is slower.

    Raises:
      ValueError: the two sequences differ in length.
    """
    if len(measurements) != len(asked):
        raise ValueError(f"{len(measurements)} measurements for {len(asked)} captions; expected as many.")
    clips = list(zip(measurements, asked, strict=True))
    rates = {name: _rate([getattr(seen, name) == ask[name] for seen, ask in clips if name in ask]) for name in ATTRIBUTES}
    complete = [(seen, ask) for seen, ask in clips if all(name in ask for name in _FOUR)]
    rates["all four"] = _rate([all(getattr(seen, name) == ask[name] for name in _FOUR) for seen, ask in complete])
    coloured = [(seen, ask) for seen, ask in clips if "colour" in ask and "background" in ask]
    rates["swapped"] = _rate([(seen.colour, seen.background) == (ask["background"], ask["colour"]) for seen, ask in coloured])
    rates["slow < fast"] = _rate(_slower(clips))
    return rates


def _rate(outcomes: Sequence[bool]) -> Rate:
    return Rate(sum(outcomes), len(outcomes))


def _slower(clips: Sequence[tuple[Measurement, Asked]]) -> list[bool]:
    paces: dict[tuple[str, str], list[float]] = {}
    for seen, ask in clips:
        if "motion" in ask and "speed" in ask:
            paces.setdefault((ask["motion"], ask["speed"]), []).append(seen.pace)
    motions = ATTRIBUTES["motion"]
    pairs = (zip(paces.get((motion, "slow"), ()), paces.get((motion, "fast"), ()), strict=False) for motion in motions)
    return [slow < fast for motion in pairs for slow, fast in motion]


def confusion(measurements: Sequence[Measurement], asked: Sequence[Asked], attribute: str) -> Int[np.ndarray, "asked seen"]:
    """Returns how often each asked word (rows) was seen as each word (columns; the last one: not to be measured)."""
    names = ATTRIBUTES[attribute]
    counts = np.zeros((len(names), len(names) + 1), int)
    for seen, ask in zip(measurements, asked, strict=True):
        if attribute in ask:
            value = getattr(seen, attribute)
            counts[names.index(ask[attribute]), names.index(value) if value else -1] += 1
    return counts


def report(measurements: Sequence[Measurement], asked: Sequence[Asked]) -> str:
    """Returns the rates and the confusion tables as text."""
    lines = [f"{'':14}{'share':>7}  95 % interval   count"]
    for name, rate in score(measurements, asked).items():
        low, high = rate.interval
        lines.append(f"{name:14}{rate.share:7.3f}   {low:.3f} .. {high:.3f}   {rate.count} of {rate.total}")
    for name, words in ATTRIBUTES.items():
        lines += [
            "",
            f"{name}: asked (rows), seen (columns)",
            " " * 12 + "".join(f"{word[:8]:>9}" for word in (*words, "none")),
        ]
        rows = zip(words, confusion(measurements, asked, name), strict=True)
        lines += [f"{word:12}" + "".join(f"{count:9d}" for count in row) for word, row in rows]
    return "\n".join(lines)


def as_json(measurements: Sequence[Measurement], asked: Sequence[Asked]) -> dict[str, object]:
    """Returns the rates, their intervals and the confusion tables as JSON-ready values."""
    rates = score(measurements, asked)
    return {
        "rates": {k: {"count": v.count, "total": v.total, "share": v.share if v.total else None} for k, v in rates.items()},
        "intervals": {k: v.interval if v.total else None for k, v in rates.items()},
        "confusion": {
            name: {"words": [*words, "none"], "counts": confusion(measurements, asked, name).tolist()}
            for name, words in ATTRIBUTES.items()
        },
    }


def measure_real(scenes: Scenes) -> list[Measurement]:
    """Returns the measurements of rendered clips: the judge's own accuracy."""
    batches = (scenes[i : i + _BATCH] for i in range(0, len(scenes), _BATCH))
    return [measure(clip) for batch in batches for clip in np.asarray(render_uint8(batch, all_frames()))]


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs ``python -m sora_jax.pocket.judge``."""
    parser = argparse.ArgumentParser(prog="python -m sora_jax.pocket.judge", description=__doc__.splitlines()[0])
    parser.add_argument("--real", type=int, required=True, metavar="N", help="judge N rendered clips of unseen combinations")
    parser.add_argument("--seed", type=int, default=0, help="seed of the clips (default 0)")
    parser.add_argument("--shuffle", action="store_true", help="score every clip against another one's caption: chance level")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the tables there as well")
    options = parser.parse_args(arguments)
    rng = np.random.default_rng(options.seed)
    scenes = sample_scenes(rng, options.real, split="unseen")
    asked = [scenes.attributes(i) for i in range(len(scenes))]
    if options.shuffle:
        asked = [asked[i] for i in rng.permutation(len(asked))]
    measurements = measure_real(scenes)
    sys.stdout.write(report(measurements, asked) + "\n")
    if options.json:
        options.json.write_text(json.dumps(as_json(measurements, asked), indent=1) + "\n")


if __name__ == "__main__":
    main()
