"""Training of pocket's transformer: rectified flow on cached latents, with captions worded anew at every use.

Latents of clips are computed once, by the finished codec, forwards and backwards in time.  Invariant: clip ``i`` of the
cache is the same whatever was cached before, so a cache may grow and an interrupted one is completed.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Bool, Float

from sora_jax.checkpoint import flatten, unflatten
from sora_jax.config import ModelConfig, STDiT3Config
from sora_jax.pocket.captions import caption
from sora_jax.pocket.fit import Params, Stage
from sora_jax.pocket.scenes import Scenes, render, sample_scenes
from sora_jax.pocket.train_codec import abstract_vae
from sora_jax.pocket.train_text import MAX_LENGTH, abstract_t5
from sora_jax.pocket.world import FPS, SIZE_PX, is_unseen
from sora_jax.schedule import resolution_shift
from sora_jax.sizes import LATENTS_PER_CHUNK
from sora_jax.stdit3 import STDiT3
from sora_jax.tokenizer import Tokenizer

NUM_FRAMES = 34
IMAGE_FPS = 120  # what Open-Sora tells the model about single images
SHARD = 64  # clips a file of the cache
CAPTION_DROP = 0.1
NOISY_LOGIT = 1.2  # mean logit of the noise share in half of the samples
# Samples with given latent frames: image-to-video and extension, and from them the model learns where things move: with
# nothing given, loss hardly depends on the direction that a caption names.
MASKED_SHARE = 0.5
LESSON_MASKED_SHARE = 0.75
LEARNING_RATE = 2e-3  # the highest, unless given
_REVERSED = {"left": "right", "right": "left", "up": "down", "down": "up", "grow": "shrink", "shrink": "grow", "still": "still"}


@dataclasses.dataclass(frozen=True)
class Clips:
    """Cached latents with what their captions may say.

    Attributes:
      z_NTHWC: latents of whole clips, float16.
      image_NHWC: latents of each clip's first frame, coded as a single image.
      attributes: all attributes of each clip.
    """

    z_NTHWC: np.ndarray
    image_NHWC: np.ndarray
    attributes: list[dict[str, str]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lesson:
    """Steps from ``start`` to before ``stop`` that see fast clips of some motions only."""

    start: int
    stop: int
    motions: tuple[str, ...]


@functools.cache
def abstract_stdit3(config: STDiT3Config) -> STDiT3:
    """Returns the transformer's shapes without arrays."""
    return jax.eval_shape(lambda: STDiT3(config, rngs=nnx.Rngs(0)))


