"""The index of benchmarks, benchmarks/README.md, against the folder: every command, every result, the last run of each."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2] / "benchmarks"
ROWS = [line.split(" | ") for line in (ROOT / "README.md").read_text(encoding="utf-8").splitlines() if "`python -m" in line]
RESULTS = sorted(path.name for path in (ROOT / "results").iterdir())
ROOMS = ("speed", "memory", "quality", "export")


def recorded(name: str) -> str:
    """Returns what a result file says of its run: the commit that was measured, else the model."""
    text = (ROOT / "results" / name).read_text(encoding="utf-8")
    if name.endswith(".md"):
        return re.search(r"commit (\w+)", text)[1]
    result = json.loads(text)
    commit = result.get("environment", {}).get("commit")
    return commit or re.search(r'"model": "pocket (\w+)"', text)[1]


def row_of(name: str) -> list[str]:
    rows = [row for row in ROWS if f"(results/{name})" in row[2]]
    assert len(rows) == 1, f"{name} is in {len(rows)} rows of benchmarks/README.md"
    return rows[0]


def test_every_command_is_listed_in_its_room():
    modules = {f"benchmarks.{room}.{path.stem}" for room in ROOMS for path in (ROOT / room).glob("*.py")} - {
        f"benchmarks.{room}.__init__" for room in ROOMS
    }
    listed = set(re.findall(r"python -m (benchmarks\.\w+\.\w+)", (ROOT / "README.md").read_text(encoding="utf-8")))
    assert listed == modules


@pytest.mark.parametrize("name", RESULTS)
def test_every_result_is_listed_with_its_last_run(name: str):
    last_run = row_of(name)[3]
    assert recorded(name) in last_run
    (shown,) = re.findall(r"\d{4}-\d\d-\d\d", last_run)
    dates = re.findall(r'"date": "(\S+)"', (ROOT / "results" / name).read_text(encoding="utf-8"))
    assert dates in ([], [shown])


@pytest.mark.parametrize("name", [name for name in RESULTS if name.endswith(".json")])
def test_a_result_was_written_by_the_command_of_its_row(name: str):
    command = json.loads((ROOT / "results" / name).read_text(encoding="utf-8")).get("command")
    if command is not None:
        assert f"`{command}`" in row_of(name)[1]


def test_every_listed_result_exists():
    listed = re.findall(r"\]\(([^)]+)\)", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert len(listed) > len(RESULTS)
    assert [name for name in listed if not (ROOT / name).exists()] == []


def test_every_module_says_its_command():
    for room in ROOMS:
        for path in (ROOT / room).glob("*.py"):
            if path.name != "__init__.py":
                docstring = path.read_text(encoding="utf-8").split('"""')[1]
                assert f"Command:  python -m benchmarks.{room}.{path.stem}" in docstring, path
