"""``sora-jax run-exported`` refuses in one line; its clip is compared in tests/export/test_export_targets.py."""

import numpy as np
import pytest

from sora_jax.commands import main
from sora_jax.export import ExportedModel, coreml, manifest, onnx
from sora_jax.export.targets import MissingExtraError
from tests.export.test_export_check import complete_manifest

pytest.importorskip("jsonschema", reason="manifests are validated with jsonschema (extra stablehlo, onnx or coreml)")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "has no tokenizer; export it with the stage t5"),
        (("--size", "20x16x16"), "was not exported for size 20x16x16; it has 20x16x32"),
        (("--leap", "never"), "leap is 'never'; expected off, dynamic, or the number of a step"),
        (("-o", "clip.avi"), "avi"),
    ],
)
def test_an_exported_folder_that_cannot_make_the_clip_says_why(tmp_path, capsys, arguments, message):
    made = complete_manifest()
    if arguments:
        made["tokens"]["file"] = "a"
    manifest.write(tmp_path, made)
    (tmp_path / "a").write_bytes(b"x")
    assert main.main(["run-exported", str(tmp_path), "a red circle", *arguments]) == main.BAD_INPUT
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert message in lines[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"leap": {"mode": "released"}}, "leap mode is 'released'; expected off, static or dynamic."),
        ({"loop": "Sampler"}, "loop is 'Sampler'; expected stages or sampler."),
        ({"num_steps": 0}, "num_steps 0, merge_steps 0; expected at least 1 and 0."),
    ],
)
def test_what_an_exported_model_cannot_do_is_refused_before_anything_runs(tmp_path, options, message):
    manifest.write(tmp_path, complete_manifest())
    (tmp_path / "a").write_bytes(b"x")
    model = ExportedModel(tmp_path)
    with pytest.raises(ValueError, match=message):
        model(np.ones((1, 4), int), np.ones((1, 4), bool), np.zeros((1, 5, 2, 4, 4)), **options)
    assert not model.loaded


def test_a_missing_extra_is_named_with_its_pip_line(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for extra, call in (
        ("stablehlo", lambda: manifest.validate({})),
        ("onnx", lambda: onnx.open_function(tmp_path, {"file": "a.onnx"})),
        ("coreml", lambda: coreml.open_function(tmp_path, {"file": "a.mlpackage"})),
    ):
        with pytest.raises(MissingExtraError, match=rf"pip install 'sora_jax\[{extra}\]'"):
            call()
