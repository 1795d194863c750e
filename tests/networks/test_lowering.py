"""All three networks become StableHLO for cpu, cuda and tpu, as functions of a flat dictionary of weights.

A program without custom calls is portable: no operation of it is a routine of one platform.  What an exported program
computes is tested on one block (test_spike.py).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import pytest
from flax import nnx

from sora_jax.config import policy_of
from sora_jax.networks.merging import Merge
from sora_jax.networks.stdit3 import Conditioning, STDiT3, STDiT3Block
from sora_jax.networks.t5 import T5Encoder
from sora_jax.networks.vae.codec import VAE
from sora_jax.storage.checkpoint import flatten, unflatten
from tests.support.tiny_model import CONFIG

PLATFORMS = ("cpu", "cuda", "tpu")
LENGTH = 7


def stdit3(**options: Any) -> tuple[Any, Callable[..., jax.Array], dict[str, jax.ShapeDtypeStruct]]:
    one = jax.ShapeDtypeStruct((1,), jnp.float32)
    inputs = {
        "z_BTHWC": jax.ShapeDtypeStruct((2, 3, 4, 5, CONFIG.stdit3.in_channels), jnp.float32),
        "t_B": jax.ShapeDtypeStruct((2,), jnp.float32),
        "caption_BLE": jax.ShapeDtypeStruct((2, LENGTH, CONFIG.stdit3.caption_channels), jnp.float32),
        "mask_BL": jax.ShapeDtypeStruct((1, LENGTH), jnp.bool_),
        "fps_B": one,
        "height_px_B": one,
        "width_px_B": one,
        "frame_mask_BT": jax.ShapeDtypeStruct((2, 3), jnp.bool_),
    }
    return lambda: STDiT3(CONFIG.stdit3, rngs=nnx.Rngs(0)), lambda network, given: network(**given, **options), inputs


def t5() -> tuple[Any, Callable[..., jax.Array], dict[str, jax.ShapeDtypeStruct]]:
    inputs = {
        "ids_BL": jax.ShapeDtypeStruct((2, LENGTH), jnp.int32),
        "mask_BL": jax.ShapeDtypeStruct((2, LENGTH), jnp.bool_),
    }
    return lambda: T5Encoder(CONFIG.t5, rngs=nnx.Rngs(0)), lambda network, given: network(**given), inputs


def vae(method: str) -> tuple[Any, Callable[..., jax.Array], dict[str, jax.ShapeDtypeStruct]]:
    shape = (1, 3, 16, 24, 3) if method == "encode" else (1, 1, 2, 3, CONFIG.vae.spatial.latent_channels)
    arguments = () if method == "encode" else (3,)
    inputs = {"x": jax.ShapeDtypeStruct(shape, jnp.float32)}
    return (
        lambda: VAE(CONFIG.vae, rngs=nnx.Rngs(0)),
        lambda network, given: getattr(network, method)(given["x"], *arguments),
        inputs,
    )


CASES = {
    "stdit3": stdit3(),
    "stdit3 merged": stdit3(merge=Merge()),
    "t5": t5(),
    "vae encode": vae("encode"),
    "vae decode": vae("decode"),
}


@pytest.mark.parametrize("case", CASES)
def test_one_program_for_all_platforms(case: str) -> None:
    build, call, inputs = CASES[case]
    shell = jax.eval_shape(build)
    function = jax.jit(lambda flat, given: call(unflatten(shell, flat), given))
    exported = jax.export.export(function, platforms=PLATFORMS)(flatten(shell), inputs)
    assert exported.platforms == PLATFORMS
    assert "custom_call" not in exported.mlir_module()
    assert all(aval.dtype == jnp.float32 for aval in exported.out_avals)


@pytest.mark.parametrize(("dtype", "expected"), [("float32", {"HIGHEST"}), ("bfloat16", {"DEFAULT"})])
def test_float32_products_stay_float32_on_accelerators(dtype: str, expected: set[str]) -> None:
    policy = policy_of(dtype)
    shell = jax.eval_shape(lambda: STDiT3Block(CONFIG.stdit3, temporal=True, policy=policy, rngs=nnx.Rngs(0)))
    width = CONFIG.stdit3.hidden_size
    float32 = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in (("mod", (1, 1, 6, width)), ("t", (1, width)))}
    conditioning = Conditioning(
        caption_BLD=jax.ShapeDtypeStruct((1, 4, width), dtype),
        mask_BL=None,
        mod_BF6D=float32["mod"],
        t_BD=float32["t"],
        t0_BD=None,
        frame_mask_BT=None,
    )
    x = jax.ShapeDtypeStruct((1, 3, 2, width), dtype)
    text = jax.jit(lambda block, *given: block(*given)).lower(shell, x, conditioning).as_text()
    products = [line for line in text.splitlines() if "stablehlo.dot_general" in line]
    assert len(products) == 11  # self attention 4, cross attention 5, MLP 2
    assert {name for line in products for name in ("HIGHEST", "DEFAULT") if name in line} == expected
    with jax.default_matmul_precision("tensorfloat32"):
        chosen = jax.jit(lambda block, *given: block(*given)).lower(shell, x, conditioning).as_text()
    assert "HIGHEST" not in chosen
