"""``sora-jax export``: the sizes of what is ordered, then the export itself with a line for each stage.

Invariant: this module decides nothing. An interrupt is answered within a second: the progress callback asks `export` to stop,
which ends the process that it has begun and removes what was written.
"""

import dataclasses
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, get_args

from sora_jax import files, shell
from sora_jax.commands import options
from sora_jax.export.entries import TargetName, Weights
from sora_jax.pipeline import command_line
from sora_jax.pipeline.clip_options import OPTIONS, Options
from sora_jax.pipeline.option import Option, declared
from sora_jax.shell import note

if TYPE_CHECKING:
    from sora_jax.export.entries import ExportManifest
    from sora_jax.export.order import Order
    from sora_jax.export.progress import Progress

_EVERY_S = 10.0  # between two lines about one stage
_UNWIND_S = 5.0  # that an interrupted export has to end its process and to remove what it wrote

LEAP = dataclasses.replace(
    OPTIONS["leap"].option,
    metavar="off|N|dynamic",
    choices=("dynamic",),
    expected="off, dynamic, or the number of the step that leaps",
)
SIZE = command_line.of_clip("height", "width", "resolution", "aspect_ratio", "num_frames")
LOOP = command_line.of_clip("num_steps", "guidance", "merge_steps", "leap", "fps", leap=LEAP)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments(options.Writing):
    """What the command line asks for."""

    model: Annotated[str, Option("Model directory, or pocket: the embedded model.", metavar="MODEL_DIR", positional=True)]
    out: Annotated[Path, Option("Folder to make.", metavar="OUT", positional=True)]
    target: Annotated[str, Option("Format of the programs.", choices=get_args(TargetName))]
    size: Annotated[
        tuple[str, ...], Option("A further size, for example 51x240x320; repeatable.", metavar="FxHxW", repeats=True)
    ] = ()
    precision: Annotated[str, Option("Precision of the arithmetic.", choices=("float32", "float16"))] = "float32"
    io_precision: Annotated[
        str, Option("Precision of inputs and outputs; float16 needs float16 arithmetic.", choices=("float32", "float16"))
    ] = "float32"
    weights: Annotated[
        str,
        Option("How weights are stored; lut6, int4 and mixed: Core ML only.", choices=get_args(Weights)),
    ] = "float"
    mean_bits: Annotated[
        float | None,
        Option(
            "With mixed weights: bits for each value on average; a matrix has 3, 4, 6 or 8, by the error it makes.",
            metavar="BITS",
            within=(3, 8),
        ),
    ] = None
    stages: Annotated[str, Option("Which parts, of t5,stdit3,vae_decoder,vae_encoder.", metavar="NAMES")] = (
        "t5,stdit3,vae_decoder"
    )
    licence: Annotated[str | None, Option("Licence of the weights, for the manifest.", metavar="TEXT")] = None
    no_fused_attention: Annotated[bool, Option("Core ML: plain operations for attention.")] = False
    logits_limit: Annotated[
        str,
        Option("Attention whose logits would take more than this (in float32) is computed in chunks.", metavar="SIZE"),
    ] = "256MiB"
    attention_forms: Annotated[
        str | None,
        Option(
            "Forms of attention of which every pair has functions, of plain,chunked and for Core ML fused,breaker; the first "
            "is the default (without this option there is one).",
            metavar="NAMES",
        ),
    ] = None
    guidance_rows: Annotated[
        int, Option("Rows of guidance in a call; with 1 a step calls every function twice.", metavar="1|2", within=(1, 2))
    ] = 2
    caption_once: Annotated[
        bool, Option("Project the caption in a stage of its own, once a clip; one row of guidance implies it.")
    ] = False
    pairs_per_package: Annotated[
        int, Option("Pairs of blocks that are one package and one call.", metavar="N", within=(1, 1000))
    ] = 1
    vectors: Annotated[
        str, Option("Test vectors beside the programs, with which a host or a device is proven.", choices=("on", "off"))
    ] = "on"
    memory_limit: Annotated[
        str | None,
        Option("Most memory of one function: weights, inputs, outputs and largest value.", metavar="SIZE"),
    ] = None
    allow_oversize: Annotated[bool, Option("Write functions that exceed this limit, or those of Apple's devices.")] = False
    dry_run: Annotated[bool, Option("Print the sizes of all functions and what would be written, and write nothing.")] = False
    clip: Options


def command(arguments: Sequence[str]) -> None:
    """Reads the command line and exports."""
    parser = command_line.make_parser(
        "sora-jax export",
        "Writes a model's stages as programs of fixed shapes, each compared with JAX before it counts.",
        {"": declared(Arguments), "size": SIZE, "defaults of the loop (a host may use others)": LOOP},
    )
    run(command_line.read(parser, arguments, Arguments, {**SIZE, **LOOP}))


