"""One of several processes with a mesh in common, for tests; prints what it saw as one JSON object.

    python -m tests.devices.processes COORDINATOR NUM_PROCESSES PROCESS_ID TASK ARGUMENTS...

Tasks are the functions of `TASKS`.  `together` starts all processes of a task.
"""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from sora_jax.devices import hosts
from sora_jax.devices.load_onto import load_onto
from sora_jax.devices.mesh import make_mesh, place
from sora_jax.layout import DEVICES, Spread
from sora_jax.pipeline.pipeline import Pipeline
from sora_jax.storage.directory import open_network
from sora_jax.storage.in_order import FileInOrder

PROMPT = "a red circle"
OPTIONS: Mapping[str, Any] = {"seed": 3, "num_steps": 3, "guidance": 3.0}


def free_address() -> str:
    """Returns an address of this machine with a port that nobody has."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"127.0.0.1:{server.getsockname()[1]}"


def environment(devices: int = 1) -> dict[str, str]:
    """Returns the environment of a process with so many virtual devices."""
    flags = f"--xla_force_host_platform_device_count={devices}"
    return {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}


def together(count: int, *arguments: object, devices: int = 1) -> list[dict[str, Any]]:
    """Returns what ``count`` processes print, each with so many devices."""
    address = free_address()
    begun = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.devices.processes", address, str(count), str(process), *map(str, arguments)],
            env=environment(devices),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for process in range(count)
    ]
    try:
        ended = [process.communicate(timeout=500) for process in begun]
    finally:
        for process in begun:
            process.kill()
    for process, (_, errors) in zip(begun, ended, strict=True):
        assert process.returncode == 0, errors[-3000:]
    return [json.loads(output.splitlines()[-1]) for output, _ in ended]


def decisions(model: str, axes: str) -> dict[str, Any]:
    """Decides, fails and gathers in every way, and reads a network's weights spread over all devices."""
    own, seen = jax.process_index(), {}
    seen["decided"] = hosts.decided(lambda: ["process", own])
    seen["refused"] = _raised(lambda: hosts.decided(_refuse))
    seen["failed"] = _raised(lambda: hosts.together(KeyError("nothing") if own == 1 else None))
    seen["unfailed"] = hosts.together(None)
    seen["bytes"] = len(hosts.same_bytes(bytes([own]) * 5000)), sum(hosts.same_bytes(bytes([own]) * 5000))
    mesh = make_mesh(axes)
    rows = np.arange(12.0).reshape(4, 3)
    seen["whole"] = bool((hosts.whole(place(rows, mesh, jax.sharding.PartitionSpec(DEVICES))) == rows).all())
    num_bytes = _counting_bytes()
    placed = load_onto(open_network(Path(model), "stdit3"), mesh, "spread")
    arrays = {name: x.values if isinstance(x, Spread) else x for name, x in placed.items()}
    seen["read"] = num_bytes()
    seen["held"] = sum(shard.data.nbytes for x in arrays.values() for shard in x.addressable_shards)
    seen["sums"] = {name: float(np.abs(hosts.whole(x)).sum(dtype=np.float64)) for name, x in arrays.items() if x.ndim > 1}
    return seen


def sample(model: str, axes: str, weights: str, out: str, cache: str) -> dict[str, Any]:
    """Makes a clip with a caption cache of its own, and in the process that writes saves its latents and frames."""
    folder = f"{cache}-{jax.process_index()}"
    pipeline = Pipeline.from_pretrained(model, mesh=axes, weights=weights, caption_cache=folder)
    stopped = _raised(lambda: pipeline(PROMPT, **OPTIONS, callback=_stop if jax.process_index() == 1 else None))
    clip = pipeline(PROMPT, **OPTIONS, latents_path=f"{out}.npz")
    if hosts.is_writer(pipeline.networks.mesh):
        np.savez(f"{out}-frames.npz", frames=clip.frames, latents=clip.latents)
    entries = len(list(Path(folder).iterdir())) if Path(folder).exists() else 0
    return {"stopped": stopped, "latents": float(np.abs(clip.latents).sum()), "cached": entries}


def _stop(progress: Any) -> None:
    if progress.step == 1:
        raise ValueError("enough of this")


def _refuse() -> None:
    raise FileExistsError("it exists")


def _raised(function: Callable[[], Any]) -> list[str]:
    try:
        function()
    except Exception as error:
        return [type(error).__name__, str(error)]
    return []


def _counting_bytes() -> Callable[[], int]:
    counts, read = [], FileInOrder.read

    def counting(self: FileInOrder, piece: Any, target: np.ndarray) -> Any:
        counts.append(piece.nbytes)
        return read(self, piece, target)

    FileInOrder.read = counting  # type: ignore[method-assign]
    return lambda: sum(counts)


TASKS: Mapping[str, Callable[..., dict[str, Any]]] = {"decisions": decisions, "sample": sample}


def main(coordinator: str, count: str, process: str, task: str, *arguments: str) -> None:
    """Joins the others and does the task."""
    jax.config.update("jax_disable_most_optimizations", True)
    hosts.join(coordinator, int(count), int(process))
    sys.stdout.write("\n" + json.dumps(TASKS[task](*arguments)) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])
