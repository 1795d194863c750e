"""Operations counted from a traced program, against XLA's count where that is right, and against arithmetic."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from sora_jax.networks.attention import Chunked
from sora_jax.networks.forms import Forms
from sora_jax.networks.stdit3 import STDiT3
from sora_jax.planning.operations import count, operations
from sora_jax.streaming.activations import denoise_flops
from tests.support.tiny_model import CONFIG


def traced(function: Any, *shapes: tuple[int, ...]) -> Any:
    return jax.jit(function).trace(*(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)).jaxpr


def test_a_product_counts_two_for_each_multiplication() -> None:
    assert operations(traced(lambda a, b: a @ b, (3, 5), (5, 7))) == 2 * 3 * 5 * 7
    assert operations(traced(lambda a, b: jnp.einsum("bik,bkj->bij", a, b), (4, 3, 5), (4, 5, 7))) == 4 * 2 * 3 * 5 * 7


@pytest.mark.parametrize("groups", [1, 2])
def test_a_convolution_counts_its_kernel_at_every_place(groups: int) -> None:
    def convolve(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return jax.lax.conv_general_dilated(
            x, kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=groups
        )

    expected = 2 * (2 * 6 * 4) * (3 * 3 * 4 // groups) * 8  # output places, kernel of one output channel, output channels
    assert operations(traced(convolve, (2, 8, 6, 4), (3, 3, 4 // groups, 8))) == expected


def test_a_loop_counts_its_turns_and_one_without_a_number_counts_once() -> None:
    product = 2 * 4**3

    def scanned(a: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda x, _: (x @ a, None), a, length=9)[0]

    def until_large(a: jax.Array) -> jax.Array:
        return jax.lax.while_loop(lambda x: x.sum() < 1e3, lambda x: x @ a, a)

    def one_of_two(a: jax.Array) -> jax.Array:
        return jax.lax.cond(a.sum() > 0, lambda x: x @ x, lambda x: x @ x @ x, a)

    assert operations(traced(scanned, (4, 4))) == 9 * product
    assert operations(traced(until_large, (4, 4))) == product
    assert operations(traced(one_of_two, (4, 4))) == 2 * product  # the dearer branch
    assert (count(traced(until_large, (4, 4)), "while"), count(traced(scanned, (4, 4)), "while")) == (1, 0)


@pytest.mark.parametrize("form", ["dense", "chunked"])
def test_an_evaluation_counts_what_the_memory_plan_counts(form: str) -> None:
    """The plan leaves out the caption's embedding, conditioning and patches; chunks compute a few rows twice."""
    config, frames, rows, columns, length = CONFIG.stdit3, 4, 24, 24, CONFIG.stdit3.model_max_length
    forms = Forms() if form == "dense" else Forms(attention=Chunked(64))
    network = jax.eval_shape(lambda: STDiT3(config, forms=forms, rngs=nnx.Rngs(0)))
    z = jax.ShapeDtypeStruct((2, frames, rows, columns, config.in_channels), jnp.float32)
    t, caption = (
        jax.ShapeDtypeStruct((2,), jnp.float32),
        jax.ShapeDtypeStruct((2, length, config.caption_channels), jnp.float32),
    )
    program = jax.jit(lambda network, *given: network(*given, fps_B=_one(1), height_px_B=_one(192), width_px_B=_one(192)))
    counted = operations(program.trace(network, z, t, caption).jaxpr)
    planned = denoise_flops(config, 2, frames, rows * columns // 4)
    assert planned < counted < 1.25 * planned


def _one(value: float) -> jax.Array:
    return jnp.full(1, value, jnp.float32)
