"""A block of STDiT3, spatial or temporal: self attention, cross attention to the caption, MLP.

Invariant: `STDiT3Block` is the only block forward; resident, streamed, merged, exported and trained paths all call it.
Modulation and gates are float32 whatever the compute dtype.  `stdit3.Embed` computes what conditions a block.
"""

import dataclasses
import functools
from typing import no_type_check

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Bool, Float

from sora_jax import layout
from sora_jax.config import FLOAT32, DTypePolicy, STDiT3Config
from sora_jax.networks import merging
from sora_jax.networks.forms import WHOLE, Forms
from sora_jax.networks.layers import Linear, RMSNorm, gelu, layer_norm, lifted
from sora_jax.networks.portions import in_portions, portions
from sora_jax.networks.positions import rotate

NORM_EPSILON = 1e-6


@jax.tree_util.register_dataclass
@no_type_check  # a pytree also holds shapes and paths in place of arrays
@dataclasses.dataclass(frozen=True, kw_only=True)
class Conditioning:
    """What every block and the final layer take in addition to the tokens.

    ``mod_BF6D`` holds shift, scale, gate of attention, then of the MLP; its axis F is 1, or T where a frame mask chose for
    each frame between time t and time 0.  The final layer needs both times themselves.  ``num_places`` is static: the places of
    a frame where they are spread over devices (`layout.divided`).
    """

    caption_BLD: Float[Array, "B L D"]
    mask_BL: Bool[Array, "B L"] | None
    mod_BF6D: Float[Array, "B F 6 D"]
    t_BD: Float[Array, "B D"]
    t0_BD: Float[Array, "B D"] | None
    frame_mask_BT: Bool[Array, "B T"] | None
    num_places: int | None = dataclasses.field(default=None, metadata={"static": True})

    def part(self, row: Array, frames: tuple[Array | int, int] | None) -> "Conditioning":
        """Returns what a block is given for one row of the batch and, where named by start and length, some of its frames."""
        one: Conditioning = jax.tree.map(lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, row, 1), self)
        if frames is None or self.mod_BF6D.shape[1] == 1:
            return one
        return dataclasses.replace(one, mod_BF6D=jax.lax.dynamic_slice_in_dim(one.mod_BF6D, *frames, axis=1))


class STDiT3Block(nnx.Module):
    """Self attention, cross attention to the caption, MLP; spatial or temporal.

    Source: Open-Sora v1.2 opensora/models/stdit/stdit3.py STDiT3Block; merging: On-device-Sora, the same file.
    """

    def __init__(
        self,
        config: STDiT3Config,
        *,
        temporal: bool,
        policy: DTypePolicy = FLOAT32,
        forms: Forms = WHOLE,
        rngs: nnx.Rngs,
    ):
        # The source starts temporal blocks as the identity: an image model that learns motion.
        out_init = jax.nn.initializers.zeros if temporal else None
        self.temporal = temporal
        self.half_range = policy.half_range
        self.hidden_bytes, self.mlp_size = forms.hidden_bytes, config.mlp_size
        self.attn = SelfAttention(config, temporal=temporal, policy=policy, forms=forms, rngs=rngs, out_init=out_init)
        self.cross_attn = CrossAttention(config, policy=policy, forms=forms, rngs=rngs, out_init=out_init)
        self.mlp = MLP(config, policy=policy, rngs=rngs, out_init=out_init)
        init = jax.nn.initializers.normal(config.hidden_size**-0.5)
        self.scale_shift_table = nnx.Param(init(rngs.params(), (6, config.hidden_size), policy.param))

    def __call__(
        self, x_BTSD: Float[Array, "B T S D"], conditioning: Conditioning, *, merge: merging.Merge | None = None
    ) -> Float[Array, "B T S D"]:
        """Returns the tokens after the block; with ``merge``, its attentions see merged frames (`merging.Merge`).

        Where the hidden units of the MLP would take more than ``forms.hidden_bytes``, a portion of the tokens at a time.
        """
        divided = None
        if self.hidden_bytes is not None:
            most_tokens = self.hidden_bytes // (self.mlp_size * x_BTSD.dtype.itemsize)
            divided = portions(x_BTSD.shape, most_tokens, temporal=self.temporal, merge=merge)
        if divided is None:
            return self._forward(x_BTSD, conditioning, merge)
        by_frame = not self.temporal

        def forward(part_BTSD: Array, row: Array, start: Array | int, length: int) -> Array:
            return self._forward(part_BTSD, conditioning.part(row, (start, length) if by_frame else None), merge)

        return in_portions(forward, x_BTSD, divided)

    def _forward(self, x_BTSD: Array, conditioning: Conditioning, merge: merging.Merge | None) -> Array:
        mod_BF6D = lifted(self.scale_shift_table[...], 4).astype(jnp.float32) + conditioning.mod_BF6D
        shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = jnp.split(mod_BF6D, 6, axis=2)
        merge_self = merge if merge is not None and (merge.temporal if self.temporal else merge.spatial) else None
        merge_cross = merge if merge is not None and merge.cross and not merge.keys_values_only else None
        modulate = functools.partial(modulated, half_range=self.half_range)
        seen_BTSD = modulate(x_BTSD, shift_attn, scale_attn)
        x_BTSD = _gated(x_BTSD, gate_attn, self.attn(seen_BTSD, merge=merge_self, num_places=conditioning.num_places))
        x_BTSD = x_BTSD + self._cross(x_BTSD, conditioning, merge_cross)
        return _gated(x_BTSD, gate_mlp, self.mlp(modulate(x_BTSD, shift_mlp, scale_mlp)))

    def _cross(self, x_BTSD: Array, conditioning: Conditioning, merge: merging.Merge | None) -> Array:
        if merge is None:
            return self.cross_attn(x_BTSD, conditioning.caption_BLD, conditioning.mask_BL)
        merged_BMSD = merging.merge(x_BTSD, odd=merge.odd)
        out_BMSD = self.cross_attn(merged_BMSD, conditioning.caption_BLD, conditioning.mask_BL)
        return merging.unmerge(out_BMSD, x_BTSD.shape[1])


