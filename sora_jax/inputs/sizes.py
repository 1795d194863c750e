"""Resolutions, aspect ratios, durations and size conditions of Open-Sora 1.2, as data.

Sizes are pixels (height, width), aspect ratios are height:width, lengths are frames.  Not every size is a multiple of the
autoencoder's 8 pixels: latents round down, as in the source.  Nothing here computes latent sizes; the codec does.
"""

import operator

import numpy as np
from jaxtyping import Float

_RATIOS = "3:8 9:21 12:25 1:2 9:17 27:50 9:16 5:8 2:3 3:4 1:1 4:3 3:2 16:9 17:9 2:1 50:27"
ASPECT_RATIOS = tuple(_RATIOS.split())

# Source: Open-Sora v1.2 opensora/datasets/aspect.py.  One column for each of ASPECT_RATIOS; transcribed, because some
# entries were rounded by hand and follow no formula.  The sizes named 50:27 have, as there, the proportions of 25:12.
_VIDEO_SIZES = {
    "144p": "117x312 125x291 133x277 135x270 139x262 141x260 144x256 151x241 156x234 166x221 192x192 221x165 235x156 256x144 "
    "263x139 271x135 277x132",
    "240p": "196x522 210x490 222x462 226x452 232x438 236x436 240x426 252x404 262x393 276x368 320x320 370x278 392x262 426x240 "
    "440x232 452x226 462x222",
    "360p": "294x784 314x732 332x692 340x680 350x662 352x652 360x640 380x608 392x588 416x554 480x480 554x416 588x392 640x360 "
    "660x350 678x340 692x332",
    "480p": "392x1046 420x980 444x925 452x904 466x880 470x870 480x854 506x810 522x784 554x738 640x640 740x555 784x522 854x480 "
    "880x466 906x454 924x444",
    "720p": "588x1568 628x1466 666x1388 678x1356 698x1318 706x1306 720x1280 758x1212 784x1176 832x1110 960x960 1108x832 "
    "1176x784 1280x720 1320x698 1358x680 1386x666",
    "1080p": "882x2352 942x2198 998x2080 1018x2036 1048x1980 1058x1958 1080x1920 1138x1820 1176x1764 1248x1664 1440x1440 "
    "1662x1246 1764x1176 1920x1080 1980x1048 2036x1018 2078x998",
    "2k": "1176x3136 1256x2930 1330x2770 1358x2716 1398x2640 1412x2612 1440x2560 1518x2428 1568x2352 1662x2216 1920x1920 "
    "2218x1664 2352x1568 2560x1440 2638x1396 2716x1358 2772x1330",
    "4k": "1764x4704 1886x4400 1996x4158 2036x4072 2096x3960 2118x3918 2160x3840 2276x3642 2352x3528 2494x3326 2880x2880 "
    "3326x2494 3528x2352 3840x2160 3958x2096 4072x2036 4156x1994",
}

# Image resolutions of PixArt.  Their own aspect ratios have other names, of which only 12:25 is also one of ASPECT_RATIOS.
_IMAGE_SIZES: dict[str, dict[str, tuple[int, int]]] = {
    "256": {"12:25": (176, 368)},
    "512": {"12:25": (352, 736)},
    "1024": {"12:25": (704, 1472)},
    "2048": {"12:25": (1408, 2944)},
    "2880": {},
}


def _parse(row: str) -> dict[str, tuple[int, int]]:
    sizes = [tuple(map(int, size.split("x"))) for size in row.split()]
    return {ratio: (height, width) for ratio, (height, width) in zip(ASPECT_RATIOS, sizes, strict=True)}


IMAGE_SIZES = {name: _parse(row) for name, row in _VIDEO_SIZES.items()} | _IMAGE_SIZES

NUM_PIXELS = {
    "144p": 36864,
    "256": 65536,
    "240p": 102240,
    "360p": 230400,
    "512": 262144,
    "480p": 409920,
    "720p": 921600,
    "1024": 1048576,
    "1080p": 2073600,
    "2k": 3686400,
    "2048": 4194304,
    "2880": 8294400,
    "4k": 8294400,
}
RESOLUTIONS = tuple(NUM_PIXELS)  # by rising number of pixels

