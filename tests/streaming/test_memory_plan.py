"""The memory plan: activations bound what XLA allocates, retained layers are as many as fit, refusals say what would fit."""

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from sora_jax.commands import main
from sora_jax.config import FLOAT32, NETWORKS, STDiT3Config, T5Config, pocket
from sora_jax.networks.attention import Chunked
from sora_jax.networks.forms import Forms
from sora_jax.networks.segment import Segment
from sora_jax.networks.stdit3 import Conditioning, STDiT3, STDiT3Block
from sora_jax.networks.t5 import T5Block, T5Encoder
from sora_jax.networks.vae.codec import VAE
from sora_jax.networks.vae.temporal import TemporalDecoder, TemporalEncoder
from sora_jax.storage.arrays import Parameter
from sora_jax.storage.checkpoint import flatten
from sora_jax.storage.directory import Manifest, open_network
from sora_jax.streaming import activations
from sora_jax.streaming.blocks import run_block
from sora_jax.streaming.memory_plan import StagePlan, Workload, plan_memory

SLACK = 2.0  # the plan may ask for at most so many times what the program's temporaries are; for less it may not
WORK = Workload(num_frames=34, height=64, width=64)


def temporary_bytes(function: Callable[..., Any], *args: Any) -> int:
    return jax.jit(function).lower(*args).compile().memory_analysis().temp_size_in_bytes


