"""Linear proportional leap: when a sampling jumps from time t straight to the end.

`Leap` is what a user asks for; `LeapRule` holds the same as runtime inputs of the compiled sampler; `LeapState` is what
each sample remembers.

Invariant: a rule reads cosines and step numbers only.  The sampler decides what a leap does to the latents.

Source: arXiv 2502.04363 section 3.1, eq. 5; On-device-Sora schedulers/rf compute_cosine_simularity for ``released``.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal, Self, get_args, no_type_check

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from sora_jax.sampling.arguments import PerSample, each, finite, whole
from sora_jax.sampling.joining import expand

Mode = Literal["static", "dynamic", "released"]
TINY = 1e-8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Leap:
    """When to leap; make one with `static`, `dynamic` or `released`.

    Index, tolerance, share and patience may each be a sequence with one value for each sample of the batch.

    Attributes:
      mode: the rule; static.
      index: step that leaps (mode "static").
      tolerance: by how much a cosine must exceed the best so far to count as better.
      min_share: share of the steps before comparisons begin (mode "dynamic").
      patience: comparisons in a row without a better cosine that make a sample leap.
      extrapolate: leap along the line through the last two velocities instead of the last velocity alone; static.
    """

    mode: Mode
    index: PerSample = 0
    tolerance: PerSample = 1e-4
    min_share: PerSample = 0.5
    patience: PerSample = 3
    extrapolate: bool = False

    def __post_init__(self) -> None:
        checks: dict[str, Callable[[Any], Any]] = {
            "index": lambda value: whole("leap index", value, least=0),
            "tolerance": lambda value: _in_range("leap tolerance", value, math.inf, "0 or more"),
            "min_share": lambda value: _in_range("leap min_share", value, 1.0, "a share from 0 to 1"),
            "patience": lambda value: whole("leap patience", value, least=1),
        }
        for name, check in checks.items():
            value = getattr(self, name)
            values = each(f"leap {name}", value)
            object.__setattr__(self, name, check(value) if values is None else tuple(check(one) for one in values))
        if self.mode not in get_args(Mode):
            raise ValueError(f"leap mode is {self.mode!r}; expected {', '.join(get_args(Mode))}.")
        if not isinstance(self.extrapolate, bool):
            raise ValueError(f"leap extrapolate is {self.extrapolate!r}; expected True or False.")

    @classmethod
    def static(cls, index: PerSample, *, extrapolate: bool = False) -> Self:
        """Returns the leap of step ``index``: steps 0 to index are evaluated, index + 1 evaluations."""
        return cls(mode="static", index=index, extrapolate=extrapolate)

    @classmethod
    def dynamic(
        cls,
        *,
        tolerance: PerSample = 1e-4,
        min_share: PerSample = 0.5,
        patience: PerSample = 3,
        extrapolate: bool = False,
    ) -> Self:
        """Returns the paper's rule: each sample leaps when the cosine of consecutive velocities stops rising."""
        return cls(mode="dynamic", tolerance=tolerance, min_share=min_share, patience=patience, extrapolate=extrapolate)

    @classmethod
    def released(cls) -> Self:
        """Returns the rule of the published Python, for a fresh scheduler object.

        One decision for the batch, from rows of channel 0 of frame 0 of sample 0; comparisons begin at step 14 whatever the
        number of steps, with a tolerance of 1e-3.

        Differs from source: with frame weights the leap waits until every frame has joined; the source leaves late frames out.
        """
        return cls(mode="released", tolerance=1e-3)

    def rule(self, num_steps: int) -> "LeapRule":
        """Returns the runtime inputs for a number of steps.

        Raises:
          ValueError: the index is not one of the steps.
        """
        if self.mode == "static" and np.max(self.index) >= num_steps:
            raise ValueError(
                f"leap index {np.max(self.index)} is beyond the last of {num_steps} steps; expected 0 to {num_steps - 1} "
                f"({num_steps - 1} leaps nowhere)."
            )
        # The subtracted 1e-9 keeps 0.55 * 20 = 11.000000000000002 from counting as 12.
        first = 14 if self.mode == "released" else np.ceil(np.multiply(self.min_share, num_steps) - 1e-9) - 1
        return LeapRule(
            index=np.asarray(self.index, np.int32),
            first=np.maximum(first, 1).astype(np.int32),
            tolerance=np.asarray(self.tolerance, np.float32),
            patience=np.asarray(self.patience, np.int32),
            mode=self.mode,
            extrapolate=self.extrapolate,
        )


