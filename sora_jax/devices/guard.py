"""One process of a mesh over several, guarded: it works in a child, so that its end can be told whatever ended it.

``supervise`` starts the worker and waits.  Guards are connected (``peers``): when one worker dies, is interrupted or fails, all
others are ended too, since they would wait for it in a collective, and each guard's last line names the process that was first.
JAX's own health check would abort a process in the middle of a line, or leave it waiting.

Invariant: a guard returns only when its worker is dead; a worker ends when its guard does.  JAX is not imported.
"""

import contextlib
import dataclasses
import json
import os
import queue
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from sora_jax import shell
from sora_jax.devices.peers import Events, Peers

VARIABLE = "SORA_JAX_GUARD"  # the file descriptor by which a worker talks with its guard
GATHER_S = 1.0  # after the first report others may come that tell the cause better
ENDING_S = 3.0  # a worker may take to end by itself
VERDICT_S = 15.0  # for which a guard waits for process 0 to name the cause
FINISH_S = 60.0  # for which process 0 waits for the others after its own end
_POLL_S = 0.5

KILLED, FAILED_BY_ITSELF, FAILED, ABORTED = range(4)  # how well a report tells the cause: aborts often follow another's end


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """Why a worker ended before its work was done."""

    process: int
    of: int
    host: str
    why: str
    rank: int
    code: int

    def line(self) -> str:
        """Returns what a user is told."""
        return f"process {self.process} (of 0 to {self.of - 1}, on {self.host}) {self.why}"


def supervise(command: Sequence[str], *, clean_up: Callable[[], Any]) -> int:
    """Runs a command as the worker of this process and returns its exit code, or that of what ended it.

    Args:
      command: the command, which calls `Channel.of_worker`.
      clean_up: called when the worker was killed, to remove what it had begun to write.
    """
    return _Guard(command).run(clean_up)


