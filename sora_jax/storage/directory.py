"""The model directory on disk: names, manifests, and reading arrays.

Invariant: a parameter is one zarr3 array whose single chunk file is its raw little-endian bytes, so tensorstore, ``preadv``
and ``mmap`` read the same thing, and ``network.json`` says what must be there.  Reading checks existence and size, which
costs nothing; checksums are compared by ``sora-jax convert verify``.  Nothing here writes a network (``network_writer``)
or knows its modules (``checkpoint``).
"""

import dataclasses
import errno
import hashlib
import json
import math
import mmap
import os
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from sora_jax.config import NETWORKS, STDiT3Config, T5Config, VAEConfig

FORMAT_VERSION = 1
NETWORK_FILE = "network.json"
MODEL_FILE = "model.json"
CONFIGS: dict[str, Any] = {"t5": T5Config, "stdit3": STDiT3Config, "vae": VAEConfig}
STORED_DTYPES = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "int8": np.dtype(np.int8),
}

_MMAP_FROM_BYTES = 1 << 20  # smaller arrays are read: a mapping costs a file descriptor and a page


class ModelDirectoryError(ValueError):
    """A model directory is missing, incomplete or damaged."""


@dataclasses.dataclass(frozen=True)
class Parameter:
    """One stored array; ``source`` names the PyTorch array it was made from (name, shape, dtype), if any."""

    shape: tuple[int, ...]
    dtype: str
    sha256: str
    source: Mapping[str, Any] | None = None

    @property
    def nbytes(self) -> int:
        """Size of the raw bytes."""
        return math.prod(self.shape) * STORED_DTYPES[self.dtype].itemsize

    def to_dict(self) -> dict[str, Any]:
        """Returns the JSON object of this parameter."""
        fields = {"shape": list(self.shape), "dtype": self.dtype, "sha256": self.sha256}
        return fields | ({"source": dict(self.source)} if self.source else {})


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What ``network.json`` says, and where it lies.

    Attributes:
      path: the network's directory.
      network: ``t5``, ``stdit3`` or ``vae``.
      config: the network's configuration.
      dtype: stored dtype asked for: ``float32``, ``bfloat16`` or ``int8`` (then scales and vectors are float32).
      parameters: every stored array by flat name; int8 arrays have a ``<name>_scale`` beside them.
      origin: source files with sha256, tied and ignored source arrays; empty for a network trained here.
    """

    path: Path
    network: str
    config: Any
    dtype: str
    parameters: Mapping[str, Parameter]
    origin: Mapping[str, Any]

    @property
    def layers(self) -> tuple[str, ...]:
        """Layer names in execution order."""
        return self.config.layers

    def names(self, layer: str) -> list[str]:
        """Returns the flat names of a layer's arrays, sorted."""
        return sorted(name for name in self.parameters if name.startswith(layer + "."))

    def layer_bytes(self, layer: str) -> int:
        """Returns the stored bytes of a layer."""
        return sum(self.parameters[name].nbytes for name in self.names(layer))

    def array_path(self, name: str) -> Path:
        """Returns the directory of a parameter's zarr3 array."""
        return self.path / array_location(name, self.layers)

    def chunk_path(self, name: str) -> Path:
        """Returns the file of a parameter's raw bytes."""
        return self.array_path(name) / chunk_name(self.parameters[name].shape)

    def to_dict(self) -> dict[str, Any]:
        """Returns the JSON object of ``network.json``."""
        return {
            "format_version": FORMAT_VERSION,
            "network": self.network,
            "config": self.config.to_dict(),
            "dtype": self.dtype,
            "layers": list(self.layers),
            "origin": dict(self.origin),
            "parameters": {name: parameter.to_dict() for name, parameter in self.parameters.items()},
        }


