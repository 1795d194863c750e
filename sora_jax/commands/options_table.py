"""The options of a clip as a Markdown table, for the documentation: ``python -m sora_jax.commands.options_table``.

Invariant: every row is made from a declaration in `sora_jax.pipeline.settings`; nothing about an option is written here.
"""

import sys
from collections.abc import Mapping, Sequence

from sora_jax import shell
from sora_jax.commands.spelling import Spelling
from sora_jax.pipeline import command_line
from sora_jax.pipeline.option import Declared, declared
from sora_jax.pipeline.settings import ClipOptions, SamplingOptions

_HEAD = ("Python", "command line", "value", "Open-Sora", "what it is")


def table() -> str:
    """Returns one table for each group of options, each under its heading."""
    parts = []
    for group in (ClipOptions, SamplingOptions, Spelling):
        heading = str(group.__doc__).splitlines()[0].removesuffix(".")
        rows = [_HEAD, ("---",) * len(_HEAD), *(_row(each) for each in declared(group).values())]
        parts += [f"**{heading}**", "", *(f"| {' | '.join(row)} |" for row in rows), ""]
    return "\n".join(parts).rstrip()


def _row(each: Declared) -> Sequence[str]:
    option = each.option
    flags = ", ".join(f"`{flag}`" for flag in each.flags) if option.on_command_line else ""
    default = "" if option.default is None or not option.on_command_line else f"`{option.default}`"
    return (
        "" if each.name in declared(Spelling) else f"`{each.name}`",
        flags,
        _escaped(each.expected),
        default,
        _escaped(option.help),
    )


def _escaped(text: str) -> str:
    return text.replace("|", "\\|")


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the tables and returns the exit code."""
    return shell.run(_command, arguments)


def _command(arguments: Sequence[str]) -> None:
    groups: Mapping[str, command_line.Group] = {}
    command_line.make_parser("python -m sora_jax.commands.options_table", str(__doc__).splitlines()[0], groups).read(arguments)
    shell.result(table())


if __name__ == "__main__":
    sys.exit(main())
