"""JSON from files that nobody vouches for.

Invariant: whatever the bytes are, the answer is a value or one ``SourceError`` that names the file: size, nesting and doubled
keys are checked.  What the keys mean is decided by the callers.
"""

import json
from pathlib import Path
from typing import Any

from convert_weights.errors import SourceError, printable
from convert_weights.source_file import OpenFile
from sora_jax.storage.location import Location


def read_object(path: Path, what: str, *, max_bytes: int) -> dict[str, Any]:
    """Returns the JSON object in a file.

    Args:
      path: the file.
      what: says in errors what the file should be, such as ``a configuration``.
      max_bytes: longer files are refused before they are read.

    Raises:
      SourceError: the file cannot be read, is too long, or holds something else.
    """
    with OpenFile(path) as file:
        if file.identity.size > max_bytes:
            raise SourceError(f"{path} has {file.identity.size} bytes; {what} has at most {max_bytes}.")
        text = file.read_bytes(0, file.identity.size)
    return parse_object(text, path, what)


def parse_object(text: bytes, path: Location, what: str) -> dict[str, Any]:
    """Returns the JSON object that a part of a file holds; arguments and errors as for ``read_object``."""
    try:
        fields = json.loads(text, object_pairs_hook=_unique)
    except RecursionError:
        raise SourceError(f"{path} is not {what} (its JSON is nested too deeply).") from None
    except ValueError as error:
        raise SourceError(f"{path} is not {what} ({type(error).__name__}: {printable(error)}).") from error
    if not isinstance(fields, dict):
        raise SourceError(f"{path} is not {what} (it holds {printable(fields, 40)}; expected a JSON object).")
    return fields


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for name, value in pairs:
        if name in fields:
            raise ValueError(f"{printable(name)} occurs twice")
        fields[name] = value
    return fields
