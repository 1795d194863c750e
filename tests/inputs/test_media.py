"""Pictures and videos that lie, are damaged, or are enormous: refused by their headers, in bounded memory and time."""

import errno
import os
import struct
import tracemalloc
import zlib
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from sora_jax.inputs import media, references
from sora_jax.pipeline import video


def png_header(width: int, height: int, data: bytes = b"") -> bytes:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", data) + chunk(b"IEND", b"")


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    frames = np.random.default_rng(0).integers(0, 256, (10, 64, 64, 3), np.uint8)
    return video.save(frames, tmp_path / "clip.mp4", fps=24)


def message(path: Path | str) -> str:
    with pytest.raises(ValueError) as caught:  # noqa: PT011  # the callers compare the whole text
        references.read_reference(path, 16, 16)
    assert "\n" not in str(caught.value)
    return str(caught.value).replace(f"Reference {path} ", "Reference PATH ")


@pytest.mark.parametrize(("width", "height"), [(20_000, 20_000), (12_000, 12_000), (2**31 - 1, 2**31 - 1)])
def test_a_picture_beyond_the_limit_is_refused_by_its_header(tmp_path: Path, width: int, height: int) -> None:
    path = tmp_path / "bomb.png"
    path.write_bytes(png_header(width, height, zlib.compress(bytes(1 << 20))))
    tracemalloc.start()
    text = message(path)
    assert tracemalloc.get_traced_memory()[1] < 1 << 22
    tracemalloc.stop()
    assert text.startswith("Reference PATH is not a readable image: it has ")
    assert f"{media.MAX_PIXELS}" in text
    assert text.endswith("make it smaller.")


def test_damaged_videos_get_plain_words(clip: Path, tmp_path: Path) -> None:
    content = clip.read_bytes()
    broken = tmp_path / "broken.mp4"
    for damaged in (content[: len(content) // 2], b"no video" * 100, b"", bytes(1000), content[:900] + b"\xff" * 9000):
        broken.write_bytes(damaged)
        assert message(broken) in (
            "Reference PATH is not a readable video: it is damaged, cut short, or no video.",
            "Reference PATH is not a readable video: it has no video stream.",
        )


def test_a_list_of_files_in_a_video_is_not_followed(clip: Path, tmp_path: Path) -> None:
    """FFmpeg would take these for a playlist, by their content."""
    playlist = tmp_path / "list.mp4"
    for content in (f"#EXTM3U\n#EXTINF:1,\nfile:{clip}\n#EXT-X-ENDLIST\n", f"ffconcat version 1.0\nfile '{clip.name}'\n"):
        playlist.write_text(content)
        with av.open(f"concat:{clip}"):  # protocols are there
            pass
        assert message(playlist) == "Reference PATH is not a readable video: it is damaged, cut short, or no video."
    named = tmp_path / "concat:clip.mp4"  # a name that is a protocol and a file
    named.write_bytes(clip.read_bytes())
    assert references.read_reference(named, 16, 16).shape == (10, 16, 16, 3)


def test_more_frames_than_are_read_are_refused_and_the_limit_is_said(clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(references, "MAX_VIDEO_PIXELS", 10 * 16 * 16)
    assert references.read_reference(clip, 16, 16).shape == (10, 16, 16, 3)
    monkeypatch.setattr(references, "MAX_VIDEO_PIXELS", 9 * 16 * 16)
    assert message(clip) == "Reference PATH has more than 9 frames of 16 x 16, which is all that is read; cut it."
    monkeypatch.setattr(references, "MAX_VIDEO_FRAMES", 9)
    with pytest.raises(ValueError, match="has more than 9 frames, which is all that is read; cut it"):
        references.count_frames(clip)
    monkeypatch.setattr(media, "MAX_PIXELS", 64 * 64 - 1)
    assert message(clip).endswith("it has 64 x 64 pixels a frame; expected at most 4095: make it smaller.")


def test_frames_are_counted_as_they_are_read(clip: Path, tmp_path: Path) -> None:
    Image.new("RGB", (5, 4)).save(tmp_path / "a.png")
    assert (references.count_frames(clip), references.count_frames(tmp_path / "a.png")) == (10, 1)
    (tmp_path / "a.png").write_bytes((tmp_path / "a.png").read_bytes()[:-30])
    with pytest.raises(ValueError, match=r"a\.png is not a readable image: it is damaged, cut short"):
        references.count_frames(tmp_path / "a.png")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("", "a reference path is empty; expected paths with one ';' between them, and none at the end."),
        ("http://a.com/b.mp4", "Reference PATH is an address on the network; download it and give the path of the file."),
        ("clip.gif", "Reference PATH has suffix '.gif'; expected one of .jpg .jpeg .png"),
        ("clip.npz", "Reference PATH has suffix '.npz'; expected one of .jpg .jpeg .png"),
        (
            "postscript.png",
            "Reference PATH is not a readable image: it is damaged, cut short, or no picture of the kind BMP, GIF",
        ),
    ],
)
def test_what_cannot_be_a_reference_says_what_can(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, expected: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for other in ("clip.gif", "clip.npz"):
        Path(other).touch()
    Path("postscript.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n")
    assert message(name).startswith(expected)


def test_what_the_system_says_is_passed_on(clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "pipe.mp4")
    with pytest.raises(FileNotFoundError, match=r"Reference .*pipe\.mp4 is no regular file"):
        references.read_reference(tmp_path / "pipe.mp4", 16, 16)

    def failing(*_: object, **__: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(media.Image, "open", failing)
    monkeypatch.setattr(media.av, "open", failing)
    for name in ("clip.mp4", "a.png"):
        (tmp_path / name).touch()
        with pytest.raises(OSError, match="Input/output error") as caught:
            references.read_reference(tmp_path / name, 16, 16)
        assert (caught.value.errno, caught.value.filename) == (errno.EIO, str(tmp_path / name))
