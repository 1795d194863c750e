"""The converter's command: what it prints, how it fails, and what ``verify`` finds."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from convert_weights.checkpoint import convert_checkpoint
from convert_weights.source_file import OpenFile
from sora_jax.commands.convert import main
from sora_jax.shell import BAD_INPUT
from sora_jax.storage.directory import open_network
from sora_jax.storage.writer import NetworkWriter
from tests.support import sources

pytestmark = pytest.mark.usefixtures("small_slices")


def _run(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


def _one_line(capsys: pytest.CaptureFixture[str]) -> str:
    text = capsys.readouterr().err
    assert text.count("\n") == 1, text
    assert text.startswith("sora-jax: error: ")
    assert "Traceback" not in text
    return text


def test_the_command_converts_verifies_and_reports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = sources.write_source(tmp_path / "source", "t5")
    assert _run("t5", source, tmp_path / "model", "--dtype", "bfloat16") == 0
    out, notes = capsys.readouterr()
    assert "sora-jax: config.json keys without effect here: model_type, architectures, dropout_rate, " in notes
    assert out.count("\n") == 1
    assert "30 arrays, 0.000 GB as bfloat16" in out
    assert _run("verify", tmp_path / "model", "--source", source) == 0
    assert "bit for bit" in capsys.readouterr().out
    assert _run("t5", source, tmp_path / "model", "--quiet") == BAD_INPUT
    assert "exists; pass --overwrite" in _one_line(capsys)
    assert _run("t5", source, tmp_path / "model", "--quiet", "--overwrite") == 0
    assert open_network(tmp_path / "model", "t5").dtype == "float32"


def test_verify_finds_every_kind_of_damage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = sources.write_source(tmp_path / "source", "t5")
    pristine = tmp_path / "pristine"
    convert_checkpoint("t5", source, pristine)
    names = sorted(open_network(pristine, "t5").parameters)

    def damaged(damage: Callable[[Path], object]) -> str:
        shutil.rmtree(tmp_path / "model", ignore_errors=True)
        shutil.copytree(pristine, tmp_path / "model")
        damage(open_network(tmp_path / "model", "t5").chunk_path(names[3]))
        assert _run("verify", tmp_path / "model") == 1
        return capsys.readouterr().err

    def flip(path: Path) -> None:
        content = bytearray(path.read_bytes())
        content[5] ^= 1
        path.write_bytes(bytes(content))

    def forget(path: Path) -> None:
        manifest = next(parent for parent in path.parents if parent.name == "t5") / "network.json"
        fields = json.loads(manifest.read_text())
        del fields["parameters"][names[3]]
        manifest.write_text(json.dumps(fields))

    assert "checksum" in damaged(flip)
    assert "is missing" in damaged(Path.unlink)
    assert "bytes, expected" in damaged(lambda path: path.write_bytes(path.read_bytes() + b"x"))
    assert "does not describe" in damaged(lambda path: (path.parents[2] / "zarr.json").write_text("{}"))
    assert "not part of the network" in damaged(lambda path: (path.parents[2] / "stray").write_text(""))
    assert "not recorded in network.json" in damaged(forget)


def test_verify_notices_another_source(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    convert_checkpoint("t5", sources.write_source(tmp_path / "source", "t5"), tmp_path / "model")
    arrays = sources.state_dict("t5")
    arrays["encoder.final_layer_norm.weight"][7] += 1e-6
    other = sources.write_source(tmp_path / "other", "t5", arrays)
    assert _run("verify", tmp_path / "model", "--source", other) == 1
    err = capsys.readouterr().err
    assert "final.scale: differs from the source's value" in err
    assert "is not the file that was converted" in err
    assert _run("verify", tmp_path / "model", "--source", sources.write_source(tmp_path / "stdit3", "stdit3")) == BAD_INPUT
    assert "is the source of none of t5" in _one_line(capsys)


@pytest.mark.parametrize(
    ("prepare", "report"),
    [
        (lambda folder: None, "holds no weight file"),
        (lambda folder: (folder / "a.safetensors").write_bytes(b"x"), "truncated or not a safetensors file"),
        (lambda folder: (folder / "a.bin").write_bytes(b"x" * 100), "not in PyTorch's zip format"),
        (lambda folder: [(folder / f"{x}.pt").write_bytes(b"x") for x in "ab"], "several checkpoints (a.pt, b.pt)"),
        (lambda folder: (folder / "model.safetensors.index.json").write_text("{}"), "is not an index of shards"),
        (
            lambda folder: (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "x.safetensors"}}'),
            "lacks 1 of 1 shards: x.safetensors",
        ),
        (
            lambda folder: (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../x"}}'),
            "names shards outside its folder",
        ),
    ],
)
def test_unusable_sources_are_one_clear_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], prepare: Callable[[Path], object], report: str
) -> None:
    (tmp_path / "source").mkdir()
    prepare(tmp_path / "source")
    assert _run("t5", tmp_path / "source", tmp_path / "model") == BAD_INPUT
    assert report in _one_line(capsys)
    assert not (tmp_path / "model").exists()


def test_a_section_of_a_source_without_any_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = sources.write_source(tmp_path / "source", "t5")
    assert _run("t5", source, tmp_path / "model", "--section", "ema", "--quiet") == BAD_INPUT
    assert "holds no state dicts to choose from; leave --section out" in _one_line(capsys)
    assert not (tmp_path / "model" / "t5").exists()


def test_shards_must_hold_what_the_index_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = sources.write_shards(tmp_path / "source", "t5", shards=2)
    index = source / "model.safetensors.index.json"
    fields = json.loads(index.read_text())
    del fields["weight_map"]["shared.weight"]
    index.write_text(json.dumps(fields))
    assert _run("t5", source, tmp_path / "model") == BAD_INPUT
    assert "unlisted ['shared.weight']" in _one_line(capsys)


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), OSError(5, "Input/output error"), KeyboardInterrupt()]
)
def test_a_failure_on_the_way_is_one_line_and_loses_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    """Writing fails with a full disk, reading with a broken one; what was written before is used by the next attempt."""
    source = sources.write_source(tmp_path / "source", "t5")
    convert_checkpoint("t5", source, tmp_path / "expected")
    count = 0
    real = OpenFile.read

    def read(self: OpenFile, offset: int, into: np.ndarray) -> None:
        nonlocal count
        count += 1
        if count > 30:
            raise error
        real(self, offset, into)

    with monkeypatch.context() as patch:
        patch.setattr(OpenFile, "read", read)
        assert _run("t5", source, tmp_path / "model", "--quiet") == (130 if isinstance(error, KeyboardInterrupt) else 1)
    message = _one_line(capsys)
    assert "run the same command again" in message or "Input/output error" in message
    assert not (tmp_path / "model" / "t5").exists()
    written = {path.name for path in (tmp_path / "model" / ".t5.partial").glob("*/*")}
    assert written
    assert _run("t5", source, tmp_path / "model", "--quiet") == 0
    sources.expect_converted(tmp_path / "model", "t5")


def test_a_disk_that_is_too_small_is_noticed_before_writing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = sources.write_source(tmp_path / "source", "t5")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6, 1000))
    assert _run("t5", source, tmp_path / "model", "--quiet") == BAD_INPUT
    assert "GB are free; make room and run the same command again" in _one_line(capsys)
    assert not (tmp_path / "model" / "t5").exists()


def test_a_second_process_on_the_same_target_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = sources.write_source(tmp_path / "source", "t5")
    config = sources.golden_config("t5")
    with NetworkWriter(tmp_path / "model", "t5", config, dtype="float32", identity={}):
        assert _run("t5", source, tmp_path / "model", "--quiet") == BAD_INPUT
    assert "another process is writing t5" in _one_line(capsys)
