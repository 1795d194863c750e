"""Time of text encoder blocks read while others compute, against reading and computing sequentially (figure 15).

Command:  python -m benchmarks.speed.streaming_text WEIGHTS_DIR --picture docs/streaming_text.svg
          (writes 3.1 GB of random weights, 4 blocks of T5-XXL in float32, unless they are there)
Needs:    two free cores and 1.5 GB; about 3 minutes.  matplotlib for the picture (left out without it).
Expect:   loading takes longer than computing; concurrently, the time is within 1.1 of that of loading alone.
Rival:    the same loop with one buffer, which reads and computes one after the other, in the same process; a pair is one run of
          each.

A block of T5-XXL is 0.77 GB in float32 and runs in two halves; 300 tokens; a disk of ``--rate`` MB/s.  An encoder runs once for
a caption, so nothing is retained and equation 11 reduces to equation 10 (`streaming_figures`), evaluated with the load and
compute times of the sequential runs.
"""

import argparse
import dataclasses
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks._support.machine import environment, write_report
from benchmarks._support.random_network import RandomParameters
from benchmarks._support.streaming_figures import LimitedReader, draw, listed, predictions, saving
from sora_jax.config import FLOAT32, open_sora_1_2
from sora_jax.networks.t5 import T5Encoder, position_bias
from sora_jax.process import Timings
from sora_jax.storage.checkpoint import save_network
from sora_jax.storage.directory import Manifest, open_network
from sora_jax.streaming.profile import Profile
from sora_jax.streaming.segment_loop import SegmentLoop

RESULTS = Path(__file__).parents[1] / "results" / "streaming_text.json"
IN_TURN, AT_ONCE = 1, 2  # buffers

Run = tuple[float, Profile]


def main() -> None:
    """Measures what the command line asks for, prints and writes it, and draws."""
    options = parse()
    manifest = write(options.weights, options.blocks)
    report: dict[str, Any] = {
        "setting": {name: value for name, value in vars(options).items() if name not in ("weights", "out", "picture")},
        "environment": environment(),
    }
    encode = encoder(manifest, options.length, LimitedReader(options.rate * 1e6))
    encode(AT_ONCE)
    pairs = [(encode(IN_TURN), encode(AT_ONCE)) for _ in range(options.pairs)]
    report["result"] = compared(pairs, options.blocks)
    name = f"T5-XXL, {options.length} tokens, {options.rate} MB/s"
    report["pictures"] = {
        f"in turn: {name}": listed(pairs[-1][0][1]),
        f"figure 15, concurrent where loading takes longer: {name}": listed(pairs[-1][1][1]),
    }
    report["load_after"] = environment()["load"]
    print(json.dumps(report["result"]), flush=True)
    write_report(report, options.out)
    if options.picture is not None:
        draw(report["pictures"], options.picture)


def parse() -> argparse.Namespace:
    """Returns the command line's options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("weights", type=Path)
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--length", type=int, default=300, help="tokens")
    parser.add_argument("--rate", type=int, default=600, help="rate of the limited reader, MB/s")
    parser.add_argument("--pairs", type=int, default=10, help="runs of each kind, alternating")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--picture", type=Path, help="file of the picture (default: none)")
    return parser.parse_args()


def write(directory: Path, num_blocks: int) -> Manifest:
    """Writes an encoder of T5-XXL's width with fewer blocks and words, unless it exists, and returns it."""
    config = dataclasses.replace(open_sora_1_2.t5, num_layers=num_blocks, vocab_size=32)
    if not (directory / "t5").exists():
        save_network(directory, "t5", config, RandomParameters(T5Encoder, config), dtype="float32")
    return open_network(directory, "t5")


def encoder(manifest: Manifest, length: int, reader: LimitedReader) -> Callable[[int], Run]:
    """Returns a function that runs all blocks with that many buffers and returns the seconds and the profile."""
    config, rng = manifest.config, np.random.default_rng(0)
    x_BLE = rng.standard_normal((1, length, config.d_model)).astype(np.float32)
    table_RN = rng.standard_normal((config.relative_attention_num_buckets, config.num_heads)).astype(np.float32)
    bias_1NLL, mask_BL = np.asarray(position_bias(table_RN, length, config)), np.ones((1, length), bool)

    def encode(num_slots: int) -> Run:
        profile = Profile()
        loop = SegmentLoop(
            manifest,
            FLOAT32,
            Timings(),
            num_slots=num_slots,
            profile=profile,
            around=reader,
        )
        start = time.perf_counter()
        loop.run("text", T5Encoder.segments(config)[:-1], x_BLE, bias_1NLL, mask_BL)
        return time.perf_counter() - start, profile

    return encode


def compared(pairs: list[tuple[Run, Run]], num_blocks: int) -> dict[str, Any]:
    """Returns the sequential and the concurrent time, and what equation 10 predicts."""
    in_turn, at_once = ([run for run, _ in pairs], [run for _, run in pairs])
    load, compute = (statistics.median(p.total_s(lane) / num_blocks for _, p in in_turn) for lane in ("load", "compute"))
    measured_in_turn, found = (statistics.median(seconds for seconds, _ in runs) for runs in (in_turn, at_once))
    sequential, concurrent, _ = predictions(num_blocks, load, compute, 0)
    return {
        "pairs": len(pairs),
        "load_of_a_block_s": round(load, 4),
        "compute_of_a_block_s": round(compute, 4),
        "in_turn_s": round(measured_in_turn, 3),
        "in_turn_by_parts_s": round(sequential, 3),
        "concurrent_s": round(found, 3),
        "ratio_median": round(statistics.median(one / other for (other, _), (one, _) in pairs), 4),
        "beyond_max_of_load_and_compute": round(found / (num_blocks * max(load, compute)), 4),
        "equation 10": {
            "predicted_s": round(concurrent, 3),
            "predicted_saving": saving(sequential, concurrent),
            "measured_saving": saving(measured_in_turn, found),
        },
    }


if __name__ == "__main__":
    main()
