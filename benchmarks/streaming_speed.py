"""Time of an evaluation with streamed blocks against the same blocks retained, at real width; figures and equations.

Run:      python -m benchmarks.streaming_speed WEIGHTS_DIR [--tokens 2048 256] [--pairs 10] [--rates 300 600 1200]
          (writes 0.7 GB of random weights, 8 blocks, unless they are there; --blocks 2 --pairs 1 tries it out)
Needs:    two free cores and 2 GB; about 20 minutes.  matplotlib for the pictures (left out without it).
Expect:   2,048 tokens: streamed / retained at most 1.05; 256 tokens: mmap at most 1.15, host at most 1.35; with a limited
          reader within 1.1 of max(load, compute).
Rival:    everything retained, the same program in the same process, each streamed run next to a retained one.

Before a run that is timed, another brings the stream into the state that an evaluation leaves to the next.  With more tokens
than ``MANY`` computing takes longer than loading: there a tiny run and a wait for what is read ahead do that, and with a
limited reader ``--limited-pairs`` are enough.

The pictures follow the paper's figures: 8 (load, compute, load, ...: the measured times of 10, laid out one after the other),
10 (concurrent), 14 (concurrent, half of the blocks retained); 15 is T5, where loading exceeds computing: here the transformer
at the lowest rate and the fewest tokens.  The paper's equations 10 and 11 are evaluated from the measured times of a block,
without their constant overhead: with b blocks, load l, compute c of a block and k retained blocks, running in turn takes
b (l + c), of which concurrency saves

    equation 10, nothing retained    b min(l, c)
    equation 11, k retained          b min(l, c) + k max(0, l - c)
"""

import argparse
import contextlib
import json
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from benchmarks import streaming_model
from benchmarks.machine import environment, write_report
from sora_jax.streaming.network import STDiT3Stream
from sora_jax.streaming.profile import Profile

RESULTS = Path(__file__).parent / "results" / "streaming_speed.json"
PICTURE = Path(__file__).parent.parent / "docs" / "streaming.svg"
SIZES = {2048: (8, 32, 32), 256: (4, 16, 16), 32: (2, 8, 8)}  # tokens: latent frames, rows, columns
SETTLING, MANY = 32, 1024
COLOURS = {"load": "tab:orange", "copy": "grey", "compute": "tab:blue"}  # of the lanes in pictures


class LimitedReader:
    """Makes every read take as long as a disk of that many bytes a second would; None: as long as it takes."""

    def __init__(self) -> None:
        self.bytes_per_s: float | None = None

    @contextlib.contextmanager
    def __call__(self, layer: str, num_bytes: int) -> Iterator[None]:
        """Waits after the read of a layer for what is left of its time."""
        start = time.perf_counter()
        yield
        if self.bytes_per_s is not None:
            time.sleep(max(0.0, num_bytes / self.bytes_per_s - (time.perf_counter() - start)))


def main() -> None:
    """Measures what the command line asks for, prints and writes it, and draws."""
    options = parse()
    streaming_model.write(options.weights, num_blocks=options.blocks)
    report: dict[str, Any] = {
        "setting": {name: value for name, value in vars(options).items() if name not in ("weights", "out", "picture")},
        "environment": environment(),
        "results": [],
    }
    drawn: dict[str, Profile] = {}
    for backend in options.backends:
        reader = LimitedReader()
        stream = STDiT3Stream(options.weights, backend=backend, verify=False, around=reader)
        for tokens in options.tokens:
            with stream.open() as network:
                bench = Bench(stream, reader, network, tokens)
                limited = min(options.limited_pairs, options.pairs) if tokens > MANY else options.pairs
                report["results"].append(bench.case(None, options.pairs))
                report["results"] += [bench.case(rate, limited) for rate in options.rates]
                if backend == options.backends[0]:
                    drawn |= bench.drawn(min(options.rates), fewest=len(options.tokens) > 1 and tokens == min(options.tokens))
            for result in report["results"][-1 - len(options.rates) :]:
                print(json.dumps(result), flush=True)
    report["pictures"] = {name: listed(profile) for name, profile in drawn.items()}
    write_report(report, options.out)
    draw(report["pictures"], options.picture)


