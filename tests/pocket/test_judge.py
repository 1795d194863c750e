import ast
import dataclasses
from pathlib import Path

import numpy as np
import pytest

from sora_jax.pocket.judging import cases
from sora_jax.pocket.judging import measure as measure_module
from sora_jax.pocket.judging.measure import Measurement, measure
from sora_jax.pocket.judging.scores import Rate, confusion, has_room, kept, score
from sora_jax.pocket.world.scenes import all_frames, render_uint8, sample_scenes
from sora_jax.pocket.world.words import ATTRIBUTES

NUM = 512


@pytest.fixture(scope="module")
def real():
    """Measurements and attributes of rendered clips of unseen combinations."""
    asked = cases.captions(NUM, seed=0)
    return [measure(clip) for clip in cases.rendered(asked)], [one.scene.attributes(0) for one in asked]


def clips(seed: int, num: int, num_frames: int) -> tuple[np.ndarray, list[dict[str, str]]]:
    scenes = sample_scenes(np.random.default_rng(seed), num, split="unseen", num_frames=num_frames)
    return np.asarray(render_uint8(scenes, all_frames(num_frames))), [scenes.attributes(i) for i in range(num)]


def blurred(clip: np.ndarray) -> np.ndarray:
    """Binomial blur over 5x5 pixels."""
    for _ in range(2):
        for axis in (1, 2):
            before, after = np.roll(clip, 1, axis), np.roll(clip, -1, axis)
            clip = (before + 2 * clip + after) / 4
    return clip


def drawn(box: tuple[slice, slice], num_frames: int = 4) -> np.ndarray:
    """A clip that is blue but for one white box."""
    clip = np.full((num_frames, 64, 64, 3), (30, 50, 225), np.uint8)
    clip[:, *box] = 255
    return clip


def seen(**changes: object) -> Measurement:
    """A large red circle, moving right slowly on plain blue, but for the changes."""
    plain = Measurement(
        shape="circle", colour="red", background="blue", motion="right", speed="slow", size="large", shading="plain",
        pace=1.0, radius_px=13.5, centre_px=np.full((1, 2), 32.0), radii_px=np.full(1, 13.5),
    )  # fmt: skip
    return dataclasses.replace(plain, **changes)  # type: ignore[arg-type]


ASKED = {"shape": "circle", "colour": "red", "background": "blue", "motion": "right"}


def test_real_clips_of_unseen_combinations_are_judged_right(real):
    rates = score(*real)
    assert {name: rate.share for name, rate in rates.items() if name in ATTRIBUTES and rate.share < 0.98} == {}
    assert rates["all four"].share >= 0.98
    assert rates["swapped"].count == 0
    assert rates["slow < fast"].share >= 0.98


def test_shuffled_captions_are_at_chance(real):
    measurements, asked = real
    order = np.random.default_rng(1).permutation(NUM)
    rates = score(measurements, [asked[i] for i in order])
    for name, words in ATTRIBUTES.items():
        asked_share = np.array([sum(one.get(name) == word for one in asked) for word in words]) / sum(
            name in one for one in asked
        )
        seen_share = np.array([sum(getattr(one, name) == word for one in measurements) for word in words]) / NUM
        chance = float(asked_share @ seen_share)
        sigma = (chance * (1 - chance) / rates[name].total) ** 0.5
        assert abs(rates[name].share - chance) < 4 * sigma, name
    pairs = rates["slow < fast"]
    assert abs(pairs.share - 0.5) < 4 * 0.5 / pairs.total**0.5


@pytest.mark.ci
def test_real_clips_stay_right_under_blur_and_noise_of_28_db():
    rng = np.random.default_rng(2)
    pixels, asked = clips(3, 120, 34)
    measurements, errors = [], []
    for clip in pixels.astype(np.float32):
        coarse = rng.normal(0, 6, (34, 16, 16, 3)).repeat(4, 1).repeat(4, 2)  # a codec errs in cells, not in pixels only
        worse = np.clip(blurred(clip) + coarse + rng.normal(0, 6, clip.shape), 0, 255)
        errors.append(((worse - clip) ** 2).mean())
        measurements.append(measure((worse / 127.5 - 1).astype(np.float32)))
    assert 10 * np.log10(255**2 / np.mean(errors)) < 28
    rates = score(measurements, asked)
    assert {name: rate.share for name, rate in rates.items() if name in ATTRIBUTES and rate.share < 0.95} == {}


