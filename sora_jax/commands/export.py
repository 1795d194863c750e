"""``sora-jax export``: one call of `sora_jax.export.export`, and a line for each stage.

Invariant: nothing is decided here.  The work is done in other processes, so an interrupt is answered at once, and leaving
`export` removes what it had begun.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from sora_jax import files, shell
from sora_jax.commands import options
from sora_jax.pipeline import command_line
from sora_jax.pipeline.option import Option, declared
from sora_jax.pipeline.settings import OPTIONS, Options
from sora_jax.shell import counted, note

if TYPE_CHECKING:
    pass

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
    target: Annotated[str, Option("Format of the programs.", choices=("stablehlo", "onnx", "coreml"))]
    size: Annotated[
        tuple[str, ...], Option("A further size, for example 51x240x320; repeatable.", metavar="FxHxW", repeats=True)
    ] = ()
    precision: Annotated[str, Option("Precision of the arithmetic.", choices=("float32", "float16"))] = "float32"
    weights: Annotated[
        str, Option("How weights are stored; lut6 and int4: Core ML only.", choices=("float", "int8", "lut6", "int4"))
    ] = "float"
    stages: Annotated[str, Option("Which parts, of t5,stdit3,vae_decoder,vae_encoder.", metavar="NAMES")] = (
        "t5,stdit3,vae_decoder"
    )
    licence: Annotated[str | None, Option("Licence of the weights, for the manifest.", metavar="TEXT")] = None
    no_fused_attention: Annotated[bool, Option("Core ML: plain operations for attention.")] = False
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
    if not asked.overwrite:
        files.refuse_existing(asked.out)
    sizes = [parse_size(text) for text in asked.size]

    from sora_jax.export import Size
    from sora_jax.export.exporter import export

    manifest = export(
        asked.model,
        asked.out,
        target=asked.target,  # type: ignore[arg-type]  # one of the choices, as the two below
        further_sizes=[Size(num_frames=frames, height=height, width=width) for frames, height, width in sizes],
        precision=asked.precision,  # type: ignore[arg-type]
        weights=asked.weights,  # type: ignore[arg-type]
        stages=tuple(asked.stages.split(",")),
        settings=asked.clip,
        licence=asked.licence,
        fuse_attention=not asked.no_fused_attention,
        overwrite=asked.overwrite,
        progress=None if asked.quiet else _show,
    )
    if not asked.quiet:
        note(_summary(manifest))
    shell.result(asked.out)


def _summary(manifest: dict[str, Any]) -> str:
    checked = [*manifest["stages"], *([manifest["sampler"]] if manifest["sampler"] else [])]
    checks = [check for entry in checked for function in entry["functions"] for check in function["checks"]]
    worst = min(check["psnr_db"] for check in checks)
    return (
        f"{manifest['total_bytes'] / 1e6:.1f} MB, {counted(len(checks), 'comparison')} with JAX, worst {worst:.1f} dB; "
        f"{manifest['notes'][0]}"
    )


def parse_size(text: str) -> tuple[int, int, int]:
    """Returns frames, height and width of a size written ``51x240x320``.

    Raises:
      ValueError: the text is no such size.
    """
    parts = text.split("x")
    if len(parts) != 3 or not all(part.isdecimal() and int(part) for part in parts):
        raise ValueError(f"size {text!r} is not frames x height x width; expected for example 51x240x320.")
    frames, height, width = map(int, parts)
    return frames, height, width


def _show(stage: str, done: int, total: int) -> None:
    note(f"{done}/{total} {stage}")
