"""The options of ``sora-jax`` and its commands.

Invariant: options are read and nothing is done; what several commands take is written once.  Ranges and combinations are
checked where the values are used, so that Python and the command line get the same answer.
"""

import argparse
from pathlib import Path
from typing import Any, TypeVar

from sora_jax.shell import Parser, whole_number_or_word
from sora_jax.version import __version__

Number = TypeVar("Number", int, float)

_DESCRIPTIONS = {
    "generate": ("make clips from prompts", "Makes clips from prompts."),
    "calibrate": (
        "find a reuse plan for a model",
        "Measures what reuse costs at each step of a model's sampling, and writes the best plan.",
    ),
    "convert": ("convert PyTorch checkpoints into a model directory", None),
    "export": (
        "write a model as StableHLO, ONNX or Core ML",
        "Writes a model's stages as programs of fixed shapes, each compared with JAX before it counts.",
    ),
    "run-exported": (
        "make a clip with an exported model",
        "Makes a clip from a prompt with the artefacts of an export, read through its manifest.",
    ),
    "inspect": ("show what a clip or a model directory holds", None),
}


def build_parser() -> Parser:
    """Returns the parser; its result has the command's name as ``command``.  Options of ``convert`` are its own business."""
    parser = Parser(prog="sora-jax", description="Text to video with Open-Sora 1.2's architecture.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND", dest="command")
    made: dict[str, argparse.ArgumentParser] = {}
    for name, (summary, description) in _DESCRIPTIONS.items():
        command = commands.add_parser(
            name, allow_abbrev=False, help=summary, description=description, add_help=name != "convert"
        )
        command.add_argument("--debug", action="store_true", help="show the traceback of a failure")
        made[name] = command
    _add_generate(made["generate"])
    _add_calibrate(made["calibrate"])
    _add_export(made["export"])
    _add_run_exported(made["run-exported"])
    _add_inspect(made["inspect"])
    return parser


def _add_generate(parser: argparse.ArgumentParser) -> None:
    _add_what(parser.add_argument_group("what"))
    _add_how(parser.add_argument_group("how (defaults are the model's)"))
    _add_sampler(parser.add_argument_group("fewer evaluations"))
    _add_where(parser.add_argument_group("where"))


def _add_what(what: Any) -> None:
    what.add_argument("prompts", metavar="PROMPT", nargs="*", help="caption; '|0| ... |1| ...' for loops, JSON at its end")
    _add_prompt_file(what, "prompts")
    what.add_argument("--num-sample", metavar="N", type=int, default=1, help="clips for each prompt")
    what.add_argument("--reference-path", metavar="FILE[;FILE]", action="append", help="images or videos; once for each prompt")
    what.add_argument(
        "--mask-strategy", metavar="GROUPS", action="append", help="loop,reference,start,target start,length,edit;..."
    )
    what.add_argument("--from-latents", metavar="NPZ", type=Path, help="decode a file of --save-latents, generate nothing")
    what.add_argument("--model", metavar="DIR", type=Path, help="model directory (default: the embedded pocket model)")


def _add_how(how: Any) -> None:
    how.add_argument("--steps", "--num-sampling-steps", dest="num_steps", metavar="N", type=int, help="sampling steps")
    how.add_argument("--guidance", "--cfg-scale", metavar="G", type=float, help="weight of the caption; 1: no guidance")
    how.add_argument("--seed", metavar="N", type=int, help="of the first clip; the next has N + 1 (default 0)")
    _add_size(how)
    _add_fps(how)
    how.add_argument("--save-fps", metavar="F", type=float, help="frame rate of the file (default: --fps)")
    how.add_argument("--aes", metavar="SCORE|off", type=_score, help="aesthetic score added to the caption")
    how.add_argument("--flow", metavar="SCORE|off", type=_score, help="motion score added to the caption")
    how.add_argument("--camera-motion", metavar="TEXT|off", help="camera motion added to the caption")
    how.add_argument("--loop", metavar="N", type=int, help="clips in a row, each continuing the one before")
    how.add_argument("--condition-frame-length", metavar="N", type=int, help="latent frames a clip takes over")
    how.add_argument("--condition-frame-edit", metavar="R", type=float, help="edit ratio of those frames, 0 to 1")
    how.add_argument("--align", metavar="N|off", type=_align, help="latent frames that mask starts are rounded to")
    _add_dtype(how)
    how.add_argument("--batch-size", metavar="N", type=int, default=1, help="clips made together")
    _add_memory_budget(how)


