"""Video to latents and back: both autoencoders, the micro-frame chunks, and the statistics that normalise latents.

Invariant: chunks are independent, so a host loop over ``encode_chunk`` or ``decode_chunk`` gives what ``encode`` and
``decode`` give; `VAE.decode_segments` and `VAE.encode_segments` are the whole of a chunk's forward, cut.  Nothing here reads
files, clips pixels or converts them to bytes.

Source: Open-Sora v1.2 vae.py VideoAutoencoderPipeline.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple, overload

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray

from sora_jax.config import FLOAT32, DTypePolicy, VAEConfig
from sora_jax.networks.forms import WHOLE, Forms
from sora_jax.networks.layers import lifted
from sora_jax.networks.segment import Segment
from sora_jax.networks.vae.spatial import SpatialDecoder, SpatialEncoder
from sora_jax.networks.vae.temporal import TemporalDecoder, TemporalEncoder


@overload
def latent_size(config: VAEConfig, num_frames: int, height: int, width: int) -> tuple[int, int, int]: ...
@overload
def latent_size(config: VAEConfig, num_frames: None, height: int, width: int) -> tuple[None, int, int]: ...
def latent_size(config: VAEConfig, num_frames: int | None, height: int, width: int) -> tuple[int | None, int, int]:
    """Returns latent frames, rows and columns of a video; frames ``None`` stay ``None``.

    Source: Open-Sora v1.2 vae.py VideoAutoencoderPipeline.get_latent_size.
    """
    side = config.spatial.downsampling
    if num_frames is None:
        return None, height // side, width // side
    return _num_latents(config, num_frames), height // side, width // side


class Chunk(NamedTuple):
    """Where a chunk lies in the video and in the latents; ``num_frames`` is its length in frames."""

    frames: slice
    latents: slice
    num_frames: int

    def own(self, frames: Sequence[int] | None) -> tuple[int, ...]:
        """Returns those of a video's frames (None: all) that lie in the chunk, counted from its first."""
        if frames is None:
            return tuple(range(self.num_frames))
        return tuple(frame - self.frames.start for frame in frames if self.frames.start <= frame < self.frames.stop)


def chunks(config: VAEConfig, num_frames: int) -> list[Chunk]:
    """Returns the chunks of a video, each of ``micro_frame_size`` frames but the last, which may be shorter.

    Raises:
      ValueError: there is no frame.
    """
    if num_frames < 1:
        raise ValueError(f"num_frames {num_frames} is no video; expected at least 1.")
    starts = range(0, num_frames, config.micro_frame_size)
    ends = [min(start + config.micro_frame_size, num_frames) for start in starts]
    return [
        Chunk(slice(start, end), slice(_num_latents(config, start), _num_latents(config, end)), end - start)
        for start, end in zip(starts, ends, strict=True)
    ]


def split_moments(moments: Float[Array, "*batch moments"]) -> tuple[Float[Array, "*batch C"], Float[Array, "*batch C"]]:
    """Returns mean and log variance (clipped to [-30, 20]) of a posterior, in float32."""
    mean, logvar = jnp.split(moments.astype(jnp.float32), 2, axis=-1)
    return mean, jnp.clip(logvar, -30.0, 20.0)


def sample_posterior(moments: Float[Array, "*batch moments"], key: PRNGKeyArray | None) -> Float[Array, "*batch C"]:
    """Returns a draw from the posterior, or its mean where ``key`` is None."""
    mean, logvar = split_moments(moments)
    if key is None:
        return mean
    return mean + jnp.exp(0.5 * logvar) * jax.random.normal(key, mean.shape, jnp.float32)


class LatentStats(nnx.Module):
    """Shift and scale of each latent channel: normalised = (latent - shift) / scale."""

    def __init__(self, channels: int, *, policy: DTypePolicy):
        self.shift = nnx.Param(jnp.zeros(channels, policy.param))
        self.scale = nnx.Param(jnp.ones(channels, policy.param))

    def normalise(self, z: Float[Array, "*batch C"]) -> Float[Array, "*batch C"]:
        """Returns the latents the diffusion transformer works on."""
        return (z - lifted(self.shift[...].astype(z.dtype), z.ndim)) / lifted(self.scale[...].astype(z.dtype), z.ndim)

    def restore(self, z: Float[Array, "*batch C"]) -> Float[Array, "*batch C"]:
        """Returns the latents the temporal decoder works on."""
        return z * lifted(self.scale[...].astype(z.dtype), z.ndim) + lifted(self.shift[...].astype(z.dtype), z.ndim)


