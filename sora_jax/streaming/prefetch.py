"""Reading layers before they are wanted: one thread, a few staging slots.

Invariant: a slot is written by the reading thread or held by who took it, never both; at most one thread reads, from the first
layer wanted until `close`.  It is not started anew for every layer: where memory has run out, starting a thread may never
return.  What a slot holds (arrays, or nothing where pages are mapped) is up to the ``load`` function.
"""

import dataclasses
import threading
from collections.abc import Callable, Sequence
from typing import Any

EMPTY, LOADING, READY, TAKEN = "empty", "loading", "ready", "taken"
NUM_SLOTS = 2  # one layer is computed with, the next is read
STALL_S = 300.0  # a read that takes longer is reported as a fault instead of being waited for


@dataclasses.dataclass(eq=False)
class Slot:
    """One staging place.

    Attributes:
      index: the layer it is for.
      state: `EMPTY`, `LOADING`, `READY` or `TAKEN`.
      error: what reading the layer raised.
      buffer: what ``load`` keeps in it; stays from layer to layer.
      unwanted: set when nobody waits for the layer any more; reading it may be given up.
    """

    index: int | None = None
    state: str = EMPTY
    error: BaseException | None = None
    buffer: Any = None
    unwanted: bool = False


class Prefetcher:
    """Loads layers in the order in which they will be wanted.

    Args:
      load: reads layer ``index`` into a slot, on the reading thread.
      describe: names a layer, for the error of a read that does not end.
      num_slots: staging places; with one, nothing is read while a layer is taken.
      stall_s: seconds that one read may take.
    """

    def __init__(
        self,
        load: Callable[[int, Slot], None],
        describe: Callable[[int], str],
        *,
        num_slots: int = NUM_SLOTS,
        stall_s: int | float = STALL_S,
    ):
        self._load, self._describe, self.stall_s = load, describe, stall_s
        self._condition = threading.Condition()
        self._slots = [Slot() for _ in range(num_slots)]
        self._wanted: Sequence[int] = ()
        self._thread: threading.Thread | None = None

    def take(self, index: int, following: Sequence[int]) -> Slot:
        """Returns the slot that holds layer ``index``, waiting for it; then ``following`` is read ahead, in this order.

        Raises:
          TimeoutError: the read did not end.
          BaseException: whatever reading the layer raised; it is tried afresh the next time.
        """
        with self._condition:
            self._want([index, *following])
            if not self._condition.wait_for(lambda: self._ready(index), self.stall_s):
                self._abandon()
                raise TimeoutError(
                    f"{self._describe(index)} was not read within {self.stall_s:g} s; check the disk or the network."
                )
            slot = next(slot for slot in self._slots if slot.index == index)
            if slot.error is not None:
                error = slot.error
                self._empty(slot)
                raise error
            slot.state = TAKEN
            self._want(following)
            return slot

    def free(self, slot: Slot) -> None:
        """Returns a taken slot to the reader, which goes on reading ahead."""
        with self._condition:
            self._empty(slot)
            self._wake()

    def want(self, following: Sequence[int]) -> None:
        """Says which layers come next, where none has to be waited for."""
        with self._condition:
            self._want(following)

    def close(self) -> None:
        """Forgets everything read ahead and ends the reading thread; what is wanted later is read by another."""
        self.discard()
        with self._condition:
            thread, self._thread = self._thread, None
            self._condition.notify_all()
        if thread is not None:
            thread.join()

    def discard(self) -> None:
        """Forgets everything read ahead, waiting for the read under way, which is asked to give up."""
        with self._condition:
            self._wanted = ()
            for slot in self._slots:
                slot.unwanted = True
            if not self._condition.wait_for(lambda: all(slot.state != LOADING for slot in self._slots), self.stall_s):
                self._abandon()
            self._slots = [Slot() for _ in self._slots]

    def holding(self) -> set[int]:
        """Returns the layers that are in a slot: being read, read ahead, or taken."""
        with self._condition:
            return {slot.index for slot in self._slots if slot.index is not None}

    def _ready(self, index: int) -> bool:
        return any(slot.index == index and slot.state == READY for slot in self._slots)

    def _want(self, wanted: Sequence[int]) -> None:
        self._wanted = wanted
        self._drop_unwanted()
        self._wake()

    def _drop_unwanted(self) -> None:
        for slot in self._slots:
            if slot.state == READY and slot.index not in self._wanted[: len(self._slots)]:
                self._empty(slot)

    def _empty(self, slot: Slot) -> None:
        slot.index, slot.state, slot.error = None, EMPTY, None

    def _wake(self) -> None:
        if self._thread is None and self._next() is not None:
            self._thread = threading.Thread(target=self._work, name="layer-reader", daemon=True)
            self._thread.start()
        self._condition.notify_all()

    def _next(self) -> tuple[int, Slot] | None:
        """Returns the layer to read next and the slot for it, if there are both."""
        held = {slot.index for slot in self._slots}
        index = next((index for index in self._wanted[: len(self._slots)] if index not in held), None)
        slot = next((slot for slot in self._slots if slot.state == EMPTY), None)
        return None if index is None or slot is None else (index, slot)

    def _abandon(self) -> None:
        """Abandons a read that does not end: its thread ends when the read returns, and its slot is no longer ours."""
        self._slots = [Slot() if slot.state == LOADING else slot for slot in self._slots]
        self._thread = None

    def _work(self) -> None:
        me = threading.current_thread()
        while True:
            with self._condition:
                self._condition.wait_for(lambda: self._thread is not me or self._next() is not None)
                job = self._next() if self._thread is me else None
                if job is None:
                    return
                index, slot = job
                slot.index, slot.state = index, LOADING
            try:
                self._load(index, slot)
                error = None
            except BaseException as raised:  # raised again where the layer is taken
                error = raised
            with self._condition:
                slot.state, slot.error = READY, error
                self._drop_unwanted()  # others may have come to be wanted during the read, and need the slot
                self._condition.notify_all()
