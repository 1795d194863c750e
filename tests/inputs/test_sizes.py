"""Sizes and lengths: the tables against their own names, and what unknown names say."""

import numpy as np
import pytest

from sora_jax import config
from sora_jax.inputs import sizes
from sora_jax.networks.vae.codec import latent_size


@pytest.mark.parametrize(("resolution", "ratio"), [(name, ratio) for name, row in sizes.IMAGE_SIZES.items() for ratio in row])
def test_sizes_have_the_proportions_and_pixels_of_their_names(resolution: str, ratio: str) -> None:
    height, width = sizes.image_size(resolution, ratio)
    rows, columns = (25, 12) if ratio == "50:27" else map(int, ratio.split(":"))  # misnamed in the source
    if resolution.endswith(("p", "k")):
        assert height / width == pytest.approx(rows / columns, rel=0.012)  # two pixels of rounding at 144p
    else:
        assert height / width == pytest.approx(rows / columns, rel=0.005)  # named by its ratio to two digits
    assert height * width == pytest.approx(sizes.num_pixels(resolution), rel=0.015)


def test_resolutions_are_ordered_by_pixels() -> None:
    pixels = [sizes.num_pixels(name) for name in sizes.RESOLUTIONS]
    assert pixels == sorted(pixels)
    assert set(sizes.RESOLUTIONS) == set(sizes.IMAGE_SIZES)


@pytest.mark.parametrize(
    ("resolution", "ratio", "message"),
    [
        ("240", "9:16", "resolution '240' is unknown; expected one of 144p, 256, 240p"),
        ("240p", "16x9", "aspect ratio '16x9' is unknown; expected height:width"),
        ("512", "9:16", "resolution 512 has no aspect ratio 9:16; it has 12:25. .*: 144p, 240p"),
        ("2880", "1:1", "it has none"),
    ],
)
def test_unknown_sizes_name_the_known_ones(resolution: str, ratio: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sizes.image_size(resolution, ratio)


@pytest.mark.parametrize("length", ["2.5s", "", "many", "0", "-4", 0, -1, True])
def test_lengths_are_positive_whole_numbers(length: int | str) -> None:
    with pytest.raises(ValueError, match="expected a positive whole number or one of 1x, 2x"):
        sizes.num_frames(length)


def test_durations_are_multiples_of_51_frames() -> None:
    assert sizes.num_frames("2s") == sizes.num_frames("1x") == sizes.num_frames("51") == sizes.num_frames(51) == 51
    assert sizes.num_frames("16s") == 8 * sizes.num_frames("2s")


@pytest.mark.parametrize("chunks", range(7))
def test_frames_of_latents_inverts_the_codec_on_whole_chunks(chunks: int) -> None:
    frames = sizes.frames_of_latents(5 * chunks)
    assert latent_size(config.open_sora_1_2.vae, frames, 64, 64)[0] == 5 * chunks if chunks else frames == 0
    with pytest.raises(ValueError, match="expected a multiple of 5"):
        sizes.frames_of_latents(5 * chunks + 2)


def test_images_have_their_own_fps() -> None:
    image = sizes.size_conditions(2, height=144, width=256, num_frames=1, fps=24)
    video = sizes.size_conditions(2, height=144, width=256, num_frames=51, fps=24)
    np.testing.assert_array_equal(image["fps_B"], [120, 120])
    np.testing.assert_array_equal(video["fps_B"], [24, 24])
    np.testing.assert_array_equal(video["height_px_B"], [144, 144])
    np.testing.assert_array_equal(video["width_px_B"], [256, 256])
