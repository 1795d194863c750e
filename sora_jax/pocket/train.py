"""Trains the pocket model from scratch: ``python -m sora_jax.pocket.train --work DIR``.

Stages, in order: the spatial autoencoder, the temporal one, both decoders again, the text encoder, the transformer.  Each
resumes from its last checkpoint; a stage that is complete is read back and not repeated.  The model directory ``DIR/model``
is written again at every evaluation of the transformer.  This module reads the command line; the stages are put together in
``training.stages``.
"""

import dataclasses
import logging
import sys
from collections.abc import Sequence

from sora_jax import shell
from sora_jax.pipeline import command_line
from sora_jax.pipeline.option import declared
from sora_jax.pocket.training.recipe import DECODER_STEPS, LESSONS, Recipe
from sora_jax.pocket.world.words import MOTIONS


def parse(arguments: Sequence[str] | None = None) -> Recipe:
    """Returns the recipe that the command line means.

    Raises:
      ValueError: it is not one.
    """
    summary = str(__doc__).splitlines()[0]
    parser = command_line.make_parser("python -m sora_jax.pocket.train", summary, {"": declared(Recipe)})
    recipe = command_line.read(parser, sys.argv[1:] if arguments is None else arguments, Recipe)
    if (recipe.warm or recipe.warm_text) and not recipe.base:
        raise ValueError("--warm and --warm-text start from the networks of a model; name them with --base MODEL_DIR.")
    for lesson in recipe.lessons:
        _check_lesson(lesson)
    decoder_steps = recipe.decoder_steps
    if decoder_steps is None:
        decoder_steps = 0 if recipe.base else DECODER_STEPS
    return dataclasses.replace(recipe, decoder_steps=decoder_steps, lessons=recipe.lessons or LESSONS)


def _check_lesson(text: str) -> None:
    parts = text.split(":")
    if len(parts) != 3 or not (parts[0].isdecimal() and parts[1].isdecimal()):
        raise ValueError(f"--lesson is {text!r}; expected FROM:TO:MOTIONS, for example {LESSONS[1]}.")
    if not set(parts[2].split(",")) <= set(MOTIONS) - {"still"}:
        raise ValueError(f"--lesson {text} names other motions than {', '.join(MOTIONS)}, or still.")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs ``python -m sora_jax.pocket.train`` and returns its exit code."""
    interrupted = "interrupted; the same command goes on from the last checkpoint."
    return shell.run(command, arguments, interrupted=interrupted)


def command(arguments: Sequence[str]) -> None:
    """Reads the command line and trains.

    Raises:
      ValueError: the arguments are wrong, or the base is missing or damaged; nothing was written.
    """
    recipe = parse(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", force=True)
    logging.getLogger("absl").setLevel(logging.WARNING)  # orbax reports every file

    from sora_jax.pocket.training.stages import train

    train(recipe)


if __name__ == "__main__":
    sys.exit(main())
