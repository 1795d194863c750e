"""One guided velocity: evaluated in full, in half, or taken from what an earlier step kept.

Invariant: with guidance, rows are [conditional, unconditional] and the result is ``u + guidance (c - u)``; a half step
evaluates c only and takes ``c - u`` from the last full step.  Whether a step may reuse is decided by its plan alone.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from sora_jax.sampling.reuse import FULL, HALF, REUSE
from sora_jax.sampling.state import Carry, Inputs, Kept


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
    """A guided velocity, whether it was evaluated in full, what it cost, and what to keep of it."""

    v: Float[Array, "B ..."]
    fresh: Bool[Array, ""]
    cost: Float[Array, ""]
    kept: Kept | None


def empty_kept(inputs: Inputs, z: Float[Array, "B ..."], active_BT: Bool[Array, "B T"] | None) -> Kept | None:
    """Returns zeros in the shapes of what the plan keeps."""
    plan = inputs.plan
    if plan is None:
        return None
    residual = None
    if plan.keep == "residual":
        shape = jax.eval_shape(
            lambda: _call(inputs, z, jnp.zeros(()), active_BT, rows=_all_rows(inputs), merged=False, keep=True)[1]
        )
        residual = jnp.zeros(shape.shape, shape.dtype)
    return Kept(residual=residual, difference=jnp.zeros_like(z) if plan.halves else None, half=jnp.asarray(False))


def evaluate(
    inputs: Inputs,
    carry: Carry,
    z: Float[Array, "B ..."],
    t: Float[Array, ""],
    active_BT: Bool[Array, "B T"] | None,
    *,
    merged: bool,
    continues: Bool[Array, ""],
) -> Evaluation:
    """Returns the guided velocity of a step as its plan has it.

    ``continues`` is False where nothing of the step before may be used: at the first step and where merging ends.
    """
    if inputs.plan is None or carry.kept is None:
        v = guided_velocity(inputs, z, t, active_BT, merged=merged)
        return Evaluation(v=v, fresh=jnp.asarray(True), cost=jnp.asarray(1.0, jnp.float32), kept=None)
    kept = carry.kept
    step = _Step(inputs=inputs, carry=carry, z=z, t=t, active_BT=active_BT, merged=merged)
    code = jnp.where(continues, jnp.asarray(inputs.plan.codes_N)[carry.step], FULL)
    branches, costs = [lambda: step.full(kept), lambda: step.reuse(kept)], [1.0, 0.0]
    if inputs.plan.halves:
        branches += [lambda: step.half(kept), lambda: step.reuse_half(kept)]
        costs += [0.5, 0.0]
        code = jnp.where((code == REUSE) & kept.half, HALF + 1, code)
    v, kept = jax.lax.switch(code, branches)
    return Evaluation(v=v, fresh=code == FULL, cost=jnp.asarray(costs, jnp.float32)[code], kept=kept)


def guided_velocity(
    inputs: Inputs, z: Float[Array, "B ..."], t: Float[Array, ""], active_BT: Bool[Array, "B T"] | None, *, merged: bool
) -> Float[Array, "B ..."]:
    """Returns a full evaluation without keeping anything of it."""
    v, _ = _call(inputs, z, t, active_BT, rows=_all_rows(inputs), merged=merged)
    return _guided(inputs, v)[0]


def reused_velocity(
    inputs: Inputs, kept: Kept, z: Float[Array, "B ..."], t: Float[Array, ""], active_BT: Bool[Array, "B T"] | None
) -> Float[Array, "B ..."]:
    """Returns the guided velocity with a kept residual of all rows in place of the costly part."""
    v, _ = _call(inputs, z, t, active_BT, rows=_all_rows(inputs), merged=False, residual=kept.residual)
    return _guided(inputs, v)[0]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Step:
    """The branches of a planned step; each returns the guided velocity and what to keep."""

    inputs: Inputs
    carry: Carry
    z: Array
    t: Array
    active_BT: Array | None
    merged: bool

    def full(self, kept: Kept) -> tuple[Array, Kept]:
        rows, residual = self._evaluated(_all_rows(self.inputs), kept)
        v, difference = _guided(self.inputs, rows)
        return v, Kept(residual=residual, difference=None if kept.difference is None else difference, half=jnp.asarray(False))

    def half(self, kept: Kept) -> tuple[Array, Kept]:
        conditional, residual = self._evaluated(1, kept)
        if residual is not None and kept.residual is not None:
            residual = jnp.concatenate([residual, kept.residual[len(residual) :]])
        return self._completed(conditional, kept), dataclasses.replace(kept, residual=residual, half=jnp.asarray(True))

    def reuse(self, kept: Kept) -> tuple[Array, Kept]:
        if kept.residual is None:
            return self.carry.v, kept
        return reused_velocity(self.inputs, kept, self.z, self.t, self.active_BT), kept

    def reuse_half(self, kept: Kept) -> tuple[Array, Kept]:
        if kept.residual is None:
            return self.carry.v, kept
        conditional, _ = self._called(1, residual=kept.residual[: len(self.z)])
        return self._completed(conditional, kept), kept

    def _completed(self, conditional: Array, kept: Kept) -> Array:
        """Returns ``u + g (c - u)`` written as ``c + (g - 1) (c - u)``, with the kept difference."""
        return conditional + (jnp.asarray(self.inputs.guidance, conditional.dtype) - 1) * jnp.asarray(kept.difference)

    def _evaluated(self, rows: int, kept: Kept) -> tuple[Array, Array | None]:
        return self._called(rows, keep=kept.residual is not None)

    def _called(self, rows: int, *, keep: bool = False, residual: Array | None = None) -> tuple[Array, Array | None]:
        return _call(self.inputs, self.z, self.t, self.active_BT, rows=rows, merged=self.merged, keep=keep, residual=residual)


def _all_rows(inputs: Inputs) -> int:
    return 1 if inputs.guidance is None else 2


def _guided(inputs: Inputs, v: Array) -> tuple[Array, Array]:
    """Returns the guided velocity of all rows, and conditional minus unconditional (the velocity itself without guidance)."""
    if inputs.guidance is None:
        return v, v
    conditional, unconditional = jnp.split(v, 2)
    difference = conditional - unconditional
    return unconditional + jnp.asarray(inputs.guidance, v.dtype) * difference, difference


def _call(
    inputs: Inputs,
    z: Array,
    t: Array,
    active_BT: Array | None,
    *,
    rows: int,
    merged: bool,
    keep: bool = False,
    residual: Array | None = None,
) -> tuple[Array, Array | None]:
    """Calls the velocity on ``rows`` copies of the batch; returns velocity and residual, None unless ``keep``."""
    options: dict[str, Any] = {}
    if active_BT is not None:
        options["frame_mask_BT"] = jnp.tile(active_BT, (rows, 1))
    if inputs.merge_steps is not None:
        options["merge"] = merged
    if keep:
        options["keep_residual"] = True
    if residual is not None:
        options["residual"] = residual
    z_rows = jnp.tile(z, (rows,) + (1,) * (z.ndim - 1))
    out = inputs.velocity_fn(z_rows, jnp.full(len(z_rows), t, jnp.float32), **options)
    v, kept = out if keep else (out, None)
    if v.shape != z_rows.shape:
        raise ValueError(f"velocity_fn returned shape {v.shape} for latents of shape {z_rows.shape}; expected the same shape.")
    return v.astype(z.dtype), kept
