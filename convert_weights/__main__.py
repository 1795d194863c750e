"""``python -m convert_weights`` is the command ``sora-jax convert``."""

import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code; an interrupt is one line also while its modules are imported."""
    try:
        from sora_jax.commands.convert import main as run
    except KeyboardInterrupt:
        print("sora-jax convert: interrupted.", file=sys.stderr)
        return 130
    return run(arguments)


if __name__ == "__main__":
    sys.exit(main())
