"""How far a saved artefact is from JAX, and what is still good enough: the same for every target.

Invariant: an output that replaces an input of the same name (tokens after a block) is judged by what was added to it, so
that the part which merely passes through cannot hide an error.  NaN and infinity never pass.

Floors of compressed weights stand some way below what a pair of STDiT3-XL/2's width measures with random normal weights in
float16 (Core ML, 17 x 64 x 64), because trained matrices may have longer tails, which cost scales and tables precision; a
defect (a wrong axis, the scale of another matrix) makes errors as large as the update, which is 14 to 18 dB:

======  ================  ================  =======
weights captured          with outliers     floor
======  ================  ================  =======
lut6    44.6 dB, 4.8 %    34.0 dB, 9.7 %    24 dB
int4    33.3 dB, 18 %     25.8 dB, 25 %     18 dB
======  ================  ================  =======

(the percentage is the relative L2 error of what the pair adds).  int8 measures 46 to 52 dB, 1.3 %, at a floor of 30 dB.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

TOKENS = ("x_RTSD", "x_BLE")  # streams that are normed: large models grow outlier channels in them
OUTLIERS = (400.0, -900.0)
MAX_DB = 200.0

FLOORS_DB: Mapping[str, float] = {"float32": 100.0, "float16": 45.0}
COMPRESSED_FLOORS_DB: Mapping[str, float] = {"int8": 30.0, "lut6": 24.0, "int4": 18.0}
# What a floor is lowered by for all stages in a row: each adds its own rounding.
WHOLE_NETWORK_DB = 10.0


class CheckError(ValueError):
    """A saved artefact differs from JAX by more than its floor allows."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Check:
    """One measured output.

    Attributes:
      case: ``captured`` or ``outliers``.
      output: name.
      measured: ``output``, or ``update`` where the output replaces an input.
      psnr_db: peak is the largest magnitude of the reference; at most 200, -200 where NaN came out.
      relative_l2: of the difference over the reference.
      floor_db: what psnr_db must reach.
    """

    case: str
    output: str
    measured: str
    psnr_db: float
    relative_l2: float
    floor_db: float

    @property
    def passed(self) -> bool:
        """Whether the floor is reached."""
        return self.psnr_db >= self.floor_db

    def to_dict(self) -> dict[str, Any]:
        """Returns the entry of a manifest."""
        return dataclasses.asdict(self)


def floor_db(precision: str, weights: str) -> float:
    """Returns the PSNR that an artefact must reach: compressed weights set it, else the arithmetic."""
    return COMPRESSED_FLOORS_DB[weights] if weights != "float" else FLOORS_DB[precision]


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
    floor: float,
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
        checks.append(
            Check(case=case, output=name, measured=measured, psnr_db=psnr_db, relative_l2=relative_l2, floor_db=floor)
        )
    return checks


def difference(expected: np.ndarray, got: np.ndarray) -> tuple[float, float]:
    """Returns PSNR in dB (peak: the largest magnitude expected) and relative L2; of NaN or infinity the worst there is.

    Where nothing but zeros is expected, only zeros pass.
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
    """Refuses an artefact that is below its floor.

    Raises:
      CheckError: names the worst output.
    """
    failed = [check for check in checks if not check.passed]
    if failed:
        worst = min(failed, key=lambda check: check.psnr_db - check.floor_db)
        raise CheckError(
            f"{where}: output {worst.output} ({worst.case} inputs) has {worst.psnr_db:.1f} dB PSNR against JAX, "
            f"expected at least {worst.floor_db:g} dB; nothing was kept."
        )
