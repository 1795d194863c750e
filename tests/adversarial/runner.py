"""Deals mutants out to a few worker processes and collects their outcomes; a worker that dies is replaced.

A mutant is a kind (``checkpoint``, ``directory`` or ``command``) and a number.

``python -m tests.adversarial.runner KIND COUNT`` prints the counts.
"""

import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterable
from pathlib import Path

from tests.adversarial.verdicts import ALLOWED, MUTATION, Outcome, Verdict, table

WORKERS = 2
Mutant = tuple[str, int]
ROOT = Path(__file__).parents[2]


def run(mutants: Iterable[Mutant], scratch: Path) -> list[Outcome]:
    """Returns the outcomes of mutants, in their order by kind and number."""
    left: queue.Queue[Mutant] = queue.Queue()
    for mutant in mutants:
        left.put(mutant)
    outcomes: list[Outcome] = []
    threads = [threading.Thread(target=_serve, args=(left, scratch / str(i), outcomes)) for i in range(WORKERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sorted(outcomes, key=lambda outcome: (outcome.kind, outcome.number))


def _serve(left: "queue.Queue[Mutant]", scratch: Path, outcomes: list[Outcome]) -> None:
    worker: subprocess.Popen[str] | None = None
    while True:
        try:
            kind, number = left.get_nowait()
        except queue.Empty:
            break
        worker = worker or _start(scratch)
        assert worker.stdin is not None and worker.stdout is not None  # noqa: PT018
        try:
            worker.stdin.write(f"{kind} {number}\n")
            worker.stdin.flush()
            reply = worker.stdout.readline()
        except BrokenPipeError:
            reply = ""
        if reply:
            _, mutation, verdict, detail, *_ = json.loads(reply)
            outcomes.append(Outcome(kind, number, mutation, Verdict(verdict), detail))
        else:
            outcomes.append(_death(kind, number, worker, scratch / f"{kind}{number}" / MUTATION))
            worker = None
    if worker is not None:
        assert worker.stdin is not None
        worker.stdin.close()
        worker.wait()


def _start(scratch: Path) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "tests.adversarial.worker", str(scratch)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    errors = tempfile.TemporaryFile("w+")  # noqa: SIM115  # lives as long as the worker
    worker = subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors
    )
    assert worker.stdout is not None
    if worker.stdout.readline() != "ready\n":
        errors.seek(0)
        raise RuntimeError(f"the worker did not start: {errors.read()[-2000:]}")
    return worker


def _death(kind: str, number: int, worker: "subprocess.Popen[str]", mutation: Path) -> Outcome:
    code = worker.wait()
    done = mutation.read_text() if mutation.exists() else "the mutant of this number"
    slow = -code in (signal.SIGPROF, signal.SIGALRM, signal.SIGXCPU)
    return Outcome(kind, number, done, Verdict.SLOW if slow else Verdict.TRACEBACK, f"the process ended with {code}")


def main() -> None:
    """Prints the counts of a kind."""
    kind, count = sys.argv[1], int(sys.argv[2])
    with tempfile.TemporaryDirectory() as scratch:
        outcomes = run([(kind, number) for number in range(count)], Path(scratch))
    sys.stdout.write(table(outcomes) + "\n")
    sys.exit(any(outcome.verdict not in ALLOWED for outcome in outcomes))


if __name__ == "__main__":
    main()