def open_network(directory: str | os.PathLike[str], network: str) -> Manifest:
    """Returns the manifest of a network in a model directory.

    Raises:
      ModelDirectoryError: the network is missing (the message holds the command that adds it) or its manifest is unusable.
    """
    path = Path(directory) / network
    try:
        fields = json.loads((path / NETWORK_FILE).read_text("utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        present = present_networks(directory)
        state = f"has only {', '.join(present)}" if present else _state_of(Path(directory))
        command = f"sora-jax convert {network} SOURCE {shlex.quote(str(directory))}"
        raise ModelDirectoryError(f"{directory} has no {network} (it {state}); add it with: {command}") from None
    except (OSError, ValueError) as error:
        raise ModelDirectoryError(
            f"{path / NETWORK_FILE} cannot be read ({error}); convert {network} again with --overwrite."
        ) from error
    return _manifest(path, network, fields)


def _state_of(directory: Path) -> str:
    """Returns what is there in place of a model directory."""
    if not directory.exists():
        return "does not exist"
    return "is not a model directory" if directory.is_dir() else "is a file"


def _manifest(path: Path, network: str, fields: Any) -> Manifest:
    try:
        if fields["format_version"] != FORMAT_VERSION:
            raise ModelDirectoryError(
                f"{path / NETWORK_FILE} has format version {fields['format_version']}; this release reads {FORMAT_VERSION}."
            )
        parameters = {
            name: Parameter(tuple(entry["shape"]), entry["dtype"], entry["sha256"], entry.get("source"))
            for name, entry in fields["parameters"].items()
        }
        config = CONFIGS[network].from_dict(fields["config"])
        manifest = Manifest(path, network, config, fields["dtype"], parameters, fields["origin"])
        if fields["network"] != network or any(entry.dtype not in STORED_DTYPES for entry in parameters.values()):
            raise ValueError(f"network {fields['network']!r}, or a dtype that is not one of {', '.join(STORED_DTYPES)}")
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, ModelDirectoryError):
            raise
        raise ModelDirectoryError(
            f"{path / NETWORK_FILE} is damaged ({type(error).__name__}: {error}); convert {network} again with --overwrite."
        ) from error
    return manifest


def present_networks(directory: str | os.PathLike[str]) -> list[str]:
    """Returns the networks that a directory holds completely."""
    return [network for network in NETWORKS if (Path(directory) / network / NETWORK_FILE).is_file()]


def read_model_file(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """Returns ``model.json``: ``networks``, and where given ``tokenizer`` (a file name) and generation ``defaults``.

    Raises:
      ModelDirectoryError: the file cannot be read, or holds something else.
    """
    path = Path(directory) / MODEL_FILE
    try:
        fields = json.loads(path.read_text("utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        fields = {"format_version": FORMAT_VERSION}
    except (OSError, ValueError) as error:
        raise ModelDirectoryError(f"{path} cannot be read: {error}") from error
    if not isinstance(fields, dict) or fields.get("format_version") != FORMAT_VERSION:
        raise ModelDirectoryError(f"{path} is not a model index of format version {FORMAT_VERSION}.")
    for name, kind, what in (("tokenizer", str, "the name of a file"), ("defaults", dict, "an object of settings")):
        if not isinstance(fields.get(name, kind()), kind):
            raise ModelDirectoryError(f"{path}: {name} is {fields[name]!r}; expected {what}.")
    return {**fields, "networks": present_networks(directory)}


def layer_of(name: str, layers: tuple[str, ...]) -> str:
    """Returns the layer that a flat name belongs to.

    Raises:
      ValueError: no layer is a prefix of the name.
    """
    for layer in layers:
        if name.startswith(layer + "."):
            return layer
    raise ValueError(f"parameter {name} belongs to none of the layers {', '.join(layers)}.")


def array_location(name: str, layers: tuple[str, ...]) -> Path:
    """Returns ``<layer>/<dotted rest>`` for a flat name."""
    layer = layer_of(name, layers)
    return Path(layer, name[len(layer) + 1 :])


def chunk_name(shape: tuple[int, ...]) -> str:
    """Returns the path of the only chunk inside an array's directory."""
    return "/".join(["c", *("0" for _ in shape)])


def array_metadata(shape: tuple[int, ...], dtype: str) -> dict[str, Any]:
    """Returns the ``zarr.json`` of a parameter: one uncompressed chunk, as tensorstore itself would write it."""
    codec: dict[str, Any] = {"name": "bytes"}
    if STORED_DTYPES[dtype].itemsize > 1:
        codec["configuration"] = {"endian": "little"}
    return {
        "chunk_grid": {"configuration": {"chunk_shape": list(shape)}, "name": "regular"},
        "chunk_key_encoding": {"name": "default"},
        "codecs": [codec],
        "data_type": dtype,
        "fill_value": 0 if dtype == "int8" else 0.0,
        "node_type": "array",
        "shape": list(shape),
        "zarr_format": 3,
    }


def tensorstore_spec(path: Path) -> dict[str, Any]:
    """Returns the tensorstore spec of a stored array; a deleted chunk is then an error and not zeros."""
    return {
        "driver": "zarr3",
        "kvstore": {"driver": "file", "path": str(path)},
        "store_data_equal_to_fill_value": True,
        "fill_missing_data_reads": False,
    }


def read_array(manifest: Manifest, name: str) -> np.ndarray:
    """Returns a stored array, read-only; large ones are mapped, so that nothing is read before it is used.

    Raises:
      ModelDirectoryError: the file is missing, unreadable or of the wrong size.
    """
    parameter, path = manifest.parameters[name], manifest.chunk_path(name)
    dtype = STORED_DTYPES[parameter.dtype]
    try:
        with open(path, "rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            if size != parameter.nbytes:
                raise damaged(manifest, name, f"has {size} bytes, expected {parameter.nbytes}")
            if size >= _MMAP_FROM_BYTES:
                data: Any = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            else:
                data = file.read()
    except OSError as error:
        raise damaged(manifest, name, error) from error
    return np.frombuffer(data, dtype).reshape(parameter.shape)


def verify_layer(manifest: Manifest, layer: str) -> None:
    """Refuses a layer whose bytes are not those that were recorded when it was written; reads all of them.

    Raises:
      ModelDirectoryError: names the file.
    """
    for name in manifest.names(layer):
        raw = read_array(manifest, name).reshape(-1).view(np.uint8).data
        if hashlib.sha256(raw).hexdigest() != manifest.parameters[name].sha256:
            raise damaged(manifest, name, "has other bytes than recorded")


def damaged(manifest: Manifest, name: str, problem: str | OSError) -> ModelDirectoryError:
    """Returns the error of a parameter file, naming layer, file and remedy."""
    repair = f"convert {manifest.network} again with --overwrite."
    if isinstance(problem, FileNotFoundError):
        problem = "is missing"
    elif isinstance(problem, OSError):
        if problem.errno == errno.EMFILE:
            repair = "allow more open files (ulimit -n 4096)."
        problem = f"cannot be read ({problem.strerror or problem})"
    layer = layer_of(name, manifest.layers)
    return ModelDirectoryError(
        f"{manifest.network} layer {layer}: parameter file {manifest.chunk_path(name)} {problem}; {repair}"
    )
