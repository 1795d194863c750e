"""Captions of unseen combinations, and clips for them: rendered, through the codec, or made by the model.

Invariant: caption ``i`` depends on the seed and ``i`` alone, so two models, or two samplers, get the same captions, and a
short list is the beginning of a longer one.  Measuring and scoring are ``measure``'s and ``scores``' work.
"""

import contextlib
import dataclasses
import os
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, UInt8

from sora_jax.config import policy_of
from sora_jax.devices.compute_dtype import choose_dtype
from sora_jax.devices.names import AUTO
from sora_jax.inputs.sizes import FRAMES_PER_CHUNK, LATENTS_PER_CHUNK
from sora_jax.networks.vae.codec import VAE
from sora_jax.pipeline import video
from sora_jax.pipeline.clip_options import Options
from sora_jax.pipeline.model_file import model_path
from sora_jax.pipeline.pipeline import Pipeline
from sora_jax.pocket.world.captions import caption
from sora_jax.pocket.world.scenes import Scenes, all_frames, render_uint8, sample_scenes
from sora_jax.pocket.world.words import FPS, NUM_FRAMES, SIZE_PX
from sora_jax.sampling.sampler import Trace
from sora_jax.storage.checkpoint import load_network, unflatten

BATCH = 16  # clips rendered, coded or generated at a time

_OTHER_SPEED = {"slowly": "quickly", "gently": "rapidly", "quickly": "slowly", "rapidly": "gently", "fast": "slowly"}

