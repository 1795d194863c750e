"""Seconds of rivals whose runs alternate, so that other load on the machine affects all of them alike."""

import time
from collections.abc import Callable, Mapping
from typing import Any

import jax


def interleaved(runs: Mapping[str, Callable[[], Any]], repeats: int, *, warm: bool = True) -> dict[str, list[float]]:
    """Returns the wall seconds of every run; the runs alternate.

    The first round compiles and warms caches and is not counted; ``warm=False`` skips it, for long runs that are compiled
    already.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(repeats + warm):
        for name, run in runs.items():
            began = time.perf_counter()
            jax.block_until_ready(run())
            if repeat or not warm:
                seconds[name].append(time.perf_counter() - began)
    return seconds
