"""A streamed evaluation at the released width, in portions and chunks, is the resident one made whole."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks._support import streaming_model
from sora_jax.config import open_sora_1_2
from sora_jax.networks import registry
from sora_jax.networks.merge_rule import Merge
from sora_jax.pipeline.velocity import Velocity
from sora_jax.storage.checkpoint import load_parameters, unflatten
from sora_jax.storage.directory import open_network
from sora_jax.streaming.network import STDiT3Stream

FRAMES, ROWS, COLUMNS = 15, 40, 54  # 16,200 tokens: portions of 4,340, and logits of 280 MB
REL_L2 = 1e-6


@jax.jit(static_argnames="merged")
def evaluated(velocity: Velocity, z: jax.Array, *, merged: bool) -> jax.Array:
    return velocity.evaluate(z, jnp.full(2, 700.0), merged=merged)


@pytest.mark.slow
@pytest.mark.parametrize("merged", [False, True])
def test_streamed_in_portions_the_velocity_is_that_of_the_whole_network(tmp_path: Path, merged: bool) -> None:
    directory = streaming_model.write(tmp_path, num_blocks=2)
    manifest = open_network(directory, "stdit3")
    config = open_sora_1_2.stdit3
    rng = np.random.default_rng(3)
    z = jnp.asarray(rng.standard_normal((2, FRAMES, ROWS, COLUMNS, 4), np.float32))
    caption = jnp.asarray(rng.standard_normal((2, config.model_max_length, config.caption_channels), np.float32))
    mask = jnp.asarray(np.arange(config.model_max_length)[None] < np.array([[40], [300]]))
    sizes = {name: jnp.full(1, value, jnp.float32) for name, value in (("fps", 24), ("height_px", 320), ("width_px", 432))}

    def velocity(network: object) -> Velocity:
        return Velocity(network=network, caption_RLE=caption, mask_BL=mask, merge=Merge(), **sizes)

    with STDiT3Stream(manifest, budget=None, retained=0).open() as network:
        streamed = np.asarray(evaluated(velocity(network), z, merged=merged))
    abstract = registry.abstract("stdit3", manifest.config)
    resident = jax.device_put(unflatten(abstract, load_parameters(manifest)))
    whole = np.asarray(evaluated(velocity(resident), z, merged=merged))
    error = np.linalg.norm(streamed - whole) / np.linalg.norm(whole)
    assert error <= REL_L2, f"relative L2 {error:.2e}"