def cache_clips(codec: Params, config: ModelConfig, directory: Path, *, num_clips: int, seed: int) -> Clips:
    """Returns latents of ``num_clips`` training clips and of their reversals, computing those that are not cached."""
    directory.mkdir(parents=True, exist_ok=True)
    encode = _encoder(config)
    shards = []
    for index in range(-(-num_clips // SHARD)):
        scenes = sample_scenes(np.random.default_rng([seed, 7, index]), SHARD)
        path = directory / f"{index:05d}.npz"
        if not path.exists():
            parts = [encode(codec, scenes[i : i + 8]) for i in range(0, SHARD, 8)]
            z, image = (np.concatenate([np.asarray(part[name], np.float16) for part in parts]) for name in ("z", "image"))
            partial = path.with_suffix(".partial.npz")
            np.savez(partial, z=z, image=image)
            partial.rename(path)
        with np.load(path) as stored:
            shards.append(_with_reversals(stored["z"], stored["image"], scenes))
    return Clips(
        np.concatenate([shard.z_NTHWC for shard in shards]),
        np.concatenate([shard.image_NHWC for shard in shards]),
        [one for shard in shards for one in shard.attributes],
    )


def _encoder(config: ModelConfig) -> Callable[[Params, Scenes], dict[str, jax.Array]]:
    @jax.jit
    def encode(codec: Params, scenes: Scenes) -> dict[str, jax.Array]:
        """Returns latents of the clips (axis 1: forwards, backwards) and of their first frames as images."""
        vae = unflatten(abstract_vae(config.vae), codec)
        clip_Bthw3 = render(scenes, np.arange(NUM_FRAMES, dtype=np.float32)[None])
        x_BtHWC = jnp.split(vae.spatial_moments(clip_Bthw3), 2, axis=-1)[0] * config.vae.spatial.scaling_factor
        size = config.vae.micro_frame_size

        def temporal(x: Float[Array, "B t H W C"]) -> Float[Array, "B T H W C"]:
            chunks = [vae.temporal_encoder(x[:, i : i + size]) for i in range(0, x.shape[1], size)]
            return vae.stats.normalise(jnp.split(jnp.concatenate(chunks, 1), 2, axis=-1)[0])

        clips = jnp.stack([temporal(x_BtHWC), temporal(x_BtHWC[:, ::-1])], 1)
        ends = x_BtHWC[:, [0, -1]]
        return {"z": clips, "image": jnp.stack([temporal(ends[:, :1])[:, 0], temporal(ends[:, 1:])[:, 0]], 1)}

    return encode


def _with_reversals(z: np.ndarray, image: np.ndarray, scenes: Scenes) -> Clips:
    """Returns the clips and those of their reversals whose combination is not kept out of training."""
    forwards = [scenes.attributes(i) for i in range(len(scenes))]
    backwards = [one | {"motion": _REVERSED[one["motion"]]} for one in forwards]
    keep = [not is_unseen(one["shape"], one["colour"], one["background"], one["motion"]) for one in backwards]
    return Clips(
        np.concatenate([z[:, 0], z[keep, 1]]),
        np.concatenate([image[:, 0], image[keep, 1]]),
        forwards + [one for one, kept in zip(backwards, keep, strict=True) if kept],
    )


def flow_stage(
    config: ModelConfig,
    clips: Clips,
    text: Params,
    tokenizer: Tokenizer,
    *,
    num_steps: int,
    batch_size: int,
    seed: int,
    evaluate: Callable[[Params], dict[str, float]],
    evaluate_every: int,
    lessons: Sequence[Lesson] = (),
    learning_rate: float = LEARNING_RATE,
    start: Params | None = None,
) -> Stage:
    """Returns the stage that trains the transformer, from nothing or from the parameters ``start``.

    During a lesson all samples are whole clips of fast motion at high noise, three in four with a latent frame given: where a
    caption's direction decides most of the loss.

    Times are ``training_times``; the target is data minus noise.  One step in eight is made of images, one of 17-frame
    clips (a clip's first chunk).
    """

    def init() -> Params:
        return flatten(STDiT3(config.stdit3, rngs=nnx.Rngs(seed))) if start is None else start

    everything = np.arange(len(clips.z_NTHWC))
    taught = [
        np.array(
            [i for i, one in enumerate(clips.attributes) if one.get("speed") == "fast" and one["motion"] in lesson.motions], int
        )
        for lesson in lessons
    ]

    def batch(step: int) -> dict[str, Any]:
        rng = np.random.default_rng([seed, 8, step])
        pools = [pool for lesson, pool in zip(lessons, taught, strict=True) if lesson.start <= step < lesson.stop]
        chosen = rng.choice(pools[0] if pools else everything, size=batch_size)
        kind = 1.0 if pools else rng.random()
        is_image = kind < 0.125
        z = clips.image_NHWC[chosen][:, None] if is_image else clips.z_NTHWC[chosen]
        if 0.125 <= kind < 0.25:
            z = z[:, : z.shape[1] // 2]
        shown = [clips.attributes[i] for i in chosen]
        if is_image:
            shown = [{name: value for name, value in one.items() if name not in ("motion", "speed")} for one in shown]
        ids_BL, mask_BL = tokenizer.encode([caption(one, rng)[0] for one in shown], MAX_LENGTH)
        return {
            "z": z.astype(np.float32),
            "ids": ids_BL,
            "mask": mask_BL,
            "drop": rng.random(batch_size) < CAPTION_DROP,
            "given": _given_frames(rng, batch_size, z.shape[1], share=LESSON_MASKED_SHARE if pools else MASKED_SHARE),
            "noisy": np.arange(batch_size) % 2 >= (0 if pools else 1),
            "fps": np.full(1, IMAGE_FPS if is_image else FPS, np.float32),
        }

    def loss(params: Params, batch: dict[str, Any], key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        model = unflatten(abstract_stdit3(config.stdit3), params)
        z = batch["z"]
        caption_BLE = unflatten(abstract_t5(config.t5), text)(batch["ids"], batch["mask"])
        caption_BLE = jnp.where(batch["drop"][:, None, None], model.null_caption_LE, jax.lax.stop_gradient(caption_BLE))
        num_frames = 1 if z.shape[1] == 1 else z.shape[1] // 5 * 17
        ratio = resolution_shift(height_px=SIZE_PX, width_px=SIZE_PX, num_frames=num_frames)
        t_B = training_times(key, batch["noisy"], ratio)
        noise = jax.random.normal(jax.random.fold_in(key, 1), z.shape)
        active_BT = ~batch["given"]
        t = jnp.where(active_BT, t_B[:, None], 0.0)[:, :, None, None, None]
        size = jnp.full(1, SIZE_PX, jnp.float32)
        out = model(
            (1 - t) * z + t * noise,
            t_B * 1000,
            caption_BLE,
            batch["mask"],
            fps_B=batch["fps"],
            height_px_B=size,
            width_px_B=size,
            frame_mask_BT=active_BT,
        )[..., : z.shape[-1]]
        error_BT = jnp.mean((out - (z - noise)) ** 2, axis=(2, 3, 4))
        return jnp.sum(error_BT * active_BT) / jnp.sum(active_BT), {}

    return Stage(
        name="flow",
        num_steps=num_steps,
        init=init,
        batch=batch,
        loss=loss,
        learning_rate=_rate(num_steps, learning_rate),
        average=0.995,
        evaluate=evaluate,
        evaluate_every=evaluate_every,
        save_every=250,
    )


def training_times(key: jax.Array, noisy_B: Bool[Array, "B"], ratio: float | np.ndarray) -> Float[Array, "B"]:
    """Returns the noise shares t in (0, 1) of one batch.

    Open-Sora 1.2's are logit-normal, then shifted by resolution and length.  At 64 x 64 pixels that shift (``ratio`` 0.4)
    leaves 2 % above t = 0.75, where sampling decides what moves where; ``noisy_B`` samples are logit-normal around 0.77
    instead, so that captions are learnt.
    """
    normal_B = jax.random.normal(key, noisy_B.shape)
    uniform_B = jax.nn.sigmoid(normal_B)
    shifted_B = ratio * uniform_B / (1 + (ratio - 1) * uniform_B)
    return jnp.where(noisy_B, jax.nn.sigmoid(normal_B + NOISY_LOGIT), shifted_B)


def _rate(num_steps: int, highest: float) -> optax.Schedule:
    """Returns the learning rate: constant after a warm-up, then a linear decay over the last fifth."""
    decay = num_steps // 5
    parts = [optax.warmup_constant_schedule(0.0, highest, 200), optax.linear_schedule(highest, highest / 100, decay)]
    return optax.join_schedules(parts, [num_steps - decay])


def _given_frames(rng: np.random.Generator, num: int, num_latents: int, *, share: float) -> np.ndarray:
    """Returns which latent frames are given, bool [B, T]: none, the first, the last, any one, or the first chunk of two."""
    given = np.zeros((num, num_latents), bool)
    if num_latents == 1:
        return given
    masked = rng.random(num) < share
    kind = rng.choice(4, size=num, p=(0.4, 0.15, 0.25, 0.2))
    one = np.where(kind == 1, num_latents - 1, np.where(kind == 2, rng.integers(num_latents, size=num), 0))
    given[np.arange(num), one] = masked
    if num_latents > LATENTS_PER_CHUNK:
        given[masked & (kind == 3), :LATENTS_PER_CHUNK] = True
    return given
