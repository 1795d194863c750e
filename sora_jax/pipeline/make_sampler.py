"""From settings to a sampler: schedule, guidance and leap as the settings name them.

Invariant: whoever samples with a model goes through `make_sampler`, so that the same settings mean the same sampling in the
pipeline, in calibration and in the studies.  Nothing here computes.
"""

import dataclasses

import numpy as np

from sora_jax.pipeline.option import OFF
from sora_jax.pipeline.settings import Settings
from sora_jax.sampling.adaptive import Reuse
from sora_jax.sampling.guidance import Guidance
from sora_jax.sampling.leap import Leap
from sora_jax.sampling.options import Sampling
from sora_jax.sampling.reuse import Plan
from sora_jax.sampling.sampler import Sampler
from sora_jax.sampling.schedule import Schedule
from sora_jax.sampling.velocity import Velocity


def make_schedule(settings: Settings) -> Schedule:
    """Returns the times that the settings ask for.

    Raises:
      ValueError: a shift so large, or so many steps, that two times are equal in float32.
    """
    try:
        return Schedule.open_sora(
            settings.num_steps,
            height_px=settings.height,
            width_px=settings.width,
            num_frames=settings.num_frames,
            shift=settings.shift,
        )
    except ValueError as error:
        raise ValueError(
            f"shift {settings.shift:g} with {settings.num_steps} steps: times of neighbouring steps are equal in float32; "
            "expected a shift nearer to 1, or fewer steps."
        ) from error


def make_guidance(settings: Settings) -> Guidance | None:
    """Returns the rule of guidance, or None where the caption alone is followed."""
    if not settings.guided:
        return None
    interval = settings.guidance_low, settings.guidance_high
    return Guidance(
        settings.guidance,
        interval=None if interval == (0, 1) else interval,
        zero_star=settings.guidance_rule == "zero-star",
        zero_steps=settings.guidance_zero_steps,
        rescale=settings.guidance_rescale,
    )


def make_plan(settings: Settings) -> Plan | None:
    """Returns the plan, with what its reused steps take."""
    if settings.plan is None or not settings.reuse_order:
        return settings.plan
    return dataclasses.replace(settings.plan, extrapolate=True)


def make_reuse(settings: Settings) -> Reuse | None:
    """Returns the rule of adaptive reuse; None where there is none."""
    if settings.reuse is None:
        return None
    return Reuse(
        watched="input" if settings.reuse == "input" else "first_block",
        threshold=settings.reuse_threshold,
        first=settings.reuse_first,
        last=settings.reuse_last,
        extrapolate=settings.reuse_order == 1,
    )


def make_sampling(settings: Settings, *, frame_weights: np.ndarray | None = None, seed: int = 0) -> Sampling:
    """Returns times and options that the settings ask for.

    Raises:
      ValueError: solver, leap, plan and merging do not go together, or not with the number of steps.
    """
    return Sampling.resolve(
        make_schedule(settings),
        guidance=make_guidance(settings),
        solver=settings.solver,
        leap=leap_rule(settings.leap),
        plan=make_plan(settings),
        reuse=make_reuse(settings),
        merge_steps=settings.merge_steps or None,
        frame_weights=frame_weights,
        seed=seed,
    )


def make_sampler(velocity: Velocity, settings: Settings, *, frame_weights: np.ndarray | None = None, seed: int = 0) -> Sampler:
    """Returns the sampler that the settings ask for; raises what `make_sampling` raises."""
    return Sampler.of(velocity, make_sampling(settings, frame_weights=frame_weights, seed=seed))


def leap_rule(leap: int | str | Leap) -> Leap | None:
    """Returns the leap a setting names: ``"off"``, a step, ``"dynamic"`` or ``"released"``.

    Raises:
      ValueError: it names none.
    """
    if isinstance(leap, Leap):
        return leap
    if isinstance(leap, int) and not isinstance(leap, bool):
        return Leap.static(leap)
    named = {OFF: None, "dynamic": Leap.dynamic(), "released": Leap.released()}
    if not isinstance(leap, str) or leap not in named:
        raise ValueError(f"leap is {leap!r}; expected off, dynamic, released, or the number of the step that leaps.")
    return named[leap]
