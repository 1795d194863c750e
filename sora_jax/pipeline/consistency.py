"""Which settings go together.

Invariant: every fault is a ValueError of one line that names the option and what would do.  Ranges of single options are
`option`'s business; what the sampler alone can know (which frame joins when) is the sampler's.
"""

from collections.abc import Mapping
from typing import Any

from sora_jax.inputs import sizes

Settings = Any  # those of `settings`, whose module calls this one


def check(settings: Settings) -> None:
    """Refuses settings that do not go together.

    Raises:
      ValueError: says which, and what to change.
    """
    _check_steps(settings)
    _check_guidance(settings)
    _check_reuse(settings)
    _check_loop(settings)


def check_effect(asked: Mapping[str, Any], settings: Settings) -> None:
    """Refuses what a caller asks for where it has no effect in the settings that follow.

    Raises:
      ValueError: says which, and what it goes with.
    """
    if "merge" in asked and not settings.merge_steps:
        raise ValueError("merge says what merged steps merge, but merge_steps is 0; set it as well, or leave merge out.")
    idle = [name for name in ("reuse_threshold", "reuse_first", "reuse_last") if name in asked and settings.reuse is None]
    if idle:
        raise ValueError(f"{idle[0]} says when a step reuses, but reuse is off; set reuse as well, or leave it out.")
    alone = [name for name in asked if name.startswith("condition_frame_") and settings.loop == 1]
    if alone:
        raise ValueError(f"{alone[0]} says how clips of a loop go on, but loop is 1; set loop as well, or leave it out.")
    if "fps" in asked and settings.num_frames == 1:
        raise ValueError("fps is what a video is conditioned on, but num_frames is 1, an image; leave it out.")


def _check_reuse(settings: Settings) -> None:
    if settings.reuse is not None and settings.plan is not None:
        raise ValueError("plan and reuse both say which steps evaluate; choose one.")
    if settings.reuse is not None and settings.leap == "released":
        raise ValueError("leap 'released' compares every pair of velocities, reused or not; use dynamic with reuse.")
    if settings.reuse_order and settings.reuse is None and settings.plan is None:
        raise ValueError("reuse_order says what a reused step takes, but none reuses; set reuse or plan, or leave it out.")
    if settings.reuse_order and settings.plan is not None and settings.plan.keep != "residual":
        raise ValueError("reuse_order continues residuals, but the plan keeps velocities; leave it out.")


def check_calibration(settings: Settings, evaluations: Any, half_from: Any) -> None:
    """Refuses a reuse plan that no calibration with these settings can find.

    Raises:
      ValueError: says how many steps there are.
    """
    least = 2 if 0 < settings.merge_steps < settings.num_steps else 1  # the first step, and the first one after merging
    if not isinstance(evaluations, int) or not least <= evaluations <= settings.num_steps:
        expected = f"expected {least} to {settings.num_steps}"
        raise ValueError(f"a plan of {settings.num_steps} steps cannot have {evaluations!r} evaluations; {expected}.")
    if half_from is not None and (not isinstance(half_from, int) or half_from not in range(settings.num_steps)):
        raise ValueError(f"half_from is {half_from!r}; expected one of the steps, 0 to {settings.num_steps - 1}.")
    if settings.guidance_zero_steps:
        raise ValueError("a plan says what each step evaluates, but guidance_zero_steps stand still; leave them out.")
    if half_from is not None and not settings.guided:
        raise ValueError("half steps reuse the guidance difference, but guidance is 1; leave half_from out.")


def _check_steps(settings: Settings) -> None:
    if isinstance(settings.leap, int) and settings.leap >= settings.num_steps:
        raise ValueError(
            f"leap index {settings.leap} is beyond the last of {settings.num_steps} steps; expected 0 to "
            f"{settings.num_steps - 1} ({settings.num_steps - 1} leaps nowhere)."
        )
    if settings.merge_steps > settings.num_steps:
        raise ValueError(
            f"merge_steps is {settings.merge_steps} of {settings.num_steps} steps; expected 0 to {settings.num_steps} (all)."
        )


def _check_guidance(settings: Settings) -> None:
    if settings.guidance_low > settings.guidance_high:
        raise ValueError(
            f"guidance_low is {settings.guidance_low:g}, above guidance_high, {settings.guidance_high:g}: the interval is "
            "upside down; expected the lower time first."
        )
    if settings.guidance_zero_steps and settings.guidance_rule != "zero-star":
        raise ValueError("guidance_zero_steps belong to CFG-Zero*; set guidance_rule to zero-star, or leave them out.")
    if settings.guidance_zero_steps >= settings.num_steps:
        raise ValueError(
            f"guidance_zero_steps is {settings.guidance_zero_steps} of {settings.num_steps} steps; expected fewer."
        )
    if settings.guidance_rescale is not None and settings.guidance_rule == "zero-star":
        raise ValueError("guidance_rescale and the rule zero-star are two corrections of one fault; choose one.")


def _check_loop(settings: Settings) -> None:
    if settings.loop == 1:
        return
    if settings.num_frames == 1:
        raise ValueError(f"loop {settings.loop} cannot extend a single image; set num_frames, or loop 1.")
    taken = sizes.frames_of_latents(settings.condition_frame_length)
    if taken >= settings.num_frames:
        shorter = f" or condition_frame_length {sizes.LATENTS_PER_CHUNK}" if taken > sizes.FRAMES_PER_CHUNK else ""
        raise ValueError(
            f"loop {settings.loop} takes over {taken} frames from clip to clip (condition_frame_length "
            f"{settings.condition_frame_length}), but a clip has {settings.num_frames}; expected "
            f"num_frames above {taken}{shorter}."
        )
