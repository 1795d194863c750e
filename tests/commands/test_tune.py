"""The tune command, the recipes it writes, and clips that are sampled by one."""

import dataclasses
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from sora_jax import files
from sora_jax.commands import main
from sora_jax.pipeline import plan_search, tuning
from sora_jax.pipeline.model_file import ModelFile
from sora_jax.pipeline.pipeline import Pipeline
from sora_jax.pipeline.presets import candidates
from sora_jax.pipeline.recipe import Recipe
from sora_jax.pipeline.settings import Settings
from sora_jax.pipeline.tuning import Measured, Tuning
from sora_jax.sampling.reuse import Plan

pytestmark = pytest.mark.usefixtures("little_optimised")

PROMPTS = [
    "a red circle moves right", "a green square", "a blue triangle moves up", "a red square", "a circle grows", "a blue square",
]  # fmt: skip


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
        compared=[{"name": "Euler", "error_db": 20.0}],
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
    empty, few, enough = (tmp_path / f"{name}.txt" for name in ("empty", "few", "enough"))
    for path, count in ((empty, 0), (few, 5), (enough, 6)):
        path.write_text("a circle\n" * count)
    for words, message in (
        (("--prompts", empty, "--evaluations", 8), "no prompt in"),
        (("--prompts", few, "--evaluations", 8), "few.txt has too few prompts, 5; expected 6 or more"),
        (("--prompts", enough, "--evaluations", "8,x"), "--evaluations is '8,x'; expected different whole numbers"),
        (("--prompts", enough, "--evaluations", 8, "--minutes", -1), "--minutes is -1; expected a number above 0"),
    ):
        code, error, _ = run(capfd, "tune", tiny_model, "-o", tmp_path / "recipes", *words)
        assert code == 2
        assert message in error
        assert len(error.splitlines()) == 1
    assert not (tmp_path / "recipes").exists()
    code, error, _ = run(capfd, "generate", "a circle", "--model", tiny_model, "--force-recipe")
    assert (code, "force_recipe says which recipes are used" in error) == (2, True)


@pytest.fixture
def with_recipes(recipe: Recipe, tiny_model: Path, tmp_path: Path) -> ModelFile:
    """A model that brings recipes for 8 and 16 evaluations, at its own size."""
    model = shutil.copytree(tiny_model, tmp_path / "model")
    own = ModelFile.read(model)
    plain = own.resolve({})
    size = {name: getattr(plain, name) for name in ("height", "width", "num_frames")}
    (model / "recipes").mkdir()
    for count in (8, 16):
        codes = [0] * count + [1, 1]
        options = {**recipe.options, "plan": {"codes": codes, "keep": "residual"}}
        made = dataclasses.replace(recipe, model=own.model_id, evaluations=count, options=options, **size)
        made.write(model / "recipes" / f"recipe-{count}.json")
    return ModelFile.read(model)


