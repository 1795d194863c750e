"""Facts about JAX that the design rests on, each shown once on a small case.

If a new JAX release breaks one of these, streaming and export break with it; here the reason is readable.
"""

import dataclasses
import itertools
import mmap
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.experimental import io_callback

from sora_jax.config import STDiT3Config, pocket
from sora_jax.networks.stdit3 import Conditioning, STDiT3Block
from sora_jax.storage.checkpoint import flatten, unflatten

WIDTH = 96
NUM_STEPS = 3
NUM_PAIRS = 2  # spatial and temporal: four blocks


@pytest.fixture(scope="module")
def config() -> STDiT3Config:
    return dataclasses.replace(pocket.stdit3, hidden_size=WIDTH, num_heads=2)


@pytest.fixture(scope="module")
def blocks(config: STDiT3Config) -> list[STDiT3Block]:
    """Spatial and temporal blocks in turn, every parameter random (initialisation has zeros that would hide errors)."""
    made = []
    for i, temporal in enumerate([False, True] * NUM_PAIRS):
        shell = jax.eval_shape(lambda temporal=temporal: STDiT3Block(config, temporal=temporal, rngs=nnx.Rngs(0)))
        generator = np.random.default_rng(i)
        made.append(
            unflatten(
                shell,
                {
                    name: jnp.asarray(generator.standard_normal(leaf.shape) * leaf.shape[0] ** -0.5, jnp.float32)
                    for name, leaf in flatten(shell).items()
                },
            )
        )
    return made


@pytest.fixture(scope="module")
def tokens(config: STDiT3Config) -> jax.Array:
    return jax.random.normal(jax.random.key(0), (2, 5, 16, config.hidden_size))


@pytest.fixture(scope="module")
def conditioning(config: STDiT3Config) -> Conditioning:
    keys = jax.random.split(jax.random.key(1), 3)
    return Conditioning(
        caption_BLD=jax.random.normal(keys[0], (2, 7, config.hidden_size)),
        mask_BL=jnp.arange(7)[None] < jnp.asarray([[4], [7]]),
        mod_BF6D=0.3 * jax.random.normal(keys[1], (2, 1, 6, config.hidden_size)),
        t_BD=jax.random.normal(keys[2], (2, config.hidden_size)),
        t0_BD=None,
        frame_mask_BT=None,
    )


def abstract(block: STDiT3Block) -> STDiT3Block:
    return jax.eval_shape(lambda: block)


def specs(block: STDiT3Block) -> dict[str, jax.ShapeDtypeStruct]:
    return {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in flatten(block).items()}


def steps(x: jax.Array, stack: Any) -> jax.Array:
    """Returns x after NUM_STEPS residual steps of ``stack`` in a while_loop."""
    return jax.lax.while_loop(
        lambda carry: carry[0] < NUM_STEPS, lambda carry: (carry[0] + 1, carry[1] + 0.1 * stack(carry[1])), (0, x)
    )[1]


@pytest.mark.slow
def test_an_nnx_module_is_a_pytree_for_plain_jax(blocks, tokens, conditioning):
    block = blocks[0]
    jitted = jax.jit(lambda block, *inputs: block(*inputs))(block, tokens, conditioning)
    held = jax.tree_util.Partial(lambda block, conditioning, x: block(x, conditioning), block, conditioning)
    np.testing.assert_array_equal(jax.jit(lambda fn, x: fn(x))(held, tokens), jitted)
    gradient = flatten(jax.jit(jax.grad(lambda block: jnp.sum(block(tokens, conditioning) ** 2)))(block))
    assert gradient.keys() == flatten(block).keys()
    assert all(bool(jnp.any(leaf != 0)) for leaf in gradient.values())


