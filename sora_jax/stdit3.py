"""STDiT3, the diffusion transformer of Open-Sora 1.2: latents, time and caption in, velocity out.

Layers, in execution order: ``embed``, then spatial and temporal blocks in turn, then ``final``.  A spatial block attends
within each frame, a temporal block along time at each place; the two differ in nothing else.

Invariant: `STDiT3Block` is the only block forward; resident, streamed, merged, exported and trained paths all call it, and
conditioning arithmetic (time, sizes, modulation) is float32 whatever the compute dtype.  Nothing here knows about
guidance, schedules or files.
"""

import dataclasses
import functools
import math
from typing import no_type_check

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Bool, Float

from sora_jax import merging
from sora_jax.config import FLOAT32, DTypePolicy, STDiT3Config
from sora_jax.layers import Linear, RMSNorm, attention, gelu, layer_norm, lifted, linear
from sora_jax.positions import SINUSOID_SIZE, position_embedding, rotate, sinusoid

NORM_EPSILON = 1e-6


@jax.tree_util.register_dataclass
@no_type_check  # a pytree also holds shapes and paths in place of arrays
@dataclasses.dataclass(frozen=True, kw_only=True)
class Conditioning:
    """What every block and the final layer are given besides the tokens.

    ``mod_BF6D`` holds shift, scale, gate of attention, then of the MLP; its axis F is 1, or T where a frame mask chose for
    each frame between time t and time 0.  The final layer needs both times themselves.
    """

    caption_BLD: Float[Array, "B L D"]
    mask_BL: Bool[Array, "B L"] | None
    mod_BF6D: Float[Array, "B F 6 D"]
    t_BD: Float[Array, "B D"]
    t0_BD: Float[Array, "B D"] | None
    frame_mask_BT: Bool[Array, "B T"] | None


class STDiT3(nnx.Module):
    """Velocity of rectified flow for video latents.

    Source: Open-Sora v1.2 opensora/models/stdit/stdit3.py STDiT3.
    Differs from source: masked cross attention instead of packed captions; same output, static shapes.
    """

    def __init__(self, config: STDiT3Config, *, policy: DTypePolicy = FLOAT32, rngs: nnx.Rngs):
        self.config = config
        self.policy = policy
        self.embed = Embed(config, policy=policy, rngs=rngs)
        self.spatial_blocks = nnx.List(
            STDiT3Block(config, temporal=False, policy=policy, rngs=rngs) for _ in range(config.depth)
        )
        self.temporal_blocks = nnx.List(
            STDiT3Block(config, temporal=True, policy=policy, rngs=rngs) for _ in range(config.depth)
        )
        self.final = Final(config, policy=policy, rngs=rngs)

    @property
    def null_caption_LE(self) -> Float[Array, "L E"]:
        """The learned caption of the unconditional branch, in the space of text features."""
        return self.embed.y_embedder.y_embedding[...]

    def __call__(
        self,
        z_BTHWC: Float[Array, "B T H W C"],
        t_B: Float[Array, "B"],
        caption_BLE: Float[Array, "B L E"],
        mask_BL: Bool[Array, "_ L"] | None = None,
        *,
        fps_B: Float[Array, "_"],
        height_px_B: Float[Array, "_"],
        width_px_B: Float[Array, "_"],
        frame_mask_BT: Bool[Array, "B T"] | None = None,
        merge: merging.Merge | None = None,
    ) -> Float[Array, "B T H W O"]:
        """Returns the velocity (data minus noise) in the first ``in_channels`` channels, float32; the rest is unused.

        ``t_B`` lies in [0, 1000], 1000 being noise.  Frames where ``frame_mask_BT`` is False are conditioned on time 0.
        Masks and sizes with a smaller batch are tiled, so one mask serves both halves of a guided batch.  Height and width
        are those of the video in pixels; as in the source, those of sample 0 count for the whole batch.
        """
        x_BTSD, conditioning = self.embed(
            z_BTHWC,
            t_B,
            caption_BLE,
            mask_BL,
            fps_B=fps_B,
            height_px_B=height_px_B,
            width_px_B=width_px_B,
            frame_mask_BT=frame_mask_BT,
        )
        x_BTSD = self.stack(x_BTSD, conditioning, merge=merge)
        return self.final(x_BTSD, conditioning, height=z_BTHWC.shape[2], width=z_BTHWC.shape[3])

    def stack(
        self, x_BTSD: Float[Array, "B T S D"], conditioning: Conditioning, *, merge: merging.Merge | None = None
    ) -> Float[Array, "B T S D"]:
        """Returns the tokens after all blocks, between ``embed`` and ``final``."""
        for spatial, temporal in zip(self.spatial_blocks, self.temporal_blocks, strict=True):
            x_BTSD = spatial(x_BTSD, conditioning, merge=merge)
            x_BTSD = temporal(x_BTSD, conditioning, merge=merge)
        return x_BTSD


