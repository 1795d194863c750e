"""Memory budgets as users write them, in bytes.

Invariant: kB, MB, GB and TB are powers of 1,000, KiB, MiB, GiB and TiB powers of 1,024, and a bare whole number is bytes;
there is no other reading of a budget in the library.  The memory plan decides what a budget is spent on.
"""

import math
import re

from sora_jax.process import available_bytes

AUTO = "auto"
AUTO_SHARE = 0.9  # of what is free: other processes, and the system's file cache, keep the rest

_PREFIXES = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}
_PATTERN = re.compile(r"(\d+(?:\.\d*)?|\.\d+)\s*(?:([kmgt]?)(i?)b)?", re.IGNORECASE)


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


def _bytes_of(text: str) -> float | None:
    found = _PATTERN.fullmatch(text.strip())
    if found is None:
        return None
    number, prefix, binary = found.groups(default="")
    has_unit = text.strip()[-1:] in "bB"
    if (binary and not prefix) or not (has_unit or number.isdecimal()):
        return None  # parts of a byte: a unit was forgotten
    return float(number) * (1024 if binary else 1000) ** _PREFIXES[prefix.lower()]
