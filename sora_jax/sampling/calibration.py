"""Calibration: measure on one full sampling what reuse would cost at each step, and choose plans by it.

Invariant: a plan from a calibration evaluates exactly the number of steps asked for, and in full wherever reuse is not
allowed (the first step, the end of merging, frames that join).  It minimises the measured sum of errors and nothing else: a
study has to judge how the clips look.

Source: LeMiCa (arXiv 2511.00090), a shortest path over measured errors; here the sum of errors, not the largest.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Unpack

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from sora_jax.sampling import joining
from sora_jax.sampling.arguments import whole
from sora_jax.sampling.evaluation import reused_velocity
from sora_jax.sampling.guidance import Guidance
from sora_jax.sampling.options import Options, Sampling, num_steps_of
from sora_jax.sampling.reuse import REUSE, Keep, Plan
from sora_jax.sampling.sampler import Sampler
from sora_jax.sampling.schedule import Schedule
from sora_jax.sampling.state import Carry, Kept
from sora_jax.sampling.velocity import Point, Velocity, opened


@dataclasses.dataclass(frozen=True, kw_only=True)
class Calibration:
    """What reuse costs.

    Attributes:
      error_NN: ``error_NN[i, j]`` is the root-mean-square shift of the latents that step j would suffer, in that step alone,
        from what step i kept; infinite where j may not reuse it.
      keep: what was kept.
    """

    error_NN: np.ndarray
    keep: Keep

    def plan(self, evaluations: int) -> Plan:
        """Returns the plan of ``evaluations`` full steps with the smallest sum of errors.

        Raises:
          ValueError: more evaluations than steps, or fewer than the steps that must be evaluated.
        """
        evaluations = whole("evaluations", evaluations, least=1)
        segment = self._segments()
        num_steps = len(self.error_NN)
        best = np.full((evaluations + 1, num_steps + 1), np.inf)
        came_from = np.zeros((evaluations + 1, num_steps + 1), np.int64)
        best[0, 0] = 0.0
        for used in range(1, evaluations + 1):
            totals = best[used - 1, :num_steps, None] + segment
            came_from[used], best[used] = totals.argmin(axis=0), totals.min(axis=0)
        if not np.isfinite(best[evaluations, num_steps]):
            counts = [used for used in range(1, num_steps + 1) if self._feasible(used)]
            raise ValueError(f"no plan has {evaluations} evaluations; expected {counts[0]} to {counts[-1]}.")
        steps, at = [], num_steps
        for used in range(evaluations, 0, -1):
            at = int(came_from[used, at])
            steps.append(at)
        return Plan.evaluate_at(steps, num_steps, keep=self.keep)

    def error(self, plan: Plan) -> float:
        """Returns the sum of the errors of the plan's reused steps; a half step counts as evaluated.

        Raises:
          ValueError: the plan is for another number of steps.
        """
        if len(plan.codes) != len(self.error_NN):
            raise ValueError(f"plan has {len(plan.codes)} steps; expected the {len(self.error_NN)} of the calibration.")
        total, source = 0.0, 0
        for step, code in enumerate(plan.codes):
            source = step if code != REUSE else source
            total += float(self.error_NN[source, step]) if code == REUSE else 0.0
        return total

    def _segments(self) -> np.ndarray:
        """Returns [N, N + 1]: the error of all steps after i and before j, were i and j evaluated and none between."""
        num_steps = len(self.error_NN)
        segment = np.full((num_steps, num_steps + 1), np.inf)
        for i in range(num_steps):
            segment[i, i + 1 :] = np.append(0.0, np.cumsum(self.error_NN[i, i + 1 :]))
        return segment

    def _feasible(self, evaluations: int) -> bool:
        """Returns whether a plan may have that many evaluations: all steps, or enough for every step that must be evaluated."""
        barred = ~np.isfinite(self.error_NN[np.arange(len(self.error_NN) - 1), np.arange(1, len(self.error_NN))])
        return 1 + int(barred.sum()) <= evaluations <= len(self.error_NN)


def calibrate(
    velocity: Velocity,
    z: Float[Array, "B ..."],
    schedule: Schedule,
    *,
    keep: Keep = "residual",
    callback: Callable[[Carry], Any] | None = None,
    **options: Unpack[Options],
) -> Calibration:
    """Returns the errors of reuse along the full sampling of a batch.

    Costs one full sampling, the memory of one residual for each step, and with ``keep="residual"`` half the square of the
    number of steps in reused velocities, each an embedding and a final layer.

    Args:
      velocity: as in `sampler.sample`.
      z: latents [B, ...], noise at the schedule's first time.
      schedule: the times to visit.
      keep: what a reused step takes over, see `reuse.Plan`.
      callback: called on the host after every step with the carry.
      **options: see `options.Options`; without a plan, which is what a calibration is for, and without a leap.

    Raises:
      TypeError: there is no such option.
      ValueError: as `sampler.sample`, and for a plan or a leap.
    """
    if any(options.get(name) is not None for name in ("plan", "reuse", "leap")):
        raise ValueError("calibrate measures every step of a full sampling; leave plan, reuse and leap out.")
    if isinstance(guidance := options.get("guidance"), Guidance) and guidance.zero_steps:
        raise ValueError("calibrate measures what each step evaluates, but zero_steps stand still; leave them out.")
    num_steps = num_steps_of(schedule) if isinstance(schedule, Schedule) else 1
    options["plan"] = Plan.evaluate_at(range(num_steps), num_steps, keep=keep)
    sampler = Sampler.create(velocity, schedule, **options)
    carries = []
    for carry in sampler.steps(z):
        carries.append(carry)
        if callback is not None:
            callback(carry)
    sizes = -np.diff(np.append(schedule.visited, 0.0)) / schedule.num_timesteps
    error_NN = np.full((num_steps, num_steps), np.inf)
    starts = _must_evaluate(sampler.sampling, num_steps)
    for i in range(num_steps):
        for j in range(i + 1, num_steps):
            if j in starts:
                break
            error_NN[i, j] = sizes[j] * float(_error(sampler, carries[i], carries[j]))
    return Calibration(error_NN=error_NN, keep=keep)


def _must_evaluate(sampling: Sampling, num_steps: int) -> set[int]:
    starts = {0} if sampling.merge_steps is None else {0, int(sampling.merge_steps)}
    starts |= set((np.flatnonzero(np.diff(_guided_steps(sampling))) + 1).tolist())
    if sampling.weight_BT is not None:
        times, scale = sampling.schedule.visited, sampling.schedule.num_timesteps
        starts |= set(np.flatnonzero(joining.joining_steps(np.asarray(sampling.weight_BT), times, scale)).tolist())
    return starts & set(range(num_steps))


def _guided_steps(sampling: Sampling) -> np.ndarray:
    """Returns for each step whether the guidance's interval holds its time."""
    times = jnp.asarray(sampling.schedule.visited) / sampling.schedule.num_timesteps
    return np.ones(len(times), bool) if sampling.guidance is None else np.asarray(sampling.guidance.applies(times))


def _error(sampler: Sampler, source: Carry, target: Carry) -> Array:
    plan = sampler.sampling.plan
    if plan is not None and plan.keep == "velocity":
        return _distance(source.v, target.v)
    guided = bool(_guided_steps(sampler.sampling)[int(target.step) - 1])
    return _reuse_error(sampler, source.kept, target, guided=guided)


@functools.partial(jax.jit, static_argnames="guided")
def _reuse_error(sampler: Sampler, kept: Kept, target: Carry, *, guided: bool) -> Array:
    t = jnp.asarray(sampler.sampling.schedule.times)[target.step - 1]
    velocity = opened(sampler.velocity)
    at = Point(velocity=velocity, z=target.z_in, t=t, active_BT=target.active_BT, merged=False)
    return _distance(reused_velocity(sampler.sampling, kept, at, guided=guided), target.v)


def _distance(v: Array, truth: Array) -> Array:
    return jnp.sqrt(jnp.mean((v - truth) ** 2))
