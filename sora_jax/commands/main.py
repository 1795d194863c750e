"""The ``sora-jax`` command: arguments in, one line out for whatever goes wrong.

Invariant: a user never sees a traceback (unless asked for with --debug), and every failure has a non-zero exit code: 2 for
bad usage or input, 1 for a failure on the way (for ``convert`` also a source that does not fit), 130 for Ctrl-C.  Standard
output holds results only; progress and notes go to standard error.  Work is done elsewhere; heavy imports wait until the
arguments are known to be good.
"""

import argparse
import contextlib
import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from sora_jax.commands.options import build_parser
from sora_jax.shell import BAD_INPUT, FAILED, INTERRUPTED, OK, TERMINATED, describe, is_bad_input

__all__ = ["BAD_INPUT", "FAILED", "INTERRUPTED", "OK", "TERMINATED", "describe", "main"]

_UNWIND_S = 5.0  # that an interrupted export has to end its process and to remove what it wrote


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code; ``arguments`` default to those of the process."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        if arguments and arguments[0] == "convert":
            return _convert(arguments[1:])
        options = build_parser().parse_args(arguments)
        with _sigterm_ends_the_program():
            _COMMANDS[options.command](options)
        return OK
    except KeyboardInterrupt:
        return _fail("interrupted", INTERRUPTED)
    except BrokenPipeError:  # the reader of our output left, for example `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except Exception as error:
        if "--debug" in arguments:
            raise
        return _fail(describe(error), BAD_INPUT if is_bad_input(error) else FAILED)


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


def _fail(message: str, code: int) -> int:
    print(f"sora-jax: error: {message}", file=sys.stderr)
    return code


def _terminate(*_: object) -> NoReturn:
    raise SystemExit(TERMINATED)


def _convert(arguments: Sequence[str]) -> int:
    from sora_jax.commands.convert import main as convert

    return convert(arguments)


def _generate(options: argparse.Namespace) -> None:
    folders = [path.parent for path in (options.output, options.save_latents) if path] + [options.save_dir]

    def work() -> None:
        from sora_jax.commands import generate

        generate.run(options)

    _interruptibly(work, folders)


def _calibrate(options: argparse.Namespace) -> None:
    def work() -> None:
        from sora_jax.commands import calibrate

        calibrate.run(options)

    _interruptibly(work, [options.output.parent])


def _export(options: argparse.Namespace) -> None:
    stop, begun, ended = threading.Event(), threading.Event(), threading.Event()

    def work() -> None:
        from sora_jax.commands import export

        try:
            export.run(options, stop, begun)
        finally:
            ended.set()

    def end() -> None:
        stop.set()
        if begun.is_set():  # before that there is no other process to end
            ended.wait(_UNWIND_S)

    _interruptibly(work, [options.out.parent], end)


def _run_exported(options: argparse.Namespace) -> None:
    def work() -> None:
        from sora_jax.commands import run_exported

        run_exported.run(options)

    _interruptibly(work, [options.output.parent])


def _interruptibly(work: Callable[[], None], folders: Sequence[Path], end: Callable[[], None] = lambda: None) -> None:
    """Runs ``work`` in a thread, so that Ctrl-C is answered at once even while XLA compiles or computes.

    On an interrupt ``end`` may let the work end by itself; then the process ends here, after removing what it had begun to
    write in ``folders``.
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

        with contextlib.suppress(KeyboardInterrupt):
            end()
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
    from sora_jax.commands import inspect

    if any(getattr(options, name) is not None for name in (*inspect.PLAN_SETTINGS, *inspect.PLAN_OPTIONS)):
        given = {name: getattr(options, name) for name in inspect.PLAN_SETTINGS}
        machine = {name: getattr(options, name) for name in inspect.PLAN_OPTIONS}
        planned, lines = inspect.inspect_memory(options.path, given, **machine)
        print(json.dumps(planned, indent=2) if options.json else "\n".join(lines))
        return
    found = inspect.inspect(options.path)
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


_COMMANDS: Mapping[str, Callable[[argparse.Namespace], None]] = {
    "generate": _generate,
    "calibrate": _calibrate,
    "export": _export,
    "run-exported": _run_exported,
    "inspect": _inspect,
}
