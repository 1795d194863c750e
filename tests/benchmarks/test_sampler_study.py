"""The sampler study on the tiny model: forks, plans of methods, going on after a stop, and the tables."""

import dataclasses
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks._support import study_clips, study_methods, study_report
from benchmarks._support.study_methods import EVALUATIONS, FINE_REFERENCE, REFERENCE, STEPS, Method
from benchmarks.quality import sampler_study
from sora_jax.pipeline.make_sampler import leap_rule
from sora_jax.pipeline.model_file import ModelFile
from sora_jax.pipeline.pipeline import Pipeline
from sora_jax.pipeline.recipe import Recipe
from sora_jax.pocket.judging import cases
from sora_jax.sampling.reuse import Plan

pytestmark = pytest.mark.usefixtures("little_optimised")

WANTED = ("LPL 16", "LPL dynamic", "LPL extrapolated 10", "TDTM 15", "TDTM 30", "reuse shift 6 16")
PROMPTS = "a red circle\na green square\nused to calibrate\n"


@pytest.fixture(scope="module")
def work(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study")
    (folder / "prompts.txt").write_text(PROMPTS)
    run(tiny_model, folder)
    return folder


def run(model: Path, folder: Path, *more: str) -> None:
    names = f"^({'|'.join(WANTED)})$"
    arguments = [model, "--work", folder, "--out", folder / "report", "--pictures", folder]
    arguments += ["--prompt-file", folder / "prompts.txt", "--prompts", 2, "--methods", names, *more]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["sampler_study", *map(str, arguments)])
        sampler_study.main()


@pytest.mark.slow
def test_a_fork_is_the_sampling_itself(work: Path, tiny_model: Path) -> None:
    """A leap that took over 15 steps, against the pipeline, which leaps by itself; the same for merging."""
    pipe = Pipeline.from_pretrained(tiny_model)
    prompts = PROMPTS.splitlines()[:2]
    for name, options in {"LPL 16": {"leap": 15}, "LPL dynamic": {"leap": "dynamic"}, "TDTM 15": {"merge_steps": 15}}.items():
        made = pipe(prompts, num_steps=30, **options)
        with np.load(next((work / "latents").glob("*")) / f"{name.lower().replace(' ', '-')}.npz") as record:
            # the same program but for the place where it was interrupted; merging alone has no leap state in its carry
            np.testing.assert_allclose(record["z"], made.latents, rtol=1e-5, atol=1e-5)
            np.testing.assert_array_equal(record["evaluations_B"], made.evaluations_B)


