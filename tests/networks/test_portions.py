"""A block that takes a portion of its tokens at a time: the same numbers, however tokens are divided, merged or masked."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from sora_jax.networks.attention import Chunked
from sora_jax.networks.forms import Forms
from sora_jax.networks.merging import Merge, check_frames
from sora_jax.networks.portions import Portions, portions
from sora_jax.networks.stdit3 import Conditioning, STDiT3Block
from sora_jax.storage.checkpoint import unflatten
from tests.support.tiny_model import CONFIG, random_flat

pytestmark = pytest.mark.usefixtures("little_optimised")

STDIT3 = CONFIG.stdit3
FRAMES, PLACES = 7, 6
TOKEN_BYTES = 4 * STDIT3.mlp_size
REL_L2 = 1e-6  # float32 rounding: products of other extent


@functools.cache
def block(temporal: bool, most_tokens: int | None) -> STDiT3Block:
    forms = Forms() if most_tokens is None else Forms(attention=Chunked(64), hidden_bytes=TOKEN_BYTES * most_tokens)
    shell = jax.eval_shape(lambda: STDiT3Block(STDIT3, temporal=temporal, forms=forms, rngs=nnx.Rngs(0)))
    prefix = "temporal_blocks.0." if temporal else "spatial_blocks.0."
    flat = {name[len(prefix) :]: value for name, value in parameters().items() if name.startswith(prefix)}
    return unflatten(shell, flat)


@functools.cache
def parameters() -> dict[str, np.ndarray]:
    return random_flat("stdit3")


def tokens(*, by_frame: bool) -> tuple[jax.Array, Conditioning]:
    rng = np.random.default_rng(3)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape, dtype=np.float32))  # noqa: E731
    width = STDIT3.hidden_size
    conditioning = Conditioning(
        caption_BLD=draw(2, 5, width),
        mask_BL=jnp.asarray(np.arange(5) < np.array([[2], [5]])),
        mod_BF6D=draw(2, FRAMES if by_frame else 1, 6, width),
        t_BD=draw(2, width),
        t0_BD=None,
        frame_mask_BT=None,
    )
    return draw(2, FRAMES, PLACES, width), conditioning


@jax.jit(static_argnames="merge")
def after(block: STDiT3Block, x_BTSD: jax.Array, conditioning: Conditioning, *, merge: Merge | None = None) -> jax.Array:
    return block(x_BTSD, conditioning, merge=merge)


@pytest.mark.parametrize("temporal", [False, True])
@pytest.mark.parametrize("merge", [None, Merge(), Merge(odd="released"), Merge(keys_values_only=True)])
@pytest.mark.parametrize("most_tokens", [2 * PLACES + 1, FRAMES * PLACES])
def test_portions_give_the_numbers_of_the_whole_block(temporal: bool, merge: Merge | None, most_tokens: int) -> None:
    x_BTSD, conditioning = tokens(by_frame=True)
    whole = after(block(temporal, None), x_BTSD, conditioning, merge=merge)
    portioned = after(block(temporal, most_tokens), x_BTSD, conditioning, merge=merge)
    error = float(jnp.linalg.norm((portioned - whole).ravel()) / jnp.linalg.norm(whole.ravel()))
    assert error <= REL_L2, f"relative L2 {error:.2e}"


@pytest.mark.slow
def test_gradients_go_through_portions() -> None:
    x_BTSD, conditioning = tokens(by_frame=False)

    def gradient(block: STDiT3Block) -> Any:
        return jax.jit(jax.grad(lambda block, x: jnp.sum(block(x, conditioning) ** 2), argnums=(0, 1)))(block, x_BTSD)

    whole, portioned = (jax.tree.leaves(gradient(block(False, most))) for most in (None, PLACES))
    for one, other in zip(whole, portioned, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4 * float(jnp.max(jnp.abs(one))))


def test_few_tokens_are_computed_as_without_portions() -> None:
    x_BTSD, conditioning = tokens(by_frame=False)
    texts = [after.lower(block(False, most), x_BTSD, conditioning).as_text() for most in (None, 2 * FRAMES * PLACES)]
    assert texts[0] == texts[1]


def test_a_portion_holds_the_activations_of_its_own_tokens_only() -> None:
    config = dataclasses.replace(STDIT3, hidden_size=64)
    x_BTSD = jax.ShapeDtypeStruct((2, 16, 32, 64), jnp.float32)
    conditioning = jax.eval_shape(lambda: dataclasses.replace(tokens(by_frame=False)[1], mod_BF6D=jnp.zeros((2, 1, 6, 64))))
    conditioning = dataclasses.replace(conditioning, caption_BLD=jax.ShapeDtypeStruct((2, 5, 64), jnp.float32))

    def temporary_bytes(most_tokens: int) -> int:
        forms = Forms(hidden_bytes=4 * config.mlp_size * most_tokens)
        shell = jax.eval_shape(lambda: STDiT3Block(config, temporal=False, forms=forms, rngs=nnx.Rngs(0)))
        return after.lower(shell, x_BTSD, conditioning).compile().memory_analysis().temp_size_in_bytes

    tokens_bytes = 4 * 2 * 16 * 32 * 64
    assert temporary_bytes(1024) > 8 * tokens_bytes  # the hidden units twice
    assert temporary_bytes(64) < tokens_bytes


@given(
    frames=st.integers(1, 60),
    places=st.integers(1, 80),
    rows=st.integers(1, 3),
    most=st.integers(1, 3000),
    temporal=st.booleans(),
    odd=st.sampled_from([None, "alone", "released"]),
)
def test_every_token_is_in_one_portion(frames: int, places: int, rows: int, most: int, temporal: bool, odd: Any) -> None:
    merge = None if odd is None or frames < 2 else Merge(odd=odd)
    if merge is not None and odd == "released" and (frames % 4 == 1 or frames == 31):
        return
    divided = portions((rows, frames, places, 8), most, temporal=temporal, merge=merge)
    if divided is None:
        assert rows * frames * places <= most
        return
    total, each = (places, frames) if temporal else (frames, places)
    assert divided.axis == (2 if temporal else 1)
    assert divided.times * divided.length + divided.rest == total
    joined = merge is not None and not temporal
    largest = max(divided.length, divided.rest) * each
    assert largest <= max(most, each * (3 if joined else 1)) or (joined and largest <= most + each) or _only(divided, total)
    for length in {divided.length, divided.rest} - {0, total} if joined else ():
        check_frames(length, odd)
    if joined and divided.times > 1:
        assert divided.length % 2 == 0


def _only(divided: Portions, total: int) -> bool:
    """Returns whether nothing smaller can be merged by itself."""
    return divided.length == total
