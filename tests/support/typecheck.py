"""The run-time type checker of the tests: beartype on every annotated function of the rooms that compute, shapes included.

Invariant: it checks or raises.  Two hints it passes by: ``typing.Self``, which beartype takes only where it decorates whole
classes, and ``Literal``, whose wrong values the library refuses itself, with a message that tests read.
"""

from collections.abc import Callable
from typing import Any, Literal, Self, TypeVar, get_origin

from beartype import beartype

Function = TypeVar("Function", bound=Callable[..., Any])


def check(function: Function) -> Function:
    """Returns the function with its arguments and its result checked at every call."""
    hints = {name: Any if _passed_by(hint) else hint for name, hint in function.__annotations__.items()}
    function.__annotations__ = hints
    return beartype(function)


def _passed_by(hint: Any) -> bool:
    return hint is Self or get_origin(hint) is Literal