class _Guard:
    """The state of `supervise`."""

    def __init__(self, command: Sequence[str]):
        self._events: Events = queue.SimpleQueue()
        self._peers = Peers(self._events)
        self._process, self._count = 0, 1
        self._report: Report | None = None  # our worker's
        self._told = False  # whether the worker has written why it ends
        self._verdict: Report | None = None
        self._reports: list[Report] = []
        self._done: set[int] = set()
        self._verdict_by = float("inf")
        ours, theirs = socket.socketpair()
        self._channel = ours
        with theirs:
            environment = {**os.environ, VARIABLE: str(theirs.fileno())}
            # Its own group: Ctrl-C reaches the guard, which passes it on once.
            self._worker = subprocess.Popen(command, env=environment, pass_fds=[theirs.fileno()], process_group=0)
        for work in (self._listen, self._wait):
            threading.Thread(target=work, daemon=True).start()

    def run(self, clean_up: Callable[[], Any]) -> int:
        try:
            while self._verdict is None and not self._is_finished():
                self._next()
            code = self._end()
        except BaseException:
            self._worker.kill()
            self._worker.wait()
            clean_up()
            raise
        if code:
            clean_up()
        return code

    def _is_finished(self) -> bool:
        return self._process in self._done and (self._process > 0 or len(self._done) == self._count)

    def _next(self) -> None:
        """Takes one event, or notes that a time is over."""
        try:
            kind, value = self._events.get(timeout=_POLL_S)
            getattr(self, f"_take_{kind}")(value)
        except queue.Empty:
            pass
        except KeyboardInterrupt:
            self._worker.send_signal(signal.SIGINT)
        except SystemExit:  # SIGTERM, see `shell.run`
            self._worker.send_signal(signal.SIGTERM)
        if time.monotonic() > self._verdict_by:
            self._decide()

    def _take_worker(self, message: dict[str, Any]) -> None:
        """Answers the worker, or takes note of its failure."""
        if "joined" in message:
            self._process, self._count = message["joined"]
            self._answer(self._peers.listen(self._count) if self._process == 0 else {})
        elif "hub" in message:
            try:
                if self._process:
                    self._peers.connect(message["hub"], self._process)
                self._answer({"watching": True})
            except OSError as error:
                self._answer({"watching": False, "why": error.strerror})
        elif "failed" in message:
            self._told = True
            rank = FAILED_BY_ITSELF if message["code"] == shell.BAD_INPUT else FAILED
            self._ended(f"failed: {message['failed']}", rank, message["code"])

    def _take_ended(self, code: int) -> None:
        """Takes note of how the worker ended."""
        if code == 0:
            self._done.add(self._process)
            self._peers.send({"done": self._process})
            self._verdict_by = min(self._verdict_by, time.monotonic() + FINISH_S)
        elif code < 0:
            name = signal.Signals(-code).name
            self._ended(f"was ended by {name}", ABORTED if -code == signal.SIGABRT else KILLED, 128 - code)
        elif code in (shell.INTERRUPTED, shell.TERMINATED):
            self._told = True
            self._ended("was interrupted", KILLED, code)
        else:
            self._ended(f"ended with code {code}", FAILED, code)

    def _take_peer(self, told: tuple[int, dict[str, Any] | None]) -> None:
        """Takes note of what another guard says, or of its end."""
        process, message = told
        if message is None:
            if process not in self._done and self._process not in self._done:
                self._add(self._missing(process, "was lost"))
        elif "done" in message:
            self._done.add(message["done"])
        elif "report" in message:
            self._add(Report(**message["report"]))
        elif "verdict" in message:
            self._verdict = Report(**message["verdict"])

    def _ended(self, why: str, rank: int, code: int) -> None:
        """Tells the others that our worker ended before its work was done."""
        if self._report is None:
            host = socket.gethostname()
            self._report = Report(process=self._process, of=self._count, host=host, why=why, rank=rank, code=code)
            if self._process:
                self._peers.send({"report": dataclasses.asdict(self._report)})
            self._add(self._report)

    def _missing(self, process: int, why: str) -> Report:
        host = self._peers.hosts.get(process, "?")
        return Report(process=process, of=self._count, host=host, why=why, rank=KILLED, code=shell.FAILED)

    def _add(self, report: Report) -> None:
        """Takes a report; process 0 decides soon which was the cause, the others wait for it unless it is lost."""
        self._reports.append(report)
        wait_s = GATHER_S if self._process == 0 or report.process == 0 else VERDICT_S
        self._verdict_by = min(self._verdict_by, time.monotonic() + (wait_s if self._count > 1 else 0))

    def _decide(self) -> None:
        if not self._reports:  # our work is done, but that of another seems not to end
            missing = min(set(range(self._count)) - self._done, default=self._process)
            self._reports = [self._missing(missing, f"did not end within {FINISH_S:.0f} s of process 0")]
        self._verdict = min(self._reports, key=lambda report: report.rank)
        if self._process == 0:
            self._peers.send({"verdict": dataclasses.asdict(self._verdict)})

    def _end(self) -> int:
        """Ends the worker, writes the last line and returns the exit code."""
        verdict = self._verdict
        if verdict is None:
            return shell.OK
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._worker.wait(ENDING_S)
        self._worker.kill()
        self._worker.wait()
        if verdict.process == self._process:
            return verdict.code if self._told else shell.fail(verdict.line(), verdict.code)
        if self._told and self._report is not None and verdict.rank == self._report.rank == FAILED_BY_ITSELF:
            return self._report.code  # all refuse the same, each in its own words
        interrupted = verdict.code in (shell.INTERRUPTED, shell.TERMINATED)
        return shell.fail(f"{verdict.line()}; this one cannot go on.", verdict.code if interrupted else shell.FAILED)

    def _answer(self, message: dict[str, Any]) -> None:
        with contextlib.suppress(OSError):
            self._channel.sendall(json.dumps(message).encode() + b"\n")

    def _listen(self) -> None:
        for line in self._channel.makefile("rb"):
            self._events.put(("worker", json.loads(line)))

    def _wait(self) -> None:
        self._events.put(("ended", self._worker.wait()))


class Channel:
    """A worker's line to its guard."""

    _own: "Channel | None" = None

    def __init__(self, connected: socket.socket):
        self._socket = connected
        self._answers: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        threading.Thread(target=self._listen, daemon=True).start()

    @classmethod
    def of_worker(cls) -> "Channel | None":
        """Returns the line of this process, None where nothing guards it."""
        if cls._own is None and (number := os.environ.pop(VARIABLE, None)) is not None:
            cls._own = cls(socket.socket(fileno=int(number)))
        return cls._own

    def ask(self, **message: Any) -> dict[str, Any]:
        """Tells the guard something and returns its answer."""
        self.tell(**message)
        return self._answers.get()

    def tell(self, **message: Any) -> None:
        """Tells the guard something."""
        self._socket.sendall(json.dumps(message).encode() + b"\n")

    def _listen(self) -> None:
        for line in self._socket.makefile("rb"):
            self._answers.put(json.loads(line))
        os._exit(shell.FAILED)  # the guard is dead


@contextlib.contextmanager
def failures_told() -> Iterator[None]:
    """Tells the guard, if there is one, what error leaves the body: the worker may then wait for others that never come."""
    try:
        yield
    except Exception as error:
        if (channel := Channel.of_worker()) is not None:
            code = shell.BAD_INPUT if shell.is_bad_input(error) else shell.FAILED
            with contextlib.suppress(OSError):
                channel.tell(failed=shell.describe(error), code=code)
        raise
