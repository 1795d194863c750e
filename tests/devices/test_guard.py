"""Guards of workers that depend on each other: whichever ends first, all end, and the last line names it.  No JAX here."""

import socket
import subprocess
import sys
from pathlib import Path

import pytest

# Joins as `hosts.join` does, with a file in place of a broadcast; then does what it is told.
WORKER = """
import json, os, pathlib, signal, sys, time
from sora_jax.devices.guard import Channel, failures_told
process, folder, act = int(sys.argv[1]), pathlib.Path(sys.argv[2]), sys.argv[3]
channel = Channel.of_worker()
found = channel.ask(joined=[process, 2])
if process == 0:
    (folder / "part").write_text(json.dumps({**found, "addresses": ["127.0.0.1"]}))
    (folder / "part").rename(folder / "hub")
while not (folder / "hub").exists():
    time.sleep(0.01)
assert channel.ask(hub=json.loads((folder / "hub").read_text())) == {"watching": True}
(folder / f"ready{process}").touch()
while not all((folder / f"ready{i}").exists() for i in range(2)):
    time.sleep(0.01)
if act == "die":
    os.kill(os.getpid(), signal.SIGKILL)
if act == "abort":
    time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGABRT)
if act == "refuse":
    with failures_told():
        raise ValueError("no such prompt")
if act == "wait":
    time.sleep(100)
"""
GUARD = """
import sys
from sora_jax import shell
from sora_jax.devices.guard import supervise
command = [sys.executable, *sys.argv[1:]]
sys.exit(shell.run(lambda _: supervise(command, clean_up=lambda: print("cleaned")), []))
"""


@pytest.mark.parametrize(
    ("acts", "codes", "lines"),
    [
        (("work", "work"), (0, 0), ("", "")),
        (("wait", "die"), (1, 137), ("process 1 (of 0 to 1, on HOST) was ended by SIGKILL; this one cannot go on.",) * 2),
        (("die", "abort"), (137, 1), ("process 0 (of 0 to 1, on HOST) was ended by SIGKILL; this one cannot go on.",) * 2),
        (
            ("wait", "refuse"),
            (1, 2),
            ("process 1 (of 0 to 1, on HOST) failed: no such prompt; this one cannot go on.", "ValueError: no such prompt"),
        ),
    ],
)
def test_all_end_with_the_first_and_name_it(
    tmp_path: Path, acts: tuple[str, str], codes: tuple[int, int], lines: tuple[str, str]
) -> None:
    guards = [
        subprocess.Popen(
            [sys.executable, "-c", GUARD, "-c", WORKER, str(process), str(tmp_path), act],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for process, act in enumerate(acts)
    ]
    ended = [guard.communicate(timeout=60) for guard in guards]  # the promise: all end within 60 s
    assert tuple(guard.returncode for guard in guards) == codes
    for (output, errors), code, line, act in zip(ended, codes, lines, acts, strict=True):
        last = (errors.strip().splitlines() or [""])[-1]
        own = line.replace("HOST", socket.gethostname())
        if act == "die":
            own = own.removesuffix("; this one cannot go on.")
        assert last.removeprefix("sora-jax: error: ") == own
        assert output == ("cleaned\n" if code else "")
