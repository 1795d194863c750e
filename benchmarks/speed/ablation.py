"""Gains of leaping, merging and streaming, alone and together, at the real width (paper's table 5).

Command:  python -m benchmarks.speed.ablation [--depth 4] [--repeats 3] [--sizes 5x8 10x12] [--rate 1200]
Needs:    2.5 GB of memory, 0.7 GB of disk; about 12 minutes on two cores with the defaults.
Expect:   leap 30 / 16 = 1.88 times; both at least the product of the two, since the steps that a leap leaves out are those
          that would not merge.
Rival:    the plain sampling of the same run: samplings alternate within each repeat, and all are compiled before the first.

STDiT3 of 1,152 channels and 16 heads with random weights and few block pairs (every pair costs the same; the embedding of
captions and the final layer weigh less in 28 pairs).  30 steps, guidance: 2 rows.  The product counts as reached where the
gain of both, divided by it, is 0.97 or more.

CI (concurrent inference): the blocks are read from files while the one before computes, at ``--rate`` MB/s and none retained;
CI and DL (dynamic loading): half of them retained; all: LPL, TDTM, CI and DL.  At 1,200 MB/s a block of 85 MB loads in 0.07 s:
longer than it computes at the first size, about as long at the second.  The paper starts from loading and computing one after
the other.  That time is not measured: it is the plain sampling's plus that of its reads at the rate.  Gains of streamed runs
are stated over it too.
"""

import argparse
import dataclasses
import functools
import json
import os
import statistics
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks._support.interleaved import interleaved
from benchmarks._support.machine import environment, write_report
from benchmarks._support.random_network import gflop, random_velocity, with_depth
from benchmarks._support.streaming_figures import LimitedReader
from sora_jax import Leap, Schedule
from sora_jax.config import STDiT3Config, open_sora_1_2
from sora_jax.pipeline.velocity import Velocity
from sora_jax.sampling import noise
from sora_jax.sampling.sampler import Sampler
from sora_jax.storage.checkpoint import flatten, save_network
from sora_jax.streaming.network import STDiT3Stream, block_bytes

RESULTS = Path(__file__).parents[1] / "results" / "ablation.json"
STEPS, LEAP_STEP, MERGED = 30, 15, 15
REACHED = 0.97

BOTH = f"LPL and TDTM {MERGED}"
STREAMED = {"none, CI": ("none", 0.0), "none, CI and DL": ("none", 0.5), "all": (BOTH, 0.5)}  # share of the blocks retained

# Name: index of the step that leaps (the last one leaps nowhere), number of merged steps.
SAMPLINGS = {
    "none": (STEPS - 1, 0),
    "LPL": (LEAP_STEP, 0),
    f"TDTM {MERGED}": (STEPS - 1, MERGED),
    f"TDTM {STEPS}": (STEPS - 1, STEPS),
    BOTH: (LEAP_STEP, MERGED),
    f"LPL and TDTM {STEPS}": (LEAP_STEP, STEPS),
}


def main() -> None:
    """Measures every size, prints and writes the results."""
    options = parse()
    if options.threads:
        os.sched_setaffinity(0, range(options.threads))
    config = with_depth(open_sora_1_2.stdit3, options.depth)
    setting = {"width": config.hidden_size, "heads": config.num_heads, "depth": config.depth}
    setting |= {"dtype": options.dtype, "rate_mb_s": options.rate, "repeats": options.repeats}
    report: dict[str, Any] = {"environment": environment(), "setting": setting, "sizes": {}}
    for size in options.sizes:
        frames, side = (int(part) for part in size.split("x"))
        report["sizes"][size] = measured(config, options.dtype, frames, side, options.repeats, rate=options.rate)
        print(size, json.dumps(report["sizes"][size], indent=1), flush=True)
    report["load_after"] = environment()["load"]
    write_report(report, options.out)


