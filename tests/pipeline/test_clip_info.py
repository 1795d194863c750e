"""What inspection reads of hostile and enormous files: headers, in bounded memory and time; limits are said."""

import io
import json
import os
import shutil
import struct
import time
import tracemalloc
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import av
import numpy as np
import pytest

from sora_jax.pipeline import clip_info, video
from tests.inputs.test_media import png_header

FRAMES = np.random.default_rng(0).integers(0, 256, (10, 32, 32, 3), np.uint8)
PARAMETERS = {"prompt": "a red circle", "seed": 3, "sora_jax": "0"}
# A frame of 1 x 1 pixel behind its delay of 0.02 s.
GIF_FRAME = b"!\xf9\x04\0\x02\0\0\0,\0\0\0\0\x01\0\x01\0\0\x02\x02D\x01\0"


@contextmanager
def bounded(megabytes: int = 8, seconds: float = 2.0) -> Iterator[None]:
    """Asserts that the body allocates little and takes few seconds of the processor."""
    tracemalloc.start()
    began = time.process_time()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < megabytes << 20
    finally:
        tracemalloc.stop()
    assert time.process_time() - began < seconds


def refusal(path: Path) -> str:
    with bounded(), pytest.raises(ValueError, match=r"^[^\n]*$") as caught:
        clip_info.inspect(path)
    return str(caught.value).replace(str(path), "PATH")


def npy(shape: tuple[int, ...], dtype: str, content: bytes = b"") -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"shape": shape, "fortran_order": False, "descr": dtype})
    return file.getvalue() + content


def npz(path: Path, **entries: bytes) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries.items():
            archive.writestr(f"{name}.npy", content)
    return path


def test_a_large_npz_is_described_without_being_decompressed(tmp_path: Path) -> None:
    path = video.save(np.zeros((2000, 64, 64, 3), np.uint8), tmp_path / "zeros.npz", fps=8, parameters=PARAMETERS)
    with bounded():
        found = clip_info.inspect(path)
    assert found.media | {"bytes": 0} == {"format": "npz", "bytes": 0, "frames": 2000, "width": 64, "height": 64, "fps": 8.0}
    assert found.parameters == PARAMETERS
    np.savez(tmp_path / "other.npz", a=np.zeros((3, 4), np.float32), b=np.zeros(0))
    assert clip_info.inspect(tmp_path / "other.npz").media["arrays"] == {"a": "float32[3, 4]", "b": "float64[0]"}


def test_npz_files_that_lie_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "clip.npz"
    frames = npy((10, 8, 8, 3), "|u1")
    npz(path, frames=frames, fps=npy((10**12,), "<f8"))
    assert refusal(path) == "PATH is not a readable npz file: its fps.npy has 8000000000000 bytes; expected at most 4194304"
    npz(path, parameters=npy((), "<U500000000"))
    assert "its parameters.npy has 2000000000 bytes" in refusal(path)
    npz(path, frames=npy((10, 8), "|u1"), fps=npy((), "<f8", bytes(8)))
    assert "its frames have the shape [10, 8]; expected [frames, height, width, 3]" in refusal(path)
    npz(path, frames=npy((1,), "|O"), fps=npy((), "|O", bytes(8)))
    assert "is not a readable npz file" in refusal(path)
    npz(path, a=np.lib.format.magic(2, 0) + struct.pack("<I", 2**32 - 1) + b"{" * (1 << 24))
    assert "is not a readable npz file" in refusal(path)
    npz(path, **{f"a{i}": frames for i in range(1001)})
    assert "it has 1001 arrays; expected at most 1000" in refusal(path)
    npz(path, **{f"{'a' * 500}{i}": b"" for i in range(2000)})
    assert "its list of arrays has more than 1048576 bytes" in refusal(path)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr("a.npy", frames)
    assert "its a.npy is compressed in a way that numpy does not use" in refusal(path)
    npz(path, frames=frames)
    assert "is not a readable npz file: 'fps'" in refusal(path)


