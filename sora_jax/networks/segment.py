"""Where a network can be cut: the declaration by which it names methods that run one after the other.

Invariant: a network's forward calls the methods that its segments name, in the same order, so running them one at a time
computes the same thing.  Nothing is computed here, and reading parameters from files belongs to ``streaming``.
"""

from collections.abc import Callable
from typing import Any, NamedTuple


class Segment(NamedTuple):
    """A method that can run while only the parameters it reads are in memory.

    Attributes:
      method: a method of one of the network's modules, unbound: takes the module and the activations, returns the activations.
      path: attributes and indices that lead from the network to the module; none: the network itself.
      parts: the module's attributes whose parameters the method reads; none: all of the module.
      static: further arguments that decide what is compiled.
      takes_context: whether the method also takes what the network hands along unchanged (see its ``segments``).
    """

    method: Callable[..., Any]
    path: tuple[str | int, ...] = ()
    parts: tuple[str, ...] = ()
    static: tuple[int, ...] = ()
    takes_context: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """Dotted names of the modules whose parameters are read, as flat parameter names begin."""
        paths = [(*self.path, part) for part in self.parts] or [self.path]
        return tuple(".".join(map(str, path)) for path in paths)

    def module(self, network: Any) -> Any:
        """Returns the module of a network that the method belongs to."""
        for step in self.path:
            network = network[step] if isinstance(step, int) else getattr(network, step)
        return network

    def inside(self, *path: str | int) -> "Segment":
        """Returns the same segment of a network that holds this one's at ``path``."""
        return self._replace(path=(*path, *self.path))
