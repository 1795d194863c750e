"""The model directory, and the mapping between a module and its flat dictionary of arrays.

A flat dictionary maps dotted names (``"spatial_blocks.3.attn.qkv.kernel"``) to arrays; it is the form parameters have on
disk, in host callbacks and in export signatures.  ``flatten`` and ``unflatten`` are the only code that knows how names
and module attributes correspond.  What is loaded is a copy, compared with its checksums (``reader``): whatever becomes of the
files afterwards changes nothing.  Saving is atomic (``writer``).
"""

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import jax
import numpy as np

from sora_jax.storage.arrays import STORED_DTYPES, Parameter
from sora_jax.storage.directory import Manifest, open_network
from sora_jax.storage.location import Named
from sora_jax.storage.quantisation import SCALE_SUFFIX, dequantise, is_quantised, is_scale, quantise
from sora_jax.storage.reader import Reader
from sora_jax.storage.writer import NetworkWriter

Module = TypeVar("Module")

_MAX_FAULTS = 5  # that a message names


def flatten(module: Any) -> dict[str, Any]:
    """Returns the arrays of a module (or of a tree of its gradients) by dotted name."""
    paths, _ = jax.tree_util.tree_flatten_with_path(module)
    return {_name(path): leaf for path, leaf in paths}


def unflatten(abstract: Module, flat: Mapping[str, Any]) -> Module:
    """Returns ``abstract`` (a module of shapes, from ``jax.eval_shape``) filled with the arrays of ``flat``.

    Raises:
      ValueError: a name is unknown or missing, or a shape differs; the first few faults are named, and their number.
    """
    paths, structure = jax.tree_util.tree_flatten_with_path(abstract)
    expected = {_name(path): leaf for path, leaf in paths}
    faults = [f"unknown {name}" for name in sorted(flat.keys() - expected.keys())]
    faults += [f"missing {name}" for name in sorted(expected.keys() - flat.keys())]
    faults += [
        f"{name} has shape {tuple(flat[name].shape)}, expected {tuple(leaf.shape)}"
        for name, leaf in expected.items()
        if name in flat and tuple(flat[name].shape) != tuple(leaf.shape)
    ]
    if faults:
        raise ValueError(f"{len(faults)} parameters do not fit {type(abstract).__name__}: {shortened(faults)}")
    return jax.tree_util.tree_unflatten(structure, [flat[name] for name in expected])


def shortened(faults: Sequence[str]) -> str:
    """Returns the first few of many faults and how many more there are, in one line."""
    more = [f"and {len(faults) - _MAX_FAULTS} more"] if len(faults) > _MAX_FAULTS else []
    return "; ".join([*faults[:_MAX_FAULTS], *more])


