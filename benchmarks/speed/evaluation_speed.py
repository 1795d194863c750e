"""Seconds of one guided evaluation of STDiT3-XL/2, in float32 and bfloat16, and what merging saves by token count.

Command:  python -m benchmarks.speed.evaluation_speed [--repeats 5] [--depth 28] [--dtypes float32 bfloat16]
Needs:    about 3 GB of memory; with the defaults 15 minutes on two cores, a third of it compiling.
Expect:   at 17 frames of 256x256 (2 x 1,280 tokens) at most 30 s in float32 and 16 s in bfloat16 on two cores; eager
          PyTorch took 33.5 s in float32.
Rival:    the same arithmetic at the speed of the bare matrix product, measured between the evaluations.

Weights are random, and all block pairs share one set (see `random_network`).  The evaluation is the one that the sampler
makes: conditional and unconditional row together, then the guidance.  The second part runs a single pair at growing token
counts, merged and unmerged alternately, and compares them with the count of operations.
"""

import argparse
import functools
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks._support.interleaved import interleaved
from benchmarks._support.machine import environment, write_report
from benchmarks._support.random_network import gflop, random_velocity, with_depth
from sora_jax import Schedule
from sora_jax.config import STDiT3Config, open_sora_1_2
from sora_jax.pipeline.velocity import Velocity
from sora_jax.sampling import noise
from sora_jax.sampling.evaluation import guided_velocity
from sora_jax.sampling.options import Sampling
from sora_jax.sampling.velocity import Point

RESULTS = Path(__file__).parents[1] / "results" / "evaluation_speed.json"
CONFIG = open_sora_1_2.stdit3
FRAMES, SIDE = 5, 32  # latents of 17 frames of 256 x 256
SIZES = ((5, 8), (5, 16), (10, 16), (20, 16), (5, 32), (10, 32))  # latent frames and rows of the second part
PRODUCT_ROWS, PRODUCTS = 2560, 20  # of the bare product, and how many are timed together
TIMESTEP = 500.0
GUIDANCE = 7.0


def main() -> None:
    """Measures what the command line asks for, prints and writes it."""
    options = parse()
    if options.threads:
        os.sched_setaffinity(0, range(options.threads))
    config = with_depth(CONFIG, options.depth)
    setting = {"depth": options.depth, "repeats": options.repeats}
    report: dict[str, Any] = {"environment": environment(), **setting, "evaluation": {}, "merging": {}}
    for dtype in options.dtypes:
        report["evaluation"][dtype] = whole(config, dtype, options.frames, options.side, options.repeats)
        print(dtype, json.dumps(report["evaluation"][dtype], indent=1), flush=True)
    for frames, side in options.sizes:
        found = merging(with_depth(CONFIG, 1), options.dtypes[0], frames, side, options.repeats)
        report["merging"][f"{frames} x {side} x {side}"] = found
        print(f"{frames} x {side} x {side}:", json.dumps(found), flush=True)
    report["load_after"] = environment()["load"]
    write_report(report, options.out)


def parse() -> argparse.Namespace:
    """Returns the command line's options."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed.evaluation_speed", description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--depth", type=int, default=CONFIG.depth, help="block pairs of the whole evaluation")
    parser.add_argument("--frames", type=int, default=FRAMES, help="latent frames of the whole evaluation")
    parser.add_argument("--side", type=int, default=SIDE, help="latent rows and columns")
    parser.add_argument("--sizes", type=_size, nargs="*", default=SIZES, metavar="FRAMESxSIDE", help="of the second part")
    parser.add_argument("--threads", type=int, default=0, help="cores to use; 0 takes all this process may use")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    parser.add_argument("--out", type=Path, default=RESULTS)
    return parser.parse_args()


def _size(text: str) -> tuple[int, int]:
    frames, side = text.split("x")
    return int(frames), int(side)


def whole(config: STDiT3Config, dtype: str, frames: int, side: int, repeats: int) -> dict[str, Any]:
    """Returns seconds and speed of a guided evaluation and of the matrix product."""
    parts = gflop(config, rows=2, frames=frames, side=side)
    candidates, compile_s = prepared(config, dtype, frames, side, merges=(False,))
    a, b = (jnp.ones(shape, dtype) for shape in ((PRODUCT_ROWS, CONFIG.hidden_size), (CONFIG.hidden_size, CONFIG.mlp_size)))
    product = jax.jit(lambda a, b: jnp.matmul(a, b, preferred_element_type=jnp.float32).astype(a.dtype))
    candidates["product"] = lambda: [product(a, b) for _ in range(PRODUCTS)]
    seconds = interleaved(candidates, repeats)
    total = sum(parts.values())
    peak = PRODUCTS * 2 * PRODUCT_ROWS * CONFIG.hidden_size * CONFIG.mlp_size / 1e9 / min(seconds["product"])
    return {
        "tokens": 2 * frames * (-(-side // 2)) ** 2,
        "seconds_min": round(min(seconds["plain"]), 3),
        "seconds_median": round(statistics.median(seconds["plain"]), 3),
        "compile_s": round(compile_s, 1),
        "gflop": {name: round(count, 2) for name, count in parts.items()},
        "gflop_per_s": round(total / min(seconds["plain"]), 1),
        "product_gflop_per_s": round(peak, 1),
        "seconds_at_product_speed": round(total / peak, 3),
        "share_of_product_speed": round(total / min(seconds["plain"]) / peak, 3),
    }


def merging(config: STDiT3Config, dtype: str, frames: int, side: int, repeats: int) -> dict[str, Any]:
    """Returns how many times faster a merged evaluation is, measured and by the arithmetic."""
    candidates, _ = prepared(config, dtype, frames, side, merges=(False, True))
    seconds = interleaved(candidates, repeats)
    counts = [sum(gflop(config, rows=2, frames=frames, side=side, merged=merged).values()) for merged in (False, True)]
    gains = [plain / merged for plain, merged in zip(seconds["plain"], seconds["merged"], strict=True)]
    return {
        "tokens": 2 * frames * (-(-side // 2)) ** 2,
        "plain_s": round(statistics.median(seconds["plain"]), 4),
        "merged_s": round(statistics.median(seconds["merged"]), 4),
        "times_faster": round(statistics.median(gains), 3),
        "by_arithmetic": round(counts[0] / counts[1], 3),
    }


def prepared(
    config: STDiT3Config, dtype: str, frames: int, side: int, *, merges: tuple[bool, ...]
) -> tuple[dict[str, Callable[[], Any]], float]:
    """Returns the compiled evaluations by name, and the seconds that compiling took."""
    velocity = random_velocity(config, dtype, frames=frames, side=side)
    z = jnp.asarray(noise.initial_noise(0, (1, frames, side, side, 4)))
    began = time.perf_counter()
    programs = {merge: evaluation.lower(velocity, z, merge=merge).compile() for merge in merges}
    names = {False: "plain", True: "merged"}
    runs: dict[str, Callable[[], Any]] = {
        names[merge]: functools.partial(program, velocity, z) for merge, program in programs.items()
    }
    return runs, time.perf_counter() - began


@functools.partial(jax.jit, static_argnames="merge")
def evaluation(velocity: Velocity, z: jax.Array, *, merge: bool) -> jax.Array:
    """Returns the guided velocity of one sample: what a step of the sampler evaluates."""
    sampling = Sampling.resolve(Schedule.uniform(1), guidance=GUIDANCE)
    return guided_velocity(sampling, Point(velocity=velocity, z=z, t=jnp.asarray(TIMESTEP), active_BT=None, merged=merge))


if __name__ == "__main__":
    main()
