"""A process that runs mutants one by one under limits, as its standard input names them, and writes a line for each.

``python -m tests.adversarial.worker SCRATCH``; each line of the input has a kind and a number.  Invariant: a mutant that takes
30 CPU seconds or 60 of the clock ends the process, which the runner notices; memory beyond 1 GB is refused to it by the kernel.
"""

import json
import os
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tests.adversarial.verdicts import Verdict

CPU_S, MEMORY_BYTES = 10.0, 10**9
_KILL_CPU_S, _KILL_S = 30.0, 60.0
_SPARE_BYTES = 512 << 20  # of address space: stacks of threads, arenas of the allocator

Case = Callable[[int, Path], tuple[str, Verdict, str]]


def main() -> None:
    """Reads numbers until the input ends."""
    scratch = Path(sys.argv[1])
    _prepare()
    reply = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else is printed is not taken for a reply
    reply.write("ready\n")
    reply.flush()
    for line in sys.stdin:
        kind, number = line.split()[0], int(line.split()[1])
        folder = scratch / f"{kind}{number}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        reply.write(json.dumps(_limited(_case(kind), number, folder)) + "\n")
        reply.flush()
        shutil.rmtree(folder, ignore_errors=True)


def _prepare() -> None:
    import jax

    jax.config.update("jax_platforms", "cpu")
    # Durability is not the subject, and a second reading by PyTorch takes seconds: both have tests of their own.
    os.sync = os.fsync = lambda *_: None  # type: ignore[assignment]
    from convert_weights import second_reader

    second_reader.importlib.util.find_spec = lambda *_: None  # type: ignore[attr-defined,assignment]


def _case(kind: str) -> Case:
    from tests.adversarial import checkpoints, command_lines, directories

    return {"checkpoint": checkpoints.run, "directory": directories.run, "command": command_lines.run}[kind]


def _limited(case: Case, number: int, folder: Path) -> list[object]:
    signal.setitimer(signal.ITIMER_PROF, _KILL_CPU_S)
    signal.setitimer(signal.ITIMER_REAL, _KILL_S)
    resource.setrlimit(resource.RLIMIT_AS, (_status("VmSize") + MEMORY_BYTES + _SPARE_BYTES, resource.RLIM_INFINITY))
    before, started = _status("VmRSS"), time.process_time()
    _forget_peak()
    try:
        mutation, verdict, detail = case(number, folder)
    except Exception as error:  # of the generator itself, or of a check behind the command
        mutation, verdict, detail = "the case", Verdict.TRACEBACK, f"{type(error).__name__}: {error!s:.300}"
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
    seconds, nbytes = time.process_time() - started, _status("VmHWM") - before
    if seconds > CPU_S:
        verdict, detail = Verdict.SLOW, f"{seconds:.1f} s; {detail}"
    if nbytes > MEMORY_BYTES:
        verdict, detail = Verdict.LARGE, f"{nbytes / 1e9:.2f} GB; {detail}"
    return [number, mutation, verdict, detail, round(seconds, 3), nbytes]


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    return 0


def _forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


if __name__ == "__main__":
    main()
