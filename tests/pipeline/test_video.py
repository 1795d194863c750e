import errno
import json
import os
import resource
import signal
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from sora_jax import files
from sora_jax.pipeline import clip_info, video

PARAMETERS = {"prompt": 'a rød circle | {braces} "quotes" 圆', "seed": 7, "guidance": 7.5, "aes": None}


def moving_square(num_frames: int = 10, size: int = 32) -> np.ndarray:
    frames = np.full((num_frames, size, size, 3), (40, 60, 200), np.uint8)
    for i, frame in enumerate(frames):
        frame[8:24, 2 * i : 2 * i + 8] = (230, 20, 30)
    return frames


@pytest.mark.parametrize("name", ["clip.mp4", "clip.gif", "clip.npz", "clip"])
def test_every_format_carries_its_frames_size_and_parameters(tmp_path: Path, name: str) -> None:
    path = video.save(moving_square(), tmp_path / name, fps=24, parameters=PARAMETERS)
    found = clip_info.inspect(path)
    assert found.parameters == PARAMETERS
    assert (found.media["frames"], found.media["height"], found.media["width"]) == (10, 32, 32)
    assert json.loads((tmp_path / f"{name}.json").read_text("utf-8")) == PARAMETERS
    assert sorted(os.listdir(tmp_path)) == sorted([name, f"{name}.json"])


def test_npz_and_png_frames_are_lossless(tmp_path: Path) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (3, 16, 20, 3), np.uint8)
    with np.load(video.save(frames, tmp_path / "clip.npz", fps=8)) as stored:
        np.testing.assert_array_equal(stored["frames"], frames)
        assert stored["fps"] == 8
    folder = video.save(frames, tmp_path / "clip", fps=8)
    np.testing.assert_array_equal([np.asarray(Image.open(folder / f"{i:04d}.png")) for i in range(3)], frames)
    image = video.save(frames[:1], tmp_path / "clip.png", fps=8, parameters=PARAMETERS)
    np.testing.assert_array_equal(np.asarray(Image.open(image)), frames[0])
    assert clip_info.inspect(image).parameters == PARAMETERS


@pytest.mark.parametrize(("fps", "rate"), [(24, Fraction(24)), (24000 / 1001, Fraction(24000, 1001)), (7.5, Fraction(15, 2))])
def test_mp4_frames_stand_at_exact_multiples_of_the_frame_time(tmp_path: Path, fps: float, rate: Fraction) -> None:
    path = video.save(moving_square(), tmp_path / "clip.mp4", fps=fps)
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert stream.average_rate == rate
        assert [frame.pts * frame.time_base for frame in container.decode(stream)] == [i / rate for i in range(10)]


def test_equal_frames_make_equal_mp4_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    frames = rng.normal(120, 40, (17, 12, 12, 3)).repeat(8, 1).repeat(8, 2)
    frames = np.clip(frames + rng.normal(0, 5, frames.shape), 0, 255).astype(np.uint8)
    contiguous = np.ascontiguousarray

    def after_other_work(frame: np.ndarray) -> np.ndarray:
        used = [np.full(int(rng.integers(1, 200_000)), rng.integers(256), np.uint8) for _ in range(5)]
        del used  # back to the allocator, with what it held
        return contiguous(frame)

    monkeypatch.setattr(video.np, "ascontiguousarray", after_other_work)
    assert len({video.save(frames, tmp_path / f"{run}.mp4", fps=8).read_bytes() for run in range(30)}) == 1


def test_mp4_is_yuv420p_bt709_and_its_index_comes_first(tmp_path: Path) -> None:
    colour = np.array([200, 30, 60])
    path = video.save(np.broadcast_to(colour.astype(np.uint8), (4, 32, 32, 3)), tmp_path / "clip.mp4", fps=24)
    brightness = colour @ [0.2126, 0.7152, 0.0722]  # ITU-R BT.709 section 3, limited range
    blue, red = (colour[2] - brightness) / 1.8556, (colour[0] - brightness) / 1.5748
    expected = [16 + brightness * 219 / 255, 128 + blue * 224 / 255, 128 + red * 224 / 255]
    with av.open(str(path)) as container:
        frame = next(container.decode(video=0))
        rows = [np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size)[:, : plane.width] for plane in frame.planes]
        assert frame.format.name == "yuv420p"
    # One grey level for rounding in the conversion, one for the quantiser at this rate.
    np.testing.assert_allclose([plane.mean() for plane in rows], expected, atol=2)
    content = path.read_bytes()
    assert 0 < content.find(b"moov") < content.find(b"mdat")


