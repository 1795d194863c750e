"""Clips for captions and the judge's command, on a random model at toy width: what is asked, made and written, not how well."""

import dataclasses
import json
import re

import numpy as np
import pytest

from sora_jax.pipeline.clip_options import Options
from sora_jax.pocket import judge
from sora_jax.pocket.judging import cases
from sora_jax.pocket.judging import tables as kinds
from sora_jax.pocket.judging.cases import Made
from sora_jax.pocket.world import captions
from sora_jax.pocket.world.scenes import all_frames, render_uint8
from sora_jax.pocket.world.words import ATTRIBUTES, NUM_FRAMES, is_unseen
from sora_jax.sampling.sampler import Trace

pytestmark = pytest.mark.usefixtures("little_optimised")

TWO_STEPS: Options = {"num_steps": 2, "guidance": 1.0}


def test_a_short_list_of_captions_begins_a_longer_one():
    few, many = cases.captions(3, seed=5), cases.captions(9, seed=5)
    assert [one.text for one in few] == [one.text for one in many[:3]]
    assert [one.seed for one in many] == list(range(5, 14))
    assert [one.text for one in many] != [one.text for one in cases.captions(9, seed=6)]


def test_captions_say_what_they_name_of_unseen_combinations():
    for one in cases.captions(60, seed=0):
        assert captions.parse(one.text).attributes == one.attributes
        scene = one.scene.attributes(0)
        assert one.attributes.items() <= scene.items()
        assert is_unseen(*(scene[name] for name in ("shape", "colour", "background", "motion")))


def test_pairs_differ_in_the_word_for_their_speed_alone():
    slow, fast = cases.speed_pairs(40, seed=1)
    assert [one.seed for one in slow] == [one.seed for one in fast] == list(range(1, 41))
    for one, other in zip(slow, fast, strict=True):
        words, other_words = re.findall(r"\w+", one.text), re.findall(r"\w+", other.text)
        changed = [pair for pair in zip(words, other_words, strict=True) if pair[0] != pair[1]]
        assert len(changed) == 1
        assert captions.parse(one.text).attributes == one.attributes
        assert captions.parse(other.text).attributes == other.attributes
        assert {**one.attributes, "speed": "fast"} == other.attributes


def test_clips_of_a_batch_are_those_of_their_scenes():
    asked = cases.captions(cases.BATCH + 2, seed=2)
    clips = list(cases.rendered(asked))
    assert len(clips) == len(asked)
    for i in (0, cases.BATCH - 1, len(asked) - 1):
        np.testing.assert_array_equal(clips[i], render_uint8(asked[i].scene, all_frames())[0])


@pytest.mark.slow
def test_a_clip_follows_its_own_seed_whatever_it_is_batched_with(tiny_model):
    asked = cases.captions(2, seed=3)
    together = list(cases.clips(tiny_model, asked, TWO_STEPS))
    apart = list(cases.clips(tiny_model, asked[::-1], TWO_STEPS))
    assert [one.asked.text for one in apart] == [one.text for one in asked[::-1]]
    for one, other in zip(apart[::-1], together, strict=True):
        # the same sums in another order may round to the next of 256 levels
        assert abs(one.frames_thw3.astype(int) - other.frames_thw3).max() <= 1
    assert abs(together[0].frames_thw3.astype(int) - together[1].frames_thw3).max() > 1


def test_batches_hold_seeds_that_follow_each_other():
    asked = cases.captions(7, seed=0)
    chosen = [asked[i] for i in (0, 1, 2, 4, 5, 5, 3)]
    assert cases._batches(chosen, 2) == [[0, 1], [2], [3, 4], [5], [6]]


