"""Settings: where a value comes from, and which ones are refused."""

import dataclasses
from typing import Any

import numpy as np
import pytest

from sora_jax.networks.merge_rule import Merge
from sora_jax.pipeline.clip_options import OPTIONS, Options
from sora_jax.pipeline.make_sampler import make_guidance, make_plan, make_reuse
from sora_jax.pipeline.option import declared
from sora_jax.pipeline.settings import Settings
from sora_jax.sampling.adaptive import Reuse
from sora_jax.sampling.guidance import Guidance
from sora_jax.sampling.reuse import Plan
from tests.support.tiny_model import DEFAULTS


def test_settings_come_from_the_call_then_the_model_then_open_sora() -> None:
    plain = Settings.resolve({}, {})
    assert (plain.height, plain.width, plain.num_frames, plain.fps, plain.aes) == (240, 426, 51, 24, 6.5)
    assert (plain.num_steps, plain.guidance, plain.align) == (30, 7.0, 5)
    model = Settings.resolve(DEFAULTS, {"fps": 12, "num_frames": "2s", "align": "off"})
    assert (model.height, model.width, model.num_frames, model.fps, model.save_fps) == (32, 48, 51, 12, 12)
    assert (model.num_steps, model.guidance, model.aes, model.align) == (4, 3.0, None, None)
    assert Settings.resolve({}, {"aes": "off"}).aes is None
    table = Settings.resolve(DEFAULTS, {"resolution": "144p", "aspect_ratio": "3:8"})
    assert (table.height, table.width) == (117, 312)


def test_each_source_gives_way_to_the_one_before() -> None:
    """Caller, plan (its number of steps), preset, model, Open-Sora."""
    model = {"num_steps": 7, "shift": 2.0, "guidance": 4.0}
    plan = Plan.evaluate_at([0, 1], 3)
    assert Settings.resolve(model, {}).num_steps == 7
    exact = Settings.resolve(model, {"preset": "exact"})
    assert (exact.num_steps, exact.shift, exact.guidance) == (30, 1.0, 4.0)
    assert Settings.resolve(model, {"preset": "exact", "plan": plan}).num_steps == 3
    assert Settings.resolve(model, {"preset": "exact", "num_steps": 5, "shift": 3}).num_steps == 5
    nothing_said = dict.fromkeys(OPTIONS)
    assert Settings.resolve(model, nothing_said) == Settings.resolve(model, {})


