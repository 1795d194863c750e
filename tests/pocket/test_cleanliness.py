"""What a clean clip is: rendered clips are, and each fault by hand is found."""

import numpy as np
import pytest

from sora_jax.pocket.judging import cases
from sora_jax.pocket.judging.cleanliness import clean, cleanliness, extremes


@pytest.fixture(scope="module")
def real():
    """Rendered clips with the noise of a codec of 33 dB."""
    rng = np.random.default_rng(0)
    clips = list(cases.rendered(cases.captions(12, seed=0)))
    return [np.clip(clip + rng.normal(0, 6, clip.shape), 0, 255).astype(np.uint8) for clip in clips]


def test_rendered_clips_are_even_and_steady():
    for clip in cases.rendered(cases.captions(12, seed=0)):
        one = cleanliness(clip)
        assert one.unevenness < 0.7  # rounding to whole levels
        assert one.flicker == 0
        assert one.jump_px < 1.2  # the fastest moves 0.8 a frame, and the centre is that of whole pixels
        assert one.single


def test_noise_is_measured_in_levels(real):
    """The difference of two normal deviates of 6 levels has a mean size of 2 * 6 / sqrt(pi) = 6.77; clipping takes some."""
    values = extremes([cleanliness(clip) for clip in real])
    assert values["unevenness median"] == pytest.approx(6, rel=0.3)
    assert values["flicker median"] == pytest.approx(6.77, rel=0.3)


def flickering(clip):
    return np.clip(clip.astype(int) + np.where(np.arange(len(clip)) % 2, 12, -12)[:, None, None, None], 0, 255).astype(np.uint8)


def mottled(clip):
    spots = np.random.default_rng(1).normal(0, 25, (8, 8, 3)).repeat(8, 0).repeat(8, 1)
    return np.clip(clip + spots, 0, 255).astype(np.uint8)


def jumping(clip):
    return clip[np.argsort(np.arange(len(clip)) % 2, kind="stable")]


def vanishing(clip):
    return np.concatenate([clip[:-6], np.broadcast_to(clip[-1, :1, :1], clip[-6:].shape)])


@pytest.mark.parametrize(
    ("spoilt", "fault"),
    [
        (flickering, "no more flicker"),
        (mottled, "even background"),
        (jumping, "no jump"),
        (vanishing, "one object or none"),
    ],
)
def test_each_fault_is_found(real, spoilt, fault):
    limits = [cleanliness(clip) for clip in real]
    assert clean(limits, limits)["clean"].share == 1.0
    rates = clean([cleanliness(spoilt(clip)) for clip in real], limits)
    assert rates[fault].share < 0.5
    assert rates["clean"].share < 0.5


def test_an_empty_clip_is_clean():
    one = cleanliness(np.full((5, 64, 64, 3), (30, 50, 225), np.uint8))
    assert (one.unevenness, one.flicker, one.jump_px, one.single) == (pytest.approx(0, abs=1e-3), 0, 0, True)
    assert cleanliness(np.full((1, 64, 64, 3), 9, np.uint8)).flicker == 0