@given(st.integers(1, 200), st.fractions(min_value=1, max_value=50, max_denominator=1001))
def test_gif_delays_add_up_to_the_duration(num_frames: int, fps: Fraction) -> None:
    delays = video.gif_delays(num_frames, fps)
    assert len(delays) == num_frames
    assert abs(sum(delays) - 100 * num_frames / fps) <= Fraction(1, 2)
    assert max(delays) - min(delays) <= 1


@given(st.floats(-2, 2, width=32))
def test_quantise_is_the_nearest_level_and_undone_by_its_inverse(value: float) -> None:
    level = int(video.quantise(np.array([value], np.float32))[0])
    assert abs(level - 127.5 * (min(max(value, -1), 1) + 1)) <= 0.5 + 1e-4  # float32 rounding of values near 255
    assert video.quantise(np.array([level / 127.5 - 1], np.float32))[0] == level


def test_quantise_refuses_values_that_are_no_picture() -> None:
    with pytest.raises(ValueError, match=r"25.0% of the decoded values are NaN"):
        video.quantise(np.array([0.0, np.nan, 1.0, 0.5]))


@pytest.mark.parametrize("name", ["clip.mp4", "clip.npz", "clip"])
def test_an_existing_clip_is_replaced_only_on_request(tmp_path: Path, name: str) -> None:
    path = video.save(moving_square(), tmp_path / name, fps=24, parameters={"seed": 1})
    with pytest.raises(FileExistsError, match="pass --overwrite"):
        video.save(moving_square(5), path, fps=24, parameters={"seed": 2})
    assert clip_info.inspect(path).parameters == {"seed": 1}
    video.save(moving_square(5), path, fps=24, parameters={"seed": 2}, overwrite=True)
    assert clip_info.inspect(path).parameters == {"seed": 2}
    assert clip_info.inspect(path).media["frames"] == 5


def test_overwriting_never_removes_a_folder_of_other_things(tmp_path: Path) -> None:
    folder = video.save(moving_square(3), tmp_path / "clip", fps=24)
    (folder / "letter.txt").write_text("keep me")
    with pytest.raises(IsADirectoryError, match=r"not a clip of PNG frames \(it holds letter\.txt\)"):
        video.save(moving_square(3), folder, fps=24, overwrite=True)
    (tmp_path / "folder.mp4").mkdir()
    with pytest.raises(IsADirectoryError, match=r"folder\.mp4 is a folder"):
        video.save(moving_square(3), tmp_path / "folder.mp4", fps=24, overwrite=True)
    assert len(list(folder.iterdir())) == 4


def test_parameters_are_found_beside_a_file_that_lost_its_comment(tmp_path: Path) -> None:
    path = video.save(moving_square(), tmp_path / "clip.png.mp4", fps=24, parameters=PARAMETERS)
    path.unlink()
    Image.new("RGB", (4, 4)).save(tmp_path / "bare.png")
    (tmp_path / "clip.png.mp4.json").rename(tmp_path / "bare.png.json")
    assert clip_info.inspect(tmp_path / "bare.png").parameters == PARAMETERS


