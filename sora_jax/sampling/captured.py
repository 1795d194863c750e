"""Python objects taken apart into pytrees, so that a compiled program never outlives the attributes it was traced from.

``jax.jit`` knows a plain Python object by its identity: if it were passed to a program as it is, an attribute set afterwards
would change nothing.  `captured` takes an object apart instead::

    JAX arrays                                        runtime inputs: new values compile nothing
    numbers, strings, tuples, frozen dataclasses      static, by value: a new value compiles anew
    numpy arrays                                      static, by content
    lists, dicts, registered pytrees                  each element as above
    other objects, bound methods, functools.partial   what they hold, as above
    functions, classes, jitted functions              static, by identity, as ``jax.jit`` has it

Invariant: two equal captures restore to objects that behave alike, and a capture does not change with the object it came
from.  What a function closes over is not looked at: whoever changes that passes it as an argument (`jax.tree_util.Partial`).
"""

import dataclasses
import functools
import hashlib
import types
from collections.abc import Iterator
from typing import Any, no_type_check

import jax
import numpy as np
from jax.tree_util import Partial

_BY_IDENTITY = (
    types.FunctionType,
    types.BuiltinFunctionType,
    types.ModuleType,
    type,
    np.ufunc,
    type(jax.jit(lambda: None)),
)


@jax.tree_util.register_dataclass
@no_type_check  # the tree also holds shapes and paths
@dataclasses.dataclass(frozen=True, kw_only=True)
class _Static:
    """A value that is part of the program."""

    value: Any = dataclasses.field(metadata={"static": True})


@jax.tree_util.register_dataclass
@no_type_check  # the tree also holds shapes and paths
@dataclasses.dataclass(frozen=True, kw_only=True)
class _Parts:
    """An object that `_assembled` makes again from its parts; ``kind`` is its class, `functools.partial` or a `_Method`."""

    parts: Any
    kind: Any = dataclasses.field(metadata={"static": True})


@dataclasses.dataclass(frozen=True)
class _Method:
    """The kind of a bound method: its function."""

    function: Any


class _Constant:
    """A numpy array, equal to others of the same content."""

    def __init__(self, array: np.ndarray):
        self.array = array.copy()
        self.array.flags.writeable = False
        self.key = (array.shape, array.dtype.str, hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Constant) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)


def captured(value: Any) -> Any:
    """Returns a pytree of arrays from which `restored` makes the value again.

    A registered pytree stays what it is: its arrays and numbers are runtime inputs, and only other leaves are taken apart.

    Raises:
      ValueError: an object refers to itself, or has state that cannot be read; names the attribute.
    """
    if not jax.tree_util.all_leaves([value]):
        return jax.tree.map(lambda leaf: leaf if _is_input(leaf) else _captured(leaf, type(value).__name__, ()), value)
    return _captured(value, "velocity", ())


def restored(tree: Any) -> Any:
    """Returns the value that was captured; arrays in it are those of ``tree``."""
    is_part = functools.partial(_is_instance, (_Static, _Parts))
    return jax.tree.map(lambda node: _assembled(node) if is_part(node) else node, tree, is_leaf=is_part)


def _assembled(node: _Static | _Parts) -> Any:
    if isinstance(node, _Static):
        return node.value.array if isinstance(node.value, _Constant) else node.value
    parts = restored(node.parts)
    if node.kind is functools.partial:
        function, arguments, keywords = parts
        return functools.partial(function, *arguments, **keywords)
    if isinstance(node.kind, _Method):
        return types.MethodType(node.kind.function, parts)
    made = object.__new__(node.kind)
    for name, attribute in parts.items():
        object.__setattr__(made, name, attribute)
    return made


def _captured(value: Any, name: str, holders: tuple[int, ...]) -> Any:
    """Returns a value taken apart; ``name`` is where it was found, ``holders`` are the objects that hold it."""
    if isinstance(value, jax.Array):
        return value
    if isinstance(value, np.ndarray):
        return _Static(value=_Constant(value))
    if isinstance(value, _BY_IDENTITY):
        return _Static(value=value)
    if id(value) in holders:
        raise ValueError(f"{name} refers to itself; register its class as a pytree (jax.tree_util.register_dataclass).")
    holders = (*holders, id(value))
    if isinstance(value, types.MethodType):
        return _Parts(parts=_captured(value.__self__, f"{name}.__self__", holders), kind=_Method(value.__func__))
    if isinstance(value, functools.partial) and not isinstance(value, Partial):
        call = (value.func, list(value.args), dict(value.keywords))
        return _Parts(parts=[_captured(part, name, holders) for part in call], kind=functools.partial)
    if not jax.tree_util.all_leaves([value]):
        return jax.tree.map(lambda leaf: _captured(leaf, name, holders), value)
    if _is_known_by_value(value):
        return _Static(value=value)
    state = dict(_state(value))
    if type(value).__new__ is not object.__new__ or not (state or hasattr(value, "__dict__")):
        raise ValueError(
            f"{name} is a {type(value).__name__}, whose state cannot be read; register the class that holds it as a pytree "
            "(jax.tree_util.register_dataclass)."
        )
    parts = {field: _captured(part, f"{name}.{field}", holders) for field, part in state.items()}
    return _Parts(parts=parts, kind=type(value))


def _is_known_by_value(value: Any) -> bool:
    if type(value).__hash__ in (None, object.__hash__):
        return False
    try:
        hash(value)
    except TypeError:  # a frozen dataclass that holds arrays
        return False
    return True


def _state(value: Any) -> Iterator[tuple[str, Any]]:
    """Yields the attributes of an object, those in slots included."""
    yield from getattr(value, "__dict__", {}).items()
    for kind in type(value).__mro__:
        slots = kind.__dict__.get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if name not in ("__dict__", "__weakref__") and hasattr(value, name):
                yield name, getattr(value, name)


def _is_input(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array | np.ndarray | np.generic | bool | int | float | complex)


def _is_instance(kinds: tuple[type, ...], node: Any) -> bool:
    return isinstance(node, kinds)
