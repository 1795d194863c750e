"""Causal autoencoder over time: chunks of spatial latents to four times fewer latent frames and back.

Invariant: one call is one chunk; no state passes between calls.  Convolutions are causal, group norms are not: their
statistics span the whole chunk.  The split of a clip into chunks belongs to ``codec``.  Both networks are cut between their
blocks: `TemporalEncoder.segments` and `TemporalDecoder.segments` name the methods that each ``__call__`` calls.

Source: Open-Sora v1.2 vae_temporal.py (VAE_Temporal, Encoder, Decoder, ResBlock).
"""

import itertools

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float

from sora_jax.config import FLOAT32, DTypePolicy, TemporalVAEConfig
from sora_jax.networks.segment import Segment
from sora_jax.networks.vae.layers import CausalConv3D, GroupNorm

_EPSILON = 1e-5


class ResBlock(nnx.Module):
    """Two normed causal convolutions without bias, and a shortcut (1x1x1 where the width changes)."""

    def __init__(self, in_channels: int, out_channels: int, *, groups: int, policy: DTypePolicy, rngs: nnx.Rngs):
        self.norm1 = GroupNorm(in_channels, groups=groups, epsilon=_EPSILON, policy=policy)
        self.conv1 = CausalConv3D(in_channels, out_channels, kernel_size=3, use_bias=False, policy=policy, rngs=rngs)
        self.norm2 = GroupNorm(out_channels, groups=groups, epsilon=_EPSILON, policy=policy)
        self.conv2 = CausalConv3D(out_channels, out_channels, kernel_size=3, use_bias=False, policy=policy, rngs=rngs)
        self.conv3 = (
            CausalConv3D(in_channels, out_channels, kernel_size=1, use_bias=False, policy=policy, rngs=rngs)
            if in_channels != out_channels
            else None
        )

    def __call__(self, x: Float[Array, "B T H W I"]) -> Float[Array, "B T H W O"]:
        """Returns the clip's features after the block."""
        y = self.conv1(jax.nn.silu(self.norm1(x)))
        y = self.conv2(jax.nn.silu(self.norm2(y)))
        return y + (x if self.conv3 is None else self.conv3(x))


class FrameDoubling(CausalConv3D):
    """A causal convolution that makes two frames of each, side by side in its channels."""

    def __call__(self, x: Float[Array, "B T H W I"]) -> Float[Array, "B t H W O"]:
        """Returns features of twice as many frames."""
        return rearrange(super().__call__(x), "B T H W (C s) -> B (T s) H W C", s=2)


def _res_blocks(
    before: int, width: int, config: TemporalVAEConfig, *, policy: DTypePolicy, rngs: nnx.Rngs
) -> nnx.List[ResBlock]:
    pairs = itertools.pairwise((before, *(width,) * config.num_res_blocks))
    return nnx.List([ResBlock(a, b, groups=config.norm_num_groups, policy=policy, rngs=rngs) for a, b in pairs])


class TemporalEncoder(nnx.Module):
    """Scaled spatial latents of one chunk to the mean and log variance of its latent frames.

    Time is padded with zeros in front to a multiple of ``config.downsampling``: 17 frames give 5 latents, 1 gives 1.
    """

    def __init__(self, config: TemporalVAEConfig, *, policy: DTypePolicy = FLOAT32, rngs: nnx.Rngs):
        self.config, self.policy = config, policy
        widths = [config.filters * multiplier for multiplier in config.channel_multipliers]
        self.conv_in = CausalConv3D(
            config.in_out_channels, config.filters, kernel_size=3, use_bias=False, policy=policy, rngs=rngs
        )
        levels, downs = [], []
        inputs, halves = [config.filters, *widths[:-1]], [*config.temporal_downsample, False]
        for before, width, halve in zip(inputs, widths, halves, strict=True):
            levels.append(_res_blocks(before, width, config, policy=policy, rngs=rngs))
            downs.append(CausalConv3D(width, width, kernel_size=3, time_stride=2, policy=policy, rngs=rngs) if halve else None)
        self.block_res_blocks = nnx.List(levels)
        self.conv_blocks = nnx.List(downs)
        self.res_blocks = _res_blocks(widths[-1], widths[-1], config, policy=policy, rngs=rngs)
        self.norm1 = GroupNorm(widths[-1], groups=config.norm_num_groups, epsilon=_EPSILON, policy=policy)
        moments = 2 * config.latent_embed_dim
        self.conv2 = CausalConv3D(widths[-1], moments, kernel_size=1, policy=policy, rngs=rngs)
        self.quant_conv = CausalConv3D(moments, 2 * config.embed_dim, kernel_size=1, policy=policy, rngs=rngs)

    def __call__(self, x_BtHWC: Float[Array, "B t H W C"]) -> Float[Array, "B T H W moments"]:
        """Returns means, then log variances, of the chunk's latent frames, in the compute dtype."""
        x = self.enter(x_BtHWC)
        for blocks, halve in zip(self.block_res_blocks, self.conv_blocks, strict=True):
            for block in blocks:
                x = block(x)
            x = x if halve is None else halve(x)
        for block in self.res_blocks:
            x = block(x)
        return self.leave(x)

    def enter(self, x_BtHWC: Float[Array, "B t H W C"]) -> Float[Array, "B T H W F"]:
        """Returns the first features of a chunk, with zeros in front, in the compute dtype."""
        front = -x_BtHWC.shape[1] % self.config.downsampling
        padded_BTHWC = jnp.pad(x_BtHWC, ((0, 0), (front, 0), (0, 0), (0, 0), (0, 0)))
        return self.conv_in(padded_BTHWC.astype(self.policy.compute))

    def leave(self, x: Float[Array, "B T H W F"]) -> Float[Array, "B T H W moments"]:
        """Returns the moments that the last features mean."""
        return self.quant_conv(self.conv2(jax.nn.silu(self.norm1(x))))

    @staticmethod
    def segments(config: TemporalVAEConfig) -> list[Segment]:
        """Returns the network, cut; every segment takes and returns the chunk."""
        segments = [Segment(TemporalEncoder.enter, parts=("conv_in",))]
        for level, halve in enumerate([*config.temporal_downsample, False]):
            segments += _block_segments(config, "block_res_blocks", level)
            segments += [Segment(CausalConv3D.__call__, ("conv_blocks", level))] if halve else []
        segments += _block_segments(config, "res_blocks")
        return [*segments, Segment(TemporalEncoder.leave, parts=("norm1", "conv2", "quant_conv"))]


