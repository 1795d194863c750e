"""A plain Python sampler and a small velocity, written from the rules and sharing no code with the compiled sampler.

    for every step:  join frames, evaluate, compare with the step before, decide the leap, move, remember

Invariant: eager numpy in float64, one sample at a time where decisions are per sample; schedules, plans and leaps are read
as plain numbers.  ``near_ties`` counts comparisons that float32 may decide either way.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

FULL, REUSE, HALF = 0, 1, 2
TIE = 2e-6
SCALE = 1000  # the time of pure noise


@dataclasses.dataclass(kw_only=True)
class Case:
    """One sampling: structure (solver, leap mode, ...) and values."""

    times: np.ndarray
    solver: str = "euler"
    guidance: Any = None
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


@dataclasses.dataclass(kw_only=True)
class Outcome:
    """What the rules give; lists have one entry for each step."""

    z: np.ndarray
    evaluations: np.ndarray
    leapt_at: list[int | None]
    costs: list[float] = dataclasses.field(default_factory=list)
    reused: list[bool] = dataclasses.field(default_factory=list)
    merged: list[bool] = dataclasses.field(default_factory=list)
    cosines: list[np.ndarray] = dataclasses.field(default_factory=list)
    near_ties: int = 0


# The velocity: a costly part, frame times, and a merged variant.


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Wavy:
    """A smooth velocity that may be merged, masked and reused; of numpy arrays it computes in numpy, of JAX's in JAX."""

    bias_R: Any

    def evaluate(self, z: Any, t_B: Any, *, frame_mask_BT: Any, merged: bool) -> Any:
        return self.evaluate_keeping(z, t_B, frame_mask_BT=frame_mask_BT, merged=merged)[0]

    def evaluate_keeping(self, z: Any, t_B: Any, *, frame_mask_BT: Any, merged: bool) -> tuple[Any, Any]:
        xp, tau = _library(z), _frame_times(z, t_B, frame_mask_BT)
        y = xp.repeat((z[:, 0::2] + z[:, 1::2]) / 2, 2, axis=1) if merged else z
        bias = self.bias_R[: len(z)][:, None, None, None, None]
        residual = xp.sin(1.3 * y + bias + 2 * tau) * (1 + tau)
        return residual - 0.4 * z * tau, residual

    def reuse(self, z: Any, t_B: Any, residual: Any, *, frame_mask_BT: Any) -> Any:
        return residual - 0.4 * z * _frame_times(z, t_B, frame_mask_BT)


def _library(array: Any) -> Any:
    return np if isinstance(array, np.ndarray) else jnp


def _frame_times(z: Any, t_B: Any, frame_mask_BT: Any) -> Any:
    """The flow time of every frame: 0 where it is not sampled."""
    xp = _library(z)
    tau = xp.broadcast_to((t_B / SCALE)[:, None], z.shape[:2])
    tau = tau if frame_mask_BT is None else xp.where(frame_mask_BT, tau, 0.0)
    return tau[:, :, None, None, None]


# What is known before a step, and what a step knows.


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
    residual: Any = None
    difference: Any = None
    half: bool = False


@dataclasses.dataclass(kw_only=True)
class Step:
    """One step; ``t`` and ``t_next`` in flow units, ``restarts`` where nothing of the step before may be used."""

    i: int
    t: float
    t_next: float
    merged: bool
    restarts: bool
    z_in: np.ndarray
    active: np.ndarray | None
    joins: np.ndarray
    all_joined: list[bool]
    v: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0))
    full: bool = True


def run(case: Case, z: np.ndarray, bias: np.ndarray) -> Outcome:
    """Returns what the rules give."""
    batch, num_steps = len(z), len(case.times)
    state = State(
        case=case,
        velocity=Wavy(bias.astype(np.float64)),
        z=z.astype(np.float64),
        done=[False] * batch,
        best=[_start_of_best(case)] * batch,
        patience=[case.patience] * batch,
        noisy=None if case.weights is None else case.weights == 1,
    )
    out = Outcome(z=state.z, evaluations=np.zeros(batch), leapt_at=[None] * batch)
    for i in range(num_steps):
        if all(state.done):
            break
        now = joined(state, i)
        cost = evaluate(state, now)
        cosine = cosines(state, now)
        leaps = decide(state, now, cosine, out)
        second = heun_velocity(state, now, leaps)
        for b in range(batch):
            if not state.done[b]:
                frames = slice(None) if now.active is None else now.active[b]
                state.z[b][frames] = moved(state, now, leaps[b], b, second)[frames]
                out.evaluations[b] += cost + (second is not None and not leaps[b])
                out.leapt_at[b] = i if leaps[b] and i + 1 < num_steps else None
                state.done[b] = leaps[b] or i + 1 == num_steps
        out.costs.append(cost + (second is not None))
        out.reused.append(not now.full)
        out.merged.append(now.merged)
        out.cosines.append(cosine)
        state.past, state.noisy = now, now.active
    return out