@pytest.mark.parametrize("num_frames", [17, 51])
def test_other_lengths_are_judged_right(num_frames):
    pixels, asked = clips(4, 60, num_frames)
    rates = score([measure(clip) for clip in pixels], asked)
    assert min(rates[name].share for name in ATTRIBUTES) >= 0.95


def test_single_images_have_no_motion():
    pixels, asked = clips(5, 60, 1)
    measurements = [measure(clip) for clip in pixels]
    assert {(one.motion, one.speed, one.pace) for one in measurements} == {(None, None, 0.0)}
    rates = score(measurements, asked)
    assert all(rates[name].share >= 0.98 for name in ("shape", "colour", "background", "size", "shading"))


def test_track_and_radius_are_those_of_the_scene():
    """A pixel belongs to the object or not, so that each edge is off by up to half a pixel (0.54 radii of a square)."""
    scenes = sample_scenes(np.random.default_rng(6), 40)
    for i, clip in enumerate(np.asarray(render_uint8(scenes, all_frames()))):
        one = measure(clip)
        np.testing.assert_allclose(one.centre_px[0], (scenes.x_px[i], scenes.y_px[i]), atol=0.5)
        np.testing.assert_allclose(one.radii_px[0], scenes.radius_px[i], atol=0.54)


def test_floats_and_bytes_are_judged_alike():
    pixels, _ = clips(7, 3, 5)
    for clip in pixels:
        one, other = measure(clip), measure((clip / 127.5 - 1).astype(np.float32))
        assert {name: getattr(one, name) for name in ATTRIBUTES} == {name: getattr(other, name) for name in ATTRIBUTES}
        np.testing.assert_array_equal(one.centre_px, other.centre_px)


def test_box_by_hand():
    one = measure(drawn((slice(20, 40), slice(10, 30))))
    assert (one.shape, one.colour, one.background, one.motion, one.shading) == ("square", "white", "blue", "still", "plain")
    np.testing.assert_allclose(one.centre_px, [[20, 30]] * 4)
    assert one.radius_px == pytest.approx(10 / 0.93)


@pytest.mark.parametrize(
    ("step", "motion"),
    [
        *(((1, 0), "right"), ((5, 2), "right"), ((5, 3), "down-right"), ((3, 5), "down-right"), ((2, 5), "down")),
        *(((-1, 1), "down-left"), ((-1, -1), "up-left"), ((1, -1), "up-right"), ((0, -1), "up"), ((-5, 2), "left")),
    ],
)
def test_a_path_is_named_by_the_nearest_eighth_of_a_turn(step, motion):
    corners = [(32 + i * step[1], 32 + i * step[0]) for i in range(4)]
    clip = np.concatenate([drawn((slice(y - 8, y + 8), slice(x - 8, x + 8)), 1) for y, x in corners])
    assert measure(clip).motion == motion


def test_an_empty_clip_has_a_background_and_nothing_else():
    one = measure(drawn((slice(0), slice(0))))
    assert (one.background, one.shading) == ("blue", "plain")
    assert (one.shape, one.colour, one.motion, one.speed, one.size) == (None,) * 5
    assert np.isnan(one.centre_px).all()


@pytest.mark.parametrize("box", [(slice(20, 30), slice(10, 40)), (slice(10, 54), slice(28, 34))])
def test_a_bar_has_no_shape(box):
    assert measure(drawn(box)).shape is None


def test_two_far_boxes_have_no_shape():
    clip = drawn((slice(8, 22), slice(8, 22)))
    clip[:, 40:54, 40:54] = 255
    assert measure(clip).shape is None


@pytest.mark.parametrize(
    ("clip", "message"),
    [
        (np.zeros((64, 64, 3), np.uint8), r"shape \(64, 64, 3\); expected \(frames, height, width, 3\)"),
        (np.zeros((0, 64, 64, 3), np.uint8), r"shape \(0, 64, 64, 3\)"),
        (np.zeros((1, 64, 64, 3), np.int32), "dtype int32; expected uint8"),
    ],
)
def test_what_is_no_clip_is_refused(clip, message):
    with pytest.raises(ValueError, match=message):
        measure_module.check_clip(clip)


