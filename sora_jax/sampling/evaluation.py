"""One guided velocity: evaluated in full, in half, or taken from what an earlier step kept.

Invariant: with guidance, rows are [conditional, unconditional]; a half step evaluates the conditional ones only and takes
their difference from the last full step; outside the guidance's interval the conditional ones are all there is.  Which kind a
step is depends on its plan and its time alone.
"""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from sora_jax import layout
from sora_jax.sampling.adaptive import NO_RULE, Watch
from sora_jax.sampling.kept import residual_at, updated
from sora_jax.sampling.options import Sampling
from sora_jax.sampling.reuse import AFTER_HALF, COSTS, FULL, HALF, ONE, REUSE, REUSE_ONE, STILL
from sora_jax.sampling.state import Carry, Kept
from sora_jax.sampling.velocity import Point


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
    """A guided velocity, its kind (a code of `reuse`), what it cost, and what to keep of it.

    ``fresh``: all of it was evaluated in this step.
    """

    v: Float[Array, "B ..."]
    kind: Int[Array, ""]
    fresh: Bool[Array, ""]
    cost: Float[Array, ""]
    kept: Kept | None
    watch: Watch | None = None
    change: Float[Array, ""] | float = math.nan
    why: Int[Array, ""] | int = NO_RULE


def empty_kept(sampling: Sampling, at: Point) -> Kept | None:
    """Returns zeros in the shapes of what a plan or a rule keeps."""
    plan, rule, copies = sampling.plan, sampling.reuse, copies_of(sampling)
    if plan is None and rule is None:
        return None
    residual = None
    if rule is not None and rule.watched == "first_block":
        residual = _zeros(lambda: at.rest(copies, at.first_block(copies)[0])[1])
    elif plan is None or plan.keep == "residual":
        residual = layout.residual(_zeros(lambda: at.evaluate_keeping(copies)[1]))
    extrapolates = any(each is not None and each.extrapolate for each in (plan, rule))
    return Kept(
        residual=residual,
        difference=jnp.zeros_like(at.z) if plan is not None and plan.halves else None,
        half=jnp.asarray(False),
        residual_before=jnp.zeros_like(residual) if extrapolates and residual is not None else None,
        times_2R=jnp.full((2, copies * len(at.z)), jnp.nan, jnp.float32) if extrapolates else None,
    )


def empty_watch(sampling: Sampling, at: Point) -> Watch | None:
    """Returns zeros in the shapes of what adaptive reuse compares with."""
    if sampling.reuse is None:
        return None
    by_input = sampling.reuse.watched == "input"
    values = _zeros(at.modulated_input if by_input else lambda: at.first_block(copies_of(sampling))[1])
    return Watch(values=values, change=jnp.zeros((), jnp.float32))


def _zeros(of: Callable[[], Array]) -> Array:
    shape = jax.eval_shape(of)
    return jnp.zeros(shape.shape, shape.dtype)


def evaluate(
    sampling: Sampling, carry: Carry, step: "Step", *, continues: Bool[Array, ""], guided: Bool[Array, ""]
) -> Evaluation:
    """Returns the guided velocity of a step as its plan and its time have it.

    Args:
      sampling: times and options.
      carry: what the step before left.
      step: what it may do.
      continues: False where nothing of the step before may be used: at the first step, and where merging ends or guidance
        changes.
      guided: whether the guidance's interval holds this step's time.
    """
    branches = step.branches()
    if len(branches) == 1:
        v = step.guided(step.at.evaluate(copies_of(sampling)))
        return Evaluation(v=v, kind=jnp.asarray(FULL), fresh=jnp.asarray(True), cost=jnp.asarray(1.0, jnp.float32), kept=None)
    kind = _kind(sampling, carry, continues=continues, guided=guided)
    kinds = sorted(branches)
    place = kind if kinds == [*range(len(kinds))] else jnp.searchsorted(jnp.asarray(kinds), kind, method="compare_all")
    v, kept = jax.lax.switch(place, [branches[one] for one in kinds], carry.kept)
    if kept is not None and kept.residual is not None:
        kept = dataclasses.replace(kept, residual=layout.residual(kept.residual))
    return Evaluation(
        v=v,
        kind=kind,
        fresh=(kind == FULL) | (kind == ONE) if ONE in kinds else kind == FULL,
        cost=jnp.asarray(COSTS[: kinds[-1] + 1], jnp.float32)[kind],
        kept=kept,
    )


def _kind(sampling: Sampling, carry: Carry, *, continues: Array, guided: Array) -> Array:
    kind = jnp.asarray(FULL)
    if sampling.plan is not None and carry.kept is not None:
        kind = jnp.where(continues, jnp.asarray(sampling.plan.codes_N)[carry.step], FULL)
        if sampling.plan.halves:
            kind = jnp.where((kind == REUSE) & carry.kept.half, AFTER_HALF, kind)
    if sampling.guidance is None:
        return kind
    if sampling.guidance.low is not None:
        reuses = (kind == REUSE) | (kind == AFTER_HALF)
        kind = jnp.where(guided, kind, jnp.where(reuses, REUSE_ONE, ONE))
    if sampling.guidance.zero_steps is not None:
        kind = jnp.where(sampling.guidance.stands_still(carry.step), STILL, kind)
    return kind


