"""The programs of a generation as shapes: those of the pipeline, with nothing of a weight in them."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from sora_jax import layout
from sora_jax.networks import registry
from sora_jax.networks.stdit3 import STDiT3
from sora_jax.pipeline.velocity import Velocity
from sora_jax.planning.operations import count
from sora_jax.planning.programs import Program, programs
from sora_jax.planning.request import PROGRAMS, Model, Request
from sora_jax.planning.scanned import ScannedSTDiT3
from sora_jax.storage.checkpoint import unflatten
from tests.support.tiny_model import CONFIG, DEFAULTS, random_flat

pytestmark = pytest.mark.usefixtures("little_optimised")


def made(model: Path, platform: str = "tpu", **changes: object) -> dict[str, Program]:
    request = Request(model=str(model), target="v5e", programs=tuple(PROGRAMS), **changes)
    return {program.name: program for program in programs(request, platform)}


def nbytes(tree: object) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def test_programs_take_and_return_what_the_pipeline_does(tiny_model: Path) -> None:
    parts = made(tiny_model, options={"dtype": "float32"})
    assert list(parts) == ["text", "evaluation", "sampler", "decode"]
    shapes = {name: jax.eval_shape(part.function, *part.arguments) for name, part in parts.items()}
    frames, rows, columns, channels = 5, DEFAULTS["height"] // 8, DEFAULTS["width"] // 8, CONFIG.stdit3.in_channels
    assert shapes["text"].shape == (1, CONFIG.stdit3.model_max_length, CONFIG.t5.d_model)
    assert shapes["evaluation"].shape == (2, frames, rows, columns, channels)
    assert shapes["sampler"].z.shape == (1, frames, rows, columns, channels)
    assert shapes["decode"].shape == (1, 17, DEFAULTS["height"], DEFAULTS["width"], 3)
    assert parts["sampler"].attention == dict.fromkeys(("spatial", "spatial cross", "temporal", "temporal cross"), "dense")
    assert parts["text"].attention == {}
    assert {name: part.times for name, part in parts.items()} == {"text": 1, "evaluation": 4, "sampler": 4, "decode": 1}


def test_weights_have_the_dtypes_of_the_files(tiny_model: Path) -> None:
    """Computing in bfloat16 does not change what was stored in float32."""
    stored = Model.read(tiny_model, {}).manifests
    assert stored is not None
    parts = made(tiny_model)
    for part, network in (("text", "t5"), ("decode", "vae")):
        weights = parts[part].arguments[0]
        assert nbytes(weights) == stored[network].nbytes
    scanned = parts["evaluation"].arguments[0].network
    assert nbytes(scanned) == stored["stdit3"].nbytes


def test_spread_weights_are_divided_by_rows_stacked_or_not(tiny_model: Path) -> None:
    request = Request(
        model=str(tiny_model),
        target="v5e:2x2",
        programs=("evaluation", "sampler"),
        mesh="guidance=2,sequence=2",
        weights="spread",
    )
    parts = {part.name: layout.parameters(part.arguments[0].network) for part in programs(request, "tpu")}
    rows, stacked = PartitionSpec(layout.DEVICES), PartitionSpec(None, layout.DEVICES)
    assert parts["evaluation"].spatial.mlp.fc1.kernel.value.values == stacked
    assert parts["evaluation"].spatial.mlp.fc1.bias.value == layout.NOWHERE
    assert parts["sampler"].spatial_blocks[0].mlp.fc1.kernel.value.values == rows


def test_without_guidance_one_row_is_evaluated(tiny_model: Path) -> None:
    part = made(tiny_model, options={"guidance": 1.0})["evaluation"]
    assert jax.eval_shape(part.function, *part.arguments).shape[0] == 1
    assert part.what.startswith("one evaluation")


@pytest.mark.parametrize(("options", "loops"), [({}, 1), ({"merge_steps": 2}, 2)])
def test_the_sampler_is_one_loop_over_all_steps(tiny_model: Path, options: dict[str, object], loops: int) -> None:
    """With merged steps two: those come first, in a loop of their own."""
    part = made(tiny_model, options=options)["sampler"]
    traced = jax.jit(part.function).trace(*part.arguments).jaxpr
    assert count(traced, "while") == loops
    assert count(traced, "io_callback") == count(traced, "pure_callback") == 0


@pytest.mark.ci
def test_a_scan_over_blocks_is_the_transformer() -> None:
    """The same operations in the same order; XLA fuses them otherwise."""
    config = dataclasses.replace(CONFIG.stdit3, depth=2)
    network: STDiT3 = unflatten(registry.abstract("stdit3", config), random_flat("stdit3", config, seed=3))
    rng = np.random.default_rng(4)
    rows, length = 2, config.model_max_length
    velocity = Velocity(
        network=network,
        caption_RLE=jnp.asarray(rng.standard_normal((rows, length, config.caption_channels)), jnp.float32),
        mask_BL=jnp.asarray(np.arange(length) < 7)[None],
        fps=jnp.full(1, 8.0),
        height_px=jnp.full(1, 32.0),
        width_px=jnp.full(1, 48.0),
    )
    stacked = [
        jax.tree.map(lambda *leaves: jnp.stack(leaves), *blocks) for blocks in (network.spatial_blocks, network.temporal_blocks)
    ]
    scanned = ScannedSTDiT3(embed=network.embed, spatial=stacked[0], temporal=stacked[1], final=network.final)
    shapes = ScannedSTDiT3.of_shapes(network)
    assert [leaf.shape for leaf in jax.tree.leaves(scanned)] == [leaf.shape for leaf in jax.tree.leaves(shapes)]
    z = jnp.asarray(rng.standard_normal((rows, 3, 4, 6, config.in_channels)), jnp.float32)
    evaluate = jax.jit(lambda velocity, z: velocity.evaluate(z, jnp.full(len(z), 500.0)))
    expected, got = evaluate(velocity, z), evaluate(dataclasses.replace(velocity, network=scanned), z)
    assert jnp.linalg.norm(expected) > 0
    assert float(jnp.linalg.norm(got - expected) / jnp.linalg.norm(expected)) < 1e-6


def test_a_request_survives_json_and_refuses_what_it_does_not_know(tiny_model: Path) -> None:
    request = Request(model="open-sora-1.2", target="h100", options={"num_frames": 51}, programs=("sampler",))
    again = Request.from_json(request.to_json())
    assert (again.model, again.options, tuple(again.programs)) == ("open-sora-1.2", {"num_frames": 51}, ("sampler",))
    assert Path(Request.from_json(Request(model=str(tiny_model), target="v5e").to_json()).model).is_absolute()
    for changes, message in (
        ({"programs": ("text", "vae")}, "programs hold 'vae'; expected some of text, evaluation, sampler, decode"),
        ({"programs": ()}, "programs hold none"),
        ({"target": "v9"}, "target 'v9' is unknown"),
        ({"attention": "sparse"}, "attention is 'sparse'; expected one of auto, dense"),
        ({"optimisation": "slow"}, "optimisation is 'slow'; expected fast or full"),
    ):
        with pytest.raises(ValueError, match=message):
            Request(**{"model": "open-sora-1.2", "target": "v5e", **changes})


def test_a_preset_is_the_released_architecture() -> None:
    model = Model.read("open-sora-1.2", {"resolution": "480p", "num_frames": "2s", "dtype": None})
    assert (model.config.stdit3.depth, model.settings.num_frames, model.settings.dtype) == (28, 51, "bfloat16")
    assert (model.settings.height, model.settings.width, model.manifests) == (480, 854, None)
    with pytest.raises(ValueError, match="height 250 is not a multiple of 16"):
        Model.read("open-sora-1.2", {"height": 250, "width": 256})


def test_it_is_said_what_auto_comes_to(tiny_model: Path) -> None:
    """With two heads at 720p the logits of spatial attention take 3.1 GB, those over time 13 MB."""
    options = {"height": 720, "width": 1280, "num_frames": 51}
    (part,) = programs(Request(model=str(tiny_model), target="v5e", options=options, programs=("evaluation",)), "tpu")
    assert part.attention["spatial"].startswith("chunked")
    assert part.attention["temporal"] == "dense"


@pytest.mark.parametrize(
    ("attention", "platform", "message"),
    [("flash", "gpu", "attention flash needs a tpu"), ("cudnn", "tpu", "attention cudnn needs a gpu")],
)
def test_a_form_that_the_hardware_lacks_is_refused(tiny_model: Path, attention: str, platform: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        made(tiny_model, platform, attention=attention)
