"""The ``sora-jax export`` command: options of the command line into one call of `export`, and a line for each stage.

Invariant: nothing is decided here.  An interrupt is answered within a second: `export` is told by its progress to stop, ends
the process that it has begun, and removes what was written.
"""

import argparse
import sys
import threading
import time
from collections.abc import Iterator

from sora_jax.export import Size
from sora_jax.export.entries import ExportManifest
from sora_jax.export.exporter import export
from sora_jax.export.progress import Progress
from sora_jax.shell import note

_EVERY_S = 10.0  # between two lines about one stage


def run(options: argparse.Namespace, stop: threading.Event, begun: threading.Event) -> None:
    """Exports a model and prints the folder, until ``stop`` is set; sets ``begun`` before other processes work for it.

    Raises:
      ValueError: see `export`.
      KeyboardInterrupt: it was stopped.
    """
    named = ("resolution", "aspect_ratio", "num_steps", "guidance", "merge_steps", "leap", "fps")
    settings = {name: getattr(options, name) for name in named}
    shown = _Shown(quiet=options.quiet)

    def progress(at: Progress) -> None:
        begun.set()
        if stop.is_set():
            raise KeyboardInterrupt
        shown(at)

    made = export(
        None if str(options.model) == "pocket" else options.model,
        options.out,
        target=options.target,
        num_frames=options.num_frames,
        height=options.height,
        width=options.width,
        further_sizes=[parse_size(text) for text in options.size],
        precision=options.precision,
        weights=options.weights,
        stages=tuple(options.stages.split(",")),
        settings=settings,
        licence=options.licence,
        fuse_attention=not options.no_fused_attention,
        overwrite=options.overwrite,
        progress=progress,
    )
    if not options.quiet:
        for line in margins(made):
            note(line)
        note(f"{made['total_bytes'] / 1e6:.1f} MB; {made['notes'][0]}")
    sys.stdout.write(f"{options.out}\n")


def margins(made: ExportManifest) -> Iterator[str]:
    """Yields a line for every artefact: how near it is to JAX, and by how much it passed."""
    functions = [(stage["name"], function) for stage in made["stages"] for function in stage["functions"]]
    functions += [("sampler", function) for function in (made["sampler"]["functions"] if made["sampler"] else ())]
    for name, function in functions:
        worst = min(function["checks"], key=lambda check: check["psnr_db"] - check["floor_db"])
        margin_db = worst["psnr_db"] - worst["floor_db"]
        yield (
            f"{name} {function['name']}: {worst['psnr_db']:.1f} dB ({worst['output']}, {worst['case']}), "
            f"{margin_db:.1f} above its floor"
        )


class _Shown:
    """Writes a line when a stage begins, and now and then while it goes on."""

    def __init__(self, *, quiet: bool):
        self.quiet, self.stage, self.told = quiet, "", 0.0

    def __call__(self, at: Progress) -> None:
        now = time.monotonic()
        if self.quiet or (at.stage == self.stage and now - self.told < _EVERY_S):
            return
        self.stage, self.told = at.stage, now
        left = "" if at.remaining_s is None else f", about {at.remaining_s:.0f} s left"
        note(f"{at.done}/{at.total} {at.stage} {at.share:.0%}{left}")


def parse_size(text: str) -> Size:
    """Returns the size that ``frames x height x width`` means, written ``51x240x320``.

    Raises:
      ValueError: the text is no such size.
    """
    parts = text.split("x")
    if len(parts) != 3 or not all(part.isdecimal() for part in parts):
        raise ValueError(f"size {text!r} is not frames x height x width; expected for example 51x240x320.")
    frames, height, width = map(int, parts)
    return Size(num_frames=frames, height=height, width=width)
