"""What an export target is to the rest of the package, and the choice of one by its name.

A target is a module with the four functions of `Target`.  It saves one stage at a time and opens what was saved as plain
functions of NumPy arrays; capturing, checking, the manifest and the loop are the same for all targets.

Invariant: a target opens its artefacts from the files alone, never from what it still has in memory.
"""

import dataclasses
import importlib
import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, Protocol, cast, get_args, runtime_checkable

import numpy as np

from sora_jax.config import DTypePolicy
from sora_jax.export.stages import Stage

TargetName = Literal["stablehlo", "onnx", "coreml"]
Precision = Literal["float32", "float16"]
Weights = Literal["float", "int8", "lut6", "int4"]

Artefact = dict[str, str]
Runner = Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]]


class MissingExtraError(ValueError):
    """A package of an optional extra is not installed; the message holds the pip line."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """How stages are written.

    Attributes:
      precision: of the arithmetic; stages marked ``keep_float32`` stay float32.
      weights: how matrices are stored.
      fuse_attention: Core ML only: let the converter use its fused attention operation.
      metadata: texts that an artefact carries where its format has a place for them (model, licence).
    """

    precision: Precision = "float32"
    weights: Weights = "float"
    fuse_attention: bool = True
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
    """What a target's module has: the packages whose versions decide its artefacts, what was not verified, four functions."""

    PACKAGES: tuple[str, ...]
    NOTE: str

    def check_options(self, options: Options) -> None:
        """Refuses what the target cannot do.

        Raises:
          MissingExtraError: a package is missing, see `require`.
          ValueError: the target has no such precision or weights.
        """

    def policy(self, options: Options) -> DTypePolicy:
        """Returns the dtypes that stages of the wanted precision are built with for saving.

        The reference is always float32, and so are stages marked ``keep_float32``.
        """

    def save(self, stage: Stage, params: Mapping[str, np.ndarray], folder: Path, options: Options) -> dict[str, Artefact]:
        """Writes a stage's files into ``folder``, their names beginning with the stage's or its program's name.

        Returns for every function of the stage where it is: ``file`` (relative to ``folder``) and what else `open_function`
        needs.  A file that exists already belongs to an earlier stage of the same program and is left as it is.
        """

    def open_function(self, folder: Path, artefact: Artefact) -> Runner:
        """Returns a saved function: named arrays in (converted to the declared dtypes), named arrays out.

        Raises:
          MissingExtraError: what runs it is not installed.
        """


def target_module(name: str) -> Target:
    """Returns the module of a target.

    Raises:
      ValueError: there is no such target.
    """
    if name not in get_args(TargetName):
        raise ValueError(f"target is {name!r}; expected one of {', '.join(get_args(TargetName))}.")
    return cast(Target, importlib.import_module(f"sora_jax.export.{name}"))


def require(extra: str, *modules: str) -> None:
    """Refuses to go on where a package of an extra is missing.

    Raises:
      MissingExtraError: names the packages and the pip line that installs them.
    """
    missing = [module for module in modules if importlib.util.find_spec(module) is None]
    if missing:
        raise MissingExtraError(f"{', '.join(missing)} not installed; install with: pip install 'sora_jax[{extra}]'")


def refuse_weights(target: str, options: Options, *known: str) -> None:
    """Raises ValueError where a target does not have the weights that are asked for."""
    if options.weights not in known:
        raise ValueError(f"target {target} has no weights {options.weights!r}; it has {', '.join(known)}.")


def rounded(inputs: Mapping[str, Any], dtypes: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Returns the named inputs in the dtypes a function declares, in its order.

    Raises:
      KeyError: an input is missing.
    """
    return {name: np.asarray(inputs[name]).astype(dtype, copy=False) for name, dtype in dtypes.items()}
