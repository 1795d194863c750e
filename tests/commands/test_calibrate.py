"""The calibrate command, the plan file it writes, and the options by which clips take fewer evaluations."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sora_jax.commands import main
from sora_jax.networks.merging import Merge
from sora_jax.pipeline import clip_info
from sora_jax.pipeline.make_sampler import make_schedule
from sora_jax.pipeline.pipeline import Pipeline
from sora_jax.pipeline.recipe_file import PlanFile
from sora_jax.pipeline.settings import Settings
from sora_jax.sampling.calibration import Calibration
from sora_jax.sampling.leap import Leap
from sora_jax.sampling.reuse import Plan
from sora_jax.sampling.schedule import Schedule
from tests.support.tiny_model import DEFAULTS

pytestmark = pytest.mark.usefixtures("little_optimised")

PROMPT = "a red circle moves right on a blue background"
Run = Callable[..., tuple[int, list[str], str]]


@pytest.fixture(scope="module")
def pipe(tiny_model: Path) -> Pipeline:
    return Pipeline.from_pretrained(tiny_model)


@pytest.fixture(scope="module")
def made(pipe: Pipeline) -> PlanFile:
    return pipe.calibrate([PROMPT, "a green square"], evaluations=3)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    monkeypatch.chdir(tmp_path)

    def run(command: str, *arguments: object) -> tuple[int, list[str], str]:
        try:
            code = main.main([command, *map(str, arguments), "--compile-cache", "off", "--quiet"])
        except SystemExit as stop:
            code = int(stop.code or 0)
        captured = capfd.readouterr()
        return code, captured.err.strip().splitlines(), captured.out

    return run


def test_a_plan_is_measured_written_and_used(run: Run, tiny_model: Path, pipe: Pipeline, made: PlanFile) -> None:
    prompts = ("--prompt", PROMPT, "--prompt", "a green square")
    assert run("calibrate", tiny_model, "-o", "plan.json", "--evaluations", 3, *prompts) == (0, [], "plan.json\n")
    read = PlanFile.read("plan.json")
    assert read.plan == made.plan
    assert read.plan.evaluations == 3
    assert read.model == pipe.model_id
    assert (read.calibrated["num_steps"], len(read.calibrated["prompts"])) == (4, 2)
    code, errors, _ = run("generate", PROMPT, "--model", tiny_model, "--plan", "plan.json", "-o", "clip.npz")
    assert (code, errors) == (0, [])
    parameters = clip_info.inspect(Path("clip.npz")).parameters
    assert (parameters["evaluations"], parameters["plan"]["codes"]) == (3.0, list(made.plan.codes))
    again = pipe(PROMPT, plan=made.plan)
    with np.load("clip.npz") as clip:
        np.testing.assert_array_equal(clip["frames"], again.frames[0])
    assert again.trace is not None
    np.testing.assert_array_equal(again.trace.reused_N, np.array(made.plan.codes) == 1)


def test_a_plan_brings_its_number_of_steps(pipe: Pipeline, tiny_model: Path) -> None:
    plan = Plan(codes=(0, 1, 0, 1, 0, 1))
    assert pipe.resolve({"plan": plan}).num_steps == 6
    with pytest.raises(ValueError, match=r"plan has 6 steps but the schedule 5; make a plan of that length"):
        pipe(PROMPT, plan=plan, num_steps=5)


def test_the_file_names_the_error_of_its_plan() -> None:
    error_NN = np.full((4, 4), np.inf)
    error_NN[0, 1:], error_NN[1, 2:], error_NN[2, 3:] = (1.0, 2.0, 4.0), (0.5, 0.25), (8.0,)
    measured = Calibration(error_NN=error_NN, keep="residual")
    assert measured.error(Plan(codes=(0, 0, 0, 0))) == 0
    assert measured.error(Plan(codes=(0, 1, 1, 1))) == 7
    assert measured.error(Plan(codes=(0, 0, 1, 1))) == 0.75
    assert measured.error(Plan(codes=(0, 1, 2, 1))) == 9  # the half step evaluates, and is what the last step takes over
    assert measured.plan(2).codes == (0, 0, 1, 1)
    with pytest.raises(ValueError, match="plan has 3 steps; expected the 4"):
        measured.error(Plan(codes=(0, 1, 1)))


def test_the_file_keeps_everything(made: PlanFile, tmp_path: Path) -> None:
    made.write(tmp_path / "a.json")
    assert PlanFile.read(tmp_path / "a.json").plan == made.plan
    assert json.loads((tmp_path / "a.json").read_text())["error"] == made.error
    with pytest.raises(FileExistsError, match="exists"):
        made.write(tmp_path / "a.json")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not a plan: no JSON"),
        ("[]", "is not a plan: format 'list'; expected 'sora_jax plan 1'"),
        ('{"format": "sora_jax plan 2"}', "is not a plan: format 'sora_jax plan 2'"),
        ('{"format": "sora_jax plan 1", "codes": "01"}', "codes are '01'; expected a list"),
        ("[" * 100_000, "is not a plan: no JSON (nested too deeply)"),
        ('{"format": "sora_jax plan 1", "codes": [0, 1, 0, 1]}', "lacks 'keep'"),
        ('{"format": "sora_jax plan 1", "codes": [1, 0], "keep": "residual"}', "does not begin with a full evaluation"),
        ('{"format": "sora_jax plan 1", "codes": [0, 7], "keep": "residual"}', r"plan has the codes [7]"),
        (
            '{"format": "sora_jax plan 1", "codes": [0], "keep": "velocity", "error": 1, "model": "big 0", "calibrated": {}}',
            "was calibrated for the model 'big 0', this is",
        ),
    ],
)
def test_a_file_that_is_no_plan_of_this_model_gets_one_line(run: Run, tiny_model: Path, content: str, message: str) -> None:
    Path("plan.json").write_text(content)
    code, errors, _ = run("generate", PROMPT, "--model", tiny_model, "--plan", "plan.json")
    assert (code, len(errors)) == (2, 1)
    assert message in errors[0]
    assert "plan.json" in errors[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("-o", "plan.txt", "--evaluations", 2, "--prompt", "a"), "has suffix '.txt'; expected .json"),
        (("-o", "plan.json", "--evaluations", 2), "no prompt; give --prompt TEXT"),
        (("-o", "plan.json", "--evaluations", 5, "--prompt", "a"), "a plan of 4 steps cannot have 5 evaluations"),
        (("-o", "plan.json", "--evaluations", 0, "--prompt", "a"), "--evaluations is 0; expected a whole number from 1"),
        (
            ("-o", "plan.json", "--evaluations", 1, "--prompt", "a", "--merge-steps", 2),
            "1 evaluations; expected 2 to 4",
        ),
        (
            ("-o", "plan.json", "--evaluations", 2, "--prompt", "a", "--half-from", -1),
            "--half-from is -1; expected a",
        ),
        (
            ("-o", "plan.json", "--evaluations", 2, "--prompt", "a", "--half-from", 4),
            "one of the steps, 0 to 3",
        ),
        (("-o", "taken.json", "--evaluations", 2, "--prompt", "a"), "taken.json exists"),
        (("-o", "plan.json", "--evaluations", 2, "--prompt", "a", "--shift", 0), "--shift is 0; expected a positive number"),
        (
            ("-o", "plan.json", "--evaluations", 2, "--prompt", "a", "--guidance", 1, "--half-from", 2),
            "half steps reuse the guidance difference, but guidance is 1",
        ),
    ],
)
def test_bad_calibrations_get_one_line(run: Run, tiny_model: Path, arguments: tuple[object, ...], message: str) -> None:
    Path("taken.json").write_text("{}")
    code, errors, output = run("calibrate", tiny_model, *arguments)
    assert (code, len(errors), output) == (2, 1, "")
    assert message in errors[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--solver", "rk4"), "argument --solver: got 'rk4'; expected euler, ab2, ab3, dpmpp, unipc or heun"),
        (("--shift", "-1"), "--shift is -1; expected a positive number, 1 for the published times."),
        (("--leap-extrapolate",), "nothing leaps; give --leap N or --leap dynamic as well."),
        (("--plan", "gone.json"), "plan gone.json does not exist; make one with: sora-jax calibrate MODEL_DIR -o gone.json"),
        (("--preset", "fast"), "argument --preset: got 'fast'; expected exact, recommended, tuned-8"),
        (("--merge-odd", "drop"), "argument --merge-odd: got 'drop'; expected alone or released"),
        (("--merge-attentions", "spatial,time"), "--merge-attentions names 'time'; expected some of spatial,temporal,cross."),
        (("--merge-steps", 2, "--merge-odd", "released"), 'odd="released" does not restore 5 latent frames'),
        (("--leap", 7), "leap index 7 is beyond the last of 4 steps"),
    ],
)
def test_bad_sampling_options_get_one_line(run: Run, tiny_model: Path, arguments: tuple[object, ...], message: str) -> None:
    code, errors, output = run("generate", PROMPT, "--model", tiny_model, *arguments)
    assert (code, len(errors), output) == (2, 1, "")
    assert message in errors[0]


@pytest.mark.ci
def test_options_reach_the_sampler(run: Run, tiny_model: Path, pipe: Pipeline) -> None:
    arguments = ("--steps", 5, "--solver", "ab2", "--shift", 2, "--leap", 3, "--leap-extrapolate", "--merge-steps", 1)
    merging = ("--merge-attentions", "temporal,cross", "--merge-positions", "mean", "--merge-keys-values-only")
    code, errors, _ = run("generate", PROMPT, "--model", tiny_model, *arguments, *merging, "-o", "clip.npz")
    assert (code, errors) == (0, [])
    merge = Merge(spatial=False, rope_positions="mean", keys_values_only=True)
    leap = Leap.static(3, extrapolate=True)
    options: dict[str, Any] = {"num_steps": 5, "solver": "ab2", "shift": 2.0, "leap": leap, "merge_steps": 1}
    clip = pipe(PROMPT, **options, merge=merge)
    with np.load("clip.npz") as saved:
        np.testing.assert_array_equal(saved["frames"], clip.frames[0])
    recorded = Settings.from_dict(clip_info.inspect(Path("clip.npz")).parameters)
    assert recorded == pipe.resolve({**options, "merge": merge})
    plain = pipe(PROMPT, **options, merge=Merge())
    assert np.abs(plain.latents - clip.latents).max() > 1e-4


def test_illegal_combinations_are_refused_before_anything_is_loaded(tiny_model: Path) -> None:
    pipe, stages = Pipeline.from_pretrained(tiny_model), []
    plan, half = Plan(codes=(0, 1, 0, 0)), Plan(codes=(0, 2, 0, 0))
    bad: list[tuple[dict[str, Any], str]] = [
        ({"plan": plan, "solver": "heun"}, "a plan cannot drive solver 'heun'"),
        ({"plan": plan, "leap": "released"}, "leap 'released' compares every pair"),
        ({"plan": half, "guidance": 1}, "plan has half steps"),
    ]
    for options, message in bad:
        with pytest.raises(ValueError, match=message):
            pipe(PROMPT, **options, callback=lambda progress: stages.append(progress.stage))
    assert not stages


def test_presets_give_way_to_what_is_given() -> None:
    exact = Settings.resolve({**DEFAULTS, "leap": "dynamic"}, {"preset": "exact"})
    assert (exact.num_steps, exact.solver, exact.shift, exact.leap, exact.merge_steps) == (30, "euler", 1.0, "off", 0)
    assert exact.guidance == DEFAULTS["guidance"]
    for name in ("exact", "recommended"):
        chosen = Settings.resolve(DEFAULTS, {"preset": name, "num_steps": 5, "leap": 3})
        assert (chosen.num_steps, chosen.leap, chosen.plan) == (5, 3, None)
    assert Settings.resolve(DEFAULTS, {"preset": "exact", "plan": Plan(codes=(0, 1, 0))}).num_steps == 3


def test_the_recommended_preset_is_16_steps_of_ab2(pipe: Pipeline) -> None:
    """The times are shifted by 1.6 in all, or as Open-Sora shifts them where that is more."""
    chosen = pipe.resolve({"preset": "recommended"})
    assert (chosen.num_steps, chosen.solver, chosen.plan) == (16, "ab2", None)
    assert Settings.from_dict(json.loads(json.dumps(chosen.to_dict()))) == chosen
    np.testing.assert_allclose(make_schedule(chosen).visited, Schedule.uniform(16, shift=1.6).visited, rtol=1e-5)
    assert Settings.resolve({}, {"preset": "recommended"}).shift == 1
    own = Plan(codes=(0, 1, 0))
    assert pipe.resolve({"preset": "recommended", "plan": own}).plan == own
    made = pipe(PROMPT, preset="recommended")
    np.testing.assert_array_equal(made.evaluations_B, 16)
    np.testing.assert_array_equal(made.latents, pipe(PROMPT, num_steps=16, solver="ab2", shift=chosen.shift).latents)
