"""A network's parameters from its files onto a mesh; a process reads what its own devices hold.

Invariant: what reaches a device was compared with its checksums by the process that it belongs to.  Where weights are spread
over several processes, each reads the blocks of its rows alone, and every vector whole.
"""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

from jax.sharding import Mesh

from sora_jax.devices.hosts import is_over_processes
from sora_jax.devices.mesh import is_spread, place, place_parameters, place_rows, rows_here
from sora_jax.storage.checkpoint import load_parameters, read_together
from sora_jax.storage.directory import Manifest
from sora_jax.storage.quantisation import SCALE_SUFFIX, is_scale
from sora_jax.storage.reader import Reader

_AT_A_TIME = 2  # layers: one is read while the checksums of the other's last blocks are computed


def load_onto(manifest: Manifest, mesh: Mesh, weights: str) -> dict[str, Any]:
    """Returns the parameters of a network on the mesh, by flat name: whole on every device, or spread, see `place_parameters`.

    Raises:
      ModelDirectoryError: the network is damaged, or no longer the one that the manifest describes.
    """
    if weights != "spread" or not is_over_processes(mesh):
        return place_parameters(load_parameters(manifest), mesh, weights)
    reader = Reader(manifest)
    flat: dict[str, Any] = {}
    with ThreadPoolExecutor(_AT_A_TIME, thread_name_prefix="load") as pool:
        for whole, spans in pool.map(lambda layer: _read_layer(reader, layer, mesh), manifest.layers):
            flat |= {name: place(array, mesh) for name, array in whole.items()}
            flat |= {name: place_rows(rows, manifest.parameters[name].shape, mesh) for name, rows in spans.items()}
    return flat


def _read_layer(reader: Reader, layer: str, mesh: Mesh) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the parameters of a layer that stay whole, and of the others the rows that this process holds."""
    stored, names = reader.manifest.parameters, reader.manifest.names(layer)
    spread = [name for name in names if is_spread(stored[name].shape, mesh.size) and not is_scale(name, stored)]
    apart = {*spread, *(name + SCALE_SUFFIX for name in spread)}
    spans = {
        name: {(start, stop): reader.slice(name, start, stop) for start, stop in rows_here(stored[name].shape[0], mesh)}
        for name in spread
    }
    return read_together(reader, [name for name in names if name not in apart]), spans
