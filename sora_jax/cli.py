"""The ``sora-jax`` command: arguments in, one line out for whatever goes wrong.

Invariant: a user never sees a traceback (unless asked for with --debug), and every failure has a non-zero exit code: 2 for
bad usage or input, 1 for a failure on the way, 130 for Ctrl-C.  Standard output holds results only; progress and notes go
to standard error.  Work is done elsewhere; heavy imports wait until the arguments are known to be good.
"""

import argparse
import contextlib
import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from sora_jax import __version__

OK, FAILED, BAD_INPUT, INTERRUPTED, TERMINATED = 0, 1, 2, 130, 143
_MAX_FOREIGN = 400  # characters of an error that is not ours: XLA's can fill a screen


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Ends the program with one line, where argparse would print the usage too."""
        self.exit(BAD_INPUT, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code; ``arguments`` default to those of the process."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        if arguments and arguments[0] == "convert":
            return _convert(arguments[1:])
        options = _parser().parse_args(arguments)
        with _sigterm_ends_the_program():
            options.run(options)
        return OK
    except KeyboardInterrupt:
        return _fail("interrupted", INTERRUPTED)
    except BrokenPipeError:  # the reader of our output left, for example `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except Exception as error:
        if "--debug" in arguments:
            raise
        return _fail(describe(error), BAD_INPUT if _is_input(error) else FAILED)


@contextlib.contextmanager
def _sigterm_ends_the_program() -> Iterator[None]:
    """Turns SIGTERM into SystemExit meanwhile, so that clean-up runs; signals belong to the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def describe(error: BaseException) -> str:
    """Returns an error in one line."""
    if isinstance(error, OSError) and error.strerror:
        names = [str(name) for name in (error.filename, error.filename2) if name]
        text = ": ".join([*names, error.strerror])
    elif isinstance(error, MemoryError):
        text = "out of memory; use a smaller size, fewer frames or a smaller batch"
    elif isinstance(error, KeyError) and error.args:
        text = str(error.args[0])
    else:
        text = str(error)
    if not isinstance(error, ValueError | OSError | MemoryError | KeyError):
        text = f"{type(error).__name__}: {text[:_MAX_FOREIGN]}; --debug shows where"
    return " ".join(text.split()) or type(error).__name__


def _is_input(error: BaseException) -> bool:
    return isinstance(error, ValueError | FileNotFoundError | FileExistsError | IsADirectoryError | NotADirectoryError)


def _fail(message: str, code: int) -> int:
    print(f"sora-jax: error: {message}", file=sys.stderr)
    return code


def _terminate(*_: object) -> NoReturn:
    raise SystemExit(TERMINATED)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="sora-jax", description="Text to video with Open-Sora 1.2's architecture.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    common = _Parser(add_help=False)
    common.add_argument("--debug", action="store_true", help="show the traceback of a failure")
    generate = commands.add_parser(
        "generate",
        parents=[common],
        allow_abbrev=False,
        help="make clips from prompts",
        description="Makes clips from prompts.",
    )
    _add_generate(generate)
    calibrate = commands.add_parser(
        "calibrate",
        parents=[common],
        allow_abbrev=False,
        help="find a reuse plan for a model",
        description="Measures what reuse costs at each step of a model's sampling, and writes the best plan.",
    )
    _add_calibrate(calibrate)
    commands.add_parser("convert", add_help=False, help="convert PyTorch checkpoints into a model directory")
    _add_export(
        commands.add_parser(
            "export",
            parents=[common],
            allow_abbrev=False,
            help="write a model as StableHLO, ONNX or Core ML",
            description="Writes a model's stages as programs of fixed shapes, each compared with JAX before it counts.",
        )
    )
    _add_run_exported(
        commands.add_parser(
            "run-exported",
            parents=[common],
            allow_abbrev=False,
            help="make a clip with an exported model",
            description="Makes a clip from a prompt with the artefacts of an export, read through its manifest.",
        )
    )
    inspect = commands.add_parser(
        "inspect", parents=[common], allow_abbrev=False, help="show what a clip or a model directory holds"
    )
    inspect.add_argument("path", metavar="FILE|MODEL_DIR", type=Path)
    inspect.add_argument("--json", action="store_true", help="print JSON")
    inspect.set_defaults(run=_inspect)
    _add_plan(inspect.add_argument_group("memory plan (any of these prints what a generation with the model would need)"))
    return parser


