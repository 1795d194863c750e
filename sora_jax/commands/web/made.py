"""A clip that the page has made: its file, the request that it answers, and what it took.

Invariant: pixels and latents are in the file and not in memory, so that a page may remember many clips.
"""

import dataclasses
from pathlib import Path

import numpy as np

from sora_jax.commands.web.form import Request
from sora_jax.pipeline.clip import Clip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Made:
    """A clip on disk, the request that it answers, and what of it lies beyond the model."""

    number: int
    path: Path
    request: Request
    clip: Clip
    notes: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        """One line for a list of clips."""
        return f"{self.number}: {self.request.prompt[:60]} (seed {self.clip.parameters[0]['seed']})"

    @property
    def summary(self) -> str:
        """One line on what it took."""
        clip = self.clip
        _, frames, height, width = clip.frames.shape[:4]
        evaluations = 0 if clip.evaluations_B is None else float(clip.evaluations_B[0])
        taken = ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in clip.timings.items())
        return " - ".join([f"{frames} frames of {height} x {width}, {evaluations:g} evaluations; {taken}", *self.notes])


def light(clip: Clip) -> Clip:
    """Returns the clip without its pixels, of which the file holds the record; its shape stays."""
    return dataclasses.replace(
        clip, frames=np.broadcast_to(np.uint8(0), clip.frames.shape), latents=np.broadcast_to(np.float32(0), clip.latents.shape)
    )
