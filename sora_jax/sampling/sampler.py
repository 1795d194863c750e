"""The compiled sampler: from noise to latents in one program that the host may interrupt after any step.

``sampler.run(carry, until)`` is the only jitted program: two while loops over one step function, the first with merged
temporal tokens, the second without.

Invariant: cutting a sampling into several ``run`` calls changes no bit, and only what `Inputs` lists as static compiles
anew.  The sampler knows numbers and a velocity, no model.

    velocity_fn(z, t_B)                      latents [B, ...] and times [B] (num_timesteps is noise, 0 data) -> velocity like z
    velocity_fn(..., frame_mask_BT=a)        passed with frame weights: True where a frame is sampled (else its time is 0)
    velocity_fn(..., merge=m)                passed with merge_steps: a Python bool, True in the merged phase
    velocity_fn(..., keep_residual=True)     passed with a plan that keeps residuals -> velocity and residual [B, ...]
    velocity_fn(..., residual=r)             the same velocity with a kept residual in place of the costly part

With guidance it is called on a doubled batch, rows [conditional, unconditional]; in a half step of a plan on the
conditional rows alone.  A `jax.tree_util.Partial` or any other callable pytree keeps its arrays as runtime inputs; a plain
function is static, so make it once and reuse it.
"""

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any, Self, no_type_check

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Array, Float, Int

from sora_jax.sampling import joining, noise, reuse, solvers
from sora_jax.sampling.evaluation import empty_kept
from sora_jax.sampling.leap import Leap
from sora_jax.sampling.reuse import Plan
from sora_jax.sampling.schedule import Schedule
from sora_jax.sampling.state import Carry, Inputs, Trace
from sora_jax.sampling.step import take_step

__all__ = ["Carry", "Inputs", "Result", "Sampler", "Trace", "finish", "sample"]

