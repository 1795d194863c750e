"""The data of a sampling that changes: the carry from step to step, and in it the trace that grows.

Invariant: these are pytrees of arrays, without behaviour in a compiled program.  Which of their fields are None decides what is
compiled; arrays never do.
"""

import dataclasses
from typing import no_type_check

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from sora_jax.sampling.adaptive import NO_RULE, Watch
from sora_jax.sampling.leap import LeapState
from sora_jax.sampling.reuse import AFTER_HALF, FULL, HALF, REUSE

# Classes marked no_type_check hold shapes or paths in place of arrays whenever JAX maps over their trees.


@jax.tree_util.register_dataclass
@no_type_check
@dataclasses.dataclass(frozen=True, kw_only=True)
class Kept:
    """What a plan or a rule keeps from its last evaluation.

    Attributes:
      residual: the residual of every row that the last evaluation computed (the others are older); None where the velocity is
        kept.
      difference: conditional minus unconditional velocity of the last full step; None without half steps.
      half: whether the last evaluation was a half step.
      residual_before: the residual that each row had before; None where nothing is extrapolated, likewise ``times_2R``.
      times_2R: times of both; NaN where there was none before that may be used.
    """

    residual: Float[Array, "R ..."] | None
    difference: Float[Array, "B ..."] | None
    half: Bool[Array, ""]
    residual_before: Float[Array, "R ..."] | None = None
    times_2R: Float[Array, "2 R"] | None = None


@jax.tree_util.register_dataclass
@no_type_check
@dataclasses.dataclass(frozen=True, kw_only=True)
class History:
    """What solvers of more than two steps remember besides the last step.

    Attributes:
      age: how many steps before the last one may be used, 0 to 2; scalar, or [B, T] with frame weights.
      older: of the step before the last one, the velocity (AB3) or the predicted data (UniPC).
      base: latents of the last step after UniPC's corrector; None for AB3.
    """

    age: Int[Array, "..."]
    older: Float[Array, "B ..."]
    base: Float[Array, "B ..."] | None


@jax.tree_util.register_dataclass
@no_type_check
@dataclasses.dataclass(frozen=True, kw_only=True)
class Trace:
    """What each step did; rows from the number of steps taken on are zero.

    In the trace of a `Result` nothing is None: `completed` fills in what a compiled sampling need not record.

    Attributes:
      time_N: the step's time.
      evaluations_N: velocity evaluations the step cost.
      cosine_NB: cosine of this velocity and the one before; NaN where the two cannot be compared.
      kind_N: what was evaluated, an index of `reuse.KINDS`; None where it follows from costs and reuse.
      change_N: what an adaptive rule measured; NaN where it could not; None without a rule, likewise ``why_N``.
      why_N: why it evaluated or reused, an index of `adaptive.REASONS`.
      reused_N: whether the step reused anything: a residual, a velocity or a guidance difference.
      merged_N: whether temporal tokens were merged.
      leapt_NB: whether the sample leapt to the end in this step.
    """

    time_N: Float[Array, "N"]
    evaluations_N: Float[Array, "N"]
    cosine_NB: Float[Array, "N B"]
    kind_N: Int[Array, "N"] | None
    change_N: Float[Array, "N"] | None
    why_N: Int[Array, "N"] | None
    reused_N: Bool[Array, "N"]
    merged_N: Bool[Array, "N"]
    leapt_NB: Bool[Array, "N B"]

    def completed(self, taken: int) -> "Trace":
        """Returns the rows of the steps taken, on the host, with the kinds, changes and reasons that were not recorded."""
        rows = jax.tree.map(lambda rows: np.asarray(rows)[:taken], self)
        kind_N = [FULL] * taken if rows.kind_N is None else rows.kind_N
        if rows.kind_N is None:
            for i in np.flatnonzero(rows.reused_N):
                reuses = AFTER_HALF if kind_N[i - 1] in (HALF, AFTER_HALF) else REUSE
                kind_N[i] = HALF if rows.evaluations_N[i] else reuses
        return dataclasses.replace(
            rows,
            kind_N=np.asarray(kind_N, np.int32),
            change_N=np.full(taken, np.nan, np.float32) if rows.change_N is None else rows.change_N,
            why_N=np.full(taken, NO_RULE, np.int32) if rows.why_N is None else rows.why_N,
        )


@jax.tree_util.register_dataclass
@no_type_check
@dataclasses.dataclass(frozen=True, kw_only=True)
class Carry:
    """The state between two steps.

    Attributes:
      step: index of the next step.
      z: latents [B, ...].
      done_B: samples that reached the end; their latents no longer change.
      z_in: latents the last step evaluated (after joining frames got their noise): the history of multistep solvers.
      v: velocity of the last step, after guidance.
      fresh: whether ``v`` was evaluated in full.
      active_BT: frames that the last step sampled; None without frame weights.
      leap: state of the leap rule; None without a leap.
      kept: what is kept for steps that reuse; None without a plan or a rule.
      watch: what adaptive reuse compares with; None without it.
      history: what AB3 or UniPC remembers; None where the last step is all that is needed.
      evaluations_B: velocity evaluations that went into each sample.
      batch_evaluations: velocity evaluations computed so far for the batch.
      trace: record of every step; without rows where nobody reads it (`integration`).
    """

    step: Int[Array, ""]
    z: Float[Array, "B ..."]
    done_B: Bool[Array, "B"]
    z_in: Float[Array, "B ..."]
    v: Float[Array, "B ..."]
    fresh: Bool[Array, ""]
    active_BT: Bool[Array, "B T"] | None
    leap: LeapState | None
    kept: Kept | None
    watch: Watch | None
    history: History | None
    evaluations_B: Float[Array, "B"]
    batch_evaluations: Float[Array, ""]
    trace: Trace
