"""What a clip or a model directory holds, as nested fields for people and for JSON.

Invariant: nothing is changed, no weight is read, and JAX computes nothing.
"""

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sora_jax.pipeline import clip_info

PLAN_SETTINGS = ("num_frames", "height", "width", "resolution", "aspect_ratio", "num_steps", "guidance", "loop", "dtype")
PLAN_OPTIONS = ("memory_budget", "batch_size", "bandwidth", "gflops")
_BANDWIDTH = "1.3GB"  # a second, of a layer read from a solid-state disk
_GFLOPS_PER_CORE = 100.0


def inspect(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Returns the fields of a clip (``media``, ``parameters``) or of a model directory.

    Raises:
      FileNotFoundError: nothing is there.
      ValueError: it is neither, or damaged.
    """
    path = Path(path)
    if path.is_dir() and not any(path.glob("*.png")):
        return _inspect_model(path)
    found = clip_info.inspect(path)
    return {"path": str(path), "media": found.media, "parameters": found.parameters}


def inspect_memory(
    path: str | os.PathLike[str],
    given: Mapping[str, Any],
    *,
    memory_budget: str | int | float | None = None,
    batch_size: int | None = None,
    bandwidth: str | int | float | None = None,
    gflops: float | None = None,
) -> tuple[dict[str, Any], list[str]]:
    """Returns the memory plan of a generation with a model directory, as fields and as lines of a table.

    Args:
      path: the model directory.
      given: settings as the pipeline takes them (`PLAN_SETTINGS`); what is missing or None is the model's default.
      memory_budget: such as ``"3.3GB"`` or ``"auto"``; None: no budget.
      batch_size: clips made together.
      bandwidth: of storage, a second; for the times.
      gflops: speed in GFLOP/s; for the times.

    Raises:
      ValueError: a setting is invalid, or the budget too small; the message says what would fit.
    """
    from sora_jax.config import NETWORKS
    from sora_jax.pipeline.settings import Settings, check_multiple
    from sora_jax.storage import directory
    from sora_jax.streaming import report
    from sora_jax.streaming.budget import parse_budget
    from sora_jax.streaming.memory_plan import Workload, plan_memory

    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch size is {batch_size}; expected at least 1.")
    if gflops is not None and not 0 < gflops < math.inf:
        raise ValueError(f"speed is {gflops:g} GFLOP/s; expected a positive number.")
    budget = None if memory_budget is None else parse_budget(memory_budget)
    speed = {
        "bytes_per_s": _bytes_per_s(_BANDWIDTH if bandwidth is None else bandwidth),
        "flop_per_s": 1e9 * (_GFLOPS_PER_CORE * (os.cpu_count() or 1) if gflops is None else gflops),
    }
    settings = Settings.resolve(directory.read_model_file(path).get("defaults", {}), given)
    manifests = {network: directory.open_network(path, network) for network in NETWORKS}
    if given.get("height") is not None and given.get("width") is not None:
        patch = manifests["stdit3"].config.patch_size[1]
        check_multiple(manifests["vae"].config, patch, settings.height, settings.width)
    workload = Workload(
        **{name: getattr(settings, name) for name in ("num_frames", "height", "width", "dtype", "num_steps")},
        batch=1 if batch_size is None else batch_size,
        guided=settings.guided,
        encodes=settings.loop > 1,
    )
    plan = plan_memory(manifests, workload, budget)
    return {"path": str(path), **report.fields(plan, **speed)}, report.table(plan, **speed)


def _bytes_per_s(bandwidth: str | int | float) -> float:
    from sora_jax.streaming.budget import AUTO, parse_budget

    try:
        return float(parse_budget("" if bandwidth == AUTO else bandwidth))
    except ValueError:
        raise ValueError(f"bandwidth is {bandwidth!r}; expected bytes a second, such as 1.6GB.") from None


def _inspect_model(path: Path) -> dict[str, Any]:
    from sora_jax.config import NETWORKS
    from sora_jax.storage import directory

    index = directory.read_model_file(path)
    if not index["networks"]:
        raise ValueError(f"{path} holds neither a model (t5, stdit3, vae) nor PNG frames.")
    missing = {
        network: f"missing; add it with: sora-jax convert {network} SOURCE {path}"
        for network in NETWORKS
        if network not in index["networks"]
    }
    networks = {network: _describe(directory.open_network(path, network)) for network in index["networks"]}
    return {
        "path": str(path),
        "tokenizer": index.get("tokenizer") or "-",
        "defaults": index.get("defaults", {}),
        "networks": networks | missing,
    }


def _describe(manifest: Any) -> Mapping[str, Any]:
    from sora_jax.storage.quantisation import is_scale

    stored = manifest.parameters
    lost = [name for name in stored if not manifest.chunk_path(name).is_file()]
    sizes = [parameter.nbytes for parameter in stored.values()]
    return {
        "state": f"damaged: {len(lost)} parameter files are missing, first {lost[0]}" if lost else "complete",
        "dtype": manifest.dtype,
        "arrays": len(sizes),
        "parameters": sum(math.prod(entry.shape) for name, entry in stored.items() if not is_scale(name, stored)),
        "bytes": sum(sizes),
        "layers": len(manifest.layers),
        "layer_bytes": {layer: sum(stored[name].nbytes for name in manifest.names(layer)) for layer in manifest.layers},
        "sources": {file["name"]: f"sha256 {file['sha256']}" for file in manifest.origin.get("files", ())},
        "config": manifest.config.to_dict(),
    }
