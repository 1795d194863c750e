"""The model directory, and the mapping between a module and its flat dictionary of arrays.

A flat dictionary maps dotted names (``"spatial_blocks.3.attn.qkv.kernel"``) to arrays; it is the form parameters have on
disk, in host callbacks and in export signatures.  ``flatten`` and ``unflatten`` are the only code that knows how names
and module attributes correspond.
"""

from collections.abc import Mapping
from typing import Any, TypeVar

import jax

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
