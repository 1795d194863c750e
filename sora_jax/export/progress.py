"""How far an export is and how long it still takes: by the work that stages are, not by their number.

Invariant: the work of a stage is estimated before anything runs, from its functions and its weights; the speed is measured.
Nothing is printed here.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sora_jax.export.program import Stage

_BYTES_OF_A_FUNCTION = 50_000_000  # weights that take as long to save and to run as a function takes to trace and to compile


@dataclasses.dataclass(frozen=True, kw_only=True)
class Progress:
    """Where an export is.

    Attributes:
      stage: the stage at work.
      share: how much of that stage is done, 0 to 1.
      done: stages that are complete.
      total: stages in all.
      remaining_s: seconds that the rest will take at the speed so far; None before there is one.
    """

    stage: str
    share: float
    done: int
    total: int
    remaining_s: float | None


class Meter:
    """Turns what the processes of an export say into `Progress`."""

    def __init__(self, work: Mapping[str, float], report: Callable[[Progress], Any] | None):
        self.work, self.report = dict(work), report
        self.names = list(work)
        self.began = self.told = time.monotonic()
        self.stage, self.share, self.left_s = self.names[0], 0.0, math.nan

    def advance(self, stage: str, share: float) -> None:
        """Takes note that so much of a stage is done, and reports."""
        self.stage, self.share, self.told = stage, share, time.monotonic()
        done = sum(self.work[name] for name in self.names[: self.names.index(stage)]) + share * self.work[stage]
        left = sum(self.work.values()) - done
        self.left_s = (self.told - self.began) * left / done if done else math.nan
        self.wait()

    def wait(self) -> None:
        """Reports again while nothing new is known, with the remaining time counting down."""
        if self.report is None:
            return
        left_s = self.left_s - (time.monotonic() - self.told)
        self.report(
            Progress(
                stage=self.stage,
                share=self.share,
                done=self.names.index(self.stage),
                total=len(self.names),
                remaining_s=None if math.isnan(left_s) else max(left_s, 0.0),
            )
        )


def work_of(stages: Sequence[Stage], weight_bytes: Callable[[Stage], int]) -> dict[str, float]:
    """Returns the estimated work of every stage by name, in functions."""
    return {stage.name: len(stage.functions) * (1 + weight_bytes(stage) / _BYTES_OF_A_FUNCTION) for stage in stages}
