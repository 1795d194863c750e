"""STDiT3, the diffusion transformer of Open-Sora 1.2: latents, time and caption in, velocity out.

Layers, in execution order: ``embed``, then spatial and temporal blocks alternately, then ``final``.  A spatial block attends
within each frame, a temporal block along time at each place; the two differ in nothing else.

Invariant: conditioning arithmetic (time, sizes, modulation) is float32 whatever the compute dtype.  The blocks are those of
`stdit3_block`; nothing here knows about guidance, schedules or files.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Literal

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Bool, Float

from sora_jax import layout
from sora_jax.config import FLOAT32, DTypePolicy, STDiT3Config
from sora_jax.networks import merging
from sora_jax.networks.forms import WHOLE, Forms
from sora_jax.networks.layers import Linear, gelu, lifted, linear
from sora_jax.networks.positions import SINUSOID_SIZE, position_embedding, sinusoid
from sora_jax.networks.stdit3_block import Conditioning, STDiT3Block, modulated, modulated_input

__all__ = ["PARTS", "Conditioning", "Embed", "Final", "Part", "STDiT3", "STDiT3Block", "with_null_caption"]

# Where the stack of blocks can be cut, for a sampler that decides after the first block whether the rest is needed.
Part = Literal["all", "first", "rest"]
PARTS: Mapping[Part, slice] = {"all": slice(None), "first": slice(1), "rest": slice(1, None)}


class STDiT3(nnx.Module):
    """Velocity of rectified flow for video latents.

    Source: Open-Sora v1.2 opensora/models/stdit/stdit3.py STDiT3.
    Differs from source: masked cross attention instead of packed captions; same output, static shapes.
    """

    def __init__(self, config: STDiT3Config, *, policy: DTypePolicy = FLOAT32, forms: Forms = WHOLE, rngs: nnx.Rngs):
        self.config = config
        self.policy = policy
        self.embed = Embed(config, policy=policy, rngs=rngs)
        self.spatial_blocks = nnx.List(
            STDiT3Block(config, temporal=False, policy=policy, forms=forms, rngs=rngs) for _ in range(config.depth)
        )
        self.temporal_blocks = nnx.List(
            STDiT3Block(config, temporal=True, policy=policy, forms=forms, rngs=rngs) for _ in range(config.depth)
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
        self,
        x_BTSD: Float[Array, "B T S D"],
        conditioning: Conditioning,
        *,
        merge: merging.Merge | None = None,
        part: Part = "all",
    ) -> Float[Array, "B T S D"]:
        """Returns the tokens after all blocks, between ``embed`` and ``final``; or after the first block, or the rest."""
        blocks = [block for pair in zip(self.spatial_blocks, self.temporal_blocks, strict=True) for block in pair]
        for block in blocks[PARTS[part]]:
            x_BTSD = layout.after(x_BTSD, block)(x_BTSD, conditioning, merge=merge)
        return x_BTSD

    def modulated_input(self, x_BTSD: Float[Array, "B T S D"], conditioning: Conditioning) -> Float[Array, "B T S D"]:
        """Returns what the self attention of the first block would see."""
        table_6D = self.spatial_blocks[0].scale_shift_table[...]
        return modulated_input(table_6D, x_BTSD, conditioning, half_range=self.policy.half_range)


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
        return self.with_caption(
            z_BTHWC,
            t_B,
            self.caption(caption_BLE),
            mask_BL,
            fps_B=fps_B,
            height_px_B=height_px_B,
            width_px_B=width_px_B,
            frame_mask_BT=frame_mask_BT,
        )

    def caption(self, caption_BLE: Float[Array, "B L E"]) -> Float[Array, "B L D"]:
        """Returns text features at the model's width; they depend on nothing else, and so serve every step."""
        return self.y_embedder(caption_BLE.astype(self.policy.compute))

    def with_caption(
        self,
        z_BTHWC: Float[Array, "B T H W C"],
        t_B: Float[Array, "B"],
        caption_BLD: Float[Array, "B L D"],
        mask_BL: Bool[Array, "_ L"] | None,
        *,
        fps_B: Float[Array, "_"],
        height_px_B: Float[Array, "_"],
        width_px_B: Float[Array, "_"],
        frame_mask_BT: Bool[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T S D"], Conditioning]:
        """Returns the video tokens and what conditions them, for captions from `caption`."""
        batch = z_BTHWC.shape[0]
        fps_BD = self.fps_embedder(_tiled(fps_B, batch, "fps_B"))
        t_BD = self.t_embedder(t_B) + fps_BD
        t0_BD = None if frame_mask_BT is None else self.t_embedder(jnp.zeros_like(t_B)) + fps_BD
        conditioning = Conditioning(
            caption_BLD=caption_BLD,
            mask_BL=None if mask_BL is None else _tiled(mask_BL, batch, "mask_BL"),
            mod_BF6D=self.modulation(t_BD, t0_BD, frame_mask_BT),
            t_BD=t_BD,
            t0_BD=t0_BD,
            frame_mask_BT=frame_mask_BT,
        )
        x_BTSD = self.tokens(z_BTHWC, height_px_B, width_px_B)
        conditioning = dataclasses.replace(conditioning, num_places=layout.divided(x_BTSD.shape[2]))
        return layout.own_places(x_BTSD), conditioning

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
        patches = layout.all_places(self.patches(x_BTSD, conditioning), conditioning.num_places)
        out_BTHWO = rearrange(patches, "b t (h w) (p q o) -> b t (h p) (w q) o", h=-(-height // rows), p=rows, q=columns)
        return out_BTHWO[:, :, :height, :width].astype(jnp.float32)

    def patches(self, x_BTSD: Float[Array, "B T S D"], conditioning: Conditioning) -> Float[Array, "B T S P"]:
        """Returns one output patch for each token.

        As in the source, the frames of time 0 are normalised and modulated a second time, after the modulation of time t;
        checkpoints were trained with it.
        """
        shift, scale = self._modulation(conditioning.t_BD)
        out_BTSD = modulated(x_BTSD, shift, scale, half_range=self.half_range)
        if conditioning.frame_mask_BT is not None and conditioning.t0_BD is not None:
            shift0, scale0 = self._modulation(conditioning.t0_BD)
            frozen_BTSD = modulated(out_BTSD, shift0, scale0, half_range=self.half_range)
            out_BTSD = jnp.where(conditioning.frame_mask_BT[:, :, None, None], out_BTSD, frozen_BTSD)
        return self.linear(out_BTSD)

    def _modulation(self, t_BD: Array) -> tuple[Array, Array]:
        mod_B12D = lifted(self.scale_shift_table[...], 4).astype(jnp.float32) + t_BD[:, None, None, :]
        return mod_B12D[:, :, :1], mod_B12D[:, :, 1:]


def with_null_caption(caption_BLE: Float[Array, "B L E"], null_LE: Float[Array, "L E"]) -> Float[Array, "R L E"]:
    """Returns the captions of guided rows: those of the batch, then the null caption once for each of them."""
    return jnp.concatenate([caption_BLE, jnp.broadcast_to(lifted(null_LE, 3).astype(caption_BLE.dtype), caption_BLE.shape)])


def _tiled(x: Array, batch: int, name: str) -> Array:
    """Returns ``x`` repeated as a whole until its first axis is ``batch`` long."""
    if batch % x.shape[0]:
        raise ValueError(f"{name} has batch {x.shape[0]}, which does not divide the batch {batch} of the latents.")
    return x if x.shape[0] == batch else jnp.tile(x, (batch // x.shape[0], *(1,) * (x.ndim - 1)))
