"""``sora-jax plan``: what a generation would take on hardware that is not here, by compiling its programs for it.

Invariant: this module decides nothing and imports no JAX; another process compiles.  Standard output holds the result; what is
being compiled is noted on standard error.
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from sora_jax import files, shell
from sora_jax.commands import options
from sora_jax.devices.axes import WEIGHTS
from sora_jax.pipeline import command_line
from sora_jax.pipeline.clip_options import Options
from sora_jax.pipeline.option import Option, declared
from sora_jax.planning.request import DEFAULT_PROGRAMS, OPTIMISATIONS, PRESETS, PROGRAMS, Model, Request
from sora_jax.planning.targets import CHIPS

DOES_NOT_FIT = 3  # the exit code where a program needs more memory than the hardware has

CLIP = command_line.of_clip(
    "num_frames",
    "height",
    "width",
    "resolution",
    "aspect_ratio",
    "num_steps",
    "guidance",
    "solver",
    "leap",
    "merge_steps",
    "dtype",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments(options.Attention, options.Writing):
    """What the command line asks for."""

    model: Annotated[
        str,
        Option(
            f"Model directory, pocket: the embedded model, or {', '.join(PRESETS)}: the architecture without weights.",
            metavar="MODEL_DIR",
            positional=True,
        ),
    ]
    target: Annotated[
        str, Option(f"Hardware: {', '.join(CHIPS)}, or one of them with a topology, as v5e:4x4.", metavar="CHIP[:TOPOLOGY]")
    ]
    programs: Annotated[
        str, Option(f"Which programs, of {','.join(PROGRAMS)}; the sampler takes minutes.", metavar="NAMES")
    ] = ",".join(DEFAULT_PROGRAMS)
    optimisation: Annotated[
        str,
        Option(
            "The compiler's effort for a TPU: fast overestimates temporaries, full takes four times as long.",
            choices=OPTIMISATIONS,
        ),
    ] = "fast"
    mesh: Annotated[
        str | None,
        Option("All devices of the target together, as guidance=2,sequence=8; default: one of them.", metavar="AXES"),
    ] = None
    weights: Annotated[
        str | None,
        Option("The transformer's weights on the mesh: replicated (the default), or spread over its devices.", choices=WEIGHTS),
    ] = None
    python: Annotated[
        str | None,
        Option(
            "Interpreter with the compiler (default: SORA_JAX_TPU_PYTHON or SORA_JAX_CUDA_PYTHON, else this one).",
            metavar="FILE",
        ),
    ] = None
    json: Annotated[Path | None, Option("Write the result as JSON as well.", metavar="FILE")] = None
    clip: Options


def command(arguments: Sequence[str]) -> int:
    """Reads the command line, compiles, and returns 3 where a program does not fit."""
    parser = command_line.make_parser(
        "sora-jax plan",
        "Compiles a generation's programs for hardware that is not here, and prints what the compiler says of their memory.",
        {"": declared(Arguments), "clip": CLIP},
    )
    return run(command_line.read(parser, arguments, Arguments, CLIP))


def run(asked: Arguments) -> int:
    """Compiles and prints the outcomes; returns the exit code.

    Raises:
      ValueError: see `planning.ahead.compile_ahead`.
    """
    request = Request(
        model=asked.model,
        target=asked.target,
        options=asked.clip,
        attention=asked.attention or "auto",
        programs=tuple(asked.programs.split(",")),
        optimisation=asked.optimisation,
        mesh=asked.mesh,
        weights=asked.weights or WEIGHTS[0],
    )
    if asked.json is not None:
        files.check_target(asked.json, overwrite=asked.overwrite)
    model = Model.read(request.model, request.options)

    from sora_jax.planning import report
    from sora_jax.planning.ahead import compile_ahead

    def begins(what: str) -> None:
        if not asked.quiet:
            shell.note(f"compiling for {request.hardware.title}: {what}")

    outcomes = list(compile_ahead(request, python=asked.python, begins=begins))
    if asked.json is not None:
        text = json.dumps(report.fields(request, model, outcomes), indent=2) + "\n"
        files.write_text(asked.json, text, overwrite=asked.overwrite)
    shell.result("\n".join(report.table(request, model, outcomes)))
    return shell.OK if all(outcome.fits for outcome in outcomes) else DOES_NOT_FIT
