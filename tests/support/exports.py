"""Exports for tests: a manifest that is complete without any artefact, and tiny models exported in this process."""

import copy
import dataclasses
import functools
import hashlib
import importlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sora_jax import Pipeline
from sora_jax.config import NETWORKS, ModelConfig
from sora_jax.export import ExportedModel, describe, exporter, manifest
from sora_jax.export.check import Check, difference
from sora_jax.export.entries import ArtefactEntry, ExportManifest, FileEntry, StageEntry, TargetName, UnsealedManifest
from sora_jax.export.phases import phases
from sora_jax.export.program import Stage
from sora_jax.export.size import Size
from sora_jax.export.stages import list_stages
from sora_jax.export.targets import Options
from sora_jax.inputs import prompt
from sora_jax.pipeline import video
from sora_jax.pipeline.settings import Settings
from sora_jax.pocket.world.vocabulary import write_tokenizer
from sora_jax.sampling import noise
from tests.support.tiny_model import CONFIG, random_flat

PROMPT = "a red circle moves right on a blue background"
EQUAL_DB = 50.0  # of 8-bit frames: fewer than one value in two hundred differs by one
SMALL = Size(num_frames=5, height=16, width=32)
SIZE = Size(num_frames=20, height=16, width=32)
SETTINGS = Settings.resolve({"fps": 8, "height": 16, "width": 32, "num_frames": 20, "num_steps": 4, "guidance": 3.0}, {})
CHECK = Check(case="captured", output="x", measured="output", psnr_db=120.0, relative_l2=0.0, floor_db=100.0, ceiling_l2=1e-3)
FILE = b"x"  # of the one file "a"


def complete_manifest(*, tokenizer: str | None = None) -> UnsealedManifest:
    """Returns the manifest of the tiny model, whose functions are all in the file "a"."""
    made = copy.deepcopy(_complete_manifest())
    made["tokens"]["file"] = tokenizer
    return made


@functools.cache  # tracing all stages takes seconds
def _complete_manifest() -> UnsealedManifest:
    options = Options()
    stages = list_stages(CONFIG, [SIZE])
    entries = [_entry(stage, options, {one.name: {"file": "a"} for one in stage.functions}) for stage in stages]
    files: dict[str, FileEntry] = {"a": {"bytes": len(FILE), "sha256": hashlib.sha256(FILE).hexdigest()}}
    return _put_together(CONFIG, SIZE, "onnx", entries, files)


def save_export(folder: Path, target: TargetName, config: ModelConfig, *, parts: Sequence[str] = ("t5", "stdit3")) -> None:
    """Writes an export of random weights, unchecked: for tests of what opens it."""
    folder.mkdir()
    module = importlib.import_module(f"sora_jax.export.{target}")
    entries = []
    for stage in list_stages(config, [SMALL], parts=parts, policy=module.policy(Options())):
        flat = random_flat(stage.network, getattr(config, stage.network))
        params = {local: flat[name] for local, name in stage.parameters.items()}
        entries.append(_entry(stage, Options(), module.save(stage, params, folder, Options())))
    write_tokenizer(folder / "tokenizer.json")
    made = _put_together(config, SMALL, target, entries, describe.file_entries(folder))
    made["tokens"]["file"] = "tokenizer.json"
    manifest.write(folder, made)


def _entry(stage: Stage, options: Options, artefacts: Mapping[str, ArtefactEntry]) -> StageEntry:
    entry = describe.stage_entry(stage, options, artefacts)
    for function in entry["functions"]:
        function["checks"] = [CHECK.to_dict()]
    return entry


def _put_together(
    config: ModelConfig, size: Size, target: TargetName, entries: list[StageEntry], files: dict[str, FileEntry]
) -> UnsealedManifest:
    settings = dataclasses.replace(SETTINGS, **dataclasses.asdict(size))
    networks = json.loads(json.dumps({name: getattr(config, name).to_dict() for name in NETWORKS}))
    return {
        "format_version": 1,
        "target": target,
        "precision": "float32",
        "weights": {"dtype": "float", "stored_dtype": {"t5": "int8"}, "dequantised": True},
        "made_by": describe.versions(["numpy"]),
        "model": {
            "name": "tiny",
            "licence": None,
            "networks": {name: {"config": one, "sha256": "0" * 64} for name, one in networks.items()},
        },
        "tokens": {
            "length": config.stdit3.model_max_length,
            "file": None,
            "scores": {"aes": 6.5, "flow": None, "camera_motion": None},
        },
        "sizes": [describe.size_entry(config, size, settings)],
        "sampling": describe.sampling_entry(settings),
        "phases": phases([entry["name"] for entry in entries]),
        "stages": entries,
        "sampler": None,
        "files": files,
        "total_bytes": sum(entry["bytes"] for entry in files.values()),
        "notes": ["not run anywhere"],
    }


def write_folder(folder: Path, made: UnsealedManifest) -> ExportManifest:
    """Writes a complete manifest with its one file, and returns it as it is read back."""
    manifest.write(folder, made)
    (folder / "a").write_bytes(FILE)
    return manifest.read(folder)


def rewrite(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Changes a manifest and seals it anew, unchecked: what somebody would do who means to fool a host."""
    path = folder / manifest.MANIFEST_FILE
    made = copy.deepcopy(json.loads(path.read_text()))
    change(made)
    made["sha256"] = "0" * 64
    text = json.dumps(made, indent=1)
    path.write_text(text.replace("0" * 64, hashlib.sha256(text.encode()).hexdigest(), 1))


def export_tiny(directory: Path | None, out: Path, target: TargetName, **options: Any) -> ExportManifest:
    """Exports a model for clips of two chunks' worth of frames at the least size."""
    size = {"num_frames": SMALL.num_frames, "height": SMALL.height, "width": SMALL.width}
    return exporter.export(directory, out, target=target, **{"vectors": False, **size, **options})


def frames_of(
    model: ExportedModel, pipeline: Pipeline, *, seed: int, noise_BTHWC: np.ndarray | None = None, **given: Any
) -> np.ndarray:
    """Returns the 8-bit frames that the artefacts make of `PROMPT`."""
    settings = pipeline.resolve({})
    text = prompt.prepare_prompt(PROMPT, aes=settings.aes, flow=settings.flow, camera_motion=settings.camera_motion)
    ids, mask = pipeline.tokenizer.encode([text], model.manifest["tokens"]["length"])
    z = noise_BTHWC
    if z is None:
        z = np.asarray(noise.initial_noise(seed, (1, *model.manifest["sizes"][0]["latents"])))
    return video.quantise(model(ids, mask, z, **given).frames_Bthw3)


def psnr_db(expected: np.ndarray, got: np.ndarray) -> float:
    """Returns how near two arrays are."""
    return difference(expected.astype(np.float64), got.astype(np.float64))[0]
