"""References and masks: which latent frames come from a reference, and how freely the sampler may change them.

A mask value is a frame's edit ratio: 0 keeps the reference exactly, 1 generates freely, between them the frame joins the
sampling at that time.  Functions return new arrays and lists and never change their arguments.  Everything is NumPy on
the host; the pipeline encodes references to latents.
"""

import dataclasses
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import av
import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from sora_jax import files
from sora_jax.inputs import media

Latents = Float[np.ndarray, "_ _ _ _"]  # (T, H, W, C) of one reference; T differs between references

VIDEO_SUFFIXES = (".mp4", ".avi", ".mov", ".mkv")
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
MAX_VIDEO_PIXELS = 2**28  # of all frames after resizing: 3.2 GB in float32, 109 s of 426 x 240 at 24 frames per second
MAX_VIDEO_FRAMES = 100_000


@dataclasses.dataclass(frozen=True)
class MaskEntry:
    """One reference put into one clip; starts and lengths count latent frames, negative starts count from the end."""

    loop: int
    reference: int = 0
    reference_start: int = 0
    target_start: int = 0
    length: int = 1
    edit_ratio: float = 0.0


def parse_mask_strategy(strategy: str | None) -> list[MaskEntry]:
    """Returns the entries of ``loop,reference,reference start,target start,length,edit ratio;...``.

    Fields at the end of an entry may be left out; the empty text has no entry.

    Source: Open-Sora v1.2 opensora/utils/inference_utils.py parse_mask_strategy.

    Raises:
      ValueError: an entry has more than six fields, or one of them is not a number.
    """
    if not strategy:
        return []
    names = [field.name for field in dataclasses.fields(MaskEntry)]
    entries = []
    for text in strategy.split(";"):
        fields = text.split(",")
        if len(fields) > len(names):
            raise ValueError(
                f"mask strategy {text!r} has {len(fields)} fields; expected at most {len(names)}: {','.join(names)}."
            )
        try:
            entries.append(MaskEntry(*map(int, fields[:5]), *map(float, fields[5:])))
        except ValueError:
            raise ValueError(
                f"mask strategy {text!r} is malformed; expected numbers for {','.join(names)}, such as 0 or 0,0,0,0,5."
            ) from None
    return entries


def nearest_point(value: int, point: int, max_value: int) -> int:
    """Returns the multiple of ``point`` nearest to ``value`` (halves down), never the last, partial interval's end.

    Source: Open-Sora v1.2 opensora/utils/inference_utils.py find_nearest_point.
    """
    index, rest = divmod(value, point)
    if rest > point / 2 and index < max_value // point - 1:
        index += 1
    return index * point


def apply_mask_strategy(
    z_BTHWC: Float[np.ndarray, "B T H W C"],
    references: Sequence[Sequence[Latents]],
    strategies: Sequence[str],
    loop: int,
    *,
    align: int | None = None,
) -> tuple[Float[np.ndarray, "B T H W C"], Float[np.ndarray, "B T"]]:
    """Returns the noise with references inserted, and the float32 mask; 1 everywhere where no strategy applies.

    Args:
      z_BTHWC: initial noise.
      references: for each sample the latents of its references.
      strategies: for each sample its mask strategy, see ``parse_mask_strategy``.
      loop: number of the clip being generated; entries of other loops do not apply.
      align: round both starts to multiples of this many latent frames (5: whole chunks of the autoencoder).

    Source: Open-Sora v1.2 opensora/utils/inference_utils.py apply_mask_strategy.  Differs from source: a start outside
    the clip or the reference is an error.

    Raises:
      ValueError: a strategy is malformed, or names a reference or a frame that does not exist.
    """
    if not len(z_BTHWC) == len(references) == len(strategies):
        raise ValueError(
            f"batch {len(z_BTHWC)}, references {len(references)} and mask strategies {len(strategies)} differ in number; "
            "expected one list of references and one strategy for each sample."
        )
    z_BTHWC = np.array(z_BTHWC)
    mask_BT = np.ones(z_BTHWC.shape[:2], np.float32)
    for z_THWC, mask_T, given, strategy in zip(z_BTHWC, mask_BT, references, strategies, strict=True):
        for entry in parse_mask_strategy(strategy):
            if entry.loop == loop:
                _put(z_THWC, mask_T, given, entry, align)
    return z_BTHWC, mask_BT