@pytest.mark.ci
def test_settings_reach_the_sampler(tiny_model):
    asked = cases.captions(2, seed=0)
    made = list(cases.clips(tiny_model, asked, {"num_steps": 6, "guidance": 1.0, "leap": 3, "merge_steps": 2}))
    assert [one.evaluations for one in made] == [4.0, 4.0]
    assert {name: made[0].parameters[name] for name in ("num_steps", "guidance", "leap", "merge_steps")} == {
        "num_steps": 6, "guidance": 1.0, "leap": 3, "merge_steps": 2,
    }  # fmt: skip
    # nothing to compare with in the first step and in the first after merging
    assert np.isnan(made[0].cosine_N).tolist() == [True, False, True, False]
    assert (abs(made[0].cosine_N[[1, 3]]) <= 1).all()


def test_a_sample_has_no_cosine_after_its_leap():
    leapt = np.array([[0, 0], [1, 0], [0, 0], [0, 1]], bool)
    nothing = np.zeros(4)
    trace = Trace(
        time_N=nothing,
        evaluations_N=nothing,
        cosine_NB=np.full((4, 2), 0.5),
        kind_N=None,
        change_N=None,
        why_N=None,
        reused_N=nothing,
        merged_N=nothing,
        leapt_NB=leapt,
    )
    cosines = cases._comparable_cosines(trace)
    assert np.isfinite(cosines).tolist() == [[True, True], [True, True], [False, True], [False, True]]


@pytest.mark.slow
def test_a_first_frame_fixes_the_beginning(tiny_model):
    asked = cases.captions(2, seed=4)
    rendered = list(cases.rendered(asked))
    first = [clip[:1] for clip in rendered]
    made = list(cases.clips(tiny_model, asked, TWO_STEPS, first_frames=first))
    assert [one.parameters["mask_strategy"] for one in made] == ["0", "0"]
    free = list(cases.clips(tiny_model, asked, TWO_STEPS))
    assert all((one.frames_thw3 != other.frames_thw3).any() for one, other in zip(made, free, strict=True))
    chunks = list(cases.clips(tiny_model, asked, TWO_STEPS, first_frames=[clip[:17] for clip in rendered]))
    assert [one.parameters["mask_strategy"] for one in chunks] == ["0,0,0,0,5"] * 2
    with pytest.raises(ValueError, match="1 first frames for 2 captions"):
        list(cases.clips(tiny_model, asked, TWO_STEPS, first_frames=first[:1]))


@pytest.fixture
def perfect_model(monkeypatch):
    """Clips as the renderer draws them in place of the model's, at the speed that the caption names."""

    def clips(model, asked, sampling=None, *, first_frames=None):
        for one in asked:
            speed = ATTRIBUTES["speed"].index(one.attributes.get("speed", one.scene.attributes(0).get("speed", "slow")))
            scene = dataclasses.replace(one.scene, speed=np.array([speed]))
            num_frames = one.num_frames + (17 if (sampling or {}).get("loop") == 2 else 0)
            frames = np.asarray(render_uint8(scene, all_frames(num_frames))[0])
            made_from = {"model": "perfect", "sora_jax": "0", "jax": "0", "device": "none", "num_steps": 3}
            yield Made(
                asked=one, frames_thw3=frames, cosine_N=np.array([np.nan, 0.5, 1.0]), evaluations=3.0, parameters=made_from
            )

    monkeypatch.setattr(cases, "clips", clips)


@pytest.mark.ci
def test_a_perfect_model_is_judged_perfect(perfect_model):
    tables = kinds.judge_captions(None, 24, seed=0, cosines=True, num_pairs=8)
    shares = {name: rate["share"] for name, rate in tables["rates"].items()}
    assert shares == dict.fromkeys(shares, 1.0) | {"swapped": 0.0}
    assert tables["rates"]["slow < fast"]["total"] == 8
    assert tables["cosines"] == {"mean": [None, 0.5, 1.0], "low": [None, 0.5, 1.0], "high": [None, 0.5, 1.0]}
    given = kinds.judge_given_frames(None, 24, seed=0)["rates"]
    assert given["position kept"]["share"] == given["colour, shape, position kept"]["share"] == given["shading"]["share"] == 1.0


