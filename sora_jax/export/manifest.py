"""The manifest of an export: the one file from which a host program can drive the loop.

Invariant: a manifest that was written or read here fits ``manifest.schema.json``, which describes every field.  Nothing
here runs or saves a program.
"""

import dataclasses
import hashlib
import importlib.metadata
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from sora_jax.config import NETWORKS, ModelConfig
from sora_jax.export.size import Size
from sora_jax.export.stages import MERGE, Function, Stage
from sora_jax.export.targets import require
from sora_jax.inputs import sizes
from sora_jax.networks.vae.codec import chunks
from sora_jax.pipeline.sampling import leap_rule, make_schedule
from sora_jax.pipeline.settings import Settings
from sora_jax.sampling import schedule
from sora_jax.sampling.leap import Leap
from sora_jax.sampling.schedule import OPEN_SORA_TIMESTEPS
from sora_jax.storage.directory import NETWORK_FILE, Manifest
from sora_jax.version import __version__

MANIFEST_FILE = "manifest.json"
SCHEMA_FILE = Path(__file__).with_name("manifest.schema.json")
FORMAT_VERSION = 1

_PHASES = (
    ("text", "clip", "t5_", "after_use"),
    ("step", "step", "stdit3_", "after_use"),
    ("decode_chunk", "chunk", "vae_temporal_decoder", "after_phase"),
    ("decode_frame", "frame", "vae_spatial_decoder", "after_phase"),
    ("encode_frame", "frame", "vae_spatial_encoder", "after_phase"),
    ("encode_chunk", "chunk", "vae_temporal_encoder", "after_phase"),
)


class ManifestError(ValueError):
    """A manifest is missing, damaged, or does not fit its schema or its files."""


def model_entry(networks: Mapping[str, Manifest], name: str, licence: str | None) -> dict[str, Any]:
    """Returns which model was exported."""
    return {
        "name": name,
        "licence": licence,
        "networks": {
            network: {"config": manifest.config.to_dict(), "sha256": file_sha256(manifest.path / NETWORK_FILE)}
            for network, manifest in networks.items()
        },
    }


def weights_entry(networks: Mapping[str, Manifest], weights: str) -> dict[str, Any]:
    """Returns how weights are stored, there and here."""
    stored = {network: networks[network].dtype for network in NETWORKS}
    return {"dtype": weights, "stored_dtype": stored, "dequantised": "int8" in stored.values()}


def size_entry(config: ModelConfig, size: Size, settings: Settings) -> dict[str, Any]:
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


def sampling_entry(settings: Settings) -> dict[str, Any]:
    """Returns the numbers of the loop that a host may change.

    Raises:
      ValueError: leap, solver, plan or merge are not those of an exported loop.
    """
    rule = leap_rule(settings.leap)
    if rule is not None and (rule.mode == "released" or rule.extrapolate):
        raise ValueError(f"leap {settings.leap!r} cannot be exported; expected off, dynamic, or the number of a step.")
    if settings.solver != "euler" or settings.plan is not None or settings.merge != MERGE:
        raise ValueError("an exported loop has solver euler, no plan, and merges all attentions; leave the three out.")
    numbers = rule or Leap.dynamic()
    return {
        "num_steps": settings.num_steps,
        "num_timesteps": OPEN_SORA_TIMESTEPS,
        "guidance": float(settings.guidance),
        "merge_steps": settings.merge_steps,
        "leap": {
            "mode": rule.mode if rule else "off",
            "index": rule.index if rule and rule.mode == "static" else None,
            "tolerance": numbers.tolerance,
            "min_share": numbers.min_share,
            "patience": numbers.patience,
        },
    }


def phases(stages: Sequence[str]) -> list[dict[str, Any]]:
    """Returns the order of stages: what is repeated together, and when each may be let go."""
    entries = []
    for name, repeat, prefix, unload in _PHASES:
        mine = [stage for stage in stages if stage.startswith(prefix)]
        if mine:
            entries.append({"name": name, "repeat": repeat, "stages": mine, "unload": unload})
    return entries


def stage_entry(stage: Stage, precision: str, functions: Sequence[Mapping[str, Any]], peak_rss_bytes: int) -> dict[str, Any]:
    """Returns a stage with its functions (`function_entry`)."""
    return {
        "name": stage.name,
        "program": stage.program.name,
        "network": stage.network,
        "layers": list(stage.layers),
        "precision": precision,
        "peak_rss_bytes": peak_rss_bytes,
        "functions": list(functions),
    }


def function_entry(function: Function, artefact: Mapping[str, str], checks: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns a function: where it is, what goes in and out, and how exact it was found to be."""
    return {
        "name": function.name,
        "variant": function.variant,
        "sizes": list(function.sizes),
        "artefact": dict(artefact),
        "inputs": tensor_entries(function.inputs),
        "outputs": tensor_entries(function.outputs),
        "checks": list(checks),
    }


def tensor_entries(specs: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns name, shape and dtype of named arrays; a symbolic length is a text."""
    return [
        {
            "name": name,
            "shape": [length if isinstance(length, int) else str(length) for length in spec.shape],
            "dtype": np.dtype(spec.dtype).name,
        }
        for name, spec in specs.items()
    ]


def file_entries(folder: Path) -> dict[str, dict[str, Any]]:
    """Returns size and checksum of every file in the folder but the manifest, by relative path."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / MANIFEST_FILE)
    return {str(path.relative_to(folder)): {"bytes": path.stat().st_size, "sha256": file_sha256(path)} for path in paths}


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Returns the versions of this package, JAX and the packages that made the artefacts."""
    return {"sora_jax": __version__, "jax": jax.__version__} | {name: importlib.metadata.version(name) for name in packages}


def write(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Writes a manifest that fits the schema.

    Raises:
      ManifestError: it does not fit.
    """
    validate(manifest)
    (folder / MANIFEST_FILE).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


def read(folder: Path) -> dict[str, Any]:
    """Returns the manifest of an exported folder, having seen that its files are there with the right sizes.

    Raises:
      ManifestError: the manifest or a file is missing or damaged.
    """
    path = folder / MANIFEST_FILE
    try:
        manifest = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise ManifestError(f"{folder} has no {MANIFEST_FILE}; expected a folder that sora-jax export has finished.") from None
    except (OSError, ValueError) as error:
        raise ManifestError(f"{path} cannot be read ({error}); export again.") from error
    validate(manifest)
    for name, entry in manifest["files"].items():
        file = folder / name
        found = file.stat().st_size if file.is_file() else None
        if found != entry["bytes"]:
            state = "is missing" if found is None else f"has {found} bytes, expected {entry['bytes']}"
            raise ManifestError(f"{file} {state}; copy the whole folder, or export again.")
    return manifest


def validate(manifest: Any) -> None:
    """Refuses what does not fit ``manifest.schema.json``, naming the first place.

    Raises:
      ManifestError: it does not fit.
      MissingExtraError: jsonschema is not installed.
    """
    require("stablehlo", "jsonschema")
    import jsonschema

    schema = json.loads(SCHEMA_FILE.read_text("utf-8"))
    error = jsonschema.exceptions.best_match(jsonschema.Draft202012Validator(schema).iter_errors(manifest))
    if error is not None:
        raise ManifestError(f"manifest does not fit its schema at {error.json_path}: {error.message[:200]}")


def file_sha256(path: Path) -> str:
    """Returns the checksum of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
