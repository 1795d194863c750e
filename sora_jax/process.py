"""Clock and memory of this process: the stopwatch, the peak meter, and the memory that the system can still provide.

Invariant: memory is what Linux reports of this very process (``/proc/self``), never of the process that started it; where a
system does not say, the answer is None or an error that says so, not a guess.  Nothing here decides how memory is used.
"""

import contextlib
import ctypes
import os
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TypeVar

Item = TypeVar("Item")

_STATM, _STATUS, _MEMINFO = Path("/proc/self/statm"), Path("/proc/self/status"), Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")


class Timings(dict[str, float]):
    """Seconds by stage: load, compile, text, encode, denoise, decode, write."""

    @contextlib.contextmanager
    def measure(self, stage: str) -> Iterator[None]:
        """Adds the time its body takes to a stage."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self[stage] = self.get(stage, 0.0) + time.perf_counter() - start

    def each(self, stage: str, items: Iterable[Item]) -> Iterator[Item]:
        """Yields the items, and adds the time that each takes to come to a stage."""
        iterator = iter(items)
        while True:
            with self.measure(stage):
                try:
                    item = next(iterator)
                except StopIteration:
                    return
            yield item


class PeakMeter:
    """Peak memory of this process between two samples, as far as the system reports it (Linux).

    The system keeps a high-water mark: if it rose, it is the peak in between; if not, memory stayed below it.
    """

    def __init__(self) -> None:
        self._high_water = 0

    def start(self) -> None:
        """Forgets what happened before."""
        self._high_water = status_bytes("VmHWM") or 0

    def sample(self) -> int | None:
        """Returns the high-water mark if it rose since the last sample, else what the process holds now; None: unknown."""
        before, self._high_water = self._high_water, status_bytes("VmHWM") or 0
        return self._high_water if self._high_water > before else resident_bytes()


def peak_bytes() -> int:
    """Returns the most bytes that this process has held in memory so far.

    Linux: ``VmHWM``, because what getrusage says there includes the peak of the process that started this one.
    """
    peak = status_bytes("VmHWM")
    if peak is not None:
        return peak
    import resource  # not on every system

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def resident_bytes() -> int | None:
    """Returns the bytes of this process that are in memory: its own, shared, and mapped files'; None where unknown."""
    try:
        return int(_STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return None


def status_bytes(field: str) -> int | None:
    """Returns a field of ``/proc/self/status``, such as ``VmHWM`` or ``RssAnon``, in bytes; None where there is none."""
    try:
        lines = _STATUS.read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":")), None)


def available_bytes() -> int:
    """Returns the bytes that this process can still get: free memory, but no more than the limit of its control group.

    What the process holds already counts as available, because it is part of its peak.

    Raises:
      ValueError: the system does not say; state the budget in bytes.
    """
    held = resident_bytes()
    if held is not None and _MEMINFO.exists():
        fields = dict(line.split(":", 1) for line in _MEMINFO.read_text().splitlines())
        free = int(fields["MemAvailable"].split()[0]) * 1024 + held
    else:
        try:
            free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        except (AttributeError, OSError, ValueError):
            raise ValueError("this system does not say how much memory is free; state a budget in bytes, not auto.") from None
    limits = [_cgroup_limit(_CGROUP / "memory.max"), _cgroup_limit(_CGROUP / "memory" / "memory.limit_in_bytes")]
    return min([free, *(limit for limit in limits if limit is not None)])


def return_freed_memory() -> None:
    """Asks the C allocator to return freed memory to the operating system (glibc; elsewhere nothing happens).

    Compiling a program frees well over 100 MB that the allocator would otherwise keep.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(0)


def _cgroup_limit(path: Path) -> int | None:
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None