class TemporalDecoder(nnx.Module):
    """Latent frames of one chunk to its scaled spatial latents; levels are stored from fine to coarse and run in reverse."""

    def __init__(self, config: TemporalVAEConfig, *, policy: DTypePolicy = FLOAT32, rngs: nnx.Rngs):
        self.config, self.policy = config, policy
        widths = [config.filters * multiplier for multiplier in config.channel_multipliers]
        self.post_quant_conv = CausalConv3D(config.embed_dim, config.latent_embed_dim, kernel_size=1, policy=policy, rngs=rngs)
        self.conv1 = CausalConv3D(config.latent_embed_dim, widths[-1], kernel_size=3, policy=policy, rngs=rngs)
        self.res_blocks = _res_blocks(widths[-1], widths[-1], config, policy=policy, rngs=rngs)
        levels, ups = [], []
        inputs, doubles = [*widths[1:], widths[-1]], [False, *config.temporal_downsample]
        for before, width, double in zip(inputs, widths, doubles, strict=True):
            levels.append(_res_blocks(before, width, config, policy=policy, rngs=rngs))
            ups.append(FrameDoubling(width, 2 * width, kernel_size=3, policy=policy, rngs=rngs) if double else None)
        self.block_res_blocks = nnx.List(levels)
        self.conv_blocks = nnx.List(ups[1:])
        self.norm1 = GroupNorm(widths[0], groups=config.norm_num_groups, epsilon=_EPSILON, policy=policy)
        self.conv_out = CausalConv3D(widths[0], config.in_out_channels, kernel_size=3, policy=policy, rngs=rngs)

    def __call__(self, z_BTHWC: Float[Array, "B T H W C"], num_frames: int) -> Float[Array, "B t H W C"]:
        """Returns the ``num_frames`` frames of the chunk, float32; the frames of the encoder's front padding are dropped.

        Raises:
          ValueError: ``num_frames`` frames do not have T latents.
        """
        step = self.config.downsampling
        num_latents = -(-num_frames // step)
        if num_latents != z_BTHWC.shape[1]:
            most = z_BTHWC.shape[1] * step
            raise ValueError(
                f"num_frames {num_frames} of a chunk has {num_latents} latent frames, got {z_BTHWC.shape[1]}; "
                f"expected num_frames {most - step + 1} to {most}."
            )
        x = self.enter(z_BTHWC)
        for block in self.res_blocks:
            x = block(x)
        for level in reversed(range(len(self.block_res_blocks))):
            for block in self.block_res_blocks[level]:
                x = block(x)
            double = self.conv_blocks[level - 1] if level else None  # conv_blocks[i] belongs to level i + 1
            x = x if double is None else double(x)
        return self.leave(x, num_frames)

    def enter(self, z_BTHWC: Float[Array, "B T H W C"]) -> Float[Array, "B T H W F"]:
        """Returns the first features of a chunk, in the compute dtype."""
        return self.conv1(self.post_quant_conv(z_BTHWC.astype(self.policy.compute)))

    def leave(self, x: Float[Array, "B T H W F"], num_frames: int) -> Float[Array, "B t H W C"]:
        """Returns the last ``num_frames`` frames that the features mean, float32."""
        out = self.conv_out(jax.nn.silu(self.norm1(x)))
        return out[:, out.shape[1] - num_frames :].astype(jnp.float32)

    @staticmethod
    def segments(config: TemporalVAEConfig, num_frames: int) -> list[Segment]:
        """Returns the network for a chunk of ``num_frames`` frames, cut; every segment takes and returns the chunk."""
        segments = [Segment(TemporalDecoder.enter, parts=("post_quant_conv", "conv1")), *_block_segments(config, "res_blocks")]
        doubles = [False, *config.temporal_downsample]
        for level in reversed(range(len(doubles))):
            segments += _block_segments(config, "block_res_blocks", level)
            segments += [Segment(FrameDoubling.__call__, ("conv_blocks", level - 1))] if doubles[level] else []
        return [*segments, Segment(TemporalDecoder.leave, parts=("norm1", "conv_out"), static=(num_frames,))]


def _block_segments(config: TemporalVAEConfig, *path: str | int) -> list[Segment]:
    return [Segment(ResBlock.__call__, (*path, i)) for i in range(config.num_res_blocks)]
