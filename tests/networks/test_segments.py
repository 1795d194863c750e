"""Segments are a network's own forward, cut: in order they are the same program, and each reads the parameters it names."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from sora_jax.networks.segment import Segment
from sora_jax.networks.t5 import T5Encoder
from sora_jax.networks.vae.codec import VAE
from sora_jax.storage.checkpoint import flatten
from tests.support.tiny_model import CONFIG

T5 = dataclasses.replace(CONFIG.t5, num_layers=2)
FRAMES = 7  # of the 8 that two latent frames hold


class Case(NamedTuple):
    """A network of shapes, its segments, what comes before them (activations, then context), and the layers they leave out."""

    network: Any
    segments: Sequence[Segment]
    whole: Callable[[Any, jax.Array], jax.Array]
    before: Callable[[Any, jax.Array], tuple[jax.Array, ...]]
    x: jax.ShapeDtypeStruct
    others: set[str]


def t5() -> Case:
    def before(network: T5Encoder, ids_BL: jax.Array) -> tuple[jax.Array, ...]:
        mask_BL = ids_BL > 3
        return *network.embed(ids_BL), mask_BL

    network = jax.eval_shape(lambda: T5Encoder(T5, rngs=nnx.Rngs(0)))
    ids = jax.ShapeDtypeStruct((2, 5), jnp.int32)
    return Case(network, T5Encoder.segments(T5), lambda network, ids: network(ids, ids > 3), before, ids, {"embed"})


def decoder() -> Case:
    z, others = jax.ShapeDtypeStruct((1, 2, 2, 3, 4), jnp.float32), {"temporal_encoder", "spatial_encoder"}
    segments = VAE.decode_segments(CONFIG.vae, FRAMES)
    return Case(vae(), segments, lambda network, z: network.decode_chunk(z, FRAMES), lambda _, z: (z,), z, others)


def encoder() -> Case:
    video = jax.ShapeDtypeStruct((1, FRAMES, 16, 24, 3), jnp.float32)
    segments, others = VAE.encode_segments(CONFIG.vae), {"temporal_decoder", "spatial_decoder"}
    return Case(vae(), segments, lambda network, video: network.encode_chunk(video), lambda _, x: (x,), video, others)


def vae() -> VAE:
    return jax.eval_shape(lambda: VAE(CONFIG.vae, rngs=nnx.Rngs(0)))


@pytest.mark.parametrize("make", [t5, decoder, encoder])
def test_segments_in_order_are_the_program_of_the_whole_forward(make: Callable[[], Case]) -> None:
    case = make()

    def program(network: Any, x: jax.Array) -> jax.Array:
        x, *context = case.before(network, x)
        for segment in case.segments:
            x = segment.method(segment.module(network), x, *(context if segment.takes_context else ()), *segment.static)
        return x

    cut = jax.jit(program).lower(case.network, case.x).as_text()
    program = case.whole
    program.__name__ = "program"  # it stands in the text
    assert cut == jax.jit(program).lower(case.network, case.x).as_text()


@pytest.mark.parametrize("make", [t5, decoder, encoder])
def test_segments_read_every_parameter_once(make: Callable[[], Case]) -> None:
    case = make()
    prefixes = [f"{name}." for segment in case.segments for name in segment.names]
    read = [name for name in flatten(case.network) for prefix in prefixes if name.startswith(prefix)]
    assert sorted(read) == sorted(name for name in flatten(case.network) if name.split(".")[0] not in case.others)
