"""What a clip's file says about itself: format, size, frames, rate, and the parameters that generated it.

Invariant: headers are read and no frame is decoded, so that memory and time depend on neither the number nor the size of the
frames; what has no end, and what says more than the limits below, is refused.  Nothing here writes, and nothing is printed.
"""

import dataclasses
import io
import json
import math
import os
import struct
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from sora_jax.inputs import media
from sora_jax.pipeline.video import PARAMETERS, clip_format, sidecar

MAX_FRAMES = 100_000
MAX_ARRAYS = 1_000
MAX_COMMENT_BYTES = 4 << 20  # of parameters or another comment
_MAX_BOXES = 10_000  # of an MP4 file, looked at to see whether it is whole
_MAX_HEADER_BYTES = 1 << 16  # of one array in an npz file
_MAX_LIST_BYTES = 1 << 20  # of the list at the end of a zip archive
_ZIP_END_BYTES = 22 + 0xFFFF  # of a zip archive's end record with the longest comment


@dataclasses.dataclass(frozen=True)
class ClipInfo:
    """What a file says about itself: ``media`` (format, frames, size, fps ...) and the generation ``parameters``."""

    media: dict[str, Any]
    parameters: dict[str, Any]


def inspect(path: str | os.PathLike[str]) -> ClipInfo:
    """Returns what a written clip contains; if the file lost its parameters, those of the JSON next to it.

    Raises:
      FileNotFoundError: no such file.
      ValueError: the file is not a readable clip, or lies beyond a limit; the message says which.
      OSError: the system cannot read it.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist.")
    kind = clip_format(path, 1)
    if kind == "frames" and not path.is_dir():
        raise ValueError(f"{path} has no suffix and is no folder; expected .mp4, .gif, .png, .npz or a folder of PNG frames.")
    if kind != "frames" and not path.is_file():
        raise ValueError(f"{path} is {'a folder' if path.is_dir() else 'no regular file'}; expected a {kind} file.")
    try:
        fields, text = _READERS[kind](path)
    except (ValueError, KeyError, EOFError, struct.error, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path} is not a readable {kind} file: {error}") from error
    if not text and sidecar(path).is_file():
        text = _short_text(sidecar(path))
    return ClipInfo({"format": kind, "bytes": _size_bytes(path), **fields}, _parse(text))


def _parse(text: str) -> dict[str, Any]:
    """Returns the parameters in a comment; a comment of another program is shown as it is."""
    try:
        parsed = json.loads(text or "{}")
    except (ValueError, RecursionError):
        parsed = text
    return parsed if isinstance(parsed, dict) else {"comment": parsed}


def _short_text(path: Path) -> str:
    if path.stat().st_size > MAX_COMMENT_BYTES:
        raise ValueError(f"{path} has {path.stat().st_size} bytes; expected parameters of at most {MAX_COMMENT_BYTES}.")
    return path.read_text("utf-8", "replace")


def _size_bytes(path: Path) -> int:
    return sum(file.lstat().st_size for file in path.iterdir()) if path.is_dir() else path.stat().st_size


def _inspect_mp4(path: Path) -> tuple[dict[str, Any], str]:
    _refuse_cut_boxes(path)
    with media.opened_video(path) as (container, stream):
        num_frames = stream.frames or _count_packets(container, stream)
        rate = stream.average_rate
        fields = {
            "codec": stream.codec_context.name,
            "pixel_format": stream.codec_context.pix_fmt,
            "frames": num_frames,
            "width": stream.width,
            "height": stream.height,
            "fps": float(rate or 0),
            "duration_s": float(num_frames / rate) if rate else 0.0,
        }
        return fields, container.metadata.get("comment", "")


def _refuse_cut_boxes(path: Path) -> None:
    """Refuses an MP4 file whose boxes reach beyond its end: its header still says what the whole file held.

    Source: ISO/IEC 14496-12 section 4.2.
    """
    size, place = path.stat().st_size, 0
    with path.open("rb") as file:
        for _ in range(_MAX_BOXES):
            if place >= size:
                break
            file.seek(place)
            header = file.read(16)
            length, kind = struct.unpack_from(">I4s", header.ljust(8, b"\0"))
            if length == 1:
                length = struct.unpack_from(">Q", header.ljust(16, b"\0"), 8)[0]
            if not kind.isalnum() or length == 0:  # not our business; or to the end of the file
                return
            place += max(length, 8)
    if place > size:
        raise ValueError(f"it is cut short: {size} bytes of {place}")


def _count_packets(container: Any, stream: Any) -> int:
    """Returns the number of frames where the header does not tell it, without decoding them."""
    num_frames = 0
    for packet in container.demux(stream):
        num_frames += packet.size > 0
        _refuse_many(num_frames)
    return num_frames


def _refuse_many(num_frames: int) -> None:
    if num_frames > MAX_FRAMES:
        raise ValueError(f"it has more than {MAX_FRAMES} frames")


def _inspect_gif(path: Path) -> tuple[dict[str, Any], str]:
    with path.open("rb") as file:
        if _exactly(file, 6) not in (b"GIF87a", b"GIF89a"):
            raise ValueError("it does not begin with GIF87a or GIF89a")
        width, height, flags = struct.unpack("<HHB2x", _exactly(file, 7))
        _skip_palette(file, flags)
        comment, num_frames, ticks = b"", 0, 0
        for block, content in _gif_blocks(file):
            if block == "comment" and not comment:
                comment = content
            elif block == "delay":
                ticks += struct.unpack("<xHx", content[:4])[0]
            elif block == "frame":
                num_frames += 1
                _refuse_many(num_frames)
    if not num_frames:
        raise ValueError("it holds no frames")
    return {"frames": num_frames, "width": width, "height": height, "duration_s": ticks / 100}, comment.decode(errors="replace")


def _gif_blocks(file: BinaryIO) -> Iterator[tuple[str, bytes]]:
    """Yields comments, delays and frames of a GIF behind its header, without the data of the frames.

    Source: CompuServe, Graphics Interchange Format 89a, sections 20 to 27.
    """
    while (introducer := _exactly(file, 1)) != b";":
        if introducer == b",":
            _skip_palette(file, _exactly(file, 9)[8])
            _exactly(file, 1)  # size of the codes
            _sub_blocks(file, keep=0)
            yield "frame", b""
        elif introducer == b"!":
            label = _exactly(file, 1)
            content = _sub_blocks(file, keep=MAX_COMMENT_BYTES)
            if label in (b"\xfe", b"\xf9"):
                yield ("comment" if label == b"\xfe" else "delay"), content
        else:
            raise ValueError("it is damaged")


def _sub_blocks(file: BinaryIO, *, keep: int) -> bytes:
    """Returns the first bytes of a chain of sub-blocks, ``keep`` at most, and stands behind the chain."""
    kept = bytearray()
    while length := _exactly(file, 1)[0]:
        if len(kept) < keep:
            kept += _exactly(file, length)
        else:
            file.seek(length, os.SEEK_CUR)
    return bytes(kept[:keep])


def _skip_palette(file: BinaryIO, flags: int) -> None:
    if flags & 0x80:
        _exactly(file, 3 << (flags & 7) + 1)


def _exactly(file: BinaryIO, size: int) -> bytes:
    content = file.read(size)
    if len(content) < size:
        raise ValueError("it is cut short")
    return content


def _inspect_png(path: Path) -> tuple[dict[str, Any], str]:
    with media.opened_image(path, ("PNG",)) as picture:
        return {"frames": 1, "width": picture.width, "height": picture.height}, str(picture.info.get(PARAMETERS, ""))


def _inspect_frames(path: Path) -> tuple[dict[str, Any], str]:
    pictures = sorted(picture for picture in path.glob("*.png") if picture.is_file())
    if not pictures:
        raise ValueError("the folder has no PNG frames")
    fields, text = _inspect_png(pictures[0])
    return {**fields, "frames": len(pictures)}, text


def _inspect_npz(path: Path) -> tuple[dict[str, Any], str]:
    if not zipfile.is_zipfile(path):
        raise ValueError("it is no zip archive, or cut short")
    _refuse_many_entries(path)
    with zipfile.ZipFile(path) as archive:
        arrays = {name.removesuffix(".npy"): name for name in archive.namelist()}
        if len(arrays) > MAX_ARRAYS:
            raise ValueError(f"it has {len(arrays)} arrays; expected at most {MAX_ARRAYS}")
        shapes = {array: _array_header(archive, name) for array, name in arrays.items() if array != PARAMETERS}
        fields: dict[str, Any] = {"arrays": {array: f"{dtype}{list(shape)}" for array, (shape, dtype) in shapes.items()}}
        if "frames" in shapes:
            shape, _ = shapes["frames"]
            if len(shape) != 4:
                raise ValueError(f"its frames have the shape {list(shape)}; expected [frames, height, width, 3]")
            fps = float(_small_array(archive, arrays["fps"]).item())
            fields = {"frames": shape[0], "width": shape[2], "height": shape[1], "fps": fps}
        return fields, str(_small_array(archive, arrays[PARAMETERS])) if PARAMETERS in arrays else ""


def _refuse_many_entries(path: Path) -> None:
    """Refuses an archive by the size of its list of entries, which zipfile would read as a whole."""
    with path.open("rb") as file:
        file.seek(-min(path.stat().st_size, _ZIP_END_BYTES), os.SEEK_END)
        content = file.read()
    end = content.rfind(b"PK\5\6")
    if end >= 0 and struct.unpack_from("<I", content.ljust(end + 16, b"\0"), end + 12)[0] > _MAX_LIST_BYTES:
        raise ValueError(f"its list of arrays has more than {_MAX_LIST_BYTES} bytes")


def _array_header(archive: zipfile.ZipFile, name: str) -> tuple[tuple[int, ...], np.dtype]:
    """Returns shape and dtype of an array in an npz file; only its first bytes are decompressed."""
    return _read_array_header(io.BytesIO(_member(archive, name, _MAX_HEADER_BYTES)))


def _small_array(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    content = io.BytesIO(_member(archive, name, MAX_COMMENT_BYTES))
    shape, dtype = _read_array_header(content)
    if math.prod(shape) * dtype.itemsize > MAX_COMMENT_BYTES:
        raise ValueError(f"its {name} has {math.prod(shape) * dtype.itemsize} bytes; expected at most {MAX_COMMENT_BYTES}")
    content.seek(0)
    return np.lib.format.read_array(content, allow_pickle=False)


def _member(archive: zipfile.ZipFile, name: str, size: int) -> bytes:
    """Returns the first bytes of an entry."""
    if archive.getinfo(name).compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(f"its {name} is compressed in a way that numpy does not use")
    with archive.open(name) as member:
        return member.read(size)


def _read_array_header(content: io.BytesIO) -> tuple[tuple[int, ...], np.dtype]:
    version = np.lib.format.read_magic(content)
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in readers:
        raise ValueError(f"an array has the npy version {version}; expected 1.0 or 2.0")
    shape, _, dtype = readers[version](content)
    return shape, dtype


_READERS = {"mp4": _inspect_mp4, "gif": _inspect_gif, "png": _inspect_png, "frames": _inspect_frames, "npz": _inspect_npz}