VelocityFn = Callable[..., Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """A finished sampling.

    Attributes:
      z: latents [B, ...].
      evaluations_B: velocity evaluations that went into each sample.
      batch_evaluations: velocity evaluations computed for the batch: the figure that time depends on.
      trace: record of every step, cut to the steps taken.
    """

    z: Float[Array, "B ..."]
    evaluations_B: np.ndarray
    batch_evaluations: float
    trace: Trace


@jax.tree_util.register_dataclass
@no_type_check
@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampler(Inputs):
    """The inputs of a sampling, checked, and the program that runs on them; make one with `create`."""

    @classmethod
    def create(
        cls,
        velocity_fn: VelocityFn,
        schedule: Schedule,
        *,
        guidance: float | None = None,
        solver: str = "euler",
        leap: Leap | None = None,
        plan: Plan | None = None,
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
        weight_BT = None if frame_weights is None else _checked_weights(frame_weights)
        solvers.check_solver(solver)
        _check_merge_steps(merge_steps)
        _check_noise(noise_per_step, num_steps)
        _check_arguments(velocity_fn, weight_BT, merge_steps, plan)
        if leap is not None and weight_BT is not None:
            _check_leap_joins(leap, weight_BT, schedule)
        if plan is not None:
            _check_plan(plan, guidance, solver, leap, weight_BT, schedule)
        return cls(
            velocity_fn=as_partial(velocity_fn),
            schedule=schedule,
            guidance=None if guidance is None else np.asarray(guidance, np.float32),
            merge_steps=None if merge_steps is None else np.asarray(merge_steps, np.int32),
            weight_BT=weight_BT,
            seed=noise.as_seed(seed),
            noise_NBX=noise_per_step,
            leap=None if leap is None else leap.rule(num_steps),
            plan=None if plan is None else plan.rule(num_steps, len(schedule.times) - 1),
            solver=solver,
        )

    def start(self, z: Float[Array, "B ..."]) -> Carry:
        """Returns the carry before the first step.

        Raises:
          ValueError: the latents do not fit the frame weights, the recorded noise or the leap rule.
        """
        _check_latents(self, z.shape)
        return _start(self, jnp.asarray(z))

    def run(self, carry: Carry, until: int | Int[Array, ""]) -> Carry:
        """Returns the carry after steps ``carry.step`` to ``until - 1``, or earlier once every sample is done."""
        return _run(self, carry, jnp.asarray(until, jnp.int32))


def sample(
    velocity_fn: VelocityFn,
    z: Float[Array, "B ..."],
    schedule: Schedule,
    *,
    guidance: float | None = None,
    solver: str = "euler",
    leap: Leap | None = None,
    plan: Plan | None = None,
    merge_steps: int | None = None,
    frame_weights: Array | np.ndarray | None = None,
    seed: int = 0,
    noise_per_step: Array | np.ndarray | None = None,
    callback: Callable[[Carry], Any] | None = None,
) -> Result:
    """Returns the latents at the end of the flow that starts at ``z``, and what it took.

    Args:
      velocity_fn: any function JAX can trace, see the module for its arguments.
      z: latents [B, ...], noise at the schedule's first time.
      schedule: the times to visit.
      guidance: scale of classifier-free guidance; None calls the velocity on the batch itself.
      solver: "euler", "ab2" and "dpmpp" (second order, one evaluation a step) or "heun" (second order, two).
      leap: when to leap to the end; the last thing that is decided in a step.
      plan: which steps evaluate; not with "heun" or the released leap.
      merge_steps: steps below this index pass ``merge=True``.
      frame_weights: [B, T] in [0, 1] for latents [B, T, ...], see `frames`.
      seed: of the noise for frames that join late.
      noise_per_step: [steps, B, ...] in place of that noise.
      callback: called on the host after every step with the carry; the result has the same bits with and without it.

    Raises:
      ValueError: a value is out of range or a combination is illegal; the message names it.
    """
    sampler = Sampler.create(
        velocity_fn,
        schedule,
        guidance=guidance,
        solver=solver,
        leap=leap,
        plan=plan,
        merge_steps=merge_steps,
        frame_weights=frame_weights,
        seed=seed,
        noise_per_step=noise_per_step,
    )
    carry, num_steps = sampler.start(z), int(schedule.num_steps)
    if callback is None:
        return finish(sampler.run(carry, num_steps))
    for step in range(num_steps):
        carry = jax.block_until_ready(sampler.run(carry, step + 1))  # the step is over when the callback sees it
        callback(carry)
        if np.asarray(carry.done_B).all():
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
    holds_arrays = not jax.tree_util.all_leaves([velocity_fn])
    return Partial(_call, velocity_fn) if holds_arrays else Partial(velocity_fn)


def _call(velocity_fn: VelocityFn, *args: Any, **keywords: Any) -> Any:
    return velocity_fn(*args, **keywords)


@jax.jit
def _start(inputs: Inputs, z: Array) -> Carry:
    batch, capacity = z.shape[0], len(inputs.schedule.times) - 1
    active_BT = None if inputs.weight_BT is None else joining.begin(jnp.asarray(inputs.weight_BT))
    return Carry(
        step=jnp.asarray(0, jnp.int32),
        z=z,
        done_B=jnp.zeros(batch, bool),
        z_in=jnp.zeros_like(z),
        v=jnp.zeros_like(z),
        fresh=jnp.asarray(False),
        active_BT=active_BT,
        leap=None if inputs.leap is None else inputs.leap.start(batch),
        kept=empty_kept(inputs, z, active_BT),
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


@jax.jit
def _run(inputs: Inputs, carry: Carry, until: Array) -> Carry:
    until = jnp.minimum(until, inputs.schedule.num_steps)
    if inputs.merge_steps is not None:
        carry = _loop(inputs, carry, jnp.minimum(until, inputs.merge_steps), merged=True)
    return _loop(inputs, carry, until, merged=False)


def _loop(inputs: Inputs, carry: Carry, until: Array, *, merged: bool) -> Carry:
    return jax.lax.while_loop(
        lambda carry: (carry.step < until) & ~jnp.all(carry.done_B),
        lambda carry: take_step(inputs, carry, merged=merged),
        carry,
    )


def _check_merge_steps(merge_steps: int | None) -> None:
    if merge_steps is not None and merge_steps < 0:
        raise ValueError(f"merge_steps is {merge_steps}; expected 0 or more (None compiles no merged phase).")


def _check_noise(noise_per_step: Array | np.ndarray | None, num_steps: int) -> None:
    if noise_per_step is not None and len(noise_per_step) < num_steps:
        raise ValueError(f"noise_per_step has {len(noise_per_step)} entries; expected one for each of {num_steps} steps.")


def _check_arguments(velocity_fn: VelocityFn, weight_BT: np.ndarray | None, merge_steps: int | None, plan: Plan | None) -> None:
    """Refuses a velocity without an argument that the options will pass to it."""
    passed = {} if weight_BT is None else {"frame_mask_BT": "frame_weights passes"}
    passed |= {} if merge_steps is None else {"merge": "merge_steps passes"}
    if plan is not None and plan.keep == "residual":
        passed |= dict.fromkeys(("keep_residual", "residual"), "a plan passes unless it has keep='velocity'")
    try:
        parameters = inspect.signature(velocity_fn).parameters
    except (TypeError, ValueError):  # a callable that does not tell
        return
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return
    for name, option in passed.items():
        if name not in parameters:
            raise ValueError(
                f"velocity_fn takes no argument {name!r}, which {option}; see the arguments in sora_jax.sampling.sampler."
            )


def _checked_weights(frame_weights: Array | np.ndarray) -> np.ndarray:
    weight_BT = np.asarray(frame_weights, np.float32)
    if weight_BT.ndim != 2 or not ((weight_BT >= 0) & (weight_BT <= 1)).all():
        raise ValueError(f"frame_weights must be [B, T] with values from 0 to 1; got shape {weight_BT.shape}.")
    return weight_BT


def _check_leap_joins(leap: Leap, weight_BT: np.ndarray, schedule: Schedule) -> None:
    smallest = joining.smallest_legal_leap(weight_BT, schedule.visited, schedule.num_timesteps)
    if leap.mode == "static" and leap.index < smallest:
        raise ValueError(
            f"leap index {leap.index} is before every frame with a weight above 0 is active; smallest legal index: {smallest}."
        )


def _check_plan(
    plan: Plan,
    guidance: float | None,
    solver: str,
    leap: Leap | None,
    weight_BT: np.ndarray | None,
    schedule: Schedule,
) -> None:
    if solver == "heun":
        raise ValueError("a plan cannot drive solver 'heun', whose second evaluation it does not cover; use 'ab2' or 'dpmpp'.")
    if reuse.HALF in plan.codes and guidance is None:
        raise ValueError("plan has half steps, which reuse the guidance difference, but guidance is None; set guidance.")
    if leap is not None and leap.mode == "released":
        raise ValueError("leap 'released' compares every pair of velocities, reused or not; use Leap.dynamic() with a plan.")
    if weight_BT is not None and len(plan.codes) == len(schedule.visited):
        reuse.check_joining(plan.codes, joining.joining_steps(weight_BT, schedule.visited, schedule.num_timesteps))


def _check_latents(inputs: Inputs, shape: tuple[int, ...]) -> None:
    weight_shape = None if inputs.weight_BT is None else tuple(inputs.weight_BT.shape)
    if weight_shape is not None and weight_shape != tuple(shape[:2]):
        raise ValueError(f"frame_weights have shape {weight_shape}; expected {tuple(shape[:2])}, batch and latent frames.")
    noise_shape = None if inputs.noise_NBX is None else tuple(inputs.noise_NBX.shape[1:])
    if noise_shape is not None and noise_shape != tuple(shape):
        raise ValueError(f"noise_per_step has shape {noise_shape} after the step axis; the latents have {tuple(shape)}.")
    if inputs.leap is not None and inputs.leap.mode == "released" and len(shape) != 5:
        raise ValueError(f"leap 'released' reads rows of video latents [B, T, H, W, C]; got latents of shape {tuple(shape)}.")
