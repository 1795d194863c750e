"""Programs compiled ahead of time for hardware that is not here: what a caller asks, and the process that does it.

    for outcome in compile_ahead(Request(model="open-sora-1.2", target="v5e:4x4")): ...

Invariant: this process neither imports JAX nor a compiler's plug-in, which would change what ``import jax`` does; a child
process with JAX on the CPU compiles, in the interpreter that is named.  What comes back is the compiler's word, never a
measurement.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from sora_jax.planning.outcome import Outcome
from sora_jax.planning.request import Request

# Which interpreter has the compiler of a platform, where this one has not.
VARIABLES: Mapping[str, str] = {"tpu": "SORA_JAX_TPU_PYTHON", "cuda": "SORA_JAX_CUDA_PYTHON"}
_ROOT = Path(__file__).parents[2]  # where the package lies: the other interpreter need not have it installed
_CHILD = "sora_jax.planning.child"
_ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "JAX_ENABLE_COMPILATION_CACHE": "false",
    "CUDA_VISIBLE_DEVICES": "-1",
    # libtpu looks for the TPU of a cloud machine otherwise, and lets one process alone load it.
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
_FAST = {"JAX_EXEC_TIME_OPTIMIZATION_EFFORT": "-1.0"}


class AheadError(RuntimeError):
    """Compiling failed although the request was valid."""


def compile_ahead(
    request: Request,
    *,
    python: str | os.PathLike[str] | None = None,
    begins: Callable[[str], Any] | None = None,
) -> Iterator[Outcome]:
    """Yields the outcome of every program that is asked for, as it comes.

    Args:
      request: what to compile, and for which hardware.
      python: interpreter that has the compiler; None: the one that an environment variable of `VARIABLES` names, else this one.
        It needs jax, the compiler, and what the networks import (flax, einops, jaxtyping, tensorstore), not this package.
      begins: called with what is compiled next, in words.

    Raises:
      ValueError: the request is wrong, or the interpreter or its compiler is missing; the message says what to install.
      AheadError: the compiler failed.
    """
    target = request.hardware
    interpreter = str(python or os.environ.get(VARIABLES[target.chip.platform]) or sys.executable)
    for event in _events(request, interpreter):
        if event["event"] == "error":
            _raise_reported(event)
        elif event["event"] == "begins":
            if begins is not None:
                begins(event["what"])
        else:
            fields = {name: value for name, value in event.items() if name != "event"}
            yield Outcome(target=target, **fields)


def _events(request: Request, interpreter: str) -> Iterator[Mapping[str, Any]]:
    """Yields what the child process says; whatever ends the iteration ends the process too."""
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as errors:
        try:
            # Its own group, so that Ctrl-C reaches this process alone.
            process = subprocess.Popen(
                [interpreter, "-m", _CHILD],
                env=environment(request),
                process_group=0,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                encoding="utf-8",
            )
        except OSError as error:
            raise ValueError(
                f"interpreter {interpreter} cannot be run ({error.strerror}); expected a Python with jax."
            ) from error
        try:
            yield from _talk(process, request)
            code = process.wait()
        finally:
            process.kill()
            process.communicate()  # closes the pipes too
        errors.seek(0)
        last = (errors.read().strip().splitlines() or ["no message"])[-1]
    _check_ended(code, interpreter, last)


def _talk(process: subprocess.Popen[str], request: Request) -> Iterator[Mapping[str, Any]]:
    """Asks, and yields the answers; standard input stays open as long as someone waits for them."""
    if process.stdin is None or process.stdout is None:
        return
    try:
        process.stdin.write(request.to_json() + "\n")
        process.stdin.flush()
    except BrokenPipeError:  # it ended before it read: the exit code says more
        return
    for line in process.stdout:
        yield json.loads(line)


def environment(request: Request) -> dict[str, str]:
    """Returns the environment variables of the child process."""
    paths = [str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    effort = _FAST if request.optimisation == "fast" and request.hardware.chip.platform == "tpu" else {}
    return {**os.environ, **_ENVIRONMENT, **effort, "PYTHONPATH": os.pathsep.join(paths)}


def _raise_reported(event: Mapping[str, Any]) -> None:
    """Raises the error that the child process reports."""
    if event["input"]:
        raise ValueError(event["message"])
    failure = AheadError(f"the compiler failed: {event['kind']}: {event['message']}")
    failure.add_note(event["traceback"])  # shown by --debug
    raise failure


def _check_ended(code: int, interpreter: str, last: str) -> None:
    if code == -signal.SIGKILL:
        raise AheadError("the process that compiles was killed, as the system does when memory is short.")
    if code and "ModuleNotFoundError" in last:
        raise ValueError(f"{interpreter} lacks a package that the networks need ({last}); install it there.")
    if code:
        raise AheadError(f"the process that compiles ended with code {code}: {last}")
