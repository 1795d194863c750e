"""The command that judges clips: ``python -m sora_jax.pocket.judge [MODEL_DIR] --captions 200 --seed 0``.

Clips are rendered (``--real``: how good the judge itself is), coded and decoded (``--codec``), made from captions
(``--captions``), from captions and a first frame (``--given-frame``) or 17 frames (``--given-clip``), continued
(``--extension``), made without a caption (``--empty``) or again with another seed (``--variety``); each kind has its tables,
all go to one JSON file.  This module reads the command line and prints; the tables are made in ``judging.tables``.
"""

import dataclasses
import json
import shlex
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from sora_jax import files, shell
from sora_jax.pipeline import command_line
from sora_jax.pipeline.clip_options import Options
from sora_jax.pipeline.model_file import model_path
from sora_jax.pipeline.option import Option, declared
from sora_jax.pocket.world.words import ATTRIBUTES, NUM_FRAMES
from sora_jax.storage.location import local_path

LENGTHS = (1, 17, NUM_FRAMES, 51)  # frames of a clip: an image, and whole chunks of the codec
KINDS = ("captions", "given_frame", "given_clip", "extension", "variety", "empty", "codec", "real")
OF_ANY_LENGTH = ("captions", "codec", "real")
SAMPLING = command_line.of_clip("num_steps", "guidance", "leap", "merge_steps", "condition_frame_edit", "dtype")
_MANY = (0, 10**6)


@dataclasses.dataclass(frozen=True, kw_only=True)
class What:
    """What is judged."""

    model: Annotated[
        str | None,
        Option("Model directory, or pocket: the embedded model, which is the default.", metavar="MODEL_DIR", positional=True),
    ] = None
    captions: Annotated[int, Option("Clips made from captions.", metavar="N", within=_MANY)] = 0
    pairs: Annotated[
        int | None, Option("With --captions: slow and fast clips as well (default: a quarter).", metavar="N", within=_MANY)
    ] = None
    cosines: Annotated[bool, Option("With --captions: cosines of consecutive velocities by step.")] = False
    given_frame: Annotated[int, Option("Clips made from a caption and a frame.", metavar="N", within=_MANY)] = 0
    given_clip: Annotated[int, Option("Clips made from a caption and 17 frames.", metavar="N", within=_MANY)] = 0
    extension: Annotated[int, Option("Clips continued by a second one.", metavar="N", within=_MANY)] = 0
    variety: Annotated[int, Option("Captions with two seeds each.", metavar="N", within=_MANY)] = 0
    empty: Annotated[int, Option("Clips of the empty caption: are they clean?", metavar="N", within=_MANY)] = 0
    codec: Annotated[int, Option("Rendered clips through the codec.", metavar="N", within=_MANY)] = 0
    real: Annotated[int, Option("Rendered clips: the judge's own accuracy.", metavar="N", within=_MANY)] = 0
    num_frames: Annotated[
        int, Option("Frames of --real, --codec and --captions; 1 is an image, without motion.", metavar="N", within=(1, 51))
    ] = NUM_FRAMES
    seed: Annotated[int, Option("Seed of captions, scenes and noise.", metavar="S", within=(0, 2**32 - 1))] = 0
    shuffle: Annotated[bool, Option("Score every clip against another one's caption: chance level.")] = False
    json: Annotated[Path | None, Option("Write the tables there as well, replacing the file.", metavar="FILE")] = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments(What):
    """What the command line asks for."""

    clip: Options