def run(asked: Arguments) -> None:
    """Exports a model and prints the folder.

    Raises:
      ValueError: see `export`.
    """
    sizes = [parse_size(text) for text in asked.size]
    if asked.dry_run:
        shell.interruptibly(lambda: _rehearse(asked, sizes), lambda: None)
        return
    if not asked.overwrite:
        files.refuse_existing(asked.out)
    stop, begun, ended = threading.Event(), threading.Event(), threading.Event()

    def work() -> None:
        try:
            _export(asked, sizes, stop, begun)
        finally:
            ended.set()

    def clean_up() -> None:
        stop.set()
        if begun.is_set():  # before that there is no other process to end
            ended.wait(_UNWIND_S)
        files.remove_partial(asked.out.parent)

    shell.interruptibly(work, clean_up)


def _export(asked: Arguments, sizes: Sequence[tuple[int, int, int]], stop: threading.Event, begun: threading.Event) -> None:
    """Exports until ``stop`` is set; sets ``begun`` before other processes work for it.

    Raises:
      KeyboardInterrupt: it was stopped.
    """
    from sora_jax.export.exporter import carry_out, refuse_target

    shown = _Shown(quiet=asked.quiet)

    def progress(at: "Progress") -> None:
        begun.set()
        if stop.is_set():
            raise KeyboardInterrupt
        shown(at)

    with files.claimed(asked.out):
        refuse_target(asked.out, asked.overwrite)
        order = _order(asked, sizes)
        if not asked.quiet:
            for line in footprint_lines(order):
                note(line)
        manifest = carry_out(
            order, asked.out, allow_oversize=asked.allow_oversize, overwrite=asked.overwrite, progress=progress
        )
    if not asked.quiet:
        for line in margins(manifest):
            note(line)
        note(f"{manifest['total_bytes'] / 1e6:.1f} MB; {manifest['notes'][0]}")
    shell.result(asked.out)


def _rehearse(asked: Arguments, sizes: Sequence[tuple[int, int, int]]) -> None:
    """Prints the sizes of an export's functions; they are refused as they would be, and nothing is written.

    Raises:
      ValueError: see `prepare`, and for functions that exceed a limit `footprint.refuse_oversize`.
    """
    from sora_jax.export import footprint

    order = _order(asked, sizes)
    for line in footprint_lines(order):
        shell.result(line)
    if not asked.allow_oversize:
        footprint.refuse_oversize(order.footprints, order.job.target, order.memory_limit)
    if not asked.quiet:
        stages = sum(order.job.writes(stage) for stage in order.stages)
        size = footprint.total_weights(order.footprints) / 1e6
        note(f"{asked.out} would hold {stages} stages, about {size:.1f} MB and the programs; nothing was written")


def _order(asked: Arguments, sizes: Sequence[tuple[int, int, int]]) -> "Order":
    """Returns what the command line asks for."""
    from sora_jax.export import Size
    from sora_jax.export.order import prepare
    from sora_jax.export.request import Request

    request = Request(
        target=asked.target,  # type: ignore[arg-type]  # one of the choices, as the three below
        further_sizes=[Size(num_frames=frames, height=height, width=width) for frames, height, width in sizes],
        precision=asked.precision,  # type: ignore[arg-type]
        io_precision=asked.io_precision,  # type: ignore[arg-type]
        weights=asked.weights,  # type: ignore[arg-type]
        mean_bits=asked.mean_bits,
        stages=tuple(asked.stages.split(",")),
        settings=asked.clip,
        licence=asked.licence,
        fuse_attention=not asked.no_fused_attention,
        logits_limit=asked.logits_limit,
        attention_forms=tuple(asked.attention_forms.split(",")) if asked.attention_forms else (),
        guidance_rows=asked.guidance_rows,
        caption_once=asked.caption_once,
        pairs_per_package=asked.pairs_per_package,
        vectors=asked.vectors == "on",
        memory_limit=asked.memory_limit,
    )
    return prepare(asked.model, request)


def footprint_lines(order: "Order") -> Iterator[str]:
    """Yields the table of an order's functions."""
    from sora_jax.export import footprint

    return footprint.lines(order.footprints, order.job.target, order.memory_limit)


def margins(manifest: "ExportManifest") -> Iterator[str]:
    """Yields a line for every artefact: how near it is to JAX, and by how much it passed."""
    functions = [(stage["name"], function) for stage in manifest["stages"] for function in stage["functions"]]
    functions += [("sampler", function) for function in (manifest["sampler"]["functions"] if manifest["sampler"] else ())]
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

    def __call__(self, at: "Progress") -> None:
        now = time.monotonic()
        if self.quiet or (at.stage == self.stage and now - self.told < _EVERY_S):
            return
        self.stage, self.told = at.stage, now
        left = "" if at.remaining_s is None else f", about {at.remaining_s:.0f} s left"
        note(f"{at.done}/{at.total} {at.stage} {at.share:.0%}{left}")


def parse_size(text: str) -> tuple[int, int, int]:
    """Returns frames, height and width of a size written ``51x240x320``.

    Raises:
      ValueError: the text is not a size.
    """
    parts = text.split("x")
    if len(parts) != 3 or not all(part.isdecimal() and int(part) for part in parts):
        raise ValueError(f"size {text!r} is not frames x height x width; expected for example 51x240x320.")
    frames, height, width = map(int, parts)
    return frames, height, width
