"""Work that the kernel kills (SIGKILL) at its n-th operation on files, or after a time, in a process forked for each trial.

Invariant: who forks has no threads, so `in_a_process_without_threads` runs whole tests in a program of their own.
"""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Action = Callable[[Path, Path], None]  # from a source, in a folder

EVERYTHING = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree")
PUBLICATIONS = ("os.rename", "os.link", "os.remove", "os.rmdir", "shutil.rmtree")


def in_child(
    act: Action,
    source: Path,
    target: Path,
    *,
    operation: int = 0,
    delay_s: float = 600.0,
    events: Sequence[str] = EVERYTHING,
) -> tuple[bool, int]:
    """Returns whether a forked process was killed, and its operations if it was not."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.write(writer, str(_act_and_die(act, source, target, operation, delay_s, events)).encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        text = pipe.read()
    killed = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    if not killed and not text:
        raise RuntimeError("the work failed before it was killed")
    return killed, int(text or 0)


def _act_and_die(act: Action, source: Path, target: Path, operation: int, delay_s: float, events: Sequence[str]) -> int:
    """Acts and returns the number of audited operations, unless the process is killed at one of them or by the time."""
    count = 0

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        of_a_tree = event in ("os.remove", "os.rmdir") and arguments[1] != -1  # one of many, by a descriptor
        if event in events and not (of_a_tree and events is PUBLICATIONS):
            count += 1
            if count == operation:
                die()

    timer = threading.Timer(delay_s, die)
    timer.daemon = True
    timer.start()
    sys.addaudithook(audit)
    act(source, target)
    return count


def in_a_process_without_threads(module: str, function: str, folder: Path) -> dict[str, int]:
    """Returns the counts that a function of a test module returns when it is called with a folder in a new process."""
    program = f"import json, pathlib, sys; from {module} import {function}"
    program += f"; print(json.dumps({function}(pathlib.Path(sys.argv[1]))))"
    result = subprocess.run(
        [sys.executable, "-c", program, str(folder)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)
