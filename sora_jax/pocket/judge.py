"""The command that judges clips: ``python -m sora_jax.pocket.judge [MODEL_DIR] --captions 200 --seed 0``.

Clips are rendered (``--real``: how good the judge itself is), coded and decoded (``--codec``), made from captions
(``--captions``), from captions and a first frame (``--given-frame``) or 17 frames (``--given-clip``), continued
(``--extension``), made of no caption (``--empty``) or again with another seed (``--variety``); each kind has its tables,
all go to one JSON file.  This module reads the command line and prints; the tables are made in ``kinds``.
"""

import argparse
import json
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sora_jax import files
from sora_jax.pocket.judging import tables as kinds
from sora_jax.pocket.judging.cases import Sampling
from sora_jax.pocket.judging.scores import Rate, confusions_text, rates_text
from sora_jax.pocket.world.words import ATTRIBUTES, NUM_FRAMES
from sora_jax.shell import BAD_INPUT, INTERRUPTED, Parser, describe, whole_number_or_word

LENGTHS = (1, 17, NUM_FRAMES, 51)  # frames of a clip: an image, and whole chunks of the codec
KINDS = ("captions", "given_frame", "given_clip", "extension", "variety", "empty", "codec", "real")
OF_ANY_LENGTH = ("captions", "codec", "real")


def text(title: str, tables: Mapping[str, Any]) -> str:
    """Returns the tables of one kind of clips for people."""
    lines = [f"== {title}: {tables['clips']} clips"]
    if "settings" in tables:
        shown = ", ".join(f"{name} {value}" for name, value in tables["settings"].items() if value is not None)
        lines += [f"model {tables['model']}; {shown}", f"evaluations: {tables['evaluations']['mean']:.2f} a clip"]
    if "psnr_db" in tables:
        lines.append(f"PSNR {tables['psnr_db']:.2f} dB, worst clip {tables['psnr_worst_clip_db']:.2f} dB")
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


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs ``python -m sora_jax.pocket.judge``; exits with 2 and one line where the arguments or the model are bad."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if not any(getattr(options, name) for name in KINDS):
        given = ", ".join(f"--{name.replace('_', '-')} N" for name in KINDS)
        parser.error(f"nothing to judge; give one or more of {given}.")
    others = [name for name in KINDS if name not in OF_ANY_LENGTH and getattr(options, name)]
    if options.num_frames != NUM_FRAMES and others:
        parser.error(
            f"--num-frames {options.num_frames} goes with --real, --codec and --captions; --{others[0].replace('_', '-')} "
            f"is about clips of {NUM_FRAMES} frames."
        )
    if options.json and not options.json.absolute().parent.is_dir():
        parser.error(f"the folder of {options.json} does not exist; create it first.")
    command = ["python", "-m", "sora_jax.pocket.judge", *(sys.argv[1:] if arguments is None else arguments)]
    report: dict[str, Any] = {
        "command": shlex.join(command),
        "seed": options.seed,
        "num_frames": options.num_frames,
        "shuffled": options.shuffle,
        "attributes": list(ATTRIBUTES),
    }
    try:
        if options.json:
            files.check_target(options.json, overwrite=True)
        for name, tables in _parts(options):
            report[name] = tables
            sys.stdout.write(text(name.replace("_", " "), tables) + "\n")
        if options.json:
            files.write_text(options.json, json.dumps(report, indent=1) + "\n", overwrite=True)
    except (ValueError, OSError) as error:
        parser.exit(BAD_INPUT, f"{parser.prog}: error: {describe(error)}\n")
    except KeyboardInterrupt:
        parser.exit(INTERRUPTED, f"{parser.prog}: interrupted; no report was written.\n")


