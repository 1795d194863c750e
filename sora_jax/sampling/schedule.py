"""Rectified-flow times: which times a sampling visits, computed on the host.

Invariant: times are strictly decreasing and positive, the step after the last one ends at 0, and the arrays are padded to
a fixed capacity, so that another number of steps or another resolution compiles nothing.  Velocities point from noise to
data: a step from t to s adds ``v * (t - s)``.  Nothing here evaluates a model or runs on the device.
"""

import dataclasses
from collections.abc import Sequence
from typing import Self

import jax
import numpy as np
from jax.typing import DTypeLike

from sora_jax.sampling.arguments import finite, shown, whole

MAX_STEPS = 256
OPEN_SORA_TIMESTEPS = 1000.0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Schedule:
    """The times of one sampling, padded with zeros.

    Attributes:
      times: float32, ``capacity + 1`` values; ``times[i]`` is the time of step i, and is 0 from ``num_steps`` on.
      num_steps: int32 scalar.
      num_timesteps: the time of pure noise (1000 in Open-Sora, 1 in most papers); static.
    """

    times: np.ndarray | jax.Array
    num_steps: np.ndarray | jax.Array
    num_timesteps: float = dataclasses.field(metadata={"static": True})

    @classmethod
    def from_times(cls, times: Sequence[float] | np.ndarray, *, num_timesteps: float = OPEN_SORA_TIMESTEPS) -> Self:
        """Returns the schedule that visits ``times`` and then goes to 0.

        Raises:
          ValueError: the times are not finite, strictly decreasing and in (0, num_timesteps].
        """
        num_timesteps = _positive("num_timesteps", num_timesteps)
        try:
            visited = np.asarray(times, np.float32)
        except (TypeError, ValueError):
            raise ValueError(f"times is {shown(times)}; expected a sequence of numbers.") from None
        if visited.ndim != 1 or not visited.size:
            raise ValueError(f"times has shape {visited.shape}; expected one dimension and at least one time.")
        if not np.isfinite(visited).all() or visited[0] > num_timesteps or (np.diff(np.append(visited, 0.0)) >= 0).any():
            raise ValueError(f"times must strictly decrease from at most {num_timesteps:g} and stay above 0; got {times!r}.")
        padded = np.zeros(capacity(visited.size) + 1, np.float32)
        padded[: visited.size] = visited
        return cls(times=padded, num_steps=np.asarray(visited.size, np.int32), num_timesteps=float(num_timesteps))

    @classmethod
    def uniform(cls, num_steps: int, *, shift: int | float = 1.0, num_timesteps: int | float = OPEN_SORA_TIMESTEPS) -> Self:
        """Returns equal steps from ``num_timesteps`` to 0, moved towards the noisy end where ``shift`` exceeds 1."""
        scale = _positive("num_timesteps", num_timesteps)
        times = shift_times(linear_times(num_steps, scale), np.asarray(_positive("shift", shift), np.float32), scale)
        return cls.from_times(times, num_timesteps=scale)

    @classmethod
    def open_sora(
        cls,
        num_steps: int,
        *,
        height_px: int,
        width_px: int,
        num_frames: int,
        transform: bool = True,
        discrete: bool = False,
        shift: float = 1.0,
        size_dtype: DTypeLike = np.float32,
    ) -> Self:
        """Returns the times of Open-Sora 1.2.

        Args:
          num_steps: number of steps.
          height_px: height of the video.
          width_px: width of the video.
          num_frames: number of pixel frames; 1 for an image.
          transform: shift the times by resolution and length (see ``resolution_shift``).
          discrete: round to whole times first (half to even), as On-device Sora does; needs num_steps <= 1000.
          shift: a further shift on top of the resolution's, 1 for the published times.
          size_dtype: dtype of the size arithmetic; bfloat16 reproduces the source's default run, whose ratio is rounded.

        Source: Open-Sora v1.2 schedulers/rf RFLOW.sample, timestep_transform.
        Differs from source: times are cut at 1000 (float32 rounding may give 1000.0001, which freezes unmasked frames
        during the first step there); clips of 2 to 16 frames work, see ``resolution_shift``.
        """
        times = linear_times(num_steps, OPEN_SORA_TIMESTEPS)
        if discrete:
            if num_steps > OPEN_SORA_TIMESTEPS:
                raise ValueError(f"num_steps {num_steps} exceeds 1000, the number of discrete times; use discrete=False.")
            times = np.round(times)
        if transform:
            ratio = resolution_shift(height_px=height_px, width_px=width_px, num_frames=num_frames, size_dtype=size_dtype)
            times = shift_times(times, ratio, OPEN_SORA_TIMESTEPS)
        return cls.from_times(shift_times(times, np.asarray(_positive("shift", shift), np.float32), OPEN_SORA_TIMESTEPS))

    @property
    def visited(self) -> np.ndarray:
        """The times without padding, on the host."""
        return np.asarray(self.times)[: int(self.num_steps)]


