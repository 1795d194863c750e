"""The pixels of a written clip, read back: what `video` writes, and other videos and pictures of the same formats.

Invariant: headers are read and compared with the limits before a pixel is decoded.  Nothing is resized; the parameters of a
clip are `clip_info`'s.
"""

import os
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from sora_jax.inputs import media
from sora_jax.pipeline import clip_info
from sora_jax.pipeline.video import clip_format

MAX_PIXELS = 2**28  # of all frames: 800 MB
Frames = UInt8[np.ndarray, "t h w 3"]


def read_frames(path: str | os.PathLike[str]) -> Frames:
    """Returns the frames of an mp4, gif, png or npz file, or of a folder of PNGs.

    Raises:
      FileNotFoundError: no such file.
      ValueError: the file is not a readable clip, or has more than `MAX_PIXELS` pixels.
      OSError: the system cannot read it.
    """
    path = Path(path)
    said = clip_info.inspect(path).media
    if "width" not in said:
        raise ValueError(f"{path} holds no frames; expected a clip.")
    num_pixels = said["frames"] * said["height"] * said["width"]
    if num_pixels > MAX_PIXELS:
        raise ValueError(f"{path} has {num_pixels} pixels in all frames; expected at most {MAX_PIXELS}: cut it.")
    kind = clip_format(path, 1)
    try:
        frames = _READERS[kind](path)
    except media.MediaError as error:
        raise ValueError(f"{path} is not a readable {kind} file: {error}.") from error
    except (zipfile.BadZipFile, KeyError, EOFError) as error:
        raise ValueError(f"{path} is not a readable {kind} file: it is damaged.") from error
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3:
        raise ValueError(f"{path} holds {frames.dtype}{list(frames.shape)}; expected uint8[frames, height, width, 3].")
    return frames


def _video(path: Path) -> np.ndarray:
    frames: list[np.ndarray] = []
    left = MAX_PIXELS  # a header may say less than the file holds
    for frame in media.video_frames(path):
        left -= frame.width * frame.height
        if left < 0:
            raise media.MediaError(f"it has more than {MAX_PIXELS} pixels in all frames")
        frames.append(frame.to_ndarray(format="rgb24"))
    return _stacked(frames)


def _gif(path: Path) -> np.ndarray:
    with media.opened_image(path, ("GIF",)) as picture:
        count = getattr(picture, "n_frames", 1)
        frames = []
        for number in range(count):
            picture.seek(number)
            frames.append(np.asarray(picture.convert("RGB")))
    return _stacked(frames)


def _png(path: Path) -> np.ndarray:
    with media.opened_image(path, ("PNG",)) as picture:
        return np.asarray(picture.convert("RGB"))[None]


def _folder(path: Path) -> np.ndarray:
    return _stacked([_png(file)[0] for file in sorted(path.glob("*.png")) if file.is_file()])


def _npz(path: Path) -> np.ndarray:
    with np.load(path, allow_pickle=False) as stored:
        return stored["frames"]


def _stacked(frames: list[np.ndarray]) -> np.ndarray:
    if len({frame.shape for frame in frames}) > 1:
        raise media.MediaError("its frames differ in size")
    return np.stack(frames)


_READERS: dict[str, Callable[[Path], np.ndarray]] = {
    "mp4": _video,
    "gif": _gif,
    "png": _png,
    "frames": _folder,
    "npz": _npz,
}
