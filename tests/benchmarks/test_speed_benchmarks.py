"""The benchmarks of speed at toy sizes: their arithmetic, what they compare, and the shape of their reports."""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks._support import random_network
from benchmarks.speed import ablation, evaluation_speed, sampler_overhead
from sora_jax import Schedule, sample
from sora_jax.config import STDiT3Config, open_sora_1_2

CONFIG = open_sora_1_2.stdit3
SMALL = dataclasses.replace(CONFIG, hidden_size=48, num_heads=4, depth=3, caption_channels=32, model_max_length=20)


def run(module: Any, *arguments: object) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [module.__name__, *map(str, arguments)])
        patch.setattr("builtins.print", lambda *_, **__: None)
        module.main()
    return json.loads(Path(arguments[arguments.index("--out") + 1]).read_text())


@pytest.mark.parametrize("merged", [False, True])
def test_arithmetic_is_what_xla_counts(merged: bool) -> None:
    """XLA's own count of a compiled evaluation holds the same products and a little more: norms, activations, softmax."""
    config = dataclasses.replace(SMALL, hidden_size=96)
    velocity = random_network.random_velocity(config, "float32", frames=4, side=8)
    z = jnp.zeros((2, 4, 8, 8, 4))
    compiled = jax.jit(lambda velocity, z: velocity.evaluate(z, jnp.full(2, 500.0), merged=merged)).lower(velocity, z).compile()
    ours = sum(random_network.gflop(config, rows=2, frames=4, side=8, merged=merged).values())
    counted = compiled.cost_analysis()["flops"] / 1e9
    assert ours < counted < 1.25 * ours


def test_the_whole_evaluation_at_real_size_counts_every_product() -> None:
    """2 x 1,280 tokens through 28 pairs: 5.8 TFLOP, 26 s at 223 GFLOP/s."""
    parts = random_network.gflop(CONFIG, rows=2, frames=5, side=32)
    width = 1152
    per_token = 2 * (4 + 2 + 8) * width**2  # qkv, projection, two maps to the captions, MLP
    assert parts["mlp"] + parts["linear maps"] == pytest.approx(2 * 28 * 2560 * per_token / 1e9)
    assert sum(parts.values()) == pytest.approx(5800, rel=0.01)


def test_pairs_share_the_weights_of_the_first() -> None:
    network = random_network.random_stdit3(SMALL, "bfloat16")
    first, last = network.spatial_blocks[0].mlp.fc1.kernel[...], network.spatial_blocks[2].mlp.fc1.kernel[...]
    assert first is last
    assert network.temporal_blocks[0].mlp.fc1.kernel[...] is not first
    assert first.dtype == jnp.bfloat16


def test_the_bare_loop_is_the_plain_sampling() -> None:
    z, schedule = jnp.asarray(np.random.default_rng(0).standard_normal((1, 2, 3)), jnp.float32), Schedule.uniform(30)
    expected = sample(sampler_overhead.drift, z, schedule).z
    np.testing.assert_allclose(sampler_overhead.bare(z, jnp.asarray(schedule.visited)), expected, rtol=1e-6)


@pytest.mark.slow
def test_ablation_compares_what_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ablation, "with_depth", lambda config, depth: small(depth))
    report = run(ablation, "--depth", 1, "--repeats", 2, "--sizes", "4x4", "--out", tmp_path / "a.json")
    found = report["sizes"]["4x4"]
    counts = found["gain_by_arithmetic"]
    assert counts["LPL"] == 30 / 16
    assert counts["LPL and TDTM 30"] == pytest.approx(counts["LPL"] * counts["TDTM 30"], rel=1e-3)
    assert counts["LPL and TDTM 15"] > counts["LPL"] * counts["TDTM 15"]  # 15 of 16 evaluations merge, not 15 of 30
    assert found["gain"]["none"] == 1
    assert set(found["streaming"]["gain_over_in_turn"]) == {"none, CI", "none, CI and DL", "all"}
    assert counts["none, CI"] == 1
    assert counts["all"] == counts["LPL and TDTM 15"]
    seconds, streaming = found["seconds_median"], found["streaming"]
    assert streaming["load_and_compute_in_turn_s"] == pytest.approx(seconds["none"] + streaming["loading_s"], abs=0.002)
    assert set(found["product with TDTM 15"]) == {"product", "both", "reached"}


@pytest.mark.slow
def test_evaluation_speed_reports_both_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation_speed, "with_depth", lambda config, depth: small(depth))
    arguments = ("--repeats", 1, "--depth", 1, "--frames", 2, "--side", 4, "--sizes", "4x4", "--dtypes", "float32")
    report = run(evaluation_speed, *arguments, "--out", tmp_path / "a.json")
    found = report["evaluation"]["float32"]
    assert found["tokens"] == 16
    assert found["gflop_per_s"] * found["seconds_min"] == pytest.approx(sum(found["gflop"].values()), rel=0.1, abs=0.01)
    assert report["merging"]["4 x 4 x 4"]["by_arithmetic"] > 1


def small(depth: int) -> STDiT3Config:
    return dataclasses.replace(SMALL, depth=depth)
