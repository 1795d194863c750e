"""One guided velocity under adaptive reuse: what changed is measured first, then all is evaluated, or the costly part reused.

Invariant: a step that may not reuse (it is protected, nothing of the step before may be used, a frame joins) evaluates whatever
has changed, and a threshold of 0 never reuses.  The reason is recorded with the decision.
"""

import dataclasses
from typing import no_type_check

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from sora_jax.sampling.adaptive import BELOW, CHANGED, JOINS, NO_RULE, PROTECTED, RESTARTED, Watch
from sora_jax.sampling.evaluation import Evaluation, Step, copies_of
from sora_jax.sampling.kept import residual_at, updated
from sora_jax.sampling.options import Sampling
from sora_jax.sampling.reuse import FULL, ONE, REUSE, REUSE_ONE, STILL
from sora_jax.sampling.state import Carry, Kept


@jax.tree_util.register_dataclass
@no_type_check  # the tree also holds shapes and paths
@dataclasses.dataclass(frozen=True, kw_only=True)
class _Decided:
    """What a branch returns; all branches in the same shapes."""

    v: Float[Array, "B ..."]
    kept: Kept
    watch: Watch
    reuses: Bool[Array, ""]
    change: Float[Array, ""]
    cost: Float[Array, ""]


def evaluate_watched(
    sampling: Sampling,
    carry: Carry,
    step: Step,
    *,
    continues: Bool[Array, ""],
    guided: Bool[Array, ""],
    joins: Bool[Array, ""],
) -> Evaluation:
    """Returns the guided velocity of a step, evaluated or reused; ``joins``: a frame joins the sampling in it."""
    why = _why_not(sampling, carry, continues=continues, joins=joins)
    guidance, copies = sampling.guidance, copies_of(sampling)
    cost = jnp.asarray(1.0, jnp.float32)

    def decide(rows: int, cost: Array) -> _Decided:
        assert sampling.reuse is not None
        watched = _by_input if sampling.reuse.watched == "input" else _by_first_block
        return watched(sampling, carry, step, rows, why, cost)

    def move() -> _Decided:
        if guidance is None or guidance.low is None:
            return decide(copies, cost)
        return jax.lax.cond(guided, lambda: decide(copies, cost), lambda: decide(1, cost / 2))

    def stand() -> _Decided:
        assert carry.kept is not None
        assert carry.watch is not None
        nothing = jnp.zeros_like(cost)
        return _Decided(
            v=jnp.zeros_like(carry.v),
            kept=carry.kept,
            watch=carry.watch,
            reuses=jnp.asarray(False),
            change=nothing,
            cost=nothing,
        )

    still = jnp.asarray(False)
    if guidance is not None and guidance.zero_steps is not None:
        still = guidance.stands_still(carry.step)
        decided = jax.lax.cond(still, stand, move)
    else:
        decided = move()
    kind = jnp.where(guided, jnp.where(decided.reuses, REUSE, FULL), jnp.where(decided.reuses, REUSE_ONE, ONE))
    reached = jnp.where(decided.reuses, BELOW, CHANGED)
    return Evaluation(
        v=decided.v,
        kind=jnp.where(still, STILL, kind),
        fresh=~decided.reuses & ~still,
        cost=decided.cost,
        kept=decided.kept,
        watch=decided.watch,
        change=jnp.where(continues & ~still, decided.change, jnp.nan),
        why=jnp.where(still, NO_RULE, jnp.where(why == NO_RULE, reached, why)),
    )


def _why_not(sampling: Sampling, carry: Carry, *, continues: Array, joins: Array) -> Int[Array, ""]:
    """Returns why a step must evaluate, `NO_RULE` where it need not."""
    assert sampling.reuse is not None
    protected = sampling.reuse.protects(carry.step, jnp.asarray(sampling.schedule.num_steps))
    if sampling.leap is not None and sampling.leap.mode == "static":
        protected |= jnp.any(carry.step == jnp.asarray(sampling.leap.index))  # the leap is the last step of its sample
    return jnp.where(protected, PROTECTED, jnp.where(~continues, RESTARTED, jnp.where(joins, JOINS, NO_RULE)))


def _by_input(sampling: Sampling, carry: Carry, step: Step, rows: int, why: Array, cost: Array) -> _Decided:
    """Decides by what the first block would see; a reused step runs no block."""
    assert sampling.reuse is not None
    assert carry.kept is not None
    assert carry.watch is not None
    values, kept = step.at.modulated_input(), carry.kept
    reuses, change, watch = sampling.reuse.decide(carry.watch, values, carry.done_B, must_evaluate=why != NO_RULE)

    def reuse() -> tuple[Array, Kept]:
        return step.at.reuse(rows, residual_at(kept, len(step.at.z) * rows, step.at.t)), kept

    def evaluate() -> tuple[Array, Kept]:
        v, residual = step.at.evaluate_keeping(rows)
        return v, updated(kept, residual, step.at.t, continues=step.continues)

    v, kept = jax.lax.cond(reuses, reuse, evaluate)
    return _Decided(v=step.combined(v), kept=kept, watch=watch, reuses=reuses, change=change, cost=jnp.where(reuses, 0.0, cost))


def _by_first_block(sampling: Sampling, carry: Carry, step: Step, rows: int, why: Array, cost: Array) -> _Decided:
    """Decides by what the first block adds, of the rows that are evaluated; a reused step runs that block alone."""
    assert sampling.reuse is not None
    assert carry.kept is not None
    assert carry.watch is not None
    tokens, added = step.at.first_block(rows)
    before, kept = carry.watch.values, carry.kept
    watch = dataclasses.replace(carry.watch, values=before[: len(added)])
    reuses, change, watch = sampling.reuse.decide(watch, added, carry.done_B, must_evaluate=why != NO_RULE)
    watch = dataclasses.replace(watch, values=jnp.concatenate([watch.values, before[len(added) :]]))

    def reuse() -> tuple[Array, Kept]:
        return step.at.reuse(rows, added + residual_at(kept, len(added), step.at.t)), kept

    def evaluate() -> tuple[Array, Kept]:
        v, residual = step.at.rest(rows, tokens)
        return v, updated(kept, residual, step.at.t, continues=step.continues)

    v, kept = jax.lax.cond(reuses, reuse, evaluate)
    paid = jnp.where(reuses, cost * step.at.first_block_share(), cost)
    return _Decided(v=step.combined(v), kept=kept, watch=watch, reuses=reuses, change=change, cost=paid)
