"""``generate --distributed`` and ``--share`` as processes of this machine; what is refused needs none."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from sora_jax.commands import main
from tests.devices.processes import environment, free_address

PROMPT = "a red circle"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--distributed",), "--distributed makes one mesh of several processes' devices; it needs --mesh"),
        (("--num-processes", "2"), "--num-processes tells processes of one mesh apart; it needs --distributed"),
        (
            ("--mesh", "sequence=2", "--distributed", "--process-id", "1"),
            "--process-id goes with --coordinator and --num-processes; name all three",
        ),
        (
            ("--mesh", "sequence=2", "--distributed", "--coordinator", "a:1", "--num-processes", "2", "--process-id", "2"),
            "--process-id is 2 of 2 processes; expected 0 to 1",
        ),
        (
            ("--mesh", "sequence=2", "--distributed", "--coordinator", "a", "--num-processes", "2", "--process-id", "0"),
            "--coordinator is 'a'; expected address and port",
        ),
        (
            ("--mesh", "sequence=2", "--distributed", "--memory-budget", "3GB", "--dry-run"),
            "--memory-budget streams weights into one device",
        ),
        (
            ("--mesh", "sequence=2", "--distributed", "--preview", "next.png"),
            "--preview is written by a process alone; it does not go with --distributed",
        ),
    ],
)
def test_processes_that_cannot_be_are_one_line(
    tiny_model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str
) -> None:
    asked = ["generate", PROMPT, "--model", str(tiny_model), "-o", str(tmp_path / "clip.mp4"), *arguments]
    assert main.main(asked) == main.BAD_INPUT
    assert message in capfd.readouterr().err.splitlines()[-1]


def begun(count: int, model: Path, out: Path, *arguments: object) -> list[subprocess.Popen[str]]:
    """Returns the guards of ``count`` processes that generate a clip together."""
    address = free_address()
    told = ("--model", model, "--steps", 2, "--compile-cache", "off", "-o", out, *arguments)
    return [
        subprocess.Popen(
            [
                *(sys.executable, "-m", "sora_jax", "generate", PROMPT, "--distributed", "--coordinator", address),
                *("--num-processes", str(count), "--process-id", str(process), "--mesh", f"sequence={count}"),
                *map(str, told),
            ],
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for process in range(count)
    ]


def ended(guards: list[subprocess.Popen[str]], *, timeout_s: int = 400) -> list[tuple[int, str, str]]:
    """Returns code, output and last line of errors of each."""
    try:
        texts = [guard.communicate(timeout=timeout_s) for guard in guards]
    finally:
        for guard in guards:
            guard.kill()
    lasts = [(errors.replace("\r", "\n").strip().splitlines() or [""])[-1] for _, errors in texts]
    return [(guard.returncode, output, last) for guard, (output, _), last in zip(guards, texts, lasts, strict=True)]


@pytest.mark.slow
def test_one_process_writes_the_clip_and_a_clip_that_exists_is_refused_by_all(tiny_model: Path, tmp_path: Path) -> None:
    clip = tmp_path / "clip.npz"
    assert [one[:2] for one in ended(begun(2, tiny_model, clip, "--quiet"))] == [(0, f"{clip}\n"), (0, "")]
    assert sorted(os.listdir(tmp_path)) == ["clip.npz", "clip.npz.json"]
    codes, outputs, lasts = zip(*ended(begun(2, tiny_model, clip)), strict=True)
    assert (codes, outputs) == ((2, 2), ("", ""))
    assert lasts[0].startswith(f"sora-jax: error: {clip} exists; pass --overwrite")
    assert lasts[1].startswith(f"sora-jax: error: process 0: {clip} exists")


def worker_of(guard: subprocess.Popen[str]) -> int:
    """Returns the process that a guard guards."""
    children = Path(f"/proc/{guard.pid}/task/{guard.pid}/children")
    while not (found := children.read_text().split()):
        time.sleep(0.05)
    return int(found[0])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sent", "to_worker", "why", "code"),
    [
        (signal.SIGKILL, True, "was ended by SIGKILL", 1),
        (signal.SIGKILL, False, "was lost", 1),
        (signal.SIGINT, False, "was interrupted", 130),
    ],
)
@pytest.mark.parametrize("process", [0, 1])
def test_a_process_that_ends_ends_the_other_which_names_it(
    tiny_model: Path, tmp_path: Path, sent: signal.Signals, to_worker: bool, why: str, code: int, process: int
) -> None:
    guards = begun(2, tiny_model, tmp_path / "clip.npz", "--steps", 200)
    # The bar of process 0 shows that both are sampling.
    shown = ""
    while "step 1/200" not in shown:
        assert guards[0].stderr is not None
        shown += guards[0].stderr.read(1)
    os.kill(worker_of(guards[process]) if to_worker else guards[process].pid, sent)
    seen = ended(guards, timeout_s=60)
    other_code, output, last = seen[1 - process]
    assert (other_code, output) == (code, "")
    assert f"process {process} (of 0 to 1, on " in last
    assert last.endswith(f"{why}; this one cannot go on.")
    assert seen[process][0] != 0
    assert [name for name in os.listdir(tmp_path) if not name.endswith(".partial")] == []


@pytest.mark.slow
def test_64_captions_over_four_processes_are_those_of_one_run(tiny_model: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("".join(f"a red circle, number {number}\n" for number in range(64)))

    def run(folder: Path, *more: str) -> subprocess.Popen[bytes]:
        asked = (
            *("--model", tiny_model, "--prompt-path", prompts, "--save-dir", folder, "--prompt-as-path", "--format", "npz"),
            *("--num-frames", 1, "--steps", 1, "--batch-size", 4, "--quiet", *more),
        )
        command = [sys.executable, "-m", "sora_jax", "generate", *map(str, asked)]
        return subprocess.Popen(command, env=environment(), stdout=subprocess.DEVNULL)

    alone = run(tmp_path / "alone")
    assert alone.wait(timeout=500) == 0
    shares = [run(tmp_path / "joined", "--share", f"{index}/4") for index in range(4)]
    assert [share.wait(timeout=500) for share in shares] == [0] * 4
    clips = sorted(path.name for path in (tmp_path / "alone").glob("*.npz"))
    assert len(clips) == 64
    assert sorted(path.name for path in (tmp_path / "joined").glob("*.npz")) == clips
    for name in clips:
        with np.load(tmp_path / "alone" / name) as one, np.load(tmp_path / "joined" / name) as other:
            np.testing.assert_array_equal(one["frames"], other["frames"])
            assert str(one["parameters"]) == str(other["parameters"])