def parse() -> argparse.Namespace:
    """Returns the command line's options."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed.ablation", description=__doc__.splitlines()[0])
    parser.add_argument("--depth", type=int, default=4, help="block pairs")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--sizes", nargs="+", default=["5x8", "10x12"], metavar="FRAMESxSIDE", help="of the latents")
    parser.add_argument("--rate", type=float, default=1200, help="of reading, MB/s")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, default=0, help="cores to use; 0 takes all this process may use")
    parser.add_argument("--out", type=Path, default=RESULTS)
    return parser.parse_args()


def measured(config: STDiT3Config, dtype: str, frames: int, side: int, repeats: int, *, rate: float) -> dict[str, Any]:
    """Returns seconds and gains of every sampling, whether products of single gains are reached, and gains of streaming."""
    velocity, reader = random_velocity(config, dtype, frames=frames, side=side), LimitedReader(rate * 1e6)
    with tempfile.TemporaryDirectory() as folder:
        manifest = save_network(folder, "stdit3", config, flatten(velocity.network), dtype=dtype)
        stream = STDiT3Stream(folder, dtype=dtype, around=reader)
        with stream.open() as network:
            streamed = dataclasses.replace(velocity, network=network)
            runs, counts = samplings(velocity, config, frames, side, SAMPLINGS)
            from_files, _ = samplings(streamed, config, frames, side, {name: SAMPLINGS[name] for name in ("none", BOTH)})
            for name, (sampling, share) in STREAMED.items():
                runs[name] = functools.partial(retaining, stream, int(share * 2 * config.depth), from_files[sampling])
                counts[name] = counts[sampling]
            out = compared(runs, counts, repeats)
    loading_s = STEPS * sum(block_bytes(manifest)) / (rate * 1e6)
    in_turn = out["seconds_median"]["none"] + loading_s
    over = {name: round(in_turn / out["seconds_median"][name], 3) for name in STREAMED}
    streaming = {"load_and_compute_in_turn_s": round(in_turn, 3), "loading_s": round(loading_s, 3), "gain_over_in_turn": over}
    return {"tokens": 2 * frames * (-(-side // 2)) ** 2, **out, "streaming": streaming}


def retaining(stream: STDiT3Stream, number: int, run: Callable[[], Any]) -> Any:
    """Returns the result of a run with that number of retained blocks."""
    stream.retention.count = number
    return run()


def samplings(
    velocity: Velocity, config: STDiT3Config, frames: int, side: int, chosen: Mapping[str, tuple[int, int]]
) -> tuple[dict[str, Callable[[], Any]], dict[str, float]]:
    """Returns compiled samplings by name, all one program, and the arithmetic of each."""
    z = jnp.asarray(noise.initial_noise(0, (1, frames, side, side, 4)))
    schedule = Schedule.open_sora(STEPS, height_px=8 * side, width_px=8 * side, num_frames=4 * frames)
    runs: dict[str, Callable[[], Any]] = {}
    counts = {}
    for name, (leap, merged) in chosen.items():
        sampler = Sampler.create(velocity, schedule, guidance=7.0, leap=Leap.static(leap), merge_steps=merged)
        carry = jax.block_until_ready(sampler.run(sampler.start(z), 0))
        runs[name] = functools.partial(sampler.run, carry, STEPS)
        counts[name] = arithmetic(config, frames, side, leap + 1, merged)
    return runs, counts


def compared(runs: Mapping[str, Callable[[], Any]], counts: Mapping[str, float], repeats: int) -> dict[str, Any]:
    """Returns seconds and gains over the plain sampling, and whether leaping and merging reach their product."""
    seconds = interleaved(runs, repeats, warm=False)
    gains = {
        name: statistics.median(a / b for a, b in zip(seconds["none"], found, strict=True)) for name, found in seconds.items()
    }
    out: dict[str, Any] = {
        "seconds_median": {name: round(statistics.median(found), 3) for name, found in seconds.items()},
        "gain": {name: round(gain, 3) for name, gain in gains.items()},
        "gain_by_arithmetic": {name: round(counts["none"] / count, 3) for name, count in counts.items()},
    }
    for merged in (MERGED, STEPS):
        product, both = gains["LPL"] * gains[f"TDTM {merged}"], gains[f"LPL and TDTM {merged}"]
        out[f"product with TDTM {merged}"] = {
            "product": round(product, 3),
            "both": round(both, 3),
            "reached": both >= REACHED * product,
        }
    return out


def arithmetic(config: STDiT3Config, frames: int, side: int, evaluations: int, merged_steps: int) -> float:
    """Returns the arithmetic of a sampling in 10^9 operations."""
    plain, merged = (sum(gflop(config, rows=2, frames=frames, side=side, merged=merge).values()) for merge in (False, True))
    num_merged = min(merged_steps, evaluations)
    return num_merged * merged + (evaluations - num_merged) * plain


if __name__ == "__main__":
    main()
