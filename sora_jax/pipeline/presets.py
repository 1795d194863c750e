"""Named choices of how to sample: values for `Settings`, and nothing else.

Invariant: a preset says how the path from noise to clip is walked, never what the clip shows or how large it is: guidance,
size, length and seed stay the model's and the user's.  Options that the user gives with a preset replace its values.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

RECOMMENDED, RECOMMENDED_EVALUATIONS = "recommended", 16
TUNED = (8, 10, 12, 16)  # evaluations of the recipes that a model may bring
PRESETS = ("exact", RECOMMENDED, *(f"tuned-{count}" for count in TUNED))
WAYS = ("num_steps", "solver", "shift", "leap", "merge_steps")  # the options that ways of sampling differ in
FINER: Mapping[str, Any] = {"solver": "heun", "num_steps": 60, "shift": 1.0}  # 119 evaluations, to compare ways with
# Source: benchmarks/results/sampler_study.md, "AB2 shift 4 16": the embedded model's own times are shifted by 0.4, and those
# of Open-Sora at 51 frames of 240p by 2.4, which stay as they are.
_LEAST_SHIFT, _STUDIED_SHIFT = 1.6, 2.4
# What a search tries: shifts in all, leaps out of so many steps, intervals of guidance, thresholds of adaptive reuse.
_TOTAL_SHIFTS = (1.0, 1.6, 2.0, 2.4, 3.2, 4.5)
_LEAPING_STEPS = 30
_INTERVALS = ((0.0, 0.9), (0.1, 1.0), (0.2, 0.9))
_THRESHOLDS = (0.1, 0.2, 0.4)
LEAST_PROMPTS = 6  # four to search with, two to measure with


def preset_values(name: str | None, exact: Mapping[str, Any], *, height: int, width: int, num_frames: int) -> Mapping[str, Any]:
    """Returns the settings of a preset for clips of a size in pixels; none of them for None.

    ``exact`` are those of Open-Sora, which the preset of that name has, and another one where it says nothing.

    Raises:
      ValueError: no preset has that name.
    """
    if name is None:
        return {}
    if name not in PRESETS:
        raise ValueError(f"preset {name!r} is unknown; expected one of {', '.join(PRESETS)}.")
    if tuned_evaluations(name) is not None:
        raise ValueError(f"preset {name!r} is a recipe that a model brings; expected the model's, or exact or recommended.")
    if name == "exact":
        return exact
    from sora_jax.sampling.schedule import resolution_shift  # the only part of a preset that needs JAX

    own = float(resolution_shift(height_px=height, width_px=width, num_frames=num_frames))
    return {**exact, "num_steps": RECOMMENDED_EVALUATIONS, "solver": "ab2", "shift": max(1.0, _LEAST_SHIFT / own)}


def tuned_evaluations(name: str | None) -> int | None:
    """Returns the evaluations of the recipe that a preset stands for; None where it stands for none."""
    return next((count for count in TUNED if name == f"tuned-{count}"), None)


def check_prompts(prompts: Sequence[str], where: object) -> None:
    """Refuses too few prompts: a search takes what suits two or three.

    Raises:
      ValueError: says how many there are.
    """
    if len(prompts) < LEAST_PROMPTS:
        raise ValueError(
            f"{where} has too few prompts, {len(prompts)}; expected {LEAST_PROMPTS} or more: two thirds to search with, "
            "a third to measure with."
        )


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Candidate:
    """One way of sampling that a search tries.

    Attributes:
      name: unique for a number of evaluations.
      options: options of `clip_options.Options`, JSON-ready.
      planned: evaluations of the calibrated plan that goes with them; None: no plan.
    """

    name: str
    options: Mapping[str, Any]
    planned: int | None = None


def plain(count: int, *, own_shift: float) -> list[Candidate]:
    """Returns what a search has to beat: Euler's steps at the model's own times, and AB2's at later ones.

    The study found AB2 best at 8 to 12 evaluations with times shifted by 2.4 in all, and by 1.6 with more.
    """
    shifts = {f"AB2, shift {total:g}": max(1.0, total / own_shift) for total in (_LEAST_SHIFT, _STUDIED_SHIFT)}
    later = [
        Candidate(name=name, options={"num_steps": count, "solver": "ab2", "shift": shift}) for name, shift in shifts.items()
    ]
    return [Candidate(name="Euler", options={"num_steps": count}), *later]


def candidates(count: int, *, own_shift: float, settings: Any) -> list[Candidate]:
    """Returns the ways of sampling with at most ``count`` evaluations that a search tries, for clips of the settings."""
    shifts = {f"{total:g}": total / own_shift for total in _TOTAL_SHIFTS}
    found = [
        Candidate(name=f"{solver}, shift {total}", options={"num_steps": count, "solver": solver, "shift": shift})
        for solver in ("euler", "ab2", "ab3", "dpmpp", "unipc")
        for total, shift in shifts.items()
    ]
    if count % 2:
        heun = {"num_steps": (count + 1) // 2, "solver": "heun"}
        found += [Candidate(name=f"heun, shift {total}", options={**heun, "shift": shift}) for total, shift in shifts.items()]
    found += _reusing(count, {total: shifts[total] for total in ("1.6", "2.4")})
    moved = {"solver": "ab2", "shift": shifts["1.6"]}
    if count < _LEAPING_STEPS:
        for extrapolate in (False, True):
            leap = {"mode": "static", "index": count - 1, "extrapolate": extrapolate}
            options = {"num_steps": _LEAPING_STEPS, "leap": leap}
            found.append(Candidate(name=f"leap, extrapolated {extrapolate}".lower(), options=options))
    if settings.guided:
        for low, high in _INTERVALS:
            options = {**moved, "num_steps": count + 2, "guidance_low": low, "guidance_high": high}
            found.append(Candidate(name=f"guided from {low:g} to {high:g}", options=options))
        found.append(Candidate(name="zero-star", options={**moved, "num_steps": count, "guidance_rule": "zero-star"}))
    if settings.num_frames > 1:
        found.append(Candidate(name="first step merged", options={**moved, "num_steps": count, "merge_steps": 1}))
    return found


def _reusing(count: int, shifts: Mapping[str, float]) -> list[Candidate]:
    found = []
    for total, shift in shifts.items():
        for order in (0, 1):
            options = {"solver": "ab2", "shift": shift, "reuse_order": order}
            found.append(Candidate(name=f"plan, shift {total}, order {order}", options=options, planned=count))
            for rule in ("input", "first-block"):
                for threshold in _THRESHOLDS:
                    more = {"num_steps": 2 * count, "reuse": rule, "reuse_threshold": threshold}
                    name = f"{rule} below {threshold:g}, shift {total}, order {order}"
                    found.append(Candidate(name=name, options={**options, **more}))
    return found
