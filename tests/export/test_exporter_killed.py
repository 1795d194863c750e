"""What kills and interrupts do to an export that works in a process of its own."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from sora_jax import files

pytest.importorskip("jsonschema", reason="manifests are validated with jsonschema (extra stablehlo, onnx or coreml)")
pytest.importorskip("flatbuffers", reason="the stablehlo extra is not installed")

PATIENCE_S = 60  # before a process that should have ended is called stuck


@pytest.fixture
def exporting(tiny_model: Path, tmp_path: Path) -> Iterator["subprocess.Popen[str]"]:
    """The command, when it has told that its first stage is at work."""
    command = [sys.executable, "-m", "sora_jax", "export", str(tiny_model), str(tmp_path / "out"), "--target", "stablehlo"]
    with subprocess.Popen([*command, "--stages", "t5"], text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stderr is not None
        assert any(line.startswith("sora-jax: 0/3 t5_embed") for line in process.stderr)  # behind the table of sizes
        yield process
        process.kill()


def children(process: int) -> list[int]:
    return [int(child) for task in Path(f"/proc/{process}/task").iterdir() for child in (task / "children").read_text().split()]


def worker_of(process: "subprocess.Popen[str]") -> int:
    """Returns the export's process, when it has become one of its own."""
    for _ in range(PATIENCE_S * 10):
        for child in children(process.pid):
            if "sora_jax.export.worker" in Path(f"/proc/{child}/cmdline").read_text():
                return child
        time.sleep(0.1)
    raise AssertionError("no process was begun")


def has_ended(process: int) -> bool:
    """Returns whether a process ends; one that nobody waits for stays as a zombie."""
    for _ in range(PATIENCE_S * 10):
        try:
            state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return True
        if state == "Z":
            return True
        time.sleep(0.1)
    return False


def test_a_killed_export_takes_its_process_along_and_the_next_removes_what_it_left(exporting, tmp_path):
    worker = worker_of(exporting)
    os.kill(exporting.pid, signal.SIGKILL)
    assert has_ended(worker)
    assert {path.suffix for path in tmp_path.iterdir()} == {".partial"}
    exporting.wait()
    files.remove_leftovers.cache_clear()
    files.remove_leftovers(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_an_interrupt_ends_both_and_leaves_nothing(exporting, tmp_path):
    worker = worker_of(exporting)
    os.kill(exporting.pid, signal.SIGINT)
    _, errors = exporting.communicate()
    assert exporting.returncode == 130
    assert errors.strip().splitlines()[-1] == "sora-jax: error: interrupted"
    assert has_ended(worker)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_process_that_is_killed_is_named(exporting, tmp_path):
    os.kill(worker_of(exporting), signal.SIGKILL)
    _, errors = exporting.communicate()
    assert exporting.returncode == 1
    assert "the process that exported t5_embed was killed, as the system does when memory is short" in errors
    assert not list(tmp_path.iterdir())
