"""The text encoder and the autoencoder on several devices: captions, chunks and frames dealt out among them.

Invariant: each device computes some rows from beginning to end and nothing passes between devices; results are those of one
device up to rounding.  Between the autoencoder's halves, which are dealt out by chunk and by frame, latents pass the host.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from sora_jax import layout
from sora_jax.devices.hosts import whole
from sora_jax.devices.mesh import filled, on_each, place
from sora_jax.networks.t5 import T5Encoder
from sora_jax.networks.vae.codec import VAE, Chunk, chunks
from sora_jax.pipeline.open_model import call
from sora_jax.process import Timings


class CodersOverMesh:
    """The networks around the transformer, whose weights every device of a mesh has, as functions of host arrays.

    Args:
      mesh: the devices.
      timings: receives the time of each stage.
      frame_batch: how many frames of so many pixels a device takes at a time.
    """

    def __init__(self, mesh: Mesh, timings: Timings, frame_batch: Callable[[int, int], int]):
        self._mesh, self._timings, self._frame_batch = mesh, timings, frame_batch

    def encode_text(
        self, t5: T5Encoder, ids_BL: Int[np.ndarray, "B L"], mask_BL: Bool[np.ndarray, "B L"]
    ) -> Float[np.ndarray, "B L E"]:
        """Returns the features of captions, each encoded on one device."""
        return self._dealt("text", _encode_text, (), t5, ids_BL, mask_BL)

    def decode(
        self, vae: VAE, z_BTHWC: Float[np.ndarray, "B T H W C"], num_frames: int, shown: Sequence[int] | None = None
    ) -> Float[np.ndarray, "B t h w 3"]:
        """Returns the frames of latents, or those that are ``shown``: over time by chunk, then every frame by itself."""
        side = vae.config.spatial.downsampling
        parts = chunks(vae.config, num_frames)
        x_BtHWC = self._by_chunk(
            parts, lambda chunk: z_BTHWC[:, chunk.latents], lambda chunk, x: self._decode_latents(vae, chunk, x)
        )
        if shown is not None:
            x_BtHWC = x_BtHWC[:, shown]
        frames = x_BtHWC.reshape(-1, 1, *x_BtHWC.shape[2:])
        static = (self._frame_batch(x_BtHWC.shape[2] * side, x_BtHWC.shape[3] * side),)
        return self._dealt("decode", _decode_frames, static, vae, frames).reshape(
            *x_BtHWC.shape[:2], x_BtHWC.shape[2] * side, x_BtHWC.shape[3] * side, 3
        )

    def encode(self, vae: VAE, video_Bthw3: Float[np.ndarray, "B t h w 3"]) -> Float[np.ndarray, "B T H W C"]:
        """Returns the latents of a video: every frame by itself, then over time by chunk."""
        batch, num_frames = video_Bthw3.shape[:2]
        frames = video_Bthw3.reshape(-1, 1, *video_Bthw3.shape[2:])
        static = (self._frame_batch(*video_Bthw3.shape[2:4]),)
        x = self._dealt("encode", _encode_frames, static, vae, frames)
        x_BtHWC = x.reshape(batch, num_frames, *x.shape[2:])
        return self._by_chunk(
            chunks(vae.config, num_frames),
            lambda chunk: x_BtHWC[:, chunk.frames],
            lambda _, x: self._dealt("encode", _encode_latents, (), vae, x),
        )

    def _decode_latents(self, vae: VAE, chunk: Chunk, z_BTHWC: np.ndarray) -> np.ndarray:
        return self._dealt("decode", _decode_latents, (chunk.num_frames,), vae, z_BTHWC)

    def _by_chunk(
        self,
        parts: Sequence[Chunk],
        cut: Callable[[Chunk], np.ndarray],
        compute: Callable[[Chunk, np.ndarray], np.ndarray],
    ) -> np.ndarray:
        """Returns what chunks [B, ...] become, one after the other in time; those of equal length go together as rows."""
        done: dict[int, np.ndarray] = {}
        for length in dict.fromkeys(chunk.num_frames for chunk in parts):
            alike = [i for i, chunk in enumerate(parts) if chunk.num_frames == length]
            rows = np.concatenate([cut(parts[i]) for i in alike])
            done |= zip(alike, np.split(compute(parts[alike[0]], rows), len(alike)), strict=True)
        return np.concatenate([done[i] for i in range(len(parts))], axis=1)

    def _dealt(
        self, stage: str, function: Callable[..., Any], static: tuple[Any, ...], network: Any, *rows: np.ndarray
    ) -> np.ndarray:
        """Returns ``function(*static, network, *rows)`` on the host, the rows dealt out among all devices."""
        spec = PartitionSpec(layout.DEVICES)
        placed = [place(filled(np.asarray(x), self._mesh.size), self._mesh, spec) for x in rows]
        computed = call(stage, self._timings, _on_each, (self._mesh, function, static), network, *placed)
        return whole(computed)[: len(rows[0])]


def _on_each(mesh: Mesh, function: Callable[..., Any], static: tuple[Any, ...], network: Any, *rows: jax.Array) -> jax.Array:
    return on_each(functools.partial(function, *static), mesh, network, *rows)


def _encode_text(t5: T5Encoder, ids_BL: Int[Array, "B L"], mask_BL: Bool[Array, "B L"]) -> Float[Array, "B L E"]:
    return t5(ids_BL, mask_BL)


def _decode_latents(num_frames: int, vae: VAE, z_BTHWC: Float[Array, "B T H W C"]) -> Float[Array, "B t H W C"]:
    return vae.decode_latents(z_BTHWC, num_frames)


def _decode_frames(frame_batch: int, vae: VAE, x_N1HWC: Float[Array, "N 1 H W C"]) -> Float[Array, "N 1 h w 3"]:
    return vae.decode_frames(x_N1HWC, frame_batch=frame_batch)


def _encode_frames(frame_batch: int, vae: VAE, video_N1hw3: Float[Array, "N 1 h w 3"]) -> Float[Array, "N 1 H W C"]:
    return vae.encode_frames(video_N1hw3, frame_batch=frame_batch)


def _encode_latents(vae: VAE, x_BtHWC: Float[Array, "B t H W C"]) -> Float[Array, "B T H W C"]:
    return vae.encode_latents(x_BtHWC)