def guided_velocity(sampling: Sampling, at: Point, *, guided: Bool[Array, ""] | None = None) -> Float[Array, "B ..."]:
    """Returns a full evaluation without keeping anything of it, of the conditional rows where not ``guided``."""
    step = Step(sampling=sampling, at=at, v_before=at.z, continues=jnp.asarray(False))

    def both() -> Array:
        return step.guided(at.evaluate(copies_of(sampling)))

    if guided is None or sampling.guidance is None or sampling.guidance.low is None:
        return both()
    return jax.lax.cond(guided, both, lambda: at.evaluate(1))


def reused_velocity(sampling: Sampling, kept: Kept, at: Point, *, guided: bool = True) -> Float[Array, "B ..."]:
    """Returns the guided velocity with a kept residual in place of the costly part."""
    step = Step(sampling=sampling, at=at, v_before=at.z, continues=jnp.asarray(False))
    return (step._reuse if guided else step._reuse_one)(kept)[0]


Branch = Callable[[Kept | None], tuple[Array, Kept | None]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
    """What a step may do: each branch takes what is kept, and returns the guided velocity and what to keep.

    ``continues``: False where what was kept before this step belongs to another phase.
    """

    sampling: Sampling
    at: Point
    v_before: Array
    continues: Array

    def branches(self) -> dict[int, Branch]:
        """Returns the branches that are compiled, by kind."""
        plan, guidance = self.sampling.plan, self.sampling.guidance
        has_interval = guidance is not None and guidance.low is not None
        branches: dict[int, Branch] = {FULL: self._full}
        if plan is not None:
            branches[REUSE] = self._reuse
            if plan.halves:
                branches |= {HALF: self._half, AFTER_HALF: self._after_half}
        if has_interval:
            branches[ONE] = self._one
            if plan is not None:
                branches[REUSE_ONE] = self._reuse_one
        if guidance is not None and guidance.zero_steps is not None:
            branches[STILL] = lambda kept: (jnp.zeros_like(self.v_before), kept)
        return branches

    def _full(self, kept: Kept | None) -> tuple[Array, Kept | None]:
        rows, kept = self._evaluated(copies_of(self.sampling), kept)
        v = self.guided(rows)
        if kept is None:
            return v, None
        kept = dataclasses.replace(kept, half=jnp.asarray(False))
        if kept.difference is None:
            return v, kept
        conditional, unconditional = jnp.split(rows, 2)
        return v, dataclasses.replace(kept, difference=conditional - unconditional)

    def _half(self, kept: Kept | None) -> tuple[Array, Kept | None]:
        assert kept is not None
        conditional, after = self._evaluated(1, kept)
        assert after is not None
        return self._completed(conditional, kept), dataclasses.replace(after, half=jnp.asarray(True))

    def _one(self, kept: Kept | None) -> tuple[Array, Kept | None]:
        return self._evaluated(1, kept)

    def _reuse(self, kept: Kept | None) -> tuple[Array, Kept | None]:
        return self.guided(self._reused(copies_of(self.sampling), kept)) if self._keeps(kept) else self.v_before, kept

    def _after_half(self, kept: Kept | None) -> tuple[Array, Kept | None]:
        assert kept is not None
        return self._completed(self._reused(1, kept), kept) if self._keeps(kept) else self.v_before, kept

    def _reuse_one(self, kept: Kept | None) -> tuple[Array, Kept | None]:
        return self._reused(1, kept) if self._keeps(kept) else self.v_before, kept

    def guided(self, rows: Array) -> Array:
        """Returns the guided velocity of all rows (without guidance the velocity)."""
        if self.sampling.guidance is None:
            return rows
        conditional, unconditional = jnp.split(rows, 2)
        return self.sampling.guidance.combine(conditional, unconditional, self.at.active_BT)

    def combined(self, rows: Array) -> Array:
        """Returns the velocity that the step follows: guided of all rows, or the conditional rows themselves."""
        return rows if len(rows) == len(self.at.z) else self.guided(rows)

    def _completed(self, conditional: Array, kept: Kept) -> Array:
        assert self.sampling.guidance is not None
        return self.sampling.guidance.combine_half(conditional, jnp.asarray(kept.difference), self.at.active_BT)

    def _keeps(self, kept: Kept | None) -> bool:
        return kept is not None and kept.residual is not None

    def _evaluated(self, copies: int, kept: Kept | None) -> tuple[Array, Kept | None]:
        """Returns the velocity of the first rows, and what is kept, with their residuals anew."""
        if kept is None or kept.residual is None:
            return self.at.evaluate(copies), kept
        v, residual = self.at.evaluate_keeping(copies)
        return v, updated(kept, residual, self.at.t, continues=self.continues)

    def _reused(self, copies: int, kept: Kept | None) -> Array:
        assert kept is not None
        return self.at.reuse(copies, residual_at(kept, copies * len(self.at.z), self.at.t))


def copies_of(sampling: Sampling) -> int:
    """Returns how many copies of the batch a guided evaluation has."""
    return 1 if sampling.guidance is None else 2
