"""Clips of a model for captions of unseen combinations, with what each caption asked for.

Invariant: captions depend on the seed alone, so two models, or two samplers, are asked the same.  Measuring and scoring
are ``sora_jax.pocket.measure``'s and ``judge``'s work.
"""

import dataclasses
import os
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from jaxtyping import UInt8

from sora_jax.pipeline import Pipeline
from sora_jax.pocket.captions import caption
from sora_jax.pocket.scenes import sample_scenes

BATCH = 16  # captions generated at a time


@dataclasses.dataclass(frozen=True, kw_only=True)
class Asked:
    """One caption, the attributes it names, and the seed of its noise."""

    text: str
    attributes: Mapping[str, str]
    seed: int


def captions(num: int, *, seed: int) -> list[Asked]:
    """Returns captions of scenes whose combinations were kept out of training."""
    rng = np.random.default_rng([seed, 9])
    scenes = sample_scenes(rng, num, split="unseen")
    worded = [caption(scenes.attributes(i), rng) for i in range(num)]
    return [Asked(text=text, attributes=named, seed=seed + i) for i, (text, named) in enumerate(worded)]


def clips(
    model: str | os.PathLike[str] | None, asked: list[Asked], **settings: Any
) -> Iterator[tuple[Asked, UInt8[np.ndarray, "t h w 3"]]]:
    """Yields every caption with the clip that the model makes of it; ``settings`` are those of ``Pipeline``."""
    pipeline = Pipeline.from_pretrained(model)
    for start in range(0, len(asked), BATCH):
        batch = asked[start : start + BATCH]
        # An incomplete batch is filled up with its last caption, so that nothing compiles anew.
        texts = [one.text for one in batch] + [batch[-1].text] * (BATCH - len(batch))
        made = pipeline(texts, seed=batch[0].seed, **settings)
        yield from zip(batch, np.asarray(made.frames), strict=False)
