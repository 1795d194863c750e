"""A plain Python sampler, written from the rules and sharing no code with the compiled sampler.

    for every step:  join frames, evaluate, compare with the step before, decide the leap, move, remember

Invariant: eager numpy in float64, one sample at a time where decisions are per sample; schedules, plans and leaps are read
as plain numbers.  ``near_ties`` counts comparisons that float32 may decide either way.
Evaluations are in `oracle_evaluation`, the velocity in `oracle_velocity`.
"""

import dataclasses
import math

import numpy as np

from tests.support.oracle_evaluation import evaluate, guided, is_guided, keeping
from tests.support.oracle_state import STILL, Case, Outcome, State, Step
from tests.support.oracle_velocity import SCALE, Wavy

TIE = 2e-6


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
        correct(state, now)
        second = heun_velocity(state, now, leaps)
        for b in range(batch):
            if not state.done[b]:
                frames = slice(None) if now.active is None else now.active[b]
                state.z[b][frames] = moved(state, now, leaps[b], b, second)[frames]
                out.evaluations[b] += cost * (1 + (second is not None and not leaps[b]))
                out.leapt_at[b] = i if leaps[b] and i + 1 < num_steps else None
                state.done[b] = leaps[b] or i + 1 == num_steps
        out.costs.append(cost * (1 + (second is not None)))
        out.kinds.append(now.kind)
        out.changes.append(now.change)
        out.whys.append(now.why)
        out.merged.append(now.merged)
        out.cosines.append(cosine)
        state.past, state.noisy = now, now.active
    out.near_ties += state.ties
    return out


# Frames: one of weight w joins at the first time t <= w, re-noised to it.


def joined(state: State, i: int) -> Step:
    case, times = state.case, [*state.case.times.astype(np.float64) / SCALE, 0.0]
    guided = is_guided(case, i)
    switches = i in (case.merge_steps, case.zero_steps) or (i > 0 and guided != is_guided(case, i - 1))
    now = Step(
        i=i,
        t=times[i],
        t_next=times[i + 1],
        merged=case.merge_steps is not None and i < case.merge_steps,
        guided=guided,
        restarts=i == 0 or switches,
        z_in=state.z.copy(),
        active=None,
        joins=np.zeros(state.z.shape[:2], bool),
        past=state.past,
        all_joined=[True] * len(state.z),
    )
    if case.weights is not None and case.noise is not None:
        now.active = case.weights * np.float32(SCALE) >= case.times[i]
        now.joins = now.active & ~state.noisy
        noise = case.noise[i].astype(np.float64)
        now.z_in[now.joins] = (1 - now.t) * now.z_in[now.joins] + now.t * noise[now.joins]
        now.all_joined = (now.active | (case.weights <= 0)).all(axis=1).tolist()
    return now


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


# Solvers: how far back one may look, the start it corrects, and its step.


def correct(state: State, now: Step) -> None:
    """Sets the step's age, and the latents that the solver starts from."""
    past, batch = now.past, len(now.v)
    usable = past is not None and not now.restarts
    if state.case.codes is not None and state.case.keep == "velocity":
        usable = usable and now.full and past is not None and past.full  # one that is held has no time of its own
    now.age = np.where(usable & ~now.joins, 1 + (0 if past is None else past.age), 0)
    now.base = now.z_in.copy()
    for b, frame in np.ndindex(batch, now.joins.shape[1]):
        at, age = (b, frame), now.age[b, frame]
        if past is not None and state.case.solver == "unipc" and age > 0:
            now.base[at] = unic(now, past, at) if age > 1 else half_way(now, past, at)
        if past is not None and state.case.solver == "ab3" and age == 1:
            now.base[at] += (past.t - now.t) / 2 * (now.v[at] - past.v[at])