# Frames: one of weight w joins at the first time t <= w, re-noised to it.


def joined(state: State, i: int) -> Step:
    case, times = state.case, [*state.case.times.astype(np.float64) / SCALE, 0.0]
    switches = case.merge_steps is not None and i == case.merge_steps
    now = Step(
        i=i,
        t=times[i],
        t_next=times[i + 1],
        merged=case.merge_steps is not None and i < case.merge_steps,
        restarts=i == 0 or switches,
        z_in=state.z.copy(),
        active=None,
        joins=np.zeros(state.z.shape[:2], bool),
        all_joined=[True] * len(state.z),
    )
    if case.weights is not None and case.noise is not None:
        now.active = case.weights * np.float32(SCALE) >= case.times[i]
        now.joins = now.active & ~state.noisy
        noise = case.noise[i].astype(np.float64)
        now.z_in[now.joins] = (1 - now.t) * now.z_in[now.joins] + now.t * noise[now.joins]
        now.all_joined = (now.active | (case.weights <= 0)).all(axis=1).tolist()
    return now


# Evaluation: u + g (c - u); a half step knows c, and takes c - u from the last full step.


def guided(state: State, v: np.ndarray) -> np.ndarray:
    if state.case.guidance is None:
        return v
    c, u = np.split(v, 2)
    return u + _scale(state) * (c - u)


def half_guided(state: State, c: np.ndarray) -> np.ndarray:
    return c + (_scale(state) - 1) * state.difference


def _scale(state: State) -> np.ndarray:
    return np.asarray(state.case.guidance, np.float64).reshape(-1, 1, 1, 1, 1)


def evaluate(state: State, now: Step) -> float:
    """Sets the step's velocity as its plan has it; returns what it cost."""
    case, batch = state.case, len(now.z_in)
    code = FULL if now.restarts or case.codes is None else case.codes[now.i]
    copies = 1 if case.guidance is None else 2
    now.full = code == FULL
    if code == FULL:
        v, state.residual = keeping(state, now, copies)
        state.difference, state.half = v[:batch] - v[batch:] if copies == 2 else None, False
        now.v = guided(state, v)
        return 1.0
    if code == HALF:
        c, state.residual[:batch] = keeping(state, now, 1)
        state.half = True
        now.v = half_guided(state, c)
        return 0.5
    if case.keep == "velocity":
        assert state.past is not None
        now.v = state.past.v
    elif state.half:
        now.v = half_guided(state, reused(state, now, 1))
    else:
        now.v = guided(state, reused(state, now, copies))
    return 0.0


def keeping(state: State, now: Step, copies: int) -> tuple[np.ndarray, np.ndarray]:
    z, t, mask = _rows(now, copies)
    return state.velocity.evaluate_keeping(z, t, frame_mask_BT=mask, merged=now.merged)


def reused(state: State, now: Step, copies: int) -> np.ndarray:
    z, t, mask = _rows(now, copies)
    return state.velocity.reuse(z, t, state.residual[: len(z)], frame_mask_BT=mask)


def _rows(now: Step, copies: int) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    z = np.concatenate([now.z_in] * copies)
    mask = None if now.active is None else np.concatenate([now.active] * copies)
    return z, np.full(len(z), now.t * SCALE), mask


# The leap: by the cosine of this velocity and the one before.


