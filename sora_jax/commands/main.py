"""The ``sora-jax`` command: which commands there are; each is a module of its own.

Invariant: only the module of the command that was asked for is imported, and its ``main`` takes the remaining arguments.
`sora_jax.shell` does what all commands share.
"""

import importlib
from collections.abc import Mapping, Sequence

from sora_jax import shell
from sora_jax.shell import BAD_INPUT, FAILED, INTERRUPTED, OK, TERMINATED, Parser
from sora_jax.version import __version__

__all__ = ["BAD_INPUT", "FAILED", "INTERRUPTED", "OK", "TERMINATED", "main"]

# What each command does, and its module.
COMMANDS: Mapping[str, tuple[str, str]] = {
    "generate": ("make clips from prompts", "sora_jax.commands.generate"),
    "calibrate": ("find a reuse plan for a model", "sora_jax.commands.calibrate"),
    "tune": ("search the best way of sampling a model", "sora_jax.commands.tune"),
    "convert": ("convert PyTorch checkpoints into a model directory", "sora_jax.commands.convert"),
    "export": ("write a model as StableHLO, ONNX or Core ML", "sora_jax.commands.export"),
    "run-exported": ("make a clip with an exported model", "sora_jax.commands.run_exported"),
    "plan": ("compile a model for hardware that is not here", "sora_jax.commands.plan"),
    "page": ("serve a local page to try a model", "sora_jax.commands.page"),
    "inspect": ("show what a clip or a model directory holds", "sora_jax.commands.inspect"),
    "list": ("list presets, resolutions or the words of a model", "sora_jax.commands.list"),
    "compare": ("measure how two clips differ", "sora_jax.commands.compare"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code; ``arguments`` default to those of the process."""
    return shell.run(_command, arguments)


def _command(arguments: Sequence[str]) -> int | None:
    parser = Parser(prog="sora-jax", description="Text to video with Open-Sora 1.2's architecture.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND", dest="command")
    for name, (summary, _) in COMMANDS.items():
        commands.add_parser(name, help=summary, prog=f"sora-jax {name}", add_help=False)
    typed = shell.typed()
    if typed is not None:  # the shell asks what may follow
        if not typed or typed[0] not in COMMANDS:
            shell.complete(parser)
        shell.complete_behind_command()
        arguments = typed[:1]
    name = parser.parse_args(arguments[:1]).command
    module = importlib.import_module(COMMANDS[name][1])
    # A command of verbs has a main of its own, which says how an interrupted one goes on.
    return (module.main if hasattr(module, "main") else module.command)(arguments[1:])
