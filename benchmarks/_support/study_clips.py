"""What `sampler_study` asks for and how it scores a clip: captions, scores, and the file of result lines.

Invariant: a line depends on the clip, its two references and its caption only, and a torn last line (the study was stopped
while writing) is removed before lines are added.
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np
from jaxtyping import UInt8

from sora_jax import metrics
from sora_jax.inputs.prompt import load_prompts
from sora_jax.pocket.judging import cases
from sora_jax.pocket.judging.measure import measure
from sora_jax.pocket.world.captions import caption
from sora_jax.pocket.world.scenes import sample_scenes

CAPPED_DB = 99.0  # PSNR of clips that are equal
PACE = {"slow": 1.0, "fast": 2.0}
JUDGED = ("colour", "shape", "motion", "speed")
_ALL = ("colour", "shape", "motion")

Frames = UInt8[np.ndarray, "t h w 3"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prompt:
    """A caption and, where a judge knows them, the attributes it names."""

    text: str
    attributes: Mapping[str, str] | None


def read_prompts(path: Path | None, num: int, seed: int) -> list[Prompt]:
    """Returns the prompts of a file, or captions of combinations that the embedded model never saw.

    Raises:
      ValueError: the file has fewer.
    """
    if path is None:
        return [Prompt(text=one.text, attributes=one.attributes) for one in cases.captions(num, seed=seed)]
    texts = load_prompts(path, 0, num)
    if len(texts) < num:
        raise ValueError(f"{path} has {len(texts)} prompts; expected {num}, or give --prompts {len(texts)}.")
    return [Prompt(text=text, attributes=None) for text in texts]


def calibration_prompts(path: Path | None, first: int, num: int, seed: int) -> list[str]:
    """Returns captions to calibrate on: of training combinations, or the file's lines from ``first`` on.

    Raises:
      ValueError: the file has none.
    """
    if path is None:
        rng = np.random.default_rng([seed, 13])
        scenes = sample_scenes(rng, num, split="training")
        return [caption(scenes.attributes(i), rng)[0] for i in range(num)]
    texts = load_prompts(path, first, first + num)
    if not texts:
        raise ValueError(f"{path} has no prompt after the first {first} to calibrate on; add some lines.")
    return texts


@dataclasses.dataclass(frozen=True, kw_only=True)
class References:
    """The reference clips of a prompt and noise, and how much moves in 30 Euler steps."""

    by_name: Mapping[str, Frames]
    flow: float

    @classmethod
    def of(cls, short: Frames, fine: Frames) -> Self:
        """Returns the clips of the fine solution and of 30 steps."""
        return cls(by_name={"fine": fine, "30": short}, flow=metrics.flow_magnitude(short) if len(short) > 1 else 0.0)


def scores(frames: Frames, references: References, asked: Mapping[str, str] | None) -> dict[str, Any]:
    """Returns the measures of one clip by name, JSON-ready.

    For a caption with known attributes: for each of ``JUDGED`` that it names whether the clip shows it, and the object's pace
    divided by the captioned pace (1: as captioned, 0: it stands still); what the caption does not name is left out.
    """
    out: dict[str, Any] = {}
    for name, reference in references.by_name.items():
        out[f"psnr_{name}"] = round(min(metrics.psnr(frames, reference), CAPPED_DB), 4)
        out[f"ssim_{name}"] = round(metrics.ssim(frames, reference), 6)
    if len(frames) > 1:
        out["steadiness"] = round(metrics.temporal_flickering(frames), 6)
        flow = metrics.flow_magnitude(frames)
        out |= {"flow": round(flow, 5), "flow_kept": round(flow / references.flow, 5) if references.flow else None}
    if asked is not None:
        seen = measure(frames)
        out |= {name: getattr(seen, name) == asked[name] for name in JUDGED if name in asked}
        named = [name for name in _ALL if name in asked]
        out["all"] = all(out[name] for name in named) if named else None
        speed = metrics.track_speed(seen.centre_px)
        out["object_px"] = None if math.isnan(speed) else round(speed, 4)
        if "speed" in asked:
            out["pace"] = round(seen.pace / PACE[asked["speed"]], 4)
    return {name: value for name, value in out.items() if value is not None}


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Returns the lines so far, none if there is no file; removes a torn last line from the file."""
    if not path.exists():
        return []
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        with path.open("r+b") as file:
            file.truncate(len(whole))
    return [json.loads(line) for line in whole.splitlines()]
