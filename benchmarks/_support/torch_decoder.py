"""The video decoder in eager PyTorch, as the rival of benchmarks: diffusers' AutoencoderKL behind a temporal decoder.

Invariant: layer for layer the operations of Open-Sora v1.2 (vae_temporal.py Decoder; micro batches of 4 frames in space), on
random weights: only time and memory are compared.
"""

import time
from collections.abc import Callable
from typing import Any

import torch  # noqa: TID251  # the rival
from torch import nn  # noqa: TID251
from torch.nn import functional  # noqa: TID251

from sora_jax.config import TemporalVAEConfig, VAEConfig

MICRO_BATCH = 4  # frames that the spatial decoder takes at a time, as upstream


class CausalConv3d(nn.Module):
    """Convolution padded in front of time and around space."""

    def __init__(self, before: int, after: int, size: int, *, bias: bool = True):
        super().__init__()
        self.size = size
        self.conv = nn.Conv3d(before, after, size, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns as many frames of the same size."""
        side = self.size // 2
        return self.conv(functional.pad(x, (side, side, side, side, self.size - 1, 0)))


class ResBlock(nn.Module):
    """Two normed convolutions and a shortcut."""

    def __init__(self, before: int, after: int, groups: int):
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(groups, before), nn.GroupNorm(groups, after)
        self.conv1, self.conv2 = (CausalConv3d(width, after, 3, bias=False) for width in (before, after))
        self.conv3 = CausalConv3d(before, after, 1, bias=False) if before != after else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns the features after the block."""
        y = self.conv1(functional.silu(self.norm1(x)))
        return self.conv2(functional.silu(self.norm2(y))) + self.conv3(x)


class Double(nn.Module):
    """Convolution to twice the channels, which become twice the frames."""

    def __init__(self, width: int):
        super().__init__()
        self.conv = CausalConv3d(width, 2 * width, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns twice as many frames."""
        y = self.conv(x)
        batch, _, frames, rows, columns = y.shape
        y = y.reshape(batch, -1, 2, frames, rows, columns).transpose(2, 3)
        return y.reshape(batch, -1, 2 * frames, rows, columns)


def temporal_decoder(config: TemporalVAEConfig) -> nn.Module:
    """Returns the temporal decoder with PyTorch's initial weights."""
    widths = [config.filters * multiplier for multiplier in config.channel_multipliers]
    groups = config.norm_num_groups
    layers: list[nn.Module] = [
        CausalConv3d(config.embed_dim, config.latent_embed_dim, 1),
        CausalConv3d(config.latent_embed_dim, widths[-1], 3),
        *(ResBlock(widths[-1], widths[-1], groups) for _ in range(config.num_res_blocks)),
    ]
    doubles = [False, *config.temporal_downsample]
    before = widths[-1]
    for level in reversed(range(len(widths))):
        for _ in range(config.num_res_blocks):
            layers.append(ResBlock(before, widths[level], groups))
            before = widths[level]
        if doubles[level]:
            layers.append(Double(widths[level]))
    layers += [nn.GroupNorm(groups, before), nn.SiLU(), CausalConv3d(before, config.in_out_channels, 3)]
    return nn.Sequential(*layers)


def make(config: VAEConfig) -> Callable[[int, int], tuple[float, float]]:
    """Returns a function of frames (one chunk) and pixels a side that decodes and returns seconds in time and in space."""
    from diffusers import AutoencoderKL

    names = ("in_channels", "out_channels", "latent_channels", "layers_per_block", "norm_num_groups")
    fields: dict[str, Any] = {name: getattr(config.spatial, name) for name in names}
    levels = len(config.spatial.block_out_channels)
    spatial = AutoencoderKL(
        **fields,
        block_out_channels=config.spatial.block_out_channels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
    ).eval()
    temporal = temporal_decoder(config.temporal).eval()

    @torch.no_grad()
    def decode(num_frames: int, pixels: int) -> tuple[float, float]:
        cells = pixels // config.spatial.downsampling
        z = torch.randn(1, 4, -(-num_frames // config.temporal.downsampling), cells, cells)
        start = time.perf_counter()
        frames = temporal(z)[0, :, -num_frames:].transpose(0, 1)
        between = time.perf_counter()
        for batch in frames.split(MICRO_BATCH):
            spatial.decode(batch / config.spatial.scaling_factor)
        return between - start, time.perf_counter() - between

    return decode