class SelfAttention(nnx.Module):
    """Self attention within each frame, or with ``temporal`` along time at each place, rotated by the frame's position.

    Source: Open-Sora v1.2 opensora/models/layers/blocks.py Attention.
    """

    def __init__(
        self,
        config: STDiT3Config,
        *,
        temporal: bool,
        policy: DTypePolicy,
        forms: Forms,
        rngs: nnx.Rngs,
        out_init: jax.nn.initializers.Initializer | None,
    ):
        self.temporal = temporal
        self.attention, self.half_range = forms.attention, policy.half_range
        self.head_size = config.head_size
        self.qkv = Linear(config.hidden_size, 3 * config.hidden_size, policy=policy, rngs=rngs)
        self.q_norm = RMSNorm(config.head_size, epsilon=NORM_EPSILON, policy=policy) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_size, epsilon=NORM_EPSILON, policy=policy) if config.qk_norm else None
        self.proj = Linear(config.hidden_size, config.hidden_size, policy=policy, rngs=rngs, init=out_init)

    def __call__(
        self, x_BTSD: Float[Array, "B T S D"], *, merge: merging.Merge | None = None, num_places: int | None = None
    ) -> Float[Array, "B T S D"]:
        """Returns the attention output of every frame; with ``merge``, computed over merged frames.

        Where tokens are spread over devices by place, ``num_places`` is how many a frame has: attention within frames then
        moves them, so that each device has some frames whole, and moves its output back.
        """
        frames = x_BTSD.shape[1]
        whole = None if self.temporal else num_places
        if merge is None:
            out_BTSD = self._attend(*self._qkv(layout.frames(x_BTSD, whole)), np.arange(frames), np.arange(frames))
            return layout.places(out_BTSD, frames, whole)
        merged_BMSD = merging.merge(x_BTSD, odd=merge.odd)
        positions_M = merging.token_positions(frames, merge)
        if not merge.keys_values_only:
            out_BMSD = self._attend(*self._qkv(layout.frames(merged_BMSD, whole)), positions_M, positions_M)
            return merging.unmerge(layout.places(out_BMSD, merged_BMSD.shape[1], whole), frames)
        width = x_BTSD.shape[-1]
        q = self.qkv(x_BTSD, slice(0, width))
        k, v = jnp.split(self.qkv(merged_BMSD, slice(width, None)), 2, axis=-1)
        if not self.temporal:
            k, v = merging.unmerge(k, frames), merging.unmerge(v, frames)
        q, k, v = (layout.frames(part_BTSD, whole) for part_BTSD in (q, k, v))
        out_BTSD = self._attend(q, k, v, merging.query_positions(frames, merge), positions_M)
        return layout.places(out_BTSD, frames, whole)

    def _qkv(self, x_BTSD: Array) -> tuple[Array, Array, Array]:
        q, k, v = jnp.split(self.qkv(x_BTSD), 3, axis=-1)
        return q, k, v

    def _attend(self, q_BTSD: Array, k_BTSD: Array, v_BTSD: Array, q_positions: np.ndarray, k_positions: np.ndarray) -> Array:
        """Returns the projected attention output [B, T, S, D]; queries and keys may differ in their number of frames."""
        batch, frames, places, _ = q_BTSD.shape
        split = "b t s (n k) -> (b s) n t k" if self.temporal else "b t s (n k) -> (b t) n s k"
        q, k, v = (rearrange(part, split, k=self.head_size) for part in (q_BTSD, k_BTSD, v_BTSD))
        q = q if self.q_norm is None else self.q_norm(q)
        k = k if self.k_norm is None else self.k_norm(k)
        if self.temporal:
            q, k = rotate(q, q_positions), rotate(k, k_positions)
        out = self.attention(q, k, v, scale=self.head_size**-0.5, half_range=self.half_range)
        join = "(b s) n t k -> b t s (n k)" if self.temporal else "(b t) n s k -> b t s (n k)"
        sizes = {"b": batch, "s": places} if self.temporal else {"b": batch, "t": frames}
        return self.proj(rearrange(out, join, **sizes))


