"""Cost of the sampler's bookkeeping, and time that fewer evaluations save.

Command:  python -m benchmarks.speed.sampler_overhead [--pairs 10]
Expect:   at most 0.2 ms a step for cosine, leap rule, plan and trace at latents of 20x32x32x4; 16 of 30 evaluations of the
          embedded model at least 1.80 times as fast as 30 (denoising, median of interleaved pairs).
Rival:    for the bookkeeping a bare loop of Euler steps over the same velocity; for the evaluations the plain sampling.

The velocity of the first part costs next to nothing, so that what is left is the sampler.  Runs alternate; the second part
counts denoising alone, with programs that are compiled already.
"""

import argparse
import functools
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks._support.interleaved import interleaved
from benchmarks._support.machine import environment, write_report
from sora_jax import Leap, Pipeline, Plan, Schedule
from sora_jax.sampling import noise
from sora_jax.sampling.sampler import Sampler

RESULTS = Path(__file__).parents[1] / "results" / "sampler_overhead.json"
SHAPE = (1, 20, 32, 32, 4)
STEPS = 30
PROMPT = "a red circle moves right on a blue background"


def main() -> None:
    """Measures both parts, prints and writes them."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed.sampler_overhead", description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--model", type=Path, help="default: the embedded model")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    before = environment()
    report = {
        "environment": before,
        "bookkeeping": bookkeeping(options.pairs),
        "evaluations": evaluations(options.model, options.pairs),
        "load_after": environment()["load"],
    }
    write_report(report, options.out, show=True)


def bookkeeping(pairs: int) -> dict[str, Any]:
    """Returns milliseconds a step of the bare loop, and what each kind of sampling adds to it."""
    z, schedule = jnp.asarray(noise.initial_noise(0, SHAPE)), Schedule.uniform(STEPS)
    kinds: dict[str, dict[str, Any]] = {
        "plain": {},
        "dynamic leap": {"leap": Leap.dynamic(patience=STEPS)},  # which never leaps
        "AB2": {"solver": "ab2"},
        "plan": {"plan": Plan.evaluate_at(range(STEPS), STEPS, keep="velocity")},
        "AB2, plan, dynamic leap": {
            "solver": "ab2",
            "plan": Plan.evaluate_at(range(STEPS), STEPS, keep="velocity"),
            "leap": Leap.dynamic(patience=STEPS),
        },
    }
    runs: dict[str, Callable[[], Any]] = {"bare loop": functools.partial(bare, z, jnp.asarray(schedule.visited))}
    for name, options in kinds.items():
        sampler = Sampler.create(drift, schedule, **options)
        runs[name] = functools.partial(sampler.run, sampler.start(z), STEPS)
    times = interleaved(runs, 10 * pairs)
    report: dict[str, Any] = {"shape": SHAPE}
    for kind, statistic in {"median": statistics.median, "min": min}.items():
        per_step = {name: 1e3 * statistic(seconds) / STEPS for name, seconds in times.items()}
        added = {name: round(value - per_step["bare loop"], 4) for name, value in per_step.items() if name != "bare loop"}
        report[kind] = {"bare_ms_a_step": round(per_step["bare loop"], 4), "added_ms_a_step": added}
    return report


def drift(z: jax.Array, t_B: jax.Array) -> jax.Array:
    """Returns a velocity that is one multiplication."""
    return z * -0.5


@jax.jit
def bare(z: jax.Array, times: jax.Array) -> jax.Array:
    """Returns the end of plain Euler steps in a while loop, without any record."""
    padded = jnp.append(times, 0.0) / 1000

    def step(carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        i, z = carry
        return i + 1, z + drift(z, padded[i][None]) * (padded[i] - padded[i + 1])

    return jax.lax.while_loop(lambda carry: carry[0] < len(times), step, (jnp.asarray(0), z))[1]


def evaluations(model: Path | None, pairs: int) -> dict[str, Any]:
    """Returns seconds of denoising with 30 and with 16 evaluations of 30 steps, and how many times faster that is."""
    pipe = Pipeline.from_pretrained(model)
    seconds: dict[int, list[float]] = {STEPS: [], 16: []}
    made: dict[int, float] = {}
    for pair in range(pairs + 1):
        for count, found in seconds.items():
            clip = pipe(PROMPT, num_steps=STEPS, leap=count - 1)  # the leap of the last step leads where it would go anyway
            made[count] = float(np.asarray(clip.evaluations_B)[0])
            if pair:  # the first one compiles
                found.append(clip.timings["denoise"])
    gains = [full / fewer for full, fewer in zip(seconds[STEPS], seconds[16], strict=True)]
    return {
        "evaluations": made,
        "seconds_median": {count: round(statistics.median(found), 4) for count, found in seconds.items()},
        "times_faster": {
            "median": round(statistics.median(gains), 3),
            "min": round(min(gains), 3),
            "max": round(max(gains), 3),
        },
        "by_evaluations": STEPS / 16,
        "pairs": pairs,
    }


if __name__ == "__main__":
    main()