ModelPath = str | os.PathLike[str] | None  # None: the embedded model
Frames = UInt8[np.ndarray, "t h w 3"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Asked:
    """One caption.

    Attributes:
      text: the caption.
      attributes: what it names.
      seed: noise of the clip.
      scene: a batch of one scene that the caption describes.
      num_frames: length of the requested clip; 1 is a single image.
    """

    text: str
    attributes: Mapping[str, str]
    seed: int
    scene: Scenes
    num_frames: int = NUM_FRAMES

    @property
    def shown(self) -> dict[str, str]:
        """All attributes of the scene that so many frames show; a single image shows neither motion nor speed."""
        return _shown(self.scene, self.num_frames)


MODEL_DEFAULTS: Options = {}  # how clips are sampled, in the pipeline's words


@dataclasses.dataclass(frozen=True, kw_only=True)
class Made:
    """One generated clip.

    Attributes:
      asked: the caption.
      frames_thw3: the clip.
      cosine_N: cosine of each step's velocity and the one before; NaN where the two cannot be compared or no step was taken.
      evaluations: velocity evaluations that went into the clip.
      parameters: everything it was made from, as the pipeline records it.
    """

    asked: Asked
    frames_thw3: Frames
    cosine_N: Float[np.ndarray, " N"]
    evaluations: float
    parameters: Mapping[str, Any]


def captions(num: int, *, seed: int, num_frames: int = NUM_FRAMES) -> list[Asked]:
    """Returns the first ``num`` captions of a seed, of scenes whose combinations were kept out of training.

    The objects stay inside the frame for ``num_frames``.
    """
    return [_caption(i, stream=9, seed=seed, num_frames=num_frames) for i in range(num)]


def empty_captions(num: int, *, seed: int) -> list[Asked]:
    """Returns empty captions, which name nothing, each with its own noise; the scenes are those of ``captions``."""
    return [dataclasses.replace(one, text="", attributes={}) for one in captions(num, seed=seed)]


def speed_pairs(num: int, *, seed: int, num_frames: int = NUM_FRAMES) -> tuple[list[Asked], list[Asked]]:
    """Returns captions with a slow and with a fast motion; two of a pair differ in that one word and share their noise.

    The scene of both is that of the caption that was drawn first.

    Raises:
      ValueError: single images are asked for, which have no speed.
    """
    if num_frames == 1:
        raise ValueError("num_frames is 1, and a single image has no speed; expected 2 or more.")
    slow: list[Asked] = []
    fast: list[Asked] = []
    index = 0
    while len(slow) < num:
        one = _caption(index, stream=10, seed=seed, num_frames=num_frames)
        index += 1
        if "speed" in one.attributes:
            one = dataclasses.replace(one, seed=seed + len(slow))
            pair = sorted((one, with_other_speed(one)), key=lambda asked: asked.attributes["speed"] == "fast")
            slow.append(pair[0])
            fast.append(pair[1])
    return slow, fast


def with_other_speed(asked: Asked) -> Asked:
    """Returns the same caption except for the word that names its speed."""
    text = re.sub("|".join(_OTHER_SPEED), lambda word: _OTHER_SPEED[word.group()], asked.text)
    speed = {"slow": "fast", "fast": "slow"}[asked.attributes["speed"]]
    return dataclasses.replace(asked, text=text, attributes={**asked.attributes, "speed": speed})


def _caption(index: int, *, stream: int, seed: int, num_frames: int) -> Asked:
    rng = np.random.default_rng([seed, stream, index])
    scene = sample_scenes(rng, 1, split="unseen", num_frames=num_frames)
    text, named = caption(_shown(scene, num_frames), rng)
    return Asked(text=text, attributes=named, seed=seed + index, scene=scene, num_frames=num_frames)


def _shown(scene: Scenes, num_frames: int) -> dict[str, str]:
    timeless = {"motion", "speed"} if num_frames == 1 else set()
    return {name: value for name, value in scene.attributes(0).items() if name not in timeless}


def rendered(asked: Sequence[Asked]) -> Iterator[Frames]:
    """Yields the clip of each caption's scene as the renderer draws it; all captions ask for as many frames."""
    for start in range(0, len(asked), BATCH):
        batch = asked[start : start + BATCH]
        yield from np.asarray(render_uint8(_joined([one.scene for one in batch]), all_frames(batch[0].num_frames)))


def reconstructed(model: ModelPath, asked: Sequence[Asked], *, dtype: str | None = None) -> Iterator[tuple[Frames, Frames]]:
    """Yields each rendered clip and its reconstruction by the model's codec; other networks may be missing.

    Raises:
      ModelDirectoryError: the codec is missing or damaged.
    """
    config, flat = load_network(model_path(model), "vae")
    policy = policy_of(choose_dtype(dtype or AUTO, platform=jax.default_backend()))
    vae = unflatten(jax.eval_shape(lambda: VAE(config, policy=policy, rngs=nnx.Rngs(0))), flat)
    vae = jax.device_put(vae)
    for start in range(0, len(asked), BATCH):
        clips = np.stack(list(rendered(asked[start : start + BATCH])))
        coded = np.asarray(_code(vae, clips.astype(np.float32) / np.float32(127.5) - 1))
        yield from zip(clips, video.quantise(coded), strict=True)


@jax.jit
def _code(vae: VAE, video_Bthw3: Float[Array, "B t h w 3"]) -> Float[Array, "B t h w 3"]:
    return vae.decode(vae.encode(video_Bthw3), video_Bthw3.shape[1])


def clips(
    model: ModelPath,
    asked: Sequence[Asked],
    sampling: Options = MODEL_DEFAULTS,
    *,
    first_frames: Sequence[Frames] | None = None,
) -> Iterator[Made]:
    """Yields the clip that the model makes of each caption, at the world's size; all captions ask for as many frames.

    ``first_frames`` holds for each caption what to begin with: an image (a clip of one frame), or whole chunks of 17 frames.

    Raises:
      ModelDirectoryError: the model is incomplete or damaged.
      ValueError: a setting is out of range.
    """
    pipeline = Pipeline.from_pretrained(model)
    with _reference_files(first_frames, len(asked)) as paths:
        size = min(BATCH, len(asked))
        for batch in _batches(asked, size):
            # An incomplete batch is filled up with its last caption, so that nothing compiles anew.
            chosen = [*batch, *[batch[-1]] * (size - len(batch))]
            shape: Options = {"height": SIZE_PX, "width": SIZE_PX, "num_frames": asked[0].num_frames}
            options: Options = {**sampling, **shape, "seed": asked[batch[0]].seed}
            made = pipeline(
                [asked[i].text for i in chosen],
                references=None if paths is None else [paths[i] for i in chosen],
                mask_strategies=None if first_frames is None else [_given(len(first_frames[i])) for i in chosen],
                **options,
            )
            cosine_NB = _comparable_cosines(made.trace)
            for row, i in enumerate(batch):
                yield Made(
                    asked=asked[i],
                    frames_thw3=np.asarray(made.frames[row]),
                    cosine_N=cosine_NB[:, row],
                    evaluations=float(made.parameters[row]["evaluations"]),
                    parameters=made.parameters[row],
                )


def _batches(asked: Sequence[Asked], size: int) -> list[list[int]]:
    """Returns indices in batches whose seeds follow each other, as the samples of a pipeline's batch do."""
    batches: list[list[int]] = []
    for i, one in enumerate(asked):
        if batches and len(batches[-1]) < size and one.seed == asked[i - 1].seed + 1:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches


def _comparable_cosines(trace: Trace | None) -> Float[np.ndarray, "N B"]:
    """Returns the cosines without those of samples that had leapt to their end before."""
    if trace is None:
        raise ValueError("the clip has no trace; expected one that was sampled, not decoded from latents.")
    leapt_NB = np.asarray(trace.leapt_NB)
    ended_NB = np.cumsum(leapt_NB, axis=0) - leapt_NB > 0
    return np.where(ended_NB, np.nan, np.asarray(trace.cosine_NB)).astype(np.float32)


def _given(num_frames: int) -> str:
    """Returns the mask strategy by which a clip begins with a reference of so many frames."""
    return "0" if num_frames == 1 else f"0,0,0,0,{num_frames // FRAMES_PER_CHUNK * LATENTS_PER_CHUNK}"


@contextlib.contextmanager
def _reference_files(first_frames: Sequence[Frames] | None, num: int) -> Iterator[list[str] | None]:
    """Yields the paths of the images (png) and clips (mp4) as files, for as long as they are needed."""
    if first_frames is None:
        yield None
        return
    if len(first_frames) != num:
        raise ValueError(f"{len(first_frames)} first frames for {num} captions; expected as many.")
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / f"{i}{'.png' if len(frames) == 1 else '.mp4'}" for i, frames in enumerate(first_frames)]
        for path, frames_thw3 in zip(paths, first_frames, strict=True):
            video.save(frames_thw3, path, fps=FPS)
        yield [str(path) for path in paths]


def _joined(scenes: Sequence[Scenes]) -> Scenes:
    return jax.tree.map(lambda *fields: np.concatenate(fields), *scenes)
