"""Adaptive reuse: a step evaluates, or takes over what an earlier one kept, by how much the network's input has changed.

`Reuse` is what a user asks for; `ReuseRule` holds the same as runtime inputs of the compiled sampler; `Watch` is what is
remembered from step to step.  Two rules:

    by_input         the modulated input of the first block changes little, summed up since the last evaluation
    by_first_block   what the first block adds differs little from what it added at the last evaluation

Change is the mean absolute difference over the mean absolute value.  The decision is one for the batch: over all values of all
samples that are not done.  First and last steps are protected: they evaluate.

Invariant: a decision reads what is computed in every step anyway, never a reused velocity or residual, so the same latents
decide alike whatever was reused to reach them.  Nothing here evaluates.

Source: TeaCache (arXiv 2411.19108; its Open-Sora 1.2 code), first-block cache (ParaAttention, first_block_cache).  Differs from
source: by_input has no fitted polynomial, so that published thresholds do not carry over; the first block is spatial block 0.
"""

import dataclasses
from typing import Literal, Self, get_args, no_type_check

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from sora_jax.sampling.arguments import finite, whole
from sora_jax.sampling.joining import expand

Watched = Literal["input", "first_block"]
TINY = 1e-8

# Why a step evaluated or reused; a trace holds the index.
NO_RULE, PROTECTED, RESTARTED, JOINS, CHANGED, BELOW = range(6)
REASONS = (
    "no rule",
    "first, last or leaping step",
    "merging or guidance changes",
    "a frame joins",
    "change at the threshold or above",
    "change below the threshold",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reuse:
    """When to reuse; make one with `by_input` or `by_first_block`.

    Attributes:
      watched: what is compared; static.
      threshold: a step reuses while the change is below this; 0 evaluates always.
      first: first steps that evaluate, at least 1.
      last: last steps that evaluate.
      extrapolate: continue the residual along the line through the last two evaluated ones, see `kept`; static.
    """

    watched: Watched
    threshold: int | float
    first: int = 1
    last: int = 1
    extrapolate: bool = False

    def __post_init__(self) -> None:
        if self.watched not in get_args(Watched):
            raise ValueError(f"reuse watches {self.watched!r}; expected {' or '.join(get_args(Watched))}.")
        if finite("reuse threshold", self.threshold) < 0:
            raise ValueError(f"reuse threshold is {self.threshold}; expected 0 or more.")
        whole("reuse first", self.first, least=1)
        whole("reuse last", self.last, least=0)
        if not isinstance(self.extrapolate, bool):
            raise ValueError(f"reuse extrapolate is {self.extrapolate!r}; expected True or False.")

    @classmethod
    def by_input(cls, threshold: int | float, *, first: int = 1, last: int = 1, extrapolate: bool = False) -> Self:
        """Returns the rule of TeaCache: reuse until the changes of the modulated input sum up to the threshold."""
        return cls(watched="input", threshold=threshold, first=first, last=last, extrapolate=extrapolate)

    @classmethod
    def by_first_block(cls, threshold: int | float, *, first: int = 1, last: int = 1, extrapolate: bool = False) -> Self:
        """Returns the first-block cache: evaluate the first block, and reuse the others while what it adds is the same."""
        return cls(watched="first_block", threshold=threshold, first=first, last=last, extrapolate=extrapolate)

    def rule(self) -> "ReuseRule":
        """Returns the runtime inputs."""
        return ReuseRule(
            threshold=np.asarray(self.threshold, np.float32),
            first=np.asarray(self.first, np.int32),
            last=np.asarray(self.last, np.int32),
            watched=self.watched,
            extrapolate=self.extrapolate,
        )


@jax.tree_util.register_dataclass
@no_type_check  # the tree also holds shapes and paths
@dataclasses.dataclass(frozen=True, kw_only=True)
class Watch:
    """What a decision compares with: the values watched, and the change since the last evaluation (`by_input`)."""

    values: Float[Array, "R ..."]
    change: Float[Array, ""]


@jax.tree_util.register_dataclass
@no_type_check  # the tree also holds shapes and paths
@dataclasses.dataclass(frozen=True, kw_only=True)
class ReuseRule:
    """A `Reuse` as runtime scalars (float32, int32); ``watched`` and ``extrapolate`` are static."""

    threshold: np.ndarray | jax.Array
    first: np.ndarray | jax.Array
    last: np.ndarray | jax.Array
    watched: Watched = dataclasses.field(metadata={"static": True})
    extrapolate: bool = dataclasses.field(metadata={"static": True})

    def protects(self, step: Int[Array, ""], num_steps: Int[Array, ""]) -> Bool[Array, ""]:
        """Returns whether a step is one of the first or last ones that evaluate."""
        return (step < self.first) | (step >= num_steps - self.last)

    def decide(
        self, watch: Watch, values: Float[Array, "R ..."], done_B: Bool[Array, "B"], *, must_evaluate: Bool[Array, ""]
    ) -> tuple[Bool[Array, ""], Float[Array, ""], Watch]:
        """Returns whether the step reuses, the change that decided it, and what the next decision compares with.

        ``values`` are those of this step.  ``must_evaluate``: the step is protected, or has nothing to reuse.
        """
        change = relative_change(values, watch.values, done_B)
        if self.watched == "input":
            change = watch.change + change
        reuses = ~must_evaluate & (change < self.threshold)
        kept = values if self.watched == "input" else jnp.where(reuses, watch.values, values)
        return reuses, change, Watch(values=kept, change=jnp.where(reuses, change, 0))


def relative_change(values: Float[Array, "R ..."], before: Float[Array, "R ..."], done_B: Bool[Array, "B"]) -> Float[Array, ""]:
    """Returns the mean absolute difference over the mean absolute value before, of the rows of samples that are not done."""
    counts = expand(jnp.tile(~done_B, len(values) // len(done_B)), values)
    total = jnp.sum(jnp.abs(before) * counts, dtype=jnp.float32)
    return jnp.sum(jnp.abs(values - before) * counts, dtype=jnp.float32) / jnp.maximum(total, TINY)