def test_a_model_brings_recipes_as_presets(
    with_recipes: ModelFile, tiny_model: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert with_recipes.presets() == ["exact", "recommended", "tuned-8", "tuned-16"]
    eight = with_recipes.resolve({"preset": "tuned-8"})
    assert (eight.solver, eight.num_steps, eight.evaluations()) == ("ab2", 10, (8.0, False))
    assert with_recipes.resolve({"preset": "tuned-8", "shift": 3.0}).shift == 3.0
    code, said, _ = run(capfd, "generate", "a red circle", "--model", tiny_model, "--preset", "tuned-8", "--dry-run")
    assert (code, len(said.splitlines())) == (2, 1)
    assert f"{tiny_model} brings no recipe for the preset tuned-8; make it with: sora-jax tune {tiny_model}" in said
    code, _, listed = run(capfd, "list", "presets", "--model", with_recipes.directory)
    assert [line.split(",")[0] for line in listed.splitlines()[:-1]] == [
        "exact: evaluations 30", "recommended: evaluations 16", "tuned-8: evaluations 8", "tuned-16: evaluations 16",
    ]  # fmt: skip


def test_a_preset_of_a_recipe_is_refused_where_it_was_not_tuned(with_recipes: ModelFile) -> None:
    longer = {"num_frames": with_recipes.resolve({}).num_frames + 17}
    with pytest.raises(ValueError, match=r"preset tuned-8 was tuned for .* frames, not .*--force-recipe"):
        with_recipes.resolve({"preset": "tuned-8", **longer})
    assert with_recipes.resolve({"preset": "tuned-8", "force_recipe": True, **longer}).num_steps == 10
    with pytest.raises(ValueError, match="a recipe that a model brings"):
        Settings.resolve({}, {"preset": "tuned-8"})
    (Path(with_recipes.directory) / "recipes" / "recipe-8.json").write_text("{")
    with pytest.raises(ValueError, match=r"recipe-8\.json is not a recipe"):
        with_recipes.resolve({"preset": "tuned-8"})


def test_the_recommended_preset_is_the_models_recipe_where_it_fits(with_recipes: ModelFile) -> None:
    tuned = with_recipes.resolve({"preset": "tuned-16"})
    assert with_recipes.resolve({"preset": "recommended"}) == tuned
    assert with_recipes.resolve({"preset": "recommended", "guidance": 2.0, "seed": 3}).plan == tuned.plan
    elsewhere = [{"num_frames": tuned.num_frames + 17}, {"num_steps": 10}, {"leap": "dynamic"}, {"merge_steps": 2}]
    for options in elsewhere:
        found = with_recipes.resolve({"preset": "recommended", **options})
        assert (found.solver, found.plan, found.num_steps) == ("ab2", None, options.get("num_steps", 16))


def test_candidates_are_settings_and_have_names_of_their_own() -> None:
    for count in (8, 11):
        found = candidates(count, own_shift=0.4, settings=Settings.resolve({}, {}))
        assert len({each.name for each in found}) == len(found) > 50
        for each in found:
            options = {name: value for name, value in each.options.items() if name not in ("leap", "reuse_order")}
            Settings.resolve({}, options)


class Pretended:
    """Sampling that costs nothing: errors follow from the settings, so that a search can be watched.

    AB2 at a shift in all of 2.4 is best on the prompts of the search and worst on those kept aside; a real error is in between.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.samplings, self.interrupted_at, self.seconds = 0, -1, 0.0
        self.own_shift = 1.0
        pretended = self

        @contextmanager
        def prepared(tuning: Tuning) -> Iterator[None]:
            tuning._fine_db = [60.0] * len(tuning.prompts)
            pretended.own_shift = tuning._shift
            yield

        def sampled(tuning: Tuning, settings: Settings, prompt: int) -> Measured:
            if pretended.samplings == pretended.interrupted_at:
                raise KeyboardInterrupt
            pretended.samplings += 1
            pretended.seconds += 1
            overfits = settings.solver == "ab2" and settings.plan is None and settings.reuse is None
            overfits &= abs(settings.shift * pretended.own_shift - 2.4) < 1e-6
            better = 50.0 if prompt in tuning.searched else -5.0
            error = better if overfits else settings.shift + 0.1 * prompt + (settings.solver == "ab2")
            return Measured(error_db=error, evaluations=settings.evaluations()[0], seconds=1.0, bytes_read=None)

        class Plans:
            @staticmethod
            def plan(evaluations: int) -> Plan:
                return Plan.evaluate_at(range(evaluations), tuning.PLAN_STEPS)

        monkeypatch.setattr(plan_search, "PROPOSALS", 4)
        monkeypatch.setattr(Tuning, "_prepared", prepared)
        monkeypatch.setattr(Tuning, "_sampled", sampled)
        monkeypatch.setattr(Tuning, "_calibration", lambda *_: Plans)
        monkeypatch.setattr(tuning.time, "monotonic", lambda: pretended.seconds)


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> Pretended:
    return Pretended(monkeypatch)


@pytest.fixture
def words(tiny_model: Path, tmp_path: Path) -> tuple[object, ...]:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS) + "\n")
    return "tune", tiny_model, "--prompts", prompts, "--evaluations", 4


def lines_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "tune.jsonl").read_text().splitlines()]


def test_a_winner_that_loses_on_other_prompts_is_not_written(
    pretended: Pretended, words: tuple[object, ...], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    code, said, out = run(capfd, *words, "-o", tmp_path / "out")
    assert code == 0
    assert "on the prompts kept aside, AB2, shift 1.6 beats ab2, shift 2.4, and is the recipe" in said
    recipe = Recipe.read(out.strip())
    assert (recipe.measured["search_found"], recipe.measured["name"]) == ("ab2, shift 2.4", "AB2, shift 1.6")
    assert (recipe.options["solver"], recipe.options["num_steps"]) == ("ab2", 4)
    assert recipe.measured["error_db_range"] == pytest.approx([recipe.options["shift"] + 1 + 0.1 * i for i in (4, 5)])
    behind = {each["name"]: each["behind_db"] for each in recipe.compared}
    assert behind.keys() == {"ab2, shift 2.4", "Euler"}
    assert behind["ab2, shift 2.4"] == pytest.approx(recipe.measured["error_db"] + 5, abs=1e-3)
    assert min(behind.values()) >= 0


def test_what_was_measured_before_an_interrupt_is_kept_and_not_measured_again(
    pretended: Pretended, words: tuple[object, ...], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run(capfd, *words, "-o", tmp_path / "whole")[0] == 0
    number, whole = pretended.samplings, lines_of(tmp_path / "whole")
    assert len(whole) == 1 + number

    folder = tmp_path / "interrupted"
    pretended.samplings, pretended.interrupted_at = 0, number // 2
    code, said, out = run(capfd, *words, "-o", folder, "--quiet")
    assert (code, said.splitlines(), out) == (130, ["sora-jax: error: interrupted"], "")
    assert lines_of(folder) == whole[: 1 + number // 2]
    assert [path.name for path in folder.iterdir()] == ["tune.jsonl"]

    pretended.interrupted_at = -1
    assert run(capfd, *words, "-o", folder, "--quiet")[0] == 0
    assert pretended.samplings == number
    assert lines_of(folder) == whole
    assert Recipe.read(folder / "recipe-4.json") == Recipe.read(tmp_path / "whole" / "recipe-4.json")


def test_a_file_of_measurements_that_is_torn_damaged_or_in_use_is_told_apart(
    pretended: Pretended, words: tuple[object, ...], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for text in ('{"model"', "{}\n[]\n", "nonsense\n", '{"model": "another"}\n'):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "tune.jsonl").write_text(text)
        code, said, _ = run(capfd, *words, "-o", tmp_path / "out", "--quiet")
        if not text.endswith("\n"):
            assert (code, said) == (0, "")
        else:
            reason = "is of another model" if "another" in text else "is damaged; remove it"
            assert (code, reason in said, len(said.splitlines())) == (2, True, 1), said
            assert (tmp_path / "out" / "tune.jsonl").read_text() == text
        shutil.rmtree(tmp_path / "out")
    (tmp_path / "out").mkdir()
    with files.claimed(tmp_path / "out" / "tune.jsonl"):
        code, said, _ = run(capfd, *words, "-o", tmp_path / "out", "--quiet")
    assert (code, "another process is writing" in said, len(said.splitlines())) == (2, True, 1), said


def test_every_number_of_evaluations_gets_its_share_of_the_time(
    pretended: Pretended, words: tuple[object, ...], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A sampling takes a second by the pretended clock."""
    several = (*words[:-1], "3,4")
    assert run(capfd, *several, "--minutes", 1, "-o", tmp_path / "out", "--quiet")[0] == 0
    searched = [line for line in lines_of(tmp_path / "out")[1:] if line["prompt"] < 4]
    assert [sum(line["count"] == count for line in searched) for count in (3, 4)] == [
        31,
        24,
    ]  # of 60 seconds the first takes half, and 6 on the other prompts
    code, said, _ = run(capfd, *several, "--minutes", 1e-9, "-o", tmp_path / "none", "--quiet")
    assert (code, "the time limit passed before anything was measured; give more --minutes" in said) == (2, True)


def test_bytes_that_a_streamed_model_reads_are_in_the_recipe(
    pretended: Pretended, words: tuple[object, ...], tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    unstreamed = Tuning._sampled
    monkeypatch.setattr(Tuning, "_sampled", lambda *args: dataclasses.replace(unstreamed(*args), bytes_read=1000 + args[-1]))
    code, _, out = run(capfd, *words, "-o", tmp_path / "out", "--quiet")
    assert (code, Recipe.read(out.strip()).measured["bytes_read"]) == (0, 1005)


@pytest.mark.slow
def test_a_search_is_repeatable_and_goes_on_where_it_stopped(
    tiny_model: Path, words: tuple[object, ...], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = (*words[:-1], 3, "--quiet")
    code, error, out = run(capfd, *words, "-o", tmp_path / "first")
    assert (code, error) == (0, "")
    path = Path(out.strip())
    lines = (tmp_path / "first" / "tune.jsonl").read_text().splitlines()

    half = tmp_path / "half"
    half.mkdir()
    (half / "tune.jsonl").write_text("\n".join(lines[: len(lines) // 2]) + '\n{"torn')
    assert run(capfd, *words, "-o", half)[0] == 0
    known = [json.loads(line) for line in (half / "tune.jsonl").read_text().splitlines()]
    assert len(known) == len(lines)
    first, again = Recipe.read(path), Recipe.read(half / "recipe-3.json")
    assert first.options == again.options
    assert first.measured["error_db"] == again.measured["error_db"]
    assert first.measured["error_db"] >= max(each["error_db"] for each in first.compared)
    assert first.measured["evaluations"] <= 3

    clip = Pipeline.from_pretrained(tiny_model)(PROMPTS[0], recipe=path)
    assert clip.evaluations_B[0] <= 3
    code, _, listed = run(capfd, "list", "recipes", "--folder", tmp_path / "first")
    assert code == 0
    assert listed.startswith("recipe-3.json: 3 evaluations, ")
