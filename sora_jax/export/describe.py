"""The entries of a manifest, from stages, sizes and settings.

Invariant: an entry says of the model and its sampling what the pipeline would do.  Nothing here runs or saves a program;
writing and reading the file is the work of `manifest`.
"""

import dataclasses
import importlib.metadata
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from sora_jax.config import NETWORKS, ModelConfig
from sora_jax.export.contents import file_sha256
from sora_jax.export.entries import (
    ArtefactEntry,
    FileEntry,
    FunctionEntry,
    ModelEntry,
    SamplingEntry,
    SizeEntry,
    StageEntry,
    TensorEntry,
    WeightsEntry,
)
from sora_jax.export.manifest import MANIFEST_FILE
from sora_jax.export.program import Function, Specs, Stage
from sora_jax.export.size import Size
from sora_jax.export.targets import Options
from sora_jax.inputs import sizes
from sora_jax.networks.vae.codec import chunks
from sora_jax.pipeline.make_sampler import leap_rule, make_schedule
from sora_jax.pipeline.settings import Settings
from sora_jax.sampling import schedule
from sora_jax.sampling.leap import Leap
from sora_jax.sampling.schedule import OPEN_SORA_TIMESTEPS
from sora_jax.storage.directory import NETWORK_FILE, Manifest
from sora_jax.storage.location import local_path
from sora_jax.version import __version__


def model_entry(networks: Mapping[str, Manifest], name: str, licence: str | None) -> ModelEntry:
    """Returns which model was exported."""
    return {
        "name": name,
        "licence": licence,
        "networks": {
            network: {"config": manifest.config.to_dict(), "sha256": file_sha256(local_path(manifest.path / NETWORK_FILE))}
            for network, manifest in networks.items()
        },
    }


def weights_entry(networks: Mapping[str, Manifest], options: Options) -> WeightsEntry:
    """Returns how weights are stored, there and here."""
    stored = {network: networks[network].dtype for network in NETWORKS}
    entry: WeightsEntry = {"dtype": options.weights, "stored_dtype": stored, "dequantised": "int8" in stored.values()}
    if options.mean_bits is not None:
        entry["mean_bits"] = options.mean_bits
    return entry


def size_entry(config: ModelConfig, size: Size, settings: Settings) -> SizeEntry:
    """Returns a size: its latents, chunks, conditions and times."""
    ratio = schedule.resolution_shift(height_px=size.height, width_px=size.width, num_frames=size.num_frames)
    times = make_schedule(dataclasses.replace(settings, **dataclasses.asdict(size)))
    conditions = sizes.size_conditions(1, height=size.height, width=size.width, num_frames=size.num_frames, fps=settings.fps)
    return {
        "key": size.key,
        "num_frames": size.num_frames,
        "height": size.height,
        "width": size.width,
        "latents": [*size.latents(config.vae), config.stdit3.in_channels],
        "chunks": [
            {
                "frames": chunk.num_frames,
                "latents": chunk.latents.stop - chunk.latents.start,
                "variant": f"frames_{chunk.num_frames}",
            }
            for chunk in chunks(config.vae, size.num_frames)
        ],
        "conditions": {name: float(values[0]) for name, values in conditions.items()},
        "shift": float(ratio) * settings.shift,
        "times": [float(time) for time in times.visited],
    }


def sampling_entry(settings: Settings) -> SamplingEntry:
    """Returns the numbers of the loop that a host may change.

    Raises:
      ValueError: steps, leap, plan or merge are not those of an exported loop.
    """
    rule = leap_rule(settings.leap)
    if rule is not None and (rule.mode == "released" or rule.extrapolate):
        raise ValueError(f"leap {settings.leap!r} cannot be exported; expected off, dynamic, or the number of a step.")
    if not settings.is_published_loop:
        raise ValueError(
            "an exported loop takes Euler steps, has no plan, guides by the scale alone, and merges all attentions; leave the "
            "others out."
        )
    numbers = rule or Leap.dynamic()
    mode = "off" if rule is None or rule.mode == "released" else rule.mode
    return {
        "num_steps": settings.num_steps,
        "num_timesteps": OPEN_SORA_TIMESTEPS,
        "guidance": float(settings.guidance),
        "merge_steps": settings.merge_steps,
        "leap": {
            "mode": mode,
            "index": int(_one("index", numbers.index)) if mode == "static" else None,
            "tolerance": _one("tolerance", numbers.tolerance),
            "min_share": _one("min_share", numbers.min_share),
            "patience": int(_one("patience", numbers.patience)),
        },
    }


def _one(name: str, value: Any) -> float:
    """Returns a number of a leap, which an exported loop has once for all samples."""
    if np.ndim(value):
        raise ValueError(f"leap {name} is {value!r}; expected one number, because an exported loop samples one clip.")
    return float(np.asarray(value))


def stage_entry(stage: Stage, options: Options, artefacts: Mapping[str, ArtefactEntry]) -> StageEntry:
    """Returns a saved stage with its functions, none of them checked yet, and its memory not measured."""
    entry: StageEntry = {
        "name": stage.name,
        "program": stage.program.name,
        "network": stage.network,
        "layers": list(stage.layers),
        "precision": options.precision_of(stage),
        "peak_rss_bytes": 0,
        "functions": [function_entry(function, artefacts[function.name]) for function in stage.functions],
    }
    if options.widths:
        entry["bits"] = dict(options.widths)
    return entry


def function_entry(function: Function, artefact: ArtefactEntry) -> FunctionEntry:
    """Returns a saved function: where it is and what goes in and out; not checked yet."""
    entry: FunctionEntry = {
        "name": function.name,
        "variant": function.variant,
        "sizes": list(function.sizes),
        "artefact": artefact,
        "inputs": tensor_entries(function.inputs),
        "outputs": tensor_entries(function.outputs),
        "checks": [],
    }
    if function.form is not None:
        entry["attention"] = function.form
    return entry


def tensor_entries(specs: Specs) -> list[TensorEntry]:
    """Returns name, shape and dtype of named arrays."""
    return [{"name": name, "shape": list(spec.shape), "dtype": np.dtype(spec.dtype).name} for name, spec in specs.items()]


def file_entries(folder: Path) -> dict[str, FileEntry]:
    """Returns size and checksum of every file in the folder but the manifest, by relative path."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / MANIFEST_FILE)
    return {str(path.relative_to(folder)): {"bytes": path.stat().st_size, "sha256": file_sha256(path)} for path in paths}


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Returns the versions of this package, JAX and the packages that made the artefacts."""
    return {"sora_jax": __version__, "jax": jax.__version__} | {name: importlib.metadata.version(name) for name in packages}
