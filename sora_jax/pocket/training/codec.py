"""Training of pocket's codec: the spatial autoencoder on frames, the temporal one on 17-frame chunks, both decoders again.

Invariant: the last stage leaves latents as they are, so that a transformer stays right.  The complete spatial stage ends
with latents of unit variance (times the codec's scaling factor) and the complete temporal stage with exact ``stats``, so
that what the next stage sees is normalised whatever the seed.  Scenes are drawn anew for every step, nothing is stored.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float

from sora_jax.config import VAEConfig
from sora_jax.inputs.sizes import FRAMES_PER_CHUNK
from sora_jax.metrics import decibels
from sora_jax.networks.vae import VAE, split_moments
from sora_jax.pocket.training.fit import Params, Stage
from sora_jax.pocket.world.scenes import Scenes, all_frames, render, sample_scenes
from sora_jax.pocket.world.words import NUM_FRAMES
from sora_jax.storage.checkpoint import flatten, unflatten

SPATIAL_KL, TEMPORAL_KL = 1e-4, 1e-3
PIXELS_FROM = 200  # step of the temporal stage at which the pixel loss sets in; its full weight comes as many steps later
FIRST_LOGVAR = -5.0  # of the temporal posterior: at 0 its noise hides the signal for the first hundreds of steps
DECODED_FRAMES = 2  # of each chunk, whose pixels the decoders' own stage compares
_ENCODERS, _DECODERS = ("spatial_encoder", "temporal_encoder"), ("spatial_decoder", "temporal_decoder")
_SPATIAL, _TEMPORAL = ("spatial_encoder", "spatial_decoder"), ("temporal_encoder", *_DECODERS)


@functools.cache
def abstract_vae(config: VAEConfig) -> VAE:
    """Returns the codec's shapes without arrays."""
    return jax.eval_shape(lambda: VAE(config, rngs=nnx.Rngs(0)))


def modules(params: Params, config: VAEConfig, names: tuple[str, ...]) -> dict[str, Any]:
    """Returns the named parts of the codec, filled from flat parameters."""
    abstract = {name: getattr(abstract_vae(config), name) for name in names}
    return unflatten(abstract, {k: v for k, v in params.items() if k.startswith(names)})


