"""The benchmarks of the sampler lab on the tiny model: an independent solver, the paper's tables, counted bookkeeping."""

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.quality import paper_tables, solver_oracle
from benchmarks.speed import sampler_overhead
from sora_jax.sampling.solvers import SOLVERS

pytestmark = pytest.mark.usefixtures("little_optimised")


def run(module: Any, *arguments: object) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [module.__name__, *map(str, arguments)])
        patch.setattr("builtins.print", lambda *_, **__: None)
        module.main()
    return json.loads(Path(arguments[arguments.index("--out") + 1]).with_suffix(".json").read_text())


def test_closeness_is_the_distance_over_the_size_in_decibels() -> None:
    exact = np.asarray([3.0, 4.0])
    assert solver_oracle.closeness(exact + np.asarray([0.0, 0.05]), exact) == pytest.approx(40)
    solutions = {1e-3: (exact + 0.5, 10), 1e-4: (exact + np.asarray([0.0, 0.005]), 20), 1e-5: (exact, 40)}
    halving = solver_oracle.halving(solutions)
    assert [row["error_db"] for row in halving] == [pytest.approx(16.99, abs=0.01), pytest.approx(60), None]
    assert [row["steps"] for row in halving] == [10, 20, 40]


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("diffrax") is None, reason="needs diffrax")
def test_every_solver_converges_to_an_independent_solution_in_float64(tiny_model: Path, tmp_path: Path) -> None:
    """The tiny network's random flow is rough: orders do not show at so few steps, the common limit does."""
    (tmp_path / "prompts.txt").write_text("a red circle\n")
    words = (tiny_model, "--work", tmp_path / "work", "--prompts", 1, "--prompt-file", tmp_path / "prompts.txt")
    report = run(solver_oracle, *words, "--tolerances", 1e-3, 1e-6, 1e-9, "--out", tmp_path / "oracle.json")
    (halving,) = report["adaptive"]
    assert [row["error_db"] for row in halving][1] > 100
    found = {(row["name"], row["evaluations"]): row["median_db"] for row in report["methods"]}
    for solver in SOLVERS:
        assert found[f"{solver}, shift 1.6", 64] > found[f"{solver}, shift 1.6", 16] + 8, solver
    assert found["euler, shift 1.6", 200] > found["euler, shift 1.6", 64] + 8
    assert max(found.values()) < 140, "closer than float32 can be"


@pytest.mark.slow
def test_the_papers_tables_of_any_model(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a red circle\na green square\n")
    words = (tiny_model, "--work", tmp_path / "work", "--prompts", 2, "--prompt-file", tmp_path / "prompts.txt", "--repeats", 1)
    words = (*words, "--memory-budget", "1GB", "--frames", tmp_path / "clips", "--out", tmp_path / "tables")
    report = run(paper_tables, *words)
    assert [row["evaluations"] for row in report["table_3"][:4]] == [16, 21, 23, 25]
    assert [row["name"] for row in report["table_4"]] == ["TDTM 30", "TDTM 25", "TDTM 20", "TDTM 15", "TDTM 10", "Euler 30"]
    by_name = {row["name"]: row for row in report["table_5"]}
    assert len(by_name) == 8
    assert by_name["LPL"]["evaluations"] == by_name["LPL and TDTM, streamed within 1GB"]["evaluations"] == 16
    assert by_name["none"]["bytes_read"] is None
    assert by_name["none, streamed within 1GB"]["bytes_read"] >= 0
    assert len(report["figure_5"]["mean"]) == 29
    clips = sorted(path.name for path in (tmp_path / "clips" / "tdtm-15").glob("*.mp4"))
    assert clips == ["a green square-0.mp4", "a red circle-0.mp4"]
    assert "## Table 5" in (tmp_path / "tables.md").read_text()


@pytest.mark.slow
def test_bookkeeping_is_counted_in_processor_time_and_in_work(tmp_path: Path) -> None:
    report = run(sampler_overhead, "--counted", "--pairs", 1, "--out", tmp_path / "counted.json")
    kinds = report["bookkeeping"]
    assert kinds.keys() == {**sampler_overhead.KINDS, **sampler_overhead.WATCHED}.keys()
    passes = {name: row["bytes_a_step"] / report["latents_bytes"] for name, row in kinds.items()}
    assert 0 < passes["plain"] < passes["everything"]
    assert 0 < kinds["plain"]["copies_a_step"] < kinds["everything"]["copies_a_step"]
