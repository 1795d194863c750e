"""Forms of attention are one function: chunks have the dense form's bits, kernels its numbers; what one cannot do it says."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from sora_jax.networks.attention import DENSE, LEAST_QUERIES, Attention, Chunked
from sora_jax.networks.attention_kernels import CuDNN, Flash

REL_L2 = 1e-6  # float32 rounding
BFLOAT16_REL_L2 = 1e-2  # its rounding is 4e-3, of the weights and of the result


def normal(*shape: int, seed: int = 0, dtype: Any = jnp.float32) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, dtype=np.float32), dtype)


def inputs(queries: int, keys: int, *, batch: int = 2, dtype: Any = jnp.float32) -> tuple[jax.Array, jax.Array, jax.Array]:
    q, k, v = (normal(batch, 2, n, 24, seed=i, dtype=dtype) for i, n in enumerate((queries, keys, keys)))
    return q, k, v


def key_mask(keys: int) -> jax.Array:
    """Returns a mask of keys whose real ones are not in front in the second entry."""
    real = np.arange(keys) < keys // 3
    return jnp.asarray(np.stack([real, real[::-1]]))[:, None, None, :]


def rel_l2(a: jax.Array, b: jax.Array) -> float:
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def compiled(form: Attention, **options: Any) -> Any:
    return jax.jit(functools.partial(form, scale=0.2, **options))


@pytest.mark.parametrize("queries", [64, 100, 256, 1024])
def test_chunks_have_the_bits_of_the_dense_form(queries: int) -> None:
    """On the CPU; 1,100 queries leave an uneven last chunk to every size."""
    q, k, v = inputs(1100, 90)
    mask = key_mask(90)
    np.testing.assert_array_equal(
        compiled(Chunked(queries), mask=mask)(q, k, v), compiled(DENSE, mask=mask)(q, k, v), err_msg=f"{queries} queries"
    )


@pytest.mark.parametrize("half_range", [False, True])
@pytest.mark.parametrize("length", [64, 65, 129, 200])
def test_chunks_of_any_length_take_biases_and_masks_of_their_own_rows(length: int, half_range: bool) -> None:
    q, k, v = inputs(length, 30)
    bias, mask = normal(1, 2, length, 30, seed=5), normal(2, 1, length, 30, seed=6) < 1
    options = {"bias": bias, "mask": mask, "half_range": half_range}
    chunked, dense = (compiled(form, **options)(q, k, v) for form in (Chunked(64), DENSE))
    np.testing.assert_array_equal(chunked, dense)


def test_logits_of_one_chunk_exist_at_a_time() -> None:
    q, k, v = inputs(640, 300, batch=1)
    sizes = [compiled(form).lower(q, k, v).compile().memory_analysis().temp_size_in_bytes for form in (DENSE, Chunked(64))]
    logits = 4 * 2 * 640 * 300
    assert sizes[0] >= logits
    assert sizes[1] < logits / 2


def test_gradients_of_chunks_are_those_of_the_dense_form() -> None:
    q, k, v = inputs(150, 40)
    bias, mask = normal(1, 2, 150, 40, seed=5), key_mask(40)

    def loss(form: Attention) -> Any:
        return jax.jit(jax.grad(lambda *x: jnp.sum(form(*x[:3], scale=0.2, bias=x[3], mask=mask) ** 2), argnums=(0, 1, 2, 3)))

    for chunked, dense in zip(loss(Chunked(64))(q, k, v, bias), loss(DENSE)(q, k, v, bias), strict=True):
        assert rel_l2(chunked, dense) <= REL_L2


def test_chunks_that_would_change_the_bits_are_refused() -> None:
    with pytest.raises(ValueError, match=rf"chunks of 16 queries; expected at least {LEAST_QUERIES}"):
        Chunked(16)


@pytest.mark.parametrize("masked", [False, True])
def test_cudnn_is_called_with_the_visible_keys_in_front(masked: bool) -> None:
    """The same call in XLA's own implementation; a GPU is not needed to see which keys count."""
    q, k, v = inputs(50, 33)
    mask = key_mask(33) if masked else None
    form = CuDNN(implementation="xla")
    assert rel_l2(compiled(form, mask=mask)(q, k, v), compiled(DENSE, mask=mask)(q, k, v)) <= REL_L2


@pytest.mark.parametrize(("queries", "keys"), [pytest.param(130, 300, marks=pytest.mark.slow), (256, 128)])
def test_flash_is_the_dense_form_in_bfloat16(queries: int, keys: int) -> None:
    q, k, v = inputs(queries, keys, dtype=jnp.bfloat16)
    mask = key_mask(keys)
    with pltpu.force_tpu_interpret_mode():
        flash = Flash()(q, k, v, scale=0.2, mask=mask)
        hidden = Flash()(q, jnp.where(mask[:, :, 0, :, None], k, 9), v, scale=0.2, mask=mask)
    assert rel_l2(flash, DENSE(q, k, v, scale=0.2, mask=mask)) <= BFLOAT16_REL_L2
    np.testing.assert_array_equal(hidden, flash)


@pytest.mark.parametrize(("length", "block"), [(128, 128), (1590, 128), (1024, 512), (300, 384), (3600, 128), (3840, 384)])
def test_flash_pads_as_little_as_it_can(length: int, block: int) -> None:
    assert Flash()._block(length) == block


@pytest.mark.parametrize(
    ("form", "change", "reason"),
    [
        (CuDNN(), {}, "cuDNN attention cannot do float32; it computes in bfloat16 and float16"),
        (CuDNN(), {"size": 136, "dtype": jnp.bfloat16}, "heads of 136 channels; it takes multiples of 8 up to 128"),
        (CuDNN(), {"bias": True}, "cuDNN attention cannot do a bias"),
        (CuDNN(), {"mask": (2, 1, 130, 130)}, r"a mask of shape \(2, 1, 130, 130\); it takes one of keys"),
        (CuDNN(), {"half_range": True}, "must stay within float16's range"),
        (Flash(), {}, "flash attention cannot do float32"),
        (Flash(), {"length": 15, "dtype": jnp.bfloat16}, "15 queries and 15 keys of 24 channels; it takes 128 or more"),
        (Flash(), {"bias": True}, "flash attention cannot do a bias"),
    ],
)
def test_a_kernel_refuses_what_it_cannot_do(form: Attention, change: dict[str, Any], reason: str) -> None:
    length = change.get("length", 130)
    x = jax.ShapeDtypeStruct((2, 2, length, change.get("size", 24)), change.get("dtype", jnp.float32))
    options: dict[str, Any] = {"half_range": change.get("half_range", False)}
    if "bias" in change:
        options["bias"] = jnp.zeros((1, 2, length, length))
    if "mask" in change:
        options["mask"] = jnp.ones(change["mask"], bool)
    with pytest.raises(NotImplementedError, match=reason):
        jax.eval_shape(functools.partial(form, scale=1.0, **options), x, x, x)
