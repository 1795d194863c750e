"""Peak memory of one guided evaluation of the streamed transformer, measured in a process of its own.

Command:  python -m benchmarks.memory.streaming_memory WEIGHTS_DIR [--budgets 3.3GB 2.2GB minimum] [--backends mmap host]
          (writes 4.5 GB of random weights into WEIGHTS_DIR, unless they are there; --blocks 4 --frames 2 tries it out)
Needs:    Linux; as much memory as the largest budget; 68 frames at 256 x 256 (5,120 tokens, two rows) take minutes.
Expect:   every peak at most its budget; `minimum` (nothing retained) 1.3 to 1.4 GB, of which activations of 10,240 tokens are
          about 0.6 GB (--frames 2: 0.7 GB in all).
Rival:    --budgets none, everything in memory.

The peak is VmHWM of the process after the evaluation, interpreter, compiler and file pages included; RssAnon and RssFile are
what it held then. The peak while compiling is reported separately, since it does not depend on the weights.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax

from benchmarks._support import streaming_model
from benchmarks._support.machine import environment, memory, write_report
from sora_jax.config import open_sora_1_2
from sora_jax.devices.names import ATTENTIONS
from sora_jax.networks.merge_rule import Merge
from sora_jax.process import Timings
from sora_jax.sampling.state import Carry
from sora_jax.streaming.budget import parse_budget
from sora_jax.streaming.memory_plan import Workload
from sora_jax.streaming.network import STDiT3Stream, block_bytes

RESULTS = Path(__file__).parents[1] / "results" / "streaming_memory.json"
NONE, MINIMUM = "none", "minimum"


def main() -> None:
    """Measures what the command line asks for, each case in a child process, prints and writes it."""
    options = parse()
    if options.child:
        print(json.dumps(measure(options)))
        return
    report: dict[str, Any] = {"setting": setting(options), "environment": environment(), "results": []}
    streaming_model.write(options.weights, num_blocks=options.blocks, dtype=options.stored)
    for backend in options.backends:
        for budget in options.budgets:
            report["results"].append(case(options, backend, budget))
            print(json.dumps(report["results"][-1]), flush=True)
    write_report(report, options.out)


def parse() -> argparse.Namespace:
    """Returns the command line's options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("weights", type=Path)
    parser.add_argument("--budgets", nargs="+", default=["3.3GB", "2.2GB", MINIMUM])
    parser.add_argument("--backends", nargs="+", default=["mmap", "host"], choices=["mmap", "host"])
    parser.add_argument("--blocks", type=int, default=56)
    parser.add_argument("--stored", default="float32", choices=["float32", "bfloat16", "int8"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="of the computation")
    parser.add_argument("--frames", type=int, default=20, help="latent frames")
    parser.add_argument("--height", type=int, default=32, help="latent rows")
    parser.add_argument("--width", type=int, default=32, help="latent columns")
    parser.add_argument("--evaluations", type=int, default=1)
    parser.add_argument("--attention", default="auto", choices=ATTENTIONS)
    parser.add_argument("--merge", action="store_true", help="evaluations with merged frames")
    parser.add_argument("--unplanned", action="store_true", help="skip the memory plan: measurement alone keeps the budget")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=RESULTS)
    return parser.parse_args()


def setting(options: argparse.Namespace) -> dict[str, Any]:
    """Returns the options that numbers depend on."""
    named = {name: value for name, value in vars(options).items() if name not in ("weights", "out", "child")}
    return {**named, "tokens": streaming_model.num_tokens(options.frames, options.height, options.width)}


def case(options: argparse.Namespace, backend: str, budget: str) -> dict[str, Any]:
    """Returns what a child process measured for one back-end and budget, or why it failed."""
    command = [sys.executable, "-m", "benchmarks.memory.streaming_memory", str(options.weights), "--child"]
    command += ["--backends", backend, "--budgets", budget]
    for name in ("blocks", "stored", "dtype", "attention", "frames", "height", "width", "evaluations"):
        command += [f"--{name}", str(getattr(options, name))]
    command += [f"--{flag}" for flag in ("merge", "unplanned") if getattr(options, flag)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = json.loads(done.stdout) if done.returncode == 0 else {"failed": done.stderr.strip().splitlines()[-1:]}
    return {"backend": backend, "budget": budget, **found}


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Returns peak, retained blocks and times of one case, measured in this process."""
    stream = _stream(options)
    planned = _planned(options, stream)
    stream.retention.fixed_bytes = 0 if options.unplanned else planned
    planned_retained, timings = stream.retention.count, Timings()
    with stream.open() as network:
        carry, compiling = _evaluate(options, network, timings)
        now, retained = memory(), stream.retention.count
    limit = stream.retention.budget
    while_measured = retained if options.evaluations > 1 else planned_retained  # the first evaluation corrects it for the next
    held = sum(block_bytes(stream.blocks.reader.manifest)[:while_measured])
    return {
        **now,
        "peak_over_plan": round(now["peak_bytes"] / (planned + held), 3),
        "within_budget": None if limit is None else now["peak_bytes"] <= limit,
        "peak_after_compiling_bytes": compiling,
        "planned_without_retained_bytes": planned,
        "retained_planned": planned_retained,
        "retained_measured": retained,
        "bytes_read": stream.blocks.bytes_read,
        "compile_s": round(timings["compile"], 2),
        "evaluations_s": round(timings["evaluations"], 2),
        "cpu_s": round(time.process_time(), 1),
        "finite": bool(jax.numpy.isfinite(carry.z).all()),
    }


def _stream(options: argparse.Namespace) -> STDiT3Stream:
    """Returns the stream of one case."""
    (backend,), (budget,) = options.backends, options.budgets
    return STDiT3Stream(
        options.weights,
        dtype=options.dtype,
        attention=options.attention,
        backend=backend,
        budget=None if budget in (NONE, MINIMUM) else parse_budget(budget),
        retained=0 if budget == MINIMUM else None,
    )


def _planned(options: argparse.Namespace, stream: STDiT3Stream) -> int:
    """Returns the bytes that the memory plan has for this case without retained blocks."""
    work = Workload(
        num_frames=17 * options.frames // 5,
        height=8 * options.height,
        width=8 * options.width,
        dtype=options.dtype,
        attention=options.attention,
        merge=Merge() if options.merge else None,
    )
    return streaming_model.planned(stream.blocks.reader.manifest, open_sora_1_2, work, "denoise").fixed


def _evaluate(options: argparse.Namespace, network: Any, timings: Timings) -> tuple[Carry, int]:
    """Returns what the evaluations computed, and the peak in bytes before the first of them."""
    sampler, carry = streaming_model.make_sampler(
        network,
        frames=options.frames,
        rows=options.height,
        columns=options.width,
        num_steps=options.evaluations + 1,
        merge_steps=options.evaluations if options.merge else 0,
    )
    with timings.measure("compile"):
        jax.block_until_ready(sampler.run(carry, 0))
    compiling = memory()["peak_bytes"]
    with timings.measure("evaluations"):
        carry = jax.block_until_ready(sampler.run(carry, options.evaluations))
    return carry, compiling


if __name__ == "__main__":
    main()
