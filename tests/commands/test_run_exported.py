"""``sora-jax run-exported`` refuses in one line; its clip is compared in tests/export/test_targets.py."""

from typing import get_args

import numpy as np
import pytest

from sora_jax.commands import main
from sora_jax.export import ExportedModel, manifest
from sora_jax.export.contents import Contents
from sora_jax.export.entries import TargetName
from sora_jax.export.opening import MissingExtraError, open_function
from tests.support.exports import complete_manifest, write_folder

pytest.importorskip("jsonschema", reason="manifests are validated with jsonschema (extra stablehlo, onnx or coreml)")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "has no tokenizer; export it with the stage t5"),
        (("--size", "20x16x16"), "was not exported for size 20x16x16; it has 20x16x32"),
        (("--leap", "never"), "--leap: got 'never'; expected off, dynamic, or the number of the step that leaps"),
        (("-o", "clip.avi"), "avi"),
        (("--steps", "0"), "--steps"),
        (("--guidance", "nan"), "--guidance"),
        (("--reference-path", "first.png"), "cannot take frames; export it with the stage vae_encoder."),
        (("--reference-path", "first.png", "--sampler"), "the sampler program takes no frames; run loop 'stages'."),
    ],
)
def test_an_exported_folder_that_cannot_make_the_clip_says_why(tmp_path, capsys, arguments, message):
    write_folder(tmp_path, complete_manifest(tokenizer="a" if arguments else None))
    assert main.main(["run-exported", str(tmp_path), "a red circle", *arguments]) == main.BAD_INPUT
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert message in lines[0]


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("|0| a |1| b", "has a segment from clip 1 on, but an export makes one clip"),
        ("|0| a |one| b", "expected |0| text |2| text"),
        ('a {"reference_path": "a.png"}', "the prompt's JSON has no effect on an export"),
        ("a {curly} cat", "remove the braces if none is meant"),
    ],
)
def test_a_prompt_that_asks_for_more_than_one_clip_is_refused_before_anything_is_opened(capsys, prompt, message):
    assert main.main(["run-exported", "gone", prompt]) == main.BAD_INPUT
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert message in lines[0]


def test_a_loop_that_there_is_not_is_refused_before_anything_runs(tmp_path):
    write_folder(tmp_path, complete_manifest())
    model = ExportedModel(tmp_path)
    with pytest.raises(ValueError, match=r"loop is 'Sampler'; expected stages or sampler\."):
        model(np.ones((1, 4), int), np.ones((1, 4), bool), np.zeros((1, 5, 2, 4, 4)), loop="Sampler")
    assert not model.loaded


def test_a_missing_extra_is_named_with_its_pip_line(tmp_path, monkeypatch):
    write_folder(tmp_path, complete_manifest())
    stage = manifest.read(tmp_path)["stages"][0]
    contents, function = Contents(tmp_path, None), stage["functions"][0]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for extra, call in (
        ("onnx", lambda: manifest.read(tmp_path)),
        *((target, lambda target=target: open_function(target, contents, stage, function)) for target in get_args(TargetName)),
    ):
        with pytest.raises(MissingExtraError, match=rf"pip install 'sora_jax\[{extra}\]'"):
            call()
