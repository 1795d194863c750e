"""Frames to files and back: H.264, GIF, PNG and npz, each carrying the parameters that generated it.

Invariant: what is written is exactly ``frames`` at exactly ``fps`` (GIF: to its clock of 1/100 s), with the generation
parameters as JSON inside the file and beside it (``circle.mp4`` and ``circle.mp4.json``).  No jax here, and no decoding
of references: sora_jax.inputs.references reads those.
"""

import dataclasses
import itertools
import json
import math
import os
import re
import zipfile
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

from sora_jax import files

FORMATS = ("mp4", "gif", "png", "npz")
_PARAMETERS = "parameters"  # PNG text key and npz field; mp4 and GIF have one comment
_BT709 = 1  # ISO/IEC 23091-2 code of colour primaries, transfer function and matrix
# The macroblock tree reads memory that nothing has written at sides below about 100, so equal frames gave unequal files.
_X264 = {"crf": "16", "preset": "medium", "mbtree": "0"}


def quantise(video: Float[np.ndarray, "*axes"]) -> UInt8[np.ndarray, "*axes"]:
    """Returns pixels 0..255 for values in [-1, 1]; values outside are clamped, halves round up.

    Source: Open-Sora v1.2 datasets/utils.py save_sample.

    Raises:
      ValueError: the video holds NaN or infinity.
    """
    video = np.asarray(video, np.float32)
    if not np.isfinite(video).all():
        share = 1 - np.isfinite(video).mean()
        raise ValueError(f"{share:.1%} of the decoded values are NaN or infinite; no picture can be written from them.")
    unit = (np.clip(video, -1.0, 1.0) + np.float32(1.0)) / np.float32(2.0)
    return np.clip(unit * np.float32(255.0) + np.float32(0.5), 0.0, 255.0).astype(np.uint8)


