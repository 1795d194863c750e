"""Frames to files: H.264, GIF, PNG and npz, each carrying the parameters that generated it.

Invariant: what is written is exactly ``frames`` at exactly ``fps`` (GIF: to its clock of 1/100 s), with the generation
parameters as JSON inside the file and next to it (``circle.mp4`` and ``circle.mp4.json``).  The JSON is published first and
the clip last: a clip that is there is complete, and a JSON without its clip is what an interrupted run left.  No jax here;
`clip_info` reads what is written here.
"""

import itertools
import json
import math
import os
import re
from collections.abc import Callable, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

from sora_jax import files

FORMATS = ("mp4", "gif", "png", "npz")
PARAMETERS = "parameters"  # PNG text key and npz field; mp4 and GIF have one comment
_MAX_JSON_BYTES = 1 << 20  # of parameters: a prompt has at most 20,000 characters
_VALUES_AT_A_TIME = 1 << 22  # that become pixels, so that a long clip is not in memory several times
_BT709 = 1  # ISO/IEC 23091-2 code of colour primaries, transfer function and matrix
# The macroblock tree reads memory that nothing has written at sides below about 100, so equal frames gave unequal files.
_X264 = {"crf": "16", "preset": "medium", "mbtree": "0"}


def quantise(video: Float[np.ndarray, "*axes"]) -> UInt8[np.ndarray, "*axes"]:
    """Returns pixels 0..255 for values in [-1, 1]; values outside are clamped, halves round up.

    Source: Open-Sora v1.2 datasets/utils.py save_sample.

    Raises:
      ValueError: the video holds NaN or infinity.
    """
    values = np.ascontiguousarray(video, np.float32).reshape(-1)
    pixels = np.empty(values.shape, np.uint8)
    for start in range(0, len(values), _VALUES_AT_A_TIME):
        part = values[start : start + _VALUES_AT_A_TIME]
        if not np.isfinite(part).all():
            share = 1 - np.isfinite(values).mean()
            raise ValueError(f"{share:.1%} of the decoded values are NaN or infinite; no picture can be written from them.")
        unit = (np.clip(part, -1.0, 1.0) + np.float32(1.0)) / np.float32(2.0)
        pixels[start : start + _VALUES_AT_A_TIME] = np.clip(unit * np.float32(255.0) + np.float32(0.5), 0.0, 255.0)
    return pixels.reshape(np.shape(video))


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
    stored in the file and, as ``<path>.json``, next to it.

    Raises:
      ValueError: unknown suffix, or frames that the format cannot hold.
      FileExistsError: the file or its JSON exists and ``overwrite`` is False; not a JSON that an interrupted run left.
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
        _publish(
            path, beside, lambda clip: _WRITERS[kind](clip, frames, Fraction(fps).limit_denominator(1001), text), overwrite
        )
    except FileExistsError:
        raise
    except OSError as error:
        raise OSError(error.errno, f"cannot write {path}: {error.strerror or error}") from error
    return path


def check_target(path: Path, num_frames: int, *, overwrite: bool) -> str:
    """Returns the format of ``path`` (see `clip_format`), after checking that a clip can be written there.

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
        files.refuse_existing(path)
        if not _is_left_over(path):
            files.refuse_existing(sidecar(path))
    elif path.is_dir():
        others = [entry.name for entry in path.iterdir() if not re.fullmatch(r"\d{4,}\.png", entry.name)]
        if others or kind != "frames":
            held = f" (it holds {others[0]})" if others else ""
            raise IsADirectoryError(f"{path} is a folder, not a clip of PNG frames{held}; choose another name.")
    return kind


def sidecar(path: Path) -> Path:
    """Returns the path of the JSON that goes with a clip."""
    return path.with_name(path.name + ".json")


def _publish(path: Path, beside: str, write: Callable[[Path], None], overwrite: bool) -> None:
    """Publishes the JSON and then the clip that ``write`` writes; a clip that cannot be published takes its JSON along."""
    replaces = overwrite or _is_left_over(path)
    noted = False
    try:
        with files.whole_file(path, overwrite=overwrite) as clip:
            write(clip)
            files.write_text(sidecar(path), beside, overwrite=replaces)
            noted = True
    except BaseException:
        if noted:
            sidecar(path).unlink(missing_ok=True)
        raise


def _is_left_over(path: Path) -> bool:
    """Returns whether the JSON of a clip was published by a run that ended before it published the clip."""
    beside = sidecar(path)
    if os.path.lexists(path) or beside.is_symlink() or not beside.is_file() or beside.stat().st_size > _MAX_JSON_BYTES:
        return False
    try:
        fields = json.loads(beside.read_text("utf-8"))
    except (ValueError, RecursionError):
        return False
    return isinstance(fields, dict) and {"prompt", "seed"} <= fields.keys() and bool({"sora_jax", "exported"} & fields.keys())


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
    info.add_text(PARAMETERS, text)
    Image.fromarray(frames[0]).save(path, format="PNG", pnginfo=info)


def _write_frames(path: Path, frames: np.ndarray, fps: Fraction, text: str) -> None:
    path.mkdir()
    for i, frame in enumerate(frames):
        _write_png(path / f"{i:04d}.png", frame[None], fps, text)


def _write_npz(path: Path, frames: np.ndarray, fps: Fraction, text: str) -> None:
    with path.open("wb") as file:
        np.savez_compressed(file, frames=frames, fps=np.float64(fps), parameters=text)


_WRITERS = {"mp4": _write_mp4, "gif": _write_gif, "png": _write_png, "frames": _write_frames, "npz": _write_npz}
