"""The paper's equations and figures of loading and computing, and the reader that makes a disk slow.

With b blocks, load l, compute c of a block and k retained blocks, loading and computing one after the other takes b (l + c).
Concurrency saves, without the constant overhead that the paper subtracts:

    equation 10, nothing retained    b min(l, c)
    equation 11, k retained          b min(l, c) + k max(0, l - c)

Figures 8 (load, compute, load, ...), 10 (concurrent), 14 (some blocks retained) and 15 (the text encoder) are two rows of bars,
loading above computing.
"""

import contextlib
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sora_jax.streaming.profile import Profile

COLOURS = {"load": "tab:orange", "copy": "grey", "compute": "tab:blue"}  # of the lanes in pictures


class LimitedReader:
    """Makes every read take as long as a disk of that many bytes a second would; None: no limit."""

    def __init__(self, bytes_per_s: float | None = None) -> None:
        self.bytes_per_s = bytes_per_s

    @contextlib.contextmanager
    def __call__(self, layer: str, num_bytes: int) -> Iterator[None]:
        """Waits after the read of a layer until the time that the slow disk would need is over."""
        start = time.perf_counter()
        yield
        if self.bytes_per_s is not None:
            time.sleep(max(0.0, num_bytes / self.bytes_per_s - (time.perf_counter() - start)))


def predictions(num_blocks: int, load_s: float, compute_s: float, retained: int) -> tuple[float, float, float]:
    """Returns the seconds of all blocks: sequentially, concurrently (equation 10), and with some retained (equation 11)."""
    sequential = num_blocks * (load_s + compute_s)
    concurrent = sequential - num_blocks * min(load_s, compute_s)
    return sequential, concurrent, concurrent - retained * max(0.0, load_s - compute_s)


def saving(sequential_s: float, seconds: float) -> float:
    """Returns the saved share of the time that loading and computing one after the other takes."""
    return round(1 - seconds / sequential_s, 4)


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
    """Draws each entry of `listed` as two rows of bars; entries of one setting (the name after the colon) share a scale."""
    try:
        from matplotlib import pyplot
    except ImportError:
        print("matplotlib is not installed; no picture drawn.")
        return
    settings = list(dict.fromkeys(name.split(": ")[1] for name in pictures))
    rows = len(pictures) // len(settings)
    shape: dict[str, Any] = {"figsize": (9, 1.5 * rows), "squeeze": False, "layout": "constrained", "sharex": "col"}
    figure, axes = pyplot.subplots(rows, len(settings), **shape)
    for number, (name, intervals) in enumerate(pictures.items()):
        axis = axes[number % rows, settings.index(name.split(": ")[1])]
        for lane, _, begin, end in intervals:
            row = 1 if lane == "load" else 0
            axis.broken_barh([(begin, end - begin)], (row, 0.8), color=COLOURS[lane], edgecolor="w", linewidth=0.5)
        axis.set(yticks=[0.4, 1.4], yticklabels=["compute", "load"], xlim=(0, None))
        axis.set_title(name, fontsize="small")
    for axis in axes[-1]:
        axis.set_xlabel("ms")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
