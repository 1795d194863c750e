"""What commands keep from one run to the next in the user's cache folder: compiled programs and caption features.

Invariant: a cache saves time and decides nothing; one that cannot be written, unless it was named, is done without.  What
lies in the folders is JAX's and `caption_cache`'s business.
"""

import os
import warnings
from pathlib import Path

from sora_jax import files


def use_compile_cache(choice: str | None) -> None:
    """Keeps compiled programs in a folder: ``off``, a path, or None for ``sora_jax/compiled`` in the user's cache.

    JAX_COMPILATION_CACHE_DIR in the environment decides where None is given.

    Raises:
      OSError: the folder that was asked for cannot be written.
    """
    if choice == "off":
        return
    folder = choice or os.environ.get("JAX_COMPILATION_CACHE_DIR") or _user_cache("compiled")
    if folder is None:
        return
    try:
        files.refuse_unwritable(folder)
    except OSError as error:
        if choice:
            raise
        warnings.warn(
            f"compiled programs are not kept: {error.strerror or error}; --compile-cache names another folder", stacklevel=2
        )
        return
    import jax

    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def caption_folder(choice: str | None) -> Path | None:
    """Returns where caption features are kept: a folder that was given, else in the user's cache; None for ``off``."""
    if choice == "off":
        return None
    return Path(choice) if choice else _user_cache("captions")


def _user_cache(name: str) -> Path | None:
    """Returns a folder in the user's cache; None where the user has no home."""
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(base) if base else Path.home() / ".cache") / "sora_jax" / name
    except RuntimeError:
        return None
