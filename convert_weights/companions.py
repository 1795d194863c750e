"""The small files that travel with a network: T5's tokenizer, and the defaults of generation next to STDiT3.

Invariant: they are read and judged before any weight is converted, and they are in the model directory before its network is,
so that no interruption loses them.  What tokenizers and settings mean is not known here.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from convert_weights.errors import SourceError, printable
from convert_weights.json_text import parse_object, read_object
from convert_weights.recognise import HEAD_BYTES, what_is
from convert_weights.source_file import OpenFile
from sora_jax.files import write_durably
from sora_jax.storage.directory import Manifest, read_model_file
from sora_jax.storage.location import Location, local_path
from sora_jax.storage.site import place_of
from sora_jax.storage.writer import update_model_file

TOKENIZER_FILES = ("tokenizer.json", "spiece.model")
DEFAULTS_FILE = "generation_defaults.json"
_MAX_TOKENIZER_BYTES = 16 << 20  # T5's has 2.4 MB
_MAX_DEFAULTS_BYTES = 1 << 16


class Companions:
    """What travels with one network; empty for the VAE, and where the source has none."""

    def __init__(self, network: str, folder: Path, tokenizer: Path | None = None):
        """Reads the files next to the weights, or ``tokenizer`` (a file, or the folder of one) from elsewhere.

        Raises:
          SourceError: one of them cannot be read, or is something else; or a network without a tokenizer gets one.
        """
        if tokenizer is not None and network != "t5":
            raise SourceError(f"a tokenizer belongs to t5, not to {network}.")
        self.tokenizer = _tokenizer(folder, tokenizer) if network == "t5" else None
        self.defaults = _read_defaults(folder) if network == "stdit3" else None

    def write(self, directory: Path) -> None:
        """Puts them into a model directory, each whole or not at all, and names them in model.json."""
        fields: dict[str, Any] = {}
        if self.tokenizer is not None:
            name, content = self.tokenizer
            write_durably(directory / name, content)
            fields["tokenizer"] = name
        if self.defaults is not None:
            fields["defaults"] = self.defaults
        if fields:
            update_model_file(directory, **fields)

    def origin(self) -> dict[str, Any]:
        """Returns what ``network.json`` says about them."""
        if self.tokenizer is None:
            return {}
        name, content = self.tokenizer
        return {"tokenizer": {"name": name, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}}


def tokenizer_fault(manifest: Manifest) -> str | None:
    """Returns what is wrong with the tokenizer that was recorded when a network was converted, or None."""
    recorded = manifest.origin.get("tokenizer")
    if not isinstance(recorded, Mapping):
        return None
    name = str(recorded.get("name"))
    if name not in TOKENIZER_FILES:
        return f"the recorded tokenizer {printable(name)!r} has no name of a tokenizer"
    path = manifest.path.parent / name
    try:
        content = _read_ours(path)
    except SourceError as error:
        return f"the tokenizer that came with it is gone: {error}"
    if hashlib.sha256(content).hexdigest() != recorded.get("sha256"):
        return f"{path} is not the tokenizer that came with it (its checksum differs)"
    return None


def differs_from_source(manifest: Manifest, folder: Path, elsewhere: Path | None = None) -> str | None:
    """Returns the fault if a model directory's tokenizer differs from that of the source, or from elsewhere, else None."""
    theirs = Companions(manifest.network, folder, elsewhere).tokenizer
    if theirs is None:
        return None
    name, content = theirs
    try:
        if _read_ours(manifest.path.parent / name) == content:
            return None
    except SourceError:
        pass
    return f"source: {elsewhere or folder / name} is not the tokenizer of {manifest.path.parent}"


def export(manifest: Manifest) -> dict[str, bytes]:
    """Returns the files that belong next to a network's PyTorch weights, by name.

    Raises:
      SourceError: model.json names a tokenizer that is missing or unreadable.
    """
    directory = local_path(manifest.path.parent)
    index = read_model_file(directory)
    if manifest.network == "t5" and (name := index.get("tokenizer")):
        if os.path.basename(name) != name or Path(name).suffix not in (".json", ".model"):
            raise SourceError(f"{directory / 'model.json'} names a tokenizer {printable(name)!r} outside its folder.")
        return {"tokenizer.json" if name.endswith(".json") else "spiece.model": _read(directory / name)}
    if manifest.network == "stdit3" and index.get("defaults"):
        return {DEFAULTS_FILE: json.dumps({"defaults": index["defaults"]}, indent=1).encode() + b"\n"}
    return {}


def _tokenizer(folder: Path, elsewhere: Path | None) -> tuple[str, bytes] | None:
    if elsewhere is None or elsewhere.is_dir():
        found = _read_tokenizer(elsewhere or folder)
        if found is None and elsewhere is not None:
            raise SourceError(f"{elsewhere} holds no tokenizer; expected {' or '.join(TOKENIZER_FILES)}.")
        return found
    name = "tokenizer.json" if elsewhere.suffix == ".json" else "spiece.model"
    if elsewhere.suffix not in (".json", ".model"):
        raise SourceError(f"{elsewhere} is no tokenizer; expected {' or '.join(TOKENIZER_FILES)}.")
    return name, _read(elsewhere)


def _read_tokenizer(folder: Path) -> tuple[str, bytes] | None:
    name = next((name for name in TOKENIZER_FILES if (folder / name).is_file()), None)
    return None if name is None else (name, _read(folder / name))


def _read_ours(location: Location) -> bytes:
    """Returns the tokenizer of a model directory, which may lie on a network.

    Raises:
      SourceError: it cannot be read.
    """
    if isinstance(location, Path):
        return _read(location)
    try:
        return place_of(location.parent).data(location.name, _MAX_TOKENIZER_BYTES)
    except OSError as error:
        raise SourceError(f"{location} cannot be read ({error.strerror}).") from error


def _read(path: Path) -> bytes:
    with OpenFile(path) as file:
        size = file.identity.size
        if size > _MAX_TOKENIZER_BYTES:
            raise SourceError(f"{path} has {size} bytes; a tokenizer has less than {_MAX_TOKENIZER_BYTES}.")
        content = file.read_bytes(0, size)
    if answer := what_is(content[:HEAD_BYTES]):
        raise SourceError(f"{path} {answer}.")
    if path.suffix == ".json":
        parse_object(content, path, "a tokenizer")
    return content


def _read_defaults(folder: Path) -> dict[str, Any] | None:
    path = folder / DEFAULTS_FILE
    if not path.is_file():
        return None
    defaults = read_object(path, "an object of defaults", max_bytes=_MAX_DEFAULTS_BYTES).get("defaults")
    if not isinstance(defaults, dict):
        raise SourceError(f"{path} is not an object of defaults (expected its entry defaults to be an object).")
    return defaults