def _add_generate(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=_generate)
    what = parser.add_argument_group("what")
    what.add_argument("prompts", metavar="PROMPT", nargs="*", help="caption; '|0| ... |1| ...' for loops, JSON at its end")
    what.add_argument("--prompt-path", metavar="FILE", type=Path, help="read prompts from a file, one a line")
    what.add_argument("--start-index", metavar="N", type=int, default=0, help="first line of the file to use, from 0")
    what.add_argument("--end-index", metavar="N", type=int, help="line of the file to stop before")
    what.add_argument("--num-sample", metavar="N", type=int, default=1, help="clips for each prompt")
    what.add_argument("--reference-path", metavar="FILE[;FILE]", action="append", help="images or videos; once for each prompt")
    what.add_argument(
        "--mask-strategy", metavar="GROUPS", action="append", help="loop,reference,start,target start,length,edit;..."
    )
    what.add_argument("--from-latents", metavar="NPZ", type=Path, help="decode a file of --save-latents, generate nothing")
    what.add_argument("--model", metavar="DIR", type=Path, help="model directory (default: the embedded pocket model)")

    how = parser.add_argument_group("how (defaults are the model's)")
    how.add_argument("--steps", "--num-sampling-steps", dest="num_steps", metavar="N", type=int, help="sampling steps")
    how.add_argument("--guidance", "--cfg-scale", metavar="G", type=float, help="weight of the caption; 1: no guidance")
    how.add_argument("--seed", metavar="N", type=int, help="of the first clip; the next has N + 1 (default 0)")
    _add_size(how)
    how.add_argument("--save-fps", metavar="F", type=float, help="frame rate of the file (default: --fps)")
    how.add_argument("--aes", metavar="SCORE|off", type=_score, help="aesthetic score added to the caption")
    how.add_argument("--flow", metavar="SCORE|off", type=_score, help="motion score added to the caption")
    how.add_argument("--camera-motion", metavar="TEXT|off", help="camera motion added to the caption")
    how.add_argument("--loop", metavar="N", type=int, help="clips in a row, each continuing the one before")
    how.add_argument("--condition-frame-length", metavar="N", type=int, help="latent frames a clip takes over")
    how.add_argument("--condition-frame-edit", metavar="R", type=float, help="edit ratio of those frames, 0 to 1")
    how.add_argument("--align", metavar="N|off", type=_align, help="latent frames that mask starts are rounded to")
    how.add_argument("--dtype", choices=("float32", "bfloat16"), help="compute dtype")
    how.add_argument("--batch-size", metavar="N", type=int, default=1, help="clips made together")
    how.add_argument(
        "--memory-budget", metavar="SIZE|auto", help="memory to make do with, for example 3.3GB; layers are read as they run"
    )
    _add_sampler(parser.add_argument_group("fewer evaluations"))

    where = parser.add_argument_group("where")
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
    where.add_argument("--overwrite", action="store_true", help="replace existing files")
    where.add_argument("--quiet", action="store_true", help="no progress and no notes")
    where.add_argument(
        "--caption-cache",
        metavar="DIR|off",
        help="where caption features are kept (default: the user's cache, for models too large to stay in memory)",
    )
    where.add_argument(
        "--compile-cache", metavar="DIR|off", help="where compiled programs are kept (default: the user's cache)"
    )


def _add_sampler(group: Any) -> None:
    group.add_argument(
        "--preset", metavar="exact|recommended", help="exact: as Open-Sora; recommended: the sampler study's result"
    )
    group.add_argument("--solver", metavar="NAME", help="euler, ab2, dpmpp or heun (two evaluations a step)")
    group.add_argument("--shift", metavar="S", type=float, help="of the times; above 1: more steps at high noise (default 1)")
    group.add_argument("--leap", metavar="off|N|dynamic|released", type=_leap, help="linear proportional leap")
    group.add_argument("--leap-extrapolate", action="store_true", help="leap along the line through the last two velocities")
    group.add_argument("--plan", metavar="JSON", type=Path, help="reuse plan written by sora-jax calibrate")
    group.add_argument("--merge-steps", metavar="K", type=int, help="first steps with merged temporal tokens")
    group.add_argument("--merge-odd", metavar="alone|released", help="what becomes of the last of an odd number of frames")
    group.add_argument(
        "--merge-attentions", metavar="NAMES", help="of spatial,temporal,cross: which merge (default: all, as published)"
    )
    group.add_argument("--merge-keys-values-only", action="store_true", help="keep a query for every frame")
    group.add_argument("--merge-positions", metavar="merged|mean", help="RoPE positions of merged frames (default: merged)")


