"""Time of an evaluation with streamed blocks against the same blocks retained, at real width; figures and equations.

Command:  python -m benchmarks.speed.streaming_speed WEIGHTS_DIR --backend mmap --picture docs/streaming.svg
          python -m benchmarks.speed.streaming_speed WEIGHTS_DIR --backend host
          (writes 0.7 GB of random weights, 8 blocks, unless they are there; --blocks 2 --pairs 1 tries it out)
Needs:    two free cores and 2 GB; about 8 minutes each.  matplotlib for the picture (left out without it).
Expect:   2,048 tokens: streamed / retained at most 1.05; 256 tokens: mmap at most 1.15, host at most 1.35; with a limited
          reader within 1.1 of max(load, compute).
Rival:    everything retained, the same program in the same process.  A round has it once and every streamed variant once, in
          reverse order in every second round; a pair is a streamed run and the retained run of its round.

An untimed run before each timed one brings the stream into the state that one evaluation leaves for the next.  Above ``MANY``
tokens computing takes longer than loading, and a tiny run followed by a wait for the reader is enough.  Retaining half of the
blocks saves nothing there (equation 11), so it is timed at fewer tokens and the lowest rate.

The picture has the paper's figures 8 (the measured times of 10, laid out one after the other), 10 and 14 (half of the blocks
retained) at the lowest rate; figure 15 is `streaming_text`.  Equations 10 and 11 (`streaming_figures`) are evaluated from the
measured times of a block, and are listed with the measurements.
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import jax

from benchmarks._support import streaming_model
from benchmarks._support.machine import environment, write_report
from benchmarks._support.streaming_figures import LimitedReader, draw, in_turn, listed, predictions, saving
from sora_jax.streaming.network import STDiT3Stream
from sora_jax.streaming.profile import Profile

RESULTS = Path(__file__).parents[1] / "results"
SIZES = {2048: (8, 32, 32), 256: (4, 16, 16), 32: (2, 8, 8)}  # tokens: latent frames, rows, columns
SETTLING, MANY = 32, 1024

Kind = tuple[int | None, int]  # rate in MB/s, retained blocks
Runs = dict[Kind, list[tuple[float, Profile]]]


def main() -> None:
    """Measures what the command line asks for, prints and writes it, and draws."""
    options = parse()
    streaming_model.write(options.weights, num_blocks=options.blocks)
    report: dict[str, Any] = {
        "setting": {name: value for name, value in vars(options).items() if name not in ("weights", "out", "picture")},
        "environment": environment(),
        "results": [],
        "pictures": {},
    }
    reader = LimitedReader()
    stream = STDiT3Stream(options.weights, backend=options.backend, around=reader)
    for tokens in options.tokens:
        with stream.open() as network:
            bench = Bench(stream, reader, network, tokens)
            found = bench.measured(options.rates, options.pairs)
            report["pictures"] |= {name: listed(profile) for name, profile in bench.drawn(min(options.rates)).items()}
        report["results"] += found
        for result in found:
            print(json.dumps(result), flush=True)
    report["load_after"] = environment()["load"]
    write_report(report, options.out or RESULTS / f"streaming_speed_{options.backend}.json")
    if options.picture is not None:
        draw(report["pictures"], options.picture)


def parse() -> argparse.Namespace:
    """Returns the command line's options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("weights", type=Path)
    parser.add_argument("--backend", default="mmap", choices=["mmap", "host"])
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--tokens", nargs="+", type=int, default=[2048, 256], choices=sorted(SIZES), help="of a row; two rows")
    parser.add_argument("--pairs", type=int, default=10, help="runs of each kind, alternating")
    parser.add_argument("--rates", nargs="+", type=int, default=[300, 600, 1200], help="rates of the limited reader, MB/s")
    parser.add_argument("--out", type=Path, help="default: results/streaming_speed_BACKEND.json")
    parser.add_argument("--picture", type=Path, help="file of the picture (default: none)")
    return parser.parse_args()