class Embed(nnx.Module):
    """Patches, time, frame rate and caption, each embedded at the model's width."""

    def __init__(self, config: STDiT3Config, *, policy: DTypePolicy, rngs: nnx.Rngs):
        width = config.hidden_size
        self.config = config
        self.policy = policy
        self.x_embedder = PatchEmbedder(config, policy=policy, rngs=rngs)
        self.t_embedder = ScalarEmbedder(width, policy=policy, rngs=rngs)
        self.fps_embedder = ScalarEmbedder(width, policy=policy, rngs=rngs, zero=True)
        self.t_block = Linear(width, 6 * width, policy=policy, rngs=rngs)
        self.y_embedder = CaptionEmbedder(config, policy=policy, rngs=rngs)

    def __call__(
        self,
        z_BTHWC: Float[Array, "B T H W C"],
        t_B: Float[Array, "B"],
        caption_BLE: Float[Array, "B L E"],
        mask_BL: Bool[Array, "_ L"] | None,
        *,
        fps_B: Float[Array, "_"],
        height_px_B: Float[Array, "_"],
        width_px_B: Float[Array, "_"],
        frame_mask_BT: Bool[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T S D"], Conditioning]:
        """Returns the video tokens and what conditions them."""
        batch, compute = z_BTHWC.shape[0], self.policy.compute
        fps_BD = self.fps_embedder(_tiled(fps_B, batch, "fps_B"))
        t_BD = self.t_embedder(t_B) + fps_BD
        t0_BD = None if frame_mask_BT is None else self.t_embedder(jnp.zeros_like(t_B)) + fps_BD
        conditioning = Conditioning(
            caption_BLD=self.y_embedder(caption_BLE.astype(compute)),
            mask_BL=None if mask_BL is None else _tiled(mask_BL, batch, "mask_BL"),
            mod_BF6D=self.modulation(t_BD, t0_BD, frame_mask_BT),
            t_BD=t_BD,
            t0_BD=t0_BD,
            frame_mask_BT=frame_mask_BT,
        )
        return self.tokens(z_BTHWC, height_px_B, width_px_B), conditioning

    def tokens(
        self, z_BTHWC: Float[Array, "B T H W C"], height_px_B: Float[Array, "_"], width_px_B: Float[Array, "_"]
    ) -> Float[Array, "B T S D"]:
        """Returns embedded patches with their position; odd sizes are padded with zeros at the bottom and the right."""
        x_BTHWD = self.x_embedder(z_BTHWC.astype(self.policy.compute))
        pixels = height_px_B[0].astype(jnp.float32) * width_px_B[0].astype(jnp.float32)
        position_HWD = position_embedding(*x_BTHWD.shape[2:], scale=jnp.sqrt(pixels) / self.config.input_sq_size)
        return rearrange(x_BTHWD + lifted(position_HWD.astype(x_BTHWD.dtype), 5), "b t h w d -> b t (h w) d")

    def modulation(
        self,
        t_BD: Float[Array, "B D"],
        t0_BD: Float[Array, "B D"] | None,
        frame_mask_BT: Bool[Array, "B T"] | None,
    ) -> Float[Array, "B F 6 D"]:
        """Returns the six modulation vectors, of each frame where a frame mask is given.

        Differs from source: chooses between the modulations of time t and time 0 once, instead of between the modulated
        tokens in every block; same output.
        """
        mod_BF6D = rearrange(self.t_block(jax.nn.silu(t_BD)), "b (six d) -> b 1 six d", six=6)
        if t0_BD is None or frame_mask_BT is None:
            return mod_BF6D
        mod0_BF6D = rearrange(self.t_block(jax.nn.silu(t0_BD)), "b (six d) -> b 1 six d", six=6)
        return jnp.where(frame_mask_BT[:, :, None, None], mod_BF6D, mod0_BF6D)


class PatchEmbedder(nnx.Module):
    """Linear map of patches; the kernel is a convolution's, (frames, rows, columns, in, out).

    Source: Open-Sora v1.2 opensora/models/layers/blocks.py PatchEmbed3D.
    """

    def __init__(self, config: STDiT3Config, *, policy: DTypePolicy, rngs: nnx.Rngs):
        init = jax.nn.initializers.xavier_uniform(in_axis=(0, 1, 2, 3), out_axis=4)
        shape = (*config.patch_size, config.in_channels, config.hidden_size)
        self.kernel = nnx.Param(init(rngs.params(), shape, policy.param))
        self.bias = nnx.Param(jnp.zeros(config.hidden_size, policy.param))

    def __call__(self, z_BTHWC: Float[Array, "B T H W C"]) -> Float[Array, "B T Hp Wp D"]:
        """Returns one token for each patch; odd sizes are padded with zeros at the bottom and the right."""
        kernel = self.kernel[...]
        _, rows, columns, _, _ = kernel.shape
        padding = ((0, 0), (0, 0), (0, -z_BTHWC.shape[2] % rows), (0, -z_BTHWC.shape[3] % columns), (0, 0))
        patches = rearrange(jnp.pad(z_BTHWC, padding), "b t (h p) (w q) c -> b t h w (p q c)", p=rows, q=columns)
        return linear(patches, kernel.reshape(-1, kernel.shape[-1]), self.bias[...])


class ScalarEmbedder(nnx.Module):
    """Embedding of one number for each sample (diffusion time, frame rate), in float32.

    Source: Open-Sora v1.2 opensora/models/layers/blocks.py TimestepEmbedder, SizeEmbedder.
    """

    def __init__(self, width: int, *, policy: DTypePolicy, rngs: nnx.Rngs, zero: bool = False):
        init = jax.nn.initializers.normal(0.02) if zero else None
        self.fc1 = Linear(SINUSOID_SIZE, width, policy=policy, rngs=rngs, init=init)
        self.fc2 = Linear(width, width, policy=policy, rngs=rngs, init=jax.nn.initializers.zeros if zero else None)

    def __call__(self, value_B: Float[Array, "B"]) -> Float[Array, "B D"]:
        """Returns one float32 vector for each sample."""
        return self.fc2(jax.nn.silu(self.fc1(sinusoid(value_B))))


class CaptionEmbedder(nnx.Module):
    """Projection of text features, and the learned features of the null caption.

    Source: Open-Sora v1.2 opensora/models/layers/blocks.py CaptionEmbedder.
    """

    def __init__(self, config: STDiT3Config, *, policy: DTypePolicy, rngs: nnx.Rngs):
        shape = (config.model_max_length, config.caption_channels)
        init = jax.nn.initializers.normal(config.caption_channels**-0.5)
        self.y_embedding = nnx.Param(init(rngs.params(), shape, policy.param))
        self.fc1 = Linear(config.caption_channels, config.hidden_size, policy=policy, rngs=rngs)
        self.fc2 = Linear(config.hidden_size, config.hidden_size, policy=policy, rngs=rngs)

    def __call__(self, caption_BLE: Float[Array, "B L E"]) -> Float[Array, "B L D"]:
        """Returns text features at the model's width."""
        return self.fc2(gelu(self.fc1(caption_BLE)))


class STDiT3Block(nnx.Module):
    """Self attention, cross attention to the caption, MLP; spatial or temporal.

    Source: Open-Sora v1.2 opensora/models/stdit/stdit3.py STDiT3Block; merging: On-device-Sora, the same file.
    """

    def __init__(self, config: STDiT3Config, *, temporal: bool, policy: DTypePolicy = FLOAT32, rngs: nnx.Rngs):
        # The source starts temporal blocks as the identity: an image model that learns motion.
        out_init = jax.nn.initializers.zeros if temporal else None
        self.temporal = temporal
        self.half_range = policy.half_range
        self.attn = SelfAttention(config, temporal=temporal, policy=policy, rngs=rngs, out_init=out_init)
        self.cross_attn = CrossAttention(config, policy=policy, rngs=rngs, out_init=out_init)
        self.mlp = MLP(config, policy=policy, rngs=rngs, out_init=out_init)
        init = jax.nn.initializers.normal(config.hidden_size**-0.5)
        self.scale_shift_table = nnx.Param(init(rngs.params(), (6, config.hidden_size), policy.param))

    def __call__(
        self, x_BTSD: Float[Array, "B T S D"], conditioning: Conditioning, *, merge: merging.Merge | None = None
    ) -> Float[Array, "B T S D"]:
        """Returns the tokens after the block; with ``merge``, its attentions see merged frames (`merging.Merge`)."""
        mod_BF6D = lifted(self.scale_shift_table[...], 4).astype(jnp.float32) + conditioning.mod_BF6D
        shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = jnp.split(mod_BF6D, 6, axis=2)
        merge_self = merge if merge is not None and (merge.temporal if self.temporal else merge.spatial) else None
        merge_cross = merge if merge is not None and merge.cross and not merge.keys_values_only else None
        modulated = functools.partial(_modulated, half_range=self.half_range)
        x_BTSD = _gated(x_BTSD, gate_attn, self.attn(modulated(x_BTSD, shift_attn, scale_attn), merge=merge_self))
        x_BTSD = x_BTSD + self._cross(x_BTSD, conditioning, merge_cross)
        return _gated(x_BTSD, gate_mlp, self.mlp(modulated(x_BTSD, shift_mlp, scale_mlp)))

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
        rngs: nnx.Rngs,
        out_init: jax.nn.initializers.Initializer | None,
    ):
        self.temporal = temporal
        self.half_range = policy.half_range
        self.head_size = config.head_size
        self.qkv = Linear(config.hidden_size, 3 * config.hidden_size, policy=policy, rngs=rngs)
        self.q_norm = RMSNorm(config.head_size, epsilon=NORM_EPSILON, policy=policy) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_size, epsilon=NORM_EPSILON, policy=policy) if config.qk_norm else None
        self.proj = Linear(config.hidden_size, config.hidden_size, policy=policy, rngs=rngs, init=out_init)

    def __call__(self, x_BTSD: Float[Array, "B T S D"], *, merge: merging.Merge | None = None) -> Float[Array, "B T S D"]:
        """Returns the attention output of every frame; with ``merge``, computed over merged frames."""
        frames = x_BTSD.shape[1]
        if merge is None:
            return self._attend(*self._qkv(x_BTSD), np.arange(frames), np.arange(frames))
        merged_BMSD = merging.merge(x_BTSD, odd=merge.odd)
        positions_M = merging.token_positions(frames, merge)
        if not merge.keys_values_only:
            return merging.unmerge(self._attend(*self._qkv(merged_BMSD), positions_M, positions_M), frames)
        width = x_BTSD.shape[-1]
        q = self.qkv(x_BTSD, slice(0, width))
        k, v = jnp.split(self.qkv(merged_BMSD, slice(width, None)), 2, axis=-1)
        if not self.temporal:
            k, v = merging.unmerge(k, frames), merging.unmerge(v, frames)
        return self._attend(q, k, v, merging.query_positions(frames, merge), positions_M)

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
        out = attention(q, k, v, scale=self.head_size**-0.5, half_range=self.half_range)
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
        rngs: nnx.Rngs,
        out_init: jax.nn.initializers.Initializer | None,
    ):
        width = config.hidden_size
        self.half_range = policy.half_range
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
        out = attention(q, k, v, scale=self.head_size**-0.5, mask=mask, half_range=self.half_range)
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