def _put(z_THWC: np.ndarray, mask_T: np.ndarray, references: Sequence[np.ndarray], entry: MaskEntry, align: int | None) -> None:
    if not -len(references) <= entry.reference < len(references):
        raise ValueError(
            f"the mask strategy names reference {entry.reference}, but there are {len(references)} (the first is 0)."
        )
    reference = np.asarray(references[entry.reference])
    if reference.shape[1:] != z_THWC.shape[1:]:
        raise ValueError(f"reference latents are {reference.shape[1:]} (H, W, C); expected {z_THWC.shape[1:]} as the clip.")
    source = _start(entry.reference_start, len(reference), align, "reference")
    target = _start(entry.target_start, len(z_THWC), align, "clip")
    length = min(entry.length, len(z_THWC) - target, len(reference) - source)  # below 0: up to that many from the end
    place, taken = z_THWC[target : target + length], reference[source : source + length]
    if len(taken) not in (1, len(place)):
        raise ValueError(f"the mask strategy puts {len(taken)} latent frames of a reference into {len(place)} of the clip.")
    place[:] = taken
    mask_T[target : target + length] = entry.edit_ratio


def _start(start: int, num_frames: int, align: int | None, what: str) -> int:
    index = start + num_frames if start < 0 else start
    if not 0 <= index < num_frames:
        raise ValueError(
            f"the mask strategy starts at latent frame {start} of a {what} of {num_frames}; "
            f"expected {-num_frames} to {num_frames - 1}, below 0 counted from the end."
        )
    return index if align is None else nearest_point(index, align, num_frames)


def append_generated(
    references: Sequence[Sequence[Latents]],
    strategies: Sequence[str | None],
    latents_BTHWC: Float[np.ndarray, "B T H W C"],
    loop: int,
    *,
    length: int,
    edit_ratio: int | float,
) -> tuple[list[list[Latents]], list[str]]:
    """Returns references and strategies by which clip ``loop`` begins with the end of the clip before it.

    Args:
      references: for each sample the latents of its references.
      strategies: for each sample its mask strategy.
      latents_BTHWC: the previous clip, decoded and encoded again.
      loop: number of the clip to be generated.
      length: how many latent frames the clips share.
      edit_ratio: edit ratio of the shared frames.

    Source: Open-Sora v1.2 opensora/utils/inference_utils.py append_generated.
    """
    appended, conditions = [], []
    for given, strategy, latents_THWC in zip(references, strategies, latents_BTHWC, strict=True):
        entry = f"{loop},{len(given)},-{length},0,{length},{edit_ratio}"
        appended.append([*given, latents_THWC])
        conditions.append(f"{strategy};{entry}" if strategy else entry)
    return appended, conditions


