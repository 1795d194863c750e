"""The programs of docs/examples run as they stand; each asserts what it shows."""

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
