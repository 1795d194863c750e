"""What a fixture folder holds: its suites, its files, and which tensors of a file are inputs and which are outputs.

Invariant: reading never repairs; whatever is missing or damaged becomes a ``FixtureError`` that names the file.
"""

import fnmatch
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

try:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    DAMAGE: tuple[type[Exception], ...] = (SafetensorError, OSError, KeyError, ValueError)
except ModuleNotFoundError:  # benchmarks.speed.accelerator, on a machine that has JAX and little else
    from tests.support.safetensors_file import load_file  # type: ignore[assignment]

    DAMAGE = (OSError, KeyError, ValueError)

SUITES = ("stdit3", "tdtm", "rflow", "vae", "t5", "text", "shapes", "wide")
MANIFESTS = "manifests"  # the manifest_*.json files beside the suites

# Files that serve the cases and are none themselves.
_COMPANIONS = {"config.json", "state_dict.safetensors"}


class FixtureError(Exception):
    """A fixture that is missing, unreadable or incomplete."""


def find_suites(folder: Path) -> dict[str, Path]:
    """Returns the folder of each suite in a fixture folder, or the one suite the folder itself is.

    Raises:
      FixtureError: the folder does not exist, holds no suite, or holds a folder of fixtures that is no suite.
    """
    folder = folder.resolve()
    if not folder.is_dir():
        raise FixtureError(f"{folder} is not a folder; expected a fixture folder or one of its suites: {', '.join(SUITES)}.")
    found = {suite: folder / suite for suite in SUITES if (folder / suite).is_dir()}
    if found:
        unknown = [path.name for path in sorted(folder.iterdir()) if path.is_dir() and path.name not in SUITES]
        unknown = [name for name in unknown if any((folder / name).glob("*.safetensors"))]
        if unknown:
            raise FixtureError(f"{folder} holds fixtures in {', '.join(unknown)}; the known suites are {', '.join(SUITES)}.")
        if any(folder.glob("manifest_*.json")):
            found[MANIFESTS] = folder
        return found
    if folder.name in SUITES:
        return {folder.name: folder}
    raise FixtureError(f"{folder} holds no suite and is none; expected folders named {', '.join(SUITES)}.")


def read_json(path: Path) -> dict[str, Any]:
    """Returns the object of a JSON file.

    Raises:
      FixtureError: the file is missing or damaged.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as fault:
        raise FixtureError(f"{path.name} cannot be read: {fault}") from fault
    if not isinstance(content, dict):
        raise FixtureError(f"{path.name} holds a {type(content).__name__}, expected an object.")
    return content


def read_tensors(path: Path) -> dict[str, np.ndarray]:
    """Returns the tensors of a safetensors file by key.

    Raises:
      FixtureError: the file is missing or damaged, or holds values that are not finite.
    """
    try:
        tensors = load_file(path)
    except DAMAGE as fault:
        raise FixtureError(f"{path.name} cannot be read: {fault}") from fault
    damaged = sorted(key for key, value in tensors.items() if not np.all(np.isfinite(value)))
    if damaged:
        raise FixtureError(f"{path.name} holds values that are not finite in {', '.join(damaged)}")
    return tensors


def is_input(key: str) -> bool:
    """Says whether a tensor is given to the reference (``in.x``, ``causal_k3.in``) rather than made by it."""
    return "in" in key.split(".")


def is_fixture(path: Path, suite: str) -> bool:
    """Says whether a file of a suite's folder must belong to a case."""
    if path.name in _COMPANIONS:
        return False
    if suite == "wide" and path.suffix == ".json":
        return False
    return path.suffix in (".safetensors", ".json")


def missing_tensors(suite: str, case: str, entry: Mapping[str, Any], keys: Iterable[str]) -> list[str]:
    """Returns the tensors that a complete fixture of this case has and ``keys`` lacks.

    ``entry`` is the case's entry in config.json, empty where it has none.
    """
    keys = set(keys)
    required = [f"mid.{name}" for name in entry.get("mids", ())] + [f"in.{name}" for name in entry.get("inputs", ())]
    if suite == "rflow":
        required += ["in.z", "in.y", "in.mask", *(f"in.arg.{name}" for name in ("ar", "fps", "height", "num_frames", "width"))]
        required += ["out.final", "out.timesteps", "out.v"]
        required += ["out.noise", "out.x_mask"] if entry.get("frame_mask") is not None else []
        required += ["out.z_in"] if entry.get("leap_index") is None or "lpl" in entry else []
        required += ["out.z_after"] if "lpl" not in entry else []
    elif (suite, case) in _OUTPUTS:
        required += _OUTPUTS[suite, case]
    elif case == "units":
        required += [f"{key.removesuffix('.in')}.out" for key in keys if key.endswith(".in")]
    elif case == "merge_fn":
        required += [
            f"{key.removesuffix('.in')}.{part}" for key in keys if key.endswith(".in") for part in ("merged", "unmerged")
        ]
    else:
        required += ["out"]
    if all(is_input(key) for key in keys):
        required += ["out"]
    return sorted({pattern for pattern in required if not fnmatch.filter(keys, pattern)})


def misfit_inputs(tensors: Mapping[str, np.ndarray]) -> list[str]:
    """Returns the inputs of a network call whose batch is neither 1 nor that of the latents."""
    latents = next((tensors[key] for key in ("in.x", "in.z") if key in tensors), None)
    if latents is None:
        return []
    inputs = {key: value.shape for key, value in tensors.items() if key.startswith("in.")}
    return sorted(key for key, shape in inputs.items() if shape[:1] not in ((1,), latents.shape[:1]))


# Patterns of the outputs where they are neither a single ``out`` nor named after their inputs.
_OUTPUTS: dict[tuple[str, str], tuple[str, ...]] = {
    ("stdit3", "timestep_embedding"): ("out.sinusoid", "out.t_embedder", "out.fps_embedder"),
    ("stdit3", "units"): (
        "spatial_blocks.*.small.out",
        "temporal_blocks.*.small.out",
        "final_layer.small.out",
        "*.q_norm.small.out",
    ),
    ("text", "mask_tensors"): ("*.out.z", "*.out.mask", "ref_*.out", "video.out"),
    ("wide", "stdit3_wide"): ("out.plain", "out.x_mask"),
    ("wide", "tdtm_wide"): ("out.merged",),
    ("wide", "t5_wide"): ("out.first16", "out.mean_valid"),
    ("wide", "vae_wide"): ("out.decode", "out.encode"),
}
