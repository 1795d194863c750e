"""Cost of the sampler's bookkeeping, and time that fewer evaluations save.

Command:  python -m benchmarks.speed.sampler_overhead [--pairs 10]
          python -m benchmarks.speed.sampler_overhead --counted      what can be counted on a busy machine
Expect:   at most 0.2 ms a step for cosine, leap rule, plan and trace at latents of 20x32x32x4; 16 of 30 evaluations of the
          embedded model at least 1.80 times as fast as 30 (denoising, median of interleaved pairs).  Counted: the same limit
          holds for the processor time of all threads, which other programs on the machine do not add to.
Rival:    for the bookkeeping a bare loop of Euler steps over the same velocity; for the evaluations the plain sampling.

The velocity of the first part costs next to nothing, so that what is left is the sampler.  Runs alternate; the second part
counts denoising alone, with programs that are compiled already.
"""

import argparse
import dataclasses
import functools
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks._support.interleaved import interleaved
from benchmarks._support.machine import environment, write_report
from sora_jax import Guidance, Leap, Pipeline, Plan, Reuse, Schedule
from sora_jax.sampling import noise
from sora_jax.sampling.sampler import Sampler
from sora_jax.sampling.sampler import _run as run_program

RESULTS = Path(__file__).parents[1] / "results" / "sampler_overhead.json"
COUNTED = RESULTS.with_name("sampler_overhead_counted.json")
SHAPE = (1, 20, 32, 32, 4)
STEPS = 30
PROMPT = "a red circle moves right on a blue background"


