"""The networks around the transformer as functions of host arrays: captions to features, videos to latents and back.

Invariant: each call takes and returns host arrays.  Without a memory budget a network is in memory while a call runs; with
one it runs from its files (``streaming.host_loop``).  Features from the caption cache need no text encoder at all.
"""

import hashlib
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from sora_jax.config import policy_of
from sora_jax.devices import hosts
from sora_jax.networks.t5 import T5Encoder
from sora_jax.networks.vae.codec import VAE, chunks
from sora_jax.pipeline.coders_over_mesh import CodersOverMesh
from sora_jax.pipeline.open_model import Networks, call
from sora_jax.process import Timings
from sora_jax.streaming import host_loop
from sora_jax.streaming.memory_plan import MemoryPlan
from sora_jax.streaming.segment_loop import SegmentLoop

FRAME_PIXELS = 2**19  # that the spatial autoencoder in memory takes at a time: eight times `host_loop.FRAME_PIXELS`


class Coders:
    """The text encoder and the autoencoder of opened networks.

    Args:
      networks: the opened networks.
      dtype: compute dtype.
      timings: receives the time of each stage.
      plan: the memory plan, if there is a budget.
    """

    def __init__(self, networks: Networks, dtype: str, timings: Timings, plan: MemoryPlan | None):
        self._networks, self._dtype, self._timings, self._plan = networks, dtype, timings, plan

    def encode_text(self, ids_BL: Int[np.ndarray, "B L"], mask_BL: Bool[np.ndarray, "B L"]) -> Float[np.ndarray, "B L E"]:
        """Returns the features of padded captions; each caption that the cache lacks is encoded once.

        Raises:
          ModelDirectoryError: a parameter is missing or damaged.
        """
        cache = self._networks.caption_cache
        if cache is None:
            return self._encode_text(ids_BL, mask_BL)
        model = hashlib.sha256(self._networks.manifests["t5"].values_text().encode()).hexdigest()
        shared, writes = hosts.is_over_processes(self._networks.mesh), hosts.is_writer(self._networks.mesh)
        found = [cache.find(model, self._dtype, ids_L) if writes else None for ids_L in ids_BL]
        if shared:
            found = _of_the_writer(found)
        missing = [b for b, features in enumerate(found) if features is None]
        if missing:
            encoded = self._encode_text(ids_BL[missing], mask_BL[missing])
            for b, features in zip(missing, encoded, strict=True):
                if writes:
                    cache.keep(model, self._dtype, ids_BL[b], features)
                found[b] = features
        return np.stack([features for features in found if features is not None])

    def encode_videos(self, videos: Sequence[Float[np.ndarray, "_ _ _ _ 3"]]) -> list[Float[np.ndarray, "_ _ _ _ _"]]:
        """Returns the latents of videos [B, t, h, w, 3].

        Raises:
          ModelDirectoryError: a parameter is missing or damaged.
        """
        if self._plan is not None:
            loop = self._loop("vae", "encode")
            return [host_loop.encode(loop, video) for video in videos]
        with self._networks.use("vae", self._dtype, self._timings) as vae:
            if self._networks.mesh is not None:
                return [self._over_mesh.encode(vae, video) for video in videos]
            return [self._encode_video(vae, video) for video in videos]

    def decode(
        self, z_BTHWC: Float[np.ndarray, "B T H W C"], num_frames: int, shown: Sequence[int] | None = None
    ) -> Float[np.ndarray, "B t h w 3"]:
        """Returns the ``num_frames`` frames of latents, or those of them that are ``shown``, in ascending order.

        Raises:
          ModelDirectoryError: a parameter is missing or damaged.
        """
        if self._plan is not None:
            return host_loop.decode(self._loop("vae", "decode"), z_BTHWC, num_frames, shown)
        if self._networks.mesh is not None:
            with self._networks.use("vae", self._dtype, self._timings) as vae:
                return self._over_mesh.decode(vae, z_BTHWC, num_frames, shown)
        config = self._networks.config.vae
        side = config.spatial.downsampling
        batch = frame_batch(z_BTHWC.shape[2] * side, z_BTHWC.shape[3] * side)
        clips = []
        with self._networks.use("vae", self._dtype, self._timings) as vae:
            for chunk in chunks(config, num_frames):
                if own := chunk.own(shown):
                    static = chunk.num_frames, None if len(own) == chunk.num_frames else own, batch
                    given = static, vae, z_BTHWC[:, chunk.latents]
                    clips.append(np.asarray(call("decode", self._timings, decode_chunk, *given)))
        return np.concatenate(clips, axis=1)

    def _encode_text(self, ids_BL: np.ndarray, mask_BL: np.ndarray) -> np.ndarray:
        if self._plan is not None:
            return host_loop.encode_text(self._loop("t5", "text"), ids_BL, mask_BL)
        with self._networks.use("t5", self._dtype, self._timings) as t5:
            if self._networks.mesh is not None:
                return self._over_mesh.encode_text(t5, ids_BL, mask_BL)
            return np.asarray(call("text", self._timings, encode_text, (), t5, ids_BL, mask_BL))

    def _encode_video(self, vae: VAE, video_Bthw3: np.ndarray) -> np.ndarray:
        batch = frame_batch(*video_Bthw3.shape[2:4])
        clips = [
            call("encode", self._timings, _encode_chunk, (batch,), vae, video_Bthw3[:, chunk.frames])
            for chunk in chunks(self._networks.config.vae, video_Bthw3.shape[1])
        ]
        return np.concatenate([np.asarray(clip) for clip in clips], axis=1)

    @property
    def _over_mesh(self) -> CodersOverMesh:
        assert self._networks.mesh is not None
        return CodersOverMesh(self._networks.mesh, self._timings, frame_batch)

    def _loop(self, network: str, stage: str) -> SegmentLoop:
        networks, planned = self._networks, [s for s in self._plan.stages if s.name == stage] if self._plan else []
        return SegmentLoop(
            networks.manifests[network],
            policy_of(self._dtype),
            self._timings,
            forms=networks.forms(self._dtype),
            num_slots=planned[0].num_slots if planned else 1,
            profile=networks.profile,
        )