def _add_size(group: Any) -> None:
    group.add_argument("--height", metavar="PX", type=int)
    group.add_argument("--width", metavar="PX", type=int)
    group.add_argument("--resolution", metavar="NAME", help="for example 240p")
    group.add_argument("--aspect-ratio", metavar="H:W", help="for example 9:16")
    group.add_argument("--num-frames", metavar="N|2s", help="frames or nominal duration; 1 makes an image")
    group.add_argument("--fps", metavar="F", type=float, help="frame rate the model is asked for")


def _add_calibrate(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=_calibrate)
    parser.add_argument("model", metavar="MODEL_DIR", type=Path, nargs="?", help="default: the embedded pocket model")
    parser.add_argument("-o", "--output", metavar="JSON", type=Path, required=True, help="the plan's file")
    parser.add_argument("--evaluations", metavar="N", type=int, required=True, help="steps that the plan evaluates in full")
    parser.add_argument("--prompt", metavar="TEXT", dest="prompts", action="append", help="caption to measure on; repeatable")
    parser.add_argument("--prompt-path", metavar="FILE", type=Path, help="read captions from a file, one a line")
    parser.add_argument("--start-index", metavar="N", type=int, default=0, help="first line of the file to use, from 0")
    parser.add_argument("--end-index", metavar="N", type=int, help="line of the file to stop before")
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
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="compute dtype")
    parser.add_argument("--memory-budget", metavar="SIZE|auto", help="memory to make do with, for example 3.3GB")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing file")
    parser.add_argument("--quiet", action="store_true", help="no progress and no notes")
    parser.add_argument(
        "--compile-cache", metavar="DIR|off", help="where compiled programs are kept (default: the user's cache)"
    )


def _add_export(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=_export)
    parser.add_argument("model", metavar="MODEL_DIR", type=Path, help="model directory, or 'pocket' for the embedded model")
    parser.add_argument("out", metavar="OUT", type=Path, help="folder to make")
    parser.add_argument("--target", choices=("stablehlo", "onnx", "coreml"), required=True)
    parser.add_argument("--num-frames", metavar="N|2s", help="frames (default: the model's, as for the other sizes)")
    parser.add_argument("--height", metavar="PX", type=int)
    parser.add_argument("--width", metavar="PX", type=int)
    parser.add_argument("--resolution", metavar="NAME", help="instead of height and width, for example 240p")
    parser.add_argument("--aspect-ratio", metavar="H:W", help="for example 9:16")
    parser.add_argument(
        "--size", metavar="FxHxW", action="append", default=[], help="a further size, for example 51x240x320; repeatable"
    )
    parser.add_argument("--precision", choices=("float32", "float16"), default="float32", help="of the arithmetic")
    parser.add_argument("--weights", choices=("float", "int8", "lut6", "int4"), default="float", help="lut6, int4: Core ML")
    parser.add_argument(
        "--stages", metavar="NAMES", default="t5,stdit3,vae_decoder", help="some of t5,stdit3,vae_decoder,vae_encoder"
    )
    loop = parser.add_argument_group("defaults of the loop (a host may use others)")
    loop.add_argument("--steps", dest="num_steps", metavar="N", type=int)
    loop.add_argument("--guidance", metavar="G", type=float)
    loop.add_argument("--merge-steps", metavar="K", type=int)
    loop.add_argument("--leap", metavar="off|N|dynamic", type=_leap)
    loop.add_argument("--fps", metavar="F", type=float)
    parser.add_argument("--licence", metavar="TEXT", help="of the weights, for the manifest")
    parser.add_argument("--no-fused-attention", action="store_true", help="Core ML: plain operations for attention")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing folder")
    parser.add_argument("--quiet", action="store_true", help="no progress")


def _add_run_exported(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=_run_exported)
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="what sora-jax export has made")
    parser.add_argument("prompt", metavar="PROMPT")
    parser.add_argument("-o", "--output", metavar="FILE", type=Path, default=Path("clip.mp4"), help="default: clip.mp4")
    parser.add_argument("--seed", metavar="N", type=int, default=0)
    parser.add_argument("--size", metavar="FxHxW", help="one of those exported (default: the first)")
    loop = parser.add_argument_group("the loop (defaults are the manifest's)")
    loop.add_argument("--steps", dest="num_steps", metavar="N", type=int)
    loop.add_argument("--guidance", metavar="G", type=float)
    loop.add_argument("--merge-steps", metavar="K", type=int)
    loop.add_argument("--leap", metavar="off|N|dynamic", type=_leap)
    loop.add_argument("--sampler", action="store_true", help="StableHLO: the whole loop as one program")
    parser.add_argument("--unload", action="store_true", help="let every stage go when the manifest says so")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing clip")
    parser.add_argument("--quiet", action="store_true", help="no remarks")


