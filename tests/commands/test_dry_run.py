"""``generate --dry-run`` says what a run would do, refuses what a run refuses, and leaves nothing behind."""

import re
from pathlib import Path

import pytest

from sora_jax.commands import main
from sora_jax.pipeline.model_file import ModelFile
from sora_jax.sampling.reuse import Plan

PROMPT = "a red circle"


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_it_names_sizes_work_and_files_and_writes_none(tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["generate", PROMPT, "a square", "--model", str(tiny_model), "--dry-run", "--batch-size", "2"]
    assert main.main([*command, "--seed", "3", "--memory-budget", "2GB"]) == main.OK
    output = capsys.readouterr().out
    assert "2 clips of 17 frames, 2 together: 32 x 48 pixels, 8 frames per second" in output
    assert "latents: 5 x 4 x 6; 30 tokens, 6 a frame" in output
    assert "evaluations: 4 in 4 steps of euler; guidance 3 (caption and null caption)" in output
    assert "of a budget of 2,000 MB" in output
    assert "sample_0000.mp4: seed 3, 'a red circle'\nsample_0001.mp4: seed 4, 'a square'" in output
    assert not list(Path().iterdir())
    assert (
        main.main(["generate", PROMPT, "--model", str(tiny_model), "--dry-run", "--num-frames", "34", "--loop", "3"]) == main.OK
    )
    output = capsys.readouterr().out
    assert "1 clip of 34 frames, 3 in a row, 68 frames in all: " in output  # each but the first takes 17 frames over
    assert re.search(r"time: about \d\.\d s \(", output)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--reference-path", "gone.png"), "Reference gone.png does not exist"),
        (("--align", "5"), "align rounds where references go, but no prompt has a reference"),
        (("--leap", "9"), "leap index 9 is beyond the last of 4 steps"),
        (("--memory-budget", "1MB"), "memory budget of 0.001 GB is too small"),
    ],
)
def test_it_refuses_what_a_run_refuses(
    tiny_model: Path, capsys: pytest.CaptureFixture[str], options: tuple[str, ...], message: str
) -> None:
    assert main.main(["generate", PROMPT, "--model", str(tiny_model), "--dry-run", *options]) == main.BAD_INPUT
    captured = capsys.readouterr()
    assert (captured.out, captured.err.count("\n"), message in captured.err) == ("", 1, True), captured.err


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, (4, False)),
        ({"solver": "heun"}, (7, False)),  # the last step has one
        ({"leap": 1}, (2, False)),
        ({"leap": "dynamic"}, (4, True)),
        ({"plan": Plan.evaluate_at([0, 2], 4)}, (2, False)),
    ],
)
def test_evaluations_are_counted_without_sampling(tiny_model: Path, options: dict, expected: tuple[float, bool]) -> None:
    assert ModelFile.read(tiny_model).resolve(options).evaluations() == expected
