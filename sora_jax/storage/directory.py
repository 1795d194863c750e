"""The model directory on disk: its networks, their manifests, its index.

Invariant: a manifest is believed only after every number in it was checked (`manifest_file`), and it is one generation of a
network: what was replaced afterwards is an error where it is read (`reader`), never a mixture.  Nothing here reads an array,
writes a network (`writer`) or knows its modules (`checkpoint`).
"""

import dataclasses
import errno
import functools
import hashlib
import json
import shlex
from collections.abc import Collection, Mapping
from pathlib import Path, PurePath
from typing import Any

from sora_jax.config import NETWORKS
from sora_jax.storage import manifest_file
from sora_jax.storage.arrays import FORMATS, Parameter, chunk_name
from sora_jax.storage.location import Address, Location, Named, location_of
from sora_jax.storage.manifest_file import Fault
from sora_jax.storage.place import NotRegular, Unreachable
from sora_jax.storage.site import place_of

FORMAT_VERSION = FORMATS[-1]  # the one that is written
NETWORK_FILE = "network.json"
MODEL_FILE = "model.json"

_ADVICE = {  # for what the system says, where writing the network again would not help
    errno.EMFILE: "allow more open files (ulimit -n 4096).",
    errno.ENFILE: "the system has too many open files; close some programs.",
    errno.EACCES: "give this user the right to read it.",
    errno.EPERM: "give this user the right to read it.",
    errno.ENOMEM: "free some memory.",
}
_OTHER_ADVICE = "check the disk."


class ModelDirectoryError(ValueError):
    """A model directory is missing, incomplete or damaged."""


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What ``network.json`` says, and where it lies.

    Attributes:
      path: the network's directory, a folder or an address.
      network: ``t5``, ``stdit3`` or ``vae``.
      config: the network's configuration.
      dtype: stored dtype asked for: ``float32``, ``bfloat16`` or ``int8`` (then scales and vectors are float32).
      parameters: every stored array by flat name; int8 arrays come with a ``<name>_scale``.
      origin: source files with sha256, tied and ignored source arrays; empty for a network trained here.
      format_version: format of the files.
      generation: sha256 of ``network.json`` as it was read; empty where it was not.
    """

    path: Location
    network: str
    config: Any
    dtype: str
    parameters: Mapping[str, Parameter]
    origin: Mapping[str, Any]
    format_version: int = FORMAT_VERSION
    generation: str = dataclasses.field(default="", compare=False)

    @functools.cached_property
    def layers(self) -> tuple[str, ...]:
        """Layer names in execution order."""
        return self.config.layers

    @functools.cached_property
    def _by_layer(self) -> Mapping[str, list[str]]:
        found: dict[str, list[str]] = {layer: [] for layer in self.layers}
        for name in sorted(self.parameters):
            found[layer_of(name, found)].append(name)
        return found

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(parameter.nbytes for parameter in self.parameters.values())

    def names(self, layer: str) -> list[str]:
        """Returns the flat names of a layer's arrays, sorted."""
        return list(self._by_layer[layer])

    def layer_bytes(self, layer: str) -> int:
        """Returns the stored bytes of a layer."""
        return sum(self.parameters[name].nbytes for name in self.names(layer))

    def array_path(self, name: str) -> Location:
        """Returns the directory of a parameter's zarr3 array."""
        return self.path / array_location(name, self.layers)

    def chunk_path(self, name: str) -> Location:
        """Returns the file that holds a parameter's values."""
        return self.array_path(name) / chunk_name(self.parameters[name].shape)

    def to_dict(self) -> dict[str, Any]:
        """Returns the JSON object of ``network.json``."""
        return {
            "format_version": self.format_version,
            "network": self.network,
            "config": self.config.to_dict(),
            "dtype": self.dtype,
            "layers": list(self.layers),
            "origin": dict(self.origin),
            "parameters": {name: parameter.to_dict() for name, parameter in self.parameters.items()},
        }

    def text(self) -> str:
        """Returns ``network.json``, with one line for each parameter."""
        fields = self.to_dict()
        entries = ",\n".join(f"  {json.dumps(name)}: {json.dumps(entry)}" for name, entry in fields.pop("parameters").items())
        return json.dumps(fields, indent=1).removesuffix("\n}") + f',\n "parameters": {{\n{entries}\n }}\n}}\n'

    def values_text(self) -> str:
        """Returns what identifies the values: the text as format 1 has it, so that an upgrade changes no identity.

        Of arrays without a checksum of their own, it names those of their blocks.
        """
        plain = {
            name: dataclasses.replace(entry, rows=None, blocks=()) if entry.sha256 else entry
            for name, entry in self.parameters.items()
        }
        return dataclasses.replace(self, parameters=plain, format_version=1).text()


