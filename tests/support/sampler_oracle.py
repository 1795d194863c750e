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

FULL, REUSE, HALF, AFTER_HALF, ONE, REUSE_ONE, STILL = range(7)
COST = {FULL: 1.0, HALF: 0.5, ONE: 0.5}
TIE = 2e-6
SHARE = 0.25  # of the first block in an evaluation
NO_RULE, PROTECTED, RESTARTED, JOINS, CHANGED, BELOW = range(6)
SCALE = 1000  # the time of pure noise


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

    def modulated_input(self, z: Any, t_B: Any, *, frame_mask_BT: Any) -> Any:
        return z * (1 + _frame_times(z, t_B, frame_mask_BT))

    def first_block(self, z: Any, t_B: Any, *, frame_mask_BT: Any, merged: bool) -> tuple[Any, Any]:
        xp, tau = _library(z), _frame_times(z, t_B, frame_mask_BT)
        y = xp.repeat((z[:, 0::2] + z[:, 1::2]) / 2, 2, axis=1) if merged else z
        added = 0.3 * xp.sin(y + self.bias_R[: len(z)][:, None, None, None, None] + tau)
        return z + added, added

    def rest(self, z: Any, t_B: Any, tokens: Any, *, frame_mask_BT: Any, merged: bool) -> tuple[Any, Any]:
        v, residual = self.evaluate_keeping(z, t_B, frame_mask_BT=frame_mask_BT, merged=merged)
        return v, residual - (tokens - z)

    def first_block_share(self) -> float:
        return SHARE

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
