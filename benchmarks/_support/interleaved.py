"""Seconds of rivals that run in turn, so that what else the machine does meets all of them alike."""

import time
from collections.abc import Callable, Mapping
from typing import Any

import jax


def interleaved(runs: Mapping[str, Callable[[], Any]], repeats: int, *, warm: bool = True) -> dict[str, list[float]]:
    """Returns the wall seconds of every run, taken in turn.

    A first round compiles and warms caches, and is not counted; ``warm=False`` leaves it out, where runs are compiled and long.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(repeats + warm):
        for name, run in runs.items():
            began = time.perf_counter()
            jax.block_until_ready(run())
            if repeat or not warm:
                seconds[name].append(time.perf_counter() - began)
    return seconds
