"""The interface of an export target, and the choice of one by its name.

A target is a module with the three functions of `Target`, which saves one stage at a time; what was saved is opened by its
twin (`opening`).  Capturing, checking, the manifest and the loop are the same for all targets.

Invariant: how stages are written is decided by `Options` alone.
"""

import dataclasses
import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol, cast, get_args, runtime_checkable

import numpy as np

from sora_jax.config import DTypePolicy
from sora_jax.export.attention import LOGITS_LIMIT
from sora_jax.export.entries import ArtefactEntry, Precision, TargetName, Weights
from sora_jax.export.mixed_bits import WIDTHS
from sora_jax.export.program import Stage


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """How stages are written.

    Attributes:
      precision: ``float32`` or ``float16`` arithmetic; stages marked ``keep_float32`` stay float32.
      weights: how matrices are stored.
      io_precision: of inputs and outputs; stages whose arithmetic is float32 keep float32 there.
      mean_bits: with weights ``mixed``: bits for each value of a stage's matrices, on average.
      widths: with weights ``mixed``: bits by matrix of the stage that is saved; empty until they are chosen.
      fuse_attention: Core ML only: let the converter use its fused attention operation, where a function names no form.
      logits_limit: bytes of float32 logits beyond which an attention is chunked.
      metadata: texts that an artefact carries where its format has a place for them (model, licence).
    """

    precision: Precision = "float32"
    weights: Weights = "float"
    io_precision: Precision = "float32"
    mean_bits: float | None = None
    widths: Mapping[str, int] = dataclasses.field(default_factory=dict)
    fuse_attention: bool = True
    logits_limit: int = LOGITS_LIMIT
    metadata: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        known = {"precision": get_args(Precision), "io_precision": get_args(Precision), "weights": get_args(Weights)}
        for name, allowed in known.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}; expected one of {', '.join(allowed)}.")
        if (self.weights == "mixed") != (self.mean_bits is not None):
            raise ValueError("weights mixed and mean bits go together; name both (--weights mixed --mean-bits 5), or neither.")
        if self.mean_bits is not None and not min(WIDTHS) < self.mean_bits <= max(WIDTHS):
            raise ValueError(f"mean bits are {self.mean_bits!r}; expected a number above {min(WIDTHS)}, at most {max(WIDTHS)}.")
        if self.io_precision == "float16" and self.precision != "float16":
            raise ValueError("inputs and outputs in float16 need float16 arithmetic; add --precision float16.")

    def precision_of(self, stage: Stage) -> Precision:
        """Returns the precision a stage is written in."""
        return "float32" if stage.program.keep_float32 else self.precision

    def boundary_of(self, stage: Stage) -> Precision:
        """Returns the precision of a stage's inputs and outputs."""
        return "float16" if self.precision_of(stage) == self.io_precision == "float16" else "float32"

    def weights_of(self, stage: Stage) -> Weights:
        """Returns how a stage's matrices are stored; the autoencoder stays float: few bytes, and its errors are seen."""
        return "float" if stage.network == "vae" else self.weights


@runtime_checkable  # for the type checks of the tests
class Target(Protocol):
    """What a target's module has: the packages whose versions decide its artefacts, what was not verified, three functions."""

    PACKAGES: tuple[str, ...]
    NOTE: str

    def check_options(self, options: Options) -> None:
        """Refuses what the target cannot do.

        Raises:
          MissingExtraError: a package is missing, see `opening.require`.
          ValueError: the target has no such precision or weights.
        """

    def policy(self, options: Options) -> DTypePolicy:
        """Returns the dtypes that stages of the wanted precision are built with for saving.

        The reference is always float32, and so are stages marked ``keep_float32``.
        """

    def save(self, stage: Stage, params: Mapping[str, np.ndarray], folder: Path, options: Options) -> dict[str, ArtefactEntry]:
        """Writes a stage's files into ``folder``, their names beginning with the stage's or its program's name.

        Returns for every function of the stage where it is: ``file`` (relative to ``folder``) and what else its opener
        needs.  A file that exists already belongs to an earlier stage of the same program and is left as it is.
        """


def target_module(name: str) -> Target:
    """Returns the module of a target.

    Raises:
      ValueError: there is no such target.
    """
    if name not in get_args(TargetName):
        raise ValueError(f"target is {name!r}; expected one of {', '.join(get_args(TargetName))}.")
    return cast(Target, importlib.import_module(f"sora_jax.export.{name}"))


def refuse_weights(target: str, options: Options, *known: str) -> None:
    """Raises ValueError if a target does not have the requested weights."""
    if options.weights not in known:
        raise ValueError(f"target {target} has no weights {options.weights!r}; it has {', '.join(known)}.")
