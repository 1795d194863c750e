"""``sora-jax calibrate``: the reuse plan of a model, measured and written to a file.

Invariant: everything that can be refused is refused before a network is loaded, and what needs no network before JAX is
imported.  `calibration` measures, and derives the plan.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from sora_jax import files, shell
from sora_jax.commands import options
from sora_jax.commands.generate import note_dtype
from sora_jax.commands.progress import progress_bar
from sora_jax.commands.prompts import read_prompts
from sora_jax.commands.user_cache import use_compile_cache
from sora_jax.pipeline import command_line
from sora_jax.pipeline.clip_options import Options
from sora_jax.pipeline.model_file import ModelFile
from sora_jax.pipeline.option import Option, declared
from sora_jax.pipeline.settings import Settings
from sora_jax.shell import note
from sora_jax.streaming.budget import parse_budget

OPTIONS = command_line.of_clip(
    "num_steps", "guidance", "seed", "shift", "guidance_low", "guidance_high", "guidance_rule", "guidance_rescale",
    "merge_steps", "height", "width", "resolution", "aspect_ratio", "num_frames", "fps", "dtype",
)  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments(options.PromptFile, options.MemoryBudget, options.Attention, options.Writing, options.CompileCache):
    """What the command line asks for."""

    model: Annotated[
        str | None,
        Option(
            "Model directory or its URL, or pocket: the embedded model, which is the default.",
            metavar="MODEL_DIR",
            positional=True,
        ),
    ] = None
    output: Annotated[Path, Option("The plan's file.", flags=("-o", "--output"), metavar="JSON")]
    evaluations: Annotated[int, Option("Steps that the plan evaluates in full.", metavar="N", within=(1, 100_000))]
    prompts: Annotated[
        tuple[str, ...], Option("Caption to measure on; repeatable.", flags=("--prompt",), metavar="TEXT", repeats=True)
    ] = ()
    keep: Annotated[str, Option("What a reused step takes over.", choices=("residual", "velocity"))] = "residual"
    half_from: Annotated[
        int | None,
        Option(
            "Steps from here on reuse the guidance difference: half an evaluation each.", metavar="STEP", within=(0, 100_000)
        ),
    ] = None
    clip: Options


def command(arguments: Sequence[str]) -> None:
    """Reads the command line and writes the plan."""
    parser = command_line.make_parser(
        "sora-jax calibrate",
        "Measures what reuse costs at each step of a model's sampling, and writes the best plan.",
        {"": declared(Arguments), "sampling (defaults are the model's)": OPTIONS},
    )
    run(command_line.read(parser, arguments, Arguments, OPTIONS))


def run(asked: Arguments) -> None:
    """Measures and writes the plan that is asked for, printing its path to standard output.

    Raises:
      ValueError: an option is wrong, or no plan has so many evaluations.
      OSError: the file cannot be written.
    """
    if asked.output.suffix != ".json":
        raise ValueError(f"--output {asked.output} has suffix {asked.output.suffix!r}; expected .json.")
    texts = read_prompts(asked, asked.prompts, "--prompt TEXT")
    files.check_target(asked.output, overwrite=asked.overwrite)
    model = ModelFile.read(asked.model)
    settings = model.resolve(asked.clip)
    settings.check_calibration(asked.evaluations, asked.half_from)
    if asked.memory_budget is not None:
        parse_budget(asked.memory_budget)
    use_compile_cache(asked.compile_cache)
    shell.interruptibly(lambda: _measure(asked, model, settings, texts), lambda: files.remove_partial(asked.output.parent))


def _measure(asked: Arguments, model: ModelFile, settings: Settings, texts: Sequence[str]) -> None:
    from sora_jax.pipeline.pipeline import Pipeline

    pipeline = Pipeline.open(model, memory_budget=asked.memory_budget, attention=asked.attention or "auto")
    settings = pipeline.networks.decide(settings)
    if not asked.quiet:
        note_dtype(settings)
    with files.claimed(asked.output), progress_bar(asked.quiet) as callback:
        measured = pipeline.calibrate(
            texts,
            evaluations=asked.evaluations,
            settings=settings,
            keep=asked.keep,  # type: ignore[arg-type]  # one of the choices
            half_from=asked.half_from,
            callback=callback,
        )
        measured.write(asked.output, overwrite=asked.overwrite)
    shell.result(asked.output)
    if not asked.quiet:
        plan = measured.plan
        steps = f"steps {''.join(map(str, plan.codes))} (0 full, 1 reused, 2 half)"
        note(
            f"{plan.evaluations:g} of {len(plan.codes)} evaluations, {steps}; "
            f"reuse shifts latents by {measured.error:.4f} in root mean square, summed over the steps."
        )
