"""Training of pocket's transformer: rectified flow on cached latents, with captions worded anew at every use.

Invariant: a batch depends on its step and the seed only, so that an interrupted training continues as if it had not been
interrupted.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Bool, Float

from sora_jax.config import ModelConfig, STDiT3Config
from sora_jax.inputs.sizes import LATENTS_PER_CHUNK, frames_of_latents
from sora_jax.inputs.tokenizer import Tokenizer
from sora_jax.networks.stdit3 import STDiT3
from sora_jax.pocket.training.fit import Params, Stage
from sora_jax.pocket.training.latents import Clips
from sora_jax.pocket.training.recipe import LEARNING_RATE
from sora_jax.pocket.training.text import MAX_LENGTH, abstract_t5
from sora_jax.pocket.world.captions import caption
from sora_jax.pocket.world.words import FPS, SIZE_PX
from sora_jax.sampling.schedule import resolution_shift
from sora_jax.storage.checkpoint import flatten, unflatten

IMAGE_FPS = 120  # what Open-Sora tells the model about single images
CAPTION_DROP = 0.1  # share of the captions that the null caption replaces
# Share of the others that say nothing.  An empty prompt is a caption of its own, not the null one, and shows quiet clips:
# while it stood for any clip, one in three was undecided about what moves where.
EMPTY_SHARE = 0.06
QUIET = {"motion": ("still",), "shading": ("plain",)}
LONG_FRAMES = 51
# Shares of the steps that are made of images, of a clip's first chunk and of long clips; the rest are whole clips.
IMAGE_SHARE, CHUNK_SHARE, LONG_SHARE = 0.2, 0.1, 0.08
NOISY_LOGIT = 1.2  # mean logit of the noise share in half of the samples
# Samples with reference frames: image-to-video and extension.  From them the model learns where things move: without them, loss
# hardly depends on the direction that a caption names.
MASKED_SHARE = 0.5
LESSON_MASKED_SHARE = 0.75


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lesson:
    """Steps from ``start`` to before ``stop`` that see fast clips of some motions only."""

    start: int
    stop: int
    motions: tuple[str, ...]

    @property
    def steps(self) -> range:
        """The steps of the lesson."""
        return range(self.start, self.stop)


@functools.cache
def abstract_stdit3(config: STDiT3Config) -> STDiT3:
    """Returns the transformer's shapes without arrays."""
    return jax.eval_shape(lambda: STDiT3(config, rngs=nnx.Rngs(0)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Batches:
    """The transformer's batches, each a function of its step: latents of one shape, worded captions, reference frames.

    Besides whole clips, steps are made of images, of 17-frame clips (a clip's first chunk) and of ``long_clips``.  During a
    lesson all samples are whole clips of fast motion at high noise, three in four with a reference frame: there a caption's
    direction decides most of the loss.
    """

    clips: Clips
    long_clips: Clips
    tokenizer: Tokenizer
    size: int
    seed: int
    lessons: Sequence[Lesson] = ()

    def __call__(self, step: int) -> dict[str, Any]:
        """Returns the batch of a step."""
        rng = np.random.default_rng([self.seed, 8, step])
        taught = [taught for lesson, taught in zip(self.lessons, self._taught, strict=True) if step in lesson.steps]
        is_image, is_chunk, is_long = (False, False, False) if taught else _kind(rng)
        source = self.long_clips if is_long else self.clips
        chosen = rng.choice(taught[0] if taught else len(source.attributes), size=self.size)
        empty = (rng.random(self.size) < EMPTY_SHARE) & (not taught)
        chosen[empty] = rng.choice(self._quiet[is_long], size=int(empty.sum()))
        z = source.image_NHWC[chosen][:, None] if is_image else source.z_NTHWC[chosen]
        if is_chunk:
            z = z[:, :LATENTS_PER_CHUNK]
        ids_BL, mask_BL = self._captions(
            [{} if says_nothing else source.attributes[i] for i, says_nothing in zip(chosen, empty, strict=True)],
            rng,
            of_images=is_image,
        )
        return {
            "z": z.astype(np.float32),
            "ids": ids_BL,
            "mask": mask_BL,
            "drop": rng.random(self.size) < CAPTION_DROP,
            "given": _given_frames(rng, self.size, z.shape[1], share=LESSON_MASKED_SHARE if taught else MASKED_SHARE),
            "noisy": np.arange(self.size) % 2 >= (0 if taught else 1),
            "fps": np.full(1, IMAGE_FPS if is_image else FPS, np.float32),
        }

    @functools.cached_property
    def _taught(self) -> list[np.ndarray]:
        """The clips of every lesson."""
        return [self.clips.where(motion=lesson.motions, speed=("fast",)) for lesson in self.lessons]

    @functools.cached_property
    def _quiet(self) -> tuple[np.ndarray, np.ndarray]:
        """What empty captions show, of the clips and of the long ones."""
        return self.clips.where(**QUIET), self.long_clips.where(**QUIET)

    def _captions(
        self, shown: Sequence[dict[str, str]], rng: np.random.Generator, *, of_images: bool
    ) -> tuple[np.ndarray, np.ndarray]:
        """Returns tokens and mask of captions: empty ones for clips that show nothing, and without a motion for images."""
        unseen = ("motion", "speed") if of_images else ()
        told = [{name: value for name, value in one.items() if name not in unseen} for one in shown]
        return self.tokenizer.encode([caption(one, rng)[0] if one else "" for one in told], MAX_LENGTH)


def flow_stage(
    config: ModelConfig,
    text: Params,
    batches: Batches,
    *,
    num_steps: int,
    evaluate: Callable[[Params], dict[str, float]],
    evaluate_every: int,
    learning_rate: float = LEARNING_RATE,
    start: Params | None = None,
) -> Stage:
    """Returns the stage that trains the transformer, from scratch or from the parameters ``start``."""

    def init() -> Params:
        return flatten(STDiT3(config.stdit3, rngs=nnx.Rngs(batches.seed))) if start is None else start

    return Stage(
        name="flow",
        num_steps=num_steps,
        init=init,
        batch=batches,
        loss=functools.partial(flow_loss, config, text),
        learning_rate=_rate(num_steps, learning_rate),
        average=0.995,
        evaluate=evaluate,
        evaluate_every=evaluate_every,
        save_every=250,
    )


def flow_loss(
    config: ModelConfig, text: Params, params: Params, batch: dict[str, Any], key: jax.Array
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Returns the mean squared error of the velocity, data minus noise, over the frames that are not references.

    Times are `training_times`; reference frames have time 0, as in image-to-video.
    """
    model, z = unflatten(abstract_stdit3(config.stdit3), params), batch["z"]
    caption_BLE = unflatten(abstract_t5(config.t5), text)(batch["ids"], batch["mask"])
    caption_BLE = jnp.where(batch["drop"][:, None, None], model.null_caption_LE, jax.lax.stop_gradient(caption_BLE))
    num_frames = 1 if z.shape[1] == 1 else frames_of_latents(z.shape[1])
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


def _kind(rng: np.random.Generator) -> tuple[bool, bool, bool]:
    """Returns whether a step is made of images, of first chunks, of long clips; else of whole clips."""
    edges = np.cumsum((IMAGE_SHARE, CHUNK_SHARE, LONG_SHARE))
    kind = int(np.searchsorted(edges, rng.random(), side="right"))
    return kind == 0, kind == 1, kind == 2


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
    """Returns which latent frames are fixed, bool [B, T]: none, the first, the last, any one, or the first chunk of two."""
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