@pytest.mark.slow
def test_plans_are_calibrated_at_the_times_they_are_used_at(work: Path, tiny_model: Path) -> None:
    pipe = Pipeline.from_pretrained(tiny_model)
    moved = {"num_steps": 30, "shift": 6.0}
    calibrated_on = pipe.resolve({**moved, "seed": sampler_study.SEED_STRIDE * 1000})
    plan = pipe.calibrate(PROMPTS.splitlines()[2], evaluations=16, settings=calibrated_on).plan
    made = pipe(PROMPTS.splitlines()[:2], **moved, plan=plan)
    with np.load(next((work / "latents").glob("*")) / "reuse-shift-6-16.npz") as record:
        np.testing.assert_allclose(record["z"], made.latents, rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(record["evaluations_B"], 16)


@pytest.mark.slow
def test_every_clip_has_a_line_with_its_measures(work: Path) -> None:
    lines = study_clips.read_lines(work / "clips.jsonl")
    assert {(line["method"], line["prompt"]) for line in lines} == {
        (name, i) for name in (*WANTED, REFERENCE, FINE_REFERENCE) for i in range(2)
    }
    by_name = {line["method"]: line for line in lines if line["prompt"] == 0}
    assert by_name[REFERENCE]["psnr_30"] == by_name[FINE_REFERENCE]["psnr_fine"] == study_clips.CAPPED_DB
    assert by_name[REFERENCE]["ssim_30"] == by_name[REFERENCE]["flow_kept"] == 1
    assert by_name["LPL 16"]["evaluations"] == 16
    assert by_name["LPL 16"]["leap"] == 15
    assert 17 <= by_name["LPL dynamic"]["evaluations"] <= 30
    assert len(by_name[REFERENCE]["cosine"]) == STEPS
    assert by_name[REFERENCE]["cosine"][0] is None


@pytest.mark.slow
def test_the_study_goes_on_where_it_stopped(work: Path, tiny_model: Path) -> None:
    path = work / "clips.jsonl"
    before = path.read_text().splitlines()
    path.write_text("\n".join(before[:5]) + "\n" + before[5][:20])  # stopped while it wrote
    for latents in (work / "latents").rglob("tdtm-15.npz"):
        latents.unlink()
    run(tiny_model, work)
    again = path.read_text().splitlines()
    seconds = [{key: value for key, value in json.loads(line).items() if key != "seconds"} for line in again]
    expected = [{key: value for key, value in json.loads(line).items() if key != "seconds"} for line in before]
    assert seconds == expected
    run(tiny_model, work)
    assert path.read_text().splitlines() == again


@pytest.mark.slow
def test_another_study_in_the_same_folder_is_refused(work: Path, tiny_model: Path) -> None:
    with pytest.raises(SystemExit, match="is of another model or other settings"):
        run(tiny_model, work, "--guidance", "2")


@pytest.mark.slow
def test_the_report_holds_the_papers_tables(work: Path) -> None:
    report = json.loads((work / "report.json").read_text())
    assert [row["name"] for row in report["methods"]][:2] == ["LPL extrapolated 10", "LPL 16"]
    assert report["cosines"]["step"] == list(range(1, 30))
    assert sum(report["cosines"]["leaps"].values()) <= 2
    page = (work / "report.md").read_text()
    assert "| LPL 16 | 16 | 1.88x |" in page
    tables = page.split("## ")
    assert [line.split(" |")[0] for line in tables[3].splitlines()[6:] if line] == ["| TDTM 30", "| TDTM 15", "| Euler 30"]


def test_methods_ask_for_the_evaluations_they_name() -> None:
    every = study_methods.methods()
    assert len({method.name for method in every}) == len(every)
    names = [method.name for method in every]
    for method in every:
        assert method.fork is None or names.index(method.fork[0]) < names.index(method.name)
        rule = leap_rule(method.changes.get("leap", "off"))
        steps = method.changes["num_steps"]
        if rule is not None and rule.mode == "static":
            assert rule.index + 1 == method.evaluations
        elif rule is None and "plan" in method.changes:
            assert method.changes["plan"].evaluations == method.evaluations
            assert len(method.changes["plan"].codes) == steps
        elif rule is None and method.evaluations is not None:
            assert method.calibrated == method.evaluations or steps == method.evaluations
    families = {method.family for method in every}
    for family in (
        "Euler",
        "AB2",
        "AB3",
        "UniPC shift 6",
        "DPM++",
        "Euler shift 2",
        "LPL shift 6",
        "reuse",
        "reuse shift 6",
        "guidance reuse",
    ):
        assert family in families
        counts = {method.evaluations for method in every if method.family == family} | {30}
        assert counts == set(EVALUATIONS), family


def test_a_models_recipes_take_part(tiny_model: Path, tmp_path: Path) -> None:
    model = shutil.copytree(tiny_model, tmp_path / "model")
    assert study_methods.recipes(ModelFile.read(model)) == []
    (model / "recipes").mkdir()
    codes = [0] * 10 + [1]
    options = {"solver": "ab2", "plan": {"codes": codes, "keep": "residual", "halves": True}, "reuse_order": 1}
    recipe = Recipe(
        model="model 0", height=64, width=64, num_frames=17, evaluations=10, options=options, measured={}, compared=[]
    )
    recipe.write(model / "recipes" / "recipe-10.json")
    (method,) = study_methods.recipes(ModelFile.read(model))
    assert (method.name, method.evaluations, method.changes["num_steps"]) == ("recipe 10", 10, 11)
    assert method.changes["plan"] == Plan(codes=tuple(codes), halves=True)


def test_faithfulness_is_compared_on_the_same_clips() -> None:
    exact = [{"prompt": i, "noise": 0, "all": i != 0} for i in range(100)]
    worse = [{"prompt": i, "noise": 0, "all": i >= 10} for i in range(100)]
    found = study_report.paired(worse, exact)
    assert found["mean"] == pytest.approx(-0.09)
    assert found["low"] == pytest.approx(-0.09 - 1.96 * 0.0288, abs=1e-3)
    assert study_report.paired(exact, exact) == {"mean": 0, "low": 0, "high": 0}
    assert study_report.paired(exact[:1], exact) == {}


def test_the_frontier_holds_what_nothing_beats() -> None:
    rows = [
        {"name": name, "evaluations": count, "ssim_30": {"median": value}}
        for name, count, value in (("a", 8, 0.5), ("b", 8, 0.6), ("c", 10, 0.6), ("d", 12, 0.7), ("e", 16, 0.65), ("f", 9, 0.4))
    ]
    assert study_methods.frontier(rows, "ssim_30") == ["b", "d"]


def test_what_is_chosen_brings_what_it_forks_from() -> None:
    every = [
        Method(name=REFERENCE, family="", evaluations=30, changes={}),
        Method(name="a", family="", evaluations=30, changes={}),
        Method(name="b", family="", evaluations=8, changes={}, fork=("a", 7)),
        Method(name="c", family="", evaluations=8, changes={}),
    ]
    assert [method.name for method in study_methods.chosen(every, ["b"])] == [REFERENCE, "a", "b"]
    assert dataclasses.replace(every[2], fork=None) != every[2]


def test_a_rendered_clip_shows_what_its_caption_names() -> None:
    asked = cases.captions(4, seed=0)
    for one, frames in zip(asked, cases.rendered(asked), strict=True):
        found = study_clips.scores(frames, study_clips.References.of(frames, frames), one.attributes)
        assert all(found[name] for name in ("colour", "shape", "motion", "all") if name in one.attributes)
        assert ("pace" in found) == ("speed" in one.attributes)
        assert found.get("pace", 1.0) == pytest.approx(1.0, abs=0.15)  # the judge's own error
        assert found["flow_kept"] == 1


def line(method: str, prompt: int, psnr: float, evaluations: float = 16.0) -> dict[str, Any]:
    return {"method": method, "family": method, "prompt": prompt, "noise": 0, "evaluations": evaluations, "psnr_30": psnr}


def test_shares_count_only_what_captions_name() -> None:
    lines = [{**line("m", i, float(i)), **({"shape": i > 1} if i else {})} for i in range(4)]
    (row,) = study_report.summarise(lines)
    assert (row["shape"]["count"], row["shape"]["total"]) == (2, 3)
    assert row["psnr_30"] == {"median": 1.5, "low": 0.75, "high": 2.25}


def test_tables_compare_methods_on_the_same_clips() -> None:
    lines = [line("a", 0, 1), line("a", 1, 2), line("a", 2, 9), line("b", 1, 3), line("b", 0, 4)]
    assert [(one["method"], one["prompt"]) for one in study_report.shared(lines)] == [("a", 0), ("a", 1), ("b", 1), ("b", 0)]
    assert study_report.most_clips(lines) == lines[:3]
    assert study_report.most_clips(lines[:2] + lines[3:]) == []


def test_gains_over_euler_are_of_the_same_clip_at_as_many_evaluations() -> None:
    """The median of differences, not the difference of medians; and none where Euler has no such clip."""
    euler = [line("Euler", 0, 10), line("Euler", 1, 20), line("Euler", 2, 60), line("Euler", 3, 0, evaluations=8)]
    euler.append(line("Euler", 4, study_clips.CAPPED_DB, evaluations=30))  # the reference
    other = [line("b", 4, 50, evaluations=30), line("b", 0, 13), line("b", 1, 21), line("b", 2, 70), line("b", 3, 50)]
    rows = {row["name"]: row for row in study_report.summarise([{**one, "psnr_fine": 0.0} for one in euler + other])}
    assert rows["b"]["over_euler_30"]["median"] == 3
    assert rows["b"]["over_euler_fine"]["high"] == 0
    assert "over_euler_30" not in study_report.summarise([line("b", 0, 13, evaluations=17)])[0]


@pytest.mark.slow
def test_the_second_stage_asks_for_the_best_methods(work: Path, tiny_model: Path) -> None:
    asked: list[list[str]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampler_study, "run_batch", lambda study, every, noise, indices: asked.append([m.name for m in every]))
        run(tiny_model, work, "--frontier", "--seeds", "2")
    assert len(asked) == 2  # two noises, one batch each
    assert {REFERENCE, FINE_REFERENCE, "LPL 16", "LPL dynamic", "TDTM 30"} <= set(asked[0])  # TDTM 15 forks from 30
    assert "LPL 8" not in asked[0]
