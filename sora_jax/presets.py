"""Named choices of how to sample: values for `Settings`, and nothing else.

Invariant: a preset says how the path from noise to clip is walked, never what the clip shows or how large it is: guidance,
size, length and seed stay the model's and the user's.  What the user gives besides a preset replaces its values.
"""

from collections.abc import Mapping
from typing import Any

from sora_jax.plans import Plan

# Dense where the velocity turns fastest, sparse later: what `calibration` finds for 16 evaluations of the embedded model.
# Another model's own plan, from `sora-jax calibrate`, goes before it.
_SIXTEEN_OF_30 = Plan.evaluate_at((0, 1, 2, 3, 4, 5, 6, 8, 10, 12, 14, 17, 20, 23, 26, 28), 30)

PRESETS: Mapping[str, Mapping[str, Any]] = {
    # Source: Open-Sora v1.2 configs/opensora-v1-2/inference/sample.py.
    "exact": {"num_steps": 30, "solver": "euler", "shift": 1.0, "leap": "off", "merge_steps": 0, "plan": None},
    # Source: benchmarks/results/sampler_study.md, "reuse 16".
    "recommended": {
        "num_steps": 30,
        "solver": "euler",
        "shift": 1.0,
        "leap": "off",
        "merge_steps": 0,
        "plan": _SIXTEEN_OF_30,
    },
}


def preset_values(name: str | None) -> Mapping[str, Any]:
    """Returns the settings of a preset; none of them for None.

    Raises:
      ValueError: no preset has that name.
    """
    if name is None:
        return {}
    if name not in PRESETS:
        raise ValueError(f"preset {name!r} is unknown; expected one of {', '.join(PRESETS)}.")
    return PRESETS[name]
