"""A network of a model directory as a standard orbax checkpoint, and back.

Invariant: the checkpoint is one flat dictionary of arrays by our names, which orbax restores without this package, spread over
devices if the caller says how; network, configuration and stored dtype are in its custom metadata. What comes back was compared
with the network's shapes and types before a value was read, and is read one layer at a time; values of a checkpoint of ours are
compared with the checksums in its metadata, because orbax has none. Writing holds the network in memory: orbax takes it whole.
"""

import contextlib
import hashlib
import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from convert_weights.errors import SourceError, printable, shown
from convert_weights.rules import ConversionError
from convert_weights.source_config import resolve
from convert_weights.values import not_finite
from sora_jax import files
from sora_jax.config import CONFIGS
from sora_jax.storage.arrays import STORED_DTYPES
from sora_jax.storage.checkpoint import load_parameters, stored_arrays
from sora_jax.storage.directory import Manifest, layer_of
from sora_jax.storage.quantisation import is_scale
from sora_jax.storage.reader import Reader
from sora_jax.storage.writer import NetworkWriter, check_dtype
from sora_jax.streaming import fitting

_MARK = "_CHECKPOINT_METADATA"


def is_orbax(path: str | os.PathLike[str]) -> bool:
    """Returns whether a folder is an orbax checkpoint."""
    return (Path(path) / _MARK).is_file()


def to_orbax(manifest: Manifest, path: str | os.PathLike[str], *, dtype: str | None = None, overwrite: bool = False) -> Path:
    """Writes the parameters of a network as one orbax checkpoint and returns its folder.

    Args:
      manifest: the network.
      path: the folder that becomes the checkpoint.
      dtype: ``float32`` or ``bfloat16``; None keeps what is stored, int8 with its ``_scale`` arrays.
      overwrite: replace an existing folder.

    Raises:
      ModelDirectoryError: an array is damaged.
      FileExistsError: the folder exists and ``overwrite`` is False.
    """
    import orbax.checkpoint as ocp

    path = Path(path)
    files.refuse_unwritable(path.parent)
    with files.whole_file(path, overwrite=overwrite) as temporary:
        flat = Reader(manifest).arrays(list(manifest.parameters)) if dtype is None else load_parameters(manifest, dtype=dtype)
        described = {"network": manifest.network, "config": manifest.config.to_dict(), "dtype": dtype or manifest.dtype}
        described["sha256"] = {name: _digest(array) for name, array in flat.items()}
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(temporary.absolute(), flat, custom_metadata={"sora_jax": described})
    return path


def from_orbax(
    path: str | os.PathLike[str],
    directory: str | os.PathLike[str],
    *,
    network: str | None = None,
    config_file: Path | None = None,
    dtype: str | None = None,
    overwrite: bool = False,
) -> Manifest:
    """Writes the flat dictionary of an orbax checkpoint as a network of a model directory and returns its manifest.

    Args:
      path: the folder of the checkpoint.
      directory: the model directory.
      network: ``t5``, ``stdit3`` or ``vae``; not needed for a checkpoint that `to_orbax` wrote.
      config_file: its configuration, likewise.
      dtype: stored dtype; default: that of the arrays.
      overwrite: replace an existing network.

    Raises:
      SourceError: it is no orbax checkpoint of a flat dictionary, or cannot be read.
      ConversionError: arrays are unknown, missing, mis-shaped, mistyped or not finite; one report.
      ModelDirectoryError: the network exists, or is being written.
    """
    path = Path(path)
    found, described = _metadata(path)
    network = network or described.get("network")
    if not isinstance(network, str) or network not in CONFIGS:
        raise SourceError(f"{path} does not say which network it is; name it with --network ({', '.join(CONFIGS)}).")
    config = _config(path, network, config_file, described)
    own = "int8" if any(kind == "int8" for _, kind in found.values()) else next((kind for _, kind in found.values()), "float32")
    stored = dtype or own
    check_dtype(network, stored)
    if own == "int8" and stored != "int8":
        raise SourceError(f"{path} holds int8; write it with to-orbax --dtype float32 to store it as {stored}.")
    faults = _faults(found, fitting.stored_arrays(network, config, "int8" if own == "int8" else own))
    if faults:
        raise ConversionError(f"{path} does not fit {network}", faults)
    identity = {"orbax": str(path.resolve()), "mtime_ns": (path / _MARK).stat().st_mtime_ns}
    with NetworkWriter(Path(directory), network, config, dtype=stored, overwrite=overwrite, identity=identity) as writer:
        try:
            _copy(path, found, writer, described.get("sha256"), as_is=own == "int8")
        except (ConversionError, SourceError):
            writer.discard()
            raise
        return writer.finish({"format": "orbax", "config": str(config_file or "the metadata of the checkpoint")})


def _digest(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data).hexdigest()


