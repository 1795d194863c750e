"""Replicas that share nothing: which clips each of them makes.

Invariant: a clip's number alone decides its share, whatever exists already and whoever runs, so that any split of a run makes
the same clips and a run that is split anew goes on.  JAX is not imported.
"""

import dataclasses
import re

_MOST = 10**6


@dataclasses.dataclass(frozen=True)
class Share:
    """Share ``index`` of ``count``, of groups of clips with consecutive numbers."""

    index: int
    count: int

    def has(self, position: int, group: int) -> bool:
        """Returns whether the clip at a position of the run, counted from 0, belongs to the share; ``group`` go together."""
        return position // group % self.count == self.index

    def number_of(self, clips: int, group: int) -> int:
        """Returns how many of a run's clips belong to the share."""
        return sum(self.has(position, group) for position in range(clips))


ALL = Share(0, 1)


def parse_share(text: str) -> Share:
    """Returns the share that ``I/N`` names.

    Raises:
      ValueError: it is none; shares count from 0, as array jobs do.
    """
    match = re.fullmatch(r"(\d{1,7})/(\d{1,7})", text.strip())
    if match is None or not 0 <= int(match[1]) < int(match[2]) <= _MOST:
        raise ValueError(f"share {text!r} is none; expected I/N with 0 <= I < N, as 0/4 to 3/4.")
    return Share(int(match[1]), int(match[2]))
