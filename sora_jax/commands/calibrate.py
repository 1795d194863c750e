"""``sora-jax calibrate``: from parsed options to a plan file, with progress.

Invariant: everything that can be refused is refused before a network is loaded.  What is measured, and how a plan follows
from it, is `calibration`'s business.
"""

import argparse
import sys

from sora_jax import files
from sora_jax.commands.generate import progress_bar, read_prompts
from sora_jax.commands.user_cache import use_compile_cache
from sora_jax.shell import note

_SETTINGS = ("num_steps guidance seed shift merge_steps height width resolution aspect_ratio num_frames fps dtype").split()


def run(options: argparse.Namespace) -> None:
    """Measures and writes the plan that the options ask for, printing its path to standard output.

    Raises:
      ValueError: an option is invalid, or no plan has so many evaluations.
      OSError: the file cannot be written.
    """
    if options.output.suffix != ".json":
        raise ValueError(f"--output {options.output} has suffix {options.output.suffix!r}; expected .json.")
    texts = read_prompts(options, "--prompt TEXT")
    files.check_target(options.output, overwrite=options.overwrite)
    use_compile_cache(options.compile_cache)

    from sora_jax.pipeline.pipeline import Pipeline

    pipeline = Pipeline.from_pretrained(options.model, memory_budget=options.memory_budget)
    chosen = pipeline.resolve({name: getattr(options, name) for name in _SETTINGS})
    with progress_bar(options.quiet) as callback:
        made = pipeline.calibrate(
            texts,
            evaluations=options.evaluations,
            chosen=chosen,
            keep=options.keep,
            half_from=options.half_from,
            callback=callback,
        )
    made.write(options.output, overwrite=options.overwrite)
    sys.stdout.write(f"{options.output}\n")
    sys.stdout.flush()
    if not options.quiet:
        codes = "".join(map(str, made.plan.codes))
        note(
            f"{made.plan.evaluations:g} of {len(made.plan.codes)} evaluations, steps {codes} (0 full, 1 reused, 2 half); "
            f"reuse shifts latents by {made.error:.4f} in root mean square, summed over the steps."
        )
