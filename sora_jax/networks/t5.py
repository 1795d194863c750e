"""The T5 v1.1 encoder: token ids to caption features.

The relative position bias depends on the sequence length only, so it is computed once, by ``embed``, and passed to every block.
``embed``, each ``block[i]`` and ``final`` can be called one at a time, as export does; a block is cut between its
methods ``attend`` and ``feed_forward``, which the host loop runs one at a time (`T5Encoder.segments`).  There is no decoder,
no dropout and no cache here, and this module reads no file.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from sora_jax.config import FLOAT32, DTypePolicy, T5Config
from sora_jax.networks.forms import WHOLE, Forms
from sora_jax.networks.layers import Linear, RMSNorm, gelu
from sora_jax.networks.segment import Segment


def position_buckets(length: int, config: T5Config) -> Int[np.ndarray, "L L"]:
    """Returns the bias-table row of every (query, key) pair of a sequence of ``length`` tokens.

    The first half of the table is for keys at or before the query, the second half for later keys.  Within a half, the
    first half of the rows are exact distances and the others grow logarithmically up to the maximum distance.

    Source: arXiv 1910.10683 section 2.1; transformers T5Attention._relative_position_bucket.  The logarithm is taken in
    float32, as there, because truncation at a bucket's edge depends on it.
    """
    per_direction = config.relative_attention_num_buckets // 2
    num_exact = per_direction // 2
    offset_LL = np.arange(length)[None, :] - np.arange(length)[:, None]
    distance_LL = np.abs(offset_LL)
    octaves = np.log(np.maximum(distance_LL, 1).astype(np.float32) / np.float32(num_exact))
    octaves = octaves / np.float32(math.log(config.relative_attention_max_distance / num_exact))
    far_LL = num_exact + (octaves * np.float32(per_direction - num_exact)).astype(np.int32)
    within_LL = np.where(distance_LL < num_exact, distance_LL, np.minimum(far_LL, per_direction - 1))
    return (within_LL + np.where(offset_LL > 0, per_direction, 0)).astype(np.int32)


class T5Embed(nnx.Module):
    """Token embedding, and the relative position bias that all blocks share."""

    def __init__(self, config: T5Config, *, policy: DTypePolicy, rngs: nnx.Rngs):
        self.config, self.policy = config, policy
        rows = jax.nn.initializers.normal(1.0)(rngs.params(), (config.vocab_size, config.d_model), policy.param)
        table_shape = (config.relative_attention_num_buckets, config.num_heads)
        table = _normal(config.d_model)(rngs.params(), table_shape, policy.param)
        self.embedding, self.relative_attention_bias = nnx.Param(rows), nnx.Param(table)

    def __call__(self, ids_BL: Int[Array, "B L"]) -> tuple[Float[Array, "B L E"], Float[Array, "1 N L L"]]:
        """Returns the embedded tokens, not scaled, in the compute dtype, and the float32 position bias."""
        x_BLE = jnp.take(self.embedding[...], ids_BL, axis=0).astype(self.policy.compute)
        return x_BLE, position_bias(self.relative_attention_bias[...], ids_BL.shape[1], self.config)


def position_bias(table_RN: Float[Array, "R N"], length: int, config: T5Config) -> Float[Array, "1 N L L"]:
    """Returns what is added to the attention logits of every block, in float32, from the table of learned biases."""
    return rearrange(table_RN.astype(jnp.float32)[position_buckets(length, config)], "q k n -> 1 n q k")


class T5Attention(nnx.Module):
    """Self-attention without biases and without the usual scaling of the logits (the initialisation holds it)."""

    def __init__(self, config: T5Config, *, policy: DTypePolicy, forms: Forms = WHOLE, rngs: nnx.Rngs):
        self.num_heads = config.num_heads
        self.attention, self.half_range = forms.attention, policy.half_range
        width, inner = config.d_model, config.num_heads * config.d_kv
        self.q = _linear(width, inner, fan_in=width * config.d_kv, policy=policy, rngs=rngs)
        self.k = _linear(width, inner, fan_in=width, policy=policy, rngs=rngs)
        self.v = _linear(width, inner, fan_in=width, policy=policy, rngs=rngs)
        self.o = _linear(inner, width, fan_in=inner, policy=policy, rngs=rngs)

    def __call__(
        self,
        x_BLE: Float[Array, "B L E"],
        bias_1NLL: Float[Array, "1 N L L"],
        mask_BL: Bool[Array, "B L"] | None,
    ) -> Float[Array, "B L E"]:
        """Returns what each token gathers from the real tokens (``mask_BL`` True)."""
        q, k, v = (rearrange(f(x_BLE), "b l (n k) -> b n l k", n=self.num_heads) for f in (self.q, self.k, self.v))
        mask = None if mask_BL is None else mask_BL[:, None, None, :]
        out = self.attention(q, k, v, scale=1.0, bias=bias_1NLL, mask=mask, half_range=self.half_range)
        return self.o(rearrange(out, "b n l k -> b l (n k)"))


class T5MLP(nnx.Module):
    """Feed-forward layer whose hidden units are gated by a tanh GELU."""

    def __init__(self, config: T5Config, *, policy: DTypePolicy, rngs: nnx.Rngs):
        self.wi_0 = _linear(config.d_model, config.d_ff, fan_in=config.d_model, policy=policy, rngs=rngs)
        self.wi_1 = _linear(config.d_model, config.d_ff, fan_in=config.d_model, policy=policy, rngs=rngs)
        self.wo = _linear(config.d_ff, config.d_model, fan_in=config.d_ff, policy=policy, rngs=rngs)

    def __call__(self, x_BLE: Float[Array, "B L E"]) -> Float[Array, "B L E"]:
        """Returns the residual's update of each token."""
        return self.wo(gelu(self.wi_0(x_BLE)) * self.wi_1(x_BLE))


