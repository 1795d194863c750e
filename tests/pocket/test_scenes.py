import dataclasses
import itertools
import math

import jax
import jaxtyping
import numpy as np
import pytest

from sora_jax.pocket.world import scenes as scenes_module
from sora_jax.pocket.world.scenes import Scenes, all_frames, render_uint8, sample_scenes
from sora_jax.pocket.world.words import (
    ATTRIBUTES,
    BACKGROUNDS,
    COLOURS,
    GROWTH_PX,
    MOTIONS,
    PALETTE,
    SHAPES,
    SIZE_PX,
    TRAVEL_PX,
    combinations,
    is_unseen,
)

pytestmark = pytest.mark.usefixtures("little_optimised")

render = jax.jit(scenes_module.render)


def one_scene(**changes: float | str) -> Scenes:
    """A white circle of radius 10 in the middle of a black frame, changed as told (words or numbers)."""
    fields: dict[str, float | str] = {
        "shape": "circle", "colour": "white", "background": "black", "motion": "still", "speed": "slow", "size": "small",
        "shading": "plain", "angle": 0.0, "x_px": 32.0, "y_px": 32.0, "radius_px": 10.0,
    } | changes  # fmt: skip
    indices = {name: np.array([words.index(str(fields[name]))]) for name, words in ATTRIBUTES.items()}
    numbers = {name: np.array([value], np.float32) for name, value in fields.items() if name not in ATTRIBUTES}
    return Scenes(**indices, **numbers)


def light(scenes: Scenes, frames: np.ndarray) -> np.ndarray:
    """Share of white at each pixel, [t, h, w]."""
    return (np.asarray(render(scenes, frames), np.float64)[0, ..., 0] + 1) / 2


def centre_px(cover_thw: np.ndarray) -> np.ndarray:
    place = np.arange(SIZE_PX) + 0.5
    return np.stack([cover_thw.sum(1) @ place, cover_thw.sum(2) @ place], 1) / cover_thw.sum((1, 2))[:, None]


def test_same_seed_same_pixels_other_seed_other_pixels():
    clips = [np.asarray(render_uint8(sample_scenes(np.random.default_rng(seed), 4), all_frames())) for seed in (7, 7, 8)]
    np.testing.assert_array_equal(clips[0], clips[1])
    assert not np.array_equal(clips[0], clips[2])


def test_any_choice_of_frames_is_cut_from_the_whole_clip():
    scenes = sample_scenes(np.random.default_rng(0), 6)
    whole = np.asarray(render(scenes, all_frames()))
    np.testing.assert_array_equal(render(scenes, all_frames(17)), whole[:, :17])
    chosen = np.arange(12).reshape(6, 2)[:, ::-1].astype(np.float32)
    np.testing.assert_array_equal(
        render(scenes, chosen), np.take_along_axis(whole, chosen[..., None, None, None].astype(int), 1)
    )


@pytest.mark.parametrize(
    ("shape", "area"), [("circle", math.pi), ("square", 4 * 0.93**2), ("triangle", 0.75 * 3**0.5 * 1.3**2)]
)
def test_shapes_have_their_area_and_centre(shape, area):
    cover = light(one_scene(shape=shape, x_px=31.3, y_px=30.6), np.zeros((1, 1)))
    assert cover.sum() == pytest.approx(area * 100, rel=5e-3)  # the edge's pixels are covered in proportion
    np.testing.assert_allclose(centre_px(cover)[0], (31.3, 30.6), atol=0.05)


@pytest.mark.parametrize("speed", [0, 1])
@pytest.mark.parametrize(
    ("motion", "direction"),
    [
        *(("left", (-1, 0)), ("right", (1, 0)), ("up", (0, -1)), ("down", (0, 1))),
        *(("up-left", (-0.7071, -0.7071)), ("up-right", (0.7071, -0.7071))),
        *(("down-left", (-0.7071, 0.7071)), ("down-right", (0.7071, 0.7071))),
    ],
)
def test_travel_is_uniform_and_the_radius_stays(motion, direction, speed):
    cover = light(one_scene(motion=motion, speed=("slow", "fast")[speed]), all_frames(20))
    travelled = TRAVEL_PX[speed] * np.arange(20)[:, None] * np.array(direction)
    np.testing.assert_allclose(centre_px(cover) - 32, travelled, atol=0.02)
    np.testing.assert_allclose(cover.sum((1, 2)), math.pi * 100, rtol=5e-3)


@pytest.mark.parametrize("speed", [0, 1])
@pytest.mark.parametrize(("motion", "sign"), [("grow", 1), ("shrink", -1)])
def test_growth_is_uniform_and_the_centre_stays(motion, sign, speed):
    cover = light(one_scene(motion=motion, speed=("slow", "fast")[speed]), all_frames())
    expected = 10 + sign * GROWTH_PX[speed] * np.arange(34)
    np.testing.assert_allclose(np.sqrt(cover.sum((1, 2)) / math.pi), expected, atol=0.05)
    np.testing.assert_allclose(centre_px(cover), 32, atol=1e-3)


