"""The attack: every mutation once in .ci/run, all of it with the slow tests; the counts are printed."""

from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.adversarial import checkpoints, directories, runner
from tests.adversarial.verdicts import ALLOWED, Outcome, Verdict, table

EACH = {"checkpoint": len(checkpoints.KINDS), "directory": len(directories.MUTATIONS), "command": 20}
ALL = {"checkpoint": 12 * len(checkpoints.KINDS), "directory": 12 * len(directories.MUTATIONS), "command": 200}


def _attack(counts: Mapping[str, int], scratch: Path) -> None:
    outcomes = runner.run([(kind, number) for kind, count in counts.items() for number in range(count)], scratch)
    for kind, count in counts.items():
        own = [outcome for outcome in outcomes if outcome.kind == kind]
        report = f"{count} mutants of kind {kind}\n{table(own)}"
        print(report)  # noqa: T201  # the counts are what this test is for
        assert len(own) == count
        assert all(outcome.verdict in ALLOWED for outcome in own), report
        assert sum(outcome.verdict == Verdict.REFUSED for outcome in own) > count / 2


@pytest.mark.ci
def test_no_mutation_does_harm(tmp_path: Path) -> None:
    _attack(EACH, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ALL)
def test_none_of_all_mutants_does_harm(kind: str, tmp_path: Path) -> None:
    _attack({kind: ALL[kind]}, tmp_path)


def test_the_attack_has_its_size() -> None:
    assert ALL["checkpoint"] >= 600
    assert ALL["directory"] >= 150
    assert ALL["command"] >= 200


def test_a_mutant_can_be_made_again(tmp_path: Path) -> None:
    """The number and the seed decide alone."""
    numbers = [number for number, kind in enumerate(checkpoints.KINDS) if kind.network == "t5"]
    first, second = ([checkpoints.make(number, tmp_path / f"{i} {number}") for number in numbers] for i in range(2))
    assert first == second
    files = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file() and not path.is_symlink())
    own = [path for path in files if str(path).startswith("0 ") and path.suffix not in (".bin", "")]  # zip files hold times
    assert own
    assert all((tmp_path / path).read_bytes() == (tmp_path / f"1{str(path)[1:]}").read_bytes() for path in own)


def test_every_harm_would_be_counted() -> None:
    outcomes = [Outcome("checkpoint", i, "mutation", verdict, "seen") for i, verdict in enumerate(Verdict)]
    lines = table(outcomes).splitlines()
    assert lines[: len(Verdict)] == [f"    1  {verdict}" for verdict in Verdict]
    assert len(lines) == 2 * len(Verdict) - len(ALLOWED)
