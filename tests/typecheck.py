"""The run-time type checker of the tests: beartype on every annotated function of sora_jax, shapes included.

Invariant: it checks or raises; the one hint it passes by is ``typing.Self``, which beartype takes only where it decorates
whole classes, and the import hook decorates functions.
"""

from collections.abc import Callable
from typing import Any, Self, TypeVar

from beartype import beartype

Function = TypeVar("Function", bound=Callable[..., Any])


def check(function: Function) -> Function:
    """Returns the function with its arguments and its result checked at every call."""
    hints = {name: Any if hint is Self else hint for name, hint in function.__annotations__.items()}
    function.__annotations__ = hints
    return beartype(function)
