import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from benchmarks._support.cells import complete


class Cell(NamedTuple):
    size: str
    frames: int


CELLS = [Cell("256p", 51), Cell("480p", 51), Cell("720p", 204)]


def row(cell: Cell, error: str | None = None) -> dict[str, Any]:
    return {"cell": cell._asdict(), "error": error, "peak": cell.frames}


def test_cells_that_the_file_has_are_kept_and_others_computed_in_their_order(tmp_path: Path):
    path, computed = tmp_path / "cells.json", []

    def compute(cell: Cell) -> dict[str, Any]:
        computed.append(cell)
        if cell == CELLS[2] and computed.count(cell) == 1:
            return row(cell, "the compiler was killed")
        if cell == CELLS[1] and computed.count(cell) == 1:
            raise KeyboardInterrupt
        return row(cell)

    with pytest.raises(KeyboardInterrupt):
        complete(path, CELLS, compute, "the command")
    assert json.loads(path.read_text())["rows"] == [row(CELLS[0])]
    complete(path, CELLS, compute, "the command")
    assert [row["error"] for row in json.loads(path.read_text())["rows"]] == [None, None, "the compiler was killed"]
    complete(path, CELLS, compute, "the command")
    assert json.loads(path.read_text())["rows"] == [row(cell) for cell in CELLS]
    assert computed == [CELLS[0], CELLS[1], CELLS[1], CELLS[2], CELLS[2]]
    assert list(tmp_path.iterdir()) == [path]
