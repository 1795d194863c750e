"""What is changed under the converter's hands is noticed; what was interrupted can be repeated; nothing is left or followed."""

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from convert_weights import companions
from convert_weights.checkpoint import convert_checkpoint
from convert_weights.errors import SourceError
from convert_weights.source_file import OpenFile
from convert_weights.to_torch import to_torch
from convert_weights.verify import verify
from sora_jax import files
from sora_jax.commands.convert import main
from sora_jax.shell import BAD_INPUT
from sora_jax.storage.directory import ModelDirectoryError, open_network, read_model_file
from sora_jax.storage.writer import NetworkWriter
from tests.support import sources

TOKENIZER = b'{"model": "a tokenizer"}'


def _source(folder: Path) -> Path:
    arrays = sources.state_dict("t5")
    del arrays["encoder.embed_tokens.weight"]  # a tied copy, which would give a change away
    source = sources.write_source(folder, "t5", arrays)
    (source / "tokenizer.json").write_bytes(TOKENIZER)
    return source


def _contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# B3: a source that changes.


def _flip(path: Path) -> None:
    """Changes a byte in place: size and inode stay."""
    with open(path, "r+b") as file:
        file.seek(-5, os.SEEK_END)
        byte = file.read(1)
        file.seek(-5, os.SEEK_END)
        file.write(bytes([byte[0] ^ 1]))


def _flip_and_hide(path: Path) -> None:
    """As ``_flip``, and puts the old time of modification back, as ``cp -p`` would."""
    stat = path.stat()
    _flip(path)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def _replace(path: Path) -> None:
    other = path.with_name("other")
    other.write_bytes(path.read_bytes())
    other.replace(path)


def _shorten(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 4)


@pytest.mark.parametrize("change", [_flip, _flip_and_hide, _replace, _shorten], ids=lambda f: f.__name__.strip("_"))
def test_a_source_that_is_changed_during_conversion_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Path], None]
) -> None:
    source = _source(tmp_path / "source")
    count = 0
    real = OpenFile.read

    def read(self: OpenFile, offset: int, into: np.ndarray) -> None:
        nonlocal count
        count += 1
        if count == 20:
            change(self.path)
        real(self, offset, into)

    with monkeypatch.context() as patch:
        patch.setattr(OpenFile, "read", read)
        with pytest.raises(SourceError, match=r"model.safetensors (was changed while it was being read; try again|ended at)"):
            convert_checkpoint("t5", source, tmp_path / "model")
    assert not (tmp_path / "model").exists()
    if change is not _shorten:
        convert_checkpoint("t5", source, tmp_path / "model")
        assert verify(tmp_path / "model", source=source) == {"t5": []}


def test_a_source_that_is_changed_after_its_header_was_read_is_refused(tmp_path: Path) -> None:
    source = _source(tmp_path / "source")
    with pytest.raises(SourceError, match="was changed while it was being read"):
        convert_checkpoint("t5", source, tmp_path / "model", report=lambda opened: _flip(source / "model.safetensors"))
    assert not (tmp_path / "model").exists()


# B4: the tokenizer.


@pytest.mark.parametrize("moment", ["before", "between"])
def test_a_disk_that_fills_at_the_tokenizer_loses_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    source, model = _source(tmp_path / "source"), tmp_path / "model"
    full = OSError(errno.ENOSPC, "No space left on device")

    def refuse(*_: object, **__: object) -> None:
        raise full

    with monkeypatch.context() as patch:
        patch.setattr(companions, "write_durably" if moment == "before" else "update_model_file", refuse)
        assert main(["t5", str(source), str(model), "--quiet"]) == 1
    assert "No space left on device; make room and run the same command again" in capsys.readouterr().err
    assert not (model / "t5").exists(), "no T5 is visible before its tokenizer is"
    assert main(["t5", str(source), str(model), "--quiet"]) == 0
    assert (model / "tokenizer.json").read_bytes() == TOKENIZER
    assert read_model_file(model)["tokenizer"] == "tokenizer.json"
    assert verify(model) == {"t5": []}