def _add_plan(plan: argparse._ArgumentGroup) -> None:
    plan.add_argument("--memory-budget", metavar="SIZE|auto", help="memory to make do with, for example 3.3GB")
    plan.add_argument("--num-frames", metavar="N|2s")
    plan.add_argument("--height", metavar="PX", type=int)
    plan.add_argument("--width", metavar="PX", type=int)
    plan.add_argument("--resolution", metavar="NAME", help="for example 240p")
    plan.add_argument("--aspect-ratio", metavar="H:W", help="for example 9:16")
    plan.add_argument("--steps", dest="num_steps", metavar="N", type=int)
    plan.add_argument("--guidance", metavar="G", type=float)
    plan.add_argument("--loop", metavar="N", type=int)
    plan.add_argument("--dtype", choices=("float32", "bfloat16"))
    plan.add_argument("--batch-size", metavar="N", type=int)
    plan.add_argument("--bandwidth", metavar="SIZE", help="storage's bytes a second, for example 1.6GB (default 1.3GB)")
    plan.add_argument("--gflops", metavar="N", type=float, help="speed in GFLOP/s (default: 100 for each core)")


def _leap(text: str) -> int | str:
    return int(text) if text.lstrip("-").isdigit() else text


def _score(text: str) -> float | str:
    return text if text == "off" else float(text)


def _align(text: str) -> int | str:
    return text if text == "off" else int(text)


def _convert(arguments: Sequence[str]) -> int:
    from convert_weights.__main__ import main as convert

    return convert(arguments)


def _generate(options: argparse.Namespace) -> None:
    folders = [path.parent for path in (options.output, options.save_latents) if path] + [options.save_dir]

    def work() -> None:
        from sora_jax import generate_command

        generate_command.run(options)

    _interruptibly(work, folders)


def _calibrate(options: argparse.Namespace) -> None:
    def work() -> None:
        from sora_jax import calibrate_command

        calibrate_command.run(options)

    _interruptibly(work, [options.output.parent])


def _export(options: argparse.Namespace) -> None:
    from sora_jax import export_command

    export_command.run(options)


def _run_exported(options: argparse.Namespace) -> None:
    def work() -> None:
        from sora_jax import run_exported_command

        run_exported_command.run(options)

    _interruptibly(work, [options.output.parent])


def _interruptibly(work: Callable[[], None], folders: Sequence[Path]) -> None:
    """Runs ``work`` in a thread, so that Ctrl-C is answered at once even while XLA compiles or computes.

    On an interrupt the process ends here, after removing what this process had begun to write in ``folders``.
    """
    failures: list[BaseException] = []

    def guarded() -> None:
        try:
            work()
        except BaseException as error:  # handed to the main thread, which decides what the user sees
            failures.append(error)

    worker = threading.Thread(target=guarded, daemon=True)
    try:
        worker.start()
        while worker.is_alive():
            worker.join(0.1)  # a signal that another thread receives does not end a wait without limit
    except (KeyboardInterrupt, SystemExit) as interrupt:
        from tqdm import tqdm

        from sora_jax import files

        files.remove_partial(*folders)
        code = INTERRUPTED if isinstance(interrupt, KeyboardInterrupt) else TERMINATED
        with tqdm.get_lock():  # the worker still runs, and must not draw its bar once more
            print(file=sys.stderr)  # ends the line of the bar
            _fail("interrupted", code)
            sys.stdout.flush()
            os._exit(code)
    if failures:
        raise failures[0]


def _inspect(options: argparse.Namespace) -> None:
    from sora_jax import inspection

    if any(getattr(options, name) is not None for name in (*inspection.PLAN_SETTINGS, *inspection.PLAN_OPTIONS)):
        given = {name: getattr(options, name) for name in inspection.PLAN_SETTINGS}
        machine = {name: getattr(options, name) for name in inspection.PLAN_OPTIONS}
        planned, lines = inspection.inspect_memory(options.path, given, **machine)
        print(json.dumps(planned, indent=2) if options.json else "\n".join(lines))
        return
    found = inspection.inspect(options.path)
    print(json.dumps(found, indent=2, ensure_ascii=False) if options.json else "\n".join(_lines(found)))


def _lines(found: dict[str, Any], indent: str = "") -> list[str]:
    """Returns nested fields as indented ``name: value`` lines."""
    lines = []
    for name, value in found.items():
        if isinstance(value, dict):
            lines += [f"{indent}{name}:", *_lines(value, indent + "  ")]
        else:
            lines.append(f"{indent}{name}: {value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)}")
    return lines
