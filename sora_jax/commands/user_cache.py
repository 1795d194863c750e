"""What commands keep in the user's cache folder: compiled programs, caption features and the maps of previews.

Invariant: a cache changes no result; one that cannot be used, unless it was named, is done without.  Compiled
programs are executed, so they are kept only where nobody else can put any.  What lies in the folders is JAX's and
`caption_cache`'s business.
"""

import contextlib
import os
import stat
import sys
import warnings
from pathlib import Path

from sora_jax import files

_ENVIRONMENT = "JAX_COMPILATION_CACHE_DIR"  # JAX reads it too
_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


def use_compile_cache(choice: str | None) -> None:
    """Keeps compiled programs in a folder: ``off``, a path, or None for ``sora_jax/compiled`` in the user's cache.

    JAX_COMPILATION_CACHE_DIR in the environment decides where ``choice`` is None.

    Raises:
      OSError: the folder that was asked for cannot be written.
      ValueError: the folder that was asked for belongs to somebody else, or others may write into it.
    """
    folder = None if choice == "off" else choice or os.environ.get(_ENVIRONMENT) or _user_cache("compiled")
    if folder is None:
        _keep_nothing()
        return
    try:
        with contextlib.suppress(OSError):  # the next line says why
            Path(folder).mkdir(mode=0o700, parents=True, exist_ok=True)
        files.refuse_unwritable(folder)
        _refuse_shared(Path(folder))
    except (OSError, ValueError) as error:
        if choice:
            raise
        reason = getattr(error, "strerror", None) or error
        warnings.warn(f"compiled programs are not kept: {reason}; --compile-cache names another folder", stacklevel=2)
        _keep_nothing()
        return
    import jax

    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def _refuse_shared(folder: Path) -> None:
    """Refuses a folder of programs into which somebody else could put one, to be executed here."""
    status = folder.stat()
    if status.st_uid != os.getuid():
        raise ValueError(f"{folder} belongs to another user (number {status.st_uid}), whose programs would be executed here")
    if status.st_mode & _OTHERS_WRITE:
        raise ValueError(f"others may write programs into {folder}, to be executed here: empty it and chmod go-w it")


def _keep_nothing() -> None:
    """Turns JAX's compile cache off, whether or not JAX has read the environment already."""
    os.environ.pop(_ENVIRONMENT, None)
    if "jax" in sys.modules:
        sys.modules["jax"].config.update("jax_compilation_cache_dir", None)


def caption_folder(choice: str | None) -> Path | None:
    """Returns where caption features are kept: the folder of that name, else in the user's cache; None for ``off``.

    Raises:
      OSError: the folder that was asked for cannot be written.
    """
    if choice == "off":
        return None
    if choice:
        files.refuse_unwritable(choice)
    return Path(choice) if choice else _user_cache("captions")


def preview_folder() -> Path | None:
    """Returns where maps of previews are kept, in the user's cache; None where nothing can be written there."""
    folder = _user_cache("previews")
    if folder is None:
        return None
    try:
        files.refuse_unwritable(folder)
    except OSError:
        return None
    return folder


def _user_cache(name: str) -> Path | None:
    """Returns a folder in the user's cache; None if the user has no home."""
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(base) if base else Path.home() / ".cache") / "sora_jax" / name
    except RuntimeError:
        return None