def save(
    frames: UInt8[np.ndarray, "t h w 3"],
    path: str | os.PathLike[str],
    *,
    fps: int | float,
    parameters: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> Path:
    """Writes one clip and its parameters, and returns the path.

    The suffix decides the format: ``.mp4`` (H.264, yuv420p, BT.709, faststart), ``.gif``, ``.npz`` (``frames``, ``fps``,
    ``parameters``), ``.png`` for one frame; a path without suffix becomes a folder of PNG frames.  The parameters are
    stored in the file and, as ``<path>.json``, beside it.

    Raises:
      ValueError: unknown suffix, or frames that the format cannot hold.
      FileExistsError: the file or its JSON exists and ``overwrite`` is False.
      OSError: the file cannot be written (no permission, disk full); nothing half-written stays behind.
    """
    path = Path(path)
    kind = check_target(path, len(frames), overwrite=overwrite)
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or 0 in frames.shape:
        raise ValueError(f"frames are {frames.dtype}{list(frames.shape)}; expected uint8[t, h, w, 3] with t, h, w >= 1.")
    if not 0 < fps < math.inf:
        raise ValueError(f"fps is {fps}; expected a positive number of frames per second.")
    text = json.dumps(dict(parameters or {}), default=str)
    beside = json.dumps(json.loads(text), indent=2, ensure_ascii=False) + "\n"
    try:
        with files.whole_file(path, overwrite=overwrite) as clip, files.whole_file(sidecar(path), overwrite=overwrite) as note:
            _WRITERS[kind](clip, frames, Fraction(fps).limit_denominator(1001), text)
            note.write_text(beside, encoding="utf-8")
    except FileExistsError:
        raise
    except OSError as error:
        raise OSError(error.errno, f"cannot write {path}: {error.strerror or error}") from error
    return path


def check_target(path: Path, num_frames: int, *, overwrite: bool) -> str:
    """Returns the format of ``path`` (see `clip_format`), having seen that a clip may be written there.

    Raises:
      ValueError: the suffix does not fit, or the name is not UTF-8.
      FileExistsError: the file or its JSON exists and ``overwrite`` is False.
      IsADirectoryError: ``overwrite`` would remove a folder that holds anything but numbered PNG frames.
    """
    if not path.name:
        raise IsADirectoryError(f"{path} is a folder; name a file in it.")
    files.check_name(path)
    kind = clip_format(path, num_frames)
    if not overwrite:
        files.refuse_existing(path, sidecar(path))
    elif path.is_dir():
        others = [entry.name for entry in path.iterdir() if not re.fullmatch(r"\d{4,}\.png", entry.name)]
        if others or kind != "frames":
            held = f" (it holds {others[0]})" if others else ""
            raise IsADirectoryError(f"{path} is a folder, not a clip of PNG frames{held}; choose another name.")
    return kind


def sidecar(path: Path) -> Path:
    """Returns the path of the JSON beside a clip."""
    return path.with_name(path.name + ".json")


def clip_format(path: Path, num_frames: int) -> str:
    """Returns the format that ``path`` asks for: ``mp4``, ``gif``, ``npz``, ``png`` or ``frames`` (a folder of PNGs).

    Raises:
      ValueError: the suffix is unknown, or names a single picture for several frames.
    """
    kind = path.suffix.lower().removeprefix(".")
    if not kind:
        return "frames"
    if kind not in FORMATS:
        raise ValueError(f"{path}: unknown suffix .{kind}; expected .mp4, .gif, .png, .npz, or none for a folder of PNGs.")
    if kind == "png" and num_frames != 1:
        raise ValueError(f"{path}: {num_frames} frames do not fit one PNG; use {path.with_suffix('')} for a folder, or .mp4.")
    return kind


def _write_mp4(path: Path, frames: np.ndarray, fps: Fraction, text: str) -> None:
    import av
    from av.video.reformatter import ColorRange, Colorspace

    height, width = frames.shape[1:3]
    if height % 2 or width % 2:
        raise ValueError(f"frames of {height}x{width} do not fit H.264 yuv420p, which needs even sides; use .gif, .npz or PNG.")
    try:
        with av.open(str(path), "w", format="mp4", options={"movflags": "+faststart"}) as container:
            container.metadata["comment"] = text
            stream = container.add_stream("libx264", rate=fps, options=_X264)
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            context = stream.codec_context
            context.color_primaries = context.color_trc = context.colorspace = _BT709
            context.color_range = ColorRange.MPEG
            for frame in frames:
                picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
                picture = picture.reformat(format="yuv420p", dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG)
                container.mux(stream.encode(picture))
            container.mux(stream.encode())
    except av.FFmpegError as error:
        raise OSError(error.errno, error.strerror) from error


def _write_gif(path: Path, frames: np.ndarray, fps: Fraction, text: str) -> None:
    from PIL import Image

    pictures = [Image.fromarray(frame).quantize(256, dither=Image.Dither.NONE) for frame in frames]
    pictures[0].save(
        path,
        format="GIF",
        save_all=True,
        append_images=pictures[1:],
        duration=[10 * ticks for ticks in gif_delays(len(frames), fps)],
        loop=0,
        comment=text.encode(),
    )


def gif_delays(num_frames: int, fps: Fraction) -> list[int]:
    """Returns each frame's delay in 1/100 s: frame i ends at round(100 (i + 1) / fps), so that errors do not add up."""
    ends = [round(100 * i / fps) for i in range(num_frames + 1)]
    return [end - start for start, end in itertools.pairwise(ends)]


def _write_png(path: Path, frames: np.ndarray, fps: Fraction, text: str) -> None:
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_text(_PARAMETERS, text)
    Image.fromarray(frames[0]).save(path, format="PNG", pnginfo=info)


def _write_frames(path: Path, frames: np.ndarray, fps: Fraction, text: str) -> None:
    path.mkdir()
    for i, frame in enumerate(frames):
        _write_png(path / f"{i:04d}.png", frame[None], fps, text)


def _write_npz(path: Path, frames: np.ndarray, fps: Fraction, text: str) -> None:
    with path.open("wb") as file:
        np.savez_compressed(file, frames=frames, fps=np.float64(fps), parameters=text)


_WRITERS = {"mp4": _write_mp4, "gif": _write_gif, "png": _write_png, "frames": _write_frames, "npz": _write_npz}


@dataclasses.dataclass(frozen=True)
class ClipInfo:
    """What a file says about itself: ``media`` (format, frames, size, fps ...) and the generation ``parameters``."""

    media: dict[str, Any]
    parameters: dict[str, Any]


def inspect(path: str | os.PathLike[str]) -> ClipInfo:
    """Returns what a written clip contains; if the file lost its parameters, those of the JSON beside it.

    Raises:
      FileNotFoundError: no such file.
      ValueError: the file is not a readable clip.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist.")
    kind = clip_format(path, 1)
    if kind == "frames" and not path.is_dir():
        raise ValueError(f"{path} has no suffix and is no folder; expected .mp4, .gif, .png, .npz or a folder of PNG frames.")
    try:
        media, text = _READERS[kind](path)
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is not a readable {kind} file: {error}") from error
    if not text and sidecar(path).exists():
        text = sidecar(path).read_text(encoding="utf-8")
    return ClipInfo({"format": kind, "bytes": _size_bytes(path), **media}, _parse(text))


def _parse(text: str) -> dict[str, Any]:
    """Returns the parameters in a comment; a comment of another program is shown as it is."""
    try:
        parsed = json.loads(text or "{}")
    except (ValueError, RecursionError):
        parsed = text
    return parsed if isinstance(parsed, dict) else {"comment": parsed}


def _size_bytes(path: Path) -> int:
    return sum(file.stat().st_size for file in path.iterdir()) if path.is_dir() else path.stat().st_size


def _inspect_mp4(path: Path) -> tuple[dict[str, Any], str]:
    import av

    with av.open(str(path)) as container:
        if not container.streams.video:
            raise ValueError("it has no video stream")
        stream = container.streams.video[0]
        num_frames = stream.frames or sum(1 for _ in container.decode(stream))
        media = {
            "codec": stream.codec_context.name,
            "pixel_format": stream.codec_context.pix_fmt,
            "frames": num_frames,
            "width": stream.codec_context.width,
            "height": stream.codec_context.height,
            "fps": float(stream.average_rate or 0),
            "duration_s": float(num_frames / stream.average_rate) if stream.average_rate else 0.0,
        }
        return media, container.metadata.get("comment", "")


def _inspect_gif(path: Path) -> tuple[dict[str, Any], str]:
    from PIL import Image

    with Image.open(path) as picture:
        comment = picture.info.get("comment", b"")
        num_frames = getattr(picture, "n_frames", 1)
        duration_s = 0.0
        for i in range(num_frames):
            picture.seek(i)
            duration_s += picture.info.get("duration", 0) / 1000
        media = {"frames": num_frames, "width": picture.width, "height": picture.height, "duration_s": round(duration_s, 3)}
        return media, comment.decode(errors="replace") if isinstance(comment, bytes) else comment


def _inspect_png(path: Path) -> tuple[dict[str, Any], str]:
    from PIL import Image

    with Image.open(path) as picture:
        text = picture.text.get(_PARAMETERS, "") if picture.format == "PNG" else ""  # type: ignore[attr-defined]
        return {"frames": 1, "width": picture.width, "height": picture.height}, text


def _inspect_frames(path: Path) -> tuple[dict[str, Any], str]:
    pictures = sorted(path.glob("*.png"))
    if not pictures:
        raise ValueError("the folder has no PNG frames")
    media, text = _inspect_png(pictures[0])
    return {**media, "frames": len(pictures)}, text


def _inspect_npz(path: Path) -> tuple[dict[str, Any], str]:
    if not zipfile.is_zipfile(path):
        raise ValueError("it is no zip archive, or cut short")
    with np.load(path, allow_pickle=False) as arrays:
        shapes = {name: f"{arrays[name].dtype}{list(arrays[name].shape)}" for name in arrays if name != _PARAMETERS}
        media: dict[str, Any] = {"arrays": shapes}
        if "frames" in arrays:
            num_frames, height, width = arrays["frames"].shape[:3]
            media = {"frames": num_frames, "width": width, "height": height, "fps": float(arrays["fps"])}
        return media, str(arrays[_PARAMETERS]) if _PARAMETERS in arrays else ""


_READERS = {"mp4": _inspect_mp4, "gif": _inspect_gif, "png": _inspect_png, "frames": _inspect_frames, "npz": _inspect_npz}