def open_network(directory: Named, network: str) -> Manifest:
    """Returns the manifest of a network in a model directory, a folder or an address.

    Raises:
      ModelDirectoryError: the network is missing (the message holds the command that adds it) or its manifest is unusable.
      ValueError: the directory is a URL that no model is read from.
    """
    location = location_of(directory)
    path = location / network
    file, again = path / NETWORK_FILE, _again(path, network)
    try:
        text = place_of(path).text(NETWORK_FILE, manifest_file.MAX_BYTES)
        fields = manifest_file.checked(manifest_file.parse(text), network)
    except (FileNotFoundError, NotADirectoryError):
        raise _missing(location, network) from None
    except OSError as error:
        raise ModelDirectoryError(_unreadable(file, error, again)) from error
    except UnicodeDecodeError:
        raise ModelDirectoryError(f"{file} is damaged: it is not UTF-8; {again}") from None
    except Fault as fault:
        state = f"{fault};" if fault.remedy else f"is damaged: it {fault};"
        raise ModelDirectoryError(f"{file} {state} {fault.remedy or again}") from None
    return Manifest(path, network, **fields, generation=generation_of(text))


def generation_of(text: str) -> str:
    """Returns what distinguishes the text of one ``network.json`` from another."""
    return hashlib.sha256(text.encode()).hexdigest()


def _missing(directory: Location, network: str) -> ModelDirectoryError:
    if isinstance(directory, Address):
        file = directory / network / NETWORK_FILE
        return ModelDirectoryError(f"{directory} has no {network} ({file} is missing); expected a model directory's address.")
    present = present_networks(directory)
    state = f"has only {', '.join(present)}" if present else _state_of(directory)
    command = f"sora-jax convert {network} SOURCE {shlex.quote(str(directory))}"
    embedded = "" if directory.exists() else ", or use the embedded model: pocket"
    return ModelDirectoryError(f"{directory} has no {network} (it {state}); add it with: {command}{embedded}")


def _again(path: Location, network: str) -> str:
    """Returns what helps where a file itself is at fault."""
    if isinstance(path, Address):
        return "copy the network there again from a folder that convert verify accepts."
    return f"convert {network} again with --overwrite."


def _state_of(directory: Path) -> str:
    """Describes what a path is instead of a model directory."""
    if not directory.exists():
        return "does not exist"
    return "is not a model directory" if directory.is_dir() else "is a file"


def present_networks(directory: Named) -> list[str]:
    """Returns the networks that a directory holds completely.

    Raises:
      ModelDirectoryError: a server does not say.
    """
    place = place_of(location_of(directory))
    try:
        return [network for network in NETWORKS if place.has(f"{network}/{NETWORK_FILE}")]
    except Unreachable as error:
        raise ModelDirectoryError(_unreadable(location_of(directory), error, "")) from error


