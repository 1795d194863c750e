"""How many layers stay in memory: state of the host, which a run reads before every block and which may change during the run.

Invariant: the first ``count`` layers in execution order are retained, the largest number whose bytes fit into the budget after
everything else; no compiled program depends on it.  What everything else needs is first planned and then measured.
"""

import itertools
import threading
from collections.abc import Sequence


class Retention:
    """The number of retained layers, computed from a budget or fixed.

    Args:
      layer_bytes: bytes that each layer takes up when it is retained.
      budget: bytes that the process may hold; None retains every layer, or ``count`` of them.
      fixed_bytes: planned bytes of the process without any retained layer.
      count: retained layers, without a budget.

    Raises:
      ValueError: the budget is below what is needed without retained layers.
    """

    def __init__(
        self,
        layer_bytes: Sequence[int],
        *,
        budget: int | None = None,
        fixed_bytes: int = 0,
        count: int | None = None,
    ):
        self._sums = [0, *itertools.accumulate(layer_bytes)]
        self._lock = threading.Lock()
        self._fixed_bytes = fixed_bytes
        self._budget = budget
        self._count = len(layer_bytes) if count is None else min(count, len(layer_bytes))
        if budget is not None:
            self._fit(budget)

    @property
    def count(self) -> int:
        """How many layers are retained, counted from the first."""
        return self._count

    @count.setter
    def count(self, count: int) -> None:
        with self._lock:
            self._budget, self._count = None, max(0, min(count, len(self._sums) - 1))

    @property
    def budget(self) -> int | None:
        """Bytes that the process may hold; a change takes effect at the next block."""
        return self._budget

    @budget.setter
    def budget(self, budget: int) -> None:
        with self._lock:
            self._fit(budget)

    @property
    def fixed_bytes(self) -> int:
        """Bytes of the process without any retained layer: planned, or measured if that is more, or the plan was corrected."""
        return self._fixed_bytes

    @fixed_bytes.setter
    def fixed_bytes(self, fixed_bytes: int) -> None:
        with self._lock:
            self._fixed_bytes = fixed_bytes
            if self._budget is not None:
                self._fit(self._budget)

    def correct(self, fixed_bytes: int) -> None:
        """Replaces the plan by what a whole evaluation needed besides retained layers."""
        with self._lock:
            if self._budget is not None:
                self._fixed_bytes = fixed_bytes
                self._count = self._largest(self._budget)

    def guard(self, fixed_bytes: int) -> None:
        """Retains fewer layers from now on, if this many bytes were needed besides retained ones and that is more than known.

        If the plan underestimates memory, layers are evicted and the evaluation goes on.
        """
        with self._lock:
            if self._budget is not None and fixed_bytes > self._fixed_bytes:
                self._fixed_bytes = fixed_bytes
                self._count = min(self._count, self._largest(self._budget))

    def _fit(self, budget: int) -> None:
        if budget < self._fixed_bytes:
            raise ValueError(
                f"memory budget of {budget / 1e9:.3g} GB is too small: the transformer needs {self._fixed_bytes / 1e9:.3g} GB "
                f"at this size without retaining a layer; raise the budget or make a smaller or shorter video."
            )
        self._budget, self._count = budget, self._largest(budget)

    def _largest(self, budget: int) -> int:
        return max((k for k, total in enumerate(self._sums) if self._fixed_bytes + total <= budget), default=0)
