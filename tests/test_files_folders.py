"""Folders that are whole or absent: what interrupts and kills leave, who may read them, and that replacing loses neither."""

import fcntl
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from sora_jax import files

NOBODY = 2**22 + 7  # more than Linux gives to any process


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


def test_a_new_folder_that_cannot_get_its_name_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with files.whole_folder(tmp_path / "out") as folder:
        write(folder, "old")
    renamed, rename = [], os.rename

    def failing(source: Path, target: Path) -> None:
        renamed.append((Path(source).suffix, Path(target).suffix))
        if len(renamed) == 2:
            raise OSError(28, "No space left on device")
        rename(source, target)

    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(OSError, match="No space"), files.whole_folder(tmp_path / "out", overwrite=True):
        pass
    assert renamed == [("", ".replaced"), (".partial", ""), (".replaced", "")]
    assert texts(tmp_path) == {"out/inner/file": "old"}


def test_what_a_dead_process_left_goes_and_what_it_was_replacing_comes_back(tmp_path: Path) -> None:
    left = [tmp_path / f".out.{NOBODY}-0badf00d.{suffix}" for suffix in ("partial", "replaced")]
    for folder in left:
        folder.mkdir()
        write(folder, folder.suffix)
    other = tmp_path / f".output.{NOBODY}-0badf00d.partial"
    other.mkdir()
    files.recover_folder(tmp_path / "out")
    assert texts(tmp_path) == {"out/inner/file": ".replaced"}
    assert sorted(path.name for path in tmp_path.iterdir()) == [other.name, "out"]


def test_what_a_process_is_still_writing_stays(tmp_path: Path) -> None:
    """Whatever its number says: a container gives the same numbers again."""
    mine, dead = tmp_path / f".out.{os.getpid()}-0badf00d.partial", tmp_path / f".out.{NOBODY}-0badf00d.partial"
    for folder in (mine, dead):
        folder.mkdir()
    locked = os.open(dead, os.O_RDONLY)
    fcntl.flock(locked, fcntl.LOCK_EX)
    files.recover_folder(tmp_path / "out")
    assert mine.exists()  # just begun, by a process that lives
    assert dead.exists()
    os.close(locked)
    os.utime(mine, (0, 0))
    files.recover_folder(tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_killed_process_is_seen_by_its_lock(tmp_path: Path) -> None:
    lines = (
        "import pathlib, sys\nfrom sora_jax import files\n"
        "with files.whole_folder(pathlib.Path(sys.argv[1])) as folder:\n"
        "    (folder / 'half').write_text('half')\n    print('ready', flush=True)\n    input()\n"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", lines, str(tmp_path / "out")], **pipes) as process:  # type: ignore[call-overload]
        assert process.stdout.readline() == b"ready\n"
        files.recover_folder(tmp_path / "out")
        assert list(texts(tmp_path).values()) == ["half"]
        process.kill()
    files.recover_folder(tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_two_long_names_are_told_apart(tmp_path: Path) -> None:
    one, other = tmp_path / ("x" * 80 + "1"), tmp_path / ("x" * 80 + "2")
    with files.whole_folder(one) as folder:
        left = folder.with_name(folder.name.replace(f".{os.getpid()}-", f".{NOBODY}-"))
        left.mkdir()
        files.recover_folder(other)
        assert left.exists()
        files.recover_folder(one)
        assert not left.exists()