def _parts(options: argparse.Namespace) -> Iterable[tuple[str, dict[str, Any]]]:
    """Yields name and tables of every kind that is asked for."""
    seed, model, dtype, num_frames = options.seed, options.model, options.dtype, options.num_frames
    sampling = Sampling(
        num_steps=options.steps,
        guidance=options.guidance,
        leap=options.leap,
        merge_steps=options.merge_steps,
        condition_frame_edit=options.condition_frame_edit,
        dtype=dtype,
    )
    alike = {"seed": seed, "shuffle": options.shuffle, "num_frames": num_frames}
    if options.real:
        yield "real", kinds.judge_real(options.real, **alike)
    if options.codec:
        yield "codec", kinds.judge_codec(model, options.codec, dtype=dtype, **alike)
    if options.captions:
        how = {"sampling": sampling, "num_pairs": options.pairs, "cosines": options.cosines}
        yield "captions", kinds.judge_captions(model, options.captions, **how, **alike)
    if options.given_frame:
        given = kinds.judge_given_frames(model, options.given_frame, seed=seed, sampling=sampling, shuffle=options.shuffle)
        yield "given_frame", given
    for name, judge in (
        ("given_clip", kinds.judge_given_clips),
        ("extension", kinds.judge_extensions),
        ("variety", kinds.judge_variety),
        ("empty", kinds.judge_empty),
    ):
        if num := getattr(options, name):
            yield name, judge(model, num, seed=seed, sampling=sampling)


def _parser() -> Parser:
    parser = Parser(prog="python -m sora_jax.pocket.judge", description=__doc__.splitlines()[0])
    parser.add_argument("model", metavar="MODEL_DIR", type=Path, nargs="?", help="default: the embedded model")
    what = parser.add_argument_group("what is judged (unseen combinations)")
    what.add_argument("--captions", type=_count, default=0, metavar="N", help="N clips made from captions")
    what.add_argument("--pairs", type=_count, metavar="N", help="of --captions: slow and fast clips besides (default: N / 4)")
    what.add_argument("--cosines", action="store_true", help="of --captions: cosines of consecutive velocities by step")
    what.add_argument("--given-frame", type=_count, default=0, metavar="N", help="N clips made from a caption and a frame")
    what.add_argument("--given-clip", type=_count, default=0, metavar="N", help="N clips made from a caption and 17 frames")
    what.add_argument("--extension", type=_count, default=0, metavar="N", help="N clips continued by a second one")
    what.add_argument("--variety", type=_count, default=0, metavar="N", help="N captions with two seeds each")
    what.add_argument("--empty", type=_count, default=0, metavar="N", help="N clips of the empty caption: are they clean?")
    what.add_argument("--codec", type=_count, default=0, metavar="N", help="N rendered clips through the codec")
    what.add_argument("--real", type=_count, default=0, metavar="N", help="N rendered clips: the judge's own accuracy")
    what.add_argument(
        "--num-frames",
        type=int,
        choices=LENGTHS,
        default=NUM_FRAMES,
        help=f"length of --real, --codec and --captions (default {NUM_FRAMES}); 1 is an image, which has no motion",
    )
    what.add_argument("--seed", type=_count, default=0, metavar="S", help="of captions, scenes and noise (default 0)")
    what.add_argument("--shuffle", action="store_true", help="score every clip against another one's caption: chance level")
    what.add_argument("--json", type=Path, metavar="FILE", help="write the tables there as well, replacing the file")
    how = parser.add_argument_group("how clips are made (defaults are the model's)")
    how.add_argument("--steps", type=int, metavar="N", help="sampling steps")
    how.add_argument("--guidance", type=float, metavar="G", help="weight of the caption")
    how.add_argument("--leap", type=whole_number_or_word, metavar="off|N|dynamic|released", help="linear proportional leap")
    how.add_argument("--merge-steps", type=int, metavar="K", help="first steps with merged temporal tokens")
    how.add_argument("--condition-frame-edit", type=float, metavar="SHARE", help="of --extension: edit ratio of shared frames")
    how.add_argument("--dtype", choices=("float32", "bfloat16"), help="compute dtype")
    return parser


def _count(given: str) -> int:
    if not given.isdecimal():
        raise argparse.ArgumentTypeError(f"got {given!r}; expected a whole number of 0 or more")
    return int(given)


if __name__ == "__main__":
    main()