class T5Block(nnx.Module):
    """Pre-norm self-attention, then pre-norm feed-forward, each added to the residual."""

    def __init__(self, config: T5Config, *, policy: DTypePolicy, forms: Forms = WHOLE, rngs: nnx.Rngs):
        self.attn_norm = RMSNorm(config.d_model, epsilon=config.layer_norm_epsilon, policy=policy)
        self.attn = T5Attention(config, policy=policy, forms=forms, rngs=rngs)
        self.mlp_norm = RMSNorm(config.d_model, epsilon=config.layer_norm_epsilon, policy=policy)
        self.mlp = T5MLP(config, policy=policy, rngs=rngs)

    def __call__(
        self,
        x_BLE: Float[Array, "B L E"],
        bias_1NLL: Float[Array, "1 N L L"],
        mask_BL: Bool[Array, "B L"] | None,
    ) -> Float[Array, "B L E"]:
        """Returns the hidden states after this block, in the dtype of ``x_BLE``."""
        return self.feed_forward(self.attend(x_BLE, bias_1NLL, mask_BL))

    def attend(
        self,
        x_BLE: Float[Array, "B L E"],
        bias_1NLL: Float[Array, "1 N L L"],
        mask_BL: Bool[Array, "B L"] | None,
    ) -> Float[Array, "B L E"]:
        """Returns the hidden states after the block's first half."""
        return x_BLE + self.attn(self.attn_norm(x_BLE), bias_1NLL, mask_BL)

    def feed_forward(self, x_BLE: Float[Array, "B L E"]) -> Float[Array, "B L E"]:
        """Returns the hidden states after the block's second half."""
        return x_BLE + self.mlp(self.mlp_norm(x_BLE))

    @staticmethod
    def segments() -> list[Segment]:
        """Returns the two halves of a block; the first takes position bias and mask as context."""
        return [
            Segment(T5Block.attend, parts=("attn_norm", "attn"), takes_context=True),
            Segment(T5Block.feed_forward, parts=("mlp_norm", "mlp")),
        ]


class T5Encoder(nnx.Module):
    """T5 v1.1 encoder.

    Source: transformers T5EncoderModel with ``feed_forward_proj="gated-gelu"``.  The initialisation is T5's own, so the
    network can be trained from scratch.
    """

    def __init__(self, config: T5Config, *, policy: DTypePolicy = FLOAT32, forms: Forms = WHOLE, rngs: nnx.Rngs):
        self.config, self.policy = config, policy
        self.embed = T5Embed(config, policy=policy, rngs=rngs)
        self.block = nnx.List([T5Block(config, policy=policy, forms=forms, rngs=rngs) for _ in range(config.num_layers)])
        self.final = RMSNorm(config.d_model, epsilon=config.layer_norm_epsilon, policy=policy)

    def __call__(self, ids_BL: Int[Array, "B L"], mask_BL: Bool[Array, "B L"] | None = None) -> Float[Array, "B L E"]:
        """Returns the caption features of every position, in the compute dtype.

        Args:
          ids_BL: token ids; an id outside the vocabulary gives NaN features.
          mask_BL: True = real token.  Padded positions are never attended to, but still get (meaningless) features of
            their own, as in the source; ``None`` means that all tokens are real.
        """
        x_BLE, bias_1NLL = self.embed(ids_BL)
        for block in self.block:
            x_BLE = block(x_BLE, bias_1NLL, mask_BL)
        return self.final(x_BLE)

    @staticmethod
    def segments(config: T5Config) -> list[Segment]:
        """Returns what follows ``embed``, cut: hidden states in and out; the context is the position bias and the mask."""
        halves = [half.inside("block", i) for i in range(config.num_layers) for half in T5Block.segments()]
        return [*halves, Segment(RMSNorm.__call__, ("final",))]


def _linear(in_features: int, out_features: int, *, fan_in: int, policy: DTypePolicy, rngs: nnx.Rngs) -> Linear:
    return Linear(in_features, out_features, use_bias=False, policy=policy, rngs=rngs, init=_normal(fan_in))


def _normal(fan_in: int) -> jax.nn.initializers.Initializer:
    return jax.nn.initializers.normal(fan_in**-0.5)
