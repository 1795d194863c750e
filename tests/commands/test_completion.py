"""What the shell is told when it asks how a line may go on."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("argcomplete", reason="the extra completion is not installed")


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("sora-jax gen", {"generate"}),
        ("sora-jax generate --previ", {"--preview", "--preview-every"}),
        ("sora-jax generate x --preset re", {"recommended"}),
    ],
)
def test_the_shell_is_told_how_a_line_may_go_on(line: str, offered: set[str], tmp_path: Path) -> None:
    answer = tmp_path / "answer"
    asked = {"_ARGCOMPLETE": "1", "COMP_LINE": line, "COMP_POINT": str(len(line)), "COMP_TYPE": "9"}
    shell = {"_ARGCOMPLETE_STDOUT_FILENAME": str(answer), "_ARGCOMPLETE_SHELL": "bash", "_ARGCOMPLETE_IFS": "\n"}
    done = subprocess.run([sys.executable, "-m", "sora_jax"], env={**os.environ, **asked, **shell}, capture_output=True)
    assert (done.returncode, done.stdout) == (0, b"")
    assert {word.strip() for word in answer.read_text().split("\n")} - {""} == offered
