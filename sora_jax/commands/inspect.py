"""``sora-jax inspect``: what a clip, a model directory or a source of weights holds, as fields for people and for JSON.

Invariant: nothing is changed, no weight is read, and JAX computes nothing.
"""

import dataclasses
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from sora_jax import shell
from sora_jax.commands import options
from sora_jax.config import NETWORKS
from sora_jax.pipeline import command_line
from sora_jax.pipeline.clip_options import Options
from sora_jax.pipeline.model_file import ModelFile, model_path
from sora_jax.pipeline.option import Option, declared
from sora_jax.storage import directory
from sora_jax.storage.directory import Manifest
from sora_jax.storage.location import Address, Location, Named, local_path
from sora_jax.streaming.budget import AUTO, parse_budget

PLANNED = command_line.of_clip(
    "num_frames", "height", "width", "resolution", "aspect_ratio", "num_steps", "guidance", "merge_steps", "loop", "dtype"
)
_CLIPS = (".mp4", ".gif", ".png", ".npz")
_BANDWIDTH = "1.3GB"  # a second, of a layer read from a solid-state disk
_GFLOPS_PER_CORE = 100.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Planning(options.MemoryBudget, options.Attention):
    """What a memory plan depends on in addition to the clip."""

    batch_size: Annotated[int | None, Option("Clips made together.", metavar="N", within=(1, 10**6))] = None
    bandwidth: Annotated[
        str | None, Option("Bytes that storage reads a second, such as 1.6GB (default 1.3GB).", metavar="SIZE")
    ] = None
    gflops: Annotated[
        float | None,
        Option("Speed in GFLOP/s (default: 100 for each core).", metavar="N", above=0, expected="a positive number"),
    ] = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class What:
    """What is shown."""

    path: Annotated[
        str,
        Option(
            "Clip, model directory or its URL, source of weights, or pocket: the embedded model.",
            metavar="FILE|FOLDER|URL",
            positional=True,
        ),
    ]
    json: Annotated[bool, Option("Print JSON.")] = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments(What, Planning):
    """What the command line asks for."""

    clip: Options


def command(arguments: Sequence[str]) -> None:
    """Reads the command line and prints what is there, or the memory plan that is asked for."""
    plan = "memory plan (any of these prints what a generation with the model would need)"
    parser = command_line.make_parser(
        "sora-jax inspect",
        "Shows what a clip, a model directory or a source of weights holds.",
        {"": declared(What), plan: {**declared(Planning), **PLANNED}},
    )
    asked = command_line.read(parser, arguments, Arguments, PLANNED)
    machine = {name: getattr(asked, name) for name in declared(Planning)}
    if asked.clip or any(value is not None for value in machine.values()):
        fields, lines = inspect_memory(asked.path, asked.clip, **machine)
    else:
        fields = inspect(asked.path)
        lines = _lines(fields)
    shell.result(json.dumps(fields, indent=2, ensure_ascii=False) if asked.json else "\n".join(lines))


def _lines(fields: Mapping[str, Any], indent: str = "") -> list[str]:
    """Returns nested fields as indented ``name: value`` lines."""
    lines = []
    for name, value in fields.items():
        shown = " ".join(name.split("\n"))
        if isinstance(value, Mapping):
            lines += [f"{indent}{shown}:", *_lines(value, indent + "  ")]
        else:
            text = " ".join(value.split("\n")) if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            lines.append(f"{indent}{shown}: {text}")
    return lines


def inspect(name: Named) -> dict[str, Any]:
    """Returns the fields of a clip (``media``, ``parameters``), of a model directory, or of a source of weights.

    At an address only a model directory is looked for.

    Raises:
      FileNotFoundError: nothing is there.
      ValueError: it is neither, or damaged.
    """
    from sora_jax.pipeline import clip_info  # decoders of video are slow to import

    path = model_path(name)
    if isinstance(path, Address):
        return _inspect_model(path)
    if _is_source(path):
        from convert_weights.survey import survey

        return survey(path)
    if path.is_dir() and not any(path.glob("*.png")):
        return _inspect_model(path)
    clip = clip_info.inspect(path)
    return {"path": str(path), "media": clip.media, "parameters": clip.parameters}


def _is_source(path: Path) -> bool:
    if not path.exists() or path.suffix in _CLIPS or (path / directory.MODEL_FILE).exists():
        return False
    from convert_weights.readers import is_source

    return is_source(path)


