"""The model directory, and the mapping between a module and its flat dictionary of arrays.

A flat dictionary maps dotted names (``"spatial_blocks.3.attn.qkv.kernel"``) to arrays; it is the form parameters have on
disk, in host callbacks and in export signatures.  ``flatten`` and ``unflatten`` are the only code that knows how names
and module attributes correspond.  Loading maps files and copies nothing; saving is atomic (``network_writer``).
"""

import os
from collections.abc import Mapping
from typing import Any, TypeVar

import jax
import numpy as np

from sora_jax.storage.directory import STORED_DTYPES, Manifest, open_network, read_array
from sora_jax.storage.quantisation import SCALE_SUFFIX, dequantise, is_quantised, is_scale, quantise
from sora_jax.storage.writer import NetworkWriter

Module = TypeVar("Module")


def flatten(module: Any) -> dict[str, Any]:
    """Returns the arrays of a module (or of a tree of its gradients) by dotted name."""
    paths, _ = jax.tree_util.tree_flatten_with_path(module)
    return {_name(path): leaf for path, leaf in paths}


def unflatten(abstract: Module, flat: Mapping[str, Any]) -> Module:
    """Returns ``abstract`` (a module of shapes, from ``jax.eval_shape``) filled with the arrays of ``flat``.

    Raises:
      ValueError: a name is unknown or missing, or a shape differs; every fault is named at once.
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
        raise ValueError(f"{len(faults)} parameters do not fit {type(abstract).__name__}: " + "; ".join(faults))
    return jax.tree_util.tree_unflatten(structure, [flat[name] for name in expected])


def _name(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value")


def load_network(
    directory: str | os.PathLike[str], network: str, *, dtype: str | None = None
) -> tuple[Any, dict[str, np.ndarray]]:
    """Returns a network's configuration and its parameters by flat name.

    Arrays are read-only and, where stored in the wanted dtype, mapped: nothing is read before it is used.  Fill a module
    with ``unflatten(jax.eval_shape(lambda: Net(config, rngs=nnx.Rngs(0))), flat)``.

    Args:
      directory: a model directory.
      network: ``t5``, ``stdit3`` or ``vae``.
      dtype: ``float32`` or ``bfloat16``; None keeps the stored dtype, with int8 becoming float32.

    Raises:
      ModelDirectoryError: the network is missing (the message holds the command that adds it) or damaged.
    """
    manifest = open_network(directory, network)
    flat: dict[str, np.ndarray] = {}
    for layer in manifest.layers:
        flat.update(read_layer(manifest, layer, dtype=dtype))
    return manifest.config, flat


def read_layer(manifest: Manifest, layer: str, *, dtype: str | None = None) -> dict[str, np.ndarray]:
    """Returns the parameters of one layer by flat name, as ``load_network`` does; int8 is multiplied out."""
    wanted = STORED_DTYPES[dtype] if dtype else None
    flat = {}
    for name in manifest.names(layer):
        if is_scale(name, manifest.parameters):
            continue
        array = read_array(manifest, name)
        if name + SCALE_SUFFIX in manifest.parameters:
            flat[name] = dequantise(name, array, read_array(manifest, name + SCALE_SUFFIX), wanted)
        else:
            flat[name] = array if wanted is None else array.astype(wanted, copy=False)
    return flat


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