def read_model_file(directory: Named) -> dict[str, Any]:
    """Returns ``model.json``: ``networks``, and if it has them ``tokenizer`` (a file name) and generation ``defaults``.

    Raises:
      ModelDirectoryError: the file cannot be read, or holds something else.
      ValueError: the directory is a URL that no model is read from.
    """
    location = location_of(directory)
    path = location / MODEL_FILE
    try:
        fields = manifest_file.parse(place_of(location).text(MODEL_FILE, manifest_file.MAX_BYTES))
        manifest_file.check_format(fields)
    except (FileNotFoundError, NotADirectoryError):
        fields = {"format_version": FORMAT_VERSION}
    except OSError as error:
        raise ModelDirectoryError(_unreadable(path, error, "remove it, and run the same command again.")) from error
    except UnicodeDecodeError:
        raise ModelDirectoryError(f"{path} is damaged: it is not UTF-8.") from None
    except Fault as fault:
        raise ModelDirectoryError(f"{path} {fault}{'; ' if fault.remedy else '.'}{fault.remedy}") from None
    for name, kind, what in (("tokenizer", str, "the name of a file"), ("defaults", dict, "an object of settings")):
        if not isinstance(fields.get(name, kind()), kind):
            raise ModelDirectoryError(f"{path}: {name} is {repr(fields[name])[:60]}; expected {what}.")
    tokenizer = fields.get("tokenizer", "")
    if tokenizer and (PurePath(tokenizer).name != tokenizer or "\\" in tokenizer or "\0" in tokenizer):
        raise ModelDirectoryError(f"{path}: tokenizer is {tokenizer[:60]!r}; expected the name of a file next to it.")
    return {**fields, "networks": present_networks(directory)}


def layer_of(name: str, layers: Collection[str]) -> str:
    """Returns the layer that a flat name belongs to.

    Raises:
      ValueError: no layer is a prefix of the name.
    """
    layer = manifest_file.layer_of(name, layers)
    if layer is None:
        raise ValueError(f"parameter {name} belongs to none of the layers {', '.join(layers)}.")
    return layer


def array_location(name: str, layers: tuple[str, ...]) -> Path:
    """Returns ``<layer>/<dotted rest>`` for a flat name."""
    layer = layer_of(name, layers)
    return Path(layer, name[len(layer) + 1 :])


def damaged(manifest: Manifest, name: str, problem: str | OSError) -> ModelDirectoryError:
    """Returns the error of a parameter file, naming layer, file and remedy.

    Where the network is no longer the one that was opened, that is the fault.
    """
    if not isinstance(problem, Unreachable) and _is_replaced(manifest):
        return ModelDirectoryError(f"{manifest.path} was replaced or removed after it was opened; open the model again.")
    where = f"{manifest.network} layer {layer_of(name, manifest.layers)}: parameter file"
    again = _again(manifest.path, manifest.network)
    if isinstance(problem, OSError):
        return ModelDirectoryError(f"{where} {_unreadable(manifest.chunk_path(name), problem, again)}")
    return ModelDirectoryError(f"{where} {manifest.chunk_path(name)} {problem}; {again}")


def _is_replaced(manifest: Manifest) -> bool:
    if not manifest.generation:
        return False
    try:
        return generation_of(place_of(manifest.path).text(NETWORK_FILE, manifest_file.MAX_BYTES)) != manifest.generation
    except (OSError, ValueError):
        return isinstance(manifest.path, Path) and not manifest.path.exists()


def _unreadable(path: Location, error: OSError, again: str) -> str:
    """Returns what the system says of a file, and what helps: ``again`` where the file itself is at fault."""
    if isinstance(error, FileNotFoundError):
        return f"{path} is missing; {again}"
    if isinstance(error, NotRegular):
        return f"{path} {error.strerror}; {again}"
    if isinstance(error, Unreachable):
        return f"{path} cannot be read ({error.strerror}); {error.advice}"
    advice = _ADVICE.get(error.errno or 0, _OTHER_ADVICE)
    return f"{path} cannot be read ({error.strerror or error}); {advice}"
