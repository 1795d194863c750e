"""What all commands share: exit codes, one line for every failure, notes on standard error.

Invariant: whatever goes wrong is one line on standard error that begins with ``sora-jax: error:``, wrong usage included;
standard output holds results only; and no control character reaches a terminal, wherever a text came from. This module knows no
command.
"""

import argparse
import contextlib
import difflib
import os
import re
import signal
import sys
import threading
import traceback
import unicodedata
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

from sora_jax import files

OK, FAILED, BAD_INPUT, INTERRUPTED, TERMINATED = 0, 1, 2, 130, 143
NAME = "sora-jax"  # how every line for the user begins
_MAX_FOREIGN = 400  # characters of an error that is not ours: XLA's can fill a screen
_MAX_LINE = 2000
_COMPLETES = "_ARGCOMPLETE"  # set by argcomplete's function in the shell
_NEGATIVE = re.compile(r"-\.?\d")  # a value that argparse would take for an option
# Controls, lone surrogates, line separators, and the controls that reverse the direction of what follows them.
_UNPRINTABLE = {"Cc", "Cs", "Zl", "Zp"}
_BIDIRECTIONAL = frozenset("\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


class Parser(argparse.ArgumentParser):
    """An argument parser that answers wrong usage with one line, and takes options between the positional arguments.

    With ``debug`` there is an option ``--debug``, which `run` answers.
    """

    def __init__(self, *, prog: str, debug: bool = False, **keywords: Any):
        super().__init__(prog=prog, allow_abbrev=False, **keywords)
        if debug:
            self.add_argument("--debug", action="store_true", help="Show the traceback of a failure.")

    def read(self, arguments: Sequence[str] | None = None) -> argparse.Namespace:
        """Returns the parsed arguments; a value that begins with a minus and a digit is a value, not an option."""
        complete(self)
        joined: list[str] = []
        for argument in sys.argv[1:] if arguments is None else arguments:
            takes_it = bool(joined) and re.fullmatch(r"--[a-z][a-z-]*", joined[-1]) is not None
            if takes_it and "--" not in joined and _NEGATIVE.match(argument):
                joined[-1] += f"={argument}"
            else:
                joined.append(argument)
        # Behind "--" everything is positional, which the mixed order of argparse does not support.
        return self.parse_args(joined) if "--" in joined else self.parse_intermixed_args(joined)

    def error(self, message: str) -> NoReturn:
        """Ends the program with the message and exit code 2."""
        if unknown := re.match(r"unrecognized arguments: (--[a-z][a-z-]*)", message):
            known = [option for option in self._option_string_actions if option.startswith("--")]
            longer = [option for option in known if option.startswith(unknown[1])]
            if near := longer or difflib.get_close_matches(unknown[1], known, n=2, cutoff=0.7):
                message += f"; did you mean {' or '.join(near)}?"
        self.exit(BAD_INPUT, f"{NAME}: error: {printable(_one_line(message))} (see {self.prog} --help)\n")


def typed() -> list[str] | None:
    """Returns the whole words behind the command's name on the line that the shell wants to have completed; else None."""
    if _COMPLETES not in os.environ:
        return None
    words = os.environ.get("COMP_LINE", "")[: int(os.environ.get("COMP_POINT", "0"))].split(" ")
    return [word for word in words[1:-1] if word]


def complete(parser: argparse.ArgumentParser) -> None:
    """Answers the shell with what may follow on its line, and ends the process; does nothing unless the shell asks.

    Needs the package argcomplete, whose function in the shell asks.
    """
    if _COMPLETES in os.environ:
        import argcomplete

        argcomplete.autocomplete(parser)


def complete_behind_command() -> None:
    """Says that the next parser's words begin behind the name of a command: ``sora-jax generate ...``."""
    os.environ[_COMPLETES] = "2"


def run(
    command: Callable[[Sequence[str]], int | None],
    arguments: Sequence[str] | None = None,
    *,
    interrupted: str = "interrupted",
    reports: bool = False,
) -> int:
    """Runs a command and returns its exit code: 0, 2 for bad usage or input, 1 for another failure, 130, 143.

    Args:
      command: takes the arguments; returns an exit code, None for 0.
      arguments: None for those of the process.  With ``--debug`` among them a failure shows its traceback.
      interrupted: the message of Ctrl-C.
      reports: whether a ValueError of several lines is shown as it is, instead of in one line.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        with _sigterm_ends_the_program(), _warnings_as_notes():
            return command(arguments) or OK
    except SystemExit as stop:
        if stop.code == TERMINATED:
            return fail(interrupted, TERMINATED)
        return stop.code if isinstance(stop.code, int) else OK  # the parser has said why, or has shown its help
    except KeyboardInterrupt:
        return fail(interrupted, INTERRUPTED)
    except BrokenPipeError:  # the reader of our output left, for example `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except Exception as error:
        if "--debug" in arguments:
            traceback.print_exception(error)
        text = str(error) if reports and isinstance(error, ValueError) else describe(error)
        return fail(text, BAD_INPUT if is_bad_input(error) else FAILED)


def interruptibly(work: Callable[[], None], clean_up: Callable[[], None]) -> None:
    """Runs ``work`` in a thread, so that Ctrl-C is answered at once even while XLA compiles or computes.

    On an interrupt the process ends here, after ``clean_up``, without waiting for the thread.
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

        clean_up()
        with tqdm.get_lock():  # the worker still runs, and must not draw its bar once more
            sys.stderr.write("\n")  # ends the line of the bar
            code = fail("interrupted", INTERRUPTED if isinstance(interrupt, KeyboardInterrupt) else TERMINATED)
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    if failures:
        raise failures[0]


def describe(error: BaseException) -> str:
    """Returns an error in one line."""
    if isinstance(error, OSError) and error.strerror:
        names = [str(name) for name in (error.filename, error.filename2) if name]
        text = ": ".join([*names, error.strerror]) + files.advice(error)
    elif isinstance(error, MemoryError):
        text = "out of memory; use a smaller size, fewer frames or a smaller batch"
    elif isinstance(error, KeyError) and error.args:
        text = str(error.args[0])
    else:
        text = str(error)
    if not isinstance(error, ValueError | OSError | MemoryError | KeyError):
        text = f"{type(error).__name__}: {text[:_MAX_FOREIGN]}; --debug shows where"
    return _one_line(text) or type(error).__name__


def is_bad_input(error: BaseException) -> bool:
    """Returns whether bad input caused the error, which has its own exit code."""
    return isinstance(error, ValueError | FileNotFoundError | FileExistsError | IsADirectoryError | NotADirectoryError)


def fail(message: str, code: int) -> int:
    """Writes the line of a failure and returns the exit code."""
    sys.stderr.write(f"{NAME}: error: {printable(message)}\n")
    return code


def note(text: str) -> None:
    """Writes one line for the user to standard error."""
    sys.stderr.write(f"{NAME}: {printable(_one_line(text))}\n")


def result(text: object) -> None:
    """Writes a result, which may have several lines, to standard output at once."""
    sys.stdout.write(f"{printable(str(text))}\n")
    sys.stdout.flush()


def printable(text: str) -> str:
    r"""Returns a text whose control characters are written as ``\u001b``, so that a terminal shows and does not obey them.

    Ends of lines stay.  The escapes are those of JSON, which therefore stays JSON.
    """
    return "".join(_escaped(character) if _is_control(character) else character for character in text)


def counted(number: int, what: str) -> str:
    """Returns ``1 fault``, ``2 faults``."""
    return f"{number} {what}{'' if number == 1 else 's'}"


def _is_control(character: str) -> bool:
    if character == "\n" or character == " ":
        return False
    return unicodedata.category(character) in _UNPRINTABLE or character in _BIDIRECTIONAL


def _escaped(character: str) -> str:
    return f"\\u{ord(character):04x}"


def _one_line(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _MAX_LINE else f"{line[:_MAX_LINE]} ..."


@contextlib.contextmanager
def _sigterm_ends_the_program() -> Iterator[None]:
    """Turns SIGTERM into SystemExit while the body runs, so that clean-up runs; signals belong to the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _terminate(*_: object) -> NoReturn:
    raise SystemExit(TERMINATED)


@contextlib.contextmanager
def _warnings_as_notes() -> Iterator[None]:
    before = warnings.showwarning
    warnings.showwarning = _show_warning
    try:
        yield
    finally:
        warnings.showwarning = before


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    note(f"warning: {message}")
