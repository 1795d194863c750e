"""The ``sora-jax run-exported`` command: a prompt into a clip, from an exported folder and nothing else of the model.

Invariant: text is prepared as the pipeline does and the noise is the pipeline's, so that seed and prompt mean the same clip;
everything else is `ExportedModel`'s.
"""

import argparse
import sys
import time
from typing import Any, Literal

import numpy as np

from sora_jax import files
from sora_jax.export import ExportedModel
from sora_jax.inputs import prompt
from sora_jax.inputs.tokenizer import Tokenizer
from sora_jax.pipeline import video
from sora_jax.sampling import noise
from sora_jax.shell import note


def run(options: argparse.Namespace) -> None:
    """Writes the clip and prints its path.

    Raises:
      ValueError: the folder is no finished export, or lacks what the clip needs.
    """
    model = ExportedModel(options.folder, keep=not options.unload)
    tokens, tokenizer, size = model.manifest["tokens"], model.tokenizer(), model.size(options.size)
    given: dict[str, Any] = {name: getattr(options, name) for name in ("num_steps", "guidance", "merge_steps")}
    given |= {"leap": _leap_entry(options.leap)}
    loop: Literal["stages", "sampler"] = "sampler" if options.sampler else "stages"
    used = model.sampling(**given)
    video.check_target(options.output, size["num_frames"], overwrite=options.overwrite)
    files.refuse_unwritable(options.output.parent)
    text = prompt.prompt_at_loop(prompt.prepare_prompt(options.prompt, **tokens["scores"]), 0)
    ids, mask = Tokenizer.from_file(tokenizer).encode([text], tokens["length"])
    began = time.perf_counter()
    z_BTHWC = np.asarray(noise.initial_noise(options.seed, (1, *size["latents"])))
    made = model(ids, mask, z_BTHWC, size=size["key"], loop=loop, **given)
    parameters = {"prompt": options.prompt, "seed": options.seed, "exported": model.manifest["target"], "loop": loop, **used}
    frames = video.quantise(made.frames_Bthw3)[0]
    video.save(frames, options.output, fps=size["conditions"]["fps_B"], parameters=parameters, overwrite=options.overwrite)
    if not options.quiet:
        note(f"{made.evaluations} evaluations, {time.perf_counter() - began:.1f} s")
    sys.stdout.write(f"{options.output}\n")


def _leap_entry(leap: int | str | None) -> dict[str, Any] | None:
    """Returns the fields of the manifest's leap that the option replaces.

    Raises:
      ValueError: there is no such leap.
    """
    if leap is None:
        return None
    if isinstance(leap, int):
        return {"mode": "static", "index": leap}
    if leap not in ("off", "dynamic"):
        raise ValueError(f"leap is {leap!r}; expected off, dynamic, or the number of a step.")
    return {"mode": leap, "index": None}
