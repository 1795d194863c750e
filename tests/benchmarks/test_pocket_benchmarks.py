"""The pictures of the pocket model and the report of its training, from rendered clips and from reports written by hand."""

import json

import numpy as np
import pytest
from PIL import Image

from benchmarks.quality import pocket_pictures, pocket_report
from sora_jax.pipeline.model_file import POCKET
from sora_jax.pocket import train
from sora_jax.pocket.judging import cases
from sora_jax.pocket.world.words import PALETTE

pytestmark = pytest.mark.usefixtures("little_optimised")


@pytest.fixture(scope="module")
def dozen():
    asked = cases.captions(12, seed=0)
    return list(cases.rendered(asked)), [one.text for one in asked]


def test_strips_show_first_and_last_frame_of_every_clip(dozen):
    clips, texts = dozen
    sheet = np.asarray(pocket_pictures.strips(clips, texts))
    size, step = 64, 64 + pocket_pictures.GAP_PX
    for row, clip in enumerate(clips):
        top, left = pocket_pictures.GAP_PX + row * step, pocket_pictures.STRIP_TEXT_PX
        last = left + (pocket_pictures.FRAMES - 1) * step
        np.testing.assert_array_equal(sheet[top : top + size, left : left + size], clip[0])
        np.testing.assert_array_equal(sheet[top : top + size, last : last + size], clip[-1])
        assert (sheet[top : top + size, :left] != 255).any()  # the caption


def test_the_longest_caption_stays_in_its_place():
    text = max((one.text for one in cases.captions(300, seed=0)), key=len)
    assert len(text) > 90
    gap, step = pocket_pictures.GAP_PX, 64 + pocket_pictures.GAP_PX
    cell = step + pocket_pictures.CLIP_TEXT_PX
    page = np.asarray(pocket_pictures.animation([np.zeros((34, 64, 64, 3), np.uint8)] * 6, [text] * 6)[0])
    sheet = np.asarray(pocket_pictures.strips([np.zeros((34, 64, 64, 3), np.uint8)] * 3, [text] * 3))
    for row in range(2):
        assert (page[(row + 1) * step : (row + 1) * step + gap] == 255).all()  # the line between two rows
        assert (sheet[(row + 1) * step : (row + 1) * step + gap] == 255).all()
        for column in range(3):
            left, top = gap + column * cell, gap + row * step
            assert (page[top : top + 64, left : left + 64] == 0).all()
            assert (page[:, left - gap : left] == 255).all()


def test_pictures_are_small_whatever_the_noise(dozen, tmp_path):
    """Noise of 6 levels, in pixels and in cells of 4, is that of a codec of 30 dB."""
    clips, texts = dozen
    rng = np.random.default_rng(0)
    for name, level in (("clean", 0.0), ("noisy", 4.0)):
        cells = rng.normal(0, level, (12, 34, 16, 16, 3)).repeat(4, 2).repeat(4, 3)
        noise = cells + rng.normal(0, level, cells.shape)
        worse = list(np.clip(np.stack(clips) + noise, 0, 255).round().astype(np.uint8))
        png, gif = tmp_path / f"{name}.png", tmp_path / f"{name}.gif"
        assert pocket_pictures.save_strips(pocket_pictures.strips(worse, texts), png) == png.stat().st_size < 300_000
        pictures = pocket_pictures.animation(worse, texts)
        assert pocket_pictures.save_animation(pictures, gif) == gif.stat().st_size < 300_000
    with Image.open(tmp_path / "clean.gif") as shown:
        assert shown.n_frames == len(pictures) == 17
        assert shown.info["duration"] == 80  # two frames at 24 frames per second, in ticks of 10 ms
        shown.seek(16)
        last = np.asarray(shown.convert("RGB")).astype(int)
    # the last of the animation's frames is the clip's last but one; 128 colours are near all of them
    expected = clips[0][32].astype(int)
    at = pocket_pictures.GAP_PX
    assert abs(last[at : at + 64, at : at + 64] - expected).mean() < max(max(PALETTE)) / 25


def test_too_large_a_picture_is_an_error(dozen, tmp_path, monkeypatch):
    monkeypatch.setattr(pocket_pictures, "MAX_BYTES", 1000)
    with pytest.raises(ValueError, match="expected at most 1000: show fewer clips"):
        pocket_pictures.save_strips(pocket_pictures.strips(*dozen), tmp_path / "strips.png")


@pytest.mark.slow
def test_pictures_of_a_model_directory(tiny_model, tmp_path, monkeypatch, capsys):
    asked = []
    made = cases.clips

    def few_steps(model, given):
        asked.extend(given)
        return made(model, given, {"num_steps": 1, "guidance": 1.0})

    monkeypatch.setattr(cases, "clips", few_steps)
    pocket_pictures.main([str(tiny_model), "--num", "2", "--seed", "7", "--out", str(tmp_path / "docs")])
    assert [one.text for one in asked] == [one.text for one in cases.captions(2, seed=7)]
    assert sorted(path.name for path in (tmp_path / "docs").iterdir()) == ["pocket_clips.gif", "pocket_strips.png"]
    assert capsys.readouterr().out.count(" bytes\n") == 2


