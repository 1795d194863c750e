"""``sora-jax run-exported``: a prompt into a clip, from an exported folder and nothing else of the model.

Invariant: text is prepared as the pipeline does and the noise is the pipeline's, so that seed and prompt mean the same clip;
`ExportedModel` does everything else.
"""

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from sora_jax import files, shell
from sora_jax.commands import options
from sora_jax.commands.export import LEAP
from sora_jax.inputs import prompt
from sora_jax.pipeline import command_line, video
from sora_jax.pipeline.clip_options import Options
from sora_jax.pipeline.option import Option, declared
from sora_jax.process import peak_bytes
from sora_jax.shell import counted, note

LOOP = command_line.of_clip("num_steps", "guidance", "merge_steps", "leap", leap=LEAP)
NOISE = command_line.of_clip("seed")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments(options.Writing):
    """What the command line asks for."""

    folder: Annotated[Path, Option("What sora-jax export has written.", metavar="FOLDER", positional=True)]
    prompt: Annotated[str | None, Option("Caption.", metavar="PROMPT", positional=True)] = None
    output: Annotated[Path, Option("Output file.", flags=("-o", "--output"), metavar="FILE")] = Path("clip.mp4")
    size: Annotated[str | None, Option("One of the exported sizes (default: the first).", metavar="FxHxW")] = None
    reference_path: Annotated[
        Path | None, Option("Image that becomes the first frame; needs an export of vae_encoder.", metavar="FILE")
    ] = None
    sampler: Annotated[bool, Option("StableHLO: run the whole loop as one program.")] = False
    attention_form: Annotated[
        str | None, Option("One of the exported forms of attention (default: the first).", metavar="NAME")
    ] = None
    check_vectors: Annotated[bool, Option("Run the test vectors of the export instead of a prompt.")] = False
    unload: Annotated[bool, Option("Unload every stage when the manifest says that it may be.")] = False
    clip: Options


def command(arguments: Sequence[str]) -> None:
    """Reads the command line and makes the clip."""
    parser = command_line.make_parser(
        "sora-jax run-exported",
        "Makes a clip from a prompt with the artefacts of an export, read through its manifest.",
        {"": {**declared(Arguments), **NOISE}, "the loop (defaults are the manifest's)": LOOP},
    )
    run(command_line.read(parser, arguments, Arguments, {**NOISE, **LOOP}))


def run(asked: Arguments) -> None:
    """Writes the clip and prints its path.

    Raises:
      ValueError: the folder is not a finished export, or lacks what the clip needs.
    """
    if asked.check_vectors and asked.prompt is not None:
        raise ValueError("--check-vectors takes no prompt; it runs the export's own.")
    if asked.check_vectors:
        shell.interruptibly(lambda: _check(asked), lambda: None)
        return
    if asked.prompt is None:
        raise ValueError("no prompt; give a text to make a clip of, or --check-vectors.")
    if str(asked.output) == "-":
        raise ValueError("--output - is no file, and standard output holds paths only; name a file.")
    _check_prompt(asked.prompt)
    shell.interruptibly(lambda: _make(asked), lambda: files.remove_partial(asked.output.parent))


def _check(asked: Arguments) -> None:
    """Prints a line for every test vector.

    Raises:
      CheckError: one did not pass.
    """
    from sora_jax.export import CheckError, ExportedModel, check_vectors

    failed = passed = 0
    for row in check_vectors.rows(ExportedModel(asked.folder, keep=False)):
        shell.result(f"{'pass' if row.passed else 'FAIL'}  {row.name:40}  {row.measured}  (limit {row.expected})")
        passed, failed = passed + row.passed, failed + (not row.passed)
    if failed:
        raise CheckError(f"{counted(failed, 'test vector')} of {passed + failed} did not pass.")
    if not asked.quiet:
        note(f"all {passed} test vectors passed")


def _make(asked: Arguments) -> None:
    import numpy as np

    from sora_jax.export import ExportedModel
    from sora_jax.inputs.tokenizer import Tokenizer
    from sora_jax.sampling import noise

    model = ExportedModel(asked.folder, keep=not asked.unload, attention=asked.attention_form)
    tokens, tokenizer, size = model.manifest["tokens"], model.tokenizer(), model.size(asked.size)
    numbers: dict[str, Any] = {name: asked.clip.get(name) for name in ("num_steps", "guidance", "merge_steps")}
    numbers |= {"leap": _leap_entry(asked.clip.get("leap"))}
    used, seed = model.sampling(**numbers), asked.clip.get("seed") or 0
    loop: Literal["sampler", "stages"] = "sampler" if asked.sampler else "stages"
    video.check_target(asked.output, size["num_frames"], overwrite=asked.overwrite)
    files.refuse_unwritable(asked.output.parent)
    if asked.reference_path is not None:
        model.refuse_frames(loop)
    image = _image(asked.reference_path, size)
    text = prompt.prompt_at_loop(prompt.prepare_prompt(asked.prompt or "", **tokens["scores"]), 0)
    ids, mask = Tokenizer.from_file(tokenizer).encode([text], tokens["length"])
    began = time.perf_counter()
    with files.claimed(asked.output):
        z_BTHWC, frame_mask = np.array(noise.initial_noise(seed, (1, *size["latents"]))), None
        if image is not None:
            z_BTHWC[:, :1] = model.encode(image, size["key"])
            frame_mask = (np.arange(size["latents"][0])[None] > 0).astype(np.float32)
        result = model(ids, mask, z_BTHWC, size=size["key"], loop=loop, frame_mask_BT=frame_mask, **numbers)
        parameters = {"prompt": asked.prompt, "seed": seed, "exported": model.manifest["target"], "loop": loop, **used}
        frames = video.quantise(result.frames_Bthw3)[0]
        video.save(frames, asked.output, fps=size["conditions"]["fps_B"], parameters=parameters, overwrite=asked.overwrite)
    if not asked.quiet:
        times = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in model.timings.items())
        peak = f"peak memory {peak_bytes() / 1e9:.2f} GB"
        note(f"{counted(result.evaluations, 'evaluation')}, {time.perf_counter() - began:.1f} s ({times}), {peak}")
    shell.result(asked.output)


def _check_prompt(text: str) -> None:
    """Refuses what has no effect here: conditions in JSON, and segments for later clips; an export makes one clip.

    Raises:
      ValueError: says which.
    """
    _, reference, strategy = prompt.extract_json(text)
    if reference or strategy:
        raise ValueError("the prompt's JSON has no effect on an export; leave it out (--reference-path names a first frame).")
    beyond = [start for start in prompt.split_prompt(text)[1] or () if start > 0]
    if beyond:
        raise ValueError(f"prompt {text[:60]!r} has a segment from clip {beyond[0]} on, but an export makes one clip.")


def _image(path: Path | None, size: Any) -> Any:
    """Returns an image [1, 1, h, w, 3] in [-1, 1] at the pixels of a size, None without one.

    Raises:
      ValueError: it is a video, or no image; OSError: it cannot be read.
    """
    if path is None:
        return None
    from sora_jax.inputs import references

    if references.count_frames(path) != 1 or path.suffix.lower() not in references.IMAGE_SUFFIXES:
        raise ValueError(f"--reference-path {path} is a video; expected an image, the first frame.")
    return references.read_reference(path, size["height"], size["width"])[None]


def _leap_entry(leap: Any) -> dict[str, Any] | None:
    """Returns the fields of the manifest's leap that the option replaces; None if the options name none."""
    if leap is None:
        return None
    return {"mode": "static", "index": leap} if isinstance(leap, int) else {"mode": leap, "index": None}
