"""Tuning: which way of sampling comes closest to the exact flow of a model with so many evaluations.

Successive halving: every candidate samples two prompts, the better half four, the better half of these eight, and so on.  The
best reuse plans among the last are then refined (`plan_search`).  The winner and the plain ways are measured on prompts that
the search never saw, and the recipe is the best of these.  Error is the distance of the final latents to those of a fine
solution of the same model from the same noise, relative to these:
``-20 log10(|z - fine| / |fine|)`` in dB.

Invariant: a recipe is never worse on the prompts kept aside than what it was compared with.  Every measurement is a line of a
file, written when it is known, and a search that goes on takes it from there; without a time limit the same model, settings
and prompts give the same recipe.  Decoded clips are a study's business.
"""

import dataclasses
import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sora_jax import files
from sora_jax.pipeline.make_sampler import make_guidance, make_sampler, make_schedule
from sora_jax.pipeline.pipeline import Pipeline
from sora_jax.pipeline.plan_search import grown, refined
from sora_jax.pipeline.presets import Candidate, candidates, check_prompts, plain
from sora_jax.pipeline.recipe import Recipe
from sora_jax.pipeline.run import Generation
from sora_jax.pipeline.settings import Settings, from_json
from sora_jax.pipeline.velocity import Velocity
from sora_jax.process import Timings
from sora_jax.sampling.calibration import Calibration, calibrate
from sora_jax.sampling.reuse import Plan
from sora_jax.sampling.sampler import finish
from sora_jax.sampling.schedule import resolution_shift

LINES = "tune.jsonl"  # of a folder: what was measured
FINE_STEPS, FINE_SHIFT = 128, 2.4  # of AB2, whose error falls with their square
PLAN_STEPS = 30
_REFINED_PLANS = 2
_RESOLVED_DB = 30.0  # half as many fine steps come at least as close, or the prompt measures nothing
_SLACK = 1e-3  # evaluations are sums of binary fractions
_FAR_BEYOND = 1.25  # times the evaluations allowed: no second prompt makes up for it


