"""One mesh over several processes: how they find each other, who writes, and what all of them must take alike.

Each process computes for its own devices and waits for the others in every collective, so one that decides by itself (a file
that exists, an error of a callback) would leave the others waiting.  Such decisions are taken by process 0, or by all together,
and told to all.

Invariant: every process calls these functions in the same order; with one process they communicate nothing.  Only this module
imports JAX's multihost_utils.
"""

import json
import os
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh

from sora_jax import shell
from sora_jax.devices.guard import Channel

WRITER = 0  # the process that writes files
HEARTBEAT_S = 50  # where nothing else watches, JAX ends a process so long after the last sign of another

Value = TypeVar("Value")


class ElsewhereError(RuntimeError):
    """Another process failed; the message says which and why."""


class RefusedElsewhereError(ValueError):
    """Another process refused the input; the message says which and why."""


def join(coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None) -> None:
    """Makes this process one of several whose devices a mesh can have; to be called before any device is used.

    Without arguments they are taken from the launcher: SLURM, Open MPI, TPU pods, GKE.

    Raises:
      ValueError: no launcher is recognised and an argument is missing.
      RuntimeError: the others cannot be reached.
    """
    channel = Channel.of_worker()
    if channel is not None:
        _keep_standard_output()
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM for itself
    try:
        jax.distributed.initialize(coordinator, num_processes, process_id, heartbeat_timeout_seconds=HEARTBEAT_S)
    except ValueError as error:
        raise ValueError(
            f"no launcher of several processes is recognised here ({error}); expected SLURM, Open MPI, a TPU pod or GKE: "
            "name --coordinator, --num-processes and --process-id."
        ) from error
    if channel is None:
        return
    found = channel.ask(joined=[jax.process_index(), jax.process_count()])
    if coordinator is not None and "addresses" in found:
        found["addresses"] = [coordinator.rpartition(":")[0].strip("[]"), *found["addresses"]]
    answer = channel.ask(hub=json.loads(_broadcast(json.dumps(found))))
    if not answer["watching"]:
        raise RuntimeError(answer["why"])


def is_over_processes(mesh: Mesh | None) -> bool:
    """Returns whether devices of the mesh belong to other processes."""
    return mesh is not None and any(device.process_index != jax.process_index() for device in mesh.devices.flat)


def check_processes(mesh: Mesh) -> None:
    """Refuses a mesh over several processes that leaves one of them out: it would wait for nothing.

    Raises:
      ValueError: says which processes have devices of the mesh.
    """
    used = {device.process_index for device in mesh.devices.flat}
    if is_over_processes(mesh) and len(used) < jax.process_count():
        raise ValueError(
            f"the mesh has devices of the processes {', '.join(map(str, sorted(used)))} of {jax.process_count()}; expected "
            "devices of this process alone, or of all processes."
        )


def is_writer(mesh: Mesh | None) -> bool:
    """Returns whether this process writes the files of what the mesh makes."""
    return not is_over_processes(mesh) or jax.process_index() == WRITER


def decided(function: Callable[[], Value]) -> Value:
    """Returns what ``function`` returns in process 0, where alone it is called; a value that JSON can hold.

    Raises:
      Exception: whatever it raises, in process 0.
      RefusedElsewhereError, ElsewhereError: the same in the others.
    """
    if jax.process_count() == 1:
        return function()
    failure: Exception | None = None
    told: dict[str, Any] = {}
    if jax.process_index() == WRITER:
        try:
            told = {"value": function()}
        except Exception as error:
            failure, told = error, {"error": shell.describe(error), "refused": shell.is_bad_input(error)}
    told = json.loads(_broadcast(json.dumps(told)))
    if failure is not None:
        raise failure
    if "error" in told:
        raise _elsewhere(told["error"], WRITER, refused=told["refused"])
    return told["value"]


def together(failure: BaseException | None) -> None:
    """Raises in all processes where one of them failed: ``failure`` in that one, else an error that names it.

    Raises:
      BaseException: ``failure``.
      RefusedElsewhereError, ElsewhereError: another process failed.
    """
    from jax.experimental import multihost_utils

    flags = np.ravel(multihost_utils.process_allgather(np.uint8(failure is not None)))
    if not flags.any():
        return
    first = int(np.argmax(flags))
    told = {"error": shell.describe(failure), "refused": shell.is_bad_input(failure)} if failure is not None else {}
    told = json.loads(_broadcast(json.dumps(told), source=first))
    if failure is not None:
        raise failure
    raise _elsewhere(told["error"], first, refused=told["refused"])


def same_bytes(data: bytes) -> bytes:
    """Returns the bytes that process 0 has."""
    return data if jax.process_count() == 1 else _broadcast_bytes(data, WRITER)


def whole(x: jax.Array) -> np.ndarray:
    """Returns all of an array on the host, also what lies on devices of other processes."""
    if x.is_fully_addressable or x.is_fully_replicated:
        return np.asarray(x)
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(x, tiled=True))


def _elsewhere(message: str, process: int, *, refused: bool) -> Exception:
    return (RefusedElsewhereError if refused else ElsewhereError)(f"process {process}: {message}")


def _broadcast(text: str, source: int = WRITER) -> str:
    return _broadcast_bytes(text.encode(), source).decode()


def _broadcast_bytes(data: bytes, source: int) -> bytes:
    """Returns the bytes of one process in all of them: first how many there are, then they."""
    from jax.experimental import multihost_utils

    is_source = jax.process_index() == source
    length = int(multihost_utils.broadcast_one_to_all(np.int32(len(data)), is_source))
    values = np.zeros(-(-length // 4096) * 4096, np.uint8)  # few lengths, so that few programs are compiled
    if is_source:
        values[:length] = np.frombuffer(data, np.uint8)
    return np.asarray(multihost_utils.broadcast_one_to_all(values, is_source)).tobytes()[:length]


def _keep_standard_output() -> None:
    """Keeps standard output for results: gloo writes about its connections to the file descriptor."""
    results = os.fdopen(os.dup(1), "w", encoding="utf-8")
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 1)
    sys.stdout = results
