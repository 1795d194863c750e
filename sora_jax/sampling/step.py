"""One step of a sampling: join frames, evaluate, decide the leap, move, record.

Invariant: a sample that is done and a frame that is not active keep their bits, and history (reused values, multistep
solvers, cosines) never crosses the step in which merging ends or, for its frame, the step in which a frame joins.  The leap
comes last: it moves along whatever velocity the step has.
"""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float

from sora_jax.sampling import joining, noise
from sora_jax.sampling.evaluation import Evaluation, Step, empty_kept, empty_watch, evaluate
from sora_jax.sampling.joining import expand
from sora_jax.sampling.leap import LeapState, latent_cosine, released_cosine
from sora_jax.sampling.moving import first_history, move
from sora_jax.sampling.options import Sampling
from sora_jax.sampling.reuse import STILL
from sora_jax.sampling.state import Carry, Trace
from sora_jax.sampling.velocity import Point, VideoVelocity
from sora_jax.sampling.watched import evaluate_watched


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Frames:
    """Latents to evaluate [B, T, ...], frames sampled in this step, and those of them that were not before."""

    z_in: Array
    active_BT: Array | None
    joining_BT: Array | None


def first_carry(sampling: Sampling, velocity: VideoVelocity, z: Float[Array, "B ..."], *, recorded: bool) -> Carry:
    """Returns the carry before the first step; unless ``recorded``, its trace has no rows."""
    batch = z.shape[0]
    active_BT = None if sampling.weight_BT is None else joining.begin(jnp.asarray(sampling.weight_BT))
    at = Point(velocity=velocity, z=z, t=jnp.zeros(()), active_BT=active_BT, merged=False)
    return Carry(
        step=jnp.asarray(0, jnp.int32),
        z=z,
        done_B=jnp.zeros(batch, bool),
        z_in=jnp.zeros_like(z),
        v=jnp.zeros_like(z),
        fresh=jnp.asarray(False),
        active_BT=active_BT,
        leap=None if sampling.leap is None else sampling.leap.start(batch),
        kept=empty_kept(sampling, at),
        watch=empty_watch(sampling, at),
        history=first_history(sampling, z, active_BT),
        evaluations_B=jnp.zeros(batch, jnp.float32),
        batch_evaluations=jnp.asarray(0, jnp.float32),
        trace=_empty_trace(sampling, len(sampling.schedule.times) - 1 if recorded else 0, batch),
    )


def take_step(sampling: Sampling, velocity: VideoVelocity, carry: Carry, *, merged: bool) -> Carry:
    """Returns the carry after one step; ``merged`` is static."""
    schedule, step = sampling.schedule, carry.step
    t = jnp.asarray(schedule.times)[step]
    restart, guided = _phase(sampling, step)
    continues = (step > 0) & ~restart

    now = _join_frames(sampling, carry, t)
    at = Point(velocity=velocity, z=now.z_in, t=t, active_BT=now.active_BT, merged=merged)
    evaluation = _evaluated(sampling, carry, at, now, continues=continues, guided=guided)
    comparable = continues & evaluation.fresh & carry.fresh
    cosine_B = _cosine(sampling, carry, evaluation.v, now.active_BT, comparable)
    leap, leaps_B = _decide_leap(sampling, carry, cosine_B, now, comparable, restart)
    has_history = continues & _at_own_times(sampling, carry, evaluation)
    still = None if sampling.guidance is None or sampling.guidance.zero_steps is None else evaluation.kind == STILL
    if still is not None:
        has_history &= ~still
    moved = move(
        sampling,
        carry,
        at,
        evaluation.v,
        leaps_B=leaps_B,
        has_history=has_history,
        joining_BT=now.joining_BT,
        guided=guided,
    )
    z = moved.z if now.active_BT is None else jnp.where(expand(now.active_BT, moved.z), moved.z, carry.z)

    cost = evaluation.cost + moved.cost
    cost_B = evaluation.cost + jnp.where(leaps_B, 0, moved.cost)
    last = step + 1 >= schedule.num_steps
    return dataclasses.replace(
        carry,
        step=step + 1,
        z=jnp.where(expand(carry.done_B, z), carry.z, z),
        done_B=carry.done_B | leaps_B | last,
        z_in=now.z_in,
        v=evaluation.v,
        fresh=evaluation.fresh,
        active_BT=now.active_BT,
        leap=leap,
        kept=evaluation.kept,
        watch=evaluation.watch,
        history=moved.history,
        evaluations_B=carry.evaluations_B + jnp.where(carry.done_B, 0, cost_B),
        batch_evaluations=carry.batch_evaluations + cost,
        trace=_record(
            carry, t, cost, cosine_B, evaluation, leapt_B=leaps_B & ~carry.done_B & ~last, still=still, merged=merged
        ),
    )


def _phase(sampling: Sampling, step: Array) -> tuple[Array, Array]:
    """Returns whether merging or guidance differ from those of the step before, and whether this step is guided."""
    restart = jnp.asarray(False) if sampling.merge_steps is None else step == sampling.merge_steps
    if sampling.guidance is None or not sampling.guidance.varies:
        return restart, jnp.asarray(True)
    times = jnp.asarray(sampling.schedule.times) / sampling.schedule.num_timesteps
    restart |= sampling.guidance.restarts(step, times[step], times[step - 1])
    return restart, sampling.guidance.applies(times[step])


