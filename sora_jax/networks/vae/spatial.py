"""Autoencoder of single frames: pixels in [-1, 1] to eight times smaller latents and back.

Invariant: frames are independent; the batch axis N may hold any of them.  Where a frame's features would take more than
``forms.hidden_bytes``, the decoder computes them in bands of rows (see ``bands``), to the same numbers.  Latents here are
unscaled: the factor ``scaling_factor`` and the micro-frame chunks belong to ``codec``.

Source: diffusers AutoencoderKL with the configuration of SDXL's autoencoder.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import jax
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float

from sora_jax.config import FLOAT32, DTypePolicy, SpatialVAEConfig
from sora_jax.networks.forms import WHOLE, Forms
from sora_jax.networks.layers import Linear
from sora_jax.networks.vae.bands import Bands, bands, in_bands
from sora_jax.networks.vae.layers import Conv2D, GroupNorm

_EPSILON = 1e-6


class ResnetBlock(nnx.Module):
    """Two normed convolutions and a shortcut, which is a 1x1 convolution where the width changes.

    With ``band_bytes``, in bands of rows where the features take more.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        groups: int,
        policy: DTypePolicy,
        rngs: nnx.Rngs,
        band_bytes: int | None = None,
    ):
        self.band_bytes = band_bytes
        self.norm1 = GroupNorm(in_channels, groups=groups, epsilon=_EPSILON, policy=policy)
        self.conv1 = Conv2D(in_channels, out_channels, kernel_size=3, policy=policy, rngs=rngs)
        self.norm2 = GroupNorm(out_channels, groups=groups, epsilon=_EPSILON, policy=policy)
        self.conv2 = Conv2D(out_channels, out_channels, kernel_size=3, policy=policy, rngs=rngs)
        self.conv_shortcut = (
            Conv2D(in_channels, out_channels, kernel_size=1, policy=policy, rngs=rngs) if in_channels != out_channels else None
        )

    def __call__(self, x: Float[Array, "N h w I"]) -> Float[Array, "N h w O"]:
        """Returns the frames' features after the block."""
        divided = bands(x.shape, self.band_bytes, x.dtype.itemsize)
        if divided is not None:
            return self._in_bands(x, divided)
        y = self.conv1(jax.nn.silu(self.norm1(x)))
        y = self.conv2(jax.nn.silu(self.norm2(y)))
        return y + self._shortcut(x)

    def _in_bands(self, x: Array, divided: Bands) -> Array:
        norm1 = self.norm1.folded(x)
        y = in_bands(lambda x: self.conv1(jax.nn.silu(norm1(x))), divided, x)
        norm2 = self.norm2.folded(y)
        return in_bands(lambda y, x: self.conv2(jax.nn.silu(norm2(y))) + self._shortcut(x), divided, y, x)

    def _shortcut(self, x: Array) -> Array:
        return x if self.conv_shortcut is None else self.conv_shortcut(x)


class AttentionBlock(nnx.Module):
    """Single-head attention among the cells of one frame, added to its input."""

    def __init__(self, channels: int, *, groups: int, policy: DTypePolicy, forms: Forms, rngs: nnx.Rngs):
        self.attention, self.half_range = forms.attention, policy.half_range
        self.group_norm = GroupNorm(channels, groups=groups, epsilon=_EPSILON, policy=policy)
        self.to_q = Linear(channels, channels, policy=policy, rngs=rngs)
        self.to_k = Linear(channels, channels, policy=policy, rngs=rngs)
        self.to_v = Linear(channels, channels, policy=policy, rngs=rngs)
        self.to_out = Linear(channels, channels, policy=policy, rngs=rngs)

    def __call__(self, x: Float[Array, "N h w C"]) -> Float[Array, "N h w C"]:
        """Returns the frames' features with every cell having seen all others."""
        y_N1SC = rearrange(self.group_norm(x), "N h w C -> N 1 (h w) C")
        q, k, v = self.to_q(y_N1SC), self.to_k(y_N1SC), self.to_v(y_N1SC)
        y_N1SC = self.attention(q, k, v, scale=x.shape[-1] ** -0.5, half_range=self.half_range)
        return x + self.to_out(y_N1SC).reshape(x.shape)


class MidBlock(nnx.Module):
    """Attention between two resnet blocks at the smallest size."""

    def __init__(self, channels: int, *, groups: int, policy: DTypePolicy, forms: Forms, rngs: nnx.Rngs):
        self.resnets = _resnets((channels, channels, channels), groups=groups, policy=policy, rngs=rngs)
        self.attention = AttentionBlock(channels, groups=groups, policy=policy, forms=forms, rngs=rngs)

    def __call__(self, x: Float[Array, "N h w C"]) -> Float[Array, "N h w C"]:
        """Returns the frames' features after the three blocks."""
        return self.resnets[1](self.attention(self.resnets[0](x)))


class DownBlock(nnx.Module):
    """Resnet blocks of the given widths, then a convolution that halves the size (except at the last level)."""

    def __init__(self, widths: Sequence[int], *, groups: int, halve: bool, policy: DTypePolicy, rngs: nnx.Rngs):
        self.resnets = _resnets(widths, groups=groups, policy=policy, rngs=rngs)
        self.downsampler = (
            Conv2D(widths[-1], widths[-1], kernel_size=3, stride=2, padding="end", policy=policy, rngs=rngs) if halve else None
        )

    def __call__(self, x: Float[Array, "N h w I"]) -> Float[Array, "N H W O"]:
        """Returns the frames' features one level coarser."""
        for resnet in self.resnets:
            x = resnet(x)
        return x if self.downsampler is None else self.downsampler(x)


