"""A plain Python sampler and a small velocity, written from the rules and sharing no code with the compiled sampler.

Invariant: eager numpy in float64, one sample at a time where decisions are per sample; schedules, plans and leaps are read
as plain numbers.  ``near_ties`` counts comparisons that float32 may decide either way.
"""

import dataclasses
import math
from typing import Any

import numpy as np

FULL, REUSE, HALF = 0, 1, 2
TIE = 2e-6


@dataclasses.dataclass(kw_only=True)
class Case:
    """One sampling: structure (solver, leap mode, ...) and values."""

    times: np.ndarray
    solver: str = "euler"
    guidance: float | None = None
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
    z: np.ndarray
    evaluations: np.ndarray
    costs: list[float]
    leapt_at: list[int | None]
    reused: list[bool]
    merged: list[bool]
    cosines: list[np.ndarray]
    near_ties: int


def velocity(
    xp: Any,
    bias_R: Any,
    z: Any,
    t_R: Any,
    *,
    frame_mask_BT: Any = None,
    merge: bool = False,
    residual: Any = None,
    keep_residual: bool = False,
) -> Any:
    """A smooth velocity with a costly part (the residual), frame times, and a merged variant; numpy or jax.numpy."""
    rows, frames = z.shape[:2]
    tau = xp.broadcast_to((t_R / 1000)[:, None], (rows, frames))
    if frame_mask_BT is not None:
        tau = xp.where(frame_mask_BT, tau, 0.0)
    tau = tau[:, :, None, None, None]
    if residual is None:
        y = z
        if merge:
            y = xp.repeat((z[:, 0::2] + z[:, 1::2]) / 2, 2, axis=1)
        residual = xp.sin(1.3 * y + bias_R[:rows][:, None, None, None, None] + 2 * tau) * (1 + tau)
    v = residual - 0.4 * z * tau
    return (v, residual) if keep_residual else v


class _Sampling:
    def __init__(self, case: Case, z: np.ndarray, bias: np.ndarray) -> None:
        self.case, self.bias = case, bias.astype(np.float64)
        self.z = z.astype(np.float64)
        self.times = case.times.astype(np.float64)
        self.residual: Any = None
        self.difference: Any = None
        self.last_kind = FULL

    def call(self, z: np.ndarray, t: float, active: Any, copies: int, merged: bool, **options: Any) -> tuple[Any, Any]:
        if active is not None:
            options["frame_mask_BT"] = np.concatenate([active] * copies)
        if self.case.merge_steps is not None:
            options["merge"] = merged
        rows = np.concatenate([z] * copies)
        return velocity(np, self.bias, rows, np.full(len(rows), t), keep_residual=True, **options)

    def guided(self, v: np.ndarray) -> np.ndarray:
        if self.case.guidance is None:
            return v
        conditional, unconditional = np.split(v, 2)
        return unconditional + self.case.guidance * (conditional - unconditional)

    def evaluate(self, code: int, z: np.ndarray, t: float, active: Any, merged: bool, held: Any) -> tuple[np.ndarray, float]:
        both = 1 if self.case.guidance is None else 2
        keep = self.case.keep == "residual"
        if code == FULL:
            v, self.residual = self.call(z, t, active, both, merged)
            if self.case.guidance is not None:
                self.difference = v[: len(z)] - v[len(z) :]
            self.last_kind = FULL
            return self.guided(v), 1.0
        if code == HALF:
            conditional, residual = self.call(z, t, active, 1, merged)
            self.residual[: len(z)] = residual
            self.last_kind = HALF
            return conditional + (self.case.guidance - 1) * self.difference, 0.5
        if not keep:
            return held, 0.0
        if self.last_kind == HALF:
            conditional, _ = self.call(z, t, active, 1, merged, residual=self.residual[: len(z)])
            return conditional + (self.case.guidance - 1) * self.difference, 0.0
        v, _ = self.call(z, t, active, both, merged, residual=self.residual)
        return self.guided(v), 0.0