def parse() -> argparse.Namespace:
    """Returns the command line's options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("weights", type=Path)
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--tokens", nargs="+", type=int, default=[2048, 256], choices=sorted(SIZES), help="of a row; two rows")
    parser.add_argument("--pairs", type=int, default=10, help="runs of each kind, in turn")
    parser.add_argument("--limited-pairs", type=int, default=3, help="with a limited reader and many tokens")
    parser.add_argument("--rates", nargs="+", type=int, default=[300, 600, 1200], help="of the limited reader, MB/s")
    parser.add_argument("--backends", nargs="+", default=["mmap", "host"], choices=["mmap", "host"])
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--picture", type=Path, default=PICTURE)
    return parser.parse_args()


class Bench:
    """An open stream and a compiled evaluation at one size."""

    def __init__(self, stream: STDiT3Stream, reader: LimitedReader, network: Any, tokens: int):
        self.stream, self.reader, self.tokens = stream, reader, tokens
        self.num_blocks = len(stream.blocks.blocks)
        self.layer_bytes = stream.blocks.source.num_bytes(stream.blocks.blocks[0])
        self.sampler, self.carry = self.sampling(network, tokens)
        self.settling = self.sampling(network, SETTLING if tokens > MANY else tokens)
        self.run(self.num_blocks)

    def sampling(self, network: Any, tokens: int) -> tuple[Any, Any]:
        """Returns a sampler and its start at a size."""
        frames, rows, columns = SIZES[tokens]
        return streaming_model.make_sampler(network, frames=frames, rows=rows, columns=columns, num_steps=2)

    def run(self, retained: int) -> tuple[float, Profile]:
        """Returns the seconds and the profile of an evaluation from the same start, the state having settled before."""
        self.stream.retention.count = retained
        settling, carry = self.settling
        jax.block_until_ready(settling.run(carry, 1))
        if self.tokens > MANY and self.reader.bytes_per_s is not None:
            time.sleep(2 * self.layer_bytes / self.reader.bytes_per_s)
        self.stream.profile = profile = Profile()
        start = time.perf_counter()
        jax.block_until_ready(self.sampler.run(self.carry, 1))
        seconds, self.stream.profile = time.perf_counter() - start, None
        return seconds, profile

    def case(self, rate: int | None, pairs: int) -> dict[str, Any]:
        """Returns the times of streamed and retained evaluations, one of each in turn, at a reading rate in MB/s."""
        streamed, retained, half, profiles, resident = [], [], [], [], []
        for _ in range(pairs):
            self.reader.bytes_per_s = None
            seconds, profile = self.run(self.num_blocks)
            retained.append(seconds)
            resident.append(profile)
            self.reader.bytes_per_s = None if rate is None else rate * 1e6
            seconds, profile = self.run(0)
            streamed.append(seconds)
            profiles.append(profile)
            if rate is not None:
                half.append(self.run(self.num_blocks // 2)[0])
        compute, load = self.of_a_block(resident, ("compute", "copy")), self.of_a_block(profiles, ("load",))
        whole = statistics.median(retained)
        rest = whole - self.num_blocks * compute  # embedding, final layer, solver
        sequential, concurrent, halved = predictions(self.num_blocks, load, compute, self.num_blocks // 2)
        ratios = [one / other for one, other in zip(streamed, retained, strict=True)]
        return {
            "backend": type(self.stream.blocks).__name__,
            "tokens": self.tokens,
            "rate_mb_s": rate,
            "pairs": pairs,
            "retained_s": round(whole, 4),
            "streamed_s": round(statistics.median(streamed), 4),
            "half_retained_s": round(statistics.median(half), 4) if half else None,
            "ratio_median": round(statistics.median(ratios), 4),
            "ratio_min": round(min(ratios), 4),
            "load_of_a_block_s": round(load, 5),
            "compute_of_a_block_s": round(compute, 5),
            "beyond_max_of_load_and_compute": round(
                statistics.median(streamed) / (self.num_blocks * max(load, compute) + rest), 4
            ),
            "predicted": {
                "sequential_s": round(sequential + rest, 4),
                "concurrent_s (equation 10)": round(concurrent + rest, 4),
                "half_retained_s (equation 11)": round(halved + rest, 4),
            },
            "saving_of_concurrency": {
                "predicted": round(1 - (concurrent + rest) / (sequential + rest), 4),
                "measured": round(1 - statistics.median(streamed) / (sequential + rest), 4),
            },
        }

    def of_a_block(self, profiles: list[Profile], lanes: tuple[str, ...]) -> float:
        """Returns the median over runs of the mean time of a block in the lanes together."""
        times = [
            sum(part.end_s - part.start_s for part in profile.intervals if part.lane in lanes)
            / max(1, sum(part.lane == lanes[0] for part in profile.intervals))
            for profile in profiles
        ]
        return statistics.median(times)

    def drawn(self, rate: int, *, fewest: bool) -> dict[str, Profile]:
        """Returns the profiles of the pictures, at a rate in MB/s."""
        self.reader.bytes_per_s = rate * 1e6
        concurrent, half = self.run(0)[1], self.run(self.num_blocks // 2)[1]
        name = f"{self.tokens} tokens, {rate} MB/s"
        if fewest:
            return {f"figure 15, load exceeds compute: {name}": concurrent}
        return {
            f"figure 8, sequential: {name}": in_turn(concurrent),
            f"figure 10, concurrent: {name}": concurrent,
            f"figure 14, half retained: {name}": half,
        }


def predictions(num_blocks: int, load_s: float, compute_s: float, retained: int) -> tuple[float, float, float]:
    """Returns the seconds of all blocks: in turn, concurrently (equation 10), and with some retained (equation 11)."""
    sequential = num_blocks * (load_s + compute_s)
    concurrent = sequential - num_blocks * min(load_s, compute_s)
    return sequential, concurrent, concurrent - retained * max(0.0, load_s - compute_s)


def in_turn(profile: Profile) -> Profile:
    """Returns the same loads and computations one after the other: what runs without a reading thread.

    A layer that was read before the profile began is taken to load as long as the others on average.
    """
    sequential, now = Profile(), 0.0
    computed = [part for part in profile.intervals if part.lane == "compute"]
    loads = {part.layer: part.end_s - part.start_s for part in profile.intervals if part.lane == "load"}
    for part in computed:
        load = loads.get(part.layer, statistics.mean(loads.values()))
        sequential.add("load", part.layer, now, now + load)
        now += load + part.end_s - part.start_s
        sequential.add("compute", part.layer, now - (part.end_s - part.start_s), now)
    return sequential


def listed(profile: Profile) -> list[list[Any]]:
    """Returns lane, layer, begin and end in ms of what a picture shows, from its first interval on."""
    begin = min(part.start_s for part in profile.intervals)
    shown = [part for part in profile.intervals if part.lane in COLOURS]
    return [[part.lane, part.layer, *(round(1e3 * (at - begin), 2) for at in (part.start_s, part.end_s))] for part in shown]


def draw(pictures: Mapping[str, Sequence[Sequence[Any]]], path: Path) -> None:
    """Draws each of `listed` as two rows of bars, loading above computing, as the paper's figures do."""
    try:
        from matplotlib import pyplot
    except ImportError:
        print("matplotlib is not installed; no picture drawn.")
        return
    figure, axes = pyplot.subplots(len(pictures), figsize=(9, 1.5 * len(pictures)), squeeze=False, layout="constrained")
    for (name, intervals), axis in zip(pictures.items(), axes[:, 0], strict=True):
        for lane, _, begin, end in intervals:
            row = 1 if lane == "load" else 0
            axis.broken_barh([(begin, end - begin)], (row, 0.8), color=COLOURS[lane], edgecolor="w", linewidth=0.5)
        axis.set(yticks=[0.4, 1.4], yticklabels=["compute", "load"], title=name, xlabel="ms", xlim=(0, None))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


if __name__ == "__main__":
    main()