def text(title: str, tables: Mapping[str, Any]) -> str:
    """Returns the tables of one kind of clips for people."""
    lines = [f"== {title}: {tables['clips']} clips"]
    if "settings" in tables:
        shown = ", ".join(f"{name} {value}" for name, value in tables["settings"].items() if value is not None)
        lines += [f"model {tables['model']}; {shown}", f"evaluations: {tables['evaluations']['mean']:.2f} a clip"]
    if "psnr_db" in tables:
        lines.append(f"PSNR {tables['psnr_db']:.2f} dB, worst clip {tables['psnr_worst_clip_db']:.2f} dB")
    from sora_jax.pocket.judging.scores import Rate, confusions_text, rates_text

    rates = {name: Rate(one["count"], one["total"]) for name, one in tables["rates"].items()}
    lines += ["", rates_text(rates), "", confusions_text(tables["confusion"])]
    if "with_room" in tables:
        lines += ["", text(f"{title} with room", tables["with_room"]).rstrip()]
    for name, values in tables.get("cleanliness", {}).items():
        lines.append(f"{name}: " + ", ".join(f"{what} {value:.3f}" for what, value in values.items()))
    if "cosines" in tables:
        lines += ["", "cosine of a step's velocity and the one before: step, mean, 5 % .. 95 % of clips"]
        rows = zip(*(tables["cosines"][name] for name in ("mean", "low", "high")), strict=True)
        lines += [f"{i:4d} {row[0]:9.5f}   {row[1]:.5f} .. {row[2]:.5f}" for i, row in enumerate(rows) if row[0] is not None]
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs ``python -m sora_jax.pocket.judge`` and returns its exit code."""
    return shell.run(command, arguments, interrupted="interrupted; no report was written.")


def command(arguments: Sequence[str]) -> None:
    """Reads the command line, prints the tables of every kind that is asked for, and writes them to a file.

    Raises:
      ValueError: the arguments or the model are wrong.
      OSError: the file cannot be written.
    """
    what = "what is judged (numbers of clips, of unseen combinations)"
    parser = command_line.make_parser(
        "python -m sora_jax.pocket.judge",
        str(__doc__).splitlines()[0],
        {what: declared(What), "how clips are generated (defaults are the model's)": SAMPLING},
    )
    asked = command_line.read(parser, arguments, Arguments, SAMPLING)
    _check(asked)
    report: dict[str, Any] = {
        "command": shlex.join(["python", "-m", "sora_jax.pocket.judge", *arguments]),
        "seed": asked.seed,
        "num_frames": asked.num_frames,
        "shuffled": asked.shuffle,
        "attributes": list(ATTRIBUTES),
    }
    for name, tables in _parts(asked):
        report[name] = tables
        shell.result(text(name.replace("_", " "), tables))
    if asked.json:
        files.write_text(asked.json, json.dumps(report, indent=1) + "\n", overwrite=True)


def _check(asked: Arguments) -> None:
    """Refuses arguments that ask for nothing, or for what there is not.

    Raises:
      ValueError: says what is expected.
      OSError: the report cannot be written.
    """
    if not any(getattr(asked, name) for name in KINDS):
        expected = ", ".join(f"--{name.replace('_', '-')} N" for name in KINDS)
        raise ValueError(f"nothing to judge; add one or more of {expected}.")
    if asked.num_frames not in LENGTHS:
        raise ValueError(f"--num-frames is {asked.num_frames}; expected one of {', '.join(map(str, LENGTHS))}.")
    others = [name for name in KINDS if name not in OF_ANY_LENGTH and getattr(asked, name)]
    if asked.num_frames != NUM_FRAMES and others:
        raise ValueError(
            f"--num-frames {asked.num_frames} goes with --real, --codec and --captions; --{others[0].replace('_', '-')} "
            f"is about clips of {NUM_FRAMES} frames."
        )
    if asked.json:
        if not asked.json.absolute().parent.is_dir():
            raise ValueError(f"the folder of {asked.json} does not exist; create it first.")
        files.check_target(asked.json, overwrite=True)


def _parts(asked: Arguments) -> Iterable[tuple[str, dict[str, Any]]]:
    """Yields name and tables of every requested kind."""
    from sora_jax.pocket.judging import tables

    model, seed, clip = local_path(model_path(asked.model)), asked.seed, asked.clip
    alike: dict[str, Any] = {"seed": seed, "shuffle": asked.shuffle, "num_frames": asked.num_frames}
    if asked.real:
        yield "real", tables.judge_real(asked.real, **alike)
    if asked.codec:
        yield "codec", tables.judge_codec(model, asked.codec, dtype=clip.get("dtype"), **alike)
    if asked.captions:
        how: dict[str, Any] = {"sampling": clip, "num_pairs": asked.pairs, "cosines": asked.cosines}
        yield "captions", tables.judge_captions(model, asked.captions, **how, **alike)
    if asked.given_frame:
        judged = tables.judge_given_frames(model, asked.given_frame, seed=seed, sampling=clip, shuffle=asked.shuffle)
        yield "given_frame", judged
    others: Mapping[str, Callable[..., dict[str, Any]]] = {
        "given_clip": tables.judge_given_clips,
        "extension": tables.judge_extensions,
        "variety": tables.judge_variety,
        "empty": tables.judge_empty,
    }
    for name, judge in others.items():
        if num := getattr(asked, name):
            yield name, judge(model, num, seed=seed, sampling=clip)


if __name__ == "__main__":
    sys.exit(main())
