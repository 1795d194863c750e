"""``sora-jax compare A B``: how two clips differ, and what each does by itself; also ``python -m sora_jax.metrics A B``.

Invariant: measures are those of `metrics`, on the pixels that the files hold; nothing is resized, and no network is used.
"""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import numpy as np

from sora_jax import metrics, shell
from sora_jax.pipeline import command_line
from sora_jax.pipeline.option import Option, declared

_ALONE = {"flicker": metrics.temporal_flickering, "motion": metrics.flow_magnitude}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    """What the command line asks for."""

    clip: Annotated[str, Option("Clip: .mp4 .gif .png .npz, or a folder of PNGs.", metavar="A", positional=True)]
    reference: Annotated[str, Option("Clip of the same size and length.", metavar="B", positional=True)]
    json: Annotated[bool, Option("Print JSON.")] = False


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    return shell.run(command, arguments)


def command(arguments: Sequence[str]) -> None:
    """Reads the command line and prints the measures."""
    parser = command_line.make_parser(
        "sora-jax compare",
        "Measures how two clips differ: PSNR and SSIM; and of each, flicker and motion.",
        {"": declared(Arguments)},
    )
    asked = command_line.read(parser, arguments, Arguments)
    from sora_jax.pipeline.clip_frames import read_frames

    clips = {path: read_frames(path) for path in (asked.clip, asked.reference)}
    _refuse_different(clips)
    fields = compare(clips[asked.clip], clips[asked.reference])
    shell.result(json.dumps(fields, indent=2) if asked.json else "\n".join(_lines(fields, asked)))


def compare(video_thwc: np.ndarray, reference_thwc: np.ndarray) -> dict[str, Any]:
    """Returns the measures of two clips, JSON-ready; what a clip has no measure of (one frame, small frames) is None.

    PSNR is None where the clips are equal, since JSON has no infinity.

    Raises:
      ValueError: the clips differ in size or length.
    """
    decibels = metrics.psnr(video_thwc, reference_thwc)
    try:
        similarity = metrics.ssim(video_thwc, reference_thwc)
    except ValueError:  # the window does not fit; sizes are equal, or PSNR had refused them
        similarity = None
    return {
        "shape": list(video_thwc.shape),
        "equal": math.isinf(decibels),
        "psnr_db": None if math.isinf(decibels) else decibels,
        "ssim": similarity,
        **{name: [_alone(name, clip) for clip in (video_thwc, reference_thwc)] for name in _ALONE},
    }


def _refuse_different(clips: Mapping[str, np.ndarray]) -> None:
    """Refuses clips of different sizes or lengths, by the names of their files."""
    if len({clip.shape for clip in clips.values()}) > 1:
        shapes = {path: clip.shape for path, clip in clips.items()}
        sizes = " and ".join(f"{path} has {t} frames of {h} x {w}" for path, (t, h, w, _) in shapes.items())
        raise ValueError(f"{sizes}; expected two clips of one size and length, made with the same frames, size and loop.")


def _alone(name: str, clip: np.ndarray) -> float | None:
    return _ALONE[name](clip) if len(clip) > 1 else None


def _lines(fields: dict[str, Any], asked: Arguments) -> list[str]:
    frames, height, width, _ = fields["shape"]
    names = (asked.clip, asked.reference)
    decibels = "infinite: the clips are equal" if fields["equal"] else f"{fields['psnr_db']:.2f} dB"
    lines = [
        f"{names[0]} and {names[1]}: {frames} frames of {height} x {width} pixels",
        f"PSNR: {decibels}",
        f"SSIM: {'- (frames are smaller than its window)' if fields['ssim'] is None else format(fields['ssim'], '.4f')}",
    ]
    for name, what in (("flicker", "steadiness, 1 where nothing changes"), ("motion", "pixels a frame of the fastest 5 %")):
        values = ["-" if value is None else f"{value:.4g}" for value in fields[name]]
        lines.append(f"{name}: {values[0]} and {values[1]} ({what})")
    return lines
