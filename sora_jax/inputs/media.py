"""Pictures and videos of unknown origin, opened within limits.

Invariant: what a header says is checked against `MAX_PIXELS` before a pixel is decoded, only the listed formats are ever
tried, and nothing in a file makes the reader open another file or an address.  Errors are `MediaError`, whose text says
what is wrong with the file and not which one it is; what the system itself reports (no permission, a failing disk) stays an
OSError.  Sizes that a video is resized to, and what is written into files, are not known here.
"""

import contextlib
import errno
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import av.container
from PIL import Image, ImageOps

MAX_PIXELS = 2**27  # of one frame: 11,585 x 11,585, or 400 MB of colours
IMAGE_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
_CONTAINERS = "avi,matroska,webm,mov,mp4,m4a,3gp,3g2,mj2"  # demuxers; others may fetch what a playlist in the file names


class MediaError(ValueError):
    """A file is not a readable picture or video, or lies beyond a limit."""


@contextlib.contextmanager
def opened_image(path: Path, formats: tuple[str, ...] = IMAGE_FORMATS) -> Iterator[Image.Image]:
    """Yields a picture of which only the header has been read; what fails in the body is a damaged picture.

    Raises:
      MediaError: the file is no picture of these formats, is damaged, or has more than `MAX_PIXELS`.
      OSError: the system cannot read it.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit is below that of the error
            image = Image.open(path, formats=formats)
        with image:
            _refuse_large(image.width, image.height)
            yield image
    except MediaError:
        raise
    except Image.DecompressionBombError:
        raise MediaError(f"it has more than {MAX_PIXELS} pixels a frame; make it smaller") from None
    except Exception as error:  # decoders raise OSError, SyntaxError, EOFError, struct.error and more
        _pass_on(error, path)
        raise MediaError(f"it is damaged, cut short, or no picture of the kind {', '.join(formats)}") from error


def read_image(path: Path) -> Image.Image:
    """Returns a picture in RGB, turned upright as its camera noted.

    Raises:
      MediaError: see `opened_image`.
      OSError: the system cannot read it.
    """
    with opened_image(path) as image:
        return ImageOps.exif_transpose(image).convert("RGB")


@contextlib.contextmanager
def opened_video(path: Path) -> Iterator[tuple[av.container.InputContainer, Any]]:
    """Yields the container and the first video stream of a file whose header alone has been read.

    Raises:
      MediaError: the file is no video, is damaged, or has frames of more than `MAX_PIXELS`.
      OSError: the system cannot read it.
    """
    options = {"format_whitelist": _CONTAINERS, "protocol_whitelist": "file"}
    try:
        with av.open(f"file:{path}", options=options) as container:
            if not container.streams.video:
                raise MediaError("it has no video stream")
            stream = container.streams.video[0]
            _refuse_large(stream.width or 0, stream.height or 0)
            stream.codec_context.options = {"max_pixels": str(MAX_PIXELS)}
            yield container, stream
    except MediaError:
        raise
    except (av.FFmpegError, OSError, UnicodeError) as error:
        _pass_on(error, path)
        raise MediaError("it is damaged, cut short, or no video") from error


def video_frames(path: Path) -> Iterator[av.VideoFrame]:
    """Yields the frames of a video one by one: those of a whole clip need not fit in memory.

    Raises:
      MediaError: see `opened_video`; also where it holds no frames.
      OSError: the system cannot read it.
    """
    count = 0
    with opened_video(path) as (container, stream):
        for frame in container.decode(stream):
            _refuse_large(frame.width, frame.height)
            count += 1
            yield frame
    if not count:
        raise MediaError("it holds no video frames")


def _refuse_large(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise MediaError(f"it has {width} x {height} pixels a frame; expected at most {MAX_PIXELS}: make it smaller")


def _pass_on(error: Exception, path: Path) -> None:
    """Raises what the system reported about a file, and nothing for what a decoder found in it."""
    number = getattr(error, "errno", None)
    # FFmpeg's own numbers are none of the system's, apart from EINVAL.
    if isinstance(number, int) and number in errno.errorcode and number != errno.EINVAL:
        raise OSError(number, os.strerror(number), str(path)) from error
