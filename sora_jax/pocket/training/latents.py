"""Latents of pocket's training clips, computed once by the finished codec, forwards and backwards in time.

Invariant: clip ``i`` of a cache is the same whatever was cached before, so a cache may grow and an interrupted one is
completed.
"""

import dataclasses
from collections.abc import Callable, Collection
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from sora_jax.config import ModelConfig
from sora_jax.pocket.training.codec import abstract_vae
from sora_jax.pocket.training.fit import Params
from sora_jax.pocket.world.scenes import Scenes, all_frames, render, sample_scenes
from sora_jax.pocket.world.words import NUM_FRAMES, is_unseen
from sora_jax.storage.checkpoint import unflatten

SHARD = 64  # clips a file of the cache
_OPPOSITES = (("left", "right"), ("up", "down"), ("grow", "shrink"), ("up-left", "down-right"), ("up-right", "down-left"))
_REVERSED = {"still": "still"} | dict(_OPPOSITES) | {other: one for one, other in _OPPOSITES}


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

    def where(self, **wanted: Collection[str]) -> np.ndarray:
        """Returns the indices of the clips whose attributes are among those wanted."""
        fits = [all(one.get(name) in values for name, values in wanted.items()) for one in self.attributes]
        return np.flatnonzero(fits)


def cache_clips(
    codec: Params, config: ModelConfig, directory: Path, *, num_clips: int, seed: int, num_frames: int = NUM_FRAMES
) -> Clips:
    """Returns latents of ``num_clips`` training clips and of their reversals, computing those that are not cached."""
    directory.mkdir(parents=True, exist_ok=True)
    encode = _encoder(config, num_frames)
    shards = []
    for index in range(-(-num_clips // SHARD)):
        scenes = sample_scenes(np.random.default_rng([seed, 7, index]), SHARD, num_frames=num_frames)
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


def _encoder(config: ModelConfig, num_frames: int) -> Callable[[Params, Scenes], dict[str, jax.Array]]:
    @jax.jit
    def encode(codec: Params, scenes: Scenes) -> dict[str, jax.Array]:
        """Returns latents of the clips (axis 1: forwards, backwards) and of their first frames as images."""
        vae = unflatten(abstract_vae(config.vae), codec)
        x_BtHWC = vae.encode_frames(render(scenes, all_frames(num_frames)))
        size = config.vae.micro_frame_size

        def temporal(x: Float[Array, "B t H W C"]) -> Float[Array, "B T H W C"]:
            return jnp.concatenate([vae.encode_latents(x[:, i : i + size]) for i in range(0, x.shape[1], size)], 1)

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
