"""Export of a model directory: stage by stage, each in its own process, checked, published whole or not at all.

Invariant: the folder that is asked for appears only when every artefact has passed its check and the manifest fits its
schema; whatever ends an export before that removes what it wrote.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sora_jax import files
from sora_jax.config import ModelConfig
from sora_jax.export import capture, manifest, worker
from sora_jax.export.check import CheckError
from sora_jax.export.job import WORK, Job, groups, parameter_bytes, save_values
from sora_jax.export.size import Size
from sora_jax.export.stages import DEFAULT_PARTS, Stage, check_parts
from sora_jax.export.targets import Options, Precision, TargetName, Weights, target_module
from sora_jax.networks import merging
from sora_jax.pipeline.pipeline import POCKET, Pipeline, tokenizer_path
from sora_jax.pipeline.settings import Settings
from sora_jax.storage import directory as model_directory
from sora_jax.storage.directory import Manifest

GROUP_BYTES = 256_000_000  # float32 weights that one process exports; a stage of a large model has more
_SPARE_BYTES = 200_000_000
_BYTES_PER_VALUE = {"float32": 4, "float16": 2}

Progress = Callable[[str, int, int], Any]


class ExportError(RuntimeError):
    """An export ended without a result, for no fault of its input."""


def export(
    directory: str | os.PathLike[str] | None,
    out: str | os.PathLike[str],
    *,
    target: TargetName,
    num_frames: int | str | None = None,
    height: int | None = None,
    width: int | None = None,
    further_sizes: Sequence[Size] = (),
    precision: Precision = "float32",
    weights: Weights = "float",
    stages: Sequence[str] = DEFAULT_PARTS,
    settings: Mapping[str, Any] | None = None,
    licence: str | None = None,
    fuse_attention: bool = True,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Returns the manifest of the folder ``out``, exported from a model directory (None: the pocket model).

    Args:
      directory: a complete model directory.
      out: folder to make.
      target: ``stablehlo``, ``onnx`` or ``coreml``.
      num_frames: of the video, a number or a duration such as ``2s``; None: the model's default, as height and width.
      height: pixels, a multiple of 16.
      width: pixels, a multiple of 16.
      further_sizes: more sizes, as functions beside those of the first.
      precision: of the arithmetic.
      weights: ``float``, ``int8``, and for Core ML ``lut6`` and ``int4``.
      stages: some of ``t5``, ``stdit3``, ``vae_decoder``, ``vae_encoder``.
      settings: numbers of the loop in place of the model's defaults: num_steps, guidance, merge_steps, leap, fps, ...
      licence: of the weights, for the manifest and Core ML packages; None: not stated.
      fuse_attention: Core ML only: use the converter's fused attention.
      overwrite: replace an existing folder, once the new one is complete.
      progress: called with a stage's name, how many stages are done and how many there are.

    Raises:
      ValueError: something asked for cannot be made, or the model directory is incomplete or damaged.
      FileExistsError: ``out`` exists and overwrite is False, or it is no exported folder.
      CheckError: an artefact is not as exact as its floor demands; nothing was kept.
      ExportError: a process of the export ended without a result.
    """
    out = Path(out)
    check_parts(stages)
    if not overwrite:
        files.refuse_existing(out)
    elif out.exists() and not (out / manifest.MANIFEST_FILE).is_file():
        raise FileExistsError(f"{out} is not an exported folder, which --overwrite replaces; choose another name or remove it.")
    pipeline = Pipeline.from_pretrained(directory)
    source = POCKET if directory is None else Path(directory)
    chosen = pipeline.resolve({"num_frames": num_frames, "height": height, "width": width, **(settings or {})})
    sampling = manifest.sampling_entry(chosen)
    options = Options(
        precision=precision,
        weights=weights,
        fuse_attention=fuse_attention,
        metadata={"model": pipeline.model_id, "licence": licence or "not stated"},
    )
    target_module(target).check_options(options)
    sizes = (Size(num_frames=chosen.num_frames, height=chosen.height, width=chosen.width), *further_sizes)
    job = Job(
        directory=str(source.resolve()),
        target=target,
        options=options,
        parts=tuple(dict.fromkeys(stages)),
        sizes=tuple(dict.fromkeys(sizes)),
        guidance=chosen.guidance,
        sampler=target == "stablehlo" and "stdit3" in stages,
    )
    listed = _checked_stages(job, pipeline.config, chosen)
    files.refuse_unwritable(out.parent)
    _check_disk(job, listed, out)
    with files.whole_file(out, overwrite=overwrite) as folder:
        (folder / WORK).mkdir(parents=True)
        job.write(folder)
        for size in job.sizes:
            save_values(folder, size, capture.start(pipeline.config, pipeline.tokenizer, size, chosen))
        entries = _run_groups(job, listed, folder, progress)
        shutil.rmtree(folder / WORK)
        manifest.write(folder, _manifest(job, pipeline, chosen, sampling, licence, entries, folder))
    return manifest.read(out)