def run(case: Case, z: np.ndarray, bias: np.ndarray) -> Outcome:
    """Returns what the rules give."""
    self = _Sampling(case, z, bias)
    batch, steps = len(z), len(case.times)
    weights = None if case.weights is None else case.weights.astype(np.float32)
    noisy = None if weights is None else weights == 1
    done = [False] * batch
    out = Outcome(
        z=self.z, evaluations=np.zeros(batch), costs=[], leapt_at=[None] * batch,
        reused=[], merged=[], cosines=[], near_ties=0,
    )  # fmt: skip
    best = [0.0 if case.leap_mode == "released" else -1.0] * batch
    patience = [case.patience] * batch
    history: Any = None
    for i in range(steps):
        if all(done):
            break
        t, t_next = self.times[i] / 1000, (self.times[i + 1] if i + 1 < steps else 0.0) / 1000
        merged = case.merge_steps is not None and i < case.merge_steps
        restart = i == 0 or (case.merge_steps is not None and i == case.merge_steps)
        z_in, active, joins = self.z.copy(), None, np.zeros(z.shape[:2], bool)
        if weights is not None:
            active = weights * np.float32(1000) >= case.times[i]
            joins = active & ~noisy
            noise = case.noise[i].astype(np.float64)
            z_in[joins] = (1 - t) * z_in[joins] + t * noise[joins]
            noisy = active
        code = FULL if restart or case.codes is None else case.codes[i]
        v, cost = self.evaluate(code, z_in, self.times[i], active, merged, None if history is None else history["v"])
        full = code == FULL

        leaps = [False] * batch
        cosine = np.full(batch, np.nan)
        if history is not None:
            for b in range(batch):
                frames = slice(None) if active is None else active[b]
                here, before = v[b][frames], history["v"][b][frames]
                if case.leap_mode == "released":
                    here, before = v[0, 0, :, :, 0], history["v"][0, 0, :, :, 0]
                    norms = np.linalg.norm(here, axis=1) * np.linalg.norm(before, axis=1)
                    cosine[b] = np.mean(np.sum(here * before, axis=1) / norms)
                elif not restart and full and history["full"]:
                    norms = np.linalg.norm(here) * np.linalg.norm(before)
                    cosine[b] = np.sum(here * before) / norms if norms > 0 else 0.0
        all_joined = [True] * batch if weights is None else [bool((active[b] | (weights[b] <= 0)).all()) for b in range(batch)]
        if case.leap_mode == "static":
            leaps = [i == case.leap_index] * batch
        elif case.leap_mode == "released":
            if i >= 14:
                out.near_ties += abs(cosine[0] - best[0] - case.tolerance) < TIE
                better = cosine[0] > best[0] + case.tolerance
                best = [cosine[0] if better else best[0]] * batch
                patience = [3 if better else patience[0] - 1] * batch
            leaps = [patience[0] <= 0 and all(all_joined)] * batch
        elif case.leap_mode == "dynamic":
            if restart and i > 0:
                best, patience = [-1.0] * batch, [case.patience] * batch
            first = max(1, math.ceil(round(case.min_share * steps, 6)) - 1)
            for b in range(batch):
                if np.isnan(cosine[b]) or i < first or not all_joined[b] or joins[b].any():
                    continue
                out.near_ties += (not done[b]) and abs(cosine[b] - best[b] - case.tolerance) < TIE
                if cosine[b] > best[b] + case.tolerance:
                    best[b], patience[b] = cosine[b], case.patience
                else:
                    patience[b] -= 1
                leaps[b] = patience[b] <= 0

        usable = history is not None and not restart
        if case.codes is not None and case.keep == "velocity":
            usable = usable and full and history["full"]
        second = None
        if case.solver == "heun" and t_next > 0 and not all(d or leap for d, leap in zip(done, leaps, strict=True)):
            at_next = self.call(z_in + v * (t - t_next), t_next * 1000, active, 1 if case.guidance is None else 2, merged)[0]
            second = self.guided(at_next)
        for b in range(batch):
            if done[b]:
                continue
            end = 0.0 if leaps[b] else t_next
            moved = z_in[b] + v[b] * (t - end)
            slope = np.zeros_like(moved)
            frames_with_history = ~joins[b]
            if usable and ((leaps[b] and case.extrapolate) or (not leaps[b] and case.solver == "ab2")):
                slope = (t - end) ** 2 / (2 * (history["t"] - t)) * (v[b] - history["v"][b])
            elif usable and not leaps[b] and case.solver == "dpmpp" and t_next > 0 and history["t"] < 1:
                snr, snr_before, snr_next = (math.log((1 - s) / s) for s in (t, history["t"], t_next))
                data, data_before = z_in[b] + t * v[b], history["z_in"][b] + history["t"] * history["v"][b]
                slope = (1 - t_next / t) * (snr_next - snr) / (2 * (snr - snr_before)) * (data - data_before)
            moved[frames_with_history] += slope[frames_with_history]
            if second is not None and not leaps[b]:
                moved += (second[b] - v[b]) * (t - t_next) / 2
            frames = slice(None) if active is None else active[b]
            self.z[b][frames] = moved[frames]
            out.evaluations[b] += cost + (second is not None and not leaps[b])
            if leaps[b] and i + 1 < steps:
                out.leapt_at[b] = i
            done[b] = leaps[b] or i + 1 == steps
        out.costs.append(cost + (second is not None))
        out.reused.append(not full)
        out.merged.append(merged)
        out.cosines.append(cosine)
        history = {"v": v, "z_in": z_in, "t": t, "full": full}
    return out
