"""Networks with random weights, for files or (the transformer at its real width) in memory, and a count of its operations.

Invariant: in memory all block pairs share the arrays of one, so that 28 pairs take the memory of one (0.2 GB in float32, not
4.5); the arithmetic is the same, and a pair is too large for the caches of a processor to make a difference.  In files every
parameter has its own values, small enough for activations to stay finite.
"""

import dataclasses
import re
import zlib
from collections.abc import Callable, ItemsView, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sora_jax.config import STDiT3Config, policy_of
from sora_jax.inputs import sizes
from sora_jax.networks.stdit3 import STDiT3
from sora_jax.pipeline.velocity import Velocity
from sora_jax.storage.checkpoint import flatten, unflatten

CAPTION_TOKENS = 120  # real ones, of 300: what masks leave


class RandomParameters(Mapping[str, np.ndarray]):
    """Random float32 parameters of a network by flat name, drawn on request, so that they are never all in memory.

    Args:
      build: the network's class; only its shapes are used.
      config: its architecture.
    """

    def __init__(self, build: Callable[..., Any], config: Any):
        abstract = jax.eval_shape(lambda: build(config, rngs=nnx.Rngs(0)))
        self.shapes = {name: leaf.shape for name, leaf in flatten(abstract).items()}

    def __getitem__(self, name: str) -> np.ndarray:
        shape = self.shapes[name]
        x = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape, np.float32)
        if name.endswith("scale"):  # of norms
            return 1 + 0.1 * x
        return x * np.float32(np.prod(shape[:-1]) ** -0.5 if name.endswith("kernel") else 0.05)

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)

    def items(self) -> ItemsView[str, np.ndarray]:
        """Returns the parameters one at a time."""
        return ItemsView(self)


def random_stdit3(config: STDiT3Config, dtype: str, *, seed: int = 0) -> STDiT3:
    """Returns the network, scaled so that activations neither grow nor vanish; every pair has the weights of the first."""
    abstract = jax.eval_shape(lambda: STDiT3(config, policy=policy_of(dtype), rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(seed)
    flat: dict[str, jax.Array] = {}
    for name, leaf in flatten(abstract).items():
        first = re.sub(r"_blocks\.\d+\.", "_blocks.0.", name)
        if first not in flat:
            values = rng.standard_normal(leaf.shape, np.float32) * np.prod(leaf.shape[:-1]) ** -0.5
            flat[first] = jnp.asarray(values + ("norm" in name), leaf.dtype)
        flat[name] = flat[first]
    return unflatten(abstract, flat)


def random_velocity(config: STDiT3Config, dtype: str, *, frames: int, side: int) -> Velocity:
    """Returns the velocity of one guided sample of square videos, ``side`` latent rows and columns."""
    rng = np.random.default_rng(7)
    captions = rng.standard_normal((2, config.model_max_length, config.caption_channels), np.float32)
    conditions = sizes.size_conditions(1, height=8 * side, width=8 * side, num_frames=4 * frames, fps=24)
    return Velocity(
        network=random_stdit3(config, dtype),
        caption_RLE=jnp.asarray(captions),
        mask_BL=jnp.asarray(np.arange(config.model_max_length)[None] < CAPTION_TOKENS),
        fps=jnp.asarray(conditions["fps_B"]),
        height_px=jnp.asarray(conditions["height_px_B"]),
        width_px=jnp.asarray(conditions["width_px_B"]),
    )


def with_depth(config: STDiT3Config, depth: int) -> STDiT3Config:
    """Returns the network with another number of block pairs."""
    return dataclasses.replace(config, depth=depth)


def gflop(config: STDiT3Config, *, rows: int, frames: int, side: int, merged: bool = False) -> dict[str, float]:
    """Returns the operations of one evaluation by part, 2 for each multiply-add.

    Merging leaves ``ceil(frames / 2)`` frames to the attentions and their linear maps; MLPs and captions keep theirs.
    """
    places = (-(-side // 2)) ** 2
    pair = pair_gflop(config, rows=rows, frames=frames, places=places, merged=merged)
    width, tokens = config.hidden_size, rows * frames * places
    embedded = rows * config.model_max_length * width * (config.caption_channels + width) + rows * width * 6 * width
    patches = tokens * width * 4 * (config.in_channels + config.out_channels)
    ends = 2 * (embedded + patches) / 1e9
    return {name: config.depth * count for name, count in pair.items()} | {"embedding and final layer": ends}


def pair_gflop(config: STDiT3Config, *, rows: int, frames: int, places: int, merged: bool = False) -> dict[str, float]:
    """Returns the operations of a spatial and a temporal block by part, as `gflop` counts them."""
    width, captions = config.hidden_size, config.model_max_length
    attended = -(-frames // 2) if merged else frames
    tokens, fewer = rows * frames * places, rows * attended * places
    block = {
        "mlp": 2 * tokens * 2 * width * config.mlp_size,
        "linear maps": 2 * fewer * 6 * width**2,  # qkv, projection, and query and projection to the captions
        "keys of captions": 2 * rows * captions * 2 * width**2,
        "attention": fewer * 2 * width * (places + attended + 2 * captions),
    }
    return {name: 2 * count / 1e9 for name, count in block.items()}
