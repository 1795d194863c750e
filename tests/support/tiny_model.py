"""A random model directory of the full architecture at toy width: little to compile, a fraction of a second to sample."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from sora_jax.config import ModelConfig, pocket
from sora_jax.networks import registry
from sora_jax.pocket.world.vocabulary import write_tokenizer
from sora_jax.storage.checkpoint import flatten, save_network
from sora_jax.storage.writer import update_model_file

CONFIG = ModelConfig(
    t5=dataclasses.replace(pocket.t5, d_model=16, d_kv=8, num_heads=2, d_ff=24, num_layers=1),
    stdit3=dataclasses.replace(pocket.stdit3, hidden_size=16, num_heads=2, depth=1, caption_channels=16, model_max_length=12),
    vae=dataclasses.replace(
        pocket.vae,
        spatial=dataclasses.replace(pocket.vae.spatial, block_out_channels=(4, 4, 4, 4), norm_num_groups=2),
        temporal=dataclasses.replace(pocket.vae.temporal, filters=4, norm_num_groups=2),
    ),
)
DEFAULTS = {"height": 32, "width": 48, "num_frames": 17, "fps": 8, "num_steps": 4, "guidance": 3.0, "align": 5}


def write_model(directory: Path) -> Path:
    """Writes the three networks with random weights, drawn without compiling anything."""
    for seed, network in enumerate(registry.CLASSES):
        save_network(directory, network, getattr(CONFIG, network), random_flat(network, seed=seed))
    write_tokenizer(directory / "tokenizer.json")
    update_model_file(directory, tokenizer="tokenizer.json", defaults=DEFAULTS)
    return directory


def random_flat(network: str, config: Any = None, *, seed: int = 0) -> dict[str, np.ndarray]:
    """Returns random parameters of a network, of the toy width unless a configuration is given."""
    config, rng = getattr(CONFIG, network) if config is None else config, np.random.default_rng(seed)
    shapes = flatten(registry.abstract(network, config))
    return {name: _random(name, leaf.shape, rng) for name, leaf in shapes.items()}


def _random(name: str, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    x = rng.standard_normal(shape).astype(np.float32)
    if name.endswith(("norm.scale", "stats.scale")) or (name.endswith("scale") and len(shape) == 1):
        return 1 + 0.1 * x
    fan_in = np.prod(shape[:-1]) if name.endswith("kernel") else 25
    return x / np.float32(np.sqrt(fan_in))
