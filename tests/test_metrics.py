"""Measures of videos against scikit-image and against clips whose motion is known."""

import math

import numpy as np
import pytest

from sora_jax import metrics


def noisy_pair(shape: tuple[int, ...], level: float) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    steps = np.linspace(0, 200, shape[2])[None, None, :, None]
    clip = np.broadcast_to(steps, shape) + rng.normal(0, 10, shape)
    return tuple(np.clip(one, 0, 255).round().astype(np.uint8) for one in (clip, clip + rng.normal(0, level, shape)))


def blob(num_frames: int, speed: tuple[float, float], *, size: int = 48, radius: float = 6.0) -> np.ndarray:
    """Returns a soft disc that moves by ``speed`` (x, y) pixels a frame on a black background."""
    y, x = np.mgrid[:size, :size]
    frames = [
        200 * np.exp(-((x - size / 2 - speed[0] * t) ** 2 + (y - size / 2 - speed[1] * t) ** 2) / (2 * radius**2))
        for t in np.arange(num_frames) - num_frames / 2
    ]
    return np.repeat(np.stack(frames)[..., None], 3, axis=-1)


@pytest.mark.parametrize("level", [1.0, 25.0])
def test_fidelity_is_scikit_images(level):
    structural_similarity = pytest.importorskip("skimage.metrics", reason="scikit-image is not installed")
    clip, other = noisy_pair((3, 24, 31, 3), level)
    expected = np.mean(
        [
            structural_similarity.structural_similarity(
                *(one[t].astype(np.float64) for one in (clip, other)),
                gaussian_weights=True,
                sigma=1.5,
                use_sample_covariance=False,
                channel_axis=-1,
                data_range=255,
            )
            for t in range(3)
        ]
    )
    assert metrics.ssim(clip, other) == pytest.approx(expected, abs=1e-10)
    expected = structural_similarity.peak_signal_noise_ratio(clip, other, data_range=255)
    assert metrics.psnr(clip, other) == pytest.approx(expected, abs=1e-10)


def test_equal_clips_are_perfect():
    clip, _ = noisy_pair((2, 16, 16, 3), 1.0)
    assert (metrics.psnr(clip, clip), metrics.ssim(clip, clip)) == (math.inf, 1.0)


def test_flicker_is_the_mean_change_of_a_pixel():
    clip = np.zeros((3, 4, 4, 3), np.uint8)
    assert metrics.temporal_flickering(clip) == 1
    clip[1] = 51  # up by 51 and down again
    assert metrics.temporal_flickering(clip) == pytest.approx(0.8, abs=1e-12)
    clip[2, :2] = 51  # half of the pixels stay
    assert metrics.temporal_flickering(clip) == pytest.approx(1 - (51 + 25.5) / 2 / 255, abs=1e-12)


@pytest.mark.parametrize("speed", [(0.0, 0.0), (0.4, 0.0), (0.0, -0.8), (0.6, 0.8)])
def test_flow_is_the_speed_of_what_moves(speed):
    """Differences of a blob of 6 pixels resolve a pixel a frame to a few per cent."""
    found = metrics.flow_magnitude(blob(6, speed))
    assert found == pytest.approx(math.hypot(*speed), rel=0.05, abs=1e-9)


def test_flow_of_a_plain_clip_is_zero_whatever_its_brightness_does():
    clip = np.full((4, 24, 24, 3), 90.0) * np.array([1.0, 1.2, 0.9, 1.1])[:, None, None, None]
    assert metrics.flow_magnitude(clip) == 0
    assert metrics.temporal_flickering(clip) < 0.95


def test_speed_of_a_track_with_gaps():
    frame = np.arange(10.0)
    track = np.stack([3 + 0.3 * frame, 40 - 0.4 * frame], axis=1)
    track[[2, 7]] = np.nan
    assert metrics.track_speed(track) == pytest.approx(0.5, abs=1e-12)
    assert math.isnan(metrics.track_speed(np.full((5, 2), np.nan)))


def test_bad_clips_get_one_line():
    clip = np.zeros((2, 16, 16, 3), np.uint8)
    with pytest.raises(ValueError, match=r"clip has shape \(2, 16, 16, 3\), its reference \(1, 16, 16, 3\)"):
        metrics.psnr(clip, clip[:1])
    with pytest.raises(ValueError, match="SSIM needs at least 11 x 11"):
        metrics.ssim(clip[:, :8], clip[:, :8])
    for measure in (metrics.temporal_flickering, metrics.flow_magnitude):
        with pytest.raises(ValueError, match="clip has 1 frame; expected at least 2"):
            measure(clip[:1])
    with pytest.raises(ValueError, match="share is 0"):
        metrics.flow_magnitude(clip, share=0.0)
