"""The evaluations of the sampler's oracle: guidance, what a step evaluates or reuses, and the rules of adaptive reuse.

Invariant: as in `sampler_oracle`, eager numpy from the rules, sharing no code with the compiled sampler.
"""

import math

import numpy as np

from tests.support.oracle_state import (
    AFTER_HALF,
    BELOW,
    CHANGED,
    FULL,
    HALF,
    JOINS,
    NO_RULE,
    ONE,
    PROTECTED,
    RESTARTED,
    REUSE,
    REUSE_ONE,
    STILL,
    Case,
    State,
    Step,
)
from tests.support.oracle_velocity import SCALE, SHARE

COST = {FULL: 1.0, HALF: 0.5, ONE: 0.5}


# Guidance: u + g (c - u), within an interval of times, with one of two corrections.


def is_guided(case: Case, i: int) -> bool:
    t = np.float32(case.times[i]) / np.float32(SCALE)
    return case.interval is None or bool(np.float32(case.interval[0]) <= t <= np.float32(case.interval[1]))


def guided(state: State, now: Step, c: np.ndarray, u: np.ndarray) -> np.ndarray:
    case, v = state.case, np.empty_like(c)
    scales = np.broadcast_to(case.guidance, len(c))
    for b, g in enumerate(scales):
        frames = slice(None) if now.active is None or not now.active[b].any() else now.active[b]
        here, there = c[b], u[b]
        if case.zero_star:
            seen, unseen = (x * now.active[b][:, None, None, None] if now.active is not None else x for x in (here, there))
            there = np.sum(seen * unseen) / (np.sum(unseen**2) + 1e-8) * there
        v[b] = there + g * (here - there)
        if case.rescale is not None:
            v[b] *= case.rescale * np.std(here[frames]) / np.std(v[b][frames]) + 1 - case.rescale
    return v


# Evaluation: all rows, or those with a caption alone; or what an earlier step kept.


def evaluate(state: State, now: Step) -> float:
    """Sets the step's kind and velocity as plan and guidance have it; returns what it cost."""
    case = state.case
    now.kind = kind_of(state, now)
    if now.kind == STILL:
        now.v = np.zeros_like(now.z_in)
    elif now.kind in (REUSE, AFTER_HALF, REUSE_ONE) and case.keep == "velocity":
        assert state.past is not None
        now.v = state.past.v
    elif case.guidance is None or now.kind in (ONE, REUSE_ONE):
        now.v = rows_of(state, now, 1)
    elif now.kind in (FULL, REUSE):
        c, u = np.split(rows_of(state, now, 2), 2)
        now.v = guided(state, now, c, u)
        if now.kind == FULL:
            state.difference, state.half = c - u, False
    else:
        c = rows_of(state, now, 1)
        now.v, state.half = guided(state, now, c, c - state.difference), True
    if case.watched == "first_block" and now.kind in (REUSE, REUSE_ONE):
        return SHARE * (1.0 if now.kind == REUSE else 0.5)
    return COST.get(now.kind, 0.0)


def kind_of(state: State, now: Step) -> int:
    case = state.case
    if now.i < case.zero_steps:
        return STILL
    if case.watched is not None:
        reuses = unchanged(state, now)
        return (REUSE if reuses else FULL) if now.guided else (REUSE_ONE if reuses else ONE)
    kind = FULL if now.restarts or case.codes is None else case.codes[now.i]
    if not now.guided:
        return REUSE_ONE if kind == REUSE else ONE
    return AFTER_HALF if kind == REUSE and state.half else kind


def rows_of(state: State, now: Step, copies: int) -> np.ndarray:
    """Returns the velocity of the first rows, evaluated or with their kept residuals."""
    if now.kind in (REUSE, AFTER_HALF, REUSE_ONE):
        return reused(state, now, copies)
    v, residual = keeping(state, now, copies)
    if state.case.watched == "first_block":
        residual = residual - first_block(state, now, copies)
    for row, each in enumerate(residual):
        before = [] if now.restarts else state.kept.get(row, [])
        state.kept[row] = [*before[-1:], (now.t, each)]
    return v


# Adaptive reuse: by how much the input, or what the first block adds, has changed since the last evaluation.


def unchanged(state: State, now: Step) -> bool:
    case = state.case
    copies = 2 if case.guidance is not None and now.guided else 1
    leaps = case.leap_mode == "static" and now.i == case.leap_index
    if now.i < case.first or now.i >= len(case.times) - case.last or leaps:
        now.why = PROTECTED
    elif now.restarts:
        now.why = RESTARTED
    elif now.joins.any():
        now.why = JOINS
    values = modulated(state, now) if case.watched == "input" else first_block(state, now, copies)
    rows = len(values)
    if state.watch is None:
        state.watch = np.zeros((2 * len(now.z_in), *values.shape[1:]))
    counts = np.tile(~np.asarray(state.done), rows // len(now.z_in))
    before = state.watch[:rows][counts]
    change = np.abs(values[counts] - before).sum() / max(np.abs(before).sum(), 1e-8)
    change += state.summed if case.watched == "input" else 0
    reuses = bool(now.why == NO_RULE and change < case.threshold)
    state.ties += now.why == NO_RULE and abs(change - case.threshold) < 1e-5 * max(1, change)
    now.change = math.nan if now.restarts else change
    now.why = now.why or (BELOW if reuses else CHANGED)
    state.summed = change if reuses else 0.0
    if case.watched == "input" or not reuses:
        state.watch[:rows] = values
    return reuses


def modulated(state: State, now: Step) -> np.ndarray:
    z, t, mask = _rows(now, 1)
    return state.velocity.modulated_input(z, t, frame_mask_BT=mask)


def first_block(state: State, now: Step, copies: int) -> np.ndarray:
    z, t, mask = _rows(now, copies)
    return state.velocity.first_block(z, t, frame_mask_BT=mask, merged=now.merged)[1]


def continued(state: State, row: int, t: float) -> np.ndarray:
    """Returns a row's last residual, or the line through its last two at time t."""
    *before, (t_1, residual) = state.kept[row]
    if not state.case.line or not before:
        return residual
    ((t_2, older),) = before
    return residual + (t - t_1) / (t_1 - t_2) * (residual - older)


def keeping(state: State, now: Step, copies: int) -> tuple[np.ndarray, np.ndarray]:
    z, t, mask = _rows(now, copies)
    return state.velocity.evaluate_keeping(z, t, frame_mask_BT=mask, merged=now.merged)


def reused(state: State, now: Step, copies: int) -> np.ndarray:
    z, t, mask = _rows(now, copies)
    residual = np.stack([continued(state, row, now.t) for row in range(len(z))])
    if state.case.watched == "first_block":
        residual = residual + first_block(state, now, copies)
    return state.velocity.reuse(z, t, residual, frame_mask_BT=mask)


def _rows(now: Step, copies: int) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    z = np.concatenate([now.z_in] * copies)
    mask = None if now.active is None else np.concatenate([now.active] * copies)
    return z, np.full(len(z), now.t * SCALE), mask
