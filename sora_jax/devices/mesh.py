"""Several devices as one: the mesh that a user names, and where weights and inputs lie on it.

Invariant: a mesh has the three axes of ``layout``, in their order, some of them 1 long.  What devices compute is left to
``layout`` and the networks, what several processes must take alike to ``hosts``.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from sora_jax import layout
from sora_jax.devices.axes import AXES, check_axes, parse_axes, written

ORDER = layout.DEVICES  # of the mesh's axes: guidance, data, sequence


def make_mesh(mesh: str | Mesh) -> Mesh:
    """Returns the mesh over all devices that a text means, or a mesh of the caller's with the axes that it lacks.

    Raises:
      ValueError: an axis is unknown, or the product of the axes is not the number of devices.
    """
    if isinstance(mesh, str):
        sizes, devices = parse_axes(mesh), np.array(jax.devices())
        if math.prod(sizes.values()) != devices.size:
            raise ValueError(
                f"mesh {mesh!r} has {math.prod(sizes.values())} devices, but there are {devices.size} "
                f"({jax.default_backend()}); expected axes whose product is {devices.size}."
            )
        return _mesh(devices.reshape([sizes[name] for name in ORDER]))
    if not isinstance(mesh, Mesh):
        raise ValueError(f"mesh is {mesh!r}; expected a text as 'guidance=2,sequence=4', or a jax.sharding.Mesh.")
    strange = [name for name in mesh.axis_names if name not in AXES]
    if strange:
        raise ValueError(f"the mesh has the axis {strange[0]!r}; expected {', '.join(AXES)}.")
    check_axes(dict(mesh.shape))
    present = [name for name in ORDER if name in mesh.axis_names]
    devices = np.transpose(mesh.devices, [mesh.axis_names.index(name) for name in present])
    return _mesh(devices.reshape([mesh.shape.get(name, 1) for name in ORDER]))


def _mesh(devices: np.ndarray) -> Mesh:
    # jax.make_mesh makes Explicit axes, whose arrays carry their layout in their types; the sampler's do not.
    return Mesh(devices, ORDER, axis_types=(AxisType.Auto,) * len(ORDER))


def axis_sizes(mesh: Mesh) -> dict[str, int]:
    """Returns the devices of every axis, in the order in which users write them."""
    return {name: mesh.shape[name] for name in AXES}


def name_of(mesh: Mesh) -> str:
    """Returns the mesh as a user writes it."""
    return written(axis_sizes(mesh))


def place(x: Any, mesh: Mesh, spec: PartitionSpec = layout.NOWHERE) -> jax.Array:
    """Returns a host array on the mesh; each device gets its part alone."""
    values = np.asarray(x)
    return jax.make_array_from_callback(values.shape, NamedSharding(mesh, spec), lambda index: values[index])


def sharding_on_mesh(x: Any) -> NamedSharding | None:
    """Returns where an array lies on a mesh; None for one on a single device or the host."""
    sharding = getattr(x, "sharding", None)
    return sharding if isinstance(sharding, NamedSharding) else None


def is_spread(shape: tuple[int, ...], num_devices: int) -> bool:
    """Returns whether a parameter of this shape can be spread: no vector, and its first axis divides over all devices."""
    return len(shape) > 1 and shape[0] % num_devices == 0


def place_parameters(flat: Mapping[str, Any], mesh: Mesh, weights: str) -> dict[str, Any]:
    """Returns parameters on the mesh by flat name: whole on every device, or spread where ``weights`` say so and it divides."""
    spread = weights == "spread"
    return {
        name: layout.Spread(place(x, mesh, PartitionSpec(layout.DEVICES)))
        if spread and is_spread(x.shape, mesh.size)
        else place(x, mesh)
        for name, x in flat.items()
    }


def rows_here(num_rows: int, mesh: Mesh) -> list[tuple[int, int]]:
    """Returns where the rows of a spread parameter that this process holds begin and end; neighbours are joined."""
    each = num_rows // mesh.size
    joined: list[tuple[int, int]] = []
    for number, device in enumerate(mesh.devices.flat):
        if device.process_index != jax.process_index():
            continue
        start, stop = number * each, (number + 1) * each
        if joined and joined[-1][1] == start:
            start = joined.pop()[0]
        joined.append((start, stop))
    return joined


def place_rows(spans: Mapping[tuple[int, int], np.ndarray], shape: tuple[int, ...], mesh: Mesh) -> layout.Spread:
    """Returns a spread parameter from the rows that `rows_here` names."""

    def rows_of(index: Any) -> np.ndarray:
        first, last, _ = index[0].indices(shape[0])
        start, stop = next(span for span in spans if span[0] <= first < span[1])
        return spans[start, stop][first - start : last - start]

    return layout.Spread(jax.make_array_from_callback(shape, NamedSharding(mesh, PartitionSpec(layout.DEVICES)), rows_of))


def on_each(function: Any, mesh: Mesh, network: Any, *rows: Any) -> Any:
    """Returns ``function(network, *rows)``, each device for its part of the rows; nothing passes between devices."""
    spec = PartitionSpec(layout.DEVICES)
    specs = (layout.NOWHERE, *(spec for _ in rows))
    return jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=spec, check_vma=False)(network, *rows)


def filled(x: np.ndarray, multiple: int) -> np.ndarray:
    """Returns rows with the last one repeated until there is a multiple of so many."""
    missing = -len(x) % multiple
    return np.concatenate([x, np.repeat(x[-1:], missing, axis=0)]) if missing else x
