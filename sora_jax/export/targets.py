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
from sora_jax.export.stages import Stage


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """How stages are written.

    Attributes:
      precision: ``float32`` or ``float16`` arithmetic; stages marked ``keep_float32`` stay float32.
      weights: how matrices are stored.
      fuse_attention: Core ML only: let the converter use its fused attention operation.
      logits_limit: bytes of float32 logits beyond which an attention is chunked.
      metadata: texts that an artefact carries where its format has a place for them (model, licence).
    """

    precision: Precision = "float32"
    weights: Weights = "float"
    fuse_attention: bool = True
    logits_limit: int = LOGITS_LIMIT
    metadata: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, allowed in (("precision", get_args(Precision)), ("weights", get_args(Weights))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}; expected one of {', '.join(allowed)}.")

    def precision_of(self, stage: Stage) -> Precision:
        """Returns the precision a stage is written in."""
        return "float32" if stage.program.keep_float32 else self.precision

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
