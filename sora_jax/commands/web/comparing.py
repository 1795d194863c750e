"""Two ways of sampling on the same prompt and noise: clips side by side, their difference, and what each cost.

Invariant: both clips, and the finer solution that they may be measured against, have the same noise, size and guidance.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from sora_jax.commands.web.form import SAMPLING, Request
from sora_jax.commands.web.gallery import Gallery
from sora_jax.commands.web.made import Made
from sora_jax.commands.web.studio import Step, Studio
from sora_jax.metrics import psnr
from sora_jax.pipeline import video
from sora_jax.pipeline.clip import Clip
from sora_jax.pipeline.presets import FINER

_GAIN = 4  # of the difference, which is small


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """What two clips show: each of them, the file of their difference, rows of a table, and what their steps did."""

    first: Made
    second: Made
    difference: Path
    rows: list[list[str]]
    traces: list[dict[str, Any]]

    @property
    def summary(self) -> str:
        """One line."""
        return " - ".join([f"clips {self.first.number} and {self.second.number} compared", *self.first.notes])


HEAD = ["", "evaluations", "seconds of denoising", "PSNR to the other", "PSNR to a finer solution"]


def compare(
    studio: Studio, gallery: Gallery, first: Request, second: Request, report: Callable[[Step], None], *, finer: bool
) -> Comparison:
    """Returns the comparison of two requests of a visitor; with ``finer`` also against Heun's solution of 119 evaluations.

    Raises:
      ValueError: a request is wrong, or the two clips have different sizes.
    """
    clips = [studio.clip_of(request, report, gallery) for request in (first, second)]
    between = psnr(clips[0].frames[0], clips[1].frames[0])
    exact = None
    if finer:
        plain = {name: value for name, value in first.options.items() if name not in ("preset", "recipe", *SAMPLING)}
        exact = studio.clip_of(dataclasses.replace(first, options={**plain, **FINER}), report, gallery)
    made = [studio.keep(request, clip, gallery) for request, clip in zip((first, second), clips, strict=True)]
    path = made[1].path.with_name(f"difference_{made[0].number:04d}_{made[1].number:04d}.mp4")
    distance = np.abs(clips[0].frames[0].astype(np.int16) - clips[1].frames[0])
    video.save(np.clip(_GAIN * distance, 0, 255).astype(np.uint8), path, fps=clips[0].fps)
    rows = [
        _row(name, clip, between, None if exact is None else psnr(clip.frames[0], exact.frames[0]))
        for name, clip in zip("AB", clips, strict=True)
    ]
    traces = [row for name, clip in zip("AB", clips, strict=True) for row in steps_of(name, clip)]
    return Comparison(first=made[0], second=made[1], difference=path, rows=rows, traces=traces)


def _row(name: str, clip: Clip, between: float, exact: float | None) -> list[str]:
    evaluations = 0.0 if clip.evaluations_B is None else float(clip.evaluations_B[0])
    seconds = clip.timings.get("denoise", 0.0)
    return [name, f"{evaluations:g}", f"{seconds:.1f}", _decibels(between), "-" if exact is None else _decibels(exact)]


def _decibels(value: float) -> str:
    return "equal" if np.isinf(value) else f"{value:.1f} dB"


def steps_of(name: str, clip: Clip) -> list[dict[str, Any]]:
    """Returns what each step of a clip did: time, cosine with the step before, and whether it was fresh, merged or leapt."""
    trace = clip.trace
    if trace is None:
        return []
    rows = []
    for step in range(len(trace.time_N)):
        kinds = [
            "reused" if trace.reused_N[step] else "fresh",
            *(["merged"] if trace.merged_N[step] else []),
            *(["leap"] if trace.leapt_NB[step, 0] else []),
        ]
        cosine = float(trace.cosine_NB[step, 0])
        rows.append(
            {
                "clip": name,
                "step": step + 1,
                "cosine": None if np.isnan(cosine) else cosine,
                "time": round(float(trace.time_N[step]), 1),
                "evaluations": float(trace.evaluations_N[step]),
                "kind": ", ".join(kinds),
            }
        )
    return rows
