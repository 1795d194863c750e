"""Folders that are whole or absent: what interrupts and kills leave, who may read them, and that replacing loses neither."""

import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from sora_jax import files


def write(folder: Path, text: str) -> None:
    (folder / "inner").mkdir()
    (folder / "inner" / "file").write_text(text)


def texts(path: Path) -> dict[str, str]:
    return {str(file.relative_to(path)): file.read_text() for file in path.rglob("*") if file.is_file()}


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    with files.whole_folder(tmp_path / "out") as folder:
        write(folder, "new")
        assert not (tmp_path / "out").exists()
    with pytest.raises(FileExistsError, match="out exists; pass --overwrite"), files.whole_folder(tmp_path / "out"):
        pass

    def interrupted() -> None:
        with files.whole_folder(tmp_path / "out", overwrite=True) as folder:
            write(folder, "half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert texts(tmp_path) == {"out/inner/file": "new"}
    with files.whole_folder(tmp_path / "out", overwrite=True) as folder:
        (folder / "other").write_text("newer")
    assert texts(tmp_path) == {"out/other": "newer"}


@pytest.mark.parametrize(("umask", "file", "folder"), [(0o022, 0o644, 0o755), (0o077, 0o600, 0o700), (0o002, 0o664, 0o775)])
def test_others_may_read_what_the_umask_allows(tmp_path: Path, umask: int, file: int, folder: int) -> None:
    """safetensors writes 0600, coremltools folders 0700."""
    before = os.umask(umask)
    try:
        with files.whole_folder(tmp_path / "out") as made:
            write(made, "x")
            (made / "inner" / "file").chmod(0o600)
            (made / "inner").chmod(0o700)
    finally:
        os.umask(before)
    modes = [
        stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "out", tmp_path / "out/inner", tmp_path / "out/inner/file")
    ]
    assert modes == [folder, folder, file]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_new_folder_that_cannot_get_its_name_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    with files.whole_folder(tmp_path / "out") as folder:
        write(folder, "old")
    renamed, rename = [], os.rename

    def failing(source: Path, target: Path) -> None:
        renamed.append(Path(source).name)
        if len(renamed) == 2:
            raise error
        rename(source, target)

    def replace() -> None:
        with files.whole_folder(tmp_path / "out", overwrite=True) as folder:
            write(folder, "new")

    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(type(error)):
        replace()
    assert renamed == ["out", "out", files._REPLACED]
    assert texts(tmp_path) == {"out/inner/file": "old"}


KILLED = """
import os, pathlib, signal, sys
from sora_jax import files
rename, count = os.rename, 0
def dying(source, target):
    global count
    count += 1
    if count == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
    rename(source, target)
os.rename = dying
with files.whole_folder(pathlib.Path(sys.argv[1]), overwrite=True) as folder:
    (folder / "new").write_text("new")
    print(len(list(folder.parent.parent.iterdir())), flush=True)
"""


@pytest.mark.parametrize(("died_at", "expected"), [(1, {"out/inner/file": "old"}), (2, {"out/new": "new"})])
def test_a_process_that_is_killed_while_it_replaces_loses_neither(
    tmp_path: Path, died_at: int, expected: dict[str, str]
) -> None:
    with files.whole_folder(tmp_path / "out") as folder:
        write(folder, "old")
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "out"), str(died_at)], capture_output=True, check=False)
    assert (done.returncode, done.stdout) == (-signal.SIGKILL, b"2\n")
    assert sorted(texts(tmp_path).values()) == ["new", "old"]  # both are on the disk, one under a hidden name
    files.remove_leftovers.cache_clear()
    files.remove_leftovers(tmp_path)
    assert texts(tmp_path) == expected
