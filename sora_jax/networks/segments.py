"""Stretches of a network that can run one after the other, each with only its own parameters in memory.

Invariant: a network's forward pass is its segments in order, so running them one at a time computes the same thing.  Which
segments there are is the network's own knowledge; loading their parameters belongs to ``streaming``.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple


class Segment(NamedTuple):
    """A stretch of a network.

    Attributes:
      parts: the submodules it uses, by dotted name.
      apply: takes those submodules, then the activations and what else the network hands to every segment; returns the
        activations.  Segments of one kind share the function, and so the compiled program.
    """

    parts: tuple[str, ...]
    apply: Callable[..., Any]


def part(network: Any, name: str) -> Any:
    """Returns the submodule of a network that a dotted name such as ``block.3.attn`` means."""
    return functools.reduce(lambda at, step: at[int(step)] if step.isdigit() else getattr(at, step), name.split("."), network)


def run(network: Any, segments: Sequence[Segment], x: Any, *context: Any) -> Any:
    """Returns the activations ``x`` after the segments; every one is handed ``context`` too."""
    for segment in segments:
        x = segment.apply(*(part(network, name) for name in segment.parts), x, *context)
    return x


def within(prefix: str, segments: Sequence[Segment]) -> list[Segment]:
    """Returns the segments of a submodule as segments of the network that holds it under the name ``prefix``."""
    return [Segment(tuple(f"{prefix}.{name}" for name in segment.parts), segment.apply) for segment in segments]