@pytest.mark.slow
def test_a_perfect_model_with_shuffled_captions_is_not(perfect_model):
    for tables in (
        kinds.judge_captions(None, 24, seed=0, num_pairs=0, shuffle=True),
        kinds.judge_given_frames(None, 24, seed=0, shuffle=True),
        kinds.judge_real(24, seed=0, shuffle=True),
    ):
        assert tables["rates"]["colour"]["share"] < 0.5
        assert tables["rates"]["all four"]["share"] < 0.2
    assert kinds.judge_given_frames(None, 24, seed=0, shuffle=True)["rates"]["position kept"]["share"] < 0.5


def test_a_clip_that_goes_on_is_told_from_one_that_jumps(perfect_model, monkeypatch):
    tables = kinds.judge_extensions(None, 24, seed=0)
    rates = tables["rates"]
    assert rates["position kept"]["share"] == rates["background kept"]["share"] == 1.0
    assert rates["colour, shape, position kept"]["share"] > 0.8  # some objects leave the frame
    assert 0 < tables["with_room"]["clips"] < 24
    assert tables["with_room"]["rates"]["colour, shape, position kept"]["share"] == 1.0
    assert tables["with_room"]["rates"]["motion"]["share"] == 1.0
    goes_on = cases.clips

    def jumps(model, asked, sampling=None):
        made = list(goes_on(model, asked, sampling))
        for one, other in zip(made, made[1:] + made[:1], strict=True):
            frames = np.concatenate([one.frames_thw3[:NUM_FRAMES], other.frames_thw3[NUM_FRAMES:]])
            yield dataclasses.replace(one, frames_thw3=frames)

    monkeypatch.setattr(cases, "clips", jumps)
    rates = kinds.judge_extensions(None, 24, seed=0)["rates"]
    assert rates["position kept"]["share"] < 0.5
    assert rates["colour, shape, position kept"]["share"] < 0.2


def test_a_given_clip_is_gone_on_with(perfect_model):
    rates = kinds.judge_given_clips(None, 24, seed=0)["rates"]
    assert rates["colour, shape, position kept"]["share"] == rates["motion"]["share"] == rates["shading"]["share"] == 1.0


def test_empty_captions_that_show_clips_are_clean(perfect_model, monkeypatch):
    """As many objects as a real clip has, and no noise; the codec in this test only adds noise."""
    rng = np.random.default_rng(0)

    def reconstructed(model, asked, *, dtype=None):
        for clip in cases.rendered(asked):
            yield clip, np.clip(clip + rng.normal(0, 3, clip.shape), 0, 255).astype(np.uint8)

    monkeypatch.setattr(cases, "reconstructed", reconstructed)
    tables = kinds.judge_empty(None, 8, seed=0)
    assert {rate["share"] for rate in tables["rates"].values()} == {1.0}
    assert tables["cleanliness"]["made"]["flicker largest"] < tables["cleanliness"]["rendered and coded"]["flicker median"]


@pytest.mark.parametrize("num_frames", [1, 17, pytest.param(51, marks=pytest.mark.ci)])
def test_other_lengths_are_asked_for_and_judged(perfect_model, num_frames):
    tables = kinds.judge_captions(None, 24, seed=0, num_frames=num_frames)
    shares = {name: rate["share"] for name, rate in tables["rates"].items() if rate["total"]}
    assert shares == dict.fromkeys(shares, 1.0) | {"swapped": 0.0}
    assert ("motion" in shares, "speed" in shares, "slow < fast" in shares) == (num_frames > 1,) * 3
    real = kinds.judge_real(24, seed=0, num_frames=num_frames)
    assert real["rates"]["all three"] == tables["rates"]["all three"]


def test_an_image_has_a_caption_without_motion_and_no_speed_pair():
    for one in cases.captions(20, seed=0, num_frames=1):
        assert not {"motion", "speed"} & one.attributes.keys()
        assert captions.parse(one.text).attributes == one.attributes
    assert len(next(cases.rendered([one]))) == 1
    with pytest.raises(ValueError, match="a single image has no speed; expected 2 or more"):
        cases.speed_pairs(1, seed=0, num_frames=1)


