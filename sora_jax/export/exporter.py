"""Export of a model directory: stage by stage, each in its own process, checked, published whole or not at all.

Invariant: the folder that is asked for appears only when every artefact has passed its check and the manifest fits its
schema; whatever ends an export before that ends its process too and removes what it wrote, and what a killed one left behind
goes with the next export of the folder.
"""

import json
import os
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, Unpack

from sora_jax import files
from sora_jax.export import capture, describe, footprint, host_vectors, manifest, on_mac, worker
from sora_jax.export.attention import attention_entry
from sora_jax.export.check import CheckError
from sora_jax.export.entries import (
    ExportManifest,
    SamplerEntry,
    StageEntry,
    TokensEntry,
    UnsealedManifest,
)
from sora_jax.export.job import WORK, Job, groups, parameter_bytes, save_values
from sora_jax.export.order import Order, check_disk, prepare
from sora_jax.export.phases import phases
from sora_jax.export.program import Stage
from sora_jax.export.progress import Meter, Progress, work_of
from sora_jax.export.request import Fields, Request
from sora_jax.export.stages import DEFAULT_PARTS, check_parts
from sora_jax.export.targets import target_module
from sora_jax.export.vectors import CLIP_FILE, GIVEN_FILE, HOST_FILE
from sora_jax.pipeline.model_file import tokenizer_path
from sora_jax.storage import directory as model_directory
from sora_jax.storage.location import local_path

GROUP_BYTES = 256_000_000  # float32 weights that one process exports; a stage of a large model has more
CLIP_BYTES = 2_000_000_000  # weights of a model that makes a clip for its test vectors
_WAIT_S = 0.5  # between two looks at a process that says nothing: how soon a raising ``progress`` ends an export


class ExportError(RuntimeError):
    """An export failed although its input was valid."""


def export(
    directory: str | os.PathLike[str] | None,
    out: str | os.PathLike[str],
    *,
    allow_oversize: bool = False,
    overwrite: bool = False,
    progress: Callable[[Progress], Any] | None = None,
    **request: Unpack[Fields],
) -> ExportManifest:
    """Returns the manifest of the folder ``out``, exported from a model directory (None: the pocket model).

    Args:
      directory: a complete model directory.
      out: folder to create.
      allow_oversize: write functions that exceed ``memory_limit``, or the limits of Apple's devices for Core ML and Core AI.
      overwrite: replace an existing folder, once the new one is complete.
      progress: called about twice a second; what it raises ends the export.
      request: what is exported, and how: the fields of `Request`, of which only ``target`` has no default.

    Raises:
      ValueError: the request cannot be fulfilled, or the model directory is incomplete or damaged.
      FileExistsError: ``out`` exists and overwrite is False, or it is no exported folder.
      CheckError: an artefact is not as exact as its floor demands; nothing was kept.
      ExportError: a process of the export ended without a result.
    """
    out, asked = Path(out), Request(**request)
    check_parts(asked.stages)
    refuse_target(out, overwrite)
    order = prepare(directory, asked)
    return carry_out(order, out, allow_oversize=allow_oversize, overwrite=overwrite, progress=progress)


def carry_out(
    order: Order,
    out: Path,
    *,
    allow_oversize: bool = False,
    overwrite: bool = False,
    progress: Callable[[Progress], Any] | None = None,
) -> ExportManifest:
    """Returns the manifest of the folder ``out``, written as the order says; raises as `export` does."""
    if not allow_oversize:
        footprint.refuse_oversize(order.footprints, order.job.target, order.memory_limit)
    refuse_target(out, overwrite)
    files.refuse_unwritable(out.parent)
    check_disk(order, out)
    with files.whole_folder(out, overwrite=overwrite) as folder:
        _fill(folder, order, progress)
    return manifest.read(out)


def refuse_target(out: Path, overwrite: bool) -> None:
    """Refuses a folder that exists, but for an exported one that is to be replaced; removes what a killed export left.

    Raises:
      FileExistsError: says which it is.
    """
    files.remove_leftovers(out.parent)
    if not overwrite:
        files.refuse_existing(out)
    elif out.exists() and not (out / manifest.MANIFEST_FILE).is_file():
        raise FileExistsError(f"{out} is not an exported folder, which --overwrite replaces; choose another name or remove it.")


def _fill(folder: Path, order: Order, progress: Callable[[Progress], Any] | None) -> None:
    """Writes all artefacts and the manifest."""
    job, pipeline = order.job, order.pipeline
    (folder / WORK).mkdir()
    job.write(folder)
    for size in job.sizes:
        save_values(folder, size, capture.start(pipeline.config, pipeline.tokenizer, size, order.settings))
    stages, sampler = _run_groups(job, order.stages, folder, progress)
    shutil.rmtree(folder / WORK)
    if job.vectors:
        given = "vae_encoder" in job.parts
        host_vectors.write(folder, pipeline, order.settings, order.tokens, order.sizes[0], clip=_makes_clip(job), given=given)
        on_mac.write(folder, job.target)
    manifest.write(folder, _manifest(order, stages, sampler, folder))


