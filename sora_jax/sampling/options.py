"""The options of a sampling: `Options` as a user writes them, `Sampling` as the compiled program reads them.

Invariant: the signature that `sample`, `integrate`, `Sampler.create` and `calibrate` share is `Options`, written once; a
`Sampling` was checked, and whatever in it is an array compiles nothing when it changes.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Self, TypedDict, Unpack, no_type_check

import jax
import numpy as np
from jaxtyping import Array

from sora_jax.sampling import joining, noise, reuse, solvers
from sora_jax.sampling.adaptive import Reuse, ReuseRule
from sora_jax.sampling.arguments import is_traced, shown, whole
from sora_jax.sampling.guidance import Guidance, GuidanceRule
from sora_jax.sampling.leap import Leap, LeapRule
from sora_jax.sampling.reuse import Plan, PlanRule
from sora_jax.sampling.schedule import Schedule
from sora_jax.sampling.velocity import ReusableVelocity, VideoVelocity, WatchedVelocity

Scalar = np.ndarray | jax.Array


class Options(TypedDict, total=False):
    """How to sample, in addition to the velocity, the latents and the times; every option may be left out, or be None.

    Attributes:
      guidance: scale of classifier-free guidance, one for each sample, or a `guidance.Guidance` with an interval or a
        correction; None calls the velocity on the batch itself.
      solver: "euler" (the default); "ab2", "ab3" (orders 2 and 3 in time), "dpmpp" and "unipc" (orders 2 and 3 in log-SNR), one
        evaluation a step; "heun" (order 2), two.
      leap: when to leap to the end; the last thing that is decided in a step.  Its numbers may be one for each sample.
      plan: which steps evaluate; not with "heun" or the released leap.
      reuse: a rule by which steps evaluate or reuse, in place of a plan; it decides for the batch together.
      merge_steps: steps below this index ask for merged temporal tokens.
      frame_weights: [B, T] in [0, 1] for latents [B, T, ...], see `joining`.
      seed: noise of the frames that join late (default 0).
      noise_per_step: [steps, B, ...] in place of that noise.
    """

    guidance: int | float | Sequence[float] | Array | np.ndarray | Guidance | None
    solver: str
    leap: Leap | None
    plan: Plan | None
    reuse: Reuse | None
    merge_steps: int | None
    frame_weights: Array | np.ndarray | None
    seed: int
    noise_per_step: Array | np.ndarray | None


@jax.tree_util.register_dataclass
@no_type_check  # the tree also holds shapes and paths
@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """Times and options, checked; make one with `resolve`.

    Runtime inputs: every array below.  Static: their shapes and dtypes, ``solver``, the modes of leap and plan, which of the
    optional inputs are None, ``schedule.num_timesteps``.

    Attributes:
      schedule: times and number of steps.
      guidance: how a caption is followed; None evaluates without guidance, on the batch itself.
      merge_steps: steps below this index merge temporal tokens, int32; None compiles no merged phase.
      weight_BT: frame weights in [0, 1] of masked sampling (see `joining`).
      seed: noise that joining frames get, uint32.
      noise_NBX: recorded noise for joining frames, one per step, in place of the seed's.
      leap: when to leap.
      plan: which steps evaluate.
      reuse: by which rule they do, in place of a plan.
      solver: one of `solvers.SOLVERS`.
    """

    schedule: Schedule
    guidance: GuidanceRule | None
    merge_steps: Scalar | None
    weight_BT: Array | np.ndarray | None
    seed: Scalar
    noise_NBX: Array | np.ndarray | None
    leap: LeapRule | None
    plan: PlanRule | None
    reuse: ReuseRule | None = None
    solver: str = dataclasses.field(default="euler", metadata={"static": True})

    @classmethod
    def resolve(cls, schedule: Schedule, **options: Unpack[Options]) -> Self:
        """Returns the options with their defaults, as runtime inputs.

        Raises:
          TypeError: there is no such option.
          ValueError: a value is out of range or a combination is illegal; the message names it.
        """
        unknown = sorted(options.keys() - Options.__annotations__.keys())
        if unknown:
            raise TypeError(f"there is no option {unknown[0]!r}; expected {', '.join(Options.__annotations__)}.")
        _check_kind("schedule", schedule, Schedule, "for example Schedule.uniform(30)")
        num_steps = num_steps_of(schedule)
        guidance = None if options.get("guidance") is None else Guidance.of(options["guidance"])
        solver, seed = options.get("solver"), options.get("seed")
        solver = solvers.check_solver("euler" if solver is None else solver)
        merge_steps = options.get("merge_steps")
        if merge_steps is not None:
            merge_steps = whole("merge_steps", merge_steps, least=0)
        frame_weights, noise_per_step = options.get("frame_weights"), options.get("noise_per_step")
        weight_BT = None if frame_weights is None else _checked_weights(frame_weights, schedule)
        leap, plan, adaptive = options.get("leap"), options.get("plan"), options.get("reuse")
        if leap is not None:
            _check_kind("leap", leap, Leap, "for example Leap.static(15)")
            _check_leap_joins(leap, weight_BT, schedule)
            _check_leap_guidance(leap, guidance)
        if plan is not None:
            _check_kind("plan", plan, Plan, "for example Plan.evaluate_at([0, 2, 4], 6)")
            _check_plan(plan, guidance, solver, leap)
            if weight_BT is not None and len(plan.codes) == num_steps:
                plan = plan.full_at(joining.joining_steps(weight_BT, schedule.visited, schedule.num_timesteps))
        if adaptive is not None:
            _check_kind("reuse", adaptive, Reuse, "for example Reuse.by_input(0.1)")
            _check_reuse(solver, leap, plan)
        return cls(
            schedule=schedule,
            guidance=None if guidance is None else guidance.rule(),
            merge_steps=None if merge_steps is None else np.asarray(merge_steps, np.int32),
            weight_BT=weight_BT,
            seed=noise.as_seed(0 if seed is None else seed),
            noise_NBX=None if noise_per_step is None else _checked_noise(noise_per_step, num_steps),
            leap=None if leap is None else leap.rule(num_steps),
            plan=None if plan is None else plan.rule(num_steps, len(schedule.times) - 1),
            reuse=None if adaptive is None else adaptive.rule(),
            solver=solver,
        )

    def needs(self) -> dict[str, type]:
        """Returns which protocol of `velocity` the options need, by option."""
        needed: dict[str, type] = {} if self.weight_BT is None else {"frame_weights": VideoVelocity}
        needed |= {} if self.merge_steps is None else {"merge_steps": VideoVelocity}
        if self.plan is not None and self.plan.keep == "residual":
            needed["a plan that keeps residuals (keep='velocity' does not)"] = ReusableVelocity
        if self.reuse is not None:
            needed["reuse"] = WatchedVelocity
        return needed

    def check_latents(self, z: Any) -> None:
        """Refuses latents that are no float32 or float64 array, or do not fit the options.

        Raises:
          ValueError: names what does not fit.
        """
        if not isinstance(z, jax.Array | np.ndarray):
            raise ValueError(f"z is {shown(z)}; expected an array of latents [B, ...], float32.")
        if z.dtype not in (np.float32, np.float64):
            raise ValueError(f"z has dtype {z.dtype}; expected float32, in which latents are integrated (z.astype('float32')).")
        if z.ndim == 0 or len(z) == 0:
            raise ValueError(f"z has shape {z.shape}; expected latents [B, ...] of at least one sample.")
        batch = len(z)
        for name, value in self._per_sample().items():
            if value is not None and np.ndim(value) == 1 and len(value) != batch:
                raise ValueError(f"{name} has {len(value)} values; expected one, or one for each of {batch} samples.")
        if self.weight_BT is not None and self.weight_BT.shape != z.shape[:2]:
            shape = tuple(self.weight_BT.shape)
            raise ValueError(f"frame_weights have shape {shape}; expected {z.shape[:2]}, batch and latent frames.")
        if self.noise_NBX is not None and self.noise_NBX.shape[1:] != z.shape:
            shape = tuple(self.noise_NBX.shape[1:])
            raise ValueError(f"noise_per_step has shape {shape} after the step axis; the latents have {z.shape}.")
        if self.leap is not None and self.leap.mode == "released" and z.ndim != 5:
            raise ValueError(f"leap 'released' reads rows of video latents [B, T, H, W, C]; got latents of shape {z.shape}.")

    def _per_sample(self) -> dict[str, Any]:
        named = {} if self.guidance is None else {"guidance": self.guidance.scale}
        if self.leap is not None:
            fields = {"index": "index", "tolerance": "tolerance", "patience": "patience", "min_share": "first"}
            named |= {f"leap {name}": getattr(self.leap, field) for name, field in fields.items()}
        return named


def num_steps_of(schedule: Schedule) -> int:
    """Returns the number of steps on the host.

    Raises:
      ValueError: it is being traced.
    """
    if is_traced(schedule.num_steps):
        raise ValueError(
            "the schedule's number of steps is traced by jit, vmap or grad, but decides what is compiled; close over the "
            "schedule instead of passing it as an argument."
        )
    return int(schedule.num_steps)


def _check_kind(name: str, value: Any, kind: type, example: str) -> None:
    if not isinstance(value, kind):
        raise ValueError(f"{name} is {shown(value)}; expected a sora_jax.{kind.__name__}, {example}.")


def _checked_weights(frame_weights: Any, schedule: Schedule) -> np.ndarray:
    if is_traced((frame_weights, schedule.times)):
        raise ValueError(
            "frame_weights or the times that go with them are traced by jit, vmap or grad; close over both, so that the host "
            "knows which frame joins when."
        )
    try:
        weight_BT = np.asarray(frame_weights, np.float32)
    except (TypeError, ValueError):
        raise ValueError(f"frame_weights is {shown(frame_weights)}; expected numbers [B, T] from 0 to 1.") from None
    if weight_BT.ndim != 2 or not ((weight_BT >= 0) & (weight_BT <= 1)).all():
        raise ValueError(f"frame_weights must be [B, T] with values from 0 to 1; got shape {weight_BT.shape}.")
    return weight_BT


def _checked_noise(noise_per_step: Any, num_steps: int) -> Array | np.ndarray:
    if not isinstance(noise_per_step, jax.Array | np.ndarray):
        raise ValueError(f"noise_per_step is {shown(noise_per_step)}; expected an array [steps, B, ...].")
    if noise_per_step.ndim == 0 or len(noise_per_step) < num_steps:
        entries = len(noise_per_step) if noise_per_step.ndim else 0
        raise ValueError(f"noise_per_step has {entries} entries; expected one for each of {num_steps} steps.")
    return noise_per_step


def _check_leap_joins(leap: Leap, weight_BT: np.ndarray | None, schedule: Schedule) -> None:
    if weight_BT is None or leap.mode != "static":
        return
    smallest = joining.smallest_legal_leap(weight_BT, schedule.visited, schedule.num_timesteps)
    index = int(np.min(leap.index))
    if index < smallest:
        raise ValueError(
            f"leap index {index} is before every frame with a weight above 0 is active; smallest legal index: {smallest}."
        )


def _check_leap_guidance(leap: Leap, guidance: Guidance | None) -> None:
    if guidance is None:
        return
    if leap.mode == "static" and np.min(leap.index) < guidance.zero_steps:
        raise ValueError(
            f"leap index {np.min(leap.index)} is one of the first {guidance.zero_steps} steps, which stand still (zero_steps); "
            f"smallest legal index: {guidance.zero_steps}."
        )
    if leap.mode == "released" and (guidance.interval is not None or guidance.zero_steps):
        raise ValueError(
            "leap 'released' compares every pair of velocities, also of different guidance; use Leap.dynamic() with an "
            "interval or with zero_steps."
        )


def _check_plan(plan: Plan, guidance: Guidance | None, solver: str, leap: Leap | None) -> None:
    if solver == "heun":
        raise ValueError("a plan cannot drive solver 'heun', whose second evaluation it does not cover; use 'ab2' or 'dpmpp'.")
    if reuse.HALF in plan.codes and guidance is None:
        raise ValueError("plan has half steps, which reuse the guidance difference, but guidance is None; set guidance.")
    if leap is not None and leap.mode == "released":
        raise ValueError("leap 'released' compares every pair of velocities, reused or not; use Leap.dynamic() with a plan.")


def _check_reuse(solver: str, leap: Leap | None, plan: Plan | None) -> None:
    if plan is not None:
        raise ValueError("plan and reuse both say which steps evaluate; choose one.")
    if solver == "heun":
        raise ValueError("reuse cannot drive solver 'heun', whose second evaluation it does not cover; use 'ab2' or 'dpmpp'.")
    if leap is not None and leap.mode == "released":
        raise ValueError("leap 'released' compares every pair of velocities, reused or not; use Leap.dynamic() with reuse.")