class UpBlock(nnx.Module):
    """Resnet blocks of the given widths, then nearest-neighbour doubling and a convolution (except at the last level)."""

    def __init__(
        self,
        widths: Sequence[int],
        *,
        groups: int,
        double: bool,
        policy: DTypePolicy,
        rngs: nnx.Rngs,
        band_bytes: int | None = None,
    ):
        self.band_bytes = band_bytes
        self.resnets = _resnets(widths, groups=groups, policy=policy, rngs=rngs, band_bytes=band_bytes)
        self.upsampler = Conv2D(widths[-1], widths[-1], kernel_size=3, policy=policy, rngs=rngs) if double else None

    def __call__(self, x: Float[Array, "N h w I"]) -> Float[Array, "N H W O"]:
        """Returns the frames' features one level finer."""
        for resnet in self.resnets:
            x = resnet(x)
        upsampler = self.upsampler
        if upsampler is None:
            return x
        images, rows, columns, channels = x.shape
        divided = bands((images, rows, 4 * columns, channels), self.band_bytes, x.dtype.itemsize)
        doubled = lambda x: upsampler(x.repeat(2, axis=1).repeat(2, axis=2))  # noqa: E731
        return doubled(x) if divided is None else in_bands(doubled, divided, x, factor=2)


def _resnets(
    widths: Sequence[int], *, groups: int, policy: DTypePolicy, rngs: nnx.Rngs, band_bytes: int | None = None
) -> nnx.List[ResnetBlock]:
    keywords: dict[str, Any] = {"groups": groups, "policy": policy, "rngs": rngs, "band_bytes": band_bytes}
    return nnx.List([ResnetBlock(before, after, **keywords) for before, after in itertools.pairwise(widths)])


def _level_widths(widths: Sequence[int], num_blocks: int) -> list[tuple[int, ...]]:
    """Returns, for each level, the width that enters it followed by the widths its blocks make."""
    return [(before, *(width,) * num_blocks) for before, width in zip((widths[0], *widths), widths, strict=False)]


class SpatialEncoder(nnx.Module):
    """Frames to the mean and log variance of their latents.

    Sizes are divided with floor; at least ``config.downsampling`` pixels a side are needed.
    """

    def __init__(self, config: SpatialVAEConfig, *, policy: DTypePolicy = FLOAT32, forms: Forms = WHOLE, rngs: nnx.Rngs):
        self.policy = policy
        groups, widths = config.norm_num_groups, config.block_out_channels
        self.conv_in = Conv2D(config.in_channels, widths[0], kernel_size=3, policy=policy, rngs=rngs)
        levels = list(enumerate(_level_widths(widths, config.layers_per_block), start=1))
        self.down_blocks = nnx.List(
            [DownBlock(level, groups=groups, halve=i < len(levels), policy=policy, rngs=rngs) for i, level in levels]
        )
        self.mid_block = MidBlock(widths[-1], groups=groups, policy=policy, forms=forms, rngs=rngs)
        self.conv_norm_out = GroupNorm(widths[-1], groups=groups, epsilon=_EPSILON, policy=policy)
        moments = 2 * config.latent_channels
        self.conv_out = Conv2D(widths[-1], moments, kernel_size=3, policy=policy, rngs=rngs)
        self.quant_conv = Conv2D(moments, moments, kernel_size=1, policy=policy, rngs=rngs)

    def __call__(self, x_Nhw3: Float[Array, "N h w 3"]) -> Float[Array, "N H W moments"]:
        """Returns means, then log variances, of unscaled latents, in the compute dtype."""
        x = self.conv_in(x_Nhw3.astype(self.policy.compute))
        for block in self.down_blocks:
            x = block(x)
        x = jax.nn.silu(self.conv_norm_out(self.mid_block(x)))
        return self.quant_conv(self.conv_out(x))


class SpatialDecoder(nnx.Module):
    """Latents to frames."""

    def __init__(self, config: SpatialVAEConfig, *, policy: DTypePolicy = FLOAT32, forms: Forms = WHOLE, rngs: nnx.Rngs):
        self.policy = policy
        self.band_bytes = None if policy.half_range else forms.hidden_bytes
        groups, widths = config.norm_num_groups, tuple(reversed(config.block_out_channels))
        self.post_quant_conv = Conv2D(config.latent_channels, config.latent_channels, kernel_size=1, policy=policy, rngs=rngs)
        self.conv_in = Conv2D(config.latent_channels, widths[0], kernel_size=3, policy=policy, rngs=rngs)
        self.mid_block = MidBlock(widths[0], groups=groups, policy=policy, forms=forms, rngs=rngs)
        levels = list(enumerate(_level_widths(widths, config.layers_per_block + 1), start=1))
        self.up_blocks = nnx.List(
            [
                UpBlock(level, groups=groups, double=i < len(levels), policy=policy, rngs=rngs, band_bytes=self.band_bytes)
                for i, level in levels
            ]
        )
        self.conv_norm_out = GroupNorm(widths[-1], groups=groups, epsilon=_EPSILON, policy=policy)
        self.conv_out = Conv2D(widths[-1], config.out_channels, kernel_size=3, policy=policy, rngs=rngs)

    def __call__(self, z_NHWC: Float[Array, "N H W C"]) -> Float[Array, "N h w 3"]:
        """Returns pixels, nominally in [-1, 1], in the compute dtype."""
        x = self.conv_in(self.post_quant_conv(z_NHWC.astype(self.policy.compute)))
        x = self.mid_block(x)
        for block in self.up_blocks:
            x = block(x)
        divided = bands(x.shape, self.band_bytes, x.dtype.itemsize)
        if divided is None:
            return self.conv_out(jax.nn.silu(self.conv_norm_out(x)))
        norm = self.conv_norm_out.folded(x)
        return in_bands(lambda x: self.conv_out(jax.nn.silu(norm(x))), divided, x)
