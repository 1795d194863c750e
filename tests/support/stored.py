"""Model directories as other writers leave them: format 1, and what tensorstore writes itself."""

import hashlib
import json
import shutil
from pathlib import Path

import tensorstore as ts

from sora_jax.storage.arrays import array_metadata
from sora_jax.storage.directory import NETWORK_FILE, Manifest, open_network
from sora_jax.storage.reader import Reader


def as_format_1(manifest: Manifest) -> Manifest:
    """Rewrites a network in place as releases before 0.2 wrote it, and returns its manifest."""
    fields = json.loads((manifest.path / NETWORK_FILE).read_text())
    for name, parameter in manifest.parameters.items():
        path = manifest.chunk_path(name)
        values = path.read_bytes()[: parameter.nbytes]
        path.write_bytes(values)
        metadata = array_metadata(parameter.shape, parameter.dtype, None)
        (manifest.array_path(name) / "zarr.json").write_text(json.dumps(metadata, separators=(",", ":")))
        fields["parameters"][name]["sha256"] = hashlib.sha256(values).hexdigest()
        del fields["parameters"][name]["rows"], fields["parameters"][name]["blocks"]
    (manifest.path / NETWORK_FILE).write_text(json.dumps(fields | {"format_version": 1}))
    return open_network(manifest.path.parent, manifest.network)


def as_tensorstore_writes(manifest: Manifest) -> Manifest:
    """Rewrites every array of a network by tensorstore itself, in the same layout, and returns its manifest."""
    values = Reader(manifest).arrays(list(manifest.parameters))
    for name, parameter in manifest.parameters.items():
        path: Path = manifest.array_path(name)
        shutil.rmtree(path)
        metadata = array_metadata(parameter.shape, parameter.dtype, parameter.rows)
        spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{path}/"}, "metadata": metadata}
        ts.open({**spec, "store_data_equal_to_fill_value": True}, create=True).result().write(values[name]).result()
    return open_network(manifest.path.parent, manifest.network)