def write_lines(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def loss(step, seconds, value):
    return {"step": step, "of": 400, "seconds": seconds, "loss": value, "step_s": 1.0, "remaining_s": 0.0}


def scores(step, seconds, share):
    judged = {"colour": share, "motion": share, "shape": share, "all four": share, "slow < fast": float("nan")}
    return {"step": step, "of": 400, "seconds": seconds, **judged}


def test_time_counts_over_all_starts_and_repeated_steps_once():
    lines = [loss(50, 10.0, 3.0), loss(100, 20.0, 2.0), loss(150, 30.0, 9.0), loss(150, 11.0, 1.0), loss(200, 22.5, 0.5)]
    rows = pocket_report.timeline(lines)
    assert [(row["step"], row["seconds"], row["loss"]) for row in rows] == [
        (50, 10.0, 3.0), (100, 20.0, 2.0), (150, 41.0, 1.0), (200, 52.5, 0.5),
    ]  # fmt: skip


SCORED = ([100, 200, 300], [0.25, 0.75, 0.5])  # steps of the transformer's evaluations, and their scores
FLOW_STEPS, FLOW_S, SPATIAL_S = 300, 31, 6


@pytest.fixture
def work(tmp_path, tiny_model):
    """A folder that training worked in: two stages of it, two starts, and the model."""
    folder = tmp_path / "training"
    folder.mkdir()
    write_lines(folder / "spatial.jsonl", [loss(100, 5.0, 1.0), {"step": 100, "of": 400, "seconds": SPATIAL_S, "psnr": 30.5}])
    losses = [loss(step, step / 10, 1 / step) for step in range(1, FLOW_STEPS + 1)]
    judged = [
        scores(step, seconds, share) for step, seconds, share in zip(SCORED[0], (10.5, 20.5, FLOW_S), SCORED[1], strict=True)
    ]
    write_lines(folder / "flow.jsonl", sorted([*losses, *judged], key=lambda line: line["seconds"]))
    arguments = {name: value for name, value in vars(train.parse([])).items() if name != "work"}
    last = arguments | {"batch": 24, "judge_every": 100, "base": "/somewhere/base"}
    starts = [{"arguments": last | {"flow_steps": 300}, "device": "TPU"}, {"arguments": last, "device": "TPU"}]
    write_lines(folder / "runs.jsonl", starts)
    (folder / "model").symlink_to(tiny_model)
    return folder


def reported(work, *arguments):
    """Returns what the command writes, the second time into the same file as the first."""
    out = work.parent / "results" / "report.json"
    pocket_report.main(["--work", str(work), "--out", str(out), *arguments])
    return json.loads(out.read_text())


def test_a_report_names_the_arguments_of_the_last_start(work):
    made = reported(work)
    assert made["arguments_from"] == "runs.jsonl"
    assert [start["other_arguments"] for start in made["starts"]] == [{"flow_steps": 300}, {}]
    assert {start["device"] for start in made["starts"]} == {"TPU"}
    assert (made["arguments"]["batch"], made["arguments"]["flow_steps"]) == (24, 400)
    assert made["arguments"]["base"] == "base"  # not the folders of the machine that trained


def test_a_report_has_time_loss_and_scores_of_every_stage(work):
    made = reported(work)
    assert list(made["stages"]) == ["spatial", "flow"]
    assert made["seconds"] == SPATIAL_S + FLOW_S
    assert made["stages"]["spatial"]["scores"] == {"step": [100], "seconds": [SPATIAL_S], "psnr": [30.5]}
    stage = made["stages"]["flow"]
    assert (stage["steps"], stage["steps_done"], stage["seconds"]) == (400, FLOW_STEPS, FLOW_S)
    assert stage["starts"] == [{"first_report": 1, "steps": 400}]
    assert len(stage["loss"]["step"]) == pocket_report.POINTS
    assert (stage["loss"]["step"][0], stage["loss"]["step"][-1]) == (1, FLOW_STEPS)
    assert (stage["scores"]["step"], stage["scores"]["all four"]) == SCORED
    assert stage["scores"]["slow < fast"] == [None, None, None]
    assert stage["best"]["step"] == 200


def test_a_report_has_the_settings_that_the_arguments_make(work):
    stage = reported(work)["stages"]["flow"]
    assert (stage["settings"]["batch"], stage["settings"]["evaluate_every"]) == (24, 100)
    rates = stage["settings"]["learning_rate"]
    assert (rates["step"][0], rates["step"][-1]) == (0, 399)
    assert max(rates["rate"]) > 0
    assert stage["constants"]["CAPTION_DROP"] == 0.1


def test_a_report_counts_the_parameters_of_the_model(work):
    model = reported(work)["model"]
    assert list(model) == ["t5", "stdit3", "vae"]
    assert {network["bytes"] / network["parameters"] for network in model.values()} == {4.0}  # float32


def test_stages_that_a_later_training_kept_stay_in_the_report(work):
    made = reported(work)
    (work / "spatial.jsonl").unlink()
    again = reported(work)
    assert again["stages"]["spatial"] == made["stages"]["spatial"] | {"commit": made["commit"]}
    assert again["seconds"] == made["seconds"]


def test_a_warm_start_counts_the_time_of_what_it_continues(work):
    (work / "spatial.jsonl").unlink()
    made = reported(work)
    for continued in (1, 2):
        earlier = work.parent / f"earlier{continued}.json"
        earlier.write_text(json.dumps(made))
        warm = reported(work, "--continues", str(earlier))
        assert warm["stages"]["flow"]["continues"] == {"commit": made["commit"]} | made["stages"]["flow"]
        assert warm["seconds"] == (continued + 1) * FLOW_S
        made = warm


def test_a_line_half_written_is_left_out(tmp_path):
    (tmp_path / "text.jsonl").write_text('{"step": 1}\n{"st')
    assert pocket_report.read_lines(tmp_path / "text.jsonl") == [{"step": 1}]


def test_a_folder_without_reports_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no reports; expected one of spatial\.jsonl"):
        pocket_report.report(tmp_path)


def test_the_record_is_that_of_the_embedded_model():
    recorded = json.loads(pocket_report.RESULTS.read_text())["model"]
    assert recorded == pocket_report.model_report(POCKET)