@jax.tree_util.register_dataclass
@no_type_check  # the tree also holds shapes and paths
@dataclasses.dataclass(frozen=True, kw_only=True)
class LeapState:
    """Per sample: the best cosine so far, and how many more comparisons without a better one it tolerates."""

    best_B: Float[Array, "B"]
    patience_B: Int[Array, "B"]


@jax.tree_util.register_dataclass
@no_type_check  # the tree also holds shapes and paths
@dataclasses.dataclass(frozen=True, kw_only=True)
class LeapRule:
    """A `Leap` as runtime numbers (int32, float32; scalars or [B]); ``mode`` and ``extrapolate`` are static."""

    index: np.ndarray | jax.Array
    first: np.ndarray | jax.Array
    tolerance: np.ndarray | jax.Array
    patience: np.ndarray | jax.Array
    mode: Mode = dataclasses.field(metadata={"static": True})
    extrapolate: bool = dataclasses.field(metadata={"static": True})

    def start(self, batch: int) -> LeapState:
        """Returns the state before the first step; the published code starts from cosine 0, the paper from -1."""
        best = 0.0 if self.mode == "released" else -1.0
        patience_B = jnp.broadcast_to(jnp.asarray(self.patience, jnp.int32), (batch,))
        return LeapState(best_B=jnp.full(batch, best, jnp.float32), patience_B=patience_B)

    def decide(
        self,
        state: LeapState,
        cosine_B: Float[Array, "B"],
        *,
        step: Int[Array, ""],
        comparable_B: Bool[Array, "B"],
        may_leap_B: Bool[Array, "B"],
        restart: Bool[Array, ""],
    ) -> tuple[LeapState, Bool[Array, "B"]]:
        """Returns the state after a step and which samples leap in it.

        ``comparable_B``: this velocity and the one before are fresh, of the same merge phase and of the same frames.
        ``may_leap_B``: every frame that will be sampled is active.  ``restart``: merging ended with the step before.
        """
        if self.mode == "static":
            return state, jnp.broadcast_to(step == self.index, cosine_B.shape)
        late = step >= self.first
        if self.mode == "released":
            state = self._compared(
                state, jnp.broadcast_to(cosine_B[:1], cosine_B.shape), jnp.broadcast_to(late, cosine_B.shape)
            )
            return state, (state.patience_B <= 0) & jnp.all(may_leap_B)
        fresh = self.start(len(cosine_B))
        state = jax.tree.map(lambda new, old: jnp.where(restart, new, old), fresh, state)
        compared_B = comparable_B & may_leap_B & late
        state = self._compared(state, cosine_B, compared_B)
        return state, compared_B & (state.patience_B <= 0)

    def _compared(self, state: LeapState, cosine_B: Array, compared_B: Array) -> LeapState:
        better_B = cosine_B > state.best_B + self.tolerance
        patience_B = jnp.where(better_B, self.patience, state.patience_B - 1)
        return LeapState(
            best_B=jnp.where(compared_B & better_B, cosine_B, state.best_B),
            patience_B=jnp.where(compared_B, patience_B, state.patience_B),
        )


def _in_range(name: str, value: Any, most: float, expected: str) -> float:
    number = finite(name, value)
    if not 0 <= number <= most:
        raise ValueError(f"{name} is {value}; expected {expected}.")
    return number


def latent_cosine(
    v: Float[Array, "B ..."], v_before: Float[Array, "B ..."], active_BT: Bool[Array, "B T"] | None
) -> Float[Array, "B"]:
    """Returns the cosine of two velocities over each sample's whole latent, active frames only."""
    if active_BT is not None:
        v = v * expand(active_BT, v)
    axes = tuple(range(1, v.ndim))
    before = v_before if active_BT is None else v_before * expand(active_BT, v)
    dot, norm, norm_before = (jnp.sum(a * b, axis=axes, dtype=jnp.float32) for a, b in ((v, before), (v, v), (before, before)))
    return dot / jnp.maximum(jnp.sqrt(norm) * jnp.sqrt(norm_before), TINY)


def released_cosine(v_BTHWC: Float[Array, "B T H W C"], before_BTHWC: Float[Array, "B T H W C"]) -> Float[Array, "B"]:
    """Returns the published code's cosine: of each row of channel 0 of frame 0 of sample 0, averaged over rows."""
    row, before = v_BTHWC[0, 0, :, :, 0], before_BTHWC[0, 0, :, :, 0]
    norms = jnp.maximum(jnp.linalg.norm(row, axis=1), TINY) * jnp.maximum(jnp.linalg.norm(before, axis=1), TINY)
    return jnp.broadcast_to(jnp.mean(jnp.sum(row * before, axis=1) / norms), v_BTHWC.shape[:1])