class Bench:
    """An open stream and a compiled evaluation at one size."""

    def __init__(self, stream: STDiT3Stream, reader: LimitedReader, network: Any, tokens: int):
        self.stream, self.reader, self.tokens = stream, reader, tokens
        self.num_blocks = len(stream.blocks.blocks)
        self.layer_bytes = stream.blocks.reader.manifest.layer_bytes(stream.blocks.blocks[0])
        self.sampler, self.carry = self.sampling(network, tokens)
        self.settling = self.sampling(network, SETTLING if tokens > MANY else tokens)
        self.run(None, self.num_blocks)

    def sampling(self, network: Any, tokens: int) -> tuple[Any, Any]:
        """Returns a sampler and its start at a size."""
        frames, rows, columns = SIZES[tokens]
        return streaming_model.make_sampler(network, frames=frames, rows=rows, columns=columns, num_steps=2)

    def run(self, rate: int | None, retained: int) -> tuple[float, Profile]:
        """Returns the seconds and the profile of an evaluation from the same start, after the stream has settled."""
        self.reader.bytes_per_s = None if rate is None else rate * 1e6
        self.stream.retention.count = retained
        settling, carry = self.settling
        jax.block_until_ready(settling.run(carry, 1))
        if self.tokens > MANY and rate is not None:
            time.sleep(2 * self.layer_bytes / (rate * 1e6))
        self.stream.profile = profile = Profile()
        start = time.perf_counter()
        jax.block_until_ready(self.sampler.run(self.carry, 1))
        seconds, self.stream.profile = time.perf_counter() - start, None
        return seconds, profile

    def measured(self, rates: list[int], pairs: int) -> list[dict[str, Any]]:
        """Returns the measurements without a limit and at every rate in MB/s."""
        kinds: list[Kind] = [(None, self.num_blocks), (None, 0), *((rate, 0) for rate in rates)]
        if self.tokens <= MANY:
            kinds.append((min(rates), self.num_blocks // 2))
        runs: Runs = {kind: [] for kind in kinds}
        for number in range(pairs):
            for kind in kinds if number % 2 == 0 else reversed(kinds):
                runs[kind].append(self.run(*kind))
        return [self.compared(rate, runs) for rate in (None, *rates)]

    def compared(self, rate: int | None, runs: Runs) -> dict[str, Any]:
        """Returns the times of streamed and retained runs at a rate, and what the equations predict."""
        retained, streamed = runs[None, self.num_blocks], runs[rate, 0]
        half = runs.get((rate, self.num_blocks // 2))
        compute, load = of_a_block(retained, ("compute", "copy")), of_a_block(streamed, ("load",))
        whole, found = median_s(retained), median_s(streamed)
        rest = whole - self.num_blocks * compute  # embedding, final layer, solver
        sequential, concurrent, halved = (
            seconds + rest for seconds in predictions(self.num_blocks, load, compute, self.num_blocks // 2)
        )
        ratios = [one / other for (one, _), (other, _) in zip(streamed, retained, strict=True)]
        result = {
            "backend": type(self.stream.blocks).__name__,
            "tokens": self.tokens,
            "rate_mb_s": rate,
            "pairs": len(ratios),
            "retained_s": round(whole, 4),
            "streamed_s": round(found, 4),
            "ratio_median": round(statistics.median(ratios), 4),
            "ratio_range": [round(min(ratios), 4), round(max(ratios), 4)],
            "load_of_a_block_s": round(load, 5),
            "compute_of_a_block_s": round(compute, 5),
            "beyond_max_of_load_and_compute": round(found / (self.num_blocks * max(load, compute) + rest), 4),
            "in_turn_s": round(sequential, 4),
            "equation 10": {
                "predicted_s": round(concurrent, 4),
                "predicted_saving": saving(sequential, concurrent),
                "measured_saving": saving(sequential, found),
            },
        }
        if half is not None:
            result["equation 11, half retained"] = {
                "predicted_s": round(halved, 4),
                "measured_s": round(median_s(half), 4),
                "predicted_saving": saving(sequential, halved),
                "measured_saving": saving(sequential, median_s(half)),
            }
        return result

    def drawn(self, rate: int) -> dict[str, Profile]:
        """Returns the profiles of the pictures, at a rate in MB/s."""
        concurrent, half = self.run(rate, 0)[1], self.run(rate, self.num_blocks // 2)[1]
        name = f"{self.tokens} tokens, {rate} MB/s"
        return {
            f"figure 8, in turn: {name}": in_turn(concurrent),
            f"figure 10, concurrent: {name}": concurrent,
            f"figure 14, half retained: {name}": half,
        }


def median_s(runs: list[tuple[float, Profile]]) -> float:
    """Returns the median time of runs."""
    return statistics.median(seconds for seconds, _ in runs)


def of_a_block(runs: list[tuple[float, Profile]], lanes: tuple[str, ...]) -> float:
    """Returns the median over runs of the mean time of a block in the lanes together."""
    times = [
        sum(part.end_s - part.start_s for part in profile.intervals if part.lane in lanes)
        / max(1, sum(part.lane == lanes[0] for part in profile.intervals))
        for _, profile in runs
    ]
    return statistics.median(times)


if __name__ == "__main__":
    main()
