"""From declared options to a parser, and from what was parsed to a value.

Invariant: help, spelling and ranges come from the declarations (see `option`), and whoever asks gets one frozen value, never a
namespace.  What is done with it, and which options there are, is not known here.
"""

import argparse
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from sora_jax.pipeline.clip_options import OPTIONS
from sora_jax.pipeline.option import Declared, Option, declared
from sora_jax.shell import Parser

Value = TypeVar("Value")
Group = Mapping[str, Declared]


def of_clip(*names: str, **changes: Option) -> Group:
    """Returns options of the pipeline by name, some with another help or spelling."""
    return {
        name: dataclasses.replace(OPTIONS[name], option=changes[name]) if name in changes else OPTIONS[name]
        for name in names
        if OPTIONS[name].option.on_command_line
    }


def make_parser(prog: str, description: str, groups: Mapping[str, Group]) -> Parser:
    """Returns a parser with the options of the groups under their headings; those of the heading "" have none."""
    parser = Parser(prog=prog, debug=True, description=description)
    for heading, group in groups.items():
        place = parser.add_argument_group(heading) if heading else parser
        for each in group.values():
            _add(place, each)
    return parser


def _add(place: Any, each: Declared) -> None:
    option = each.option
    keywords: dict[str, Any] = {"help": help_of(each).replace("%", "%%")}
    if each.is_flag:
        place.add_argument(*each.flags, dest=each.name, action="store_true", **keywords)
        return
    keywords |= {"type": _parser_of(each), "metavar": metavar(each) or None}
    if option.positional:
        keywords["nargs"] = "*" if option.repeats else None if each.required else "?"
        _offer(place.add_argument(each.name, **keywords), option.choices)
        return
    action = "append" if option.repeats else "store"
    added = place.add_argument(*each.flags, dest=each.name, action=action, required=each.required, default=None, **keywords)
    _offer(added, option.choices)


def _offer(action: Any, choices: Sequence[str]) -> None:
    """Tells the shell's completion what an option may be; the parser itself refuses in words of ours."""

    def complete(**_asked: Any) -> Sequence[str]:
        return choices

    if choices:
        action.completer = complete


def metavar(each: Declared) -> str:
    """Returns how help writes the value of an option; nothing for one without a value."""
    return "" if each.is_flag else each.option.metavar or "|".join(each.option.choices)


def help_of(each: Declared) -> str:
    """Returns what help says of an option, its default included where a command has one of its own."""
    default = each.default
    if default is None or default == () or each.is_flag:
        return each.option.help
    return f"{each.option.help.removesuffix('.')} (default: {default})."


def _parser_of(each: Declared) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        try:
            return each.parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return parse


def read(parser: Parser, arguments: Sequence[str], kind: Callable[..., Value], options: Group | None = None) -> Value:
    """Returns the value that the arguments mean.

    Args:
      parser: from `make_parser`.
      arguments: words of the command line.
      kind: the dataclass whose options the parser has.
      options: those of the pipeline that it also has; those that the command line names become the field ``clip``.

    Raises:
      ValueError: a value is out of its range.
    """
    parsed = vars(parser.read(arguments))
    own = _said(parsed, declared(kind))
    return kind(**own) if options is None else kind(**own, clip=_said(parsed, options))


def _said(parsed: Mapping[str, Any], group: Group) -> dict[str, Any]:
    """Returns the values that were given, checked; several of one option are a tuple."""
    values: dict[str, Any] = {}
    for name, each in group.items():
        value = parsed[name]
        if value is None or value == []:
            continue
        for one in value if isinstance(value, list) else [value]:
            each.check(one, called=each.called)
        values[name] = tuple(value) if isinstance(value, list) else value
    return values