def _empty_trace(sampling: Sampling, capacity: int, batch: int) -> Trace:
    """Returns a trace without rows; kinds that follow from the rest, and reasons that nobody has, are not recorded."""
    varies = sampling.reuse is not None or (sampling.guidance is not None and sampling.guidance.varies)
    return Trace(
        time_N=jnp.zeros(capacity, jnp.float32),
        evaluations_N=jnp.zeros(capacity, jnp.float32),
        cosine_NB=jnp.zeros((capacity, batch), jnp.float32),
        kind_N=jnp.zeros(capacity, jnp.int32) if varies else None,
        change_N=None if sampling.reuse is None else jnp.zeros(capacity, jnp.float32),
        why_N=None if sampling.reuse is None else jnp.zeros(capacity, jnp.int32),
        reused_N=jnp.zeros(capacity, bool),
        merged_N=jnp.zeros(capacity, bool),
        leapt_NB=jnp.zeros((capacity, batch), bool),
    )


def _join_frames(sampling: Sampling, carry: Carry, t: Array) -> _Frames:
    if sampling.weight_BT is None or carry.active_BT is None:
        return _Frames(z_in=carry.z, active_BT=None, joining_BT=None)
    num_timesteps = sampling.schedule.num_timesteps
    active_BT = joining.active_frames(jnp.asarray(sampling.weight_BT), t, num_timesteps)
    joining_BT = active_BT & ~carry.active_BT

    def draw() -> Array:
        if sampling.noise_NBX is not None:
            return jnp.asarray(sampling.noise_NBX)[carry.step]
        return noise.draw(jnp.asarray(sampling.seed), carry.z.shape, carry.step.astype(jnp.uint32) + 1, carry.z.dtype)

    z_in = joining.join(carry.z, joining_BT, t / num_timesteps, draw)
    return _Frames(z_in=z_in, active_BT=active_BT, joining_BT=joining_BT)


def _evaluated(sampling: Sampling, carry: Carry, at: Point, now: _Frames, *, continues: Array, guided: Array) -> Evaluation:
    """Returns the step's guided velocity, by its plan, or by what has changed."""
    step = Step(sampling=sampling, at=at, v_before=carry.v, continues=continues)
    if sampling.reuse is None:
        return evaluate(sampling, carry, step, continues=continues, guided=guided)
    joins = jnp.asarray(False) if now.joining_BT is None else jnp.any(now.joining_BT)
    return evaluate_watched(sampling, carry, step, continues=continues, guided=guided, joins=joins)


def _cosine(sampling: Sampling, carry: Carry, v: Array, active_BT: Array | None, comparable: Array) -> Array:
    """Returns the cosine with the velocity before, NaN where there is none or it is not used."""
    if not len(carry.trace.time_N):
        return jnp.full(len(v), jnp.nan, jnp.float32)
    if sampling.leap is not None and sampling.leap.mode == "released":
        return jnp.where(carry.step > 0, released_cosine(v, carry.v), jnp.nan)
    return jnp.where(comparable, latent_cosine(v, carry.v, active_BT), jnp.nan)


def _decide_leap(
    sampling: Sampling, carry: Carry, cosine_B: Array, now: _Frames, comparable: Array, restart: Array
) -> tuple[LeapState | None, Array]:
    """Returns the leap rule's state and which samples leap in this step."""
    if sampling.leap is None or carry.leap is None:
        return None, jnp.zeros(cosine_B.shape, bool)
    comparable_B = may_leap_B = jnp.ones(cosine_B.shape, bool)
    if now.active_BT is not None and now.joining_BT is not None:
        may_leap_B = joining.all_joined(jnp.asarray(sampling.weight_BT), now.active_BT)
        comparable_B = ~jnp.any(now.joining_BT, axis=1)
    return sampling.leap.decide(
        carry.leap,
        cosine_B,
        step=carry.step,
        comparable_B=comparable_B & comparable,
        may_leap_B=may_leap_B,
        restart=restart,
    )


def _at_own_times(sampling: Sampling, carry: Carry, evaluation: Evaluation) -> Array:
    """Returns whether this velocity and the one before belong to the times of their steps; a held velocity does not."""
    if sampling.plan is None or sampling.plan.keep == "residual":
        return jnp.asarray(True)
    return evaluation.fresh & carry.fresh


def _record(
    carry: Carry,
    t: Array,
    cost: Array,
    cosine_B: Array,
    evaluation: Evaluation,
    *,
    leapt_B: Array,
    still: Array | None,
    merged: bool,
) -> Trace:
    trace, step = carry.trace, carry.step
    if not len(trace.time_N):
        return trace
    return Trace(
        time_N=trace.time_N.at[step].set(t),
        evaluations_N=trace.evaluations_N.at[step].set(cost),
        cosine_NB=trace.cosine_NB.at[step].set(cosine_B),
        kind_N=None if trace.kind_N is None else trace.kind_N.at[step].set(evaluation.kind),
        change_N=None if trace.change_N is None else trace.change_N.at[step].set(evaluation.change),
        why_N=None if trace.why_N is None else trace.why_N.at[step].set(evaluation.why),
        reused_N=trace.reused_N.at[step].set(~evaluation.fresh if still is None else ~evaluation.fresh & ~still),
        merged_N=trace.merged_N.at[step].set(merged),
        leapt_NB=trace.leapt_NB.at[step].set(leapt_B),
    )
