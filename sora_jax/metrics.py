"""Weight-free measures of videos: fidelity to a reference, flicker, motion.

Invariant: each measure goes by its own name and needs no network; none of them is a VBench score, except the formula of
temporal flickering, which VBench computes without a network too.  Clips are uint8, or floating point on the same scale of
0..255; everything is computed on the host in float64.

    python -m sora_jax.metrics A B        is the command sora-jax compare
"""

import math
import sys

import numpy as np
from jaxtyping import Float, Num

PEAK = 255.0

_WINDOW_SIGMA, _WINDOW_RADIUS = 1.5, 5
_FLOW_SIGMA, _FLOW_RADIUS = 2.0, 6
_TEXTURE = 4.0  # smallest eigenvalue of the structure tensor from which a place has a flow, (levels / pixel)^2

Video = Num[np.ndarray, "_t _h _w _c"]


def psnr(video_thwc: Video, reference_thwc: Video) -> float:
    """Returns the peak signal-to-noise ratio of a whole clip in dB; infinite where the two are equal.

    Raises:
      ValueError: the clips differ in shape.
    """
    video, reference = _pair(video_thwc, reference_thwc)
    return decibels(float(np.mean((video - reference) ** 2)))


def decibels(mse: float, *, peak: float = PEAK) -> float:
    """Returns the peak signal-to-noise ratio of a mean squared error in dB; infinite where there is none."""
    return 10 * math.log10(peak**2 / mse) if mse else math.inf


def ssim(video_thwc: Video, reference_thwc: Video) -> float:
    """Returns the structural similarity, the mean over frames, channels and places; 1 where the two are equal.

    Gaussian window of 11 x 11 pixels, standard deviation 1.5, without the border the window does not fit in.

    Source: Wang et al., IEEE Transactions on Image Processing 13 (2004) 600, eq. 13.

    Raises:
      ValueError: the clips differ in shape, or are smaller than the window.
    """
    x, y = _pair(video_thwc, reference_thwc)
    side = 2 * _WINDOW_RADIUS + 1
    if min(x.shape[1:3]) < side:
        raise ValueError(f"clip has frames of {x.shape[1]} x {x.shape[2]} pixels; SSIM needs at least {side} x {side}.")
    x, y = _channels_first(x), _channels_first(y)
    mean_x, mean_y, xx, yy, xy = (_blurred(one, _WINDOW_SIGMA, _WINDOW_RADIUS) for one in (x, y, x * x, y * y, x * y))
    c1, c2 = (0.01 * PEAK) ** 2, (0.03 * PEAK) ** 2
    covariance = xy - mean_x * mean_y
    variances = xx - mean_x**2 + yy - mean_y**2
    return float(
        np.mean((2 * mean_x * mean_y + c1) * (2 * covariance + c2) / ((mean_x**2 + mean_y**2 + c1) * (variances + c2)))
    )


def temporal_flickering(video_thwc: Video) -> float:
    """Returns 1 minus the mean absolute difference of consecutive frames over 255: 1 where nothing changes.

    The higher, the steadier; a clip in which nothing moves has 1, so read it together with a measure of motion.

    Source: VBench vbench/temporal_flickering.py cal_score (arXiv 2311.17982).  Differs from source: no filter of videos that
    are not static, which needs a network.

    Raises:
      ValueError: the clip has fewer than two frames.
    """
    video = _moving(video_thwc)
    return float(1 - np.mean(np.abs(np.diff(video, axis=0))) / PEAK)


def flow_magnitude(video_thwc: Video, *, share: float = 0.05) -> float:
    """Returns how far the fastest ``share`` of the pixels move, in pixels a frame: a proxy of optical flow.

    Lucas and Kanade's least squares over all channels, on one scale: exact for slow motion of smooth texture, too large at
    hard edges, too small beyond about two pixels a frame, 0 where there is no texture.  Mean over pairs of frames.  Only the
    share is VBench's dynamic degree's.

    Source: Lucas and Kanade, IJCAI 1981.

    Raises:
      ValueError: the clip has fewer than two frames, or the share is not in (0, 1].
    """
    if not 0 < share <= 1:
        raise ValueError(f"share is {share}; expected more than 0 and at most 1.")
    video = _channels_first(_moving(video_thwc))
    middle = (video[1:] + video[:-1]) / 2
    dt = (video[1:] - video[:-1])[..., 1:-1, 1:-1]
    dx = (middle[..., 1:-1, 2:] - middle[..., 1:-1, :-2]) / 2
    dy = (middle[..., 2:, 1:-1] - middle[..., :-2, 1:-1]) / 2
    products = (np.sum(a * b, axis=1, keepdims=True) for a, b in ((dx, dx), (dx, dy), (dy, dy), (dx, dt), (dy, dt)))
    xx, xy, yy, xt, yt = (_blurred(one, _FLOW_SIGMA, _FLOW_RADIUS, same=True) for one in products)
    determinant = xx * yy - xy * xy
    smallest = (xx + yy) / 2 - np.sqrt(((xx - yy) / 2) ** 2 + xy**2)
    textured = smallest > _TEXTURE
    safe = np.where(textured, determinant, 1.0)
    u, v = (xy * yt - yy * xt) / safe, (xy * xt - xx * yt) / safe
    magnitude = np.where(textured, np.hypot(u, v), 0.0).reshape(len(video) - 1, -1)
    fastest = math.ceil(share * magnitude.shape[1])
    return float(np.sort(magnitude, axis=1)[:, -fastest:].mean())


def track_speed(centre_px: Float[np.ndarray, "t 2"]) -> float:
    """Returns how fast an object moves in pixels a frame, from its centre (x, y) in each frame; NaN where it has no track.

    Least-squares slopes of x and y over the frames in which the object is seen; other frames hold NaN.
    """
    frame = np.flatnonzero(np.isfinite(centre_px).all(axis=1))
    if len(frame) < 2:
        return math.nan
    when = frame - frame.mean()
    slopes = when @ (centre_px[frame] - centre_px[frame].mean(axis=0)) / (when @ when)
    return float(np.hypot(*slopes))


def _pair(video: np.ndarray, reference: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    if video.shape != reference.shape:
        raise ValueError(f"clip has shape {video.shape}, its reference {reference.shape}; expected the same.")
    return video.astype(np.float64), reference.astype(np.float64)


def _moving(video: np.ndarray) -> np.ndarray:
    if len(video) < 2:
        raise ValueError(f"clip has {len(video)} frame; expected at least 2.")
    return video.astype(np.float64)


def _channels_first(video_thwc: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(np.moveaxis(video_thwc, -1, 1))


def _band(size: int, sigma: float, radius: int, *, same: bool) -> np.ndarray:
    """Returns the matrix [out, size] of a Gaussian window; with ``same`` as many values come out, and outside are zeros."""
    weights = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
    weights /= weights.sum()
    padding = radius if same else 0
    rows = size + 2 * padding - 2 * radius
    band = np.zeros((rows, size + 2 * padding))
    for row in range(rows):
        band[row, row : row + len(weights)] = weights
    return band[:, padding : padding + size]


def _blurred(x_tchw: np.ndarray, sigma: float, radius: int, *, same: bool = False) -> np.ndarray:
    """Returns the frames under a Gaussian window; as products with band matrices, which beat sums of shifted frames."""
    rows, columns = (_band(size, sigma, radius, same=same) for size in x_tchw.shape[2:])
    return rows @ x_tchw @ columns.T


if __name__ == "__main__":
    from sora_jax.commands.compare import main

    sys.exit(main())