@pytest.mark.parametrize(
    "num_frames", [pytest.param(1, marks=pytest.mark.ci), *(pytest.param(n, marks=pytest.mark.slow) for n in (17, 51))]
)
def test_the_model_makes_clips_of_other_lengths(tiny_model, num_frames):
    asked = cases.captions(1, seed=0, num_frames=num_frames)
    (made,) = cases.clips(tiny_model, asked, TWO_STEPS)
    assert len(made.frames_thw3) == made.parameters["num_frames"] == num_frames


def test_clips_that_ignore_the_seed_have_no_variety(perfect_model):
    rates = kinds.judge_variety(None, 8, seed=0)["rates"]
    assert rates["same seed, same clip"]["share"] == 1.0
    assert rates["other seed, other place"]["share"] == 0.0


@pytest.mark.slow
def test_command_prints_and_writes_every_table(tiny_model, tmp_path, capsys):
    asked = "--captions 2 --pairs 1 --cosines --given-frame 2 --codec 2 --real 8 --seed 3"
    judge.main([str(tiny_model), *f"{asked} --steps 2 --guidance 1 --json {tmp_path / 'judged.json'}".split()])
    text, written = capsys.readouterr().out, json.loads((tmp_path / "judged.json").read_text())
    assert [line for line in text.splitlines() if line.startswith("==")] == [
        "== real: 8 clips", "== codec: 2 clips", "== captions: 2 clips", "== given frame: 2 clips",
    ]  # fmt: skip
    assert written["command"].startswith("python -m sora_jax.pocket.judge ")
    assert written["command"].endswith("judged.json")
    assert written["real"]["rates"]["colour"]["count"] == 8
    assert "8 of 8" in text
    for kind in ("real", "codec", "captions", "given_frame"):
        for name in ATTRIBUTES:
            assert f"{name}: asked (rows), seen (columns)" in text
            assert sum(map(sum, written[kind]["confusion"][name]["counts"])) == written[kind]["rates"][name]["total"]
    assert written["codec"]["psnr_worst_clip_db"] <= written["codec"]["psnr_db"] < 30
    made = written["captions"]
    assert made["evaluations"] == {"mean": 2.0, "min": 2.0, "max": 2.0}
    assert made["settings"]["num_steps"] == 2
    assert made["settings"]["guidance"] == 1.0
    assert made["model"].startswith(tiny_model.name)
    assert set(made["versions"]) == {"sora_jax", "jax", "device"}
    assert made["cosines"]["mean"][0] is None
    assert made["cosines"]["low"][1] <= made["cosines"]["mean"][1] <= made["cosines"]["high"][1] <= 1
    assert made["rates"]["slow < fast"]["total"] == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to judge; add one or more of --captions N"),
        (
            ["--num-frames", "17", "--extension", "1"],
            "--num-frames 17 goes with --real, --codec and --captions; --extension is",
        ),
        (["--num-frames", "18", "--captions", "1"], "--num-frames is 18; expected one of 1, 17, 34, 51"),
        (["--captions", "-3"], "--captions is -3; expected a whole number from 0"),
        (["--captions", "ten"], "got 'ten'; expected a whole number from 0"),
        (["nowhere", "--captions", "2"], "nowhere"),
        (["nowhere", "--codec", "2"], "nowhere"),
        (["--real", "1", "--json", "nowhere/file.json"], "the folder of nowhere/file.json does not exist; create it first"),
    ],
)
def test_bad_arguments_get_one_line(arguments, message, capsys):
    assert judge.main(arguments) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith("sora-jax: error: ")
    assert message in lines[-1]


def test_a_bad_setting_gets_one_line(tiny_model, capsys):
    assert judge.main([str(tiny_model), "--captions", "1", "--leap", "sometimes"]) == 2
    assert "got 'sometimes'; expected off, dynamic, released" in capsys.readouterr().err.splitlines()[-1]
