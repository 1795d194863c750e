"""``python -m convert_weights`` is the command ``sora-jax convert``."""

import sys
from collections.abc import Sequence

from sora_jax import shell


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code; an interrupt is one line also while its modules are imported."""

    def command(arguments: Sequence[str]) -> int:
        from sora_jax.commands import convert

        return convert.main(arguments)

    return shell.run(command, arguments)


if __name__ == "__main__":
    sys.exit(main())
