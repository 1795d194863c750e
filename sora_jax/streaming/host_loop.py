"""The text encoder and the video autoencoder, run from their files a segment at a time.

Invariant: results are those of the networks in memory up to rounding, bits do not depend on how much memory there is, and
nothing outlives a call.  Videos are coded chunk by chunk and frame by frame, as the codec defines them.  The transformer is
not run here: it is needed many times, and streams inside its compiled sampler.
"""

import contextlib
import itertools
from collections.abc import Iterator, Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from sora_jax.networks.segments import Segment, within
from sora_jax.networks.t5 import T5Encoder, position_bias
from sora_jax.networks.vae.codec import LatentStats, chunks, split_moments
from sora_jax.networks.vae.spatial import SpatialDecoder, SpatialEncoder
from sora_jax.networks.vae.temporal import TemporalDecoder, TemporalEncoder
from sora_jax.streaming.rows import read_rows, read_whole
from sora_jax.streaming.segment_loop import SegmentLoop
from sora_jax.streaming.staging import Verified

FRAME_PIXELS = 2**16  # pixels that a spatial network takes at a time; its activations are kilobytes for each


def encode_text(
    loop: SegmentLoop, ids_BL: Int[np.ndarray, "B L"], mask_BL: Bool[np.ndarray, "B L"]
) -> Float[np.ndarray, "B L E"]:
    """Returns what `T5Encoder` returns; of the embedding only the rows of these tokens are read.

    Raises:
      ModelDirectoryError: a parameter is missing or damaged.
      ValueError: a token id is outside the vocabulary.
    """
    config = loop.manifest.config
    with loop.timings.measure("load"):
        x_BLE = read_rows(loop.manifest, "embed.embedding", ids_BL).astype(loop.policy.compute)
        table_RN = read_whole(loop.manifest, "embed.relative_attention_bias", Verified())
    bias_1NLL = position_bias(jnp.asarray(table_RN), ids_BL.shape[1], config)
    return np.asarray(loop.run("text", T5Encoder.segments(config), x_BLE, bias_1NLL, mask_BL))


def decode(loop: SegmentLoop, z_BTHWC: Float[np.ndarray, "B T H W C"], num_frames: int) -> Float[np.ndarray, "B t h w 3"]:
    """Returns what `VAE.decode` returns: first the temporal decoder chunk by chunk, then the spatial one frame by frame.

    Raises:
      ModelDirectoryError: a parameter is missing or damaged.
    """
    config = loop.manifest.config
    segments = within("temporal_decoder", TemporalDecoder.segments(config.temporal))
    clips = []
    for chunk in chunks(config, num_frames):
        x = loop.run("decode", _RESTORE, z_BTHWC[:, chunk.latents])
        x = loop.run("decode", segments, x.astype(loop.policy.compute))
        x_BtHWC = np.asarray(x[:, x.shape[1] - chunk.num_frames :].astype(jnp.float32))
        clips.append(x_BtHWC / np.float32(config.spatial.scaling_factor))
    pixels = config.spatial.downsampling**2 * z_BTHWC.shape[2] * z_BTHWC.shape[3]
    return np.concatenate(_by_frame(loop, "decode", _DECODE_FRAMES, clips, pixels), axis=1)


def encode(loop: SegmentLoop, video_Bthw3: Float[np.ndarray, "B t h w 3"]) -> Float[np.ndarray, "B T H W C"]:
    """Returns what `VAE.encode` returns without a key: first the spatial encoder frame by frame, then the temporal one.

    Raises:
      ModelDirectoryError: a parameter is missing or damaged.
    """
    config = loop.manifest.config
    segments = within("temporal_encoder", TemporalEncoder.segments(config.temporal))
    clips = [video_Bthw3[:, chunk.frames] for chunk in chunks(config, video_Bthw3.shape[1])]
    latents = []
    for moments in _by_frame(loop, "encode", _ENCODE_FRAMES, clips, video_Bthw3.shape[2] * video_Bthw3.shape[3]):
        x_BtHWC = split_moments(jnp.asarray(moments))[0] * config.spatial.scaling_factor
        x = TemporalEncoder.padded(x_BtHWC, config.temporal).astype(loop.policy.compute)
        mean = split_moments(loop.run("encode", segments, x))[0]
        latents.append(np.asarray(loop.run("encode", _NORMALISE, mean)))
    return np.concatenate(latents, axis=1)


def frame_batches(num_frames: int, frame_pixels: int) -> list[slice]:
    """Returns the frames that a spatial network takes at a time: equally many, at least one."""
    largest = max(1, FRAME_PIXELS // frame_pixels)
    count = -(-num_frames // largest)
    bounds = [num_frames * i // count for i in range(count + 1)]
    return [slice(start, stop) for start, stop in itertools.pairwise(bounds)]


def _by_frame(
    loop: SegmentLoop, stage: str, segment: Segment, clips: Sequence[np.ndarray], frame_pixels: int
) -> list[np.ndarray]:
    """Returns the clips [B, t, ...] after a spatial network, which is read once for all of them."""

    def batches() -> Iterator[np.ndarray]:
        for clip in clips:
            frames = clip.reshape(-1, *clip.shape[2:])
            yield from (frames[batch] for batch in frame_batches(len(frames), frame_pixels))

    out = []
    with contextlib.closing(loop.each(stage, segment, batches())) as done:
        for clip in clips:
            count = len(frame_batches(clip.shape[0] * clip.shape[1], frame_pixels))
            frames = np.concatenate(list(itertools.islice(done, count)))
            out.append(frames.reshape(*clip.shape[:2], *frames.shape[1:]))
    return out


def _restored(stats: LatentStats, z: Array) -> Array:
    return stats.restore(z)


def _normalised(stats: LatentStats, z: Array) -> Array:
    return stats.normalise(z)


def _frames(network: SpatialDecoder | SpatialEncoder, x: Array) -> Array:
    return network(x).astype(jnp.float32)


_RESTORE, _NORMALISE = [Segment(("stats",), _restored)], [Segment(("stats",), _normalised)]
_DECODE_FRAMES, _ENCODE_FRAMES = Segment(("spatial_decoder",), _frames), Segment(("spatial_encoder",), _frames)
