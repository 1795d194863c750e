"""Layers that both autoencoders use: convolutions over channels-last images and clips, and group norm.

Invariant: the dtype of the activations decides the compute dtype; sums over taps and all statistics are float32.
Clips are convolved causally (an output frame sees no later input frame) and always as two-dimensional convolutions of
their frames, which CPUs run faster than a three-dimensional one and every export target knows.
"""

import functools
import math
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float

from sora_jax.config import DTypePolicy
from sora_jax.networks.layers import lifted, magnitude, precision_of

Padding = Literal["same", "end"]

# PyTorch's default for convolutions: uniform with bound 1 / sqrt(fan in).
_INIT = jax.nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


class Conv2D(nnx.Module):
    """Convolution of images; ``same`` keeps the size at stride 1, ``end`` pads one zero row below and column right."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        kernel_size: int,
        stride: int = 1,
        padding: Padding = "same",
        policy: DTypePolicy,
        rngs: nnx.Rngs,
    ):
        self.stride = stride
        self.padding = (0, 1) if padding == "end" else (kernel_size // 2, kernel_size // 2)
        self.kernel = nnx.Param(_INIT(rngs.params(), (kernel_size, kernel_size, in_channels, out_channels), policy.param))
        self.bias = nnx.Param(jnp.zeros(out_channels, policy.param))

    def __call__(self, x: Float[Array, "N h w I"]) -> Float[Array, "N H W O"]:
        """Returns the convolved images."""
        y = _conv2d(x, self.kernel[...], stride=self.stride, padding=self.padding)
        return y + lifted(self.bias[...].astype(x.dtype), y.ndim)


class CausalConv3D(nnx.Module):
    """Convolution of clips: zero padding around each frame, and in time only in front.

    Differs from source: a sum over the time taps of the kernel, each a convolution of the frames it reads; frames of
    the padding are never multiplied.  Equal up to the order of summation.
    Source: Open-Sora v1.2 vae_temporal.py CausalConv3d.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        kernel_size: int,
        time_stride: int = 1,
        use_bias: bool = True,
        policy: DTypePolicy,
        rngs: nnx.Rngs,
    ):
        self.time_stride = time_stride
        self.kernel = nnx.Param(_INIT(rngs.params(), (*(kernel_size,) * 3, in_channels, out_channels), policy.param))
        self.bias = nnx.Param(jnp.zeros(out_channels, policy.param)) if use_bias else None

    def __call__(self, x_BTHWC: Float[Array, "B t H W I"]) -> Float[Array, "B T H W O"]:
        """Returns the convolved clips; a time stride of 2 halves an even number of frames."""
        num_taps, stride = self.kernel.shape[0], self.time_stride
        front = num_taps - stride
        num_frames = (x_BTHWC.shape[1] + front - num_taps) // stride + 1
        taps = []
        for tap in range(num_taps):
            first = max(0, math.ceil((front - tap) / stride))  # the first output frame for which this tap reads a real frame
            if first < num_frames:
                start = first * stride + tap - front
                read_BTHWC = x_BTHWC[:, start : start + (num_frames - first - 1) * stride + 1 : stride]
                y_BTHWC = self._tap(read_BTHWC, tap).astype(jnp.float32)
                taps.append(jnp.pad(y_BTHWC, ((0, 0), (first, 0), (0, 0), (0, 0), (0, 0))))
        total = functools.reduce(jnp.add, taps)
        if self.bias is not None:
            total = total + lifted(self.bias[...].astype(jnp.float32), total.ndim)
        return total.astype(x_BTHWC.dtype)

    def _tap(self, x_BTHWC: jax.Array, tap: int) -> jax.Array:
        side = self.kernel.shape[1] // 2
        frames = rearrange(x_BTHWC, "B T H W C -> (B T) H W C")
        y = _conv2d(frames, self.kernel[...][tap], stride=1, padding=(side, side))
        return rearrange(y, "(B T) H W C -> B T H W C", B=len(x_BTHWC))