def read_reference(path: str | Path, height: int, width: int) -> Float[np.ndarray, "t h w 3"]:
    """Returns an image (one frame) or a video, resized to fill ``height`` x ``width`` and cropped, float32 in [-1, 1].

    Source: Open-Sora v1.2 opensora/datasets/utils.py read_from_path with ``resize_crop``.  Differs from source: the
    orientation stored by cameras is applied, and addresses on the network are not fetched.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file is of another kind, damaged, or has more frames or pixels than are read.
      OSError: the system cannot read it.
    """
    if _is_video(path):
        most = max(1, MAX_VIDEO_PIXELS // (height * width))
        frames = _frames(Path(path), most, f"{most} frames of {height} x {width}")
        return np.concatenate([resize_crop_video(frame.to_ndarray(format="rgb24")[None], height, width) for frame in frames])
    try:
        return resize_crop_image(media.read_image(Path(path)), height, width)
    except media.MediaError as error:
        raise ValueError(f"Reference {path} is not a readable image: {error}.") from error


def count_frames(path: str | Path) -> int:
    """Returns the number of frames of a reference, which is decoded to its end but kept nowhere.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file is of another kind, damaged, or has more frames or pixels than are read.
      OSError: the system cannot read it.
    """
    if _is_video(path):
        return sum(1 for _ in _frames(Path(path), MAX_VIDEO_FRAMES, f"{MAX_VIDEO_FRAMES} frames"))
    try:
        media.read_image(Path(path))
    except media.MediaError as error:
        raise ValueError(f"Reference {path} is not a readable image: {error}.") from error
    return 1


def _is_video(path: str | Path) -> bool:
    """Returns whether a reference is a video, else it is an image.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the path is empty, an address on the network, or has another suffix.
    """
    if not str(path):
        raise ValueError("a reference path is empty; expected paths with one ';' between them, and none at the end.")
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", str(path)):
        raise ValueError(f"Reference {path} is an address on the network; download it and give the path of the file.")
    path = Path(path)
    files.refuse_missing(path, "Reference")
    suffix = path.suffix.lower()
    if suffix not in (*IMAGE_SUFFIXES, *VIDEO_SUFFIXES):
        expected = " ".join((*IMAGE_SUFFIXES, *VIDEO_SUFFIXES))
        raise ValueError(f"Reference {path} has suffix {path.suffix!r}; expected one of {expected}.")
    return suffix in VIDEO_SUFFIXES


def _frames(path: Path, most: int, limit: str) -> Iterator[av.VideoFrame]:
    """Yields the frames of a video file one by one: whole clips of large frames need not fit in memory."""
    try:
        for number, frame in enumerate(media.video_frames(path)):
            if number == most:
                raise ValueError(f"Reference {path} has more than {limit}, which is all that is read; cut it.")
            yield frame
    except media.MediaError as error:
        raise ValueError(f"Reference {path} is not a readable video: {error}.") from error


def resize_crop_image(image: Image.Image, height: int, width: int) -> Float[np.ndarray, "1 h w 3"]:
    """Returns the centre of an image after bicubic resizing (with antialiasing) until it fills ``height`` x ``width``.

    Source: Open-Sora v1.2 opensora/datasets/utils.py resize_crop_to_fill.
    """
    rows, columns = _filling_size(image.height, image.width, height, width)
    resized = np.asarray(image.convert("RGB").resize((columns, rows), Image.Resampling.BICUBIC))
    top, left = round((rows - height) / 2), round((columns - width) / 2)
    return _signed(resized[None, top : top + height, left : left + width].astype(np.float32) / np.float32(255))


def resize_crop_video(frames: UInt8[np.ndarray, "t h0 w0 3"], height: int, width: int) -> Float[np.ndarray, "t h w 3"]:
    """Returns the centre of every frame after bilinear resizing (no antialiasing) until it fills ``height`` x ``width``.

    Source: Open-Sora v1.2 opensora/datasets/video_transforms.py resize_crop_to_fill.  As there, an odd margin is halved
    downwards, where images round half to even.
    """
    rows, columns = _filling_size(frames.shape[1], frames.shape[2], height, width)
    top, left = (rows - height) // 2, (columns - width) // 2
    vertical = _bilinear_taps(frames.shape[1], rows, slice(top, top + height))
    horizontal = _bilinear_taps(frames.shape[2], columns, slice(left, left + width))
    return np.stack([_signed(_interpolate(frame, vertical, horizontal)) for frame in frames])


_Taps = tuple[np.ndarray, np.ndarray, np.ndarray]  # two source indices of each output index, weight of the second


def _filling_size(height: int, width: int, target_height: int, target_width: int) -> tuple[int, int]:
    """Returns the size, of the given proportions, that touches the target on one side and covers it on the other."""
    by_height, by_width = target_height / height, target_width / width
    if by_height > by_width:
        return target_height, round(width * by_height)
    return round(height * by_width), target_width


def _bilinear_taps(size: int, resized: int, kept: slice) -> _Taps:
    """Returns what outputs ``kept`` of a line of ``size`` samples resized to ``resized`` mix (pixel centres at halves)."""
    centres = np.arange(resized)[kept] + 0.5
    position = np.maximum(centres * float(np.float32(size) / np.float32(resized)) - 0.5, 0).astype(np.float32)
    first = np.minimum(position.astype(np.int64), size - 1)
    return first, np.minimum(first + 1, size - 1), (position - first).astype(np.float32)


def _interpolate(frame_hw3: np.ndarray, vertical: _Taps, horizontal: _Taps) -> np.ndarray:
    above, below, weight_h = vertical
    left, right, weight_w = horizontal
    unit = frame_hw3.astype(np.float32) / np.float32(255)
    weight_w, weight_h = weight_w[None, :, None], weight_h[:, None, None]
    rows = unit[:, left] * (1 - weight_w) + unit[:, right] * weight_w
    return rows[above] * (1 - weight_h) + rows[below] * weight_h


def _signed(unit: np.ndarray) -> Float[np.ndarray, "..."]:
    return (unit - np.float32(0.5)) / np.float32(0.5)
