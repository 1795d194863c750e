"""Meshes of eight virtual devices: the same samples as on one device, by one program, with two exchanges a pair of blocks.

Samplings run in a process of their own (`meshes`).  One of them is in the default run; the covering set, where every mesh and
every option has its turn, and the coders are slow, and CI runs them.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from sora_jax import layout
from sora_jax.devices.mesh import filled, is_spread, make_mesh, name_of
from sora_jax.networks import registry
from sora_jax.pipeline.pipeline import Pipeline
from sora_jax.pipeline.velocity import Velocity
from sora_jax.sampling import sampler as compiled
from sora_jax.sampling.reuse import Plan
from sora_jax.sampling.sampler import Sampler
from sora_jax.sampling.schedule import Schedule
from tests.devices import meshes
from tests.support.tiny_model import CONFIG

MOST_ERROR = 1e-5  # float32, another order of sums; measured: 4e-7
DEFAULT = "all three, plan, spread"


def run(*names: str, optimised: bool = False) -> list[dict[str, Any]]:
    """Returns what the other process prints."""
    devices = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    environment = {**os.environ, **devices} | ({} if optimised else {"MESH_LITTLE_OPTIMISED": "1"})
    ended = subprocess.run(
        [sys.executable, "-m", "tests.devices.meshes", *names], env=environment, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    return [json.loads(line) for line in ended.stdout.splitlines()]


def check(outcome: dict[str, Any]) -> None:
    assert outcome["error"] <= MOST_ERROR, outcome
    on_mesh, alone = outcome["evaluations"]
    assert on_mesh == alone, outcome
    assert outcome["leapt"], outcome
    assert outcome["programs"] == 1, outcome  # at the second call of the program too


@pytest.mark.slow
def test_samples_on_a_mesh_are_those_of_one_device() -> None:
    (outcome,) = run(DEFAULT)
    check(outcome)


@pytest.mark.slow
def test_every_mesh_and_every_option() -> None:
    outcomes = run()
    assert [outcome["case"] for outcome in outcomes] == list(meshes.CASES)
    for outcome in outcomes:
        check(outcome)


def test_the_covering_set_covers() -> None:
    assert {mesh for mesh, _, _ in meshes.CASES.values()} == set(meshes.MESHES)
    assert len(meshes.CASES) <= 10


@pytest.mark.slow
def test_a_pair_of_blocks_has_two_exchanges_and_no_gathering_of_tokens() -> None:
    """The bytes a device brings: two rows over two devices of guidance; 5 frames and 15 places over four become 8 and 16."""
    (outcome,) = run("evaluation", optimised=True)
    rows, frames, places, width, pairs = 2, 8, 4, outcome["width"], 2
    assert outcome["collectives"]["all-to-all"] == [2 * pairs, 2 * pairs * 4 * rows * frames * places * width]
    patches, velocity = rows * 5 * places * 4 * CONFIG.stdit3.out_channels, rows * 5 * 6 * 10 * CONFIG.stdit3.in_channels
    assert outcome["collectives"]["all-gather"] == [2, 4 * (patches + velocity)]
    assert outcome["collectives"].keys() == {"all-to-all", "all-gather"}


@pytest.mark.slow
def test_spread_weights_are_fetched_in_every_step_and_not_kept() -> None:
    (outcome,) = run("spread", optimised=True)
    assert outcome["before"] == 0
    assert outcome["in the loop"] > 20  # its matrices, and the velocity


@pytest.mark.slow
def test_captions_chunks_and_frames_are_dealt_out_without_collectives() -> None:
    (outcome,) = run("coders")
    assert max(outcome["errors"]) <= MOST_ERROR
    assert outcome["shapes"][0] == outcome["shapes"][1]
    assert set(outcome["collectives"]) == {0}


def lowered() -> str:
    """Returns the text of a sampler that uses every function of ``layout``, lowered anew."""
    one = np.ones(1, np.float32)
    velocity = Velocity(
        network=jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), registry.abstract("stdit3", CONFIG.stdit3)),
        caption_RLE=np.zeros((2, 12, CONFIG.stdit3.caption_channels), np.float32),
        mask_BL=np.ones((1, 12), bool),
        fps=one,
        height_px=one,
        width_px=one,
    )
    plan = Plan(codes=(0, 1, 2, 0))
    schedule = Schedule.open_sora(4, height_px=32, width_px=32, num_frames=17)
    sampler = Sampler.create(velocity, schedule, guidance=3.0, plan=plan, merge_steps=1)
    z = jax.ShapeDtypeStruct((1, 5, 4, 4, CONFIG.stdit3.in_channels), np.float32)
    start = jax.eval_shape(lambda *given: compiled._start.__wrapped__(*given), sampler, z)
    leaves, structure = jax.tree.flatten((sampler, start, jax.ShapeDtypeStruct((), np.int32)))
    again = jax.jit(lambda *leaves: jax.tree.leaves(compiled._run.__wrapped__(*jax.tree.unflatten(structure, leaves))))
    return again.lower(*leaves).as_text()


def test_without_a_mesh_the_lowered_text_is_that_of_identities(monkeypatch: pytest.MonkeyPatch) -> None:
    text = lowered()
    monkeypatch.setattr(layout, "over_mesh", lambda function, arguments, specs, results: function(*arguments))
    monkeypatch.setattr(layout, "joined", lambda first, rest: jax.numpy.concatenate([first, rest]))
    monkeypatch.setattr(layout, "divided", lambda num_places: None)
    monkeypatch.setattr(layout, "after", lambda x, module: module)
    for name in ("residual", "everywhere", "own_places"):
        monkeypatch.setattr(layout, name, lambda x: x)
    for name in ("frames", "places", "all_places", "all_rows"):
        monkeypatch.setattr(layout, name, lambda x, *_: x)
    assert lowered() == text
    assert "sharding" not in text


def test_a_mesh_of_the_callers_has_the_axes_that_it_lacks() -> None:
    mesh = make_mesh(jax.sharding.Mesh(np.array(jax.devices()[:1]), ("sequence",)))
    assert dict(mesh.shape) == {"guidance": 1, "data": 1, "sequence": 1}
    assert name_of(mesh) == "data=1"
    assert name_of(make_mesh("sequence=1")) == "data=1"


@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        ("sequence=3", r"mesh 'sequence=3' has 3 devices, but there are 1 \(cpu\); expected axes whose product is 1"),
        (jax.sharding.Mesh(np.array(jax.devices()[:1]), ("model",)), "the mesh has the axis 'model'; expected data, guidance"),
    ],
)
def test_what_is_no_mesh_here_is_refused(mesh: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_mesh(mesh)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"mesh": "sequence=1", "memory_budget": "3GB"},
            "a memory budget streams weights into one device; it does not go with",
        ),
        ({"weights": "spread"}, "weights=spread has no effect on one device"),
        ({"mesh": "sequence=1", "weights": "halved"}, "weights are 'halved'; expected one of replicated, spread"),
    ],
)
def test_what_does_not_go_together_is_refused_before_anything_is_loaded(
    tiny_model: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Pipeline.from_pretrained(tiny_model, **options)


def test_a_batch_is_filled_with_its_last_row() -> None:
    assert filled(np.arange(5), 4).tolist() == [0, 1, 2, 3, 4, 4, 4, 4]
    assert filled(np.arange(4), 4).tolist() == [0, 1, 2, 3]


def test_vectors_and_what_is_not_divided_stay_whole() -> None:
    assert is_spread((16, 48), 8)
    assert [shape for shape in ((16,), (6, 16), (1, 2, 2, 4, 16), ()) if is_spread(shape, 8)] == []
