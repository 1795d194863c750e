"""The order of an export: its job, the model it is of, the numbers of the loop, and how large its functions are.

Invariant: an order that exists can be carried out as far as shapes, numbers and packages decide it; nothing was written for it.
"""

import dataclasses
import os
import shutil
from pathlib import Path

from sora_jax.config import ModelConfig
from sora_jax.export import describe, footprint, manifest
from sora_jax.export.cut import FUSED, make_cut
from sora_jax.export.entries import SamplingEntry, SizeEntry, TokensEntry
from sora_jax.export.footprint import Footprint
from sora_jax.export.job import Job, parameter_bytes
from sora_jax.export.program import Stage
from sora_jax.export.request import Request
from sora_jax.export.size import Size
from sora_jax.export.stages import check_parts
from sora_jax.export.targets import Options, target_module
from sora_jax.networks import merging
from sora_jax.pipeline.model_file import model_path
from sora_jax.pipeline.pipeline import Pipeline
from sora_jax.pipeline.settings import Settings
from sora_jax.storage.location import local_path
from sora_jax.streaming.budget import AUTO, parse_budget

_SPARE_BYTES = 200_000_000
_BYTES_PER_VALUE = {"float32": 4, "float16": 2}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Order:
    """What one export is to be.

    Attributes:
      job: what its processes are told.
      pipeline: the model.
      settings: the numbers of a clip.
      licence: of the weights, None: not stated.
      sampling: the manifest's numbers of the loop.
      sizes: the manifest's sizes.
      tokens: how prompts become ids.
      stages: the stages to run, in float32.
      footprints: how large the functions are that are written.
      memory_limit: bytes that one function may take, None: any.
    """

    job: Job
    pipeline: Pipeline
    settings: Settings
    licence: str | None
    sampling: SamplingEntry
    sizes: list[SizeEntry]
    tokens: TokensEntry
    stages: list[Stage]
    footprints: list[Footprint]
    memory_limit: int | None


def prepare(directory: str | os.PathLike[str] | None, request: Request) -> Order:
    """Returns the order of an export of a model directory (None: the pocket model); writes nothing.

    Raises:
      ValueError: the request cannot be fulfilled, or the model directory is incomplete or damaged.
    """
    check_parts(request.stages)
    folder = local_path(model_path(directory))
    pipeline = Pipeline.from_pretrained(folder)
    size = {"num_frames": request.num_frames, "height": request.height, "width": request.width}
    settings = pipeline.resolve({**size, **(request.settings or {})})
    first = Size(num_frames=settings.num_frames, height=settings.height, width=settings.width)
    job = Job(
        directory=str(folder.resolve()),
        target=request.target,
        options=_options(request, pipeline),
        parts=tuple(dict.fromkeys(request.stages)),
        sizes=tuple(dict.fromkeys((first, *request.further_sizes))),
        guidance=settings.guidance,
        sampler=request.target == "stablehlo" and "stdit3" in request.stages,
        vectors=request.vectors,
        cut=make_cut(
            request.target,
            guidance_rows=request.guidance_rows,
            caption_once=request.caption_once,
            pairs_per_package=request.pairs_per_package,
            attention_forms=tuple(request.attention_forms),
            depth=pipeline.config.stdit3.depth,
        ),
    )
    limit = None if request.memory_limit is None else _parsed("memory limit", request.memory_limit)
    return _order(job, pipeline, settings, request.licence, limit)


def _options(request: Request, pipeline: Pipeline) -> Options:
    """Returns how stages are written.

    Raises:
      ValueError: the target cannot do it, or options exclude each other.
    """
    forms = tuple(request.attention_forms)
    options = Options(
        precision=request.precision,
        weights=request.weights,
        mean_bits=request.mean_bits,
        io_precision=request.io_precision,
        fuse_attention=forms[0] == FUSED if forms else request.fuse_attention,
        logits_limit=_parsed("logits limit", request.logits_limit),
        metadata={"model": pipeline.model_id, "licence": request.licence or "not stated"},
    )
    target_module(request.target).check_options(options)
    if not request.fuse_attention and request.target != "coreml":
        raise ValueError(f"fuse_attention (--no-fused-attention) is Core ML's; leave it out for {request.target}.")
    if not request.fuse_attention and forms:
        raise ValueError("attention forms say which are fused; leave out fuse_attention (--no-fused-attention).")
    return options


def _order(job: Job, pipeline: Pipeline, settings: Settings, licence: str | None, memory_limit: int | None) -> Order:
    """Returns an order whose numbers fit a manifest.

    Raises:
      ValueError: they do not, or parts, sizes or merging are not possible.
    """
    tokens: TokensEntry = {
        "length": pipeline.config.stdit3.model_max_length,
        "file": None,
        "scores": {"aes": settings.aes, "flow": settings.flow, "camera_motion": settings.camera_motion},
    }
    sampling = describe.sampling_entry(settings)
    sizes = [describe.size_entry(pipeline.config, size, settings) for size in job.sizes]
    manifest.refuse_numbers(job.target, sampling=sampling, sizes=sizes, tokens=tokens)
    listed = _checked_stages(job, pipeline.config, settings)
    return Order(
        job=job,
        pipeline=pipeline,
        settings=settings,
        licence=licence,
        sampling=sampling,
        sizes=sizes,
        tokens=tokens,
        stages=listed,
        footprints=footprint.measure(list(job.exported_stages(pipeline.config).values()), job.options, job.target),
        memory_limit=memory_limit,
    )


def _parsed(name: str, limit: str | int | float) -> int:
    try:
        return parse_budget("" if limit == AUTO else limit)
    except ValueError:
        raise ValueError(f"{name} is {limit!r}; expected a size such as 500MB, or bytes.") from None


def _checked_stages(job: Job, config: ModelConfig, chosen: Settings) -> list[Stage]:
    """Returns the stages to run.

    Raises:
      ValueError: parts, sizes or merging are not possible.
    """
    listed = job.reference_stages(config)
    if chosen.merge_steps:
        for size in job.sizes:
            merging.check_frames(size.latents(config.vae)[0], "alone")
    return listed


def check_disk(order: Order, out: Path) -> None:
    """Refuses to begin if the disk lacks room for the artefacts and one stage more.

    Raises:
      ValueError: says how much is free and needed.
    """
    share = _BYTES_PER_VALUE[order.job.options.precision] / 4
    written = [parameter_bytes(stage) for stage in order.stages if order.job.writes(stage)]
    needed = int(sum(written) * share + 2 * max(written) + _SPARE_BYTES)
    free = shutil.disk_usage(out.parent).free
    if free < needed:
        raise ValueError(f"the disk of {out.parent} has {free / 1e9:.1f} GB free; the export needs {needed / 1e9:.1f} GB.")
