"""Memory budgets as users write them, in bytes.

Invariant: kB, MB, GB and TB are powers of 1,000, KiB, MiB, GiB and TiB powers of 1,024, and a bare number is bytes; there is
no other reading of a budget in the library.  What a budget is spent on is the memory plan's business.
"""

import math
import os
import re
from pathlib import Path

AUTO = "auto"
AUTO_SHARE = 0.9  # of what is free: other processes, and the system's file cache, keep the rest

_PREFIXES = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}
_PATTERN = re.compile(r"(\d+(?:\.\d*)?|\.\d+)\s*(?:([kmgt]?)(i?)b)?", re.IGNORECASE)
_CGROUP = Path("/sys/fs/cgroup")


def parse_budget(value: str | int | float) -> int:
    """Returns a budget in bytes: a number of bytes, a text such as ``"3.3GB"`` or ``"512 MiB"``, or ``"auto"``.

    ``auto`` is 90 % of the memory that this process can still get, see `available_bytes`.

    Raises:
      ValueError: it is no budget, or less than a byte.
    """
    if isinstance(value, str) and value.strip().lower() == AUTO:
        return int(AUTO_SHARE * available_bytes())
    num_bytes = _bytes_of(value) if isinstance(value, str) else float(value)
    if isinstance(value, bool) or num_bytes is None or not math.isfinite(num_bytes) or num_bytes < 1:
        raise ValueError(f"memory budget is {value!r}; expected a size such as 3.3GB (1e9) or 3GiB (2^30), bytes, or auto.")
    return int(num_bytes)


def available_bytes() -> int:
    """Returns the bytes that this process can still get: free memory, but no more than the limit of its control group.

    What the process holds already counts as available, because it is part of its peak.

    Raises:
      ValueError: the system does not say; give the budget in bytes.
    """
    if hasattr(os, "sysconf") and Path("/proc/meminfo").exists():
        fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        free = int(fields["MemAvailable"].split()[0]) * 1024 + _held_bytes()
    else:
        try:
            free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        except (AttributeError, OSError, ValueError):
            raise ValueError(f"this system does not say how much memory is free; give a budget in bytes, not {AUTO}.") from None
    limits = [_cgroup_limit(_CGROUP / "memory.max"), _cgroup_limit(_CGROUP / "memory" / "memory.limit_in_bytes")]
    return min([free, *(limit for limit in limits if limit is not None)])


def _bytes_of(text: str) -> float | None:
    found = _PATTERN.fullmatch(text.strip())
    if found is None:
        return None
    number, prefix, binary = found.groups(default="")
    if binary and not prefix:
        return None
    return float(number) * (1024 if binary else 1000) ** _PREFIXES[prefix.lower()]


def _held_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _cgroup_limit(path: Path) -> int | None:
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None
