"""The T5 table: names of transformers' T5 v1.1 encoder (checkpoint ``DeepFloyd/t5-v1_1-xxl``) to ours, and two other spellings.

Only names and layouts; the engine is in ``rules.py``. Single files of an encoder often lack ``encoder.`` before its names; GGUF
files have names of their own (Source: gguf-py's constants, architectures ``t5`` and ``t5encoder``).
"""

from convert_weights.rules import LINEAR, Rule
from sora_jax.config import T5Config

_DECODER = "the decoder of a whole T5; captions need the encoder only"
_OUTPUT = "the output layer of a whole T5; captions need the encoder only"
_BOOKKEEPING = "bookkeeping of eight-bit floats; weights do not depend on it"
IGNORED = {
    "decoder.{*}": _DECODER,
    "dec.{*}": _DECODER,
    "lm_head.{*}": _OUTPUT,
    "output.weight": _OUTPUT,
    "scaled_fp8": _BOOKKEEPING,
    "{*}.scale_input": _BOOKKEEPING,
    "{*}.input_scale": _BOOKKEEPING,
    "{*}.comfy_quant": _BOOKKEEPING,
}


def rules(config: T5Config) -> list[Rule]:
    """Returns one rule for each parameter of a layer and each spelling; ``{i}`` counts the blocks."""
    return [Rule("shared.weight", "embed.embedding"), *_transformers("encoder."), *_transformers(""), *_gguf()]


def _transformers(prefix: str) -> list[Rule]:
    first, second = f"{prefix}block.{{i}}.layer.0", f"{prefix}block.{{i}}.layer.1"
    return [
        Rule(f"{prefix}embed_tokens.weight", "embed.embedding", duplicate_of="shared.weight"),
        Rule(f"{prefix}block.0.layer.0.SelfAttention.relative_attention_bias.weight", "embed.relative_attention_bias"),
        *(Rule(f"{first}.SelfAttention.{x}.weight", f"block.{{i}}.attn.{x}.kernel", LINEAR) for x in "qkvo"),
        Rule(f"{first}.layer_norm.weight", "block.{i}.attn_norm.scale"),
        *(Rule(f"{second}.DenseReluDense.{x}.weight", f"block.{{i}}.mlp.{x}.kernel", LINEAR) for x in ("wi_0", "wi_1", "wo")),
        Rule(f"{second}.layer_norm.weight", "block.{i}.mlp_norm.scale"),
        Rule(f"{prefix}final_layer_norm.weight", "final.scale"),
    ]


def _gguf() -> list[Rule]:
    feed_forward = {"gate": "wi_0", "up": "wi_1", "down": "wo"}
    return [
        Rule("token_embd.weight", "embed.embedding"),
        Rule("enc.blk.0.attn_rel_b.weight", "embed.relative_attention_bias"),
        *(Rule(f"enc.blk.{{i}}.attn_{x}.weight", f"block.{{i}}.attn.{x}.kernel", LINEAR) for x in "qkvo"),
        Rule("enc.blk.{i}.attn_norm.weight", "block.{i}.attn_norm.scale"),
        *(
            Rule(f"enc.blk.{{i}}.ffn_{theirs}.weight", f"block.{{i}}.mlp.{ours}.kernel", LINEAR)
            for theirs, ours in feed_forward.items()
        ),
        Rule("enc.blk.{i}.ffn_norm.weight", "block.{i}.mlp_norm.scale"),
        Rule("enc.output_norm.weight", "final.scale"),
    ]
