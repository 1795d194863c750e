"""Seconds of rivals that run in turn, so that what else the machine does meets all of them alike."""

import time
from collections.abc import Callable, Mapping
from typing import Any

import jax


def interleaved(runs: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Returns the wall seconds of every run, taken in turn; a first round compiles and warms caches, and is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(repeats + 1):
        for name, run in runs.items():
            began = time.perf_counter()
            jax.block_until_ready(run())
            if repeat:
                seconds[name].append(time.perf_counter() - began)
    return seconds
