"""The video autoencoder of Open-Sora 1.2: spatial (frame by frame), temporal (causal), and their micro-frame codec."""

from sora_jax.networks.vae.codec import VAE, Chunk, LatentStats, chunks, latent_size, sample_posterior, split_moments
from sora_jax.networks.vae.spatial import SpatialDecoder, SpatialEncoder
from sora_jax.networks.vae.temporal import TemporalDecoder, TemporalEncoder

__all__ = [
    "VAE",
    "Chunk",
    "LatentStats",
    "SpatialDecoder",
    "SpatialEncoder",
    "TemporalDecoder",
    "TemporalEncoder",
    "chunks",
    "latent_size",
    "sample_posterior",
    "split_moments",
]
