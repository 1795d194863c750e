"""Causal autoencoder over time: chunks of spatial latents to four times fewer latent frames and back.

Invariant: one call is one chunk; no state passes between calls.  Convolutions are causal, group norms are not: their
statistics span the whole chunk.  The split of a clip into chunks belongs to ``codec``.

Source: Open-Sora v1.2 vae_temporal.py (VAE_Temporal, Encoder, Decoder, ResBlock).
"""

import itertools

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float

from sora_jax.config import FLOAT32, DTypePolicy, TemporalVAEConfig
from sora_jax.networks.segments import Segment, run
from sora_jax.networks.vae.layers import CausalConv3D, GroupNorm

_EPSILON = 1e-5


class ResBlock(nnx.Module):
    """Two normed causal convolutions without bias, beside a shortcut (1x1x1 where the width changes)."""

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
        return run(self, self.segments(self.config), self.padded(x_BtHWC, self.config).astype(self.policy.compute))

    @staticmethod
    def padded(x_BtHWC: Float[Array, "B t H W C"], config: TemporalVAEConfig) -> Float[Array, "B T H W C"]:
        """Returns a chunk with zeros in front, so that it has a multiple of ``config.downsampling`` frames."""
        front = -x_BtHWC.shape[1] % config.downsampling
        return jnp.pad(x_BtHWC, ((0, 0), (front, 0), (0, 0), (0, 0), (0, 0)))

    @staticmethod
    def segments(config: TemporalVAEConfig) -> list[Segment]:
        """Returns what follows the padding; every segment takes and returns features of the chunk."""
        segments = [Segment(("conv_in",), _called)]
        for level, halve in enumerate([*config.temporal_downsample, False]):
            segments += _block_segments(f"block_res_blocks.{level}", config)
            segments += [Segment((f"conv_blocks.{level}",), _called)] if halve else []
        segments += _block_segments("res_blocks", config)
        return [*segments, Segment(("norm1", "conv2", "quant_conv"), _to_moments)]


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
            ups.append(CausalConv3D(width, 2 * width, kernel_size=3, policy=policy, rngs=rngs) if double else None)
        self.block_res_blocks = nnx.List(levels)
        self.conv_blocks = nnx.List(ups[1:])
        self.norm1 = GroupNorm(widths[0], groups=config.norm_num_groups, epsilon=_EPSILON, policy=policy)
        self.conv_out = CausalConv3D(widths[0], config.in_out_channels, kernel_size=3, policy=policy, rngs=rngs)

    def __call__(self, z_BTHWC: Float[Array, "B T H W C"], num_frames: int) -> Float[Array, "B t H W C"]:
        """Returns the ``num_frames`` frames of the chunk; the frames of the encoder's front padding are dropped.

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
        x = run(self, self.segments(self.config), z_BTHWC.astype(self.policy.compute))
        return x[:, x.shape[1] - num_frames :]

    @staticmethod
    def segments(config: TemporalVAEConfig) -> list[Segment]:
        """Returns the network up to the frames of the encoder's padding, which are still to be dropped."""
        segments = [Segment(("post_quant_conv", "conv1"), _entered), *_block_segments("res_blocks", config)]
        doubles = [False, *config.temporal_downsample]
        for level in reversed(range(len(doubles))):
            segments += _block_segments(f"block_res_blocks.{level}", config)
            # conv_blocks[i] belongs to level i + 1; where time is not doubled it is None and has no parameters
            segments += [Segment((f"conv_blocks.{level - 1}",), _doubled)] if doubles[level] else []
        return [*segments, Segment(("norm1", "conv_out"), _left)]


def _block_segments(prefix: str, config: TemporalVAEConfig) -> list[Segment]:
    return [Segment((f"{prefix}.{i}",), _called) for i in range(config.num_res_blocks)]


def _called(module: ResBlock | CausalConv3D, x: Array) -> Array:
    return module(x)


def _to_moments(norm: GroupNorm, conv: CausalConv3D, quant_conv: CausalConv3D, x: Array) -> Array:
    return quant_conv(conv(jax.nn.silu(norm(x))))


def _entered(post_quant_conv: CausalConv3D, conv: CausalConv3D, x: Array) -> Array:
    return conv(post_quant_conv(x))


def _doubled(up: CausalConv3D, x: Array) -> Array:
    return rearrange(up(x), "B T H W (C s) -> B (T s) H W C", s=2)


def _left(norm: GroupNorm, conv: CausalConv3D, x: Array) -> Array:
    return conv(jax.nn.silu(norm(x)))
