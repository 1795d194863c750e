"""The STDiT3 table: names of Open-Sora 1.2's STDiT3 (checkpoint ``hpcai-tech/OpenSora-STDiT-v3``) to ours.

Only names and layouts; the engine is in ``rules.py``.
"""

import numpy as np

from convert_weights.rules import CONV3D, LINEAR, Rule
from sora_jax.config import STDiT3Config

IGNORED = {
    "pos_embed.inv_freq": "a formula's value, which newer code does not store; computed from the sizes of the video",
}


def rules(config: STDiT3Config) -> list[Rule]:
    """Returns one rule for each parameter of a layer; ``{i}`` counts the blocks."""
    return [
        Rule("x_embedder.proj.weight", "embed.x_embedder.kernel", CONV3D),
        Rule("x_embedder.proj.bias", "embed.x_embedder.bias"),
        *_linear("t_embedder.mlp.0", "embed.t_embedder.fc1"),
        *_linear("t_embedder.mlp.2", "embed.t_embedder.fc2"),
        *_linear("fps_embedder.mlp.0", "embed.fps_embedder.fc1"),
        *_linear("fps_embedder.mlp.2", "embed.fps_embedder.fc2"),
        *_linear("t_block.1", "embed.t_block"),
        Rule("y_embedder.y_embedding", "embed.y_embedder.y_embedding"),
        *_linear("y_embedder.y_proj.fc1", "embed.y_embedder.fc1"),
        *_linear("y_embedder.y_proj.fc2", "embed.y_embedder.fc2"),
        *_block("spatial_blocks.{i}"),
        *_block("temporal_blocks.{i}"),
        Rule("final_layer.scale_shift_table", "final.scale_shift_table"),
        *_linear("final_layer.linear", "final.linear"),
        Rule("rope.freqs", None, expected=_rope_frequencies(config.head_size)),
    ]


def _block(name: str) -> list[Rule]:
    linear = ("attn.qkv", "attn.proj", "cross_attn.q_linear", "cross_attn.kv_linear", "cross_attn.proj", "mlp.fc1", "mlp.fc2")
    return [
        Rule(f"{name}.scale_shift_table", f"{name}.scale_shift_table"),
        Rule(f"{name}.attn.q_norm.weight", f"{name}.attn.q_norm.scale"),
        Rule(f"{name}.attn.k_norm.weight", f"{name}.attn.k_norm.scale"),
        *(rule for part in linear for rule in _linear(f"{name}.{part}", f"{name}.{part}")),
    ]


def _linear(source: str, target: str) -> list[Rule]:
    return [Rule(f"{source}.weight", f"{target}.kernel", LINEAR), Rule(f"{source}.bias", f"{target}.bias")]


def _rope_frequencies(head_size: int) -> np.ndarray:
    return (10000.0 ** -(np.arange(0, head_size, 2) / head_size)).astype(np.float32)