def _add_sampler(group: Any) -> None:
    group.add_argument(
        "--preset", metavar="exact|recommended", help="exact: as Open-Sora; recommended: the sampler study's result"
    )
    group.add_argument("--solver", metavar="NAME", help="euler, ab2, dpmpp or heun (two evaluations a step)")
    group.add_argument("--shift", metavar="S", type=float, help="of the times; above 1: more steps at high noise (default 1)")
    group.add_argument("--leap", metavar="off|N|dynamic|released", type=whole_number_or_word, help="linear proportional leap")
    group.add_argument("--leap-extrapolate", action="store_true", help="leap along the line through the last two velocities")
    group.add_argument("--plan", metavar="JSON", type=Path, help="reuse plan written by sora-jax calibrate")
    group.add_argument("--merge-steps", metavar="K", type=int, help="first steps with merged temporal tokens")
    group.add_argument("--merge-odd", metavar="alone|released", help="what becomes of the last of an odd number of frames")
    group.add_argument(
        "--merge-attentions", metavar="NAMES", help="of spatial,temporal,cross: which merge (default: all, as published)"
    )
    group.add_argument("--merge-keys-values-only", action="store_true", help="keep a query for every frame")
    group.add_argument("--merge-positions", metavar="merged|mean", help="RoPE positions of merged frames (default: merged)")


def _add_where(where: Any) -> None:
    where.add_argument(
        "-o", "--output", metavar="PATH", type=Path, help="of a single clip: .mp4 .gif .png .npz, or a folder of PNGs"
    )
    where.add_argument(
        "--save-dir", metavar="DIR", type=Path, default=Path(), help="folder of numbered clips (default: this one)"
    )
    where.add_argument("--sample-name", metavar="NAME", help="what numbered names begin with (default: sample)")
    where.add_argument("--prompt-as-path", action="store_true", help="name clips by their prompts, and skip those that exist")
    where.add_argument(
        "--format", choices=("mp4", "gif", "png", "npz"), help="of numbered clips (default: mp4; png for images)"
    )
    where.add_argument("--save-latents", metavar="NPZ", type=Path, help="write the latents before they are decoded")
    where.add_argument(
        "--profile-streaming", metavar="FILE", type=Path, help="write when layers were read and computed, as a Chrome trace"
    )
    _add_writing(where, "existing files")
    where.add_argument(
        "--caption-cache",
        metavar="DIR|off",
        help="where caption features are kept (default: the user's cache, for models too large to stay in memory)",
    )
    _add_compile_cache(where)


def _add_calibrate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL_DIR", type=Path, nargs="?", help="default: the embedded pocket model")
    parser.add_argument("-o", "--output", metavar="JSON", type=Path, required=True, help="the plan's file")
    parser.add_argument("--evaluations", metavar="N", type=int, required=True, help="steps that the plan evaluates in full")
    parser.add_argument("--prompt", metavar="TEXT", dest="prompts", action="append", help="caption to measure on; repeatable")
    _add_prompt_file(parser, "captions")
    parser.add_argument("--keep", choices=("residual", "velocity"), default="residual", help="what a reused step takes over")
    parser.add_argument(
        "--half-from", metavar="STEP", type=int, help="steps from here on reuse the guidance difference: half an evaluation"
    )
    parser.add_argument("--steps", dest="num_steps", metavar="N", type=int, help="sampling steps")
    parser.add_argument("--guidance", metavar="G", type=float, help="weight of the caption")
    parser.add_argument("--seed", metavar="N", type=int, help="of the noise (default 0)")
    parser.add_argument("--shift", metavar="S", type=float, help="of the times (default 1)")
    parser.add_argument("--merge-steps", metavar="K", type=int, help="first steps with merged temporal tokens")
    _add_size(parser)
    _add_fps(parser)
    _add_dtype(parser)
    _add_memory_budget(parser)
    _add_writing(parser, "an existing file")
    _add_compile_cache(parser)


