"""How far a saved artefact is from JAX, and how far it may be: the same for every target.

Invariant: an output that replaces an input of the same name (tokens after a block) is judged by what was added to it, so
that the part which merely passes through cannot hide an error.  NaN and infinity never pass.

An artefact must reach a PSNR, and keep its relative L2 error below a ceiling.  The ceiling is what finds a wrong matrix where
a few large values make the peak: with the projection of an attention set to zero, a pair of the embedded model is at 24 dB
and 0.60.  The worst outputs that were measured, of captured inputs or with outliers:

=======  ===========  ==================  ========================  ==============
weights  limits       embedded model      random, released widths   a zero matrix
=======  ===========  ==================  ========================  ==============
float32  100 dB .001  130 dB 0.0000007    121 dB 0.000003
float16  50 dB 0.05   68 dB 0.0024        65 dB 0.0022 (T5-XXL)
int8     35 dB 0.10   44 dB 0.015         43 dB 0.032 (28 pairs)    0.37 to 1.07
lut6     28 dB 0.20   33 dB 0.062         34 dB 0.097               0.37 to 1.07
int4     18 dB 0.35   24 dB 0.16          26 dB 0.25                0.37 to 1.07
mixed    18 dB 0.35   by its mean bits                              0.37 to 1.07
=======  ===========  ==================  ========================  ==============

Floors lie 15, 8, 5 and 6 dB below what is reached, because trained matrices of full size may have longer tails, which cost
scales and tables precision.  The last column is one matrix of zeros among int4 ones in the embedded model, 34 x 64 x 64: in a
T5 block, the front, a pair (attention to the caption left out, which adds little there and hides: 0.11 to 0.18) or the final
layer.  benchmarks/results/export_targets.json and released_export_*.json have the measurements.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import cast

import numpy as np

from sora_jax.export.entries import CheckEntry

TOKENS = ("x_RTSD", "x_BLE")  # streams that are normed: large models grow outlier channels in them
OUTLIERS = (400.0, -900.0)
MAX_DB = 200.0

# Limits for all stages in sequence are relaxed by this: each stage adds its own rounding.
WHOLE_NETWORK_DB = 10.0


class CheckError(ValueError):
    """A saved artefact differs from JAX by more than its floor allows."""


@dataclasses.dataclass(frozen=True)
class Limits:
    """What an artefact must reach: PSNR in dB at least, relative L2 error at most."""

    floor_db: float
    ceiling_l2: float

    def relaxed(self, amount_db: float) -> "Limits":
        """Returns limits for errors that are larger by so many dB."""
        return Limits(self.floor_db - amount_db, self.ceiling_l2 * 10 ** (amount_db / 20))


LIMITS: Mapping[str, Limits] = {
    "float32": Limits(100.0, 0.001),
    "float16": Limits(50.0, 0.05),
    "int8": Limits(35.0, 0.1),
    "lut6": Limits(28.0, 0.2),
    "int4": Limits(18.0, 0.35),
    "mixed": Limits(18.0, 0.35),  # of its least useful mean; at 6 bits it is above lut6
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Check:
    """One measured output.

    Attributes:
      case: ``captured``, ``outliers``, or ``two_steps`` of a sampler.
      output: name.
      measured: ``output``, or ``update`` where the output replaces an input.
      psnr_db: peak is the largest magnitude of the reference; at most 200, -200 where NaN came out.
      relative_l2: L2 norm of the difference over that of the reference.
      floor_db: what psnr_db must reach.
      ceiling_l2: what relative_l2 may be at most.
    """

    case: str
    output: str
    measured: str
    psnr_db: float
    relative_l2: float
    floor_db: float
    ceiling_l2: float

    @property
    def passed(self) -> bool:
        """Whether both limits are kept."""
        return self.psnr_db >= self.floor_db and self.relative_l2 <= self.ceiling_l2

    def to_dict(self) -> CheckEntry:
        """Returns the entry of a manifest."""
        return cast(CheckEntry, dataclasses.asdict(self))


def limits(precision: str, weights: str) -> Limits:
    """Returns what an artefact must reach: compressed weights decide, else the arithmetic."""
    return LIMITS[precision if weights == "float" else weights]


def with_outliers(inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray] | None:
    """Returns the inputs with two channels of the tokens moved by +400 and -900; None where no stream of tokens comes in."""
    streams = [name for name in TOKENS if name in inputs]
    if not streams:
        return None
    moved = dict(inputs)
    for name in streams:
        moved[name] = np.array(inputs[name], np.float32)
        for channel, amount in zip(outlier_channels(moved[name].shape[-1]), OUTLIERS, strict=True):
            moved[name][..., channel] += amount
    return moved


def outlier_channels(width: int) -> tuple[int, int]:
    """Returns which channels are moved."""
    return width // 3, 2 * width // 3


def compare(
    case: str,
    inputs: Mapping[str, np.ndarray],
    reference: Mapping[str, np.ndarray],
    outputs: Mapping[str, np.ndarray],
    limits: Limits,
) -> list[Check]:
    """Returns a measurement for every output of the reference.

    Raises:
      CheckError: an output is missing or has another shape.
    """
    checks = []
    for name, expected in reference.items():
        if name not in outputs or np.shape(outputs[name]) != np.shape(expected):
            got = np.shape(outputs[name]) if name in outputs else "nothing"
            raise CheckError(f"output {name} has shape {got}; expected {np.shape(expected)}.")
        a, b = (np.asarray(x, np.float64) for x in (expected, outputs[name]))
        measured = "output"
        if name in inputs and np.shape(inputs[name]) == a.shape:
            measured = "update"
            a, b = (x - np.asarray(inputs[name], np.float64) for x in (a, b))
            if case == "outliers":
                a, b = (np.delete(x, outlier_channels(x.shape[-1]), axis=-1) for x in (a, b))
        psnr_db, relative_l2 = difference(a, b)
        found = {"psnr_db": psnr_db, "relative_l2": relative_l2}
        checks.append(Check(case=case, output=name, measured=measured, **found, **dataclasses.asdict(limits)))
    return checks


def difference(expected: np.ndarray, got: np.ndarray) -> tuple[float, float]:
    """Returns PSNR in dB (peak: the largest magnitude expected) and relative L2; NaN and infinity count as the worst.

    If the reference is all zeros, only zeros pass.
    """
    error = np.asarray(got, np.float64) - expected
    if not np.isfinite(error).all():
        return -MAX_DB, math.inf
    rmse, peak = float(np.sqrt(np.mean(error**2))), float(np.max(np.abs(expected), initial=0.0))
    if rmse == 0:
        return MAX_DB, 0.0
    if peak == 0:
        return -MAX_DB, math.inf
    relative = float(np.linalg.norm(error) / np.linalg.norm(expected))
    return min(MAX_DB, 20 * math.log10(peak / rmse)), relative


def require_passed(where: str, checks: list[Check]) -> None:
    """Refuses an artefact that does not keep its limits.

    Raises:
      CheckError: names the worst output.
    """
    failed = [check for check in checks if not check.passed]
    if failed:
        worst = min(failed, key=lambda check: check.psnr_db - check.floor_db)
        raise CheckError(
            f"{where}: output {worst.output} ({worst.case} inputs) has {worst.psnr_db:.1f} dB PSNR and a relative error of "
            f"{worst.relative_l2:.2g} against JAX, expected at least {worst.floor_db:g} dB and at most {worst.ceiling_l2:g}; "
            "nothing was kept."
        )
