"""The compiled sampler: from noise to latents in one program that the host may interrupt after any step.

A `Sampler` holds what stays the same during a sampling, a `Carry` what changes.  ``sampler.run(carry, until)`` is the only
jitted program: two while loops over one step function, the first with merged temporal tokens, the second without.

Invariant: cutting a sampling into several ``run`` calls changes no bit, and only what `Sampler` lists as static compiles
anew.  The sampler knows numbers and a velocity, no model.

    velocity_fn(z, t_B)                    latents [B, ...] and times [B] (num_timesteps is noise, 0 is data) -> velocity like z
    velocity_fn(z, t_B, frame_mask_BT=a)   passed with frame weights: bool, True where a frame is sampled (else its time is 0)
    velocity_fn(z, t_B, merge=m)           passed with merge_steps: a Python bool, True in the merged phase

With guidance it is called on a doubled batch, rows [conditional, unconditional].  A `jax.tree_util.Partial` (or any other
callable pytree) keeps its arrays as runtime inputs; a plain function is static, so make it once and reuse it.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Self, no_type_check

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Array, Bool, Float, Int

from sora_jax import frames, noise, solvers
from sora_jax.frames import expand
from sora_jax.leap import Leap, LeapRule, LeapState, latent_cosine, released_cosine
from sora_jax.schedule import Schedule

# Trace and Carry are exempt from run-time type checks (no_type_check): their trees also hold shapes, paths and the like.
VelocityFn = Callable[..., Array]
Scalar = np.ndarray | jax.Array


@jax.tree_util.register_dataclass
@no_type_check
@dataclasses.dataclass(frozen=True, kw_only=True)
class Trace:
    """What each step did; rows from the number of steps taken on are zero.

    Attributes:
      time_N: the step's time.
      evaluations_N: velocity evaluations the step cost.
      cosine_NB: cosine of this velocity and the one before; NaN where the two cannot be compared.
      reused_N: whether the velocity came from a reused residual.
      merged_N: whether temporal tokens were merged.
      leapt_NB: whether the sample leapt to the end in this step.
    """

    time_N: Float[Array, "N"]
    evaluations_N: Float[Array, "N"]
    cosine_NB: Float[Array, "N B"]
    reused_N: Bool[Array, "N"]
    merged_N: Bool[Array, "N"]
    leapt_NB: Bool[Array, "N B"]


@jax.tree_util.register_dataclass
@no_type_check
@dataclasses.dataclass(frozen=True, kw_only=True)
class Carry:
    """The state between two steps.

    Attributes:
      step: index of the next step.
      z: latents [B, ...].
      done_B: samples that reached the end; their latents no longer change.
      z_in: latents the last step evaluated (after joining frames got their noise), the history of multistep solvers.
      v: velocity of the last step, after guidance.
      fresh: whether ``v`` was evaluated, not reused.
      active_BT: frames that the last step sampled; None without frame weights.
      leap: state of the leap rule; None without a leap.
      evaluations_B: velocity evaluations that went into each sample.
      batch_evaluations: velocity evaluations computed so far, for whatever sample.
      trace: record of every step.
    """

    step: Int[Array, ""]
    z: Float[Array, "B ..."]
    done_B: Bool[Array, "B"]
    z_in: Float[Array, "B ..."]
    v: Float[Array, "B ..."]
    fresh: Bool[Array, ""]
    active_BT: Bool[Array, "B T"] | None
    leap: LeapState | None
    evaluations_B: Float[Array, "B"]
    batch_evaluations: Float[Array, ""]
    trace: Trace


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """A finished sampling.

    Attributes:
      z: latents [B, ...].
      evaluations_B: velocity evaluations that went into each sample.
      batch_evaluations: velocity evaluations computed for the batch: the figure that time depends on.
      trace: record of every step, on the host, cut to the steps taken.
    """

    z: Float[Array, "B ..."]
    evaluations_B: np.ndarray
    batch_evaluations: float
    trace: Trace


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampler:
    """What a sampling needs besides its latents; make one with `create`, which checks the combination.

    Runtime inputs: the arrays of ``velocity_fn``, all values below.  Static: shapes and dtypes, ``solver``, the mode of the
    leap, which of the optional inputs are None, the callable inside ``velocity_fn``, and ``schedule.num_timesteps``.

    Attributes:
      velocity_fn: see the module.
      schedule: times and number of steps.
      guidance: scale of classifier-free guidance; None evaluates without it, on the batch itself.
      merge_steps: steps below this index merge temporal tokens; None never passes ``merge``.
      weight_BT: frame weights in [0, 1] of masked sampling (see `frames`).
      seed: of the noise that joining frames get.
      noise_NBX: recorded noise for joining frames, one per step, in place of the seed's.
      leap: when to leap.
      solver: one of `solvers.SOLVERS`.
    """

    velocity_fn: Partial
    schedule: Schedule
    guidance: Scalar | None
    merge_steps: Scalar | None
    weight_BT: Array | np.ndarray | None
    seed: Scalar
    noise_NBX: Array | np.ndarray | None
    leap: LeapRule | None
    solver: solvers.Solver = dataclasses.field(metadata={"static": True})

    @classmethod
    def create(
        cls,
        velocity_fn: VelocityFn,
        schedule: Schedule,
        *,
        guidance: float | None = None,
        solver: solvers.Solver = "euler",
        leap: Leap | None = None,
        merge_steps: int | None = None,
        frame_weights: Array | np.ndarray | None = None,
        seed: int = 0,
        noise_per_step: Array | np.ndarray | None = None,
    ) -> Self:
        """Returns a sampler.

        Raises:
          ValueError: a value is out of range or a combination is illegal; the message names it.
        """
        num_steps = int(schedule.num_steps)
        solvers.check_solver(solver)
        _check_merge_steps(merge_steps)
        weight_BT = None if frame_weights is None else _checked_weights(frame_weights)
        if noise_per_step is not None and len(noise_per_step) < num_steps:
            raise ValueError(f"noise_per_step has {len(noise_per_step)} entries; expected one for each of {num_steps} steps.")
        if leap is not None and leap.mode == "static" and weight_BT is not None:
            _check_static_leap(leap.index, weight_BT, schedule)
        return cls(
            velocity_fn=as_partial(velocity_fn),
            schedule=schedule,
            guidance=None if guidance is None else np.asarray(guidance, np.float32),
            merge_steps=None if merge_steps is None else np.asarray(merge_steps, np.int32),
            weight_BT=weight_BT,
            seed=noise.as_seed(seed),
            noise_NBX=noise_per_step,
            leap=None if leap is None else leap.rule(num_steps),
            solver=solver,
        )

    def start(self, z: Float[Array, "B ..."]) -> Carry:
        """Returns the carry before the first step.

        Raises:
          ValueError: the latents do not fit the frame weights, the recorded noise or the leap rule.
        """
        self._check_latents(z.shape)
        z = jnp.asarray(z)
        batch, capacity = z.shape[0], len(self.schedule.times) - 1
        return Carry(
            step=jnp.asarray(0, jnp.int32),
            z=z,
            done_B=jnp.zeros(batch, bool),
            z_in=jnp.zeros_like(z),
            v=jnp.zeros_like(z),
            fresh=jnp.asarray(False),
            active_BT=None if self.weight_BT is None else frames.begin(jnp.asarray(self.weight_BT)),
            leap=None if self.leap is None else self.leap.start(batch),
            evaluations_B=jnp.zeros(batch, jnp.float32),
            batch_evaluations=jnp.asarray(0, jnp.float32),
            trace=Trace(
                time_N=jnp.zeros(capacity, jnp.float32),
                evaluations_N=jnp.zeros(capacity, jnp.float32),
                cosine_NB=jnp.zeros((capacity, batch), jnp.float32),
                reused_N=jnp.zeros(capacity, bool),
                merged_N=jnp.zeros(capacity, bool),
                leapt_NB=jnp.zeros((capacity, batch), bool),
            ),
        )

    def run(self, carry: Carry, until: int | Int[Array, ""]) -> Carry:
        """Returns the carry after steps ``carry.step`` to ``until - 1``, or earlier once every sample is done."""
        return _run(self, carry, jnp.asarray(until, jnp.int32))

    def _check_latents(self, shape: tuple[int, ...]) -> None:
        weight_shape = None if self.weight_BT is None else tuple(self.weight_BT.shape)
        if weight_shape is not None and weight_shape != tuple(shape[:2]):
            raise ValueError(f"frame_weights have shape {weight_shape}; expected {tuple(shape[:2])}, batch and latent frames.")
        noise_shape = None if self.noise_NBX is None else tuple(self.noise_NBX.shape[1:])
        if noise_shape is not None and noise_shape != tuple(shape):
            raise ValueError(f"noise_per_step has shape {noise_shape} after the step axis; the latents have {tuple(shape)}.")
        if self.leap is not None and self.leap.mode == "released" and len(shape) != 5:
            raise ValueError(
                f"leap 'released' reads rows of video latents [B, T, H, W, C]; got latents of shape {tuple(shape)}."
            )


def sample(
    velocity_fn: VelocityFn,
    z: Float[Array, "B ..."],
    schedule: Schedule,
    *,
    guidance: float | None = None,
    solver: solvers.Solver = "euler",
    leap: Leap | None = None,
    merge_steps: int | None = None,
    frame_weights: Array | np.ndarray | None = None,
    seed: int = 0,
    noise_per_step: Array | np.ndarray | None = None,
    callback: Callable[[Carry], Any] | None = None,
) -> Result:
    """Returns the latents at the end of the flow that starts at ``z``, and what it took.

    Any velocity that JAX can trace will do: see the module for its arguments, `Sampler` for what is static.  ``callback`` is
    called on the host after every step with the carry; the result has the same bits with and without it.

    Raises:
      ValueError: see `Sampler.create` and `Sampler.start`.
    """
    sampler = Sampler.create(
        velocity_fn,
        schedule,
        guidance=guidance,
        solver=solver,
        leap=leap,
        merge_steps=merge_steps,
        frame_weights=frame_weights,
        seed=seed,
        noise_per_step=noise_per_step,
    )
    carry, num_steps = sampler.start(z), int(schedule.num_steps)
    if callback is None:
        return finish(sampler.run(carry, num_steps))
    for step in range(num_steps):
        carry = sampler.run(carry, step + 1)
        callback(carry)
        if bool(jnp.all(carry.done_B)):
            break
    return finish(carry)


def finish(carry: Carry) -> Result:
    """Returns the result that a carry holds."""
    taken = int(carry.step)
    return Result(
        z=carry.z,
        evaluations_B=np.asarray(carry.evaluations_B),
        batch_evaluations=float(carry.batch_evaluations),
        trace=jax.tree.map(lambda rows: np.asarray(rows)[:taken], carry.trace),
    )


def as_partial(velocity_fn: VelocityFn) -> Partial:
    """Returns the velocity as a pytree whose arrays are runtime inputs."""
    if isinstance(velocity_fn, Partial):
        return velocity_fn
    is_leaf = jax.tree.leaves(velocity_fn) == [velocity_fn]
    return Partial(velocity_fn) if is_leaf else Partial(_call, velocity_fn)


def _call(velocity_fn: VelocityFn, *args: Any, **keywords: Any) -> Array:
    return velocity_fn(*args, **keywords)


def _run_steps(sampler: Sampler, carry: Carry, until: Array) -> Carry:
    until = jnp.minimum(until, sampler.schedule.num_steps)
    if sampler.merge_steps is not None:
        carry = _loop(sampler, carry, jnp.minimum(until, sampler.merge_steps), merged=True)
    return _loop(sampler, carry, until, merged=False)


_run = jax.jit(_run_steps)


def _loop(sampler: Sampler, carry: Carry, until: Array, *, merged: bool) -> Carry:
    return jax.lax.while_loop(
        lambda carry: (carry.step < until) & ~jnp.all(carry.done_B),
        lambda carry: _step(sampler, carry, merged=merged),
        carry,
    )


def _step(sampler: Sampler, carry: Carry, *, merged: bool) -> Carry:
    """Returns the carry after one step: join frames, evaluate, decide the leap, move, record."""
    schedule, step = sampler.schedule, carry.step
    t = jnp.asarray(schedule.times)[step]
    restart = jnp.asarray(False) if sampler.merge_steps is None else step == sampler.merge_steps
    continues = (step > 0) & ~restart

    z_in, active_BT, joining_BT = _join_frames(sampler, carry, t)
    v = _guided_velocity(sampler, z_in, t, active_BT, merged=merged)
    fresh = jnp.asarray(True)

    cosine_B = _cosine(sampler, carry, v, active_BT, comparable=continues & fresh & carry.fresh)
    leap, leaps_B = _decide_leap(sampler, carry, cosine_B, active_BT, joining_BT, continues & fresh & carry.fresh, restart)
    moved = _move(sampler, carry, z_in, v, leaps_B, joining_BT, continues)
    if active_BT is not None:
        moved = jnp.where(expand(active_BT, moved), moved, carry.z)
    cost = jnp.asarray(1, jnp.float32)
    return dataclasses.replace(
        carry,
        step=step + 1,
        z=jnp.where(expand(carry.done_B, moved), carry.z, moved),
        done_B=carry.done_B | leaps_B | (step + 1 >= schedule.num_steps),
        z_in=z_in,
        v=v,
        fresh=fresh,
        active_BT=active_BT,
        leap=leap,
        evaluations_B=carry.evaluations_B + jnp.where(carry.done_B, 0, cost),
        batch_evaluations=carry.batch_evaluations + cost,
        trace=Trace(
            time_N=carry.trace.time_N.at[step].set(t),
            evaluations_N=carry.trace.evaluations_N.at[step].set(cost),
            cosine_NB=carry.trace.cosine_NB.at[step].set(cosine_B),
            reused_N=carry.trace.reused_N.at[step].set(~fresh),
            merged_N=carry.trace.merged_N.at[step].set(merged),
            leapt_NB=carry.trace.leapt_NB.at[step].set(leaps_B & ~carry.done_B & (step + 1 < schedule.num_steps)),
        ),
    )


def _join_frames(sampler: Sampler, carry: Carry, t: Array) -> tuple[Array, Array | None, Array | None]:
    """Returns the latents to evaluate, the active frames and those of them that join in this step."""
    if sampler.weight_BT is None or carry.active_BT is None:
        return carry.z, None, None
    num_timesteps = sampler.schedule.num_timesteps
    active_BT = frames.active_frames(jnp.asarray(sampler.weight_BT), t, num_timesteps)
    joining_BT = active_BT & ~carry.active_BT

    def draw() -> Array:
        if sampler.noise_NBX is not None:
            return jnp.asarray(sampler.noise_NBX)[carry.step]
        return noise.draw(jnp.asarray(sampler.seed), carry.z.shape, carry.step.astype(jnp.uint32) + 1, carry.z.dtype)

    return frames.join(carry.z, joining_BT, t / num_timesteps, draw), active_BT, joining_BT


def _guided_velocity(sampler: Sampler, z: Array, t: Array, active_BT: Array | None, *, merged: bool) -> Array:
    """Returns ``u + guidance (c - u)``, or the bare velocity without guidance."""
    copies = 1 if sampler.guidance is None else 2
    options: dict[str, Any] = {}
    if active_BT is not None:
        options["frame_mask_BT"] = jnp.tile(active_BT, (copies, 1))
    if sampler.merge_steps is not None:
        options["merge"] = merged
    rows = jnp.tile(z, (copies,) + (1,) * (z.ndim - 1))
    v = sampler.velocity_fn(rows, jnp.full(len(rows), t, jnp.float32), **options)
    if v.shape != rows.shape:
        raise ValueError(f"velocity_fn returned shape {v.shape} for latents of shape {rows.shape}; expected the same shape.")
    v = v.astype(z.dtype)
    if sampler.guidance is None:
        return v
    conditional, unconditional = jnp.split(v, 2)
    return unconditional + jnp.asarray(sampler.guidance, z.dtype) * (conditional - unconditional)


def _cosine(sampler: Sampler, carry: Carry, v: Array, active_BT: Array | None, *, comparable: Array) -> Array:
    if sampler.leap is not None and sampler.leap.mode == "released":
        return jnp.where(carry.step > 0, released_cosine(v, carry.v), jnp.nan)
    return jnp.where(comparable, latent_cosine(v, carry.v, active_BT), jnp.nan)


def _decide_leap(
    sampler: Sampler,
    carry: Carry,
    cosine_B: Array,
    active_BT: Array | None,
    joining_BT: Array | None,
    comparable: Array,
    restart: Array,
) -> tuple[LeapState | None, Array]:
    if sampler.leap is None or carry.leap is None:
        return None, jnp.zeros(cosine_B.shape, bool)
    comparable_B = may_leap_B = jnp.ones(cosine_B.shape, bool)
    if active_BT is not None and joining_BT is not None:
        may_leap_B = frames.all_joined(jnp.asarray(sampler.weight_BT), active_BT)
        comparable_B = ~jnp.any(joining_BT, axis=1)
    return sampler.leap.decide(
        carry.leap,
        cosine_B,
        step=carry.step,
        comparable_B=comparable_B & comparable,
        may_leap_B=may_leap_B,
        restart=restart,
    )


def _move(
    sampler: Sampler,
    carry: Carry,
    z_in: Array,
    v: Array,
    leaps_B: Array,
    joining_BT: Array | None,
    continues: Array,
) -> Array:
    """Returns the latents one step on, or at the end where a sample leaps."""
    times = jnp.asarray(sampler.schedule.times) / sampler.schedule.num_timesteps
    t_before, t, t_next = times[carry.step - 1], times[carry.step], times[carry.step + 1]
    leaps = expand(leaps_B, z_in)
    moved = z_in + v * jnp.where(leaps, t, t - t_next)
    correction = jnp.zeros_like(v)
    if sampler.solver == "ab2":
        correction = solvers.ab2_correction(v, carry.v, t_before=t_before, t=t, t_next=t_next)
    elif sampler.solver == "dpmpp":
        data, data_before = z_in + t * v, carry.z_in + t_before * carry.v
        correction = solvers.dpmpp_correction(data, data_before, t_before=t_before, t=t, t_next=t_next)
    if sampler.leap is not None:
        leap_correction = jnp.zeros_like(v)
        if sampler.leap.extrapolate:
            leap_correction = solvers.ab2_correction(v, carry.v, t_before=t_before, t=t, t_next=jnp.zeros_like(t))
        correction = jnp.where(leaps, leap_correction, correction)
    usable = continues if joining_BT is None else expand(continues & ~joining_BT, v)
    return moved + jnp.where(usable, correction, 0)


def _check_merge_steps(merge_steps: int | None) -> None:
    if merge_steps is not None and merge_steps < 0:
        raise ValueError(f"merge_steps is {merge_steps}; expected 0 or more (None compiles no merged phase).")


def _checked_weights(frame_weights: Array | np.ndarray) -> np.ndarray:
    weight_BT = np.asarray(frame_weights, np.float32)
    if weight_BT.ndim != 2 or not ((weight_BT >= 0) & (weight_BT <= 1)).all():
        raise ValueError(f"frame_weights must be [B, T] with values from 0 to 1; got shape {weight_BT.shape}.")
    return weight_BT


def _check_static_leap(index: int, weight_BT: np.ndarray, schedule: Schedule) -> None:
    smallest = frames.smallest_legal_leap(weight_BT, schedule.visited, schedule.num_timesteps)
    if index < smallest:
        raise ValueError(
            f"leap index {index} is before every frame with a weight above 0 is active; smallest legal index: {smallest}."
        )
