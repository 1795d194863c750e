import json

import pytest

from benchmarks._support.machine import memory
from sora_jax.process import PeakMeter, resident_bytes
from sora_jax.streaming.profile import Profile
from sora_jax.streaming.retention import Retention

LAYERS = [100, 100, 100, 100]


@pytest.mark.parametrize(("budget", "count"), [(50, 0), (149, 0), (150, 1), (349, 2), (450, 4), (10**9, 4)])
def test_as_many_layers_as_fit(budget, count):
    assert Retention(LAYERS, budget=budget, fixed_bytes=50).count == count


def test_without_a_budget_all_layers_or_the_number_given():
    assert Retention(LAYERS).count == 4
    assert Retention(LAYERS, count=3).count == 3


def test_a_budget_that_holds_nothing_is_refused():
    with pytest.raises(ValueError, match=r"too small: the transformer needs 5e-08 GB"):
        Retention(LAYERS, budget=49, fixed_bytes=50)


def test_a_refused_budget_changes_nothing():
    retention = Retention(LAYERS, budget=250, fixed_bytes=50)
    with pytest.raises(ValueError, match="too small"):
        retention.budget = 10
    assert (retention.budget, retention.count) == (250, 2)


def test_a_measured_need_replaces_the_planned_bytes():
    retention = Retention(LAYERS, budget=450, fixed_bytes=200)
    assert retention.count == 2
    retention.correct(150)
    assert (retention.fixed_bytes, retention.count) == (150, 3)
    retention.correct(300)
    assert (retention.fixed_bytes, retention.count) == (300, 1)
    retention.correct(700)  # more than any retention could save: nothing is retained
    assert retention.count == 0


def test_a_need_beyond_the_plan_lets_layers_go_at_once_and_a_smaller_one_changes_nothing():
    retention = Retention(LAYERS, budget=450, fixed_bytes=50)
    retention.guard(40)
    assert (retention.fixed_bytes, retention.count) == (50, 4)
    retention.guard(250)
    assert (retention.fixed_bytes, retention.count) == (250, 2)
    retention.guard(180)
    assert (retention.fixed_bytes, retention.count) == (250, 2)
    retention.budget = 351  # the need that was found holds for another budget too
    assert retention.count == 1


def test_a_number_of_layers_takes_the_place_of_the_budget():
    retention = Retention(LAYERS, budget=450, fixed_bytes=200)
    retention.count = 4
    retention.correct(10**6)
    retention.guard(10**6)
    assert (retention.budget, retention.count) == (None, 4)


@pytest.mark.skipif(resident_bytes() is None, reason="this system does not say how much memory a process holds")
def test_the_meter_sees_what_was_held_and_freed_since_the_last_sample():
    meter, before, more = PeakMeter(), memory()["peak_bytes"], 200_000_000
    meter.start()
    held = b"x" * (before - (resident_bytes() or 0) + more)
    size = len(held)
    del held
    found = meter.sample()
    assert abs(found - before - more) < more / 4
    assert meter.sample() < found - size + more / 2  # counted once


def test_a_trace_has_one_lane_for_each_kind_and_microseconds(tmp_path):
    profile = Profile()
    profile.add("load", "spatial_blocks.1", 10.5, 10.75)
    profile.add("compute", "spatial_blocks.0", 10.25, 11.0)
    trace = json.loads(profile.save(tmp_path / "trace.json").read_text())
    spans = [(event["name"], event["cat"], event["ts"], event["dur"]) for event in trace["traceEvents"] if event["ph"] == "X"]
    assert spans == [("spatial_blocks.0", "compute", 0.0, 750_000.0), ("spatial_blocks.1", "load", 250_000.0, 250_000.0)]
    assert len({event["tid"] for event in trace["traceEvents"] if event["ph"] == "X"}) == 2
    assert profile.total_s("compute") == 0.75
    with pytest.raises(FileExistsError, match="exists"):
        profile.save(tmp_path / "trace.json")