class OutOfTime(Exception):
    """The time limit has passed."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measured:
    """One sampling of one prompt."""

    error_db: float
    evaluations: float
    seconds: float
    bytes_read: int | None


class Tuning:
    """A model, its prompts, and the file of what was measured.

    Args:
      pipeline: the model.
      settings: size, length, guidance, seed and dtype; how steps are taken is searched.
      prompts: captions, at least `presets.LEAST_PROMPTS`; the last third is kept for the final measurement.
      folder: where ``tune.jsonl`` and the fine solutions lie.
      note: called with a line for people.
      seconds: time limit of the search; None: none.

    Raises:
      ValueError: too few prompts, or the folder belongs to other settings or holds a damaged file.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        settings: Settings,
        prompts: Sequence[str],
        folder: Path,
        *,
        note: Callable[[str], None] = lambda line: None,
        seconds: float | None = None,
    ):
        check_prompts(prompts, "tuning")
        self.pipeline, self.settings, self.prompts, self.note = pipeline, settings, prompts, note
        self.until = self.deadline = math.inf if seconds is None else time.monotonic() + seconds
        first_held = len(prompts) - len(prompts) // 3
        self.searched, self.held_out = [*range(first_held)], [*range(first_held, len(prompts))]
        self._lines, self._fine_path = folder / LINES, folder / "tune-fine.npz"
        self._known = self._read_lines()
        self._generation = Generation(pipeline.networks, pipeline.tokenizer, settings, Timings(), None)
        self._shift = float(
            resolution_shift(height_px=settings.height, width_px=settings.width, num_frames=settings.num_frames)
        )
        self._plans: dict[tuple[int, float], Any] = {}
        self._plans_found: dict[int, Candidate] = {}
        self._fine_db: list[float] = []

    def recipes(self, evaluations: Sequence[int]) -> Iterator[Recipe]:
        """Yields the recipe of every number of evaluations, fewest first; what is measured on the way is kept."""
        with self._prepared():
            self._leave_out_unresolved()
            for left, count in zip(range(len(evaluations), 0, -1), sorted(evaluations), strict=True):
                now = time.monotonic()
                self.deadline = now + (self.until - now) / left
                yield self._recipe(count)

    @contextmanager
    def _prepared(self) -> Iterator[None]:
        """Holds the transformer, and sets the velocity, the noise and the fine solution of every prompt."""
        samples = self.pipeline.read(list(self.prompts), self.settings)
        captions, mask, z, _ = self._generation.prepare(samples)
        with self._generation.transformer() as stdit3:
            self._velocities = [
                self._generation.velocity(stdit3, captions[i : i + 1], mask[i : i + 1]) for i in range(len(samples))
            ]
            self._noise = [jnp.asarray(z[i : i + 1]) for i in range(len(samples))]
            self._fine = self._fine_solutions()
            yield

    def _recipe(self, count: int) -> Recipe:
        ranked = self._search(candidates(count, own_shift=self._shift, settings=self.settings), count)
        found = self._best_refined(ranked, count)
        rows = {
            each: [self._measure(each, i, count) for i in self.held_out]
            for each in (found, *(each for each in plain(count, own_shift=self._shift) if each.options != found.options))
        }
        errors = {each: np.asarray([one.error_db for one in row]) for each, row in rows.items()}
        best = max(rows, key=lambda each: self._mean(each, self.held_out, count))  # the first of equals
        if best is not found:
            self.note(f"{count} evaluations: on the prompts kept aside, {best.name} beats {found.name}, and is the recipe")
        row = rows[best]
        return Recipe(
            model=self.pipeline.model_id,
            height=self.settings.height,
            width=self.settings.width,
            num_frames=self.settings.num_frames,
            evaluations=count,
            options=self._spelt(best),
            measured={
                "name": best.name,
                "error_db": round(float(np.mean(errors[best])), 4),
                "error_db_range": [float(errors[best].min()), float(errors[best].max())],
                "search_found": found.name,
                "prompts_measured": len(row),
                "prompts_searched": len(self.searched),
                "evaluations": float(np.mean([one.evaluations for one in row])),
                "seconds": float(np.median([one.seconds for one in row])),
                "bytes_read": None if row[0].bytes_read is None else max(one.bytes_read or 0 for one in row),
                "fine": f"{FINE_STEPS} steps of AB2",
                "fine_error_db": round(min(self._fine_db[i] for i in self.held_out), 4),
                "guidance": self.settings.guidance,
                "device": jax.devices()[0].device_kind,
            },
            compared=[_compared(each.name, errors[best], other) for each, other in errors.items() if each is not best],
        )

    def _search(self, pool: Sequence[Candidate], count: int) -> list[Candidate]:
        """Returns the candidates left after successive halving, or at the end of the time those measured most, best first."""
        taken = 2
        try:
            while True:
                asked = self.searched[:taken]
                means = {each: self._mean(each, asked, count) for each in pool}
                ranked = sorted(pool, key=lambda each: (-means[each], each.name))
                self.note(f"{count} evaluations, {len(asked)} prompts: {ranked[0].name}, {means[ranked[0]]:.2f} dB")
                if taken >= len(self.searched):
                    return ranked
                pool, taken = ranked[: max(2, math.ceil(len(ranked) / 2))], 2 * taken
        except OutOfTime:
            known = {each: [(each.name, i) in self._known.get(count, {}) for i in self.searched] for each in pool}
            most = max(sum(row) for row in known.values())
            if not most:
                raise ValueError("the time limit passed before anything was measured; give more --minutes.") from None
            pool = [each for each in pool if sum(known[each]) == most]
            prompts = [i for i in self.searched if known[pool[0]][i]]
            return sorted(pool, key=lambda each: (-self._mean(each, prompts, count), each.name))

    def _best_refined(self, ranked: Sequence[Candidate], count: int) -> Candidate:
        """Returns the first way, or a reuse plan that local search brought nearer, as far as time allows.

        It begins at the best plans of the search, and at the best one for fewer evaluations with some more.
        """
        best = ranked[0]
        planned = [each for each in ranked if each.planned is not None][:_REFINED_PLANS]
        fewer = [self._plans_found[less] for less in sorted(self._plans_found) if less < count]
        try:
            for base in (*planned, *fewer[-1:]):
                found = self._refined(base, count)
                best = max(best, found, key=lambda each: self._mean(each, self.searched, count))
                self.note(f"{count} evaluations, refined: {best.name}, {self._mean(best, self.searched, count):.2f} dB")
        except OutOfTime:
            self.note(f"{count} evaluations: the time is over before every plan was refined")
        if "plan" in best.options:
            self._plans_found[count] = best
        return best

    def _refined(self, base: Candidate, count: int) -> Candidate:
        """Returns a way like ``base`` with the plan of ``count`` evaluations that local search finds from its own one on."""
        options, guided = self._spelt(base), self.settings.guided
        kind = base.name.partition(":")[0]

        def way(codes: Sequence[int]) -> Candidate:
            plan = {**options["plan"], "codes": list(codes), "halves": guided}
            return Candidate(name=f"{kind}: {Plan(codes=tuple(codes)).letters}", options={**options, "plan": plan})

        def error_db(codes: tuple[int, ...], prompts: int) -> float:
            return self._mean(way(codes), self.searched[:prompts], count)

        num_prompts = len(self.searched)
        codes = grown(options["plan"]["codes"], error_db, evaluations=count, num_prompts=num_prompts)
        return way(refined(codes, error_db, num_prompts=num_prompts, halves=guided))

    def _mean(self, candidate: Candidate, prompts: Sequence[int], count: int) -> float:
        """Returns the mean error in dB; -inf where it costs more than allowed."""
        rows = []
        for i in prompts:
            rows.append(self._measure(candidate, i, count))
            if rows[-1].evaluations > _FAR_BEYOND * count:
                return -math.inf
        if np.mean([row.evaluations for row in rows]) > count + _SLACK:
            return -math.inf
        return float(np.mean([row.error_db for row in rows]))

    def _measure(self, candidate: Candidate, prompt: int, count: int) -> Measured:
        known = self._known.setdefault(count, {})
        if (candidate.name, prompt) not in known:
            if prompt in self.searched and time.monotonic() > self.deadline:
                raise OutOfTime
            options = {name: from_json(name, value) for name, value in self._spelt(candidate).items()}
            known[candidate.name, prompt] = measured = self._sampled(dataclasses.replace(self.settings, **options), prompt)
            line = {"count": count, "name": candidate.name, "prompt": prompt, **dataclasses.asdict(measured)}
            with self._lines.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        return known[candidate.name, prompt]

    def _sampled(self, settings: Settings, prompt: int) -> Measured:
        """Returns what sampling a prompt by some settings comes to."""
        networks, dtype = self.pipeline.networks, settings.dtype
        sampler = make_sampler(self._velocities[prompt], settings)
        start = jax.block_until_ready(sampler.run(sampler.start(self._noise[prompt]), 0))  # compiles
        before, began = networks.bytes_read(dtype), time.perf_counter()
        result = finish(jax.block_until_ready(sampler.run(start, settings.num_steps)))
        seconds, after = time.perf_counter() - began, networks.bytes_read(dtype)
        return Measured(
            error_db=_closeness(np.asarray(result.z), self._fine[prompt]),
            evaluations=result.batch_evaluations,
            seconds=round(seconds, 4),
            bytes_read=None if before is None or after is None else after - before,
        )

    def _spelt(self, candidate: Candidate) -> dict[str, Any]:
        """Returns a candidate's options, JSON-ready, with the plan that a calibration gives."""
        options = dict(candidate.options)
        if candidate.planned is not None:
            plan = self._calibration(options.get("shift", 1.0)).plan(candidate.planned)
            options |= {"plan": {"codes": list(plan.codes), "keep": plan.keep}, "num_steps": len(plan.codes)}
        return options

    def _calibration(self, shift: float) -> Any:
        """Returns the measured cost of reuse at shifted times, along the first searched prompt."""
        key = (PLAN_STEPS, round(shift, 6))
        path = self._lines.with_name(f"tune-reuse-{shift:.4g}.npz")
        if key not in self._plans and path.exists():
            self._plans[key] = Calibration(error_NN=np.load(path)["error_NN"], keep="residual")
        if key not in self._plans:
            settings = dataclasses.replace(self.settings, num_steps=PLAN_STEPS, shift=shift)
            guidance = make_guidance(settings)
            found = calibrate(self._velocities[0], self._noise[0], make_schedule(settings), guidance=guidance)
            with files.whole_file(path, overwrite=True) as temporary, temporary.open("wb") as file:
                np.savez(file, error_NN=found.error_NN)
            self._plans[key] = found
        return self._plans[key]

    def _fine_solutions(self) -> list[np.ndarray]:
        """Returns the latents of every prompt by many small steps, and by half as many; each computed once."""
        fine, self._fine_db = [], []
        if self._fine_path.exists():
            with np.load(self._fine_path) as record:
                fine, self._fine_db = list(record["fine"]), record["fine_db"].tolist()
        for velocity, noise in list(zip(self._velocities, self._noise, strict=True))[len(fine) :]:
            whole, half = (self._fine_solution(velocity, noise, steps) for steps in (FINE_STEPS, FINE_STEPS // 2))
            fine.append(whole)
            self._fine_db.append(_closeness(half, whole))
            self.note(f"fine solution {len(fine)} of {len(self.prompts)}: half as many steps reach {self._fine_db[-1]:.1f} dB")
            with files.whole_file(self._fine_path, overwrite=True) as temporary, temporary.open("wb") as file:
                np.savez(file, fine=np.stack(fine), fine_db=np.asarray(self._fine_db))
        return fine

    def _fine_solution(self, velocity: Velocity, noise: jax.Array, steps: int) -> np.ndarray:
        options = plain(steps, own_shift=self._shift)[-1].options
        settings = dataclasses.replace(self.settings, **{**options, "shift": max(1.0, FINE_SHIFT / self._shift)})
        sampler = make_sampler(velocity, settings)
        return np.asarray(sampler.run(sampler.start(noise), steps).z)

    def _leave_out_unresolved(self) -> None:
        """Leaves out prompts whose fine solution has not converged.

        Raises:
          ValueError: too few are left to search or to measure with.
        """
        for kept in (self.searched, self.held_out):
            lost = [i for i in kept if self._fine_db[i] < _RESOLVED_DB]
            for i in lost:
                kept.remove(i)
                self.note(f"{self.prompts[i]!r} is left out: {FINE_STEPS // 2} and {FINE_STEPS} steps differ too much")
            if len(kept) < 2:
                raise ValueError(
                    f"the fine solutions of {len(lost)} prompts have not converged, and {len(kept)} are left where 2 are "
                    "needed; give more prompts."
                )

    def _read_lines(self) -> dict[int, dict[tuple[str, int], Measured]]:
        """Returns what is known already; a torn last line is dropped."""
        of = {
            "model": self.pipeline.model_id,
            "settings": {name: getattr(self.settings, name) for name in ("guidance", "seed", "height", "width", "num_frames")},
            "dtype": self.settings.dtype,
            "prompts": hashlib.sha256("\n".join(self.prompts).encode()).hexdigest(),
        }
        text = self._lines.read_text(encoding="utf-8") if self._lines.exists() else ""
        whole = text[: text.rfind("\n") + 1]
        if not whole:
            whole = json.dumps(of) + "\n"
        if whole != text:
            self._lines.parent.mkdir(parents=True, exist_ok=True)
            files.write_text(self._lines, whole, overwrite=True)
        known: dict[int, dict[tuple[str, int], Measured]] = {}
        try:
            first, *lines = map(json.loads, whole.splitlines())
            for line in lines:
                count, at = line.pop("count"), (line.pop("name"), line.pop("prompt"))
                known.setdefault(count, {})[at] = Measured(**line)
        except (ValueError, TypeError, KeyError, AttributeError):
            raise ValueError(f"{self._lines} is damaged; remove it, or choose another folder.") from None
        if first != of:
            raise ValueError(f"{self._lines} is of another model, other settings or other prompts; choose another folder.")
        return known


def _closeness(z: np.ndarray, fine: np.ndarray) -> float:
    """Returns by how many dB the distance to the fine latents lies below their size."""
    ratio = float(np.linalg.norm(z - fine) / np.linalg.norm(fine))
    return round(-20 * math.log10(max(ratio, 1e-9)), 4)


def _compared(name: str, best: np.ndarray, other: np.ndarray) -> dict[str, Any]:
    """Returns how far a method stays behind the best one on the same prompts."""
    ahead = best - other
    return {
        "name": name,
        "error_db": round(float(np.mean(other)), 4),
        "behind_db": round(float(np.mean(ahead)), 4),
        "standard_error_db": round(float(np.std(ahead, ddof=1) / math.sqrt(len(ahead))), 4),
    }
