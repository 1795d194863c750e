"""What an option says about itself, once: type, range, spelling and help.

The fields of a class are its options: ``name: Annotated[type, Option("Help.", ...)]``.  Checks of Python arguments, the command
line, JSON and the tables of the documentation are made from them.

Invariant: `declared` is the only reader of such fields, and `Declared.check` the only judge of a value.  This module imports
no JAX, and knows no option by name.
"""

import dataclasses
import difflib
import functools
import math
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ForwardRef, Literal, Union, get_args, get_origin

import numpy as np

_FLOAT_RANGE = 10**300  # beyond, a whole number is no float
OFF = "off"  # what a user writes for "none", where leaving an option out means the model's default


@dataclasses.dataclass(frozen=True)
class Option:
    """What an option declares in addition to its name and its type.

    Attributes:
      help: a sentence for the command line and the documentation.
      metavar: how help writes its value; none for a flag.
      flags: how the command line spells it; none: ``--`` and the name.
      within: smallest and largest number; None: any finite one.
      above: number that the value must exceed.
      choices: the texts it may be, or the words that may stand in place of a number.
      off: whether ``off`` stands for none.
      expected: how an error goes on after "expected"; none: made from the type and the range.
      default: Open-Sora's value; None where there is none, or where it follows from other options.
      positional: whether the command line takes it without a flag.
      repeats: whether the command line takes it several times.
      on_command_line: False for what only Python takes as it is.
    """

    help: str
    _: dataclasses.KW_ONLY
    metavar: str = ""
    flags: tuple[str, ...] = ()
    within: tuple[int | float, int | float] | None = None
    above: int | float | None = None
    choices: tuple[str, ...] = ()
    off: bool = False
    expected: str = ""
    default: Any = None
    positional: bool = False
    repeats: bool = False
    on_command_line: bool = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class Declared:
    """An option with its name and the types that its value may have, None aside.

    ``kinds`` are names of types: a type that only Python values have (`Plan`) is not imported for it.
    """

    name: str
    kinds: tuple[str, ...]
    option: Option
    required: bool = False
    default: Any = None

    @property
    def flags(self) -> tuple[str, ...]:
        """Spellings on the command line."""
        return self.option.flags or (f"--{self.name.replace('_', '-')}",)

    @property
    def called(self) -> str:
        """What an error of the command line calls it."""
        return self.name if self.option.positional else max(self.flags, key=lambda flag: flag.startswith("--"))

    @property
    def is_flag(self) -> bool:
        """Whether it is given without a value."""
        return self.kinds == ("bool",)

    def check(self, value: Any, *, called: str = "") -> None:
        """Refuses a value that the option cannot have; the error calls it by its name, or as ``called`` says.

        Raises:
          ValueError: says what is expected.
        """
        if not self._has_type_of(value) or not self._is_within(value):
            raise ValueError(f"{called or self.name} is {_shown(value)}; expected {self.expected}.")

    def parse(self, text: str) -> Any:
        """Returns the value that a text of the command line means; `check` looks at its range.

        Raises:
          ValueError: it is a text where a number is expected.
        """
        if "Path" in self.kinds:
            return Path(text)
        numbers = [kind for name, kind in (("int", int), ("float", float)) if name in self.kinds]
        for kind in numbers:
            try:
                return kind(text)
            except ValueError:
                continue
        if self._takes_text(text):
            return text
        raise ValueError(f"got {text!r}; expected {self.expected}")

    @property
    def expected(self) -> str:
        """What a value is expected to be, in words."""
        if self.option.expected:
            return self.option.expected
        words = [*self.option.choices, *([OFF] if self.option.off else [])]
        number = {"int": "a whole number", "float": "a number"}
        what = [number[kind] + _range(self.option) for kind in self.kinds if kind in number]
        if not what and not self.option.choices:
            what = ["a text" if "str" in self.kinds else f"a {self.kinds[0].lower()}"]
        return ", or ".join([*what, _listed(words)] if words else what)

    def _takes_text(self, text: str) -> bool:
        if (self.option.off and text == OFF) or text in self.option.choices:
            return True
        return "str" in self.kinds and not self.option.choices and not {"int", "float"} & set(self.kinds)

    def _has_type_of(self, value: Any) -> bool:
        if isinstance(value, str):
            return self._takes_text(value)
        if isinstance(value, bool):
            return "bool" in self.kinds
        if isinstance(value, float):
            return "float" in self.kinds and math.isfinite(value)
        if isinstance(value, int):
            return "int" in self.kinds or ("float" in self.kinds and abs(value) < _FLOAT_RANGE)
        return type(value).__name__ in self.kinds or ("Path" in self.kinds and isinstance(value, Path))

    def _is_within(self, value: Any) -> bool:
        if isinstance(value, bool) or not isinstance(value, int | float):
            return True
        within, above = self.option.within, self.option.above
        return (within is None or within[0] <= value <= within[1]) and (above is None or value > above)


@functools.cache
def declared(owner: Any) -> Mapping[str, Declared]:
    """Returns the options that the fields of a TypedDict or a dataclass declare, in their order."""
    fields = {field.name: field for field in dataclasses.fields(owner)} if dataclasses.is_dataclass(owner) else {}
    hints = {name: field.type for name, field in fields.items()} or owner.__annotations__
    found = {}
    for name, hint in hints.items():
        option = next((one for one in getattr(hint, "__metadata__", ()) if isinstance(one, Option)), None)
        if option is not None:
            default, required = _default(fields.get(name))
            found[name] = Declared(name=name, kinds=_kinds(hint), option=option, required=required, default=default)
    return types.MappingProxyType(found)


def _default(field: dataclasses.Field[Any] | None) -> tuple[Any, bool]:
    """Returns the default of a field, and whether it has none."""
    if field is None:
        return None, False
    return (None, True) if field.default is dataclasses.MISSING else (field.default, False)


def said(options: Mapping[str, Any], known: Mapping[str, Declared]) -> dict[str, Any]:
    """Returns the options that say something: those that are not None, NumPy's numbers as Python's.

    Raises:
      ValueError: a name is unknown.
    """
    unknown = sorted(options.keys() - known.keys())
    if unknown:
        close = difflib.get_close_matches(unknown[0], known, 1)
        hint = f"did you mean {close[0]}?" if close else f"expected some of {', '.join(known)}."
        raise ValueError(f"option {unknown[0]!r} is unknown; {hint}")
    values = {name: value.item() if isinstance(value, np.generic) else value for name, value in options.items()}
    return {name: value for name, value in values.items() if value is not None}


def _kinds(hint: Any) -> tuple[str, ...]:
    """Returns the names of the types in a union, None left out; the elements of a sequence stand for it."""
    origin = get_origin(hint)
    if origin is Annotated:
        return _kinds(hint.__origin__)
    if origin is Literal:
        return ("str",)
    if origin in (Union, types.UnionType):
        return tuple(dict.fromkeys(kind for part in get_args(hint) for kind in _kinds(part)))
    if origin is not None:
        return _kinds(get_args(hint)[0])
    if isinstance(hint, ForwardRef):
        return (hint.__forward_arg__,)
    return () if hint is type(None) else (hint.__name__,)


def _range(option: Option) -> str:
    if option.within is not None:
        return f" from {_number(option.within[0])} to {_number(option.within[1])}"
    return f" above {_number(option.above)}" if option.above is not None else ""


def _number(value: int | float) -> str:
    return f"{value:.0f}" if float(value).is_integer() else f"{value:g}"


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."


def _listed(words: list[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"