def test_still_object_ignores_its_speed():
    clip = np.asarray(render(one_scene(speed="fast"), all_frames()))
    np.testing.assert_array_equal(clip, np.broadcast_to(clip[:, :1], clip.shape))


def test_gradient_falls_from_the_full_colour_by_55_percent_at_any_angle():
    for angle in (0.0, 1.0, 2.5, 4.0):
        scene = one_scene(background="white", colour="red", shading="gradient", angle=angle, radius_px=-2.0)
        ground = light(scene, np.zeros((1, 1)))[0]
        step = 0.55 / SIZE_PX  # corners of pixels reach the ends, their centres stop up to one step before
        assert 1 - step <= ground.max() <= 1
        assert 0.45 <= ground.min() <= 0.45 + step
        falls = -np.array([np.diff(ground, axis=1).mean(), np.diff(ground, axis=0).mean()])
        np.testing.assert_allclose(falls / np.linalg.norm(falls), (math.cos(angle), math.sin(angle)), atol=1e-4)


@pytest.mark.parametrize("num_frames", [1, 17, 34])
def test_objects_stay_inside_the_frame(num_frames):
    scenes = sample_scenes(np.random.default_rng(1), 300, num_frames=num_frames)
    ends = np.array([[0, num_frames - 1]], np.float32)
    ring = np.ones((SIZE_PX, SIZE_PX), bool)
    ring[1:-1, 1:-1] = False
    hidden = dataclasses.replace(scenes, radius_px=np.full(300, -50, np.float32))
    np.testing.assert_array_equal(np.asarray(render(scenes, ends))[:, :, ring], np.asarray(render(hidden, ends))[:, :, ring])


def test_pixels_of_colour_and_background_are_the_palette():
    for colour, background in zip(COLOURS, reversed(BACKGROUNDS), strict=False):
        clip = np.asarray(render_uint8(one_scene(colour=colour, background=background), np.zeros((1, 1))))[0, 0]
        assert tuple(clip[32, 32]) == PALETTE[BACKGROUNDS.index(colour)]
        assert tuple(clip[0, 0]) == PALETTE[BACKGROUNDS.index(background)]


def test_split_is_disjoint_complete_and_about_15_percent_unseen():
    training, unseen, every = (set(combinations(split)) for split in ("training", "unseen", "all"))
    assert not training & unseen
    assert training | unseen == every
    assert len(every) == 3 * 11 * (8 * 9 - 8)
    assert 0.13 < len(unseen) / len(every) < 0.17


def test_split_does_not_move():
    """Shipped weights were trained on this split: a change here makes their scores on unseen combinations void."""
    assert len(combinations("unseen")) == 336
    assert is_unseen("circle", "red", "blue", "right")
    assert not is_unseen("circle", "red", "blue", "left")


def test_every_value_and_every_pair_of_values_occurs_in_training():
    training = combinations("training")
    words = (SHAPES, COLOURS, BACKGROUNDS, MOTIONS)
    for first, second in itertools.combinations(range(4), 2):
        seen = {(one[first], one[second]) for one in training}
        possible = {pair for pair in itertools.product(words[first], words[second]) if pair[0] != pair[1]}
        assert seen == possible


@pytest.mark.parametrize("split", ["training", "unseen"])
def test_samples_belong_to_their_split(split):
    scenes = sample_scenes(np.random.default_rng(2), 500, split=split)
    for one in map(scenes.attributes, range(500)):
        assert is_unseen(one["shape"], one["colour"], one["background"], one["motion"]) == (split == "unseen")
        assert ("speed" in one) == (one["motion"] != "still")
        assert one["background"] != "black" or one["shading"] == "plain"


def test_unknown_split_is_refused(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # the tests' type checker would refuse it first
    with pytest.raises(ValueError, match="split 'test' does not exist; expected one of training, unseen, all"):
        combinations("test")  # type: ignore[arg-type]


def test_scenes_are_a_pytree_that_jit_traces_once():
    traces = []

    def brightness(scenes: Scenes) -> jax.Array:
        traces.append(1)
        return scenes_module.render(scenes, all_frames(2)).mean()

    means = [jax.jit(brightness)(sample_scenes(np.random.default_rng(seed), 3)) for seed in range(3)]
    assert len(set(map(float, means))) == 3
    assert len(traces) == 1
    scenes = sample_scenes(np.random.default_rng(0), 5)
    np.testing.assert_array_equal(render(scenes[1:3], all_frames(2)), render(scenes, all_frames(2))[1:3])