def _makes_clip(job: Job) -> bool:
    """Returns whether vectors have a clip: a whole model is exported, which is small enough to run here at once."""
    whole = set(DEFAULT_PARTS) <= set(job.parts)
    return whole and sum(network.nbytes for network in job.networks().values()) <= CLIP_BYTES


def _run_groups(
    job: Job, listed: Sequence[Stage], folder: Path, progress: Callable[[Progress], Any] | None
) -> tuple[list[StageEntry], SamplerEntry | None]:
    """Returns the manifest entries of all stages and of the sampler, with one process for each group of stages."""
    work = work_of(listed, parameter_bytes)
    if job.sampler:
        work[worker.SAMPLER] = sum(work[stage.name] for stage in listed if stage.network == "stdit3")
    meter = Meter(work, progress)
    planned = groups(listed, GROUP_BYTES) + ([[worker.SAMPLER]] if job.sampler else [])
    for names in planned:
        meter.advance(names[0], 0.0)
        _run_process(folder, names, meter)
    written = [stage.name for stage in listed if job.writes(stage)]
    entries = {name: json.loads((folder / WORK / f"{name}.json").read_text("utf-8")) for name in written}
    sampler = folder / WORK / f"{worker.SAMPLER}.json"
    return list(entries.values()), json.loads(sampler.read_text("utf-8")) if job.sampler else None


def _run_process(folder: Path, names: Sequence[str], meter: Meter) -> None:
    """Runs one group to its end, telling the meter how far it is; whatever ends this call ends the process too."""
    command = [sys.executable, "-m", "sora_jax.export.worker", str(folder), *names]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as errors:
        # Its own group, so that Ctrl-C reaches this process alone.  Standard input says whether this process still lives.
        process = subprocess.Popen(
            command, env=environment, process_group=0, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors
        )
        try:
            for line in _lines(process.stdout, meter):
                event = json.loads(line)
                meter.advance(event["stage"], event["share"])
            code = process.wait()
        finally:
            process.kill()
            process.communicate()
        errors.seek(0)
        last = errors.read().strip().splitlines()[-1:] or ["no message"]
    if code:
        _raise_failure(folder, names[0], code, last[0])


def _lines(stream: IO[bytes] | None, meter: Meter) -> Iterator[bytes]:
    """Yields what a process writes, line by line; the meter reports while nothing comes."""
    if stream is None:
        return
    rest = b""
    with selectors.DefaultSelector() as selector:
        selector.register(stream, selectors.EVENT_READ)
        while True:
            if not selector.select(_WAIT_S):
                meter.wait()
                continue
            read = os.read(stream.fileno(), 65536)
            if not read:
                return
            *lines, rest = (rest + read).split(b"\n")
            yield from lines


def _raise_failure(folder: Path, name: str, code: int, last: str) -> None:
    """Raises what a process ended with."""
    report = folder / WORK / "error.json"
    if report.exists():
        error = json.loads(report.read_text("utf-8"))
        if error["kind"] == "CheckError":
            raise CheckError(error["message"])
        if error["input"]:
            raise ValueError(error["message"])
        failure = ExportError(f"export of {name} failed: {error['kind']}: {error['message']}")
        failure.add_note(error["traceback"])  # shown by --debug
        raise failure
    if code == -signal.SIGKILL:
        raise ExportError(f"the process that exported {name} was killed, as the system does when memory is short.")
    raise ExportError(f"the process that exported {name} ended with code {code}: {last}")


def _manifest(order: Order, stages: list[StageEntry], sampler: SamplerEntry | None, folder: Path) -> UnsealedManifest:
    job, pipeline = order.job, order.pipeline
    networks = job.networks()
    tokens = _copy_tokenizer(order, folder)
    found = describe.file_entries(folder)
    entry: UnsealedManifest = {
        "format_version": manifest.FORMAT_VERSION,
        "target": job.target,
        "precision": job.options.precision,
        "weights": describe.weights_entry(networks, job.options),
        "made_by": describe.versions(target_module(job.target).PACKAGES),
        "model": describe.model_entry(networks, pipeline.model_id, order.licence),
        "tokens": tokens,
        "sizes": order.sizes,
        "sampling": order.sampling,
        "attention": attention_entry(pipeline.config, job.sizes, job.parts, job.options.logits_limit, job.cut),
        "guidance_rows": job.cut.guidance_rows,
        "pairs_per_package": job.cut.pairs_per_package,
        "phases": phases([entry["name"] for entry in stages]),
        "stages": stages,
        "sampler": sampler,
        "files": found,
        "total_bytes": sum(entry["bytes"] for entry in found.values()),
        "notes": [target_module(job.target).NOTE],
    }
    if job.vectors:
        clip, given = (file if file in found else None for file in (CLIP_FILE, GIVEN_FILE))
        entry["vectors"] = {"host": HOST_FILE, "clip": clip, "given": given}
    return entry


def _copy_tokenizer(order: Order, folder: Path) -> TokensEntry:
    """Returns how prompts become ids, and copies the tokenizer where the text encoder is exported."""
    if "t5" not in order.job.parts:
        return order.tokens
    index = model_directory.read_model_file(order.job.directory)
    source = tokenizer_path(Path(order.job.directory), index.get("tokenizer"))
    shutil.copyfile(local_path(source), folder / source.name)
    return {**order.tokens, "file": source.name}