def _name(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value")


def load_network(directory: Named, network: str, *, dtype: str | None = None) -> tuple[Any, dict[str, np.ndarray]]:
    """Returns a network's configuration and its parameters by flat name, as `load_parameters` does.

    Fill a module with ``unflatten(registry.abstract(network, config), flat)``.

    Args:
      directory: a model directory, a folder or an address.
      network: ``t5``, ``stdit3`` or ``vae``.
      dtype: ``float32`` or ``bfloat16``; None keeps the stored dtype, with int8 becoming float32.

    Raises:
      ModelDirectoryError: the network is missing (the message holds the command that adds it) or damaged.
    """
    manifest = open_network(directory, network)
    return manifest.config, load_parameters(manifest, dtype=dtype)


def load_parameters(manifest: Manifest, *, dtype: str | None = None) -> dict[str, np.ndarray]:
    """Returns the parameters of a network by flat name: copies, read-only, every byte compared with the manifest.

    Raises:
      ModelDirectoryError: the network is damaged, or no longer the one that the manifest describes.
    """
    reader = Reader(manifest)
    flat: dict[str, np.ndarray] = {}
    # Two at a time: one is read while the checksums of the other's last blocks are computed.
    with ThreadPoolExecutor(2, thread_name_prefix="load") as pool:
        for layer in pool.map(lambda name: read_layer(reader, name, dtype=dtype), manifest.layers):
            flat.update(layer)
    return flat


def read_layer(reader: Reader, layer: str, *, dtype: str | None = None) -> dict[str, np.ndarray]:
    """Returns the parameters of one layer by flat name, as `load_parameters` does; int8 is multiplied out.

    Raises:
      ModelDirectoryError: a file is missing, unreadable or not what the manifest says.
    """
    return read_together(reader, reader.manifest.names(layer), dtype=dtype)


def read_together(reader: Reader, names: Sequence[str], *, dtype: str | None = None) -> dict[str, np.ndarray]:
    """Returns some parameters by flat name, as `read_layer` does; the scales of those that have one are among the names.

    Raises:
      ModelDirectoryError: a file is missing, unreadable or not what the manifest says.
    """
    wanted, stored = STORED_DTYPES[dtype] if dtype else None, reader.manifest.parameters
    kept = [name for name in names if _is_kept(name, stored, wanted)]
    flat = reader.arrays(kept)
    rest = reader.arrays([name for name in names if name not in flat])  # in other memory, which is free again soon
    for name, array in rest.items():
        if name + SCALE_SUFFIX in rest:
            flat[name] = dequantise(name, array, rest[name + SCALE_SUFFIX], wanted)
        elif not is_scale(name, rest):
            flat[name] = array.astype(wanted)
    for array in flat.values():
        array.flags.writeable = False
    return {name: flat[name] for name in names if name in flat}


def _is_kept(name: str, stored: Mapping[str, Parameter], wanted: np.dtype | None) -> bool:
    """Returns whether an array is wanted as it is stored."""
    if name + SCALE_SUFFIX in stored or is_scale(name, stored):
        return False
    return wanted is None or stored[name].numpy_dtype == wanted


def save_network(
    directory: str | os.PathLike[str],
    network: str,
    config: Any,
    flat: Mapping[str, Any],
    *,
    dtype: str = "float32",
    overwrite: bool = False,
    origin: Mapping[str, Any] | None = None,
) -> Manifest:
    """Writes a network's parameters into a model directory, atomically, and returns its manifest.

    Args:
      directory: the model directory; created if needed.
      network: ``t5``, ``stdit3`` or ``vae``.
      config: the network's configuration.
      flat: every parameter by flat name, of float32 or bfloat16.
      dtype: stored dtype: ``float32``, ``bfloat16`` or ``int8`` (matrices and embeddings; the rest is float32).
      overwrite: replace an existing network.
      origin: JSON values recorded in the manifest (where the parameters come from).

    Raises:
      ModelDirectoryError: the network exists, or another process is writing it.
      ValueError: a parameter is not finite, or belongs to no layer.
    """
    with NetworkWriter(directory, network, config, dtype=dtype, overwrite=overwrite) as writer:
        try:
            for name, value in flat.items():
                for stored, array in stored_arrays(name, np.asarray(value), dtype).items():
                    writer.write(stored, array)
            return writer.finish(origin)
        except BaseException:
            writer.discard()
            raise


def stored_arrays(name: str, array: np.ndarray, dtype: str) -> dict[str, np.ndarray]:
    """Returns the array or arrays (int8 and its scale) that a parameter is stored as.

    Raises:
      ValueError: a value is NaN or infinite, or becomes infinite in ``dtype``.
    """
    if dtype == "int8" and is_quantised(name, array.shape):
        values, scale = quantise(name, array)
        arrays = {name: values, name + SCALE_SUFFIX: scale}
    else:
        arrays = {name: array.astype(STORED_DTYPES["float32" if dtype == "int8" else dtype], copy=False)}
    if not all(np.isfinite(stored).all() for stored in arrays.values()):
        raise ValueError(f"parameter {name} holds NaN or infinite values, or values beyond {dtype}.")
    return arrays