def test_a_callback_runs_in_order_inside_a_loop_inside_a_while_loop():
    calls = []

    def record(step: np.ndarray, layer: np.ndarray) -> np.ndarray:
        calls.append((int(step), int(layer)))
        return np.float32(10 * step + layer)

    def body(carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        step, x = carry
        value = jax.ShapeDtypeStruct((), jnp.float32)
        x = jax.lax.fori_loop(0, 4, lambda layer, x: x + io_callback(record, value, step, layer, ordered=True), x)
        return step + 1, x

    run = jax.jit(lambda x, until: jax.lax.while_loop(lambda carry: carry[0] < until, body, (jnp.int32(0), x))[1])
    assert float(run(jnp.float32(0), jnp.int32(3))) == sum(10 * s + i for s in range(3) for i in range(4))
    assert calls == list(itertools.product(range(3), range(4)))


@pytest.mark.slow
def test_one_exported_block_serves_cpu_cuda_and_tpu(blocks, tokens, conditioning):
    block = blocks[1]

    def forward(flat: dict[str, jax.Array], x: jax.Array, caption: jax.Array, mask: jax.Array, mod: jax.Array, t: jax.Array):
        inputs = Conditioning(caption_BLD=caption, mask_BL=mask, mod_BF6D=mod, t_BD=t, t0_BD=None, frame_mask_BT=None)
        return unflatten(abstract(block), flat)(x, inputs)

    inputs = (tokens, conditioning.caption_BLD, conditioning.mask_BL, conditioning.mod_BF6D, conditioning.t_BD)
    exported = jax.export.export(jax.jit(forward), platforms=("cpu", "cuda", "tpu"))(flatten(block), *inputs)
    serialised = exported.serialize()
    weights = sum(leaf.nbytes for leaf in flatten(block).values())
    assert len(serialised) < weights / 10, "the artefact holds the weights, which are arguments"
    restored = jax.export.deserialize(serialised)
    assert restored.platforms == ("cpu", "cuda", "tpu")
    np.testing.assert_array_equal(restored.call(flatten(block), *inputs), jax.jit(forward)(flatten(block), *inputs))


def map_arrays(flat: dict[str, jax.Array], folder: Path) -> dict[str, jax.Array]:
    """Returns the same arrays as JAX arrays that are read-only maps of files; fails if JAX copied them."""
    mapped = {}
    folder.mkdir()
    for name, array in flat.items():
        path = folder / name
        path.write_bytes(np.asarray(array).tobytes())
        with path.open("rb") as file:
            view = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), array.dtype).reshape(array.shape)
        mapped[name] = jax.device_put(view)
        assert mapped[name].unsafe_buffer_pointer() == view.ctypes.data, f"{name} was copied"
    return mapped


def run_from_arguments(shells, flats, x, conditioning, gate=None):
    """All four blocks unrolled; before each, the gate is called with the block's number, tied to x."""

    def stack(x):
        for i, flat in enumerate(flats):
            if gate is not None:
                opened = io_callback(gate, jax.ShapeDtypeStruct((), jnp.int32), i, x[0, 0, 0, 0])
                x, _ = jax.lax.optimization_barrier((x, opened))
            x = unflatten(shells[i % 2], flat)(x, conditioning)
        return x

    return steps(x, stack)


def run_from_callbacks(shells, fetch, x, conditioning):
    """A loop over pairs of blocks whose weights are what ``fetch(number of the block)`` returns on the host."""

    def pair(i, x):
        for kind, shell in enumerate(shells):
            flat = io_callback(fetch, specs(shell), 2 * i + kind, ordered=True)
            x = unflatten(shell, flat)(x, conditioning)
        return x

    return steps(x, lambda x: jax.lax.fori_loop(0, NUM_PAIRS, pair, x))


@pytest.mark.slow
def test_streamed_weights_give_the_same_bits(blocks, tokens, conditioning, tmp_path):
    """Resident arguments, mapped arguments, mapped arguments behind gates, and weights handed over by callbacks.

    One executable gives one result, wherever its arguments lie; that is asserted bit for bit.  Between executables XLA may
    fuse differently, so there the promise is 1e-6; measured (jax 0.10.2, Zen 4, widths 128 and 1152) the bits were equal.
    """
    flats, shells = [flatten(block) for block in blocks], [abstract(block) for block in blocks[:2]]
    mapped = [map_arrays(flat, tmp_path / str(i)) for i, flat in enumerate(flats)]
    host = [{name: np.asarray(leaf) for name, leaf in flat.items()} for flat in flats]
    gates, fetches = [], []

    def gate(i, _):
        gates.append(int(i))
        return np.int32(0)

    def fetch(i):
        fetches.append(int(i))
        return host[int(i)]

    plain = jax.jit(lambda flats, *inputs: run_from_arguments(shells, flats, *inputs))
    gated = jax.jit(lambda flats, *inputs: run_from_arguments(shells, flats, *inputs, gate=gate))
    fed = jax.jit(lambda *inputs: run_from_callbacks(shells, fetch, *inputs))
    resident = np.asarray(plain(flats, tokens, conditioning))
    assert np.isfinite(resident).all()
    np.testing.assert_array_equal(plain(mapped, tokens, conditioning), resident)
    behind_gates = np.asarray(gated(mapped, tokens, conditioning))
    np.testing.assert_array_equal(gated(flats, tokens, conditioning), behind_gates)
    for other in (behind_gates, np.asarray(fed(tokens, conditioning))):
        assert np.linalg.norm(other - resident) <= 1e-6 * np.linalg.norm(resident)
    assert gates == 2 * NUM_STEPS * [0, 1, 2, 3]
    assert fetches == NUM_STEPS * [0, 1, 2, 3]