class GroupNorm(nnx.Module):
    """Norm over groups of channels and every axis between the first and the last, with learned scale and bias.

    Mean and mean square are taken in one float32 pass, then folded with scale and bias into one multiply-add a channel.
    The variance is their difference: a group whose mean is m deviations from zero loses m^2 float32 roundings.  With the
    policy's ``half_range`` the mean is subtracted first, and the rest divided by its largest magnitude before it is squared.
    """

    def __init__(self, channels: int, *, groups: int, epsilon: float, policy: DTypePolicy):
        self.groups = groups
        self.epsilon = epsilon
        self.half_range = policy.half_range
        self.scale = nnx.Param(jnp.ones(channels, policy.param))
        self.bias = nnx.Param(jnp.zeros(channels, policy.param))

    def __call__(self, x: Float[Array, "N *inner C"]) -> Float[Array, "N *inner C"]:
        """Returns the normed array; each entry of the first axis has its own statistics."""
        if not self.half_range:
            return self.folded(x)(x)
        wide, inner = x.astype(jnp.float32), _inner(x)
        scale_1C, bias_1C = self._scale_and_bias()
        mean_NG = self._over_group(jnp.mean(wide, axis=inner))
        centred = wide - jnp.expand_dims(self._by_channel(mean_NG), inner)
        normed = self._unit_power(centred) * jnp.expand_dims(scale_1C, inner) + jnp.expand_dims(bias_1C, inner)
        return normed.astype(x.dtype)

    def folded(self, x: Float[Array, "N *inner C"]) -> Callable[[Array], Array]:
        """Returns the norm as a function of any part of ``x``, with the statistics of the whole; not with ``half_range``."""
        wide, inner = x.astype(jnp.float32), _inner(x)
        scale_1C, bias_1C = self._scale_and_bias()
        mean_NG = self._over_group(jnp.mean(wide, axis=inner))
        square_NG = self._over_group(jnp.mean(wide * wide, axis=inner))
        inverse_NG = jax.lax.rsqrt(jnp.maximum(square_NG - mean_NG * mean_NG, 0) + self.epsilon)
        gain_NC = self._by_channel(inverse_NG) * scale_1C
        offset_NC = bias_1C - self._by_channel(mean_NG) * gain_NC

        def normed(part: Array) -> Array:
            values = part.astype(jnp.float32) * jnp.expand_dims(gain_NC, inner) + jnp.expand_dims(offset_NC, inner)
            return values.astype(part.dtype)

        return normed

    def _scale_and_bias(self) -> tuple[Array, Array]:
        scale_1C, bias_1C = (lifted(param[...].astype(jnp.float32), 2) for param in (self.scale, self.bias))
        return scale_1C, bias_1C

    def _unit_power(self, centred: Float[Array, "N *inner C"]) -> Float[Array, "N *inner C"]:
        inner = _inner(centred)
        per_channel_NC = jnp.max(jnp.abs(centred), axis=inner)
        largest_NG = magnitude(jnp.max(per_channel_NC.reshape(len(centred), self.groups, -1), axis=-1))
        scaled = centred / jnp.expand_dims(self._by_channel(largest_NG), inner)
        square_NG = self._over_group(jnp.mean(scaled * scaled, axis=inner))
        inverse_NG = jax.lax.rsqrt(square_NG + jnp.square(self.epsilon**0.5 / largest_NG))
        return scaled * jnp.expand_dims(self._by_channel(inverse_NG), inner)

    def _over_group(self, x_NC: Float[Array, "N C"]) -> Float[Array, "N G"]:
        return jnp.mean(x_NC.reshape(x_NC.shape[0], self.groups, -1), axis=-1)

    def _by_channel(self, x_NG: Float[Array, "N G"]) -> Float[Array, "N C"]:
        return jnp.repeat(x_NG, self.scale.shape[0] // self.groups, axis=-1)


def _inner(x: jax.Array) -> tuple[int, ...]:
    """Returns the axes between the first and the last."""
    return tuple(range(1, x.ndim - 1))


def _conv2d(x: jax.Array, kernel_HWIO: jax.Array, *, stride: int, padding: tuple[int, int]) -> jax.Array:
    return jax.lax.conv_general_dilated(
        x,
        kernel_HWIO.astype(x.dtype),
        (stride, stride),
        (padding, padding),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision=precision_of(x.dtype),
    )
