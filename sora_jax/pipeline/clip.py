"""What a pipeline returns: frames, latents, and the record of their making.

Invariant: ``parameters`` holds everything needed to make the sample again with the same weights, and nothing that differs
between two equal runs (no times, no paths of this machine).  Nothing here computes.
"""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

from sora_jax.pipeline import video
from sora_jax.pipeline.html import clip_html
from sora_jax.process import Timings
from sora_jax.sampling.sampler import Trace


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class Clip:
    """Generated samples.

    Attributes:
      frames: pixels.
      latents: normalised latents; the clips of a loop follow each other in time.
      fps: frame rate the frames are saved at.
      parameters: for each sample what it was made from, JSON-ready.
      trace: what each sampling step did, or None where latents were only decoded; with loops, of all clips.
      evaluations_B: velocity evaluations that went into each sample.
      timings: seconds by stage.
    """

    frames: UInt8[np.ndarray, "B t h w 3"]
    latents: Float[np.ndarray, "B T H W C"]
    fps: int | float
    parameters: Sequence[Mapping[str, Any]]
    trace: Trace | None
    evaluations_B: Float[np.ndarray, "B"] | None
    timings: Timings

    def __repr__(self) -> str:
        count, frames, height, width = self.frames.shape[:4]
        seeds = [str(made_from.get("seed", "?")) for made_from in self.parameters]
        seed = seeds[0] if count == 1 else f"{seeds[0]} to {seeds[-1]}"
        shown = str(self.parameters[0].get("prompt", ""))
        shown = shown if len(shown) <= 60 else f"{shown[:57]}..."
        return f"<Clip {count} x {frames} frames, {height} x {width} pixels, {self.fps:g} fps, seed {seed}, {shown!r}>"

    def _repr_html_(self) -> str:
        """Returns the clip as a notebook shows it: every sample playing, with its prompt and seed."""
        return clip_html(self.frames, self.fps, self.parameters)

    def save(self, path: str | os.PathLike[str], *, sample: int | None = None, overwrite: bool = False) -> list[Path]:
        """Writes one sample, or all of them, and returns the paths; see `video.save` for formats and errors.

        Several samples without ``sample`` become ``name-0.mp4``, ``name-1.mp4``, ...
        """
        path = Path(path)
        if sample is not None:
            targets = {sample: path}
        elif len(self.frames) == 1:
            targets = {0: path}
        else:
            targets = {i: path.with_name(f"{path.stem}-{i}{path.suffix}") for i in range(len(self.frames))}
        with self.timings.measure("write"):
            return [
                video.save(self.frames[i], target, fps=self.fps, parameters=self.parameters[i], overwrite=overwrite)
                for i, target in targets.items()
            ]