@pytest.mark.parametrize(
    ("name", "num_frames", "message"),
    [
        ("clip.avi", 2, r"unknown suffix .avi; expected .mp4, .gif, .png, .npz"),
        ("clip.png", 2, r"2 frames do not fit one PNG; use .*clip for a folder"),
    ],
)
def test_a_path_that_cannot_hold_the_clip_is_refused(tmp_path: Path, name: str, num_frames: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        video.save(moving_square(num_frames), tmp_path / name, fps=24)
    assert not os.listdir(tmp_path)


def test_h264_refuses_odd_sides(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"31x32 do not fit H\.264 yuv420p, which needs even sides"):
        video.save(moving_square()[:, 1:], tmp_path / "clip.mp4", fps=24)
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize(("name", "content"), [("a.mp4", b"no video"), ("a.png", b""), ("a.npz", b"PK"), ("a.gif", b"GIF89a")])
def test_inspect_names_a_damaged_file(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name} is not a readable"):
        clip_info.inspect(tmp_path / name)


@pytest.mark.parametrize("name", ["clip.mp4", "clip.gif", "clip.npz", "clip"])
def test_a_write_that_runs_out_of_space_leaves_nothing(tmp_path: Path, name: str) -> None:
    """A limit on file sizes (EFBIG) stands for a full disk: the same path through the writers."""
    noise = np.random.default_rng(0).integers(0, 256, (8, 64, 64, 3), np.uint8)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with pytest.raises(OSError, match="cannot write") as caught:
            video.save(noise, tmp_path / name, fps=24)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert caught.value.errno == errno.EFBIG
    assert not os.listdir(tmp_path)


def test_an_interrupted_write_leaves_nothing(tmp_path: Path) -> None:
    def write() -> None:
        with files.whole_file(tmp_path / "clip.mp4") as temporary:
            temporary.write_bytes(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write()
    assert not os.listdir(tmp_path)


def test_a_file_that_appears_meanwhile_is_kept(tmp_path: Path) -> None:
    def write() -> None:
        with files.whole_file(tmp_path / "clip.txt") as temporary:
            temporary.write_text("ours")
            (tmp_path / "clip.txt").write_text("theirs")

    with pytest.raises(FileExistsError):
        write()
    assert (tmp_path / "clip.txt").read_text() == "theirs"
    assert os.listdir(tmp_path) == ["clip.txt"]


def test_numbered_names_never_collide(tmp_path: Path) -> None:
    names = []
    for _ in range(3):
        path = files.numbered(tmp_path / "sample_0000.mp4")
        path.touch()
        names.append(path.name)
    assert names == ["sample_0000.mp4", "sample_0000_2.mp4", "sample_0000_3.mp4"]


LEFT = {"prompt": "a red circle", "seed": 1, "sora_jax": "0.2.0"}


@pytest.mark.parametrize("name", ["clip.mp4", "clip.gif", "clip.npz", "clip"])
def test_a_run_killed_between_its_two_publications_can_be_repeated(tmp_path: Path, name: str) -> None:
    script = f"""if True:
        import os, numpy as np
        from sora_jax import files
        from sora_jax.pipeline import video
        published, after = [], files._publish
        def publish(*arguments):
            published.append(arguments)
            os._exit(9) if len(published) == 2 else after(*arguments)
        files._publish = publish
        video.save(np.zeros((2, 32, 32, 3), np.uint8), {str(tmp_path / name)!r}, fps=24, parameters={LEFT})
    """
    assert subprocess.run([sys.executable, "-c", script]).returncode == 9
    assert not (tmp_path / name).exists()
    assert json.loads((tmp_path / f"{name}.json").read_text("utf-8")) == LEFT
    assert video.check_target(tmp_path / name, 10, overwrite=False)
    path = video.save(moving_square(), tmp_path / name, fps=24, parameters={**LEFT, "seed": 2})
    assert (
        clip_info.inspect(path).parameters == json.loads((tmp_path / f"{name}.json").read_text("utf-8")) == {**LEFT, "seed": 2}
    )


@pytest.mark.parametrize("content", ["{}", '{"prompt": "a", "seed": 1}', "[1]", "no JSON", "[" * 100_000])
def test_a_note_of_somebody_else_is_never_replaced(tmp_path: Path, content: str) -> None:
    (tmp_path / "clip.mp4.json").write_text(content)
    with pytest.raises(FileExistsError, match=r"clip\.mp4\.json exists; pass --overwrite"):
        video.save(moving_square(), tmp_path / "clip.mp4", fps=24)
    assert os.listdir(tmp_path) == ["clip.mp4.json"]
    assert (tmp_path / "clip.mp4.json").read_text() == content


def test_a_clip_that_cannot_be_published_takes_its_note_along(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def publish(temporary: Path, path: Path, overwrite: bool) -> None:
        if path.suffix == ".mp4":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        os.rename(temporary, path)

    monkeypatch.setattr(files, "_publish", publish)
    with pytest.raises(OSError, match=r"cannot write .*Input/output error"):
        video.save(moving_square(), tmp_path / "clip.mp4", fps=24)
    assert not os.listdir(tmp_path)
