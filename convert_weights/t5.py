"""The T5 table: names of transformers' T5 v1.1 encoder (checkpoint ``DeepFloyd/t5-v1_1-xxl``) to ours.

Only names and layouts; the engine is in ``rules.py``.
"""

from convert_weights.rules import LINEAR, Rule
from sora_jax.config import T5Config

IGNORED = {
    "decoder.{*}": "the decoder of a whole T5; captions need the encoder only",
    "lm_head.weight": "the output layer of a whole T5; captions need the encoder only",
}


def rules(config: T5Config) -> list[Rule]:
    """Returns one rule for each parameter of a layer; ``{i}`` counts the blocks."""
    return [
        Rule("shared.weight", "embed.embedding"),
        Rule("encoder.embed_tokens.weight", "embed.embedding", duplicate_of="shared.weight"),
        Rule("encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", "embed.relative_attention_bias"),
        *(
            Rule(f"encoder.block.{{i}}.layer.0.SelfAttention.{x}.weight", f"block.{{i}}.attn.{x}.kernel", LINEAR)
            for x in "qkvo"
        ),
        Rule("encoder.block.{i}.layer.0.layer_norm.weight", "block.{i}.attn_norm.scale"),
        *(
            Rule(f"encoder.block.{{i}}.layer.1.DenseReluDense.{x}.weight", f"block.{{i}}.mlp.{x}.kernel", LINEAR)
            for x in ("wi_0", "wi_1", "wo")
        ),
        Rule("encoder.block.{i}.layer.1.layer_norm.weight", "block.{i}.mlp_norm.scale"),
        Rule("encoder.final_layer_norm.weight", "final.scale"),
    ]