def test_rates_by_hand():
    measurements = [
        seen(),
        seen(shape="square"),
        seen(colour="blue", background="red"),
        seen(shape=None, colour=None, motion=None),
    ]
    rates = score(measurements, [ASKED] * 4)
    expected = {"shape": 2, "colour": 2, "background": 3, "motion": 3, "all four": 1, "colour and motion": 2, "swapped": 1}
    assert {name: rates[name] for name in expected} == {name: Rate(count, 4) for name, count in expected.items()}
    assert rates["speed"] == rates["size"] == rates["slow < fast"] == Rate(0, 0)
    assert rates["shape"].to_dict()["share"] == 0.5
    assert Rate(0, 0).to_dict() == {"count": 0, "total": 0, "share": None, "low": None, "high": None}
    assert confusion(measurements, [ASKED] * 4, "shape").tolist() == [[2, 1, 0, 1], [0] * 4, [0] * 4]


def test_slow_and_fast_are_paired_within_a_motion():
    slow, fast, up = ASKED | {"speed": "slow"}, ASKED | {"speed": "fast"}, ASKED | {"motion": "up", "speed": "fast"}
    measurements = [seen(pace=pace) for pace in (1.0, 2.0, 1.5, 1.2, 0.1)]
    assert score(measurements, [slow, fast, slow, fast, up])["slow < fast"] == Rate(1, 2)


def test_matched_pairs_replace_those_of_a_motion_and_need_an_object():
    fast, nothing = seen(pace=2.0), seen(shape=None, colour=None, motion=None, speed=None, size=None, pace=0.0)
    asked = [ASKED | {"speed": "slow"}, ASKED | {"speed": "fast"}]
    assert score([seen(), fast], asked, pairs=[(fast, seen()), (seen(), fast)])["slow < fast"] == Rate(1, 2)
    assert score([nothing, fast], asked)["slow < fast"] == Rate(0, 1)


def test_what_a_first_frame_shows_is_kept_or_not():
    """Begun 3 pixels off, 3.5 off, in the right place with the wrong colour, and not at all."""
    at = [seen(centre_px=np.array([[x, y]])) for x, y in ((30.0, 40.0), (30.0, 40.5))]
    measurements = [*at, seen(colour="blue"), seen(colour=None, shape=None, centre_px=np.full((1, 2), np.nan))]
    start_px = np.array([[30.0, 37.0], [30.0, 37.0], [32.0, 32.0], [32.0, 32.0]])
    rates = kept(measurements, [ASKED] * 4, start_px)
    assert rates == {"position kept": Rate(2, 4), "colour, shape, position kept": Rate(1, 4)}


@pytest.mark.parametrize(
    ("last", "room"),
    [((30, 32, 12), True), ((40, 32, 12), True), ((45, 32, 12), False), ((30, 50, 12), False), ((30, 32, 30), False)],
)
def test_an_object_has_room_until_it_reaches_the_edge(last, room):
    """It comes from (25, 32) in 34 frames and goes on for half as far: to x = 47.5 or 55, where 12 pixels are left or not."""
    path = np.linspace((25, 32, 12), last, 35)
    one = seen(centre_px=path[:, :2], radii_px=path[:, 2])
    assert has_room(one, 17) == room


def test_what_is_not_there_has_no_room():
    assert not has_room(seen(centre_px=np.full((3, 2), np.nan), radii_px=np.full(3, np.nan)), 17)


def test_wilson_interval():
    """R. G. Newcombe, Statistics in Medicine 17 (1998) 857, table I, method 3: 81 of 263 and 0 of 20."""
    assert Rate(81, 263).interval == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert Rate(0, 20).interval == pytest.approx((0.0, 0.1611), abs=5e-5)
    assert all(np.isnan(Rate(0, 0).interval))


def test_score_needs_as_many_captions():
    with pytest.raises(ValueError, match="1 measurements for 2 captions"):
        score([seen()], [ASKED] * 2)


def test_the_judge_shares_no_code_with_the_drawing():
    tree = ast.parse(Path(measure_module.__file__).read_text())
    imports = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert not {name for name in imports if name and name.startswith("sora_jax")} - {"sora_jax.pocket.world.words"}
