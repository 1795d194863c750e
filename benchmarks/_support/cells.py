"""Results that are a table of cells, each dear: what a file has is kept, what it lacks is computed and written as it comes."""

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from benchmarks._support.machine import compact, environment

Row = Mapping[str, Any]  # of a cell: ``cell`` (its fields), ``error`` (text, or None), and what was computed


class Cell(Protocol):
    """A named tuple that says what a row is of."""

    def _asdict(self) -> dict[str, Any]: ...


def results_path(description: str, default: Path) -> Path:
    """Returns the file of the results that the command line names with ``--json``."""
    parser = argparse.ArgumentParser(description=description.split("\n")[0])
    parser.add_argument("--json", type=Path, default=default, help="file of the results, which is added to")
    path: Path = parser.parse_args().json
    return path


def complete(path: Path, cells: Sequence[Cell], compute: Callable[[Any], Row], command: str) -> None:
    """Computes the cells that the file lacks or that ended with an error; rows stand in the order of ``cells``."""
    order = [cell._asdict() for cell in cells]
    rows = list(json.loads(path.read_text())["rows"]) if path.exists() else []
    for cell, fields in zip(cells, order, strict=True):
        if any(row["cell"] == fields and row["error"] is None for row in rows):
            continue
        print(f"computing {' '.join(map(str, fields.values()))}", flush=True)
        rows = [row for row in rows if row["cell"] != fields] + [compute(cell)]
        _write(path, sorted(rows, key=lambda row: order.index(row["cell"])), command)


def _write(path: Path, rows: Sequence[Row], command: str) -> None:
    temporary = path.with_suffix(".partial")
    temporary.write_text(compact({"command": command, "rows": rows, "environment": environment()}))
    temporary.replace(path)