def test_a_tokenizer_that_was_lost_is_reported_and_comes_back_with_the_same_command(tmp_path: Path) -> None:
    source, model = _source(tmp_path / "source"), tmp_path / "model"
    convert_checkpoint("t5", source, model)
    recorded = open_network(model, "t5").origin["tokenizer"]
    assert (recorded["name"], recorded["bytes"]) == ("tokenizer.json", len(TOKENIZER))
    (model / "tokenizer.json").unlink()
    (fault,) = verify(model)["t5"]
    assert "the tokenizer that came with it is gone" in fault
    convert_checkpoint("t5", source, model)
    assert verify(model) == {"t5": []}
    (model / "tokenizer.json").write_bytes(b"{}")
    (fault,) = verify(model)["t5"]
    assert "is not the tokenizer that came with it" in fault
    convert_checkpoint("t5", source, model)
    assert verify(model) == {"t5": []}
    with pytest.raises(ModelDirectoryError, match="exists; pass --overwrite"):
        convert_checkpoint("t5", source, model)


def test_a_model_of_an_earlier_release_gets_its_tokenizer(tmp_path: Path) -> None:
    """There, the tokenizer was copied last and not recorded."""
    source, model = _source(tmp_path / "source"), tmp_path / "model"
    convert_checkpoint("t5", source, model)
    manifest = model / "t5" / "network.json"
    fields = json.loads(manifest.read_text())
    del fields["origin"]["tokenizer"]
    manifest.write_text(json.dumps(fields))
    (model / "tokenizer.json").unlink()
    (model / "model.json").unlink()
    convert_checkpoint("t5", source, model)
    assert read_model_file(model)["tokenizer"] == "tokenizer.json"
    assert (model / "tokenizer.json").read_bytes() == TOKENIZER


@pytest.mark.parametrize(
    ("content", "report"),
    [
        (b"version https://git-lfs.github.com/spec/v1\n", "is a git-LFS pointer"),
        (b"", "is empty"),
        (b"<html>", "is an HTML page"),
    ],
)
def test_what_is_no_tokenizer_is_refused_before_the_work(tmp_path: Path, content: bytes, report: str) -> None:
    source = _source(tmp_path / "source")
    (source / "tokenizer.json").write_bytes(content)
    with pytest.raises(SourceError, match=rf"tokenizer.json {report}"):
        convert_checkpoint("t5", source, tmp_path / "model")
    assert not (tmp_path / "model").exists()


# Restarts.


def test_a_recorded_array_that_was_damaged_before_a_restart_is_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, model = _source(tmp_path / "source"), tmp_path / "model"

    def interrupted(self: NetworkWriter, origin: Any = None) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(NetworkWriter, "finish", interrupted)
        with pytest.raises(KeyboardInterrupt):
            convert_checkpoint("t5", source, model)
    arrays = [path for path in (model / ".t5.partial").rglob("*") if path.is_file() and path.name != "zarr.json"]
    for path in arrays[:3]:
        _flip(path) if path.stat().st_size > 5 else None
    convert_checkpoint("t5", source, model)
    assert verify(model, source=source) == {"t5": []}


# Leftovers and links.


def _dead_partial(folder: Path, name: str, *, process: int | None = None) -> Path:
    """Makes what a process that was killed leaves behind."""
    pid = process or os.fork()
    if pid == 0:
        os._exit(0)
    if process is None:
        os.waitpid(pid, 0)
    machine, _, start = files._owner()
    return folder / f".{name}.{machine}-{pid}-{start}-0123abcd.partial"


def test_leftovers_of_dead_processes_are_removed_and_those_of_living_ones_kept(tmp_path: Path) -> None:
    dead, folder = _dead_partial(tmp_path, "clip.mp4"), _dead_partial(tmp_path, "model.safetensors")
    dead.write_bytes(b"half")
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"half")
    alive = _dead_partial(tmp_path, "other.mp4", process=os.getpid())
    alive.write_bytes(b"half")
    foreign = tmp_path / ".notes.partial"
    foreign.write_text("mine")
    of_another_machine = tmp_path / ".clip.mp4.00000000-1-1-0123abcd.partial"
    of_another_machine.write_text("half")
    of_last_week = tmp_path / ".clip.mp4.00000000-2-1-0123abcd.partial"
    of_last_week.write_text("half")
    os.utime(of_last_week, (0, 0))
    files.write_text(tmp_path / "report.json", "{}")
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"report.json", alive.name, foreign.name, of_another_machine.name}
    files.remove_partial(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == left - {alive.name}


def test_a_folder_whose_replacement_was_interrupted_is_completed(tmp_path: Path) -> None:
    def tear(source: str, target: str, **_: object) -> None:
        real(source, target)
        raise KeyboardInterrupt  # as SIGKILL: right behind the first of the two renames

    def replace() -> None:
        with files.whole_file(out, overwrite=True) as folder:
            folder.mkdir()
            (folder / "new").touch()

    out, real = tmp_path / "out", os.rename
    out.mkdir()
    (out / "old").touch()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "rename", tear)
        patch.setattr(files, "_remove", lambda path: None)
        with pytest.raises(KeyboardInterrupt):
            replace()
    assert not out.exists()
    (partial,) = tmp_path.iterdir()
    partial.rename(_dead_partial(tmp_path, "out"))
    files.remove_leftovers.cache_clear()  # as in the next process
    files.write_text(tmp_path / "report.json", "{}")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["new", "out", "report.json"]
    replace()
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["new", "out", "report.json"]


