"""Fits the map of previews to an autoencoder: least squares on clips that it encodes and decodes itself.

Invariant: the same autoencoder gives the same map; no clip of anybody's is needed.  The fit sees the autoencoder as two
functions of host arrays, so that a memory budget holds for it as for a generation.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from jaxtyping import Float

from sora_jax.config import VAEConfig
from sora_jax.networks.vae.codec import chunks
from sora_jax.pipeline.preview import PreviewMap, chunk_of, frame_features, shape_of

CLIPS, SIDE_PX = 12, 48  # that a map is fitted on, each one chunk long
WITHIN_BUDGET = 4  # clips at a time: a budget for a generation has room for so many
_RIDGE = 1e-4  # of a feature's mean square: neighbours say nearly the same
_MAX_SHAPES = 8
_SPEED, _RADII = 0.02, (0.06, 0.3)  # of shapes: a frame, and in sides of the picture

Video = Float[np.ndarray, "B t h w 3"]
Latents = Float[np.ndarray, "B T H W C"]


def fit(
    config: VAEConfig,
    encode: Callable[[Video], Latents],
    decode: Callable[[Latents, int, Sequence[int]], Video],
    clips: Video,
    *,
    at_a_time: int = CLIPS,
) -> PreviewMap:
    """Returns the map whose pictures are nearest to what the autoencoder decodes from its own latents of the clips.

    ``decode`` is asked for those frames of so many that pictures show.
    """
    frames = shown_frames(config, clips.shape[1])
    num_rows, num_columns = shape_of(config)
    moments, products = np.zeros((num_rows, num_rows)), np.zeros((num_rows, num_columns))
    for start in range(0, len(clips), at_a_time):
        latents = encode(clips[start : start + at_a_time])
        decoded_BThw3 = np.clip(decode(latents, clips.shape[1], frames), -1, 1)
        for frame, features in enumerate(frame_features(latents, chunk_of(config))):
            rows = features.reshape(-1, features.shape[-1]).astype(np.float64)
            rows = np.concatenate([rows, np.ones((len(rows), 1))], axis=1)
            moments = moments + rows.T @ rows
            products = products + rows.T @ _patches(decoded_BThw3[:, frame], config.spatial.downsampling).reshape(len(rows), -1)
    penalty = _RIDGE * np.diag(moments).copy()
    penalty[-1] = 0
    weights = np.linalg.solve(moments + np.diag(penalty), products)
    return PreviewMap(weights=weights.astype(np.float32), chunk=chunk_of(config))


def shown_frames(config: VAEConfig, num_frames: int) -> list[int]:
    """Returns the frame of a clip that each latent frame's picture shows: the last one that it encodes."""
    step = config.temporal.downsampling
    found = []
    for chunk in chunks(config, num_frames):
        count = -(-chunk.num_frames // step)
        first = chunk.frames.start + chunk.num_frames - 1 - step * (count - 1)
        found += [first + step * index for index in range(count)]
    return found


def _patches(pixels_Bhw3: Float[np.ndarray, "B h w 3"], side: int) -> Float[np.ndarray, "B H W P"]:
    batch, height, width = pixels_Bhw3.shape[:3]
    patches = pixels_Bhw3.reshape(batch, height // side, side, width // side, side, 3).transpose(0, 1, 3, 2, 4, 5)
    return patches.reshape(batch, height // side, width // side, -1)


def moving_shapes(num_frames: int) -> Video:
    """Returns clips of shapes that move over shaded backgrounds, in colours of all kinds: what a map is fitted on."""
    rng = np.random.default_rng(0)
    return np.stack([np.stack(list(_moving(rng, num_frames))) for _ in range(CLIPS)]).astype(np.float32)


def _moving(rng: np.random.Generator, num_frames: int) -> Iterator[np.ndarray]:
    """Yields the frames of one clip, in [-1, 1]."""
    y, x = np.mgrid[0:SIDE_PX, 0:SIDE_PX] / SIDE_PX
    dark, light = rng.uniform(-1, 1, (2, 3))
    angle, depth = rng.uniform(0, 2 * np.pi), rng.uniform(0, 1.4)
    shade = np.clip(0.5 + depth * ((x - 0.5) * np.cos(angle) + (y - 0.5) * np.sin(angle)), 0, 1)[..., None]
    ground = dark + (light - dark) * shade
    num_shapes = rng.integers(1, _MAX_SHAPES)
    colours, places = rng.uniform(-1, 1, (num_shapes, 3)), rng.uniform(0, 1, (num_shapes, 2))
    speeds, radii = rng.uniform(-_SPEED, _SPEED, (num_shapes, 2)), rng.uniform(*_RADII, num_shapes)
    square = rng.integers(0, 2, num_shapes)
    for frame in range(num_frames):
        picture = ground
        centres = places + frame * speeds
        for colour, (column, row), radius, cornered in zip(colours, centres, radii, square, strict=True):
            across, down = np.abs(x - column), np.abs(y - row)
            distance = np.maximum(across, down) if cornered else np.hypot(across, down)
            cover = np.clip((radius - distance) * SIDE_PX + 0.5, 0, 1)[..., None]
            picture = picture * (1 - cover) + colour * cover
        yield picture
