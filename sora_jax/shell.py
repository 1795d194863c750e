"""What every command of this project does alike: exit codes, one line for whatever goes wrong, notes beside the results.

Invariant: a message is one line on standard error, also for wrong usage; standard output holds results only.  Which commands
there are, and what they do, is not known here.
"""

import argparse
import sys
from typing import NoReturn

OK, FAILED, BAD_INPUT, INTERRUPTED, TERMINATED = 0, 1, 2, 130, 143
_MAX_FOREIGN = 400  # characters of an error that is not ours: XLA's can fill a screen


class Parser(argparse.ArgumentParser):
    """An argument parser that answers wrong usage with one line, where argparse would print the usage too."""

    def error(self, message: str) -> NoReturn:
        """Ends the program with the message and exit code 2."""
        self.exit(BAD_INPUT, f"{self.prog}: error: {' '.join(message.split())} (see {self.prog} --help)\n")


def whole_number_or_word(text: str) -> int | str:
    """Returns the number that an option's value is, or the word as it stands."""
    return int(text) if text.lstrip("-").isdecimal() else text


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


def is_bad_input(error: BaseException) -> bool:
    """Returns whether an error is the input's fault, which has an exit code of its own."""
    return isinstance(error, ValueError | FileNotFoundError | FileExistsError | IsADirectoryError | NotADirectoryError)


def note(text: str) -> None:
    """Writes one line for the user beside the results."""
    sys.stderr.write(f"sora-jax: {text}\n")
