"""Named choices of how to sample: values for `Settings`, and nothing else.

Invariant: a preset says how the path from noise to clip is walked, never what the clip shows or how large it is: guidance,
size, length and seed stay the model's and the user's.  Options that the user gives with a preset replace its values.
"""

from collections.abc import Mapping
from typing import Any

PRESETS = ("exact", "recommended")
WAYS = ("num_steps", "solver", "shift", "leap", "merge_steps")  # the options that ways of sampling differ in
FINER: Mapping[str, Any] = {"solver": "heun", "num_steps": 60, "shift": 1.0}  # 119 evaluations, to compare ways with
# Source: benchmarks/results/sampler_study.md, "AB2 shift 4 16": the embedded model's own times are shifted by 0.4, and those
# of Open-Sora at 51 frames of 240p by 2.4, which stay as they are.
_LEAST_SHIFT = 1.6


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
    if name == "exact":
        return exact
    from sora_jax.sampling.schedule import resolution_shift  # the only part of a preset that needs JAX

    own = float(resolution_shift(height_px=height, width_px=width, num_frames=num_frames))
    return {**exact, "num_steps": 16, "solver": "ab2", "shift": max(1.0, _LEAST_SHIFT / own)}
