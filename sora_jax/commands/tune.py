"""``sora-jax tune``: the best way of sampling a model for each number of evaluations, searched and written as recipes.

Invariant: everything that can be refused is refused before a network is loaded; what was measured stays in the output folder,
so that an interrupted search goes on where it stopped.  `tuning` searches.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from sora_jax import files, shell
from sora_jax.commands import options
from sora_jax.commands.generate import note_dtype
from sora_jax.commands.prompts import read_prompts
from sora_jax.commands.user_cache import use_compile_cache
from sora_jax.pipeline import command_line
from sora_jax.pipeline.clip_options import Options
from sora_jax.pipeline.model_file import ModelFile
from sora_jax.pipeline.option import Option, declared
from sora_jax.pipeline.presets import check_prompts
from sora_jax.pipeline.recipe import Recipe
from sora_jax.pipeline.settings import Settings
from sora_jax.shell import note
from sora_jax.streaming.budget import parse_budget

OPTIONS = command_line.of_clip(
    "guidance", "seed", "height", "width", "resolution", "aspect_ratio", "num_frames", "fps", "dtype"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments(options.MemoryBudget, options.Attention, options.Writing, options.CompileCache):
    """What the command line asks for."""

    model: Annotated[
        str | None,
        Option("Model directory, or pocket: the embedded model, which is the default.", metavar="MODEL_DIR", positional=True),
    ] = None
    output: Annotated[Path, Option("Folder of the recipes.", flags=("-o", "--output"), metavar="FOLDER")]
    evaluations: Annotated[str, Option("Evaluations of each recipe, such as 8,12,16.", metavar="N,N")]
    prompts: Annotated[str, Option("Captions, one a line; the last third is kept for the final measurement.", metavar="FILE")]
    minutes: Annotated[float | None, Option("Time limit of the search.", metavar="M", above=0)] = None
    clip: Options


def command(arguments: Sequence[str]) -> None:
    """Reads the command line and writes the recipes."""
    parser = command_line.make_parser(
        "sora-jax tune",
        "Searches the way of sampling that comes closest to a model's exact flow, for each number of evaluations.",
        {"": declared(Arguments), "clips (defaults are the model's)": OPTIONS},
    )
    run(command_line.read(parser, arguments, Arguments, OPTIONS))


def run(asked: Arguments) -> None:
    """Searches and writes the recipes that are asked for, printing their paths to standard output.

    Raises:
      ValueError: an option is wrong, or the folder belongs to another search.
      OSError: a file cannot be read or written.
    """
    numbers = numbers_of(asked.evaluations)
    texts = read_prompts(options.PromptFile(prompt_path=asked.prompts), ())
    check_prompts(texts, asked.prompts)
    model = ModelFile.read(asked.model)
    settings = model.resolve({"preset": "exact", **asked.clip})
    paths = {number: asked.output / f"recipe-{number}.json" for number in numbers}
    for path in paths.values():
        if path.exists() and not asked.overwrite:
            Recipe.read(path).check(model.model_id, settings, path)
    if asked.memory_budget is not None:
        parse_budget(asked.memory_budget)
    use_compile_cache(asked.compile_cache)
    shell.interruptibly(lambda: _search(asked, model, settings, texts, paths), lambda: files.remove_partial(asked.output))


def numbers_of(text: str) -> list[int]:
    """Returns the numbers of evaluations that the command line names.

    Raises:
      ValueError: it names none, one twice, or one out of range.
    """
    try:
        numbers = [int(each) for each in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or any(not 2 <= number <= 1000 for number in numbers) or len(set(numbers)) < len(numbers):
        raise ValueError(f"--evaluations is {text!r}; expected different whole numbers from 2 to 1000, such as 8,12,16.")
    return numbers


def _search(asked: Arguments, model: ModelFile, settings: Settings, texts: Sequence[str], paths: dict[int, Path]) -> None:
    from sora_jax.pipeline.pipeline import Pipeline
    from sora_jax.pipeline.tuning import LINES, Tuning

    pipeline = Pipeline.open(model, memory_budget=asked.memory_budget, attention=asked.attention or "auto")
    settings = pipeline.networks.decide(settings)
    pipeline.check(settings, len(texts))
    if not asked.quiet:
        note_dtype(settings)
    say = (lambda _line: None) if asked.quiet else note
    left = None if asked.minutes is None else 60 * asked.minutes
    kept = set() if asked.overwrite else {number for number, path in paths.items() if path.exists()}
    asked.output.mkdir(parents=True, exist_ok=True)
    with files.claimed(asked.output / LINES):
        tuning = Tuning(pipeline, settings, texts, asked.output, note=say, seconds=left)
        # A recipe that is there is found once more, from what was measured: later ones may begin where it ended.
        for recipe in tuning.recipes(list(paths) if len(kept) < len(paths) else []):
            number = recipe.evaluations
            if number in kept:
                continue
            recipe.write(paths[number], overwrite=asked.overwrite)
            best = recipe.measured
            say(f"{number} evaluations: {best['name']}, {best['error_db']:.2f} dB on {best['prompts_measured']} other prompts")
    for path in paths.values():
        shell.result(path)
