"""A random transformer at toy width in a model directory, and a sampling of it: what the streaming tests share."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

import sora_jax
from sora_jax.config import STDiT3Config
from sora_jax.networks.stdit3 import STDiT3
from sora_jax.pipeline.velocity import Velocity
from sora_jax.sampling.sampler import Result
from sora_jax.sampling.schedule import Schedule
from sora_jax.storage.checkpoint import load_network, save_network, unflatten
from tests.support.tiny_model import CONFIG, random_flat

DEPTH = 2
NUM_BLOCKS = 2 * DEPTH
MAP_FROM_BYTES = 1024  # matrices of this width are small
SIZES = {"height_px": 32, "width_px": 48, "num_frames": 17}
LATENTS = (1, 5, 4, 6, 4)


def config(width: int = 16) -> STDiT3Config:
    return dataclasses.replace(CONFIG.stdit3, hidden_size=width, depth=DEPTH)


def write_transformer(directory: Path, *, dtype: str = "float32", width: int = 16, seed: int = 0) -> Path:
    """Writes the transformer, in the place of one that is there."""
    flat = random_flat("stdit3", config(width), seed=seed)
    save_network(directory, "stdit3", config(width), flat, dtype=dtype, overwrite=True)
    return directory


def resident(directory: Path) -> STDiT3:
    """The same transformer in memory, without callbacks."""
    loaded_config, flat = load_network(directory, "stdit3")
    return jax.device_put(unflatten(jax.eval_shape(lambda: STDiT3(loaded_config, rngs=nnx.Rngs(0))), flat))


def velocity(network: Any) -> Velocity:
    def one(value: float) -> jax.Array:
        return jnp.asarray([value], jnp.float32)

    made = config()
    features = jax.random.normal(jax.random.key(3), (2, made.model_max_length, made.caption_channels))
    mask = jnp.arange(made.model_max_length)[None] < 7
    return Velocity(network=network, caption_RLE=features, mask_BL=mask, fps=one(8), height_px=one(32), width_px=one(48))


def schedule(num_steps: int) -> Schedule:
    return Schedule.open_sora(num_steps, **SIZES)


def noise() -> jax.Array:
    return jax.random.normal(jax.random.key(0), LATENTS)


def sample(network: Any, *, num_steps: int = 3, **options: Any) -> Result:
    return sora_jax.sample(velocity(network), noise(), schedule(num_steps), **options)