def _checked_stages(job: Job, config: ModelConfig, chosen: Settings) -> list[Stage]:
    """Returns the stages to run, having seen that parts, sizes and merging are possible."""
    listed = job.reference_stages(config)
    if chosen.merge_steps:
        for size in job.sizes:
            merging.check_frames(size.latents(config.vae)[0], "alone")
    return listed


def _check_disk(job: Job, listed: Sequence[Stage], out: Path) -> None:
    """Refuses to begin where the disk has no room for the artefacts and for one stage beside them."""
    share = _BYTES_PER_VALUE[job.options.precision] / 4
    written = [parameter_bytes(stage) for stage in listed if job.writes(stage)]
    needed = int(sum(written) * share + 2 * max(written) + _SPARE_BYTES)
    free = shutil.disk_usage(out.parent).free
    if free < needed:
        raise ValueError(f"the disk of {out.parent} has {free / 1e9:.1f} GB free; the export needs {needed / 1e9:.1f} GB.")


def _run_groups(job: Job, listed: Sequence[Stage], folder: Path, progress: Progress | None) -> dict[str, Any]:
    """Returns the manifest entries by stage name, with one process for each group of stages."""
    planned = groups(listed, GROUP_BYTES) + ([[worker.SAMPLER]] if job.sampler else [])
    total, done = sum(map(len, planned)), 0
    for names in planned:
        if progress is not None:
            progress(names[0], done, total)
        _run_process(folder, names)
        done += len(names)
    if progress is not None:
        progress("manifest", done, total)
    entries = {}
    for names in planned:
        for name in names:
            path = folder / WORK / f"{name}.json"
            if path.exists():
                entries[name] = json.loads(path.read_text("utf-8"))
    return entries


def _run_process(folder: Path, names: Sequence[str]) -> None:
    """Runs one group to its end; on an interrupt its process ends with this one."""
    command = [sys.executable, "-m", "sora_jax.export.worker", str(folder), *names]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "JAX_PLATFORMS": "cpu"})
    if done.returncode == 0:
        return
    report = folder / WORK / "error.json"
    if report.exists():
        error = json.loads(report.read_text("utf-8"))
        if error["kind"] == "CheckError":
            raise CheckError(error["message"])
        if error["input"]:
            raise ValueError(error["message"])
        failure = ExportError(f"export of {names[0]} failed: {error['kind']}: {error['message']}")
        failure.add_note(error["traceback"])  # shown by --debug
        raise failure
    if done.returncode == -signal.SIGKILL:
        raise ExportError(f"the process that exported {names[0]} was killed, as the system does when memory is short.")
    last = done.stderr.strip().splitlines()[-1:] or ["no message"]
    raise ExportError(f"the process that exported {names[0]} ended with code {done.returncode}: {last[0]}")


def _manifest(
    job: Job,
    pipeline: Pipeline,
    chosen: Settings,
    sampling: Mapping[str, Any],
    licence: str | None,
    entries: Mapping[str, Any],
    folder: Path,
) -> dict[str, Any]:
    networks: dict[str, Manifest] = job.networks()
    index = model_directory.read_model_file(job.directory)
    scores = {name: getattr(chosen, name) for name in ("aes", "flow", "camera_motion")}
    tokens: dict[str, Any] = {"length": pipeline.config.stdit3.model_max_length, "file": None, "scores": scores}
    if "t5" in job.parts:
        source = tokenizer_path(Path(job.directory), index.get("tokenizer"))
        shutil.copyfile(source, folder / source.name)
        tokens["file"] = source.name
    stages = [entry for name, entry in entries.items() if name != worker.SAMPLER]
    found = manifest.file_entries(folder)
    return {
        "format_version": manifest.FORMAT_VERSION,
        "target": job.target,
        "precision": job.options.precision,
        "weights": manifest.weights_entry(networks, job.options.weights),
        "made_by": manifest.versions(target_module(job.target).PACKAGES),
        "model": manifest.model_entry(networks, pipeline.model_id, licence),
        "tokens": tokens,
        "sizes": [manifest.size_entry(pipeline.config, size, chosen) for size in job.sizes],
        "sampling": dict(sampling),
        "phases": manifest.phases([entry["name"] for entry in stages]),
        "stages": stages,
        "sampler": entries.get(worker.SAMPLER),
        "files": found,
        "total_bytes": sum(entry["bytes"] for entry in found.values()),
        "notes": [target_module(job.target).NOTE],
    }
