"""Every fixture of the PyTorch reference in tests/golden: the cases of ``python -m tests.parity tests/golden``."""

from pathlib import Path

import pytest

from tests.parity import runner
from tests.parity.fixtures import SUITES, find_suites

pytestmark = pytest.mark.usefixtures("little_optimised")

GOLDEN = Path(__file__).parents[1] / "golden"
FOLDERS = find_suites(GOLDEN)


# Images, and clips of several chunks, whose programs are dear to compile.
DEAR = {("vae", f"{direction}_{frames}") for direction in ("encode", "decode") for frames in (1, 20, 34)}


def marks(suite: str, name: str) -> list[pytest.MarkDecorator]:
    if suite == "wide":
        return [pytest.mark.slow]
    return [pytest.mark.ci] if (suite, name) in DEAR else []


def every_case() -> list[object]:
    return [
        pytest.param(case, id=f"{suite}/{case.name}", marks=marks(suite, case.name))
        for suite, folder in FOLDERS.items()
        for case in runner.list_cases(suite, folder)
    ]


def test_every_suite_is_there():
    assert set(SUITES) <= FOLDERS.keys()


@pytest.mark.parametrize("suite", FOLDERS)
def test_every_file_belongs_to_a_case(suite):
    assert runner.orphans(suite, FOLDERS[suite], runner.list_cases(suite, FOLDERS[suite])) == []


@pytest.mark.parametrize("case", every_case())
def test_fixture(case):
    rows = runner.run_case(case)
    pending = [row.note for row in rows if row.verdict == runner.PENDING]
    if pending:
        pytest.skip(pending[0])
    assert rows
    assert [row for row in rows if row.verdict != runner.PASS] == []
