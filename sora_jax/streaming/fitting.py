"""Whether a stored network has exactly the arrays that its configuration demands, checked from its manifest alone.

Invariant: shapes are those of the network's own modules; no file is read and no parameter made.  It is asked when a model is
opened, before anything is computed; the reader checks that the files hold those arrays.
"""

import dataclasses
import functools
import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from sora_jax.networks import registry
from sora_jax.storage.checkpoint import flatten, shortened
from sora_jax.storage.directory import Manifest, ModelDirectoryError
from sora_jax.storage.quantisation import SCALE_SUFFIX, is_quantised, scale_axis

_DEPTHS = {"t5": "num_layers", "stdit3": "depth"}


@functools.lru_cache(maxsize=16)
def parameter_shapes(network: str, config: Any) -> Mapping[str, tuple[int, ...]]:
    """Returns the shapes of all parameters of a network by flat name; allocates none of them."""
    # All blocks of a stack are built alike: one stands for all, because tracing the initialisers of 56 takes seconds.
    shallow = dataclasses.replace(config, **{_DEPTHS[network]: 1}) if network in _DEPTHS else config
    built = {name: tuple(leaf.shape) for name, leaf in flatten(registry.abstract(network, shallow)).items()}
    shapes: dict[str, tuple[int, ...]] = {}
    for layer in config.layers:
        first = re.sub(r"\.\d+$", ".0", layer)
        shapes |= {layer + name[len(first) :]: shape for name, shape in built.items() if name.startswith(first + ".")}
    return MappingProxyType(shapes)


def stored_arrays(network: str, config: Any, dtype: str) -> dict[str, tuple[tuple[int, ...], str]]:
    """Returns shape and dtype of every array that a network has when it is stored as ``dtype``, scales included."""
    arrays: dict[str, tuple[tuple[int, ...], str]] = {}
    for name, shape in parameter_shapes(network, config).items():
        if dtype == "int8" and is_quantised(name, shape):
            arrays[name] = (shape, "int8")
            arrays[name + SCALE_SUFFIX] = ((shape[scale_axis(name)],), "float32")
        else:
            arrays[name] = (shape, "float32" if dtype == "int8" else dtype)
    return arrays


def faults_of(manifest: Manifest) -> list[str]:
    """Returns a line for each array that is missing, unknown, or of another shape or dtype than its configuration demands."""
    expected, stored = stored_arrays(manifest.network, manifest.config, manifest.dtype), manifest.parameters
    faults = [f"missing {name}" for name in sorted(expected.keys() - stored.keys())]
    faults += [f"unknown {name}" for name in sorted(stored.keys() - expected.keys())]
    for name, (shape, dtype) in expected.items():
        if name in stored and (stored[name].shape, stored[name].dtype) != (shape, dtype):
            found = f"{stored[name].dtype} {list(stored[name].shape)}"
            faults.append(f"{name} is {found}, expected {dtype} {list(shape)}")
    return faults


def check_fits(manifest: Manifest) -> None:
    """Refuses a network whose arrays are not those of its configuration.

    Raises:
      ModelDirectoryError: the first few faults, and their number.
    """
    faults = faults_of(manifest)
    if faults:
        raise ModelDirectoryError(
            f"{manifest.path} does not fit its configuration ({len(faults)} faults): {shortened(faults)}; "
            f"convert {manifest.network} again with --overwrite."
        )