DURATIONS = {f"{n}x": 51 * n for n in (1, 2, 4, 8, 16)} | {f"{2 * n}s": 51 * n for n in (1, 2, 4, 8, 16)}

IMAGE_FPS = 120  # the fps condition of a single frame
FRAMES_PER_CHUNK, LATENTS_PER_CHUNK = 17, 5


def image_size(resolution: str, aspect_ratio: str) -> tuple[int, int]:
    """Returns (height, width) in pixels of a named resolution such as ``240p`` and an aspect ratio such as ``9:16``.

    Raises:
      ValueError: a name is unknown, or this resolution does not have this aspect ratio.
    """
    if resolution not in IMAGE_SIZES:
        raise ValueError(f"resolution {resolution!r} is unknown; expected one of {', '.join(RESOLUTIONS)}.")
    if aspect_ratio not in ASPECT_RATIOS:
        raise ValueError(f"aspect ratio {aspect_ratio!r} is unknown; expected height:width, one of {', '.join(ASPECT_RATIOS)}.")
    sizes = IMAGE_SIZES[resolution]
    if aspect_ratio not in sizes:
        others = ", ".join(name for name in RESOLUTIONS if aspect_ratio in IMAGE_SIZES[name])
        raise ValueError(
            f"resolution {resolution} has no aspect ratio {aspect_ratio}; it has {', '.join(sizes) or 'none'}. "
            f"Resolutions with {aspect_ratio}: {others}."
        )
    return sizes[aspect_ratio]


def is_listed(height: int, width: int) -> bool:
    """Returns whether a size is one of the table, which need not be multiples of latents and patches."""
    return any((height, width) in listed.values() for listed in IMAGE_SIZES.values())


def num_pixels(resolution: str) -> int:
    """Returns the nominal number of pixels of a frame; a size of the table may deviate by a few percent.

    Raises:
      ValueError: the name is unknown.
    """
    if resolution not in NUM_PIXELS:
        raise ValueError(f"resolution {resolution!r} is unknown; expected one of {', '.join(RESOLUTIONS)}.")
    return NUM_PIXELS[resolution]


def num_frames(length: int | str) -> int:
    """Returns the frames of a length given as a duration (``2s``), a multiple of 51 frames (``4x``) or a number.

    Durations are nominal: 2 s is 51 frames, at whatever fps they are played.

    Raises:
      ValueError: the text is none of these, or the number is not positive.
    """
    if isinstance(length, str) and length in DURATIONS:
        return DURATIONS[length]
    try:
        frames = int(length) if isinstance(length, str) else 0 if isinstance(length, bool) else operator.index(length)
    except (TypeError, ValueError):
        frames = 0
    if frames < 1:
        raise ValueError(f"num_frames is {length!r}; expected a positive whole number or one of {', '.join(DURATIONS)}.")
    return frames


def frames_of_latents(num_latents: int) -> int:
    """Returns the pixel frames that whole chunks of latent frames decode to (5 latent frames to 17).

    Source: Open-Sora v1.2 opensora/utils/inference_utils.py dframe_to_frame.

    Raises:
      ValueError: the latent frames do not fill whole chunks.
    """
    if num_latents % LATENTS_PER_CHUNK:
        raise ValueError(f"{num_latents} latent frames are not whole chunks; expected a multiple of {LATENTS_PER_CHUNK}.")
    return num_latents // LATENTS_PER_CHUNK * FRAMES_PER_CHUNK


def size_conditions(
    batch_size: int, *, height: int, width: int, num_frames: int, fps: int | float
) -> dict[str, Float[np.ndarray, " B"]]:
    """Returns the float32 inputs ``fps_B``, ``height_px_B`` and ``width_px_B`` of the transformer for equal samples.

    A single frame is an image and always has the fps condition 120.

    Source: Open-Sora v1.2 opensora/utils/inference_utils.py prepare_multi_resolution_info.  Differs from source: its
    num_frames and ar are left out, because no part of STDiT3 reads them.
    """
    values = {"fps_B": fps if num_frames > 1 else IMAGE_FPS, "height_px_B": height, "width_px_B": width}
    return {name: np.full(batch_size, value, np.float32) for name, value in values.items()}
