"""Which form computes an attention: by name, platform, dtype and bytes of its logits, and part of every program's key."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from sora_jax.config import open_sora_1_2
from sora_jax.devices import attention_choice
from sora_jax.devices.attention_choice import ByLogits, choose_forms, queries_at_once
from sora_jax.networks.attention import DENSE, Chunked
from sora_jax.networks.attention_kernels import CuDNN, Flash
from sora_jax.networks.forms import Forms
from sora_jax.networks.stdit3 import Conditioning, STDiT3Block

AUTO = {
    "cpu": choose_forms("auto", platform="cpu", dtype="float32"),
    "streamed": choose_forms("auto", platform="cpu", dtype="float32", streamed=True),
    "gpu": choose_forms("auto", platform="gpu", dtype="bfloat16"),
}


def test_a_name_is_a_form() -> None:
    assert choose_forms("dense", platform="cpu", dtype="float32").attention == DENSE
    assert choose_forms("chunked", platform="tpu", dtype="float32").attention == Chunked()
    assert choose_forms("cudnn", platform="gpu", dtype="bfloat16").attention.kernels == (CuDNN(),)
    assert choose_forms("flash", platform="tpu", dtype="bfloat16").attention.kernels == (Flash(),)
    assert AUTO["gpu"].attention.kernels == (CuDNN(),)
    assert choose_forms("auto", platform="gpu", dtype="float32").attention.kernels == ()
    assert choose_forms("auto", platform="tpu", dtype="bfloat16").attention.kernels == ()


@pytest.mark.parametrize(
    ("name", "platform", "dtype", "message"),
    [
        ("fast", "cpu", "float32", "attention is 'fast'; expected one of auto, dense, chunked, cudnn, flash"),
        (
            "cudnn",
            "cpu",
            "bfloat16",
            "attention cudnn needs a gpu and bfloat16, got cpu and bfloat16; use auto, chunked or dense",
        ),
        ("cudnn", "gpu", "float32", "got gpu and float32"),
        ("flash", "gpu", "bfloat16", "attention flash needs a tpu and bfloat16"),
    ],
)
def test_what_does_not_run_is_refused_by_name(name: str, platform: str, dtype: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        choose_forms(name, platform=platform, dtype=dtype)


def conditioning(rows: int, width: int) -> Conditioning:
    float32 = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)  # noqa: E731
    return Conditioning(
        caption_BLD=float32(rows, 300, width),
        mask_BL=jax.ShapeDtypeStruct((rows, 300), jnp.bool_),
        mod_BF6D=float32(rows, 1, 6, width),
        t_BD=float32(rows, width),
        t0_BD=None,
        frame_mask_BT=None,
    )


def text(forms: Forms, *, temporal: bool, rows: int, frames: int, places: int) -> str:
    config = open_sora_1_2.stdit3
    shell = jax.eval_shape(lambda: STDiT3Block(config, temporal=temporal, forms=forms, rngs=nnx.Rngs(0)))
    x_BTSD = jax.ShapeDtypeStruct((rows, frames, places, config.hidden_size), jnp.float32)
    lowered = jax.jit(lambda block, *given: block(*given)).lower(shell, x_BTSD, conditioning(rows, config.hidden_size))
    return lowered.as_text()


@pytest.mark.parametrize("temporal", [False, True])
def test_up_to_256p_the_automatic_choice_on_a_cpu_is_the_dense_program(temporal: bool) -> None:
    """51 frames, both rows of guidance; with a memory budget a row at a time, itself dense."""
    at_256p = {"temporal": temporal, "rows": 2, "frames": 15, "places": 16 * 16}
    whole = text(Forms(), **at_256p)
    assert text(AUTO["cpu"], **at_256p) == whole
    assert text(AUTO["streamed"], **(at_256p | {"rows": 1})) == text(Forms(), **(at_256p | {"rows": 1}))
    assert text(AUTO["cpu"], **(at_256p | {"places": 30 * 53})) != text(Forms(), **(at_256p | {"places": 30 * 53}))


@pytest.mark.parametrize("forms", AUTO)
@pytest.mark.parametrize(
    ("batch", "queries", "keys"), [(30, 1590, 1590), (30, 3600, 3600), (2, 54_000, 300), (1, 14_400, 14_400)]
)
def test_logits_at_once_stay_within_the_limit(forms: str, batch: int, queries: int, keys: int) -> None:
    form = AUTO[forms].attention
    assert isinstance(form, ByLogits)
    at_once = queries_at_once(form, batch, 16, queries, keys)
    assert 64 <= at_once <= 1024
    assert 4 * batch * 16 * at_once * keys <= form.dense_bytes or at_once == 64
    assert queries_at_once(Chunked(100), batch, 16, queries, keys) == 100
    assert queries_at_once(DENSE, batch, 16, queries, keys) == queries


class Recorder:
    """A kernel that notes what it is asked, and refuses."""

    def __init__(self) -> None:
        self.shapes: list[tuple[int, ...]] = []

    def __call__(self, q_BNSK: jax.Array, k_BNLK: jax.Array, v_BNLK: jax.Array, **_: Any) -> jax.Array:
        self.shapes.append(q_BNSK.shape)
        raise NotImplementedError("not this one")


def test_kernels_are_asked_above_their_bytes_and_what_they_refuse_is_computed_without() -> None:
    kernel = Recorder()
    form = ByLogits(10**9, (kernel,), kernel_bytes=4 * 2 * 8 * 8)
    small, large = (jnp.asarray(jax.random.normal(jax.random.key(0), (1, 2, n, 8))) for n in (8, 9))
    for x in (small, large):
        assert jnp.array_equal(form(x, x, x, scale=1.0), DENSE(x, x, x, scale=1.0))
    assert kernel.shapes == [large.shape]


def test_the_form_is_part_of_what_a_program_is_compiled_for() -> None:
    structures = [
        jax.tree.structure(
            jax.eval_shape(lambda forms=forms: STDiT3Block(open_sora_1_2.stdit3, temporal=True, forms=forms, rngs=nnx.Rngs(0)))
        )
        for forms in (Forms(), Forms(), AUTO["cpu"], dataclasses.replace(AUTO["cpu"], hidden_bytes=1))
    ]
    assert structures[0] == structures[1]
    assert len(set(structures)) == 3


def test_the_limits_lie_above_256p() -> None:
    """What is largest there: logits of spatial and cross attention, and hidden units, of 51 frames of both rows."""
    tokens, heads, hidden = 15 * 256, 16, 4608
    largest = max(15 * heads * 256 * 256, heads * tokens * 300, tokens * hidden)
    assert 4 * largest <= attention_choice.STREAMED_BYTES
    assert 4 * 2 * largest <= attention_choice.IN_MEMORY_BYTES
    assert math.isclose(4 * 12 * 1152**2 + 4 * 4 * 1152**2, attention_choice.STREAMED_BYTES, rel_tol=0.1)  # a block's weights
