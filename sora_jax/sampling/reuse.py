"""Reuse plans: which steps evaluate the velocity, and which reuse what an earlier step kept.

A plan is one integer for each step and is fixed before the sampling starts, so it is a runtime input of the compiled
sampler and never a data-dependent branch.

Invariant: the first step, the first step after merging ends, and every step in which a frame joins evaluate in full whatever
the plan says; what they replace is never used again.

Source: the family of MagCache (arXiv 2506.09045) and LeMiCa (arXiv 2511.00090): one residual kept, plan found by shortest
path over a table of measured errors; FasterCache (arXiv 2410.19355) for the kept guidance difference.
"""

import dataclasses
from collections.abc import Iterable
from typing import Literal, Self, no_type_check

import jax
import numpy as np

from sora_jax.sampling.arguments import whole

# What a step may be.  A plan consists of the first three; the others come about by half steps and by the guidance.
FULL, REUSE, HALF = 0, 1, 2
AFTER_HALF = 3  # reuse of the conditional rows, where the last evaluation was a half step
ONE, REUSE_ONE = 4, 5  # outside the guidance's interval: the conditional rows are all there is
STILL = 6  # the latents stand still
KINDS = ("full", "reuse", "half", "reuse after half", "one row", "reuse of one row", "still")
COSTS = (1.0, 0.0, 0.5, 0.0, 0.5, 0.0, 0.0)  # evaluations, by kind
Keep = Literal["residual", "velocity"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What each step evaluates; make one with `evaluate_at`, or let `calibration.calibrate` find one.

    Attributes:
      codes: for each step `FULL` (1 evaluation), `REUSE` (none) or `HALF`: the conditional rows only, with the guidance
        difference of the last full step (half an evaluation).
      keep: what a reused step takes from the last evaluation; static.  "velocity" holds the velocity itself and serves any
        velocity; "residual" holds what the block stack added to its tokens, and embeds and projects afresh: it needs a
        `velocity.ReusableVelocity`.
      halves: whether half steps are compiled; static.  None: only where the codes have one.
      extrapolate: continue the residual along the line through the last two evaluated ones, see `kept`; static.
    """

    codes: tuple[int, ...]
    keep: Keep = "residual"
    halves: bool | None = None
    extrapolate: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.codes, str) or not isinstance(self.codes, Iterable):
            raise ValueError(f"plan has the codes {self.codes!r}; expected one for each step.")
        strange = [code for code in self.codes if isinstance(code, bool) or code not in (FULL, REUSE, HALF)]
        if strange:
            raise ValueError(f"plan has the codes {strange}; expected {FULL} (full), {REUSE} (reuse) or {HALF} (half).")
        object.__setattr__(self, "codes", tuple(int(code) for code in self.codes))
        if not self.codes or self.codes[0] != FULL:
            raise ValueError("plan does not begin with a full evaluation; step 0 has nothing to reuse, set its code to 0.")
        if self.keep not in ("residual", "velocity"):
            raise ValueError(f"plan keeps {self.keep!r}; expected 'residual' or 'velocity'.")
        if not isinstance(self.extrapolate, bool):
            raise ValueError(f"plan extrapolate is {self.extrapolate!r}; expected True or False.")
        if self.extrapolate and self.keep != "residual":
            raise ValueError("plan extrapolates residuals but keeps the velocity; set keep='residual', or extrapolate=False.")
        if self.halves is False and HALF in self.codes:
            raise ValueError("plan has half steps but halves=False; leave halves out, or set it to True.")

    @classmethod
    def evaluate_at(cls, steps: Iterable[int], num_steps: int, *, keep: Keep = "residual") -> Self:
        """Returns the plan that evaluates in full at ``steps`` and reuses at all others."""
        num_steps = whole("num_steps", num_steps, least=1)
        full = {whole("a step that the plan evaluates", step, least=0) for step in steps}
        beyond = sorted(step for step in full if step >= num_steps)
        if beyond:
            raise ValueError(f"plan evaluates at the steps {beyond}; expected steps from 0 to {num_steps - 1}.")
        return cls(codes=tuple(FULL if step in full else REUSE for step in range(num_steps)), keep=keep)

    def with_half_steps(self, first_step: int) -> Self:
        """Returns the plan with full steps from ``first_step`` on turned into half steps."""
        first = max(whole("first_step", first_step, least=0), 1)
        codes = tuple(HALF if code == FULL and step >= first else code for step, code in enumerate(self.codes))
        return dataclasses.replace(self, codes=codes)

    def full_at(self, joins_N: np.ndarray) -> Self:
        """Returns the plan with full steps where frames join, whose tokens no step before has seen."""
        codes = tuple(FULL if joins else code for code, joins in zip(self.codes, joins_N, strict=True))
        return dataclasses.replace(self, codes=codes)

    @property
    def letters(self) -> str:
        """A letter for each step: F full, R reuse, H half."""
        return "".join(KINDS[code][0].upper() for code in self.codes)

    @property
    def evaluations(self) -> float:
        """Velocity evaluations of the plan, a half step counting one half."""
        return sum(COSTS[code] for code in self.codes)

    def rule(self, num_steps: int, capacity: int) -> "PlanRule":
        """Returns the runtime input for a number of steps.

        Raises:
          ValueError: the plan is for another number of steps.
        """
        if len(self.codes) != num_steps:
            raise ValueError(f"plan has {len(self.codes)} steps but the schedule {num_steps}; make a plan of that length.")
        padded = np.zeros(capacity, np.int32)
        padded[:num_steps] = self.codes
        halves = HALF in self.codes if self.halves is None else self.halves
        return PlanRule(codes_N=padded, keep=self.keep, halves=halves, extrapolate=self.extrapolate)


@jax.tree_util.register_dataclass
@no_type_check  # the tree also holds shapes and paths
@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanRule:
    """A `Plan` as runtime input: int32 codes padded with full steps; all else is static."""

    codes_N: np.ndarray | jax.Array
    keep: Keep = dataclasses.field(metadata={"static": True})
    halves: bool = dataclasses.field(metadata={"static": True})
    extrapolate: bool = dataclasses.field(default=False, metadata={"static": True})
