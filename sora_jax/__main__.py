"""``python -m sora_jax`` is the ``sora-jax`` command."""

import sys

from sora_jax.commands.main import main

if __name__ == "__main__":
    sys.exit(main())
