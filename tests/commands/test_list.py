"""What ``sora-jax list`` shows: presets, sizes and words, as a request would meet them."""

import json
from pathlib import Path

import pytest

from sora_jax.commands import main
from sora_jax.inputs import sizes
from sora_jax.inputs.tokenizer import Tokenizer
from sora_jax.pipeline.model_file import ModelFile


def listed(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict:
    assert main.main(["list", *map(str, arguments), "--json"]) == main.OK
    return json.loads(capsys.readouterr().out)


def test_a_preset_is_listed_as_a_request_resolves_it(tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for model in ("pocket", tiny_model):
        file = ModelFile.read(model)
        for name, fields in listed(capsys, "presets", "--model", model).items():
            settings = file.resolve({"preset": name})
            assert fields.pop("evaluations") == settings.evaluations()[0]
            assert fields.pop("plan", None) == (settings.plan and settings.plan.letters)
            assert fields == {key: getattr(settings, key) for key in fields}
    assert main.main(["list", "presets"]) == main.OK
    assert "recommended: evaluations 16, num_steps 30, solver ab2" in capsys.readouterr().out


def test_resolutions_are_those_of_the_table_with_the_frames_that_come_out(capsys: pytest.CaptureFixture[str]) -> None:
    fields = listed(capsys, "resolutions")
    assert list(fields) == [*sizes.IMAGE_SIZES]
    assert fields["240p"]["9:16"] == {"asked": [240, 426], "frames": [240, 424]}
    assert main.main(["list", "resolutions"]) == main.OK
    text = capsys.readouterr().out
    (row,) = (line.split() for line in text.splitlines() if line.startswith("9:16 "))
    assert row[:4] == ["9:16", "landscape", "144x256", "240x426"]


def test_the_vocabulary_holds_every_word_that_the_model_knows(tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fields = listed(capsys, "vocabulary")
    tokenizer = Tokenizer.from_file(ModelFile.read(None).tokenizer_path)
    assert {"circle", "red", "moves"} <= set(fields["words"])
    assert not tokenizer.unknown_words(" ".join(fields["words"]))
    assert "one circle or square or triangle" in fields["captions"]
    assert listed(capsys, "vocabulary", "--model", tiny_model)["captions"] == ""
