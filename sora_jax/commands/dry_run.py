"""What ``sora-jax generate --dry-run`` says: what would be made, what it takes, and which files would appear.

Invariant: a request that passes here was checked as far as it can be without a network's values; no weight is read, no program
compiled, no file written.  Memory and time are predictions, shown with the speeds they hold for.
"""

import dataclasses
import math
import os
from collections.abc import Sequence

from sora_jax.commands.jobs import Job
from sora_jax.config import ModelConfig
from sora_jax.inputs.sizes import frames_of_latents
from sora_jax.networks.vae.codec import latent_size
from sora_jax.pipeline.clip_options import Options
from sora_jax.pipeline.frame_size import frames_size
from sora_jax.pipeline.model_file import ModelFile
from sora_jax.pipeline.samples import Sample, read_samples, refuse_idle
from sora_jax.pipeline.settings import Settings
from sora_jax.pipeline.workload import workload_of
from sora_jax.shell import counted
from sora_jax.streaming.budget import parse_budget
from sora_jax.streaming.fitting import check_fits
from sora_jax.streaming.memory_plan import MemoryPlan, plan_memory, token_shape

BYTES_PER_S, FLOP_PER_S_AND_CORE = 1.3e9, 100e9  # those of `sora-jax inspect`, unless it is told others


def describe(
    model: ModelFile,
    settings: Settings,
    jobs: Sequence[Job],
    *,
    clip: Options,
    batch_size: int,
    memory_budget: str | None,
    attention: str,
) -> list[str]:
    """Returns lines about a request; ``clip`` are the options that were given.

    Raises:
      ValueError: a prompt, a reference or a strategy is wrong, or the budget is too small.
      FileNotFoundError: a reference is missing.
    """
    samples = read_samples(
        [job.text for job in jobs],
        [job.reference for job in jobs],
        [job.strategy for job in jobs],
        1,
        settings,
        model.manifests["vae"].config,
    )
    refuse_idle(clip, samples, settings)
    batch = min(batch_size, len(jobs))
    plan = _memory_plan(model, settings, samples, batch, memory_budget, attention)
    return [
        *_what(model, settings, jobs, batch),
        *_cost(plan, settings, math.ceil(len(jobs) / batch)),
        *(f"{job.path}: seed {(settings.seed + job.number) % 2**32}, {job.text[:80]!r}" for job in jobs),
        "nothing was made: --dry-run.",
    ]


def _memory_plan(
    model: ModelFile, settings: Settings, samples: Sequence[Sample], batch: int, memory_budget: str | None, attention: str
) -> MemoryPlan:
    for manifest in model.manifests.values():
        check_fits(manifest)
    encodes = any(sample.references for sample in samples)
    budget = None if memory_budget is None else parse_budget(memory_budget)
    return plan_memory(model.manifests, workload_of(settings, batch, attention=attention, encodes=encodes), budget)


def _what(model: ModelFile, settings: Settings, jobs: Sequence[Job], batch: int) -> list[str]:
    height, width = frames_size(settings.height, settings.width)
    config = ModelConfig(**{network: manifest.config for network, manifest in model.manifests.items()})
    frames, rows, columns = latent_size(config.vae, settings.num_frames, settings.height, settings.width)
    _, _, tokens = token_shape(config, workload_of(settings, 1))
    clips = f"{counted(len(jobs), 'clip')} of {counted(settings.num_frames, 'frame')}"
    loop = ""
    if settings.loop > 1:
        new = settings.num_frames - frames_of_latents(settings.condition_frame_length)  # of every clip but the first
        loop = f", {settings.loop} in a row, {settings.num_frames + (settings.loop - 1) * new} frames in all"
    together = f", {batch} together" if batch > 1 else ""
    count, may_leap = settings.evaluations()
    merged = f", the first {settings.merge_steps} merged" if settings.merge_steps else ""
    guided = "caption and null caption" if settings.guided else "caption alone"
    steps = f"{'at most ' if may_leap else ''}{count:g} in {settings.steps_in_words}{merged}"
    return [
        f"model: {model.model_id}, in {settings.dtype}",
        f"{clips}{loop}{together}: {height} x {width} pixels, {settings.save_fps:g} frames per second",
        f"latents: {frames} x {rows} x {columns}; {frames * tokens} tokens, {tokens} a frame",
        f"evaluations: {steps}; guidance {settings.guidance:g} ({guided})",
    ]


def _cost(plan: MemoryPlan, settings: Settings, num_batches: int) -> list[str]:
    speed = FLOP_PER_S_AND_CORE * (os.cpu_count() or 1)
    count = math.ceil(settings.evaluations()[0])
    seconds = {}
    for stage in plan.stages:
        planned = dataclasses.replace(stage, evaluations=count) if stage.name == "denoise" else stage
        seconds[stage.name] = planned.seconds(BYTES_PER_S, speed) * (1 if stage.name == "text" else settings.loop) * num_batches
    budget = "" if plan.budget is None else f" of a budget of {plan.budget / 1e6:,.0f} MB"
    parts = ", ".join(f"{name} {taken:,.1f} s" for name, taken in seconds.items())
    speeds = f"{BYTES_PER_S / 1e9:g} GB/s of storage and {speed / 1e9:,.0f} GFLOP/s"
    return [
        f"memory: about {plan.peak / 1e6:,.0f} MB{budget}",
        f"time: about {_seconds(sum(seconds.values()))} ({parts}) at {speeds}, compiling apart",
    ]


def _seconds(seconds: float) -> str:
    """Returns a time in words; less than ten seconds with a decimal."""
    return f"{seconds:,.1f} s" if seconds < 10 else f"{seconds:,.0f} s"
