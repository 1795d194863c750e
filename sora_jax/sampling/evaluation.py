"""One guided velocity: evaluated in full, in half, or taken from what an earlier step kept.

Invariant: with guidance, rows are [conditional, unconditional]; a half step evaluates the conditional ones only and takes
their difference from the last full step.  Whether a step may reuse is decided by its plan alone.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from sora_jax import layout
from sora_jax.sampling.guidance import guided, guided_from_conditional
from sora_jax.sampling.options import Sampling
from sora_jax.sampling.reuse import FULL, HALF, REUSE
from sora_jax.sampling.state import Carry, Kept
from sora_jax.sampling.velocity import Point


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
    """A guided velocity, whether it was evaluated in full, what it cost, and what to keep of it."""

    v: Float[Array, "B ..."]
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
        residual = layout.residual(jnp.zeros(shape.shape, shape.dtype))
    return Kept(residual=residual, difference=jnp.zeros_like(at.z) if plan.halves else None, half=jnp.asarray(False))


def evaluate(sampling: Sampling, carry: Carry, at: Point, *, continues: Bool[Array, ""]) -> Evaluation:
    """Returns the guided velocity of a step as its plan has it.

    ``continues`` is False where nothing of the step before may be used: at the first step and where merging ends.
    """
    if sampling.plan is None or carry.kept is None:
        v = guided_velocity(sampling, at)
        return Evaluation(v=v, fresh=jnp.asarray(True), cost=jnp.asarray(1.0, jnp.float32), kept=None)
    kept, step = carry.kept, _PlannedStep(sampling=sampling, at=at, v_before=carry.v)
    code = jnp.where(continues, jnp.asarray(sampling.plan.codes_N)[carry.step], FULL)
    branches, costs = [lambda: step.full(kept), lambda: step.reuse(kept)], [1.0, 0.0]
    if sampling.plan.halves:
        branches += [lambda: step.half(kept), lambda: step.reuse_half(kept)]
        costs += [0.5, 0.0]
        code = jnp.where((code == REUSE) & kept.half, HALF + 1, code)
    v, kept = jax.lax.switch(code, branches)
    if kept.residual is not None:
        kept = dataclasses.replace(kept, residual=layout.residual(kept.residual))
    return Evaluation(v=v, fresh=code == FULL, cost=jnp.asarray(costs, jnp.float32)[code], kept=kept)


def guided_velocity(sampling: Sampling, at: Point) -> Float[Array, "B ..."]:
    """Returns a full evaluation without keeping anything of it."""
    return _guided(sampling, at.evaluate(_copies(sampling)))[0]


def reused_velocity(sampling: Sampling, kept: Kept, at: Point) -> Float[Array, "B ..."]:
    """Returns the guided velocity with a kept residual of all rows in place of the costly part."""
    assert kept.residual is not None
    return _guided(sampling, at.reuse(_copies(sampling), kept.residual))[0]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _PlannedStep:
    """The branches of a planned step; each returns the guided velocity and what to keep."""

    sampling: Sampling
    at: Point
    v_before: Array

    def full(self, kept: Kept) -> tuple[Array, Kept]:
        rows, residual = self._evaluated(_copies(self.sampling), kept)
        v, difference = _guided(self.sampling, rows)
        return v, Kept(residual=residual, difference=None if kept.difference is None else difference, half=jnp.asarray(False))

    def half(self, kept: Kept) -> tuple[Array, Kept]:
        conditional, residual = self._evaluated(1, kept)
        if residual is not None and kept.residual is not None:
            residual = layout.joined(residual, kept.residual[len(residual) :])
        return self._completed(conditional, kept), dataclasses.replace(kept, residual=residual, half=jnp.asarray(True))

    def reuse(self, kept: Kept) -> tuple[Array, Kept]:
        if kept.residual is None:
            return self.v_before, kept
        return reused_velocity(self.sampling, kept, self.at), kept

    def reuse_half(self, kept: Kept) -> tuple[Array, Kept]:
        if kept.residual is None:
            return self.v_before, kept
        conditional = self.at.reuse(1, kept.residual[: len(self.at.z)])
        return self._completed(conditional, kept), kept

    def _completed(self, conditional: Array, kept: Kept) -> Array:
        assert self.sampling.guidance is not None
        return guided_from_conditional(self.sampling.guidance, conditional, jnp.asarray(kept.difference))

    def _evaluated(self, copies: int, kept: Kept) -> tuple[Array, Array | None]:
        return (self.at.evaluate(copies), None) if kept.residual is None else self.at.evaluate_keeping(copies)


def _copies(sampling: Sampling) -> int:
    return 1 if sampling.guidance is None else 2


def _guided(sampling: Sampling, v: Array) -> tuple[Array, Array]:
    """Returns the guided velocity of all rows, and conditional minus unconditional (the velocity itself without guidance)."""
    if sampling.guidance is None:
        return v, v
    conditional, unconditional = jnp.split(v, 2)
    difference = conditional - unconditional
    return guided(sampling.guidance, unconditional, difference), difference