def main() -> None:
    """Measures both parts, prints and writes them."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed.sampler_overhead", description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--model", type=Path, help="default: the embedded model")
    parser.add_argument("--counted", action="store_true", help="processor time and operations of the bookkeeping alone")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    before = environment()
    if options.counted:
        command = " ".join(["python -m benchmarks.speed.sampler_overhead", "--counted"])
        report = {"command": command, "environment": before, **counted(20 * options.pairs)}
        write_report(report, options.out or COUNTED, show=True)
        return
    report = {
        "environment": before,
        "bookkeeping": bookkeeping(options.pairs),
        "evaluations": evaluations(options.model, options.pairs),
        "load_after": environment()["load"],
    }
    write_report(report, options.out or RESULTS, show=True)


def bookkeeping(pairs: int) -> dict[str, Any]:
    """Returns milliseconds a step of the bare loops, and what each kind of sampling adds to its own."""
    z, schedule = jnp.asarray(noise.initial_noise(0, SHAPE)), Schedule.uniform(STEPS)
    times_N = jnp.asarray(schedule.visited)
    runs: dict[str, Callable[[], Any]] = {name: functools.partial(bare, z, times_N, rows=rows) for name, rows in BARE.items()}
    for name, options in ALL_KINDS.items():
        sampler = _sampler(options, schedule)
        runs[name] = functools.partial(sampler.run, sampler.start(z), STEPS)
    times = interleaved(runs, 10 * pairs)
    report: dict[str, Any] = {"shape": SHAPE}
    for kind, statistic in STATISTICS.items():
        per_step = {name: 1e3 * statistic(seconds) / STEPS for name, seconds in times.items()}
        bare_ms = {name: round(per_step[name], 4) for name in BARE}
        added = {name: round(per_step[name] - per_step[_rival(options)], 4) for name, options in ALL_KINDS.items()}
        report[kind] = {"bare_ms_a_step": bare_ms, "added_ms_a_step": added}
    return report


def counted(repeats: int) -> dict[str, Any]:
    """Returns for each kind of sampling the processor time and the compiled work of a step, both beyond a bare loop's.

    Guided samplings evaluate two rows, so theirs is the bare loop over two rows.
    """
    z, schedule = jnp.asarray(noise.initial_noise(0, SHAPE)), Schedule.uniform(STEPS)
    times = jnp.asarray(schedule.visited)
    runs: dict[str, Callable[[], Any]] = {name: functools.partial(bare, z, times, rows=rows) for name, rows in BARE.items()}
    work = {name: _work(bare.lower(z, times, rows=rows)) for name, rows in BARE.items()}
    for name, options in ALL_KINDS.items():
        sampler = _sampler(options, schedule)
        start = sampler.start(z)
        runs[name] = functools.partial(sampler.run, start, STEPS)
        work[name] = _work(_lowered(sampler, start))
    seconds = processor_seconds(runs, repeats)
    found = {}
    for name, options in ALL_KINDS.items():
        rival = _rival(options)
        ms = {kind: 1e3 * each(seconds[name]) / STEPS for kind, each in STATISTICS.items()}
        found[name] = {
            "beyond": rival,
            **{
                f"ms_a_step_{kind}": round(value - 1e3 * STATISTICS[kind](seconds[rival]) / STEPS, 4)
                for kind, value in ms.items()
            },
            **{key: work[name][key] - work[rival][key] for key in work[name]},
        }
    return {"shape": SHAPE, "steps": STEPS, "repeats": repeats, "latents_bytes": z.nbytes, "bookkeeping": found}


def _sampler(options: dict[str, Any], schedule: Schedule) -> Sampler:
    return Sampler.create(Drift() if "reuse" in options else drift, schedule, **options)


def _rival(options: dict[str, Any]) -> str:
    """Returns the bare loop of as many rows; that of two has no rule of guidance but a mean."""
    return "bare loop of two rows" if "guidance" in options else "bare loop"


def processor_seconds(runs: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Returns the processor seconds of all threads of every run; the runs alternate, and the first round compiles."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(repeats + 1):
        for name, run in runs.items():
            began = time.process_time()
            jax.block_until_ready(run())
            if repeat:
                seconds[name].append(time.process_time() - began)
    return seconds


def _lowered(sampler: Sampler, start: Any) -> Any:
    """Returns the program of a run, of plain arrays: JAX describes arguments by objects that no checked dataclass takes."""
    leaves, tree = jax.tree.flatten((sampler, start, np.int32(STEPS)))
    return jax.jit(lambda leaves: run_program(*tree.unflatten(leaves))).lower(leaves)


def _work(lowered: Any) -> dict[str, int]:
    """Returns bytes and operations of a program whose loop counts once, as XLA counts them, and its copies of whole latents.

    XLA copies an array of the loop's state that takes another's place, or whose place is written before it was last read.
    """
    compiled = lowered.compile()
    analysis, text = compiled.cost_analysis(), compiled.as_text()
    shape = ",".join(map(str, SHAPE[1:]))
    copies = re.findall(rf"= f32\[\d+,{shape}\]\S* copy\(", text[: text.index("\nENTRY ")])
    return {
        "bytes_a_step": int(analysis["bytes accessed"]),
        "operations_a_step": int(analysis["flops"]),
        "copies_a_step": len(copies),
    }


def drift(z: jax.Array, t_B: jax.Array) -> jax.Array:
    """Returns a velocity that is one multiplication."""
    return z * -0.5


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Drift:
    """The same as a velocity that adaptive reuse can watch; its tokens are the latents."""

    def evaluate(self, z: Any, t_B: Any, *, frame_mask_BT: Any, merged: bool) -> Any:
        """Returns the velocity."""
        return z * -0.5

    def evaluate_keeping(self, z: Any, t_B: Any, *, frame_mask_BT: Any, merged: bool) -> Any:
        """Returns the velocity and a residual."""
        return z * -0.5, z * 0.1

    def reuse(self, z: Any, t_B: Any, residual: Any, *, frame_mask_BT: Any) -> Any:
        """Returns the velocity with a kept residual."""
        return residual * -5.0

    def modulated_input(self, z: Any, t_B: Any, *, frame_mask_BT: Any) -> Any:
        """Returns what is watched."""
        return z * 2.0

    def first_block(self, z: Any, t_B: Any, *, frame_mask_BT: Any, merged: bool) -> Any:
        """Returns tokens, and what a first block added."""
        return z * 1.1, z * 0.1

    def rest(self, z: Any, t_B: Any, tokens: Any, *, frame_mask_BT: Any, merged: bool) -> Any:
        """Returns the velocity, and what the other blocks added."""
        return tokens * -0.5, tokens * 0.1

    def first_block_share(self) -> float:
        """Returns a share."""
        return 0.1


EVERY_STEP = Plan.evaluate_at(range(STEPS), STEPS, keep="velocity")
NO_LEAP = Leap.dynamic(patience=STEPS)
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "dynamic leap": {"leap": NO_LEAP},
    "AB2": {"solver": "ab2"},
    "plan": {"plan": EVERY_STEP},
    "AB2, plan, dynamic leap": {"solver": "ab2", "plan": EVERY_STEP, "leap": NO_LEAP},
}
WATCHED: dict[str, dict[str, Any]] = {
    "AB3": {"solver": "ab3"},
    "UniPC": {"solver": "unipc"},
    "guidance": {"guidance": 3.0},
    "guidance in an interval": {"guidance": Guidance(3.0, interval=(0.0, 1.0))},
    "CFG-Zero*": {"guidance": Guidance(3.0, zero_star=True)},
    "rescaled guidance": {"guidance": Guidance(3.0, rescale=0.7)},
    "reuse by the input": {"reuse": Reuse.by_input(0.1)},
    "reuse by the first block": {"reuse": Reuse.by_first_block(0.1)},
    "reuse by the input, extrapolated": {"reuse": Reuse.by_input(0.1, extrapolate=True)},
    "everything": {
        "guidance": Guidance(3.0, interval=(0.0, 1.0), zero_star=True),
        "reuse": Reuse.by_first_block(0.1, extrapolate=True),
        "solver": "unipc",
        "leap": NO_LEAP,
    },
}
ALL_KINDS = {**KINDS, **WATCHED}
BARE = {"bare loop": 1, "bare loop of two rows": 2}
STATISTICS: dict[str, Callable[[list[float]], float]] = {"median": statistics.median, "min": min}


@functools.partial(jax.jit, static_argnames="rows")
def bare(z: jax.Array, times: jax.Array, *, rows: int = 1) -> jax.Array:
    """Returns the end of plain Euler steps in a while loop, without any record; copies of ``z`` are evaluated and averaged."""
    padded = jnp.append(times, 0.0) / 1000

    def step(carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        i, z = carry
        v = drift(jnp.tile(z, (rows, *(z.ndim - 1) * (1,))), padded[i][None])
        v = v if rows == 1 else jnp.mean(v, axis=0, keepdims=True)
        return i + 1, z + v * (padded[i] - padded[i + 1])

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
