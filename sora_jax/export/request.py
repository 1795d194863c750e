"""What a person asks of an export: every option once, with its meaning.

Invariant: `Fields` and `Request` have the same names and types (a test compares them); nothing is checked or resolved here,
which is the work of `order`.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Required, TypedDict

from sora_jax.export.attention import LOGITS_LIMIT
from sora_jax.export.entries import Precision, TargetName, Weights
from sora_jax.export.size import Size
from sora_jax.export.stages import DEFAULT_PARTS


class Fields(TypedDict, total=False):
    """The keywords of `export`, which become a `Request`."""

    target: Required[TargetName]
    num_frames: int | str | None
    height: int | None
    width: int | None
    further_sizes: Sequence[Size]
    precision: Precision
    io_precision: Precision
    weights: Weights
    mean_bits: float | None
    stages: Sequence[str]
    settings: Mapping[str, Any] | None
    licence: str | None
    fuse_attention: bool
    logits_limit: str | int | float
    attention_forms: Sequence[str]
    guidance_rows: int
    caption_once: bool
    pairs_per_package: int
    vectors: bool
    memory_limit: str | int | float | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """One export as it is asked for.

    Attributes:
      target: ``stablehlo``, ``onnx``, ``coreml`` or ``coreai``.
      num_frames: length of the video, a number or a duration such as ``2s``; None: the model's default, as for height and
        width.
      height: pixels, a multiple of 16.
      width: pixels, a multiple of 16.
      further_sizes: more sizes, as further functions.
      precision: ``float32`` or ``float16`` arithmetic.
      io_precision: ``float16`` inputs and outputs halve what is moved; needs float16 arithmetic.
      weights: ``float``, ``int8``, and for Core ML ``lut6``, ``int4`` and ``mixed``.
      mean_bits: with ``mixed``: bits for each value of a stage's matrices on average; a matrix has 3, 4, 6 or 8, by the error
        that it makes alone.
      stages: some of ``t5``, ``stdit3``, ``vae_decoder``, ``vae_encoder``.
      settings: numbers of the loop in place of the model's defaults: num_steps, guidance, merge_steps, leap, fps, ...
      licence: the weights' licence, for the manifest and Core ML packages; None: not stated.
      fuse_attention: Core ML only: use the converter's fused attention.
      logits_limit: bytes, such as ``"500MB"``; where one attention's logits would take more (in float32) it is chunked.
      attention_forms: forms of attention of which every pair has functions, the first of them by default: ``plain``,
        ``chunked``, for Core ML also ``fused`` and ``breaker``; empty: one form.
      guidance_rows: 2: the conditional and the unconditional row in one call; 1: in two, each with half of the memory.
      caption_once: project the caption in a stage of its own, once a clip; with one row of guidance it always is.
      pairs_per_package: pairs of blocks that are one package and one call; it divides the number of pairs.
      vectors: write test vectors for hosts and devices; with a clip of four steps where the model fits in 2 GB.
      memory_limit: bytes, such as ``"3.3GB"``, that one function may take: weights, inputs, outputs, largest value.
    """

    target: TargetName
    num_frames: int | str | None = None
    height: int | None = None
    width: int | None = None
    further_sizes: Sequence[Size] = ()
    precision: Precision = "float32"
    io_precision: Precision = "float32"
    weights: Weights = "float"
    mean_bits: float | None = None
    stages: Sequence[str] = DEFAULT_PARTS
    settings: Mapping[str, Any] | None = None
    licence: str | None = None
    fuse_attention: bool = True
    logits_limit: str | int | float = LOGITS_LIMIT
    attention_forms: Sequence[str] = ()
    guidance_rows: int = 2
    caption_once: bool = False
    pairs_per_package: int = 1
    vectors: bool = True
    memory_limit: str | int | float | None = None
