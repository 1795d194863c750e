"""One guided velocity: evaluated in full, in half, or taken from what an earlier step kept.

Invariant: with guidance, rows are [conditional, unconditional]; a half step evaluates the conditional ones only and takes
their difference from the last full step; outside the guidance's interval the conditional ones are all there is.  Which kind a
step is depends on its plan and its time alone.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

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


def empty_kept(sampling: Sampling, at: Point) -> Kept | None:
    """Returns zeros in the shapes of what the plan keeps."""
    plan = sampling.plan
    if plan is None:
        return None
    residual = None
    if plan.keep == "residual":
        shape = jax.eval_shape(lambda: at.evaluate_keeping(_copies(sampling))[1])
        residual = jnp.zeros(shape.shape, shape.dtype)
    return Kept(residual=residual, difference=jnp.zeros_like(at.z) if plan.halves else None, half=jnp.asarray(False))


def evaluate(sampling: Sampling, carry: Carry, at: Point, *, continues: Bool[Array, ""], guided: Bool[Array, ""]) -> Evaluation:
    """Returns the guided velocity of a step.

    Args:
      sampling: times and options.
      carry: what the step before left.
      at: latents and time to evaluate at.
      continues: False where nothing of the step before may be used: at the first step, and where merging ends or guidance
        changes.
      guided: whether the guidance's interval holds this step's time.
    """
    step = _Step(sampling=sampling, at=at, v_before=carry.v)
    branches = step.branches()
    if len(branches) == 1:
        v = step.guided(at.evaluate(_copies(sampling)))[0]
        return Evaluation(v=v, kind=jnp.asarray(FULL), fresh=jnp.asarray(True), cost=jnp.asarray(1.0, jnp.float32), kept=None)
    kind = _kind(sampling, carry, continues=continues, guided=guided)
    place = np.zeros(len(COSTS), np.int32)
    place[[*branches]] = np.arange(len(branches))
    v, kept = jax.lax.switch(jnp.asarray(place)[kind], [*branches.values()], carry.kept)
    return Evaluation(
        v=v,
        kind=kind,
        fresh=(kind == FULL) | (kind == ONE),
        cost=jnp.asarray(COSTS, jnp.float32)[kind],
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
    step = _Step(sampling=sampling, at=at, v_before=at.z)

    def both() -> Array:
        return step.guided(at.evaluate(_copies(sampling)))[0]

    if guided is None or sampling.guidance is None or sampling.guidance.low is None:
        return both()
    return jax.lax.cond(guided, both, lambda: at.evaluate(1))


def reused_velocity(sampling: Sampling, kept: Kept, at: Point, *, guided: bool = True) -> Float[Array, "B ..."]:
    """Returns the guided velocity with a kept residual in place of the costly part."""
    step = _Step(sampling=sampling, at=at, v_before=at.z)
    return (step.reuse if guided else step.reuse_one)(kept)[0]


Branch = Callable[[Kept | None], tuple[Array, Kept | None]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Step:
    """What a step may do: each branch takes what is kept, and returns the guided velocity and what to keep."""

    sampling: Sampling
    at: Point
    v_before: Array

    def branches(self) -> dict[int, Branch]:
        """Returns the branches that are compiled, by kind."""
        plan, guidance = self.sampling.plan, self.sampling.guidance
        has_interval = guidance is not None and guidance.low is not None
        branches: dict[int, Branch] = {FULL: self.full}
        if plan is not None:
            branches[REUSE] = self.reuse
            if plan.halves:
                branches |= {HALF: self.half, AFTER_HALF: self.after_half}
        if has_interval:
            branches[ONE] = self.one
            if plan is not None:
                branches[REUSE_ONE] = self.reuse_one
        if guidance is not None and guidance.zero_steps is not None:
            branches[STILL] = lambda kept: (jnp.zeros_like(self.v_before), kept)
        return branches

    def full(self, kept: Kept | None) -> tuple[Array, Kept | None]:
        rows, kept = self._evaluated(_copies(self.sampling), kept)
        v, difference = self.guided(rows)
        if kept is None:
            return v, None
        kept = dataclasses.replace(kept, half=jnp.asarray(False))
        return v, kept if kept.difference is None else dataclasses.replace(kept, difference=difference)

    def half(self, kept: Kept | None) -> tuple[Array, Kept | None]:
        assert kept is not None
        conditional, after = self._evaluated(1, kept)
        assert after is not None
        return self._completed(conditional, kept), dataclasses.replace(after, half=jnp.asarray(True))

    def one(self, kept: Kept | None) -> tuple[Array, Kept | None]:
        return self._evaluated(1, kept)

    def reuse(self, kept: Kept | None) -> tuple[Array, Kept | None]:
        return self.guided(self._reused(_copies(self.sampling), kept))[0] if self._keeps(kept) else self.v_before, kept

    def after_half(self, kept: Kept | None) -> tuple[Array, Kept | None]:
        assert kept is not None
        return self._completed(self._reused(1, kept), kept) if self._keeps(kept) else self.v_before, kept

    def reuse_one(self, kept: Kept | None) -> tuple[Array, Kept | None]:
        return self._reused(1, kept) if self._keeps(kept) else self.v_before, kept

    def guided(self, rows: Array) -> tuple[Array, Array]:
        """Returns the guided velocity of all rows, and conditional minus unconditional (without guidance the velocity)."""
        if self.sampling.guidance is None:
            return rows, rows
        conditional, unconditional = jnp.split(rows, 2)
        v = self.sampling.guidance.combine(conditional, unconditional, self.at.active_BT)
        return v, conditional - unconditional

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
        if len(residual) < len(kept.residual):
            residual = jnp.concatenate([residual, kept.residual[len(residual) :]])
        return v, dataclasses.replace(kept, residual=residual)

    def _reused(self, copies: int, kept: Kept | None) -> Array:
        assert kept is not None
        assert kept.residual is not None
        return self.at.reuse(copies, kept.residual[: copies * len(self.at.z)])


def _copies(sampling: Sampling) -> int:
    return 1 if sampling.guidance is None else 2