def _of_the_writer(found: Sequence[np.ndarray | None]) -> list[np.ndarray | None]:
    """Returns in every process what the one that writes found in its cache."""
    about = hosts.decided(lambda: [None if x is None else [x.dtype.name, *x.shape] for x in found])
    features: list[np.ndarray | None] = []
    for x, told in zip(found, about, strict=True):
        if told is None:
            features.append(None)
            continue
        data = hosts.same_bytes(b"" if x is None else np.ascontiguousarray(x).tobytes())
        features.append(np.frombuffer(data, jnp.dtype(told[0])).reshape(told[1:]))
    return features


def frame_batch(height: int, width: int) -> int:
    """Returns how many frames of so many pixels the spatial autoencoder in memory takes at a time."""
    return max(1, FRAME_PIXELS // (height * width))


def encode_text(t5: T5Encoder, ids_BL: Int[Array, "B L"], mask_BL: Bool[Array, "B L"]) -> Float[Array, "B L E"]:
    """Returns the features of captions; the program of the stage ``text``."""
    return t5(ids_BL, mask_BL)


def _encode_chunk(frame_batch: int, vae: VAE, video_Bthw3: Float[Array, "B t h w 3"]) -> Float[Array, "B T H W C"]:
    return vae.encode_chunk(video_Bthw3, frame_batch=frame_batch)


def decode_chunk(
    num_frames: int, shown: Sequence[int] | None, frame_batch: int, vae: VAE, z_BTHWC: Float[Array, "B T H W C"]
) -> Float[Array, "B t h w 3"]:
    """Returns the frames of one chunk of latents; the program of the stage ``decode``."""
    return vae.decode_chunk(z_BTHWC, num_frames, shown=shown, frame_batch=frame_batch)
