"""Two hundred generations in one process, resident and streamed by either back-end, with new pipelines in between.

``python -m tests.streaming.test_soak MODEL [GENERATIONS]`` prints memory, descriptors and threads along the way as JSON.
"""

import gc
import json
import os
import statistics
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

GENERATIONS = 200
WARM = 50  # by then everything was compiled, in every way of running, and the allocator has its arenas
MAX_GROWTH_BYTES = 10_000_000  # between the medians of two thirds of what follows; one clip's arrays would be 0.1 GB in all
PROMPTS = ("a red circle", "a blue square moves left", "a green triangle grows")


def pipelines(model: Path) -> Iterator[tuple[str, Any]]:
    """Yields a way of running and its pipeline for each generation: one that is kept, or one that is opened for it."""
    from sora_jax import Pipeline
    from sora_jax.streaming import network

    can_map = network.can_map

    def opened(way: str) -> Any:
        network.can_map = (lambda: False) if way == "host" else can_map
        return Pipeline.from_pretrained(model, memory_budget=None if way == "resident" else "8GB")

    ways = ("resident", "mmap", "host")
    kept = {way: opened(way) for way in ways}
    while True:
        for way in ways:
            network.can_map = (lambda: False) if way == "host" else can_map  # the stream is made at the first use
            yield way, kept[way]
            yield way, opened(way)


def soak(model: Path, generations: int) -> dict[str, list[int]]:
    """Returns what the process holds after each generation, and checks that all clips of one way are equal."""
    from sora_jax.process import resident_bytes

    seen: dict[str, list[int]] = {"bytes": [], "descriptors": [], "threads": []}
    expected: dict[tuple[str, str], np.ndarray] = {}
    counted: dict[str, Callable[[], int]] = {
        "bytes": lambda: resident_bytes() or 0,
        "descriptors": lambda: len(os.listdir("/proc/self/fd")),
        "threads": threading.active_count,
    }
    for number, (way, pipe) in zip(range(generations), pipelines(model), strict=False):
        prompt = PROMPTS[number // 6 % len(PROMPTS)]
        frames = pipe(prompt, num_steps=2, seed=5).frames
        np.testing.assert_array_equal(frames, expected.setdefault((way, prompt), frames))
        del pipe, frames
        gc.collect()
        for name, count in counted.items():
            seen[name].append(count())
    return seen


def summary(seen: dict[str, list[int]]) -> dict[str, Any]:
    """Returns the first and the last third after the warm generations: medians of bytes, extremes of the rest."""
    warm = {name: values[WARM:] for name, values in seen.items()}
    third = len(warm["bytes"]) // 3
    early, late = statistics.median(warm["bytes"][:third]), statistics.median(warm["bytes"][-third:])
    return {
        "generations": len(seen["bytes"]),
        "bytes": [int(early), int(late)],
        "descriptors": [min(warm["descriptors"]), max(warm["descriptors"])],
        "threads": [min(warm["threads"]), max(warm["threads"])],
    }


@pytest.mark.slow
def test_two_hundred_generations_hold_no_more_than_fifty(tiny_model: Path) -> None:
    command = [sys.executable, "-m", "tests.streaming.test_soak", str(tiny_model), str(GENERATIONS)]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    seen = json.loads(done.stdout)
    print(seen)  # noqa: T201  # the counts are what this test is for
    assert seen["generations"] == GENERATIONS
    early, late = seen["bytes"]
    assert late - early <= MAX_GROWTH_BYTES, seen
    assert len(set(seen["descriptors"])) == len(set(seen["threads"])) == 1, seen


if __name__ == "__main__":
    made = soak(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else GENERATIONS)
    sys.stdout.write(json.dumps(summary(made) | ({"all": made} if "--all" in sys.argv else {})) + "\n")
