"""What a model directory says of itself: defaults, what it was trained for, and what its clips may therefore be."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from sora_jax.pipeline.model_file import POCKET, ModelFile, Trained, model_path
from sora_jax.pocket.training import stages
from sora_jax.storage.directory import ModelDirectoryError, read_model_file

TRAINED = {"sizes": [[64, 64], [32, 48]], "num_frames": [1, 17], "fps": [8], "guidance": [1, 3], "captions": "circles"}


def with_index(source: Path, folder: Path, **fields: Any) -> Path:
    """Returns a copy of a model whose model.json has other fields."""
    shutil.copytree(source, folder)
    index = json.loads((folder / "model.json").read_text()) | fields
    (folder / "model.json").write_text(json.dumps(index))
    return folder


@pytest.mark.parametrize(
    ("defaults", "message"),
    [
        ({"height": 63, "width": 64}, "height 63 is not a multiple of 16"),
        ({"height": 64}, "defaults have a height or a width alone; expected both"),
        ({"num_steps": 0}, "num_steps is 0; expected a whole number from 1"),
        ({"guidance": "3"}, "guidance is '3'; expected a number"),
        ({"solvr": "ab2"}, "option 'solvr' is unknown; did you mean solver"),
        ({"plan": "plan.json"}, "defaults hold plan, which only a caller may ask for"),
        ({"resolution": "239p", "aspect_ratio": "9:16"}, "resolution is '239p'; expected 144p, "),
    ],
)
def test_defaults_are_checked_as_options_are(tiny_model: Path, tmp_path: Path, defaults: dict[str, Any], message: str) -> None:
    """Also those that the caller replaces: the model is wrong either way."""
    model = with_index(tiny_model, tmp_path / "model", defaults=defaults)
    with pytest.raises(ModelDirectoryError, match=rf"model/model\.json: {message}"):
        ModelFile.read(model)


@pytest.mark.parametrize(
    "trained", [5, [], {}, {**TRAINED, "sizes": [64]}, {**TRAINED, "guidance": [1]}, {**TRAINED, "fps": "x"}]
)
def test_a_model_that_misstates_its_training_is_refused(tiny_model: Path, tmp_path: Path, trained: Any) -> None:
    model = with_index(tiny_model, tmp_path / "model", trained=trained)
    with pytest.raises(ModelDirectoryError, match=r"model\.json: trained is .*; expected sizes \[\[height, width\], \.\.\.\]"):
        ModelFile.read(model)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, ""),
        ({"height": 64, "width": 64}, ""),
        ({"num_frames": 1}, ""),
        ({"guidance": 1}, ""),
        ({"height": 48, "width": 32}, "48 x 32 pixels lies outside what this model was made for"),
        ({"num_frames": 34}, "34 frames lies outside"),
        ({"fps": 24}, "24 frames per second lies outside"),
        ({"guidance": 7, "resolution": "144p", "aspect_ratio": "9:16"}, "144 x 256 pixels and guidance 7 lie outside"),
    ],
)
def test_what_lies_outside_the_training_is_one_line(
    tiny_model: Path, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    model = ModelFile.read(with_index(tiny_model, tmp_path / "model", trained=TRAINED))
    assert model.trained is not None
    said = model.trained.outside(model.resolve(options))
    assert said.startswith(message)
    assert bool(said) == bool(message)
    if said:
        assert said.endswith(
            "trained on 64 x 64 or 32 x 48 pixels, 1 or 17 frames at 8 frames per second, judged at guidance 1 to 3."
        )


def test_the_embedded_model_says_what_it_was_trained_for() -> None:
    model = ModelFile.read(None)
    assert model.trained == Trained.from_json(stages.TRAINED)
    assert model.defaults == stages.DEFAULTS
    assert model.trained is not None
    assert model.trained.outside(model.resolve({})) == ""
    assert model.trained.outside(model.resolve({"resolution": "144p", "aspect_ratio": "9:16"})).startswith("144 x 256 pixels")
    assert read_model_file(POCKET)["trained"]["captions"] == stages.CAPTIONS


def test_pocket_is_the_embedded_model_and_a_path_is_a_path() -> None:
    assert model_path(None) == model_path("pocket") == POCKET
    assert model_path("./pocket") == Path("pocket")
    assert model_path(Path("pocket")) == Path("pocket")


def test_a_size_of_the_table_is_the_same_by_its_numbers(tiny_model: Path) -> None:
    model = ModelFile.read(tiny_model)
    named = model.resolve({"resolution": "240p", "aspect_ratio": "9:16"})
    assert (named.height, named.width) == (240, 426)
    assert model.resolve({"height": 240, "width": 426}) == named
    with pytest.raises(ValueError, match=r"width 427 is not a multiple of 16 \(VAE 8 x patch 2\); nearest valid: 416, 432"):
        model.resolve({"height": 240, "width": 427})