def spatial_stage(config: VAEConfig, *, num_steps: int, batch_size: int, seed: int) -> Stage:
    """Returns the stage that trains the spatial autoencoder on single frames."""

    def init() -> Params:
        vae = VAE(config, rngs=nnx.Rngs(seed))
        return {k: v for k, v in flatten(vae).items() if k.startswith(_SPATIAL)}

    def loss(params: Params, batch: dict[str, Any], key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        parts = modules(params, config, _SPATIAL)
        frames_Nhw3 = render(batch["scenes"], batch["frames"])[:, 0]
        mean, logvar = split_moments(parts["spatial_encoder"](frames_Nhw3))
        z_NHWC = mean + jnp.exp(0.5 * logvar) * jax.random.normal(key, mean.shape)
        error = reconstruction_error(parts["spatial_decoder"](z_NHWC), frames_Nhw3)
        kl = divergence(mean, logvar)
        return error["l1"] + 2 * error["mse"] + SPATIAL_KL * kl, error | {"kl": kl}

    def evaluate(params: Params) -> dict[str, float]:
        batch = frame_batch(np.random.default_rng([seed, 1]), 256, split="unseen")
        return {"psnr": _spatial_psnr(config, params, batch["scenes"], batch["frames"])}

    return Stage(
        name="spatial",
        num_steps=num_steps,
        init=init,
        batch=lambda step: frame_batch(np.random.default_rng([seed, 2, step]), batch_size),
        loss=loss,
        learning_rate=optax.warmup_cosine_decay_schedule(0.0, 3e-3, 100, num_steps, 3e-5),
        average=0.995,
        evaluate=evaluate,
        evaluate_every=500,
    )


def temporal_stage(config: VAEConfig, spatial: Params, *, num_steps: int, batch_size: int, seed: int) -> Stage:
    """Returns the stage that trains the temporal autoencoder and the spatial decoder, behind the frozen encoder."""
    encoder = {k: v for k, v in spatial.items() if k.startswith("spatial_encoder")}
    rate = optax.warmup_cosine_decay_schedule(0.0, 2e-3, 50, num_steps, 2e-5)

    def init() -> Params:
        vae = VAE(config, rngs=nnx.Rngs(seed))
        fresh = {k: v for k, v in flatten(vae).items() if k.startswith(("temporal_encoder", "temporal_decoder"))}
        bias = fresh["temporal_encoder.quant_conv.bias"]
        fresh["temporal_encoder.quant_conv.bias"] = bias.at[len(bias) // 2 :].set(FIRST_LOGVAR)
        return fresh | {k: v for k, v in spatial.items() if k.startswith("spatial_decoder")}

    def loss(params: Params, batch: dict[str, Any], key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        parts = modules(params, config, _TEMPORAL)
        clip_Bthw3 = render(batch["scenes"], batch["frames"])
        target_BtHWC = jax.lax.stop_gradient(spatial_latents(encoder, config, clip_Bthw3))
        mean, logvar = split_moments(parts["temporal_encoder"](target_BtHWC))
        z_BTHWC = mean + jnp.exp(0.5 * logvar) * jax.random.normal(key, mean.shape)
        latent, error = _decoding_error(parts, config, z_BTHWC, target_BtHWC, clip_Bthw3, key, num_frames=1)
        kl = divergence(mean, logvar)
        pixels = batch["pixel_weight"] * (error["l1"] + 2 * error["mse"])
        total = latent["l1"] + latent["mse"] + pixels + TEMPORAL_KL * kl
        return total, error | {"latent_mse": latent["mse"], "kl": kl}

    def batch(step: int) -> dict[str, Any]:
        # pixels join once the latents are roughly right: before that their gradient is noise
        weight = np.float32(np.clip((step - PIXELS_FROM) / PIXELS_FROM, 0, 1))
        return chunk_batch(np.random.default_rng([seed, 4, step]), batch_size) | {"pixel_weight": weight}

    return Stage(
        name="temporal",
        num_steps=num_steps,
        init=init,
        batch=batch,
        loss=loss,
        learning_rate=rate,
        adam_rate=_adam_rate(rate),
        average=0.995,
        evaluate=functools.partial(_unseen_psnr, config, encoder, seed),
        evaluate_every=250,
    )


def decoder_stage(config: VAEConfig, codec: Params, *, num_steps: int, batch_size: int, seed: int) -> Stage:
    """Returns the stage that trains both decoders of a codec further, behind its frozen encoders."""
    encoders = {k: v for k, v in codec.items() if k.startswith(_ENCODERS)}
    rate = optax.warmup_cosine_decay_schedule(0.0, 1e-3, 50, num_steps, 1e-5)

    def loss(params: Params, batch: dict[str, Any], key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        clip_Bthw3 = render(batch["scenes"], batch["frames"])
        target_BtHWC = spatial_latents(encoders, config, clip_Bthw3)
        mean, logvar = split_moments(modules(encoders, config, ("temporal_encoder",))["temporal_encoder"](target_BtHWC))
        z_BTHWC = mean + jnp.exp(0.5 * logvar) * jax.random.normal(key, mean.shape)
        parts = modules(params, config, _DECODERS)
        latent, error = _decoding_error(parts, config, z_BTHWC, target_BtHWC, clip_Bthw3, key, num_frames=DECODED_FRAMES)
        return latent["l1"] + latent["mse"] + error["l1"] + 2 * error["mse"], error | {"latent_mse": latent["mse"]}

    return Stage(
        name="decoder",
        num_steps=num_steps,
        init=lambda: {k: v for k, v in codec.items() if k.startswith(_DECODERS)},
        batch=lambda step: chunk_batch(np.random.default_rng([seed, 9, step]), batch_size),
        loss=loss,
        learning_rate=rate,
        adam_rate=_adam_rate(rate),
        average=0.995,
        evaluate=functools.partial(_unseen_psnr, config, encoders, seed),
        evaluate_every=250,
        save_every=250,
    )


def _unseen_psnr(config: VAEConfig, frozen: Params, seed: int, params: Params) -> dict[str, float]:
    """Returns the scores of a codec whose trained parts are ``params``."""
    scenes = sample_scenes(np.random.default_rng([seed, 3]), 24, split="unseen")
    return {"psnr": codec_psnr(config, frozen | params, scenes)}


def _adam_rate(rate: optax.Schedule) -> optax.Schedule:
    """Returns AdamW's rate: at Muon's, the last convolution, which reads 864 numbers, would move by more than the signal."""
    return lambda step: 0.15 * rate(step)


def _decoding_error(
    parts: dict[str, Any],
    config: VAEConfig,
    z_BTHWC: Array,
    target_BtHWC: Array,
    clip_Bthw3: Array,
    key: jax.Array,
    *,
    num_frames: int,
) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """Returns the errors of all frames' spatial latents, decoded, and of the pixels of some frames of every clip."""
    num, length = clip_Bthw3.shape[:2]
    decoded_BtHWC = parts["temporal_decoder"](z_BTHWC, length)
    latent = reconstruction_error(decoded_BtHWC, target_BtHWC)
    chosen = jax.random.randint(jax.random.fold_in(key, 1), (num, num_frames), 0, length)
    rows = jnp.arange(num)[:, None]
    frames = parts["spatial_decoder"](jnp.concatenate(decoded_BtHWC[rows, chosen] / config.spatial.scaling_factor))
    return latent, reconstruction_error(frames, jnp.concatenate(clip_Bthw3[rows, chosen]))


def frame_batch(rng: np.random.Generator, num: int, *, split: Any = "training") -> dict[str, Any]:
    """Returns scenes and one random frame index each."""
    scenes = sample_scenes(rng, num, split=split)
    return {"scenes": scenes, "frames": rng.integers(0, NUM_FRAMES, (num, 1)).astype(np.float32)}


def chunk_batch(rng: np.random.Generator, num: int) -> dict[str, Any]:
    """Returns scenes and the frame indices of one chunk each, forwards or backwards in time.

    One step in eight is made of single frames, so that images and the reference of image-to-video are coded well.
    """
    scenes = sample_scenes(rng, num)
    if rng.random() < 0.125:
        return {"scenes": scenes, "frames": rng.integers(0, NUM_FRAMES, (num, 1)).astype(np.float32)}
    frames = np.arange(FRAMES_PER_CHUNK) + FRAMES_PER_CHUNK * rng.integers(0, 2, (num, 1))
    return {"scenes": scenes, "frames": np.where(rng.random((num, 1)) < 0.5, frames, frames[:, ::-1]).astype(np.float32)}


def spatial_latents(encoder: Params, config: VAEConfig, clip_Bthw3: Float[Array, "B t h w 3"]) -> Float[Array, "B t H W C"]:
    """Returns the scaled posterior means of every frame: what the temporal encoder reads."""
    spatial_encoder = modules(encoder, config, ("spatial_encoder",))["spatial_encoder"]
    mean, _ = split_moments(spatial_encoder(jnp.concatenate(clip_Bthw3)))
    return mean.reshape(*clip_Bthw3.shape[:2], *mean.shape[1:]) * config.spatial.scaling_factor


def divergence(mean: Float[Array, "*batch C"], logvar: Float[Array, "*batch C"]) -> Float[Array, ""]:
    """Returns the Kullback-Leibler divergence from the unit normal, in nats a latent number."""
    return 0.5 * jnp.mean(mean**2 + jnp.exp(logvar) - 1 - logvar)


def reconstruction_error(got: Float[Array, "*batch"], expected: Float[Array, "*batch"]) -> dict[str, jax.Array]:
    """Returns mean absolute and mean squared error."""
    return {"l1": jnp.mean(jnp.abs(got - expected)), "mse": jnp.mean((got - expected) ** 2)}


def unit_variance(params: Params, config: VAEConfig, *, seed: int) -> Params:
    """Returns the same autoencoder with latents rescaled so that ``scaling_factor`` times them has unit variance.

    The last map of the encoder is multiplied by a constant and the first of the decoder divided by it, so that
    reconstructions do not change.
    """
    batch = frame_batch(np.random.default_rng([seed, 5]), 256)
    encoder = {k: v for k, v in params.items() if k.startswith("spatial_encoder")}
    z = jax.jit(lambda s, f: spatial_latents(encoder, config, render(s, f)))(batch["scenes"], batch["frames"])
    gain = 1.0 / jnp.std(z)
    channels = config.spatial.latent_channels
    scaled = dict(params)
    kernel, bias = "spatial_encoder.quant_conv.kernel", "spatial_encoder.quant_conv.bias"
    is_mean = jnp.arange(2 * channels) < channels
    scaled[kernel] = params[kernel] * jnp.where(is_mean, gain, 1.0)
    # the log-variances grow by twice the logarithm of the gain
    scaled[bias] = jnp.where(is_mean, params[bias] * gain, params[bias] + 2 * jnp.log(gain))
    scaled["spatial_decoder.post_quant_conv.kernel"] = params["spatial_decoder.post_quant_conv.kernel"] / gain
    return scaled


def with_stats(params: Params, config: VAEConfig, *, seed: int) -> Params:
    """Returns the complete codec: ``stats`` hold mean and standard deviation of the latents of 256 training clips."""
    rng = np.random.default_rng([seed, 6])
    neutral = {"stats.shift": jnp.zeros(config.temporal.embed_dim), "stats.scale": jnp.ones(config.temporal.embed_dim)}
    encode = jax.jit(lambda params, scenes: unflatten(abstract_vae(config), params).encode(render(scenes, all_frames())))
    z = np.concatenate([encode(params | neutral, sample_scenes(rng, 16)) for _ in range(16)])
    axes = tuple(range(z.ndim - 1))
    return params | {"stats.shift": jnp.asarray(z.mean(axes)), "stats.scale": jnp.asarray(z.std(axes))}


def codec_psnr(config: VAEConfig, params: Params, scenes: Scenes) -> float:
    """Returns the PSNR in dB of 34-frame clips coded and decoded, eight at a time (peak 2, the range of a pixel)."""
    neutral = {"stats.shift": jnp.zeros(config.temporal.embed_dim), "stats.scale": jnp.ones(config.temporal.embed_dim)}
    params = neutral | params
    errors = [_codec_error(config, params, scenes[i : i + 8]) for i in range(0, len(scenes), 8)]
    return decibels(float(np.mean(errors)), peak=2.0)


@functools.partial(jax.jit, static_argnums=0)
def _codec_error(config: VAEConfig, params: Params, scenes: Scenes) -> jax.Array:
    vae, clip = unflatten(abstract_vae(config), params), render(scenes, all_frames())
    decoded = jnp.clip(vae.decode(vae.encode(clip), clip.shape[1]), -1, 1)
    return jnp.mean((decoded - clip) ** 2)


def _spatial_psnr(config: VAEConfig, params: Params, scenes: Scenes, frames: np.ndarray) -> float:
    return decibels(float(_spatial_error(config, params, scenes, frames)), peak=2.0)


@functools.partial(jax.jit, static_argnums=0)
def _spatial_error(config: VAEConfig, params: Params, scenes: Scenes, frames: np.ndarray) -> jax.Array:
    parts, frames_Nhw3 = modules(params, config, _SPATIAL), render(scenes, frames)[:, 0]
    mean, _ = split_moments(parts["spatial_encoder"](frames_Nhw3))
    return jnp.mean((jnp.clip(parts["spatial_decoder"](mean), -1, 1) - frames_Nhw3) ** 2)
