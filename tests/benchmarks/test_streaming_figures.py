"""The arithmetic of the streaming benchmarks: the paper's equations against schedules written out, and what pictures show."""

import time

import pytest

from benchmarks._support.streaming_figures import LimitedReader, in_turn, listed, predictions, saving
from sora_jax.streaming.profile import Profile


def pipelined(num_blocks: int, load: float, compute: float, retained: int) -> float:
    """The end of the last computation where one thread loads what is not retained and another computes, in order."""
    loaded = computed = 0.0
    for block in range(num_blocks):
        loaded += load if block >= retained else 0.0
        computed = max(computed, loaded if block >= retained else 0.0) + compute
    return computed


@pytest.mark.parametrize(("load", "compute"), [(3.0, 1.0), (1.0, 3.0), (2.0, 2.0)])
def test_equation_10_is_a_pipeline_but_for_its_first_or_last_part(load: float, compute: float) -> None:
    sequential, concurrent, _ = predictions(8, load, compute, 0)
    assert sequential == 8 * (load + compute)
    assert concurrent + min(load, compute) == pipelined(8, load, compute, 0)


@pytest.mark.parametrize("retained", [0, 3, 8])
def test_equation_11_leaves_retained_blocks_their_computing(retained: int) -> None:
    _, concurrent, kept = predictions(8, 3.0, 1.0, retained)
    assert kept == concurrent - retained * 2.0 == (8 - retained) * 3.0 + retained * 1.0
    assert pipelined(8, 3.0, 1.0, retained) <= kept + 1.0  # the reader also works while retained blocks compute
    assert predictions(8, 1.0, 3.0, retained)[1] == predictions(8, 1.0, 3.0, retained)[2]
    assert saving(8 * 4.0, concurrent) == 0.25


def test_in_turn_has_every_load_and_computation_once_one_after_the_other() -> None:
    profile = Profile()
    for block in range(4):
        if block:  # the first was read before
            profile.add("load", f"b{block}", 10.0 + block, 12.0 + block)
        profile.add("compute", f"b{block}", 12.0 + block, 12.5 + block)
        profile.add("wait", f"b{block}", 11.9 + block, 12.0 + block)
    shown = listed(in_turn(profile))
    assert [(lane, layer) for lane, layer, *_ in shown] == [(lane, f"b{i}") for i in range(4) for lane in ("load", "compute")]
    begins, ends = [begin for *_, begin, _ in shown], [end for *_, end in shown]
    assert begins == [0.0, *ends[:-1]]
    assert ends[-1] == 1e3 * 4 * 2.5


def test_a_limited_reader_takes_its_time_and_no_more() -> None:
    for bytes_per_s, least in ((1e6, 0.05), (None, 0.0)):
        start = time.perf_counter()
        with LimitedReader(bytes_per_s)("layer", 50_000):
            time.sleep(0.02)
        assert max(least, 0.02) <= time.perf_counter() - start < least + 0.5
