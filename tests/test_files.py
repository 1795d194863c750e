"""Files that are whole or absent, and what is refused before anything is written."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from sora_jax import files


def test_a_body_that_fails_leaves_the_target_as_it_was(tmp_path: Path) -> None:
    target = tmp_path / "report.json"
    files.write_text(target, "old")

    def interrupted() -> None:
        with files.whole_file(target, overwrite=True) as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"report.json": "old"}


def test_of_many_writers_one_wins_and_the_others_are_told(tmp_path: Path) -> None:
    target, outcomes, together = tmp_path / "report.json", [], threading.Barrier(8)

    def write(number: int) -> None:
        together.wait()
        try:
            files.write_text(target, str(number) * 1000)
            outcomes.append(number)
        except FileExistsError:
            outcomes.append(None)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (winner,) = [number for number in outcomes if number is not None]
    assert len(outcomes) == 8
    assert target.read_text() == str(winner) * 1000
    assert os.listdir(tmp_path) == ["report.json"]


def test_a_target_is_refused_before_the_work_and_not_after(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept")
    (tmp_path / "folder").mkdir()
    with pytest.raises(FileExistsError, match="file exists; pass --overwrite"):
        files.check_target(tmp_path / "file", overwrite=False)
    with pytest.raises(IsADirectoryError, match="folder is a folder; choose another name or remove it"):
        files.check_target(tmp_path / "folder", overwrite=True)
    with pytest.raises(NotADirectoryError, match=r"cannot write into folder .*/file: it is a file"):
        files.check_target(tmp_path / "file" / "report.json", overwrite=True)
    files.check_target(tmp_path / "file", overwrite=True)
    files.check_target(tmp_path / "new" / "report.json", overwrite=False)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "folder", "new"]
    assert (tmp_path / "file").read_text() == "kept"


def test_what_is_missing_is_told_from_a_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=f"plan {tmp_path} is a folder; make one"):
        files.refuse_missing(tmp_path, "plan", remedy="make one")
    with pytest.raises(FileNotFoundError, match=r"plan gone\.json does not exist"):
        files.refuse_missing("gone.json", "plan")


def test_of_two_that_claim_a_path_the_later_gives_way(tmp_path: Path) -> None:
    path, other = tmp_path / "clip.mp4", tmp_path / "clip.mp4.json"
    with files.claimed(path):
        with files.claimed(other):
            pass
        with pytest.raises(FileExistsError, match=r"another process is writing .*clip\.mp4; wait for it to end"):
            with files.claimed(other, path):
                pass
        assert len(list(tmp_path.iterdir())) == 1  # the first claim; the second took both of its own back
    assert not list(tmp_path.iterdir())
    with files.claimed(path):
        files.write_text(path, "whole")
    assert [entry.name for entry in tmp_path.iterdir()] == ["clip.mp4"]


def test_a_claim_of_a_dead_process_holds_nothing_back(tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    script = """
import os, sys, pathlib
from sora_jax import files
claim = files.claimed(pathlib.Path(sys.argv[1]))
claim.__enter__()
os._exit(0)
"""
    subprocess.run([sys.executable, "-c", script, str(path)], check=True)
    assert len(list(tmp_path.iterdir())) == 1
    with files.claimed(path):
        files.write_text(path, "whole")
    assert path.read_text() == "whole"


@pytest.mark.parametrize("name", ["a\0b", "\udcff"])
def test_a_name_that_no_file_can_have_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="choose another one"):
        files.check_target(tmp_path / name, overwrite=True)
