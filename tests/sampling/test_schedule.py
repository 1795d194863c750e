"""Times of a sampling: the published formula, its rounding, and what is done where the source breaks."""

import math
from collections.abc import Callable

import hypothesis
import hypothesis.strategies as st
import ml_dtypes
import numpy as np
import pytest

from sora_jax.sampling.schedule import MAX_STEPS, Schedule, resolution_shift

sizes = {"height_px": 144, "width_px": 256, "num_frames": 17}


@hypothesis.given(
    num_steps=st.integers(1, 300),
    height_px=st.integers(16, 1100),
    width_px=st.integers(16, 2000),
    num_frames=st.integers(1, 300),
)
@hypothesis.settings(deadline=None, max_examples=60)
def test_times_follow_the_formula_and_never_exceed_the_noise(
    num_steps: int, height_px: int, width_px: int, num_frames: int
) -> None:
    visited = Schedule.open_sora(num_steps, height_px=height_px, width_px=width_px, num_frames=num_frames).visited
    latent = 1 if num_frames == 1 else (num_frames // 17 * 5 or math.ceil(num_frames / 4))
    ratio = math.sqrt(height_px * width_px / 512**2) * math.sqrt(latent)
    unit = 1 - np.arange(num_steps) / num_steps
    expected = 1000 * ratio * unit / (1 + (ratio - 1) * unit)
    np.testing.assert_allclose(visited, expected, rtol=2e-6)  # some ten float32 roundings of 6e-8
    assert visited[0] <= 1000
    assert (np.diff(visited) < 0).all()


def test_a_first_time_above_1000_by_rounding_is_cut() -> None:
    sizes_that_round_up = [
        (height, width)
        for height in range(96, 260, 2)
        for width in range(96, 500, 2)
        if (ratio := np.sqrt(np.float32(height * width) / np.float32(512**2)))
        and ratio / (1 + (ratio - np.float32(1))) * np.float32(1000) > 1000
    ]
    assert sizes_that_round_up, "no size rounds up: the test is void"
    for height, width in sizes_that_round_up[:20]:
        assert Schedule.open_sora(30, height_px=height, width_px=width, num_frames=1).visited[0] == 1000


def test_clips_of_2_to_16_frames_count_their_latent_frames() -> None:
    base = float(resolution_shift(height_px=512, width_px=512, num_frames=1))
    ratios = [float(resolution_shift(height_px=512, width_px=512, num_frames=n)) for n in range(1, 18)]
    assert ratios[1:16] == pytest.approx([base * math.sqrt(math.ceil(n / 4)) for n in range(2, 17)], rel=1e-6)
    assert ratios == sorted(ratios)


def test_discrete_times_are_rounded_before_the_shift_half_to_even() -> None:
    rounded = Schedule.open_sora(16, discrete=True, transform=False, **sizes).visited
    assert rounded.tolist() == [round((1 - i / 16) * 1000) for i in range(16)]
    assert rounded[1] == 938  # 937.5
    assert rounded[7] == 562  # 562.5
    shifted = Schedule.open_sora(16, discrete=True, **sizes).visited
    ratio = float(resolution_shift(**sizes))
    np.testing.assert_allclose(shifted, ratio * rounded / (1 + (ratio - 1) * rounded / 1000), rtol=1e-6)


def test_bfloat16_sizes_round_the_ratio() -> None:
    exact, rounded = (resolution_shift(**sizes, size_dtype=dtype) for dtype in (np.float32, ml_dtypes.bfloat16))
    assert rounded.dtype == ml_dtypes.bfloat16
    assert 0 < abs(float(exact) - float(rounded)) < 2**-8 * float(exact)


def test_shifts_compose_by_multiplication() -> None:
    ratio = float(resolution_shift(**sizes))
    twice = Schedule.open_sora(20, shift=3.0, **sizes).visited
    np.testing.assert_allclose(twice, Schedule.uniform(20, shift=3.0 * ratio).visited, rtol=1e-6)


def test_padding_keeps_the_shape_and_ends_at_zero() -> None:
    short, long = Schedule.uniform(30), Schedule.uniform(MAX_STEPS)
    assert short.times.shape == long.times.shape == (MAX_STEPS + 1,)
    assert short.times[30] == long.times[MAX_STEPS] == 0
    assert Schedule.uniform(MAX_STEPS + 1).times.shape == (2 * MAX_STEPS + 1,)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Schedule.uniform(0), "num_steps is 0; expected at least 1"),
        (lambda: Schedule.uniform(5, shift=0.0), "shift is 0.0; expected a positive number"),
        (lambda: Schedule.open_sora(1200, discrete=True, **sizes), "num_steps 1200 exceeds 1000"),
        (lambda: Schedule.open_sora(5, height_px=0, width_px=8, num_frames=1), "height_px is 0; expected at least 1"),
        (lambda: Schedule.from_times([500.0, 500.0]), "times must strictly decrease"),
        (lambda: Schedule.from_times([1001.0]), "times must strictly decrease from at most 1000"),
        (lambda: Schedule.from_times([500.0, float("nan")]), "times must strictly decrease"),
        (lambda: Schedule.from_times([]), "at least one time"),
    ],
)
def test_bad_schedules_are_named(make: Callable[[], Schedule], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