class CrossAttention(nnx.Module):
    """Attention of every video token to the caption's real tokens.

    Source: Open-Sora v1.2 opensora/models/layers/blocks.py MultiHeadCrossAttention.
    """

    def __init__(
        self,
        config: STDiT3Config,
        *,
        policy: DTypePolicy,
        forms: Forms,
        rngs: nnx.Rngs,
        out_init: jax.nn.initializers.Initializer | None,
    ):
        width = config.hidden_size
        self.attention, self.half_range = forms.attention, policy.half_range
        self.head_size = config.head_size
        self.q_linear = Linear(width, width, policy=policy, rngs=rngs)
        self.kv_linear = Linear(width, 2 * width, policy=policy, rngs=rngs)
        self.proj = Linear(width, width, policy=policy, rngs=rngs, init=out_init)

    def __call__(
        self, x_BTSD: Float[Array, "B T S D"], caption_BLD: Float[Array, "B L D"], mask_BL: Bool[Array, "B L"] | None
    ) -> Float[Array, "B T S D"]:
        """Returns the attention output of every token; without a mask, all caption tokens are real."""
        q = rearrange(self.q_linear(x_BTSD), "b t s (n k) -> b n (t s) k", k=self.head_size)
        k, v = rearrange(self.kv_linear(caption_BLD), "b l (two n k) -> two b n l k", two=2, k=self.head_size)
        mask = None if mask_BL is None else mask_BL[:, None, None, :]
        out = self.attention(q, k, v, scale=self.head_size**-0.5, mask=mask, half_range=self.half_range)
        return self.proj(rearrange(out, "b n (t s) k -> b t s (n k)", t=x_BTSD.shape[1]))


class MLP(nnx.Module):
    """Two linear maps around a GELU (tanh approximation)."""

    def __init__(
        self,
        config: STDiT3Config,
        *,
        policy: DTypePolicy,
        rngs: nnx.Rngs,
        out_init: jax.nn.initializers.Initializer | None,
    ):
        self.fc1 = Linear(config.hidden_size, config.mlp_size, policy=policy, rngs=rngs)
        self.fc2 = Linear(config.mlp_size, config.hidden_size, policy=policy, rngs=rngs, init=out_init)

    def __call__(self, x_BTSD: Float[Array, "B T S D"]) -> Float[Array, "B T S D"]:
        """Returns every token's own update."""
        return self.fc2(gelu(self.fc1(x_BTSD)))


def modulated(
    x_BTSD: Float[Array, "B T S D"],
    shift_BF1D: Float[Array, "B F 1 D"],
    scale_BF1D: Float[Array, "B F 1 D"],
    *,
    half_range: bool,
) -> Float[Array, "B T S D"]:
    """Returns the normalised tokens, scaled and shifted in float32, in the dtype of ``x_BTSD``."""
    normed = layer_norm(x_BTSD.astype(jnp.float32), epsilon=NORM_EPSILON, half_range=half_range)
    return (normed * (1 + scale_BF1D) + shift_BF1D).astype(x_BTSD.dtype)


def modulated_input(
    table_6D: Float[Array, "6 D"], x_BTSD: Float[Array, "B T S D"], conditioning: Conditioning, *, half_range: bool
) -> Float[Array, "B T S D"]:
    """Returns what the self attention of the block with this ``scale_shift_table`` would see."""
    mod_BF6D = lifted(table_6D, 4).astype(jnp.float32) + conditioning.mod_BF6D
    return modulated(x_BTSD, mod_BF6D[:, :, :1], mod_BF6D[:, :, 1:2], half_range=half_range)


def _gated(x_BTSD: Array, gate_BF1D: Array, branch_BTSD: Array) -> Array:
    return x_BTSD + (gate_BF1D * branch_BTSD.astype(jnp.float32)).astype(x_BTSD.dtype)