def test_temporary_names_follow_no_link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every name that could be known beforehand is a link to a file that must stay; even a guessed one is refused."""
    victim = tmp_path / "victim"
    victim.write_text("kept")
    source, model, back = _source(tmp_path / "source"), tmp_path / "model", tmp_path / "back"
    model.mkdir()
    back.mkdir()
    for name in (".tokenizer.json.new", ".tokenizer.json.partial", "tokenizer.json"):
        (model / name).symlink_to(victim)
    for name in (".model.safetensors.partial", "config.json", "tokenizer.json"):
        (back / name).symlink_to(victim)
    convert_checkpoint("t5", source, model)
    to_torch(open_network(model, "t5"), back, overwrite=True)
    assert victim.read_text() == "kept"
    assert (model / "tokenizer.json").read_bytes() == TOKENIZER == (back / "tokenizer.json").read_bytes()
    assert not (back / "config.json").is_symlink()
    monkeypatch.setattr(files, "_partial_name", lambda name: ".guessed")
    (tmp_path / ".guessed").symlink_to(victim)
    with pytest.raises(FileExistsError):
        files.write_durably(tmp_path / "a", b"x")
    with pytest.raises(FileExistsError):
        files.write_text(tmp_path / "a", "x")
    assert victim.read_text() == "kept"


# Refused before the work.


@pytest.mark.parametrize("arguments", [["t5", "SOURCE", "FILE"], ["t5", "SOURCE", "FILE/below"], ["to-torch", "MODEL", "FILE"]])
def test_a_file_in_place_of_a_folder_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    source = _source(tmp_path / "source")
    (tmp_path / "file").write_text("kept")
    if arguments[0] == "to-torch":
        convert_checkpoint("t5", source, tmp_path / "model")
    places = {
        "SOURCE": source,
        "MODEL": tmp_path / "model",
        "FILE": tmp_path / "file",
        "FILE/below": tmp_path / "file" / "below",
    }
    assert main([str(places.get(argument, argument)) for argument in arguments]) in (1, 2)
    err = capsys.readouterr().err
    assert "file is a file; expected" in err
    assert err.count("\n") == 1
    assert (tmp_path / "file").read_text() == "kept"


def test_an_index_that_cannot_be_read_is_refused_before_the_work(tmp_path: Path) -> None:
    source, model = _source(tmp_path / "source"), tmp_path / "model"
    model.mkdir()
    (model / "model.json").write_text("[]")
    with pytest.raises(ModelDirectoryError, match=r"model.json"):
        convert_checkpoint("t5", source, model, report=lambda opened: pytest.fail("the work began"))
    assert {path.name for path in model.iterdir()} == {"model.json"}


@pytest.mark.parametrize(
    ("number", "said"), [(errno.EIO, "the disk or the network drive failed"), (errno.EACCES, "check the permissions")]
)
def test_errors_of_the_system_name_the_file_and_advise(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, number: int, said: str
) -> None:
    source, model = _source(tmp_path / "source"), tmp_path / "model"
    real = os.preadv
    state = {"calls": 0, "from": 0}

    def preadv(descriptor: int, buffers: Any, offset: int) -> int:
        state["calls"] += 1
        if state["calls"] > state["from"]:
            raise OSError(number, os.strerror(number))
        return real(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", preadv)
    for first in (0, 1, 20):
        state.update(calls=0, **{"from": first})
        assert main(["t5", str(source), str(model), "--quiet"]) == BAD_INPUT  # while headers are read, or values
        err = capsys.readouterr().err
        assert os.strerror(number) in err
        assert said in err
        assert str(source / "tokenizer.json") in err or str(source / "model.safetensors") in err
        assert err.count("\n") == 1
