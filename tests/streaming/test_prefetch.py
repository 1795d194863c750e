import threading
import time
from collections.abc import Callable, Iterator

import pytest

from sora_jax.streaming.prefetch import Prefetcher, Slot


def reader_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "layer-reader"]


def becomes(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 5
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.005)
    return condition()


class Log:
    """Loads layers into slots as text, and keeps the order; raises for those in ``bad``."""

    def __init__(self) -> None:
        self.loaded: list[int] = []
        self.bad: dict[int, BaseException] = {}
        self.hold = threading.Event()
        self.hold.set()

    def load(self, index: int, slot: Slot) -> None:
        assert self.hold.wait(30)
        if index in self.bad:
            raise self.bad[index]
        self.loaded.append(index)
        slot.buffer = f"layer {index}"


@pytest.fixture
def log() -> Log:
    return Log()


@pytest.fixture
def prefetcher(log: Log) -> Iterator[Prefetcher]:
    prefetcher = Prefetcher(log.load, lambda index: f"layer {index}", stall_s=5)
    yield prefetcher
    prefetcher.close()
    assert not reader_threads()


def test_layers_come_in_the_order_they_are_wanted(log, prefetcher):
    for index in range(6):
        slot = prefetcher.take(index % 3, [(index + 1) % 3, (index + 2) % 3])
        assert slot.buffer == f"layer {index % 3}"
        prefetcher.free(slot)
    assert becomes(lambda: log.loaded == [0, 1, 2, 0, 1, 2, 0, 1])


def test_a_taken_slot_is_not_written(log, prefetcher):
    slot = prefetcher.take(0, [1, 2])
    assert becomes(lambda: log.loaded == [0, 1])
    assert slot.buffer == "layer 0"
    assert prefetcher.holding() == {0, 1}
    prefetcher.free(slot)
    assert becomes(lambda: log.loaded == [0, 1, 2])


def test_what_is_no_longer_wanted_makes_room(log, prefetcher):
    prefetcher.free(prefetcher.take(0, [1, 2]))
    assert becomes(lambda: log.loaded == [0, 1, 2])
    assert prefetcher.take(7, [8]).buffer == "layer 7"
    assert becomes(lambda: log.loaded == [0, 1, 2, 7, 8])
    assert prefetcher.holding() == {7, 8}


def test_what_is_no_longer_wanted_when_its_read_ends_makes_room(log, prefetcher):
    taken = prefetcher.take(0, [1, 2])
    assert becomes(lambda: log.loaded == [0, 1])
    log.hold.clear()
    prefetcher.free(taken)  # layer 1 is ready and layer 2 is being read when layer 0 is wanted again
    assert becomes(lambda: prefetcher.holding() == {1, 2})
    threading.Timer(0.05, log.hold.set).start()
    assert prefetcher.take(0, [1, 2]).buffer == "layer 0"
    assert becomes(lambda: prefetcher.holding() == {0, 1})


def test_what_is_discarded_is_read_again(log, prefetcher):
    prefetcher.free(prefetcher.take(0, [1, 2]))
    assert becomes(lambda: log.loaded == [0, 1, 2])
    prefetcher.discard()
    assert prefetcher.holding() == set()
    assert prefetcher.take(1, []).buffer == "layer 1"


def test_one_thread_reads_everything_until_the_end_and_another_thereafter(log, prefetcher):
    for index in range(5):
        prefetcher.free(prefetcher.take(index, [index + 1]))
    (thread,) = reader_threads()
    prefetcher.close()
    assert not thread.is_alive()
    assert prefetcher.holding() == set()
    assert prefetcher.take(9, []).buffer == "layer 9"
    assert reader_threads() != [thread]


def test_an_error_is_raised_where_the_layer_is_taken_and_only_once(log, prefetcher):
    log.bad[1] = error = OSError("no such sector")
    prefetcher.free(prefetcher.take(0, [1]))
    with pytest.raises(OSError, match="no such sector") as raised:
        prefetcher.take(1, [2])
    assert raised.value is error
    del log.bad[1]
    assert prefetcher.take(1, [2]).buffer == "layer 1"


def test_a_read_that_does_not_end_is_an_error_and_leaves_no_trace(log, prefetcher):
    prefetcher.stall_s = 0.05
    log.hold.clear()
    with pytest.raises(TimeoutError, match=r"layer 3 was not read within 0.05 s"):
        prefetcher.take(3, [4])
    log.hold.set()
    assert becomes(lambda: not reader_threads())
    assert prefetcher.holding() == set()
    prefetcher.stall_s = 5
    slot = prefetcher.take(3, [4])
    assert slot.buffer == "layer 3"
