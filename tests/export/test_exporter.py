"""An export is whole or absent: whatever ends it, and whatever is wrong with what it was asked for."""

import json
import shutil
from pathlib import Path

import pytest

from sora_jax.commands import main
from sora_jax.export import check, exporter
from sora_jax.export.progress import Progress
from sora_jax.sampling.leap import Leap
from tests.support.exports import export_tiny

pytest.importorskip("jsonschema", reason="manifests are validated with jsonschema (extra stablehlo, onnx or coreml)")
pytest.importorskip("flatbuffers", reason="the stablehlo extra is not installed")


def test_below_the_floor_nothing_is_kept(tiny_model, tmp_path, monkeypatch, in_process):
    monkeypatch.setattr(check, "LIMITS", {"float32": check.Limits(check.MAX_DB + 1, 1e-3)})
    with pytest.raises(check.CheckError, match=r"t5_embed main: output \S+ \(captured inputs\) has 200\.0 dB"):
        export_tiny(tiny_model, tmp_path / "out", "stablehlo", stages=("t5",))
    assert not list(tmp_path.iterdir())


def test_an_interrupted_export_leaves_nothing(tiny_model, tmp_path, monkeypatch, in_process):
    monkeypatch.setattr(exporter, "GROUP_BYTES", 0)
    seen = []

    def interrupt(at: Progress) -> None:
        seen.append((at.stage, at.share, at.done, at.total))
        if at.done == 1:
            assert len(list(tmp_path.iterdir())) == 1
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_tiny(tiny_model, tmp_path / "out", "stablehlo", stages=("t5",), progress=interrupt)
    assert (seen[0], seen[-1]) == (("t5_embed", 0, 0, 3), ("t5_block_00", 0, 1, 3))
    assert seen == sorted(seen, key=lambda at: at[2] + at[1])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--height", "24", "--width", "32"), "height 24 is not a multiple of 16"),
        (("--height", "32"), "width"),
        (("--size", "17x32"), "size '17x32' is not frames x height x width"),
        (("--size", "17x32x40"), "width 40 is not a multiple of 16"),
        (("--stages", "t5,decoder"), "stages decoder cannot be exported; expected some of t5, stdit3"),
        (("--no-fused-attention",), "fuse_attention (--no-fused-attention) is Core ML's; leave it out for stablehlo."),
        (("--weights", "int4"), "target stablehlo has no weights 'int4'"),
        (("--leap", "released"), "--leap: got 'released'; expected off, dynamic, or the number"),
        (("--guidance", "1e9"), "--guidance is 1e+09; expected a number from -10000 to 10000"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(tiny_model, tmp_path, capsys, arguments, message):
    code = main.main(["export", str(tiny_model), str(tmp_path / "out"), "--target", "stablehlo", "--quiet", *arguments])
    lines = capsys.readouterr().err.strip().splitlines()
    assert code == main.BAD_INPUT
    assert len(lines) == 1
    assert message in lines[0]
    assert not list(tmp_path.iterdir())


def test_what_stands_in_the_way_is_named(tiny_model, tmp_path, monkeypatch, capsys):
    def line(model: Path, *arguments: str) -> str:
        assert main.main(["export", str(model), str(tmp_path / "out"), "--target", "stablehlo", *arguments]) == main.BAD_INPUT
        return capsys.readouterr().err

    damaged = tmp_path / "damaged"
    shutil.copytree(tiny_model, damaged)
    parameter = json.loads((damaged / "vae" / "network.json").read_text())["layers"][0]
    shutil.rmtree(damaged / "vae" / parameter)
    assert "convert vae again with --overwrite" in line(damaged)
    assert "does not exist" in line(tmp_path / "absent")
    monkeypatch.setattr(exporter.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, 1000))
    assert "GB free; the export needs" in line(tiny_model)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install 'sora_jax[stablehlo]'" in line(tiny_model)
    (tmp_path / "out").mkdir()
    assert "exists; pass --overwrite" in line(tiny_model)
    (tmp_path / "out" / "letter.txt").write_text("mine")
    assert "is not an exported folder, which --overwrite replaces" in line(tiny_model, "--overwrite")
    assert (tmp_path / "out" / "letter.txt").read_text() == "mine"


def test_what_a_manifest_cannot_hold_is_refused_before_the_work(tiny_model, tmp_path, in_process):
    """A tolerance that no cosine exceeds, and one for each sample: a host samples one clip."""
    for tolerance, message in (
        (3.0, r"sampling cannot be exported, see \$\.leap\.tolerance"),
        ([1e-4, 1e-3], "expected one number"),
    ):
        leap = Leap.dynamic(tolerance=tolerance)
        with pytest.raises(ValueError, match=message):
            export_tiny(tiny_model, tmp_path / "out", "stablehlo", stages=("t5",), settings={"leap": leap})
    assert not list(tmp_path.iterdir())
