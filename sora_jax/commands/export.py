"""The ``sora-jax export`` command: options of the command line into one call of `export`, and a line for each stage.

Invariant: nothing is decided here.  The work is done in other processes, so an interrupt is answered at once, and leaving
`export` removes what it had begun.
"""

import argparse
import sys

from sora_jax.export import Size
from sora_jax.export.exporter import export
from sora_jax.shell import note


def run(options: argparse.Namespace) -> None:
    """Exports a model and prints the folder.

    Raises:
      ValueError: see `export`.
    """
    named = ("resolution", "aspect_ratio", "num_steps", "guidance", "merge_steps", "leap", "fps")
    settings = {name: getattr(options, name) for name in named}
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
        progress=None if options.quiet else _show,
    )
    checked = [*made["stages"], *([made["sampler"]] if made["sampler"] else [])]
    checks = [check for entry in checked for function in entry["functions"] for check in function["checks"]]
    worst = min(check["psnr_db"] for check in checks)
    if not options.quiet:
        note(
            f"{made['total_bytes'] / 1e6:.1f} MB, {len(checks)} comparisons with JAX, worst {worst:.1f} dB; {made['notes'][0]}"
        )
    sys.stdout.write(f"{options.out}\n")


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


def _show(stage: str, done: int, total: int) -> None:
    note(f"{done}/{total} {stage}")
