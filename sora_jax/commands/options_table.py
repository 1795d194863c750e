"""The options of ``generate`` as Markdown tables, for the documentation: ``python -m sora_jax.commands.options_table``.

Invariant: every row is made from a declaration; nothing about an option is written here.
"""

import html
import sys
from collections.abc import Mapping, Sequence

from sora_jax import shell
from sora_jax.commands.generate import GROUPS
from sora_jax.pipeline import command_line
from sora_jax.pipeline.clip_options import OPTIONS
from sora_jax.pipeline.option import Declared

_HEAD = ("option", "in Python", "value", "Open-Sora", "meaning")


def table() -> str:
    """Returns a table for each group of options, under its heading; the column Open-Sora holds defaults.

    An option that Python takes as an object (`merge`) follows the group in which the command line spells it out.
    """
    lines: list[str] = []
    for heading, group in GROUPS.items():
        objects = [each for each in OPTIONS.values() if not each.option.on_command_line and heading == _SPELT_OUT]
        lines += [f"## {heading[0].upper()}{heading[1:]}", "", f"| {' | '.join(_HEAD)} |", f"|{'---|' * len(_HEAD)}"]
        lines += [f"| {' | '.join(_row(each))} |" for each in [*group.values(), *objects]]
        lines += [""]
    return "\n".join(lines)


_SPELT_OUT = next(heading for heading, group in GROUPS.items() if "merge_odd" in group)


def _row(each: Declared) -> Sequence[str]:
    option = each.option
    spellings = ", ".join(each.flags)
    written = " ".join(part for part in ("" if option.positional else spellings, command_line.metavar(each)) if part)
    of_clip = each.name in OPTIONS
    return (
        f"<code>{_cell(written)}</code>" if option.on_command_line else "",
        f"`{each.name}`" if of_clip else "",
        "" if each.is_flag and option.on_command_line else _cell(each.expected),
        f"`{option.default}`" if of_clip and option.on_command_line and option.default is not None else "",
        _cell(command_line.help_of(each)),
    )


def _cell(text: str) -> str:
    """Returns a text for a cell of a table; a bar in backquotes would be the end of the cell for one of the two renderers."""
    return html.escape(text, quote=False).replace("|", "&#124;")


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the tables and returns the exit code."""
    return shell.run(_command, arguments)


def _command(arguments: Sequence[str]) -> None:
    groups: Mapping[str, command_line.Group] = {}
    command_line.make_parser("python -m sora_jax.commands.options_table", str(__doc__).splitlines()[0], groups).read(arguments)
    shell.result(table().rstrip())


if __name__ == "__main__":
    sys.exit(main())
