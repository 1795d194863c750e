"""The programs and the notebook of docs/examples run as they stand; each program asserts what it shows."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parents[1] / "docs" / "examples").glob("*.py"))


@pytest.mark.slow
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_runs_in_an_empty_folder(path: Path, tmp_path: Path) -> None:
    if path.stem == "deploy":
        pytest.importorskip("flatbuffers", reason="the extra stablehlo is not installed")
    environment = {**os.environ, "PYTHONPATH": str(path.parents[2])}
    done = subprocess.run([sys.executable, path], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout


@pytest.mark.slow
def test_the_cells_of_the_notebook_run_and_show_themselves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    notebook = json.loads((EXAMPLES[0].parent / "first_clip.ipynb").read_text(encoding="utf-8"))
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    namespace: dict[str, object] = {}
    shown = []
    for cell in cells:
        *statements, last = ast.parse(cell).body
        exec(compile(ast.Module(statements, []), "cell", "exec"), namespace)
        assert isinstance(last, ast.Expr)
        shown.append(eval(compile(ast.Expression(last.value), "cell", "eval"), namespace)._repr_html_())
    assert [("<table>" in one, "<video" in one) for one in shown] == [(True, False), *[(False, True)] * (len(cells) - 1)]
