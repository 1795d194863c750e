"""When each layer was read and when it computed, as a trace for chrome://tracing or ui.perfetto.dev.

Invariant: an interval is one layer in one lane; lanes may overlap, intervals of one lane never do.
"""

import dataclasses
import json
import os
import time
from pathlib import Path
from typing import Literal

from sora_jax import files

Lane = Literal["load", "wait", "copy", "compute"]
_LANES: tuple[Lane, ...] = ("compute", "load", "wait", "copy")


@dataclasses.dataclass(frozen=True)
class Interval:
    """One layer's time in a lane, in seconds of `time.perf_counter`.

    Lanes: ``load`` reads the layer on the reading thread, ``wait`` is the block waiting for that, ``copy`` hands its arrays
    over to the program, ``compute`` is from then to the next block's arrival.
    """

    lane: Lane
    layer: str
    start_s: float
    end_s: float


class Profile:
    """The intervals of a run, in the order in which they ended."""

    def __init__(self) -> None:
        self.intervals: list[Interval] = []

    def add(self, lane: Lane, layer: str, start_s: float, end_s: float | None = None) -> None:
        """Records an interval, up to now if no end is given; any thread may."""
        self.intervals.append(Interval(lane, layer, start_s, time.perf_counter() if end_s is None else end_s))

    def total_s(self, lane: Lane) -> float:
        """Returns the seconds spent in a lane."""
        return sum(interval.end_s - interval.start_s for interval in self.intervals if interval.lane == lane)

    def to_trace(self) -> dict[str, object]:
        """Returns the trace as a JSON object, its times in microseconds from the first interval."""
        pid = os.getpid()
        begin = min((interval.start_s for interval in self.intervals), default=0.0)
        names: list[dict[str, object]] = [
            {"name": "thread_name", "ph": "M", "pid": pid, "tid": tid, "args": {"name": lane}}
            for tid, lane in enumerate(_LANES)
        ]
        events: list[dict[str, object]] = [
            {
                "name": interval.layer,
                "cat": interval.lane,
                "ph": "X",
                "ts": round((interval.start_s - begin) * 1e6, 3),
                "dur": round((interval.end_s - interval.start_s) * 1e6, 3),
                "pid": pid,
                "tid": _LANES.index(interval.lane),
            }
            for interval in sorted(self.intervals, key=lambda interval: interval.start_s)
        ]
        return {"traceEvents": names + events, "displayTimeUnit": "ms"}

    def save(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
        """Writes the trace as JSON, whole or not at all.

        Raises:
          FileExistsError: the file exists and ``overwrite`` is False.
        """
        files.write_text(path, json.dumps(self.to_trace()), overwrite=overwrite)
        return Path(path)
