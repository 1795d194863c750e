"""The tune command, the recipes it writes, and clips that are sampled by one."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from sora_jax.commands import main
from sora_jax.pipeline.model_file import ModelFile
from sora_jax.pipeline.pipeline import Pipeline
from sora_jax.pipeline.presets import candidates
from sora_jax.pipeline.recipe import Recipe
from sora_jax.pipeline.settings import Settings
from sora_jax.sampling.reuse import Plan

pytestmark = pytest.mark.usefixtures("little_optimised")

PROMPTS = ["a red circle moves right", "a green square", "a blue triangle moves up", "a red square"]


@pytest.fixture
def recipe(tiny_model: Path) -> Recipe:
    return Recipe(
        model=ModelFile.read(tiny_model).model_id,
        height=32,
        width=48,
        num_frames=17,
        evaluations=3,
        options={"solver": "ab2", "shift": 2.0, "plan": {"codes": [0, 1, 0, 0], "keep": "residual"}},
        measured={"name": "plan", "error_db": 30.0},
        beaten=[{"name": "Euler", "error_db": 20.0}],
    )


def run(capfd: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    code = main.main([*map(str, words), "--compile-cache", "off"] if words[0] in ("tune", "generate") else [*map(str, words)])
    captured = capfd.readouterr()
    return code, captured.err.strip(), captured.out


def test_a_recipe_is_written_read_and_followed(recipe: Recipe, tiny_model: Path, tmp_path: Path) -> None:
    path = tmp_path / "recipe-3.json"
    recipe.write(path)
    assert Recipe.read(path) == recipe
    settings = ModelFile.read(tiny_model).resolve({"recipe": path})
    assert (settings.solver, settings.shift, settings.num_steps) == ("ab2", 2.0, 4)
    assert settings.plan == Plan.evaluate_at([0, 2, 3], 4)
    assert ModelFile.read(tiny_model).resolve({"recipe": path, "shift": 3.0}).shift == 3.0


@pytest.mark.parametrize(
    ("changes", "said", "message"),
    [
        ({"model": "other 0123"}, {}, "was tuned for the model 'other 0123', not 'model"),
        ({"height": 64}, {}, "was tuned for 64 x 48 pixels, not 32 x 48"),
        ({"num_frames": 51}, {}, "was tuned for 51 frames, not 17; tune again, or use it with --force-recipe"),
        ({}, {"num_frames": 34}, "was tuned for 17 frames, not 34"),
        ({}, {"preset": "exact"}, "recipe and preset both say how to sample; choose one"),
        ({"options": {"seed": 3}}, {}, "sets seed; expected options of sampling"),
        ({"options": {"plan": {"code": 1}}}, {}, "the recipe's options are damaged"),
    ],
)
def test_a_recipe_of_something_else_is_refused_in_one_line(
    recipe: Recipe, tiny_model: Path, tmp_path: Path, changes: dict[str, Any], said: dict[str, Any], message: str
) -> None:
    path, model = tmp_path / "recipe.json", ModelFile.read(tiny_model)
    dataclasses.replace(recipe, **changes).write(path)
    with pytest.raises(ValueError, match=message) as fault:
        model.resolve({"recipe": path, **said})
    assert "\n" not in str(fault.value)
    if "was tuned" in message:
        assert model.resolve({"recipe": path, "force_recipe": True, **said}).solver == "ab2"


def test_what_cannot_be_tuned_is_refused_before_anything_is_loaded(
    tiny_model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    empty, one, two = (tmp_path / f"{name}.txt" for name in ("empty", "one", "two"))
    empty.write_text("")
    one.write_text("a circle\n")
    two.write_text("a circle\na square\n")
    for words, message in (
        (("--prompts", empty, "--evaluations", 8), "no prompt in"),
        (("--prompts", one, "--evaluations", 8), "has 1 prompt; expected two or more"),
        (("--prompts", two, "--evaluations", "8,x"), "--evaluations is '8,x'; expected different whole numbers"),
        (("--prompts", two, "--evaluations", 8, "--minutes", -1), "--minutes is -1; expected a number above 0"),
    ):
        code, error, _ = run(capfd, "tune", tiny_model, "-o", tmp_path / "recipes", *words)
        assert code == 2
        assert message in error
        assert len(error.splitlines()) == 1
    assert not (tmp_path / "recipes").exists()
    code, error, _ = run(capfd, "generate", "a circle", "--model", tiny_model, "--force-recipe")
    assert (code, "force_recipe says which recipes are used" in error) == (2, True)


def test_candidates_are_settings_and_have_names_of_their_own() -> None:
    for count in (8, 11):
        found = candidates(count, own_shift=0.4, settings=Settings.resolve({}, {}))
        assert len({each.name for each in found}) == len(found) > 50
        for each in found:
            options = {name: value for name, value in each.options.items() if name not in ("leap", "reuse_order")}
            Settings.resolve({}, options)


@pytest.mark.slow
def test_a_search_is_repeatable_and_goes_on_where_it_stopped(
    tiny_model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS) + "\n")
    words = (tiny_model, "--prompts", prompts, "--evaluations", 3, "--quiet")
    code, error, out = run(capfd, "tune", *words, "-o", tmp_path / "first")
    assert (code, error) == (0, "")
    path = Path(out.strip())
    lines = (tmp_path / "first" / "tune.jsonl").read_text().splitlines()

    half = tmp_path / "half"
    half.mkdir()
    (half / "tune.jsonl").write_text("\n".join(lines[: len(lines) // 2]) + '\n{"torn')
    assert run(capfd, "tune", *words, "-o", half)[0] == 0
    known = [json.loads(line) for line in (half / "tune.jsonl").read_text().splitlines()]
    assert len(known) == len(lines)
    first, again = Recipe.read(path), Recipe.read(half / "recipe-3.json")
    assert first.options == again.options
    assert first.measured["error_db"] == again.measured["error_db"]
    assert first.measured["error_db"] >= max(each["error_db"] for each in first.beaten) - 3
    assert first.measured["evaluations"] <= 3

    clip = Pipeline.from_pretrained(tiny_model)(PROMPTS[0], recipe=path)
    assert clip.evaluations_B[0] <= 3
    code, _, listed = run(capfd, "list", "recipes", "--folder", tmp_path / "first")
    assert code == 0
    assert listed.startswith("recipe-3.json: 3 evaluations, ")
