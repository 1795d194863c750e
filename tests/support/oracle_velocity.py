"""The velocity that the sampler and its oracle are compared on: a costly part, frame times, and a merged variant.

Invariant: of numpy arrays it computes in numpy, in their dtype; of JAX's it computes in JAX, for the compiled sampler.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

SHARE = 0.25  # of the first block in an evaluation
SCALE = 1000  # the time of pure noise


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Wavy:
    """A smooth velocity that may be merged, masked and reused."""

    bias_R: Any

    def evaluate(self, z: Any, t_B: Any, *, frame_mask_BT: Any, merged: bool) -> Any:
        return self.evaluate_keeping(z, t_B, frame_mask_BT=frame_mask_BT, merged=merged)[0]

    def evaluate_keeping(self, z: Any, t_B: Any, *, frame_mask_BT: Any, merged: bool) -> tuple[Any, Any]:
        xp, tau = _library(z), _frame_times(z, t_B, frame_mask_BT)
        y = xp.repeat((z[:, 0::2] + z[:, 1::2]) / 2, 2, axis=1) if merged else z
        bias = self.bias_R[: len(z)][:, None, None, None, None]
        residual = xp.sin(1.3 * y + bias + 2 * tau) * (1 + tau)
        return residual - 0.4 * z * tau, residual

    def modulated_input(self, z: Any, t_B: Any, *, frame_mask_BT: Any) -> Any:
        return z * (1 + _frame_times(z, t_B, frame_mask_BT))

    def first_block(self, z: Any, t_B: Any, *, frame_mask_BT: Any, merged: bool) -> tuple[Any, Any]:
        xp, tau = _library(z), _frame_times(z, t_B, frame_mask_BT)
        y = xp.repeat((z[:, 0::2] + z[:, 1::2]) / 2, 2, axis=1) if merged else z
        added = 0.3 * xp.sin(y + self.bias_R[: len(z)][:, None, None, None, None] + tau)
        return z + added, added

    def rest(self, z: Any, t_B: Any, tokens: Any, *, frame_mask_BT: Any, merged: bool) -> tuple[Any, Any]:
        v, residual = self.evaluate_keeping(z, t_B, frame_mask_BT=frame_mask_BT, merged=merged)
        return v, residual - (tokens - z)

    def first_block_share(self) -> float:
        return SHARE

    def reuse(self, z: Any, t_B: Any, residual: Any, *, frame_mask_BT: Any) -> Any:
        return residual - 0.4 * z * _frame_times(z, t_B, frame_mask_BT)


def _library(array: Any) -> Any:
    return np if isinstance(array, np.ndarray) else jnp


def _frame_times(z: Any, t_B: Any, frame_mask_BT: Any) -> Any:
    """The flow time of every frame: 0 where it is not sampled."""
    xp = _library(z)
    tau = xp.broadcast_to((t_B / SCALE)[:, None], z.shape[:2])
    tau = tau if frame_mask_BT is None else xp.where(frame_mask_BT, tau, 0.0)
    return tau[:, :, None, None, None]
