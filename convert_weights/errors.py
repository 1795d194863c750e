"""Errors about checkpoints, as one line that can be shown on a terminal whatever a file holds.

Invariant: a message has no line break and no control character, and its length is bounded, although names and numbers in it
come from files that nobody vouches for.  What is wrong is decided by the readers.
"""

import contextlib
from collections.abc import Iterator

from sora_jax.files import advice

_MAX_MESSAGE = 2000
_MAX_NAME = 200


class SourceError(ValueError):
    """A checkpoint file cannot be used: unsafe, truncated, damaged or of another format."""

    def __init__(self, message: str):
        super().__init__(printable(message, _MAX_MESSAGE))


class UnreadableSource(SourceError):
    """The system does not let us read a source now: what was converted of it stays, to go on with when it does."""


def printable(text: object, limit: int = _MAX_NAME) -> str:
    """Returns a text from a file as one line: control characters escaped, and cut where it is longer than ``limit``."""
    try:
        whole = text if isinstance(text, str) else str(text)
    except (RecursionError, ValueError):  # nested too deeply, or an integer of too many digits
        whole = f"a {type(text).__name__} that cannot be shown"
    kept = whole if len(whole) <= limit else whole[:limit]
    if not kept.isprintable():
        kept = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in kept)
    return kept if len(whole) <= limit else f"{kept}... ({len(whole)} characters)"


def shown(value: object, limit: int = 80) -> str:
    """Returns a value from a file as Python writes it, in one line of bounded length."""
    return f"'{printable(value, limit)}'" if isinstance(value, str) else printable(value, limit)


def some(names: list[str], count: int = 5) -> str:
    """Returns the first few of many names, and the number of the others."""
    shown = ", ".join(printable(name) for name in names[:count])
    return shown if len(names) <= count else f"{shown} and {len(names) - count} more"


def unreadable(error: OSError, path: object) -> UnreadableSource:
    """Returns the error of a source that the system does not let us read: what it said, and what to do about it.

    It is bad input whenever it is noticed, while headers are read or values, and whatever the system said.
    """
    return UnreadableSource(f"{error.filename or path} cannot be read: {error.strerror or error}{advice(error)}.")


@contextlib.contextmanager
def reading(path: object) -> Iterator[None]:
    """Turns what the system says while the body looks at a source into `unreadable`.

    Raises:
      UnreadableSource: the system raised an OSError.
    """
    try:
        yield
    except OSError as error:
        raise unreadable(error, path) from error