def test_a_gif_is_walked_through_and_its_frames_are_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "long.gif"
    header = b"GIF89a" + struct.pack("<HHBBB", 1, 1, 0x80, 0, 0) + bytes(6)
    path.write_bytes(header + GIF_FRAME * 500 + b";")
    with bounded():
        assert clip_info.inspect(path).media | {"bytes": 0} == {
            "format": "gif",
            "bytes": 0,
            "frames": 500,
            "width": 1,
            "height": 1,
            "duration_s": 10.0,
        }
    path.write_bytes(header + GIF_FRAME * 500)
    assert refusal(path) == "PATH is not a readable gif file: it is cut short"
    path.write_bytes(header + b";")
    assert refusal(path).endswith("it holds no frames")
    monkeypatch.setattr(clip_info, "MAX_COMMENT_BYTES", 1 << 16)
    path.write_bytes(header + b"!\xfe" + (b"\xff" + b"a" * 255) * 2_000 + b"\0" + GIF_FRAME + b";")
    assert len(clip_info.inspect(path).parameters["comment"]) == 1 << 16
    monkeypatch.setattr(clip_info, "MAX_FRAMES", 5)
    path.write_bytes(header + GIF_FRAME * 400_000)  # 10 MB, of which nobody reads more than the first frames
    assert refusal(path).endswith("it has more than 5 frames")


def test_a_picture_is_described_by_its_header(tmp_path: Path) -> None:
    path = tmp_path / "large.png"
    path.write_bytes(png_header(10_000, 10_000, b"damaged"))
    with bounded():
        assert clip_info.inspect(path).media["width"] == 10_000
    path.write_bytes(png_header(100_000, 100_000))
    assert refusal(path).endswith("pixels a frame; make it smaller")
    folder = tmp_path / "frames"
    folder.mkdir()
    os.mkfifo(folder / "0000.png")
    assert refusal(folder).endswith("the folder has no PNG frames")


@pytest.mark.parametrize("share", [0.2, 0.5, 0.95, 0.999])
def test_a_video_that_is_cut_is_not_described_as_whole(tmp_path: Path, share: float) -> None:
    path = video.save(FRAMES, tmp_path / "clip.mp4", fps=24)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    assert "is not a readable mp4 file: it is cut short: " in refusal(path)


def test_a_video_of_many_boxes_or_of_fragments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = video.save(FRAMES, tmp_path / "clip.mp4", fps=24)
    content = path.read_bytes()
    path.write_bytes(content + struct.pack(">I4s", 8, b"free") * 200_000)
    with bounded():
        assert clip_info.inspect(path).media["frames"] == 10
    fragments = {"movflags": "frag_keyframe+empty_moov"}
    with av.open(str(path), "w", format="mp4", options=fragments) as container:
        stream = container.add_stream("libx264", rate=24)
        stream.width = stream.height = 32
        stream.pix_fmt = "yuv420p"
        for frame in FRAMES:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    assert clip_info.inspect(path).media["frames"] == 10
    monkeypatch.setattr(clip_info, "MAX_FRAMES", 9)
    assert refusal(path).endswith("it has more than 9 frames")


@pytest.mark.parametrize("name", ["pipe.mp4", "pipe.gif", "pipe.png", "pipe.npz", "pipe"])
def test_a_pipe_is_refused_at_once(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / name)
    assert "no regular file" in refusal(tmp_path / name) or "is no folder" in refusal(tmp_path / name)


def test_a_huge_note_beside_a_clip_is_refused_and_a_deep_one_shown(tmp_path: Path) -> None:
    path = video.save(FRAMES[:1], tmp_path / "a.png", fps=1)
    note = video.sidecar(path)
    path.write_bytes(png_header(4, 4))
    note.write_text("[" * 100_000)
    assert clip_info.inspect(path).parameters == {"comment": "[" * 100_000}
    note.write_bytes(b" " * (clip_info.MAX_COMMENT_BYTES + 1))
    assert refusal(path) == "PATH.json has 4194305 bytes; expected parameters of at most 4194304."
    note.unlink()
    os.mkfifo(note)
    assert clip_info.inspect(path).parameters == {}


def test_a_folder_named_like_a_clip_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").mkdir()
    assert refusal(tmp_path / "a.mp4") == "PATH is a folder; expected a mp4 file."


def test_what_was_written_before_is_described_as_before(tmp_path: Path) -> None:
    for name in ("clip.mp4", "clip.gif", "clip.npz", "clip"):
        path = video.save(FRAMES, tmp_path / name, fps=24, parameters=PARAMETERS)
        moved = shutil.move(path, tmp_path / f"moved{path.suffix}")
        found = clip_info.inspect(moved)
        assert found.parameters == PARAMETERS
        assert json.loads(json.dumps(found.media)) == found.media
        assert (found.media["frames"], found.media["width"], found.media["height"]) == (10, 32, 32)
        if path.suffix in (".mp4", ".gif"):
            assert found.media["duration_s"] == pytest.approx(10 / 24, abs=0.005)
