"""What the sampler's oracle is asked, what it knows between and in steps, and what it answers.

Invariant: plain numbers and numpy arrays; no rule is applied here.
"""

import dataclasses
import math
from typing import Any

import numpy as np

from tests.support.oracle_velocity import Wavy

FULL, REUSE, HALF, AFTER_HALF, ONE, REUSE_ONE, STILL = range(7)
NO_RULE, PROTECTED, RESTARTED, JOINS, CHANGED, BELOW = range(6)


@dataclasses.dataclass(kw_only=True)
class Case:
    """One sampling: structure (solver, leap mode, ...) and values."""

    times: np.ndarray
    solver: str = "euler"
    guidance: Any = None
    interval: tuple[float, float] | None = None
    zero_star: bool = False
    zero_steps: int = 0
    rescale: float | None = None
    merge_steps: int | None = None
    weights: np.ndarray | None = None
    noise: np.ndarray | None = None
    leap_mode: str | None = None
    leap_index: int = 0
    tolerance: float = 1e-4
    min_share: float = 0.5
    patience: int = 3
    extrapolate: bool = False
    codes: tuple[int, ...] | None = None
    keep: str = "residual"
    watched: str | None = None
    threshold: float = 0.0
    first: int = 1
    last: int = 1
    line: bool = False


@dataclasses.dataclass(kw_only=True)
class Outcome:
    """What the rules give; lists have one entry for each step."""

    z: np.ndarray
    evaluations: np.ndarray
    leapt_at: list[int | None]
    costs: list[float] = dataclasses.field(default_factory=list)
    kinds: list[int] = dataclasses.field(default_factory=list)
    changes: list[float] = dataclasses.field(default_factory=list)
    whys: list[int] = dataclasses.field(default_factory=list)
    merged: list[bool] = dataclasses.field(default_factory=list)
    cosines: list[np.ndarray] = dataclasses.field(default_factory=list)
    near_ties: int = 0


@dataclasses.dataclass(kw_only=True)
class State:
    """Between two steps.  ``past`` is the step before; ``best`` and ``patience`` are the leap's, for each sample."""

    case: Case
    velocity: Wavy
    z: np.ndarray
    done: list[bool]
    best: list[float]
    patience: list[int]
    noisy: np.ndarray | None
    past: "Step | None" = None
    kept: dict[int, list[tuple[float, Any]]] = dataclasses.field(default_factory=dict)  # by row: times and residuals
    watch: Any = None
    summed: float = 0.0
    ties: int = 0
    difference: Any = None
    half: bool = False


@dataclasses.dataclass(kw_only=True)
class Step:
    """One step; ``t`` and ``t_next`` in flow units, ``restarts`` where nothing of the step before may be used.

    ``age`` counts, for each frame, the steps before that a solver may use; ``base`` is UniPC's corrected start.
    """

    i: int
    t: float
    t_next: float
    merged: bool
    guided: bool
    restarts: bool
    z_in: np.ndarray
    active: np.ndarray | None
    joins: np.ndarray
    all_joined: list[bool]
    past: "Step | None" = None
    v: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0))
    kind: int = FULL
    change: float = math.nan
    why: int = NO_RULE
    age: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0))
    base: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0))

    @property
    def full(self) -> bool:
        return self.kind in (FULL, ONE)