@pytest.mark.parametrize("name", [name for name, each in OPTIONS.items() if each.option.within])
def test_the_ends_of_a_range_are_in_it_and_nothing_beyond(name: str) -> None:
    each = OPTIONS[name]
    least, most = each.option.within or (0, 0)
    step = 1e-9 if "float" in each.kinds and most <= 1 else 1
    for value in (least, most):
        each.check(value)
    for value in (least - step, most + step, float("nan"), float("inf"), -float("inf"), True, "", "x", [], None, 3j, b"3"):
        with pytest.raises(ValueError, match=rf"^{name} is .*; expected .*\.$"):
            each.check(value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_steps": 3.5}, "num_steps is 3.5; expected a whole number"),
        ({"num_steps": True}, "num_steps is True; expected a whole number"),
        ({"guidance": "3"}, "guidance is '3'; expected a number"),
        ({"guidance": 10**400}, "guidance is 1000"),
        ({"guidance": 1j}, "guidance is 1j; expected a number"),
        ({"shift": "2"}, "shift is '2'; expected a positive number"),
        ({"shift": 0}, "shift is 0; expected a positive number"),
        ({"camera_motion": 5}, "camera_motion is 5; expected a text, or off"),
        ({"solver": "rk4"}, "solver is 'rk4'; expected euler, ab2, ab3, dpmpp, unipc or heun"),
        (
            {"guidance_low": 0.9, "guidance_high": 0.2},
            "guidance_low is 0.9, above guidance_high, 0.2: the interval",
        ),
        ({"guidance_low": -0.1}, "guidance_low is -0.1; expected a number from 0 to 1"),
        ({"guidance": 1, "guidance_low": 0.1}, "guidance_low says how guidance works, but guidance is 1, which is none"),
        ({"guidance_zero_steps": 1}, "guidance_zero_steps belong to CFG-Zero"),
        ({"guidance_rule": "zero-star", "guidance_zero_steps": 30}, "guidance_zero_steps is 30 of 30 steps; expected fewer"),
        (
            {"guidance_rule": "zero-star", "guidance_rescale": 0.7},
            "guidance_rescale and the rule zero-star are two",
        ),
        ({"guidance_rule": "cfg"}, "guidance_rule is 'cfg'; expected plain or zero-star"),
        ({"reuse": "input", "reuse_threshold": -1}, "reuse_threshold is -1; expected a number from 0 to 1000"),
        ({"reuse_threshold": 0.2}, "reuse_threshold says when a step reuses, but reuse is off"),
        ({"reuse": "input", "plan": Plan.evaluate_at([0], 3)}, "plan and reuse both say which steps evaluate; choose one"),
        ({"reuse": "input", "leap": "released"}, "leap 'released' compares every pair of velocities"),
        ({"reuse_order": 1}, "reuse_order says what a reused step takes, but none reuses"),
        ({"leap": True}, "leap is True; expected off, dynamic, released"),
        ({"leap": -1}, "leap is -1; expected off, dynamic, released"),
        ({"leap": 1.5}, "leap is 1.5; expected off, dynamic, released"),
        ({"merge": {"odd": "alone"}, "merge_steps": 1}, r"merge is \{'odd': 'alone'\}; expected a sora_jax.Merge"),
        ({"merge": Merge()}, "merge says what merged steps merge, but merge_steps is 0"),
        ({"merge_steps": 31}, r"merge_steps is 31 of 30 steps; expected 0 to 30 \(all\)"),
        ({"leap": 30}, "leap index 30 is beyond the last of 30 steps"),
        ({"plan": "plan.json"}, "plan is 'plan.json'; expected a sora_jax.Plan, or a file"),
        ({"loop": 2, "num_frames": 34, "condition_frame_length": 10}, "num_frames above 34 or condition_frame_length 5"),
        ({"condition_frame_length": 5}, "says how clips of a loop go on, but loop is 1; set loop as well"),
        ({"condition_frame_edit": 0.0}, "says how clips of a loop go on, but loop is 1"),
        ({"colour": 3}, "option 'colour' is unknown; expected some of num_steps, "),
        ({"num_step": 3}, "option 'num_step' is unknown; did you mean num_steps"),
        ({"resolution": "240p", "aspect_ratio": "5:7"}, "aspect ratio '5:7' is unknown"),
    ],
)
def test_what_python_may_not_say(options: Options, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Settings.resolve({}, options)


def test_guidance_options_become_the_rule_of_the_sampler() -> None:
    assert make_guidance(Settings.resolve({}, {"guidance": 1})) is None
    assert make_guidance(Settings.resolve({}, {})) == Guidance(7.0)
    said = {"guidance_high": 0.9, "guidance_rule": "zero-star", "guidance_zero_steps": 1}
    assert make_guidance(Settings.resolve({}, said)) == Guidance(7.0, interval=(0.0, 0.9), zero_star=True, zero_steps=1)
    assert make_guidance(Settings.resolve({}, {"guidance_rescale": 0.7})) == Guidance(7.0, rescale=0.7)
    exported = [Settings.resolve({}, options).is_published_loop for options in ({}, {"guidance_low": 0.1}, said)]
    assert exported == [True, False, False]


def test_reuse_options_become_the_rule_or_change_the_plan() -> None:
    assert make_reuse(Settings.resolve({}, {})) is None
    said = {"reuse": "first-block", "reuse_threshold": 0.2, "reuse_first": 3, "reuse_last": 0, "reuse_order": 1}
    assert make_reuse(Settings.resolve({}, said)) == Reuse.by_first_block(0.2, first=3, last=0, extrapolate=True)
    plan = Plan.evaluate_at([0, 2], 3)
    assert make_plan(Settings.resolve({}, {"plan": plan})) == plan
    assert make_plan(Settings.resolve({}, {"plan": plan, "reuse_order": 1})) == dataclasses.replace(plan, extrapolate=True)


def test_numbers_of_numpy_are_numbers() -> None:
    said: dict[str, Any] = {
        "num_steps": np.int64(4),
        "guidance": np.float32(2.5),
        "height": np.int32(64),
        "width": np.uint8(64),
    }
    settings = Settings.resolve({}, said)
    assert {name: type(getattr(settings, name)) for name in said} == {
        "num_steps": int, "guidance": float, "height": int, "width": int,
    }  # fmt: skip
    assert settings == Settings.resolve({}, {name: value.item() for name, value in said.items()})


def test_seeds_go_round() -> None:
    assert Settings.resolve({}, {"seed": 2**32 - 1}).with_seed(2**32).seed == 0


def test_an_error_of_a_flag_names_the_flag() -> None:
    with pytest.raises(ValueError, match=r"^--steps is 0; expected a whole number from 1 to 100000\.$"):
        declared(Options)["num_steps"].check(0, called=declared(Options)["num_steps"].called)


def test_a_calibration_knows_how_many_evaluations_there_can_be() -> None:
    settings = Settings.resolve(DEFAULTS, {"merge_steps": 2})
    for evaluations in (2, 4):
        settings.check_calibration(evaluations, half_from=3)
    for evaluations, half_from, message in (
        (1, None, "cannot have 1 evaluations; expected 2 to 4"),
        (5, None, "cannot have 5 evaluations"),
        (2.5, None, "cannot have 2.5 evaluations"),
        (2, -1, "half_from is -1; expected one of the steps, 0 to 3"),
        (2, 4, "half_from is 4"),
    ):
        with pytest.raises(ValueError, match=message):
            settings.check_calibration(evaluations, half_from)  # type: ignore[arg-type]
