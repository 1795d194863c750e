"""The recipe of pocket's training: every number that the command line may change, with the value that was used.

Invariant: recipe and code are all that a training depends on.  Nothing here trains, and no JAX is imported.
"""

import dataclasses
from pathlib import Path
from typing import Annotated

from sora_jax.pipeline.option import Option

LESSONS = ("4500:5700:left,right,up,down,grow,shrink", "7000:7400:left,right")
DECODER_STEPS = 1500  # where the codec is trained from nothing
LEARNING_RATE = 2e-3  # the highest of the transformer, unless the recipe says otherwise
_MANY = (0, 10**9)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """What is trained, for how long, from what."""

    work: Annotated[Path, Option("Folder of checkpoints, reports and the model.", metavar="DIR")] = Path("training")
    seed: Annotated[int, Option("Seed of everything drawn at random.", metavar="N", within=(0, 2**32 - 1))] = 0
    dtype: Annotated[str, Option("Stored dtype of the model.", choices=("float32", "bfloat16"))] = "bfloat16"
    base: Annotated[str | None, Option("Model whose codec and text encoder are kept, not trained.", metavar="MODEL_DIR")] = None
    warm: Annotated[bool, Option("Start the transformer from that of --base.")] = False
    warm_text: Annotated[bool, Option("Train the text encoder of --base further, not keep it.")] = False
    spatial_steps: Annotated[int, Option("Updates of the spatial autoencoder.", metavar="N", within=_MANY)] = 2400
    spatial_batch: Annotated[int, Option("Frames in one step of the spatial autoencoder.", metavar="N", within=_MANY)] = 16
    temporal_steps: Annotated[int, Option("Updates of the temporal autoencoder.", metavar="N", within=_MANY)] = 900
    temporal_batch: Annotated[
        int, Option("Chunks in one step of the temporal autoencoder and the decoders.", metavar="N", within=_MANY)
    ] = 8
    decoder_steps: Annotated[
        int | None,
        Option(f"Updates of both decoders again (default {DECODER_STEPS}, with --base none).", metavar="N", within=_MANY),
    ] = None
    text_steps: Annotated[int, Option("Updates of the text encoder.", metavar="N", within=_MANY)] = 1000
    text_batch: Annotated[int, Option("Captions in one step of the text encoder.", metavar="N", within=_MANY)] = 128
    clips: Annotated[int, Option("Clips in the cache of latents.", metavar="N", within=_MANY)] = 6144
    long_clips: Annotated[int, Option("Longer clips in a cache of their own.", metavar="N", within=_MANY)] = 1024
    flow_steps: Annotated[int, Option("Updates of the transformer.", metavar="N", within=_MANY)] = 8200
    flow_rate: Annotated[float, Option("Highest learning rate of the transformer.", metavar="R", above=0)] = LEARNING_RATE
    lessons: Annotated[
        tuple[str, ...],
        Option(
            f"Steps that see fast clips of these motions only; repeatable (default: {' '.join(LESSONS)}).",
            flags=("--lesson",),
            metavar="FROM:TO:MOTIONS",
            repeats=True,
        ),
    ] = ()
    batch: Annotated[int, Option("Clips in one step of the transformer.", metavar="N", within=_MANY)] = 32
    judge_every: Annotated[int, Option("Steps of the transformer between evaluations.", metavar="N", within=_MANY)] = 500
    judged: Annotated[int, Option("Captions in one evaluation.", metavar="N", within=_MANY)] = 48