def inspect_memory(
    name: Named,
    clip: Mapping[str, Any],
    *,
    memory_budget: str | int | float | None = None,
    attention: str | None = None,
    batch_size: int | None = None,
    bandwidth: str | int | float | None = None,
    gflops: float | None = None,
) -> tuple[dict[str, Any], list[str]]:
    """Returns the memory plan of a generation with a model directory, as fields and as lines of a table.

    Args:
      name: the model directory, or ``pocket``.
      clip: options as the pipeline takes them (`PLANNED`); what is missing or None is the model's default.
      memory_budget: such as ``"3.3GB"`` or ``"auto"``; None: no budget.
      attention: its form; None: ``"auto"``.
      batch_size: clips in a batch.
      bandwidth: bytes a second that storage delivers, for the times.
      gflops: speed in GFLOP/s; for the times.

    Raises:
      ValueError: a setting is invalid, or the budget too small; the message says what would fit.
    """
    budget = None if memory_budget is None else parse_budget(memory_budget)
    speed = {
        "bytes_per_s": _bytes_per_s(_BANDWIDTH if bandwidth is None else bandwidth),
        "flop_per_s": 1e9 * (_GFLOPS_PER_CORE * (os.cpu_count() or 1) if gflops is None else gflops),
    }
    model = ModelFile.read(name)
    settings = model.resolve(clip)

    from sora_jax.devices.compute_dtype import choose_dtype
    from sora_jax.pipeline.workload import workload_of
    from sora_jax.streaming import report
    from sora_jax.streaming.fitting import check_fits
    from sora_jax.streaming.memory_plan import plan_memory

    for manifest in model.manifests.values():
        check_fits(manifest)
    settings = dataclasses.replace(settings, dtype=choose_dtype(settings.dtype, platform="cpu"))  # what the plan is about
    workload = workload_of(settings, 1 if batch_size is None else batch_size, attention=attention or "auto")
    plan = plan_memory(model.manifests, workload, budget)
    return {"path": str(model.directory), **report.fields(plan, **speed)}, report.table(plan, **speed)


def _bytes_per_s(bandwidth: str | int | float) -> float:
    try:
        return float(parse_budget("" if bandwidth == AUTO else bandwidth))
    except ValueError:
        raise ValueError(f"bandwidth is {bandwidth!r}; expected bytes a second, such as 1.6GB.") from None


def _inspect_model(path: Location) -> dict[str, Any]:
    index = directory.read_model_file(path)
    if not index["networks"]:
        frames = " nor PNG frames" if isinstance(path, Path) else ""
        raise ValueError(f"{path} holds {'neither a' if frames else 'no'} model (t5, stdit3, vae){frames}.")
    missing = {
        network: f"missing; add it with: sora-jax convert {network} SOURCE {path if isinstance(path, Path) else 'MODEL_DIR'}"
        for network in NETWORKS
        if network not in index["networks"]
    }
    networks = {network: _describe(directory.open_network(path, network)) for network in index["networks"]}
    return {
        "path": str(path),
        "tokenizer": index.get("tokenizer") or "-",
        "defaults": index.get("defaults", {}),
        **({"trained": index["trained"]} if "trained" in index else {}),
        "networks": networks | missing,
    }


def _state(manifest: Manifest) -> str:
    """Returns whether the files of a network are there; a server is not asked for every one of them."""
    if isinstance(manifest.path, Address):
        return "at an address; its files are compared as they are read (all of them by: sora-jax convert verify)"
    lost = [name for name in manifest.parameters if not local_path(manifest.chunk_path(name)).is_file()]
    return f"damaged: {len(lost)} parameter files are missing, first {lost[0]}" if lost else "complete"


def _describe(manifest: Manifest) -> Mapping[str, Any]:
    from sora_jax.storage.quantisation import is_scale

    stored = manifest.parameters
    sizes = [parameter.nbytes for parameter in stored.values()]
    return {
        "state": _state(manifest),
        "dtype": manifest.dtype,
        "arrays": len(sizes),
        "parameters": sum(math.prod(entry.shape) for name, entry in stored.items() if not is_scale(name, stored)),
        "bytes": sum(sizes),
        "layers": len(manifest.layers),
        "layer_bytes": {layer: sum(stored[name].nbytes for name in manifest.names(layer)) for layer in manifest.layers},
        "sources": {file["name"]: f"sha256 {file['sha256']}" for file in manifest.origin.get("files", ())},
        "config": manifest.config.to_dict(),
    }