def _add_export(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL_DIR", type=Path, help="model directory, or 'pocket' for the embedded model")
    parser.add_argument("out", metavar="OUT", type=Path, help="folder to make")
    parser.add_argument("--target", choices=("stablehlo", "onnx", "coreml"), required=True)
    _add_size(parser)
    parser.add_argument(
        "--size", metavar="FxHxW", action="append", default=[], help="a further size, for example 51x240x320; repeatable"
    )
    parser.add_argument("--precision", choices=("float32", "float16"), default="float32", help="of the arithmetic")
    parser.add_argument("--weights", choices=("float", "int8", "lut6", "int4"), default="float", help="lut6, int4: Core ML")
    parser.add_argument(
        "--stages", metavar="NAMES", default="t5,stdit3,vae_decoder", help="some of t5,stdit3,vae_decoder,vae_encoder"
    )
    loop = parser.add_argument_group("defaults of the loop (a host may use others)")
    _add_host_loop(loop)
    _add_fps(loop)
    parser.add_argument("--licence", metavar="TEXT", help="of the weights, for the manifest")
    parser.add_argument("--no-fused-attention", action="store_true", help="Core ML: plain operations for attention")
    _add_writing(parser, "an existing folder")


def _add_run_exported(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="what sora-jax export has made")
    parser.add_argument("prompt", metavar="PROMPT")
    parser.add_argument("-o", "--output", metavar="FILE", type=Path, default=Path("clip.mp4"), help="default: clip.mp4")
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="of the noise (default 0)")
    parser.add_argument("--size", metavar="FxHxW", help="one of those exported (default: the first)")
    loop = parser.add_argument_group("the loop (defaults are the manifest's)")
    _add_host_loop(loop)
    loop.add_argument("--sampler", action="store_true", help="StableHLO: the whole loop as one program")
    parser.add_argument("--unload", action="store_true", help="let every stage go when the manifest says so")
    _add_writing(parser, "an existing clip")


def _add_inspect(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="FILE|MODEL_DIR", type=Path)
    parser.add_argument("--json", action="store_true", help="print JSON")
    plan = parser.add_argument_group("memory plan (any of these prints what a generation with the model would need)")
    _add_memory_budget(plan)
    _add_size(plan)
    plan.add_argument("--steps", dest="num_steps", metavar="N", type=int, help="sampling steps")
    plan.add_argument("--guidance", metavar="G", type=float, help="weight of the caption; 1: no guidance")
    plan.add_argument("--loop", metavar="N", type=int, help="clips in a row, each continuing the one before")
    _add_dtype(plan)
    plan.add_argument("--batch-size", metavar="N", type=int, help="clips made together")
    plan.add_argument("--bandwidth", metavar="SIZE", help="storage's bytes a second, for example 1.6GB (default 1.3GB)")
    plan.add_argument("--gflops", metavar="N", type=float, help="speed in GFLOP/s (default: 100 for each core)")


def _add_prompt_file(group: Any, what: str) -> None:
    group.add_argument("--prompt-path", metavar="FILE", type=Path, help=f"read {what} from a file, one a line")
    group.add_argument("--start-index", metavar="N", type=int, default=0, help="first line of the file to use, from 0")
    group.add_argument("--end-index", metavar="N", type=int, help="line of the file to stop before")


def _add_size(group: Any) -> None:
    group.add_argument("--height", metavar="PX", type=int, help="rows of pixels, with --width")
    group.add_argument("--width", metavar="PX", type=int, help="columns of pixels")
    group.add_argument("--resolution", metavar="NAME", help="instead of height and width, for example 240p")
    group.add_argument("--aspect-ratio", metavar="H:W", help="for example 9:16, with --resolution")
    group.add_argument("--num-frames", metavar="N|2s", help="frames or nominal duration; 1 makes an image")


def _add_fps(group: Any) -> None:
    group.add_argument("--fps", metavar="F", type=float, help="frame rate the model is asked for")


def _add_host_loop(group: Any) -> None:
    group.add_argument("--steps", dest="num_steps", metavar="N", type=int, help="sampling steps")
    group.add_argument("--guidance", metavar="G", type=float, help="weight of the caption")
    group.add_argument("--merge-steps", metavar="K", type=int, help="first steps with merged temporal tokens")
    group.add_argument("--leap", metavar="off|N|dynamic", type=whole_number_or_word, help="linear proportional leap")


def _add_dtype(group: Any) -> None:
    group.add_argument("--dtype", choices=("float32", "bfloat16"), help="compute dtype")


def _add_memory_budget(group: Any) -> None:
    group.add_argument(
        "--memory-budget", metavar="SIZE|auto", help="memory to make do with, for example 3.3GB; layers are read as they run"
    )


def _add_writing(group: Any, what: str) -> None:
    group.add_argument("--overwrite", action="store_true", help=f"replace {what}")
    group.add_argument("--quiet", action="store_true", help="no progress and no notes")


def _add_compile_cache(group: Any) -> None:
    group.add_argument(
        "--compile-cache", metavar="DIR|off", help="where compiled programs are kept (default: the user's cache)"
    )


def _score(text: str) -> float | str:
    return _number_or_off(text, float, "a number")


def _align(text: str) -> int | str:
    return _number_or_off(text, int, "a whole number")


def _number_or_off(text: str, kind: type[Number], what: str) -> Number | str:
    if text == "off":
        return text
    try:
        return kind(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"got {text!r}; expected {what}, or off") from None