def moved(state: State, now: Step, leaps: bool, b: int, second: np.ndarray | None) -> np.ndarray:
    """Returns sample b after the step: to the next time, or to 0 where it leaps."""
    case, t, end, past = state.case, now.t, 0.0 if leaps else now.t_next, now.past
    z = now.z_in[b] + (t - end) * now.v[b]
    if leaps and not case.extrapolate:
        return z
    if second is not None and not leaps:
        return z + (t - end) / 2 * (second[b] - now.v[b])
    for frame in np.flatnonzero(now.age[b]):
        at = b, frame
        assert past is not None
        if leaps or case.solver == "ab2":
            z[frame] = now.z_in[at] + adams([now, past], at, end)
        elif case.solver == "ab3":
            steps = [now, past, past.past][: now.age[at] + 1]
            z[frame] = now.base[at] + adams(steps, at, end)
        elif case.solver in ("dpmpp", "unipc"):
            start = now.base[at] if case.solver == "unipc" else now.z_in[at]
            z[frame] = end / t * start + (1 - end / t) * (data(now, at) + data_ahead(now, past, at, end))
    return z


def adams(steps: list[Step], at: tuple[int, int], end: float) -> np.ndarray:
    """Returns the integral, from the first step's time to ``end``, of the polynomial through the steps' velocities."""
    total = np.zeros_like(steps[0].v[at])
    for step in steps:
        others = [other.t for other in steps if other is not step]
        lagrange = np.polynomial.Polynomial.fromroots(others) / np.prod(step.t - np.asarray(others))
        primitive = lagrange.integ()
        total += (primitive(steps[0].t) - primitive(end)) * step.v[at]
    return total


def data(step: Step, at: tuple[int, int]) -> np.ndarray:
    """Returns where the step's velocity leads by time 0."""
    return step.z_in[at] + step.t * step.v[at]


def data_ahead(now: Step, past: Step, at: tuple[int, int], end: float) -> np.ndarray | float:
    """Returns by how much the data changes half-way to ``end``, linear in log-SNR; 0 where that is infinite."""
    if end == 0 or past.t == 1:
        return 0.0
    return (log_snr(end) - log_snr(now.t)) / (log_snr(now.t) - log_snr(past.t)) / 2 * (data(now, at) - data(past, at))


def half_way(now: Step, past: Step, at: tuple[int, int]) -> np.ndarray:
    """Returns UniC's corrected latents of order 1: data half-way between the two steps."""
    ratio = now.t / past.t
    return ratio * past.base[at] + (1 - ratio) * (data(now, at) + data(past, at)) / 2


def unic(now: Step, past: Step, at: tuple[int, int]) -> np.ndarray:
    """Returns UniC's of order 2: sigma_t (z / sigma + integral of e^l P(l)), P the parabola through three data."""
    older = past.past
    assert older is not None
    nodes = [now, past] if older.t == 1 else [now, past, older]
    start, stop = log_snr(past.t), log_snr(now.t)
    l_n, weight_n = np.polynomial.legendre.leggauss(30)
    l_n = (start + stop) / 2 + (stop - start) / 2 * l_n
    integral = np.zeros_like(now.v[at])
    for node in nodes:
        others = [log_snr(other.t) for other in nodes if other is not node]
        lagrange = np.prod([(l_n - other) / (log_snr(node.t) - other) for other in others], axis=0)
        integral += np.sum(weight_n * np.exp(l_n) * lagrange) * (stop - start) / 2 * data(node, at)
    return now.t * (past.base[at] / past.t + integral)


def log_snr(t: float) -> float:
    return math.log((1 - t) / t)


def heun_velocity(state: State, now: Step, leaps: list[bool]) -> np.ndarray | None:
    """Returns the velocity at Euler's end of the step; None where nothing needs it."""
    if state.case.solver != "heun" or now.t_next == 0 or now.kind == STILL or all(np.asarray(state.done) | leaps):
        return None
    end = dataclasses.replace(now, z_in=now.z_in + (now.t - now.t_next) * now.v, t=now.t_next)
    if state.case.guidance is None or not now.guided:
        return keeping(state, end, 1)[0]
    return guided(state, end, *np.split(keeping(state, end, 2)[0], 2))