class Final(nnx.Module):
    """Last modulation and the map from tokens back to latent patches.

    Source: Open-Sora v1.2 opensora/models/layers/blocks.py T2IFinalLayer; stdit3.py unpatchify.
    """

    def __init__(self, config: STDiT3Config, *, policy: DTypePolicy, rngs: nnx.Rngs):
        self.config = config
        self.half_range = policy.half_range
        init = jax.nn.initializers.normal(config.hidden_size**-0.5)
        self.scale_shift_table = nnx.Param(init(rngs.params(), (2, config.hidden_size), policy.param))
        self.linear = Linear(config.hidden_size, math.prod(config.patch_size) * config.out_channels, policy=policy, rngs=rngs)

    def __call__(
        self, x_BTSD: Float[Array, "B T S D"], conditioning: Conditioning, *, height: int, width: int
    ) -> Float[Array, "B T H W O"]:
        """Returns the latents' velocity in float32, ``height`` x ``width`` latent cells."""
        _, rows, columns = self.config.patch_size
        patches = self.patches(x_BTSD, conditioning)
        out_BTHWO = rearrange(patches, "b t (h w) (p q o) -> b t (h p) (w q) o", h=-(-height // rows), p=rows, q=columns)
        return out_BTHWO[:, :, :height, :width].astype(jnp.float32)

    def patches(self, x_BTSD: Float[Array, "B T S D"], conditioning: Conditioning) -> Float[Array, "B T S P"]:
        """Returns one output patch for each token.

        As in the source, the frames of time 0 are normalised and modulated a second time, after the modulation of time t;
        checkpoints were trained with it.
        """
        shift, scale = self._modulation(conditioning.t_BD)
        out_BTSD = _modulated(x_BTSD, shift, scale, half_range=self.half_range)
        if conditioning.frame_mask_BT is not None and conditioning.t0_BD is not None:
            shift0, scale0 = self._modulation(conditioning.t0_BD)
            frozen_BTSD = _modulated(out_BTSD, shift0, scale0, half_range=self.half_range)
            out_BTSD = jnp.where(conditioning.frame_mask_BT[:, :, None, None], out_BTSD, frozen_BTSD)
        return self.linear(out_BTSD)

    def _modulation(self, t_BD: Array) -> tuple[Array, Array]:
        mod_B12D = lifted(self.scale_shift_table[...], 4).astype(jnp.float32) + t_BD[:, None, None, :]
        return mod_B12D[:, :, :1], mod_B12D[:, :, 1:]


def _modulated(x_BTSD: Array, shift_BF1D: Array, scale_BF1D: Array, *, half_range: bool) -> Array:
    normed = layer_norm(x_BTSD.astype(jnp.float32), epsilon=NORM_EPSILON, half_range=half_range)
    return (normed * (1 + scale_BF1D) + shift_BF1D).astype(x_BTSD.dtype)


def _gated(x_BTSD: Array, gate_BF1D: Array, branch_BTSD: Array) -> Array:
    return x_BTSD + (gate_BF1D * branch_BTSD.astype(jnp.float32)).astype(x_BTSD.dtype)


def _tiled(x: Array, batch: int, name: str) -> Array:
    """Returns ``x`` repeated as a whole until its first axis is ``batch`` long."""
    if batch % x.shape[0]:
        raise ValueError(f"{name} has batch {x.shape[0]}, which does not divide the batch {batch} of the latents.")
    return x if x.shape[0] == batch else jnp.tile(x, (batch // x.shape[0], *(1,) * (x.ndim - 1)))
