"""What a source of weights is: network, format, types, bytes, what is missing, and the command that converts it.

Invariant: headers and configurations are read, and no value. Nothing is written, and what cannot be converted is described with
its faults instead of refused.
"""

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from convert_weights.all_networks import find_networks, is_pipeline, options_of
from convert_weights.companions import TOKENIZER_FILES
from convert_weights.encodings import encoding_of
from convert_weights.errors import some
from convert_weights.identify import ADAPTER, SPATIAL, network_of_arrays, part_of
from convert_weights.opening import DEFAULTS, Options, Source, match, open_source
from convert_weights.readers import Checkpoint, open_checkpoint
from sora_jax.config import NETWORKS
from sora_jax.storage.arrays import STORED_DTYPES, Parameter
from sora_jax.streaming import fitting

# Nanoseconds a parameter on two cores, measured (docs/weights.md): to store it, and to decode a packed one.  Half of the
# processor's time, which agrees with the wall time of the idle machine.
_STORE_NS = {"float32": 9.5, "bfloat16": 6.5, "int8": 6.5}
_DECODE_NS = 1.0
_MAX_FAULTS = 5
# Sources that are no network by themselves: what they are, what they lack, and the command that takes them.
_PARTS = {
    SPATIAL: ("vae, its spatial part alone", "the temporal part", "sora-jax convert vae SOURCE MODEL_DIR --spatial {}"),
    ADAPTER: ("an adapter of low rank", "the network that it changes", "sora-jax convert NETWORK SOURCE MODEL_DIR --lora {}"),
}


def survey(source: str | os.PathLike[str], options: Options = DEFAULTS) -> dict[str, Any]:
    """Returns what a weight file, an index of shards, or a folder of them is.

    Raises:
      SourceError: it cannot be read, or belongs to no network or to several.
      ConversionError: its configuration describes another network.
    """
    path = Path(source)
    if is_pipeline(path):
        folders = find_networks(path)
        networks = {name: _describe(open_source(name, folders[name], options_of(name, folders, options))) for name in NETWORKS}
        return {"path": str(path), "networks": networks, "convert": f"sora-jax convert {_argument(path)} MODEL_DIR"}
    checkpoint = open_checkpoint(path, section=options.section)
    if part := part_of(checkpoint):
        network, missing, command = _PARTS[part]
        found = {"path": str(path), "network": network, **_files(checkpoint), "missing": missing}
        return {**found, "convert": command.format(_argument(path))}
    network = network_of_arrays(checkpoint)
    apart = options.spatial is not None
    opened = open_source(network, path, options) if apart else match(network, checkpoint, None, options)
    return {"path": str(path), **_describe(opened)}


def _files(checkpoint: Checkpoint) -> dict[str, Any]:
    return {
        "format": checkpoint.format,
        "files": len(checkpoint.files),
        "bytes": sum(identity.size for identity in checkpoint.files.values()),
        "arrays": len(checkpoint.arrays),
        "dtypes": _dtypes(checkpoint),
    }


def _describe(opened: Source) -> dict[str, Any]:
    checkpoint, plan = opened.checkpoint, opened.plan
    missing = [fault.partition(":")[0] for fault in plan.faults if fault.endswith("no source array sets it")]
    others = [fault for fault in plan.faults if not fault.endswith("no source array sets it")]
    fields: dict[str, Any] = {
        "network": opened.network,
        **_files(checkpoint),
        "configuration": opened.resolved.origin,
        "config": opened.resolved.config.to_dict(),
    }
    if checkpoint.notes:
        fields["notes"] = list(checkpoint.notes)
    if plan.ignored:
        fields["ignored"] = some(list(plan.ignored), 3)
    if opened.network == "t5":
        found = next((name for name in TOKENIZER_FILES if (checkpoint.folder / name).is_file()), None)
        fields["tokenizer"] = found or f"missing; add it with: --tokenizer {TOKENIZER_FILES[0]}"
    if missing:
        fields["missing"] = some(missing, _MAX_FAULTS)
    if others:
        fields["faults"] = others[:_MAX_FAULTS] + (
            [f"and {len(others) - _MAX_FAULTS} more"] if len(others) > _MAX_FAULTS else []
        )
    fields |= {"model_bytes": _disk(opened), "seconds_about": _seconds(opened)}
    return fields | {"convert": _command(opened, bool(plan.faults))}


def _dtypes(checkpoint: Checkpoint) -> dict[str, str]:
    found: dict[str, list[int]] = {}
    for array in checkpoint.arrays.values():
        name = f"{array.tensor.dtype}, scaled" if array.scale else array.tensor.dtype
        found.setdefault(name, []).append(array.nbytes)
    return {name: f"{len(sizes)} arrays, {sum(sizes)} bytes" for name, sizes in found.items()}


def _stored_dtypes(network: str) -> list[str]:
    return [dtype for dtype in STORED_DTYPES if network != "vae" or dtype != "int8"]


def _disk(opened: Source) -> dict[str, int]:
    """Returns the bytes of the model directory by stored dtype."""
    return {dtype: stored_bytes(opened, dtype) for dtype in _stored_dtypes(opened.network)}


def stored_bytes(opened: Source, dtype: str) -> int:
    """Returns the bytes that a network takes in a model directory."""
    stored = fitting.stored_arrays(opened.network, opened.resolved.config, dtype)
    return sum(Parameter(*entry, "").nbytes for entry in stored.values())


def _seconds(opened: Source) -> dict[str, float]:
    count = sum(math.prod(shape) for shape in opened.shapes.values())
    packed = sum(
        math.prod(array.tensor.shape)
        for array in opened.checkpoint.arrays.values()
        if encoding_of(array.tensor.dtype) is not None
    )
    speeds: Mapping[str, float] = _STORE_NS
    return {
        dtype: round(2 + (count * speeds[dtype] + packed * _DECODE_NS) / 1e9, 1) for dtype in _stored_dtypes(opened.network)
    }


def _command(opened: Source, faulty: bool) -> str:
    if faulty and all(fault.startswith("spatial_") for fault in opened.plan.faults):
        return f"sora-jax convert vae {_argument(opened.checkpoint.path)} MODEL_DIR --spatial AUTOENCODER"
    if faulty:
        return "not possible before what is missing or wrong was put right"
    return f"sora-jax convert {_argument(opened.checkpoint.path)} MODEL_DIR"


def _argument(path: Path) -> str:
    """Returns a path as the command line takes it, where its first word could be the name of a network or a verb."""
    return str(path) if len(path.parts) > 1 else f"./{path}"
