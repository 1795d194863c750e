"""The text encoder and the video autoencoder, run from their files a segment at a time.

Invariant: results are those of the networks in memory up to rounding, bits do not depend on how much memory there is, and
nothing outlives a call.  What runs are the segments that the networks declare.  The transformer is not run here: it is needed
many times, and streams inside its compiled sampler.
"""

import itertools
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from sora_jax.networks.segment import Segment
from sora_jax.networks.t5 import T5Encoder, position_bias
from sora_jax.networks.vae.codec import VAE, chunks
from sora_jax.streaming.segment_loop import SegmentLoop

FRAME_PIXELS = 2**16  # that a spatial network takes at a time; at the released width it holds 2.6 kB for each, so 0.2 GB


def encode_text(
    loop: SegmentLoop, ids_BL: Int[np.ndarray, "B L"], mask_BL: Bool[np.ndarray, "B L"]
) -> Float[np.ndarray, "B L E"]:
    """Returns the caption features, as `T5Encoder` does; reads only these tokens' rows of the embedding.

    Raises:
      ModelDirectoryError: a parameter is missing or damaged.
      ValueError: a token id is outside the vocabulary.
    """
    config = loop.manifest.config
    with loop.timings.measure("load"):
        x_BLE = loop.reader.rows("embed.embedding", ids_BL).astype(loop.policy.compute)
        table_RN = loop.reader.arrays(["embed.relative_attention_bias"])["embed.relative_attention_bias"]
    bias_1NLL = position_bias(jnp.asarray(table_RN), ids_BL.shape[1], config)
    return np.asarray(loop.run("text", T5Encoder.segments(config), x_BLE, bias_1NLL, mask_BL))


def decode(
    loop: SegmentLoop, z_BTHWC: Float[np.ndarray, "B T H W C"], num_frames: int, shown: Sequence[int] | None = None
) -> Float[np.ndarray, "B t h w 3"]:
    """Returns what `VAE.decode` returns: first the temporal decoder chunk by chunk, then the spatial one frame by frame.

    Of the frames, only those that are ``shown`` are decoded and returned, if they are named.

    Raises:
      ModelDirectoryError: a parameter is missing or damaged.
    """
    config = loop.manifest.config
    clips = []
    for chunk in chunks(config, num_frames):
        *over_time, by_frame = VAE.decode_segments(config, chunk.num_frames)
        if own := chunk.own(shown):
            x_BtHWC = np.asarray(loop.run("decode", over_time, z_BTHWC[:, chunk.latents]))
            clips.append(x_BtHWC if shown is None else x_BtHWC[:, own])
    pixels = config.spatial.downsampling**2 * z_BTHWC.shape[2] * z_BTHWC.shape[3]
    return _frame_by_frame(loop, "decode", by_frame, clips, pixels)


def encode(loop: SegmentLoop, video_Bthw3: Float[np.ndarray, "B t h w 3"]) -> Float[np.ndarray, "B T H W C"]:
    """Returns what `VAE.encode` returns without a key: first the spatial encoder frame by frame, then the temporal one.

    Raises:
      ModelDirectoryError: a parameter is missing or damaged.
    """
    config = loop.manifest.config
    by_frame, *over_time = VAE.encode_segments(config)
    parts = [chunk.frames for chunk in chunks(config, video_Bthw3.shape[1])]
    pixels = video_Bthw3.shape[2] * video_Bthw3.shape[3]
    x_BtHWC = _frame_by_frame(loop, "encode", by_frame, [video_Bthw3[:, frames] for frames in parts], pixels)
    return np.concatenate([np.asarray(loop.run("encode", over_time, x_BtHWC[:, frames])) for frames in parts], axis=1)


def frame_batches(num_frames: int, frame_pixels: int) -> list[slice]:
    """Returns the frames that a spatial network takes at a time: equally many, at least one."""
    largest = max(1, FRAME_PIXELS // frame_pixels)
    count = -(-num_frames // largest)
    bounds = [num_frames * i // count for i in range(count + 1)]
    return [slice(start, stop) for start, stop in itertools.pairwise(bounds)]


def _frame_by_frame(
    loop: SegmentLoop, stage: str, segment: Segment, clips: Sequence[np.ndarray], frame_pixels: int
) -> np.ndarray:
    """Returns the clips [B, t, ...], one after the other in time, after a segment that treats each frame apart.

    The segment is read once for all of them, and each frame is written where it belongs: there is no second copy of a video.
    """
    whole, first = np.empty(0), 0
    with loop.held(stage, segment) as apply:
        for clip in clips:
            rows, length = clip.shape[:2]
            frames = clip.reshape(1, rows * length, *clip.shape[2:])
            for batch in frame_batches(rows * length, frame_pixels):
                coded = np.asarray(apply(frames[:, batch]))[0]
                if not whole.size:
                    whole = np.empty((rows, sum(each.shape[1] for each in clips), *coded.shape[1:]), coded.dtype)
                for i, frame in enumerate(coded, start=batch.start):
                    whole[i // length, first + i % length] = frame
            first += length
    return whole