class VAE(nnx.Module):
    """The video autoencoder: float32 in and out, policy dtypes inside.

    ``frame_batch`` bounds how many frames the spatial networks hold at a time (None: a whole chunk); it changes memory,
    not results beyond rounding.
    """

    def __init__(self, config: VAEConfig, *, policy: DTypePolicy = FLOAT32, forms: Forms = WHOLE, rngs: nnx.Rngs):
        self.config = config
        self.temporal_encoder = TemporalEncoder(config.temporal, policy=policy, rngs=rngs)
        self.temporal_decoder = TemporalDecoder(config.temporal, policy=policy, rngs=rngs)
        self.spatial_encoder = SpatialEncoder(config.spatial, policy=policy, forms=forms, rngs=rngs)
        self.spatial_decoder = SpatialDecoder(config.spatial, policy=policy, forms=forms, rngs=rngs)
        self.stats = LatentStats(config.temporal.embed_dim, policy=policy)

    def encode(
        self, video_Bthw3: Float[Array, "B t h w 3"], *, key: PRNGKeyArray | None = None, frame_batch: int | None = None
    ) -> Float[Array, "B T H W C"]:
        """Returns normalised latents of a video in [-1, 1]: the posterior means, or draws where a key is given.

        Chunk j draws with ``fold_in(key, j)``.
        """
        latents = []
        for j, chunk in enumerate(chunks(self.config, video_Bthw3.shape[1])):
            chunk_key = None if key is None else jax.random.fold_in(key, j)
            latents.append(self.encode_chunk(video_Bthw3[:, chunk.frames], key=chunk_key, frame_batch=frame_batch))
        return jnp.concatenate(latents, axis=1)

    def decode(
        self, z_BTHWC: Float[Array, "B T H W C"], num_frames: int, *, frame_batch: int | None = None
    ) -> Float[Array, "B t h w 3"]:
        """Returns the ``num_frames`` frames of normalised latents, nominally in [-1, 1] and not clipped.

        Raises:
          ValueError: ``num_frames`` frames do not have T latents.
        """
        whole = chunks(self.config, num_frames)
        expected, got = whole[-1].latents.stop, z_BTHWC.shape[1]
        if expected != got:
            raise ValueError(
                f"num_frames {num_frames} has {expected} latent frames, got {got}; "
                f"{got} latent frames decode to num_frames {_num_frames_of(self.config, got)}."
            )
        clips = [self.decode_chunk(z_BTHWC[:, chunk.latents], chunk.num_frames, frame_batch=frame_batch) for chunk in whole]
        return jnp.concatenate(clips, axis=1)

    def encode_chunk(
        self, video_Bthw3: Float[Array, "B t h w 3"], *, key: PRNGKeyArray | None = None, frame_batch: int | None = None
    ) -> Float[Array, "B T H W C"]:
        """Returns normalised latents of one chunk.

        Raises:
          ValueError: the chunk is longer than ``micro_frame_size`` frames.
        """
        self._check_chunk(video_Bthw3.shape[1])
        spatial_key, temporal_key = (None, None) if key is None else jax.random.split(key)
        return self.encode_latents(self.encode_frames(video_Bthw3, key=spatial_key, frame_batch=frame_batch), key=temporal_key)

    def encode_frames(
        self, video_Bthw3: Float[Array, "B t h w 3"], *, key: PRNGKeyArray | None = None, frame_batch: int | None = None
    ) -> Float[Array, "B t H W C"]:
        """Returns scaled spatial latents, frame by frame: the first half of ``encode_chunk``."""
        return self.scale_spatial(sample_posterior(self.spatial_moments(video_Bthw3, frame_batch=frame_batch), key))

    def encode_latents(
        self, x_BtHWC: Float[Array, "B t H W C"], *, key: PRNGKeyArray | None = None
    ) -> Float[Array, "B T H W C"]:
        """Returns normalised latents of a chunk's scaled spatial latents: the second half of ``encode_chunk``."""
        return self.normalise_moments(self.temporal_encoder(x_BtHWC), key=key)

    def normalise_moments(
        self, moments_BTHWM: Float[Array, "B T H W moments"], *, key: PRNGKeyArray | None = None
    ) -> Float[Array, "B T H W C"]:
        """Returns normalised latents of what the temporal encoder returns: the posterior means, or draws."""
        return self.stats.normalise(sample_posterior(moments_BTHWM, key))

    @staticmethod
    def encode_segments(config: VAEConfig) -> list[Segment]:
        """Returns ``encode_chunk`` without a key, cut: the first segment treats each frame apart, the others the chunk."""
        return [
            Segment(VAE.encode_frames, parts=("spatial_encoder",)),
            *(segment.inside("temporal_encoder") for segment in TemporalEncoder.segments(config.temporal)),
            Segment(VAE.normalise_moments, parts=("stats",)),
        ]

    def decode_chunk(
        self,
        z_BTHWC: Float[Array, "B T H W C"],
        num_frames: int,
        *,
        shown: Sequence[int] | None = None,
        frame_batch: int | None = None,
    ) -> Float[Array, "B t h w 3"]:
        """Returns the ``num_frames`` frames of one chunk of normalised latents, or those of them that are ``shown``.

        Raises:
          ValueError: the chunk is longer than ``micro_frame_size`` frames, or does not have T latents.
        """
        self._check_chunk(num_frames)
        x_BtHWC = self.decode_latents(z_BTHWC, num_frames)
        return self.decode_frames(x_BtHWC if shown is None else x_BtHWC[:, np.asarray(shown)], frame_batch=frame_batch)

    def decode_latents(self, z_BTHWC: Float[Array, "B T H W C"], num_frames: int) -> Float[Array, "B t H W C"]:
        """Returns scaled spatial latents of a chunk's normalised latents: the first half of ``decode_chunk``."""
        return self.temporal_decoder(self.stats.restore(z_BTHWC), num_frames)

    @staticmethod
    def decode_segments(config: VAEConfig, num_frames: int) -> list[Segment]:
        """Returns ``decode_chunk`` for ``num_frames`` frames, cut: the last segment treats each frame apart."""
        return [
            Segment(LatentStats.restore, ("stats",)),
            *(segment.inside("temporal_decoder") for segment in TemporalDecoder.segments(config.temporal, num_frames)),
            Segment(VAE.decode_frames, parts=("spatial_decoder",)),
        ]

    def spatial_moments(
        self, video_Bthw3: Float[Array, "B t h w 3"], *, frame_batch: int | None = None
    ) -> Float[Array, "B t H W moments"]:
        """Returns mean and log variance of each frame's unscaled spatial latents, in float32."""
        return _by_frame(self.spatial_encoder, video_Bthw3, frame_batch)

    def scale_spatial(self, z: Float[Array, "*batch C"]) -> Float[Array, "*batch C"]:
        """Returns spatial latents in the scale the temporal autoencoder works in."""
        return z * self.config.spatial.scaling_factor

    def decode_frames(self, x_BtHWC: Float[Array, "B t H W C"], *, frame_batch: int | None = None) -> Float[Array, "B t h w 3"]:
        """Returns the pixels of scaled spatial latents, frame by frame, in float32."""
        return _by_frame(self.spatial_decoder, x_BtHWC / self.config.spatial.scaling_factor, frame_batch)

    def _check_chunk(self, num_frames: int) -> None:
        if not 1 <= num_frames <= self.config.micro_frame_size:
            raise ValueError(
                f"num_frames {num_frames} is no chunk; expected 1 to {self.config.micro_frame_size} "
                f"(longer videos: encode and decode, or a loop over chunks)."
            )


def _by_frame(network: Callable[[jax.Array], jax.Array], clip: jax.Array, frame_batch: int | None) -> jax.Array:
    frames = rearrange(clip, "B t ... -> (B t) ...")
    if frame_batch is None or frame_batch >= len(frames):
        out = network(frames)
    else:
        out = jax.lax.map(lambda frame: network(frame[None])[0], frames, batch_size=frame_batch)
    return rearrange(out.astype(jnp.float32), "(B t) ... -> B t ...", B=len(clip))


def _num_latents(config: VAEConfig, num_frames: int) -> int:
    whole, rest = divmod(num_frames, config.micro_frame_size)
    step = config.temporal.downsampling
    return whole * -(-config.micro_frame_size // step) + -(-rest // step)


def _num_frames_of(config: VAEConfig, num_latents: int) -> str:
    most = num_latents * config.temporal.downsampling
    valid = [str(n) for n in range(1, most + 1) if _num_latents(config, n) == num_latents]
    return ", ".join(valid) or "none"
