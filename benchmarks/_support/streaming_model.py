"""A transformer of real width with random weights in a model directory, a guided sampling with it, and its memory plan.

Invariant: shapes, dtypes and file sizes are those of Open-Sora 1.2 except for the number of blocks; the values are random,
small
enough for the velocity to stay finite.
"""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks._support.random_network import RandomParameters
from sora_jax.config import ModelConfig, open_sora_1_2
from sora_jax.networks.registry import CLASSES
from sora_jax.networks.stdit3 import STDiT3
from sora_jax.pipeline.velocity import Velocity
from sora_jax.sampling.sampler import Sampler
from sora_jax.sampling.schedule import Schedule
from sora_jax.storage.arrays import Parameter
from sora_jax.storage.checkpoint import save_network
from sora_jax.storage.directory import Manifest
from sora_jax.streaming.memory_plan import StagePlan, Workload, plan_memory

GUIDANCE = 7.0


def write(directory: Path, *, num_blocks: int, dtype: str = "float32") -> Path:
    """Writes a transformer with ``num_blocks`` blocks (all: 56), unless it exists, and returns the directory."""
    config = dataclasses.replace(open_sora_1_2.stdit3, depth=num_blocks // 2)
    if not (directory / "stdit3").exists():
        save_network(directory, "stdit3", config, RandomParameters(STDiT3, config), dtype=dtype)
    return directory


def make_sampler(
    network: Any, *, frames: int, rows: int, columns: int, num_steps: int, merge_steps: int = 0, seed: int = 0
) -> tuple[Sampler, Any]:
    """Returns a guided sampler and its start, for latents of that size; a caption of 300 real tokens."""
    config = open_sora_1_2.stdit3
    keys = jax.random.split(jax.random.key(seed), 2)
    one = {
        name: jnp.asarray([value], jnp.float32) for name, value in (("fps", 24), ("height", 8 * rows), ("width", 8 * columns))
    }
    velocity = Velocity(
        network=network,
        caption_RLE=jax.random.normal(keys[0], (2, config.model_max_length, config.caption_channels)),
        mask_BL=None,
        fps=one["fps"],
        height_px=one["height"],
        width_px=one["width"],
    )
    schedule = Schedule.open_sora(num_steps, height_px=8 * rows, width_px=8 * columns, num_frames=17 * frames // 5)
    sampler = Sampler.create(velocity, schedule, guidance=GUIDANCE, merge_steps=merge_steps or None)
    return sampler, sampler.start(jax.random.normal(keys[1], (1, frames, rows, columns, config.in_channels)))


def planned(manifest: Manifest, config: ModelConfig, work: Workload, stage: str) -> StagePlan:
    """Returns the memory plan's stage, assuming float32 for the networks that the directory lacks."""
    manifests = {manifest.network: manifest}
    for network, build in CLASSES.items():
        parts = getattr(config, network)
        parameters = {name: Parameter(shape, "float32", "") for name, shape in RandomParameters(build, parts).shapes.items()}
        manifests.setdefault(network, Manifest(Path(), network, parts, "float32", parameters, {}))
    return plan_memory(manifests, work).stage(stage)


def num_tokens(frames: int, rows: int, columns: int) -> int:
    """Returns the video tokens of a row of the batch."""
    _, height, width = open_sora_1_2.stdit3.patch_size
    return frames * (-(-rows // height)) * (-(-columns // width))
