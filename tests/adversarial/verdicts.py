"""The classes that mutants fall into, and which of them are allowed."""

import dataclasses
import enum
from collections import Counter
from collections.abc import Iterable

MUTATION = "mutation.txt"  # what was done, left in a mutant's folder for the case that its process dies


class Verdict(enum.StrEnum):
    """What became of a mutant."""

    REFUSED = "refused cleanly"
    EQUAL = "accepted, every value equal"
    BETRAYED = "accepted, betrayed by the source alone"  # no shape shows it; verify --source must
    OTHER = "accepted, other values"
    UNCLEAN = "refused, but not in one line that names the file"
    TRACEBACK = "traceback"
    SLOW = "over 10 CPU seconds"
    LARGE = "over 1 GB"


ALLOWED = frozenset({Verdict.REFUSED, Verdict.EQUAL, Verdict.BETRAYED})


@dataclasses.dataclass(frozen=True)
class Outcome:
    """One mutant's verdict; ``mutation`` says what was done to it and ``detail`` what was seen."""

    kind: str
    number: int
    mutation: str
    verdict: Verdict
    detail: str = ""


def table(outcomes: Iterable[Outcome]) -> str:
    """Returns the counts of all classes, those that are not allowed with their cases."""
    outcomes = list(outcomes)
    counts = Counter(outcome.verdict for outcome in outcomes)
    lines = [f"{counts[verdict]:5d}  {verdict}" for verdict in Verdict]
    lines += [
        f"  {outcome.verdict}: {outcome.kind} {outcome.number}, {outcome.mutation}: {outcome.detail}"
        for outcome in outcomes
        if outcome.verdict not in ALLOWED
    ]
    return "\n".join(lines)