def capacity(num_steps: int) -> int:
    """Returns the padded number of steps: 256, or the next power of two above it."""
    return max(MAX_STEPS, 1 << (num_steps - 1).bit_length())


def linear_times(num_steps: int, num_timesteps: float) -> np.ndarray:
    """Returns ``(1 - i / num_steps) * num_timesteps`` in float64.

    Raises:
      ValueError: num_steps is not a positive whole number.
    """
    count = whole("num_steps", num_steps, least=1)
    return (1.0 - np.arange(count) / count) * num_timesteps


def shift_times(times: np.ndarray, ratio: np.ndarray, num_timesteps: float) -> np.ndarray:
    """Returns ``ratio t / (1 + (ratio - 1) t)`` of the times scaled to [0, 1], in float32 and cut at ``num_timesteps``.

    A ratio of exactly 1 leaves the times alone.  ``ratio - 1`` is rounded to the dtype of ``ratio``, as in the source.
    """
    wide = times.astype(np.float32)
    if ratio != 1:
        unit = wide / np.float32(num_timesteps)
        wide = (ratio * unit / (np.float32(1) + (ratio - ratio.dtype.type(1)) * unit)) * np.float32(num_timesteps)
    return np.minimum(wide, np.float32(num_timesteps))


def resolution_shift(*, height_px: int, width_px: int, num_frames: int, size_dtype: DTypeLike = np.float32) -> np.ndarray:
    """Returns the shift ratio ``sqrt(height * width / 512^2) * sqrt(latent frames)``, a scalar of ``size_dtype``.

    The number of latent frames is 1 for an image and ``num_frames // 17 * 5`` otherwise: whole micro-frame chunks only, so
    51 frames count 15 and 68 count 20, whatever the true latent length.

    Source: Open-Sora v1.2 schedulers/rf/rectified_flow.py timestep_transform.
    Differs from source: 2 to 16 frames count ``ceil(num_frames / 4)``, their true latent length; the source counts 0, and
    every time becomes NaN.  (16 frames count 4 and 17 count 5.)

    Raises:
      ValueError: a size is not positive.
    """
    for name, value in (("height_px", height_px), ("width_px", width_px), ("num_frames", num_frames)):
        whole(name, value, least=1)
    dtype = np.dtype(size_dtype).type
    latent_frames = 1 if num_frames == 1 else num_frames // 17 * 5 or -(-num_frames // 4)
    area = dtype(height_px) * dtype(width_px)
    ratio = np.sqrt(area / dtype(512 * 512)) * np.sqrt(dtype(latent_frames))
    return np.asarray(ratio, size_dtype)


def _positive(name: str, value: int | float) -> float:
    if finite(name, value) <= 0:
        raise ValueError(f"{name} is {value}; expected a positive number.")
    return float(value)