def cosines(state: State, now: Step) -> np.ndarray:
    past, cosine = state.past, np.full(len(now.v), np.nan)
    if past is None:
        return cosine
    if state.case.leap_mode == "released":
        here, before = now.v[0, 0, :, :, 0], past.v[0, 0, :, :, 0]
        norms = np.linalg.norm(here, axis=1) * np.linalg.norm(before, axis=1)
        return np.full(len(now.v), np.mean(np.sum(here * before, axis=1) / norms))
    for b in range(len(now.v)):
        if not now.restarts and now.full and past.full:
            frames = slice(None) if now.active is None else now.active[b]
            here, before = now.v[b][frames], past.v[b][frames]
            norms = np.linalg.norm(here) * np.linalg.norm(before)
            cosine[b] = np.sum(here * before) / norms if norms > 0 else 0.0
    return cosine


def decide(state: State, now: Step, cosine: np.ndarray, out: Outcome) -> list[bool]:
    """Returns which samples leap in this step."""
    case, batch = state.case, len(cosine)
    if case.leap_mode == "static":
        return [now.i == case.leap_index] * batch
    if case.leap_mode == "released":
        if now.i >= 14:
            compare(state, 0, cosine[0], out)
            state.best, state.patience = state.best[:1] * batch, state.patience[:1] * batch
        return [state.patience[0] <= 0 and all(now.all_joined)] * batch
    leaps = [False] * batch
    if case.leap_mode == "dynamic":
        if now.restarts:
            state.best, state.patience = [-1.0] * batch, [case.patience] * batch
        first = max(1, math.ceil(round(case.min_share * len(case.times), 6)) - 1)
        for b in range(batch):
            if now.i >= first and not np.isnan(cosine[b]) and now.all_joined[b] and not now.joins[b].any():
                compare(state, b, cosine[b], out)
                leaps[b] = state.patience[b] <= 0
    return leaps


def compare(state: State, b: int, cosine: float, out: Outcome) -> None:
    """A cosine that beats the best so far restores patience; any other one uses it up."""
    excess = cosine - state.best[b] - state.case.tolerance
    out.near_ties += not state.done[b] and abs(excess) < TIE
    if excess > 0:
        state.best[b], state.patience[b] = cosine, state.case.patience
    else:
        state.patience[b] -= 1


def _start_of_best(case: Case) -> float:
    return 0.0 if case.leap_mode == "released" else -1.0


# Solvers: Euler's step, and what a solver adds to it.


def moved(state: State, now: Step, leaps: bool, b: int, second: np.ndarray | None) -> np.ndarray:
    """Returns sample b after the step: to the next time, or to 0 where it leaps."""
    case, past, v = state.case, state.past, now.v[b]
    end = 0.0 if leaps else now.t_next
    z = now.z_in[b] + (now.t - end) * v
    if second is not None and not leaps:
        return z + (now.t - end) / 2 * (second[b] - v)
    if past is None or not _has_history(state, now):
        return z
    correction = np.zeros_like(v)
    if case.extrapolate if leaps else case.solver == "ab2":
        correction = (now.t - end) ** 2 / (2 * (past.t - now.t)) * (v - past.v[b])
    elif not leaps and case.solver == "dpmpp" and end > 0 and past.t < 1:
        data, data_before = now.z_in[b] + now.t * v, past.z_in[b] + past.t * past.v[b]
        ratio = (log_snr(end) - log_snr(now.t)) / (2 * (log_snr(now.t) - log_snr(past.t)))
        correction = (1 - end / now.t) * ratio * (data - data_before)
    z[~now.joins[b]] += correction[~now.joins[b]]
    return z


def _has_history(state: State, now: Step) -> bool:
    """Says whether the step before may be used: one that holds a velocity has none of its own."""
    holds = state.case.codes is not None and state.case.keep == "velocity"
    return not now.restarts and (not holds or (now.full and state.past is not None and state.past.full))


def log_snr(t: float) -> float:
    return math.log((1 - t) / t)


def heun_velocity(state: State, now: Step, leaps: list[bool]) -> np.ndarray | None:
    """Returns the velocity at Euler's end of the step; None where nothing needs it."""
    if state.case.solver != "heun" or now.t_next == 0 or all(np.asarray(state.done) | leaps):
        return None
    end = dataclasses.replace(now, z_in=now.z_in + (now.t - now.t_next) * now.v, t=now.t_next)
    return guided(state, keeping(state, end, 1 if state.case.guidance is None else 2)[0])