def zeros(*shape: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def check(planned: float, measured: float, slack: float = SLACK) -> None:
    assert measured <= planned <= slack * measured, f"planned {planned:.3g} bytes, the program has {measured:.3g}"


@pytest.mark.parametrize(("temporal", "shape"), [(False, (2, 4, 64)), (True, (2, 4, 64)), (False, (2, 2, 256))])
def test_a_transformer_block_is_planned(temporal: bool, shape: tuple[int, int, int]) -> None:
    config: STDiT3Config = dataclasses.replace(pocket.stdit3, hidden_size=64)
    block = jax.eval_shape(lambda: STDiT3Block(config, temporal=temporal, rngs=nnx.Rngs(0)))
    x_BTSD, given = zeros(*shape, config.hidden_size), conditioning(config, shape[0])
    measured = temporary_bytes(lambda block, x, given: block(x, given), block, x_BTSD, given)
    check(activations.block_bytes(config, *shape), measured)
    assert activations.denoise_bytes(config, *shape) > activations.block_bytes(config, *shape)


def test_many_tokens_are_planned_as_they_are_computed_a_portion_at_a_time() -> None:
    config: STDiT3Config = dataclasses.replace(pocket.stdit3, hidden_size=64)
    few_tokens = Forms(attention=Chunked(64), hidden_bytes=4 * config.mlp_size * 1024)
    shape = (2, 16, 256)

    def streamed_bytes(forms: Forms) -> int:
        block = jax.eval_shape(lambda: STDiT3Block(config, temporal=False, forms=forms, rngs=nnx.Rngs(0)))
        x_BTSD, given = zeros(*shape, config.hidden_size), conditioning(config, 2)
        return temporary_bytes(lambda *args: run_block(block, *args, merge=None), flatten(block), x_BTSD, given)

    whole, portioned = (activations.denoise_bytes(config, *shape, forms) for forms in (Forms(), few_tokens))
    assert streamed_bytes(few_tokens) < 0.5 * streamed_bytes(Forms())
    assert streamed_bytes(few_tokens) <= portioned < 0.5 * whole


def conditioning(config: STDiT3Config, rows: int) -> Conditioning:
    length, width = config.model_max_length, config.hidden_size
    return Conditioning(
        caption_BLD=zeros(rows, length, width),
        mask_BL=zeros(rows, length, dtype=jnp.bool_),
        mod_BF6D=zeros(rows, 1, 6, width),
        t_BD=zeros(rows, width),
        t0_BD=None,
        frame_mask_BT=None,
    )


def test_half_a_block_of_the_text_encoder_is_planned() -> None:
    config: T5Config = dataclasses.replace(pocket.t5, d_model=64, d_kv=16, num_heads=4, d_ff=160, num_layers=1)
    block, length = jax.eval_shape(lambda: T5Block(config, policy=FLOAT32, rngs=nnx.Rngs(0))), 96
    context = zeros(1, config.num_heads, length, length), zeros(2, length, dtype=jnp.bool_)
    measured = max(
        temporary_bytes(segment.method, block, zeros(2, length, 64), *(context if segment.takes_context else ()))
        for segment in T5Block.segments()
    )
    check(activations.text_bytes(config, 2, length), measured, slack=4.0)  # bias, input and output are arguments there


@pytest.mark.parametrize("name", [pytest.param("temporal_encoder", marks=pytest.mark.ci), "temporal_decoder"])
def test_the_widest_stretch_of_the_temporal_autoencoder_is_planned(name: str) -> None:
    config, x = pocket.vae.temporal, zeros(1, 20 if name == "temporal_encoder" else 5, 12, 12, 4)
    network = getattr(jax.eval_shape(lambda: VAE(pocket.vae, rngs=nnx.Rngs(0))), name)
    segments = TemporalEncoder.segments(config) if name == "temporal_encoder" else TemporalDecoder.segments(config, 17)
    widest, seen = 0, set()
    for segment in segments:
        module, apply = segment.module(network), _run(segment)
        kind = (segment.method, str(jax.tree.map(jnp.shape, module)), x.shape)
        if kind not in seen:
            widest = max(widest, temporary_bytes(apply, module, x))
            seen.add(kind)
        x = jax.eval_shape(apply, module, x)
    check(activations.temporal_bytes(config, 1, 17, 144), widest)


@pytest.mark.parametrize(
    ("decoder", "hidden_bytes"), [(True, None), pytest.param(True, 2**20, marks=pytest.mark.ci), (False, None)]
)
def test_the_spatial_autoencoder_is_planned(decoder: bool, hidden_bytes: int | None) -> None:
    forms = Forms(hidden_bytes=hidden_bytes)
    network = jax.eval_shape(lambda: VAE(pocket.vae, forms=forms, rngs=nnx.Rngs(0)))
    x = zeros(2, 16, 16, 4) if decoder else zeros(2, 128, 128, 3)
    module = network.spatial_decoder if decoder else network.spatial_encoder
    measured = temporary_bytes(lambda module, x: module(x), module, x)
    check(activations.spatial_bytes(pocket.vae.spatial, 2, 128 * 128, decoder=decoder, forms=forms), measured)


def test_operations_are_those_that_xla_counts() -> None:
    config = dataclasses.replace(pocket.t5, num_layers=2)
    network = jax.eval_shape(lambda: T5Encoder(config, rngs=nnx.Rngs(0)))
    lowered = jax.jit(lambda network, ids: network(ids)).lower(network, zeros(2, 32, dtype=jnp.int32))
    counted = lowered.compile().cost_analysis()["flops"]
    assert activations.text_flops(config, 2, 32) == pytest.approx(counted, rel=0.1)


@pytest.fixture(scope="module")
def manifests(tiny_model: Path) -> dict[str, Manifest]:
    return {network: open_network(tiny_model, network) for network in NETWORKS}


def test_as_many_layers_are_retained_as_fit(manifests: dict[str, Manifest]) -> None:
    config = dataclasses.replace(manifests["stdit3"].config, hidden_size=768, num_heads=4, depth=2)
    shapes = flatten(jax.eval_shape(lambda: STDiT3(config, rngs=nnx.Rngs(0))))
    parameters = {name: Parameter(leaf.shape, "float32", "") for name, leaf in shapes.items()}
    wide = dataclasses.replace(manifests["stdit3"], config=config, parameters=parameters)
    manifests = {**manifests, "stdit3": wide}
    blocks = [layer for layer in wide.layers if "blocks" in layer]
    sizes = [sum(parameters[name].nbytes for name in wide.names(block)) for block in blocks]
    least = plan_memory(manifests, WORK).stage("denoise").fixed
    assert least == plan_memory(manifests, WORK).minimum
    for count in range(len(blocks) + 1):
        for spare in (0, sizes[min(count, len(blocks) - 1)] - 1 if count < len(blocks) else 10**9):
            budget = least + sum(sizes[:count]) + spare
            plan = plan_memory(manifests, WORK, budget)
            stage = plan.stage("denoise")
            assert (stage.retained_layers, stage.retained, stage.read) == (count, sum(sizes[:count]), sum(sizes[count:]))
            assert plan.peak <= budget
    assert plan_memory(manifests, WORK).stage("denoise").retained_layers == len(blocks)


def test_a_budget_too_small_names_the_minimum_and_what_fits(manifests: dict[str, Manifest]) -> None:
    large = dataclasses.replace(WORK, num_frames=340, height=512, width=512, batch=2)
    minimum = plan_memory(manifests, large).minimum
    assert plan_memory(manifests, large, minimum).peak <= minimum
    with pytest.raises(ValueError, match=r"too small: 2 clips of 340 frames at 512x512 needs .* GB at least, for the stage"):
        plan_memory(manifests, large, minimum - 1)
    with pytest.raises(ValueError, match=r"what fits: \d+ frames? at 512x512 or 340 frames at \d+x\d+") as raised:
        plan_memory(manifests, large, minimum // 2)
    frames = int(str(raised.value).split("what fits: ")[1].split()[0])
    smaller = dataclasses.replace(large, num_frames=frames, batch=1)
    assert plan_memory(manifests, smaller, minimum // 2).peak <= minimum // 2
    assert frames == 340 or plan_memory(manifests, dataclasses.replace(smaller, num_frames=frames + 17)).minimum > minimum // 2
    with pytest.raises(ValueError, match="no smaller video fits"):
        plan_memory(manifests, large, 1000)


def test_reading_ahead_is_given_up_before_a_budget_is_refused(manifests: dict[str, Manifest]) -> None:
    plan = plan_memory(manifests, WORK)
    text = plan.stage("text")
    assert text.num_slots == 2
    assert text.staging == text.parameters > 0
    short = plan_memory(manifests, WORK, max(text.peak - 1, plan.minimum)).stage("text")
    assert short.peak <= max(text.peak - 1, plan.minimum)


def test_more_of_anything_needs_no_less(manifests: dict[str, Manifest]) -> None:
    base = plan_memory(manifests, WORK)
    for change in ({"num_frames": 51}, {"height": 128}, {"width": 128}, {"batch": 3}, {"encodes": True}):
        larger = plan_memory(manifests, dataclasses.replace(WORK, **change))
        assert larger.minimum >= base.minimum
    unguided = plan_memory(manifests, dataclasses.replace(WORK, guided=False))
    assert unguided.stage("denoise").activations < base.stage("denoise").activations
    assert unguided.stage("denoise").flops == pytest.approx(base.stage("denoise").flops / 2)


def test_time_is_the_longer_of_reading_and_computing() -> None:
    stage = StagePlan(
        name="denoise", baseline=0, compiler=0, parameters=0, activations=0, staging=0, needs_staging=True, num_layers=4
    )
    streamed = dataclasses.replace(stage, read=400, flops=200.0, evaluations=3)
    assert streamed.seconds(100.0, 100.0) == 3 * 4  # reading
    assert streamed.seconds(400.0, 100.0) == 3 * 2  # computing
    half = dataclasses.replace(streamed, read=200, retained=200, retained_layers=2)
    assert half.seconds(100.0, 100.0) == 3 * (2 + 1) + 2  # two layers read beside half of the computing; two read once
    alone = dataclasses.replace(streamed, needs_staging=False, num_slots=1, num_layers=0, evaluations=1)
    assert alone.seconds(100.0, 100.0) == 4 + 2


def test_inspect_prints_the_plan(tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    size = ["--num-frames", "34", "--height", "64", "--width", "64"]
    assert main.main(["inspect", str(tiny_model), "--memory-budget", "3.3GB", *size]) == main.OK
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("1 x 34 frames at 64x64, 4 steps guided, float32; budget 3,300 MB: peak ")
    assert [line.split()[0] for line in lines[1:-1]] == ["stage", "text", "denoise", "decode"]
    assert main.main(["inspect", str(tiny_model), "--memory-budget", "3.3GB", "--json", *size]) == main.OK
    fields = json.loads(capsys.readouterr().out)
    for stage in fields["stages"].values():
        parts = ("baseline", "compiler", "parameters", "activations", "staging", "retained")
        assert stage["peak"] == sum(stage[name] for name in parts) <= fields["budget"]
        assert math.isfinite(stage["seconds"])
    assert main.main(["inspect", str(tiny_model), "--memory-budget", "100MB", *size]) == main.BAD_INPUT
    assert "GB at least" in capsys.readouterr().err


def _run(segment: Segment) -> Callable[..., Any]:
    return lambda module, *args: segment.method(module, *args, *segment.static)
