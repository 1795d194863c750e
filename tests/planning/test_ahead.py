"""The process that asks: whom it starts and how, and what becomes of every way in which the other one ends."""

import json
import os
from pathlib import Path

import pytest

from sora_jax.planning.ahead import AheadError, compile_ahead
from sora_jax.planning.outcome import Outcome
from sora_jax.planning.request import Request
from sora_jax.planning.targets import parse_target
from tests.support.compiler import COMPILED, GB, REFUSED, environment_of, stand_in

REQUEST = Request(model="open-sora-1.2", target="v5e:4x4", options={"num_frames": 51}, programs=("evaluation",))


def test_outcomes_come_as_they_are_said(tmp_path: Path) -> None:
    begun: list[str] = []
    python = stand_in(tmp_path, [{"event": "begins", "program": "evaluation", "what": "one guided evaluation"}, COMPILED])
    (outcome,) = compile_ahead(REQUEST, python=python, begins=begun.append)
    assert begun == ["one guided evaluation"]
    assert (outcome.fits, outcome.peak_bytes, outcome.target.text) == (True, 4 * GB, "v5e:4x4")
    asked = json.loads((tmp_path / "request").read_text())
    assert (asked["target"], asked["options"], asked["programs"]) == ("v5e:4x4", {"num_frames": 51}, ["evaluation"])


@pytest.mark.parametrize(
    ("target", "variable", "optimisation", "effort"),
    [
        ("v5e", "SORA_JAX_TPU_PYTHON", "fast", "-1.0"),
        ("v5e", "SORA_JAX_TPU_PYTHON", "full", None),
        ("h100", "SORA_JAX_CUDA_PYTHON", "fast", None),
    ],
)
def test_the_interpreter_of_a_platform_runs_on_the_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str, variable: str, optimisation: str, effort: str | None
) -> None:
    monkeypatch.setenv(variable, str(stand_in(tmp_path, [COMPILED])))
    monkeypatch.setenv("PYTHONPATH", "elsewhere")
    list(compile_ahead(Request(model="pocket", target=target, optimisation=optimisation)))
    environment = environment_of(tmp_path)
    assert environment["JAX_PLATFORMS"] == "cpu"
    assert environment["JAX_ENABLE_COMPILATION_CACHE"] == "false"
    assert environment.get("JAX_EXEC_TIME_OPTIMIZATION_EFFORT") == effort
    root, after = environment["PYTHONPATH"].split(os.pathsep)
    assert (Path(root, "sora_jax", "planning").is_dir(), after) == (True, "elsewhere")


def test_a_fault_of_the_request_and_one_of_the_compiler(tmp_path: Path) -> None:
    error = {
        "event": "error",
        "kind": "MissingCompilerError",
        "message": "x has no libtpu; pip install y",
        "traceback": "there",
    }
    python = stand_in(tmp_path, [{**error, "input": True}], end="exit 1")
    with pytest.raises(ValueError, match="x has no libtpu; pip install y"):
        list(compile_ahead(REQUEST, python=python))
    python = stand_in(tmp_path, [COMPILED, {**error, "input": False}], end="exit 1")
    outcomes = compile_ahead(REQUEST, python=python)
    assert next(outcomes).fits
    with pytest.raises(AheadError, match="the compiler failed: MissingCompilerError: x has no libtpu") as raised:
        next(outcomes)
    assert raised.value.__notes__ == ["there"]


@pytest.mark.parametrize(
    ("end", "kind", "message"),
    [
        ("kill -9 $$", AheadError, "was killed, as the system does when memory is short"),
        ("echo first >&2; echo last >&2; exit 5", AheadError, "ended with code 5: last"),
        ("exit 5", AheadError, "ended with code 5: no message"),
        (
            "echo \"ModuleNotFoundError: No module named 'flax'\" >&2; exit 1",
            ValueError,
            "python lacks a package that the networks need .*flax.*; install it there",
        ),
    ],
)
def test_a_process_that_ends_early_says_why(tmp_path: Path, end: str, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        list(compile_ahead(REQUEST, python=stand_in(tmp_path, [], end=end)))


def test_what_is_no_interpreter_is_refused(tmp_path: Path) -> None:
    for name in ("gone", "."):
        with pytest.raises(ValueError, match=r"cannot be run .*; expected a Python with jax"):
            list(compile_ahead(REQUEST, python=tmp_path / name))


def test_whoever_stops_asking_ends_the_process(tmp_path: Path) -> None:
    python = stand_in(tmp_path, [COMPILED], end=f"echo $$ > '{tmp_path}/number'; exec sleep 600")
    outcomes = compile_ahead(REQUEST, python=python)
    next(outcomes)
    while not (tmp_path / "number").exists() or not (tmp_path / "number").read_text().strip():
        pass
    number = int((tmp_path / "number").read_text())
    os.kill(number, 0)
    outcomes.close()
    with pytest.raises(ProcessLookupError):
        os.kill(number, 0)


def outcome(target: str = "v5e:4x4", **changes: object) -> Outcome:
    event = {name: value for name, value in COMPILED.items() if name != "event"}
    return Outcome(target=parse_target(target), **{**event, **changes})


def test_an_estimate_is_the_longer_of_computing_and_moving() -> None:
    """The stand-in computes as much as a v5e in a second, and moves what it moves in half of one."""
    estimate = outcome().estimate("bfloat16")
    assert (estimate.seconds, estimate.compute_s, estimate.bound) == (1.0, 1.0, "computing")
    assert estimate.memory_s == pytest.approx(0.5)
    assert outcome().estimate("float32").seconds == pytest.approx(6.0)  # six passes of bfloat16
    assert outcome(moved_bytes=2 * 819 * GB).estimate("bfloat16").bound == "memory"


@pytest.mark.parametrize(
    ("target", "peak", "fits", "why"),
    [
        ("v5e:4x4", 15 * GB, True, ""),
        ("h100", 60 * GB, True, ""),
        ("h100", 80 * GB, True, "set XLA_PYTHON_CLIENT_MEM_FRACTION above 0.94: JAX takes 0.75 by itself"),
        ("h100", 90 * GB, False, "its peak is above the 84.9 GB of the chip; the compiler did not refuse it"),
    ],
)
def test_a_program_fits_within_the_memory_of_the_chip(target: str, peak: int, fits: bool, why: str) -> None:
    assert (outcome(target, peak_bytes=peak).fits, outcome(target, peak_bytes=peak).why) == (fits, why)


def test_a_refusal_does_not_fit_and_has_no_estimate() -> None:
    refused = Outcome(target=parse_target("v5e"), **{name: value for name, value in REFUSED.items() if name != "event"})
    assert (refused.fits, refused.why, refused.estimate("bfloat16")) == (False, REFUSED["refused"], None)
    fields = refused.fields("bfloat16")
    assert json.loads(json.dumps(fields)) == fields
    assert (fields["compiled_for"], fields["estimate"]) == ("one TPU v5e of v5e:2x2", None)
