"""The attack: a seeded part of it in every run, all of it with the slow tests; the counts are printed."""

from collections import Counter
from pathlib import Path

import pytest

from tests.adversarial import checkpoints, directories, runner
from tests.adversarial.verdicts import ALLOWED, Outcome, Verdict, table

FEW = {"checkpoint": 2 * len(checkpoints.KINDS), "directory": 2 * len(directories.MUTATIONS), "command": 40}
ALL = {"checkpoint": 12 * len(checkpoints.KINDS), "directory": 12 * len(directories.MUTATIONS), "command": 200}
PARTS = [("checkpoint", ALL["checkpoint"]), ("directory", ALL["directory"]), ("command", ALL["command"])]


def _attack(kind: str, count: int, scratch: Path) -> list[Outcome]:
    outcomes = runner.run(kind, range(count), scratch)
    report = f"{kind}, {count} mutants\n{table(outcomes)}"
    print(report)  # noqa: T201  # the counts are what this test is for
    assert len(outcomes) == count
    assert all(outcome.verdict in ALLOWED for outcome in outcomes), report
    return outcomes


@pytest.mark.parametrize("kind", FEW)
def test_no_mutant_does_harm(kind: str, tmp_path: Path) -> None:
    outcomes = _attack(kind, FEW[kind], tmp_path)
    assert Counter(outcome.verdict for outcome in outcomes)[Verdict.REFUSED] > len(outcomes) / 2


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "count"), PARTS)
def test_none_of_all_mutants_does_harm(kind: str, count: int, tmp_path: Path) -> None:
    """At least 600 checkpoints, 150 model directories and 200 command lines."""
    assert (ALL["checkpoint"], ALL["directory"], ALL["command"]) >= (600, 150, 200)
    _attack(kind, count, tmp_path)


def test_a_mutant_can_be_made_again(tmp_path: Path) -> None:
    """The number and the seed decide alone."""
    done = []
    for attempt in range(2):
        folder = tmp_path / str(attempt)
        folder.mkdir()
        done.append([checkpoints.run(number, _made(folder / str(number)))[0] for number in range(0, 60, 7)])
    assert done[0] == done[1]


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def test_every_harm_would_be_counted() -> None:
    outcomes = [Outcome(i, "mutation", verdict, "seen") for i, verdict in enumerate(Verdict)]
    lines = table(outcomes).splitlines()
    assert lines[: len(Verdict)] == [f"    1  {verdict}" for verdict in Verdict]
    assert len(lines) == 2 * len(Verdict) - len(ALLOWED)
