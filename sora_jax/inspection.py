"""What a clip or a model directory holds, as nested fields for people and for JSON.

Invariant: nothing is changed, no weight is read, and JAX computes nothing.
"""

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sora_jax import video


def inspect(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Returns the fields of a clip (``media``, ``parameters``) or of a model directory.

    Raises:
      FileNotFoundError: nothing is there.
      ValueError: it is neither, or damaged.
    """
    path = Path(path)
    if path.is_dir() and not any(path.glob("*.png")):
        return _inspect_model(path)
    found = video.inspect(path)
    return {"path": str(path), "media": found.media, "parameters": found.parameters}


def _inspect_model(path: Path) -> dict[str, Any]:
    from sora_jax import model_directory
    from sora_jax.config import NETWORKS

    index = model_directory.read_model_file(path)
    if not index["networks"]:
        raise ValueError(f"{path} holds neither a model (t5, stdit3, vae) nor PNG frames.")
    missing = {
        network: f"missing; add it with: sora-jax convert {network} SOURCE {path}"
        for network in NETWORKS
        if network not in index["networks"]
    }
    networks = {network: _describe(model_directory.open_network(path, network)) for network in index["networks"]}
    return {
        "path": str(path),
        "tokenizer": index.get("tokenizer") or "-",
        "defaults": index.get("defaults", {}),
        "networks": networks | missing,
    }


def _describe(manifest: Any) -> Mapping[str, Any]:
    lost = [name for name in manifest.parameters if not manifest.chunk_path(name).is_file()]
    sizes = [parameter.nbytes for parameter in manifest.parameters.values()]
    return {
        "state": f"damaged: {len(lost)} parameter files are missing, first {lost[0]}" if lost else "complete",
        "dtype": manifest.dtype,
        "arrays": len(sizes),
        "parameters": sum(
            math.prod(entry.shape) for name, entry in manifest.parameters.items() if not _is_scale(name, manifest)
        ),
        "bytes": sum(sizes),
        "layers": len(manifest.layers),
        "layer_bytes": {layer: sum(manifest.parameters[n].nbytes for n in manifest.names(layer)) for layer in manifest.layers},
        "sources": {file["name"]: f"sha256 {file['sha256']}" for file in manifest.origin.get("files", ())},
        "config": manifest.config.to_dict(),
    }


def _is_scale(name: str, manifest: Any) -> bool:
    base = name.removesuffix("_scale")
    return base != name and base in manifest.parameters