def _copy(
    path: Path, found: Mapping[str, tuple[tuple[int, ...], str]], writer: NetworkWriter, digests: Any, *, as_is: bool
) -> None:
    faults: list[str] = []
    known = digests if isinstance(digests, dict) else {}  # a checkpoint of others has none
    for layer in writer.config.layers:
        names = [name for name in found if layer_of(name, writer.config.layers) == layer and name not in writer.recorded]
        for name, array in _restored(path, {name: found[name] for name in names}).items():
            if name in known and known[name] != _digest(array):
                faults.append(f"{name}: values differ from the checksum in the checkpoint's metadata")
            elif array.dtype.kind != "i" and not_finite(array):
                faults.append(f"{name}: {not_finite(array)} of {array.size} values are NaN or infinite")
            elif not faults:
                try:
                    pieces = {name: array} if as_is else stored_arrays(name, array, writer.dtype)
                except ValueError as error:
                    faults.append(str(error))
                    continue
                for stored, values in pieces.items():
                    writer.write(stored, values)
    if faults:
        raise ConversionError(f"{path} does not fit {writer.network}", faults)


def _restored(path: Path, wanted: Mapping[str, tuple[tuple[int, ...], str]]) -> dict[str, np.ndarray]:
    """Returns some arrays of a checkpoint."""
    import jax
    import orbax.checkpoint as ocp

    if not wanted:
        return {}
    shapes = {name: jax.ShapeDtypeStruct(shape, STORED_DTYPES[kind]) for name, (shape, kind) in wanted.items()}
    how = {name: ocp.RestoreArgs(restore_type=np.ndarray) for name in wanted}
    try:
        with _quietly(), ocp.PyTreeCheckpointer() as checkpointer:
            arguments = ocp.args.PyTreeRestore(item=shapes, restore_args=how, partial_restore=True)
            found: dict[str, np.ndarray] = checkpointer.restore(path.absolute(), args=arguments)
    except (ValueError, OSError, KeyError) as error:
        raise SourceError(f"{path} cannot be read by orbax: {printable(error, 300)}") from error
    return found


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Keeps orbax's own lines about a damaged checkpoint from the terminal: our error says what matters."""
    logger, before = logging.getLogger("absl"), logging.getLogger("absl").level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)


def _metadata(path: Path) -> tuple[dict[str, tuple[tuple[int, ...], str]], Mapping[str, Any]]:
    """Returns shape and dtype of every array, and what `to_orbax` wrote about the network."""
    import orbax.checkpoint as ocp

    if not is_orbax(path):
        raise SourceError(f"{path} is no orbax checkpoint (it has no {_MARK}).")
    try:
        with _quietly(), ocp.StandardCheckpointer() as checkpointer:
            metadata = checkpointer.metadata(path.absolute())
        tree = None if metadata.item_metadata is None else metadata.item_metadata.tree
        custom = metadata.custom_metadata or {}
    except Exception as error:  # orbax raises whatever its readers of JSON and of arrays raise
        raise SourceError(f"{path} cannot be read by orbax: {type(error).__name__}: {printable(error, 300)}") from error
    if not isinstance(tree, dict) or not tree or any(not hasattr(leaf, "shape") for leaf in tree.values()):
        raise SourceError(
            f"{path} is no flat dictionary of arrays by dotted names; save one, as sora_jax.load_parameters returns it."
        )
    described = custom.get("sora_jax")
    arrays = {str(name): (tuple(leaf.shape), np.dtype(leaf.dtype).name) for name, leaf in tree.items()}
    return arrays, described if isinstance(described, dict) else {}


def _config(path: Path, network: str, config_file: Path | None, described: Mapping[str, Any]) -> Any:
    if config_file is not None:
        return resolve(network, path, config_file=config_file).config
    if described.get("network") != network or not isinstance(described.get("config"), dict):
        raise SourceError(f"{path} has no configuration of {network}; name a config.json with --config.")
    try:
        return CONFIGS[network].from_dict(described["config"])
    except ValueError as error:
        raise SourceError(f"{path} has a configuration that cannot be: {printable(error, 300)}") from None


def _faults(found: Mapping[str, tuple[tuple[int, ...], str]], expected: Mapping[str, tuple[tuple[int, ...], str]]) -> list[str]:
    faults = [f"{shown(name)}: unknown array {list(found[name][0])}" for name in sorted(found.keys() - expected.keys())]
    faults += [f"{name}: missing" for name in sorted(expected.keys() - found.keys())]
    for name in sorted(found.keys() & expected.keys()):
        if found[name] != expected[name] and not (is_scale(name, expected) and found[name][0] == expected[name][0]):
            (shape, kind), (wanted, other) = found[name], expected[name]
            faults.append(f"{name}: {list(shape)} of {kind}; expected {list(wanted)} of {other}")
    return faults
