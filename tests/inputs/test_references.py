"""References and masks: where frames land, what resizing preserves, which files can be read."""

from pathlib import Path

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from sora_jax.inputs import references as conditioning


def latents(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


@given(
    source=st.integers(-6, 5),
    target=st.integers(-9, 8),
    length=st.integers(0, 12),
    edit=st.floats(0, 1, width=32),
    align=st.sampled_from([None, 1, 2, 5]),
)
@settings(max_examples=200, deadline=None)
def test_given_frames_are_copied_and_marked_and_no_others(
    source: int, target: int, length: int, edit: float, align: int | None
) -> None:
    z, reference = latents(1, 9, 2, 2, 3), latents(6, 2, 2, 3, seed=1)
    strategy = f"2,0,{source},{target},{length},{edit}"
    out, mask = conditioning.apply_mask_strategy(z, [[reference]], [strategy], 2, align=align)
    marked = np.flatnonzero(np.any(out[0] != z[0], axis=(1, 2, 3)))
    first, start = (position % size for position, size in ((target, 9), (source, 6)))
    if align is not None:
        first, start = conditioning.nearest_point(first, align, 9), conditioning.nearest_point(start, align, 6)
    count = max(0, min(length, 9 - first, 6 - start))
    np.testing.assert_array_equal(marked, np.arange(first, first + count))
    np.testing.assert_array_equal(out[0, first : first + count], reference[start : start + count])
    expected = np.ones(9, np.float32)
    expected[first : first + count] = edit
    np.testing.assert_array_equal(mask[0], expected)


def test_arguments_are_left_alone_and_other_loops_do_not_apply() -> None:
    z, reference = latents(2, 5, 1, 1, 4), latents(5, 1, 1, 4, seed=1)
    before = z.copy()
    out, mask = conditioning.apply_mask_strategy(z, [[reference], []], ["0,0,0,0,3", ""], 0)
    np.testing.assert_array_equal(z, before)
    np.testing.assert_array_equal(out[1], before[1])
    assert mask.tolist() == [[0, 0, 0, 1, 1], [1, 1, 1, 1, 1]]
    out, mask = conditioning.apply_mask_strategy(z, [[reference], []], ["0,0,0,0,3", ""], 1)
    np.testing.assert_array_equal(out, before)
    assert mask.min() == 1


def test_the_next_clip_begins_with_the_end_of_the_last() -> None:
    given_references, given_strategies = [[latents(1, 2, 2, 4)], []], ["0", ""]
    previous = latents(2, 15, 2, 2, 4, seed=3)
    references, strategies = conditioning.append_generated(
        given_references, given_strategies, previous, 1, length=5, edit_ratio=0.25
    )
    out, mask = conditioning.apply_mask_strategy(latents(2, 15, 2, 2, 4, seed=4), references, strategies, 1, align=5)
    np.testing.assert_array_equal(out[:, :5], previous[:, 10:])
    assert mask[:, :5].tolist() == [[0.25] * 5] * 2
    assert mask[:, 5:].min() == 1
    assert given_strategies == ["0", ""]
    assert [len(sample) for sample in given_references] == [1, 0]


@pytest.mark.parametrize(
    ("strategy", "message"),
    [
        ("0,1", r"names reference 1, but there are 1 \(the first is 0\)"),
        ("0,0,4", "latent frame 4 of a reference of 4"),
        ("0,0,-5", "latent frame -5 of a reference of 4"),
        ("0,0,0,7", "latent frame 7 of a clip of 7"),
        ("0,0,0,0,1,0,9", "has 7 fields; expected at most 6: loop,reference"),
        ("zero", "'zero' is malformed; expected numbers"),
    ],
)
def test_strategies_that_name_nothing_are_refused(strategy: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        conditioning.apply_mask_strategy(latents(1, 7, 1, 1, 4), [[latents(4, 1, 1, 4)]], [strategy], 0)


def test_sizes_that_differ_are_refused() -> None:
    with pytest.raises(ValueError, match="reference latents are"):
        conditioning.apply_mask_strategy(latents(1, 7, 1, 2, 4), [[latents(4, 1, 1, 4)]], ["0"], 0)
    with pytest.raises(ValueError, match="batch 1, references 2 and mask strategies 1 differ"):
        conditioning.apply_mask_strategy(latents(1, 7, 1, 2, 4), [[], []], [""], 0)


def test_a_linear_ramp_stays_linear_through_bilinear_resizing() -> None:
    ramp = np.broadcast_to(np.arange(0, 240, 4, dtype=np.uint8)[None, None, :, None], (1, 30, 60, 3))
    out = conditioning.resize_crop_video(ramp, 45, 90)[0, 0, :, 0]
    pixels = (out + 1) / 2 * 255
    expected = 4 * ((np.arange(90) + 0.5) * 60 / 90 - 0.5)
    np.testing.assert_allclose(pixels[1:-1], expected[1:-1], rtol=0, atol=1e-4)  # float32 at 255


@pytest.mark.parametrize("size", [(20, 31), (31, 20), (25, 25), (60, 80)])
def test_pictures_fill_the_frame_and_lose_equal_margins(size: tuple[int, int]) -> None:
    picture = np.zeros((50, 70, 3), np.uint8)
    picture[:, 34:36] = picture[24:26] = 255
    image = conditioning.resize_crop_image(Image.fromarray(picture), *size)
    video = conditioning.resize_crop_video(picture[None], *size)
    for out in (image, video):
        assert out.shape == (1, *size, 3)
        assert out.dtype == np.float32
        assert -1 <= out.min() <= out.max() <= 1
        brightness = out[0, :, :, 0].astype(np.float64) + 1
        for axis, length in enumerate(size):
            profile = brightness.sum(axis=1 - axis) - brightness.sum(axis=1 - axis).min()
            centre = np.sum(np.arange(length) * profile) / np.sum(profile)
            assert centre == pytest.approx((length - 1) / 2, abs=0.51)  # an odd margin moves it by half a pixel


def test_only_images_are_filtered_before_shrinking() -> None:
    checks = np.tile(np.asarray([[0, 255], [255, 0]], np.uint8), (40, 40))
    picture = np.repeat(checks[:, :, None], 3, axis=2)
    assert np.std(conditioning.resize_crop_image(Image.fromarray(picture), 16, 16)) < 0.1
    assert np.std(conditioning.resize_crop_video(picture[None], 18, 18)) > 0.2


@pytest.mark.torch
def test_video_resizing_is_that_of_torch() -> None:
    torch = pytest.importorskip("torch", reason="the reference extra is not installed")
    draw = np.random.default_rng(2)
    for _ in range(20):
        height, width, rows, columns = (int(x) for x in draw.integers(2, 90, 4))
        frames = draw.integers(0, 256, (2, height, width, 3), dtype=np.uint8)
        by_height, by_width = rows / height, columns / width
        full = (rows, round(width * by_height)) if by_height > by_width else (round(height * by_width), columns)
        channels_first = torch.from_numpy(frames).permute(0, 3, 1, 2).float() / 255
        resized = torch.nn.functional.interpolate(channels_first, size=full, mode="bilinear", align_corners=False)
        top, left = (full[0] - rows) // 2, (full[1] - columns) // 2
        expected = (resized[:, :, top : top + rows, left : left + columns] - 0.5) / 0.5
        got = conditioning.resize_crop_video(frames, rows, columns)
        np.testing.assert_allclose(got, expected.permute(0, 2, 3, 1).numpy(), rtol=0, atol=1e-6)  # a few float32 roundings


def test_images_are_read_upright_and_without_alpha(tmp_path: Path) -> None:
    pixels = np.zeros((8, 12, 4), np.uint8)
    pixels[:, :6] = (255, 0, 0, 255)
    pixels[:, 6:] = (0, 0, 255, 128)
    path = tmp_path / "photo.png"
    orientation = Image.Exif()
    orientation[0x0112] = 6  # the camera was turned: rotate clockwise to view
    Image.fromarray(pixels).save(path, exif=orientation)
    out = conditioning.read_reference(path, 12, 8)
    assert out.shape == (1, 12, 8, 3)
    np.testing.assert_array_equal(out[0, 0, 0], [1, -1, -1])
    np.testing.assert_array_equal(out[0, -1, 0], [-1, -1, 1])


def test_videos_are_read_frame_by_frame(tmp_path: Path) -> None:
    path = tmp_path / "clip.mkv"
    frames = [np.full((16, 24, 3), 60 * i, np.uint8) for i in range(4)]
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=8)
        stream.width, stream.height, stream.pix_fmt = 24, 16, "bgr0"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24").reformat(format="bgr0")))
        container.mux(stream.encode())
    out = conditioning.read_reference(path, 8, 8)
    assert out.shape == (4, 8, 8, 3)
    np.testing.assert_allclose((out[:, 3, 3, 0] + 1) / 2 * 255, [0, 60, 120, 180], atol=1e-3)  # ffv1 is lossless


def test_unreadable_references_say_why(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"a\.png does not exist"):
        conditioning.read_reference(tmp_path / "a.png", 8, 8)
    for name in ("a.png", "a.mp4", "a.txt"):
        (tmp_path / name).write_bytes(b"not a picture")
    with pytest.raises(ValueError, match=r"a\.png is not a readable image"):
        conditioning.read_reference(tmp_path / "a.png", 8, 8)
    with pytest.raises(ValueError, match=r"a\.mp4 is not a readable video"):
        conditioning.read_reference(tmp_path / "a.mp4", 8, 8)
    with pytest.raises(ValueError, match=r"suffix '\.txt'; expected one of \.jpg"):
        conditioning.read_reference(tmp_path / "a.txt", 8, 8)
