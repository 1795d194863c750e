"""The video autoencoder as mathematics: its convolutions and norms, the independence of chunks, the codec's bookkeeping."""

import dataclasses
import json
import re
from pathlib import Path

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

import convert_weights
from sora_jax import config as presets
from sora_jax.config import BFLOAT16, FLOAT32, VAEConfig
from sora_jax.networks.vae import VAE, chunks, latent_size, sample_posterior, split_moments
from sora_jax.networks.vae.layers import CausalConv3D, Conv2D, GroupNorm
from sora_jax.storage.checkpoint import flatten, unflatten
from tests.parity.wide import state_dict_shapes

pytestmark = pytest.mark.usefixtures("little_optimised")

GOLDEN = Path(__file__).parents[1] / "golden" / "vae"

# Two levels instead of four, chunks of 5 frames and 3 latents: every kind of layer, little to compile.
TINY = VAEConfig(
    spatial=dataclasses.replace(presets.pocket.vae.spatial, block_out_channels=(4, 8), norm_num_groups=2),
    temporal=dataclasses.replace(
        presets.pocket.vae.temporal, filters=4, norm_num_groups=2, channel_multipliers=(1, 2), temporal_downsample=(True,)
    ),
    micro_frame_size=5,
)
ROUNDING = 2e-5  # float32 sums in another order, values near 1


def normal(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, dtype=np.float32))


def with_arrays(vae: VAE, arrays: dict[str, jax.Array]) -> VAE:
    return unflatten(jax.eval_shape(lambda: vae), {**flatten(vae), **arrays})


@pytest.fixture(scope="module")
def vae() -> VAE:
    """A network whose parameters are all random, statistics, norms and biases included."""
    abstract = jax.eval_shape(lambda: VAE(TINY, rngs=nnx.Rngs(0)))
    flat = {}
    for seed, (name, leaf) in enumerate(flatten(abstract).items()):
        noise = normal(*leaf.shape, seed=seed)
        if leaf.ndim > 1:
            flat[name] = noise / np.prod(leaf.shape[:-1]) ** 0.5
        else:
            flat[name] = (1.0 if name.endswith("scale") else 0.0) + 0.2 * noise
    return unflatten(abstract, flat)


@jax.jit
def encoded(vae: VAE, video: jax.Array, key: jax.Array) -> dict[str, jax.Array]:
    tiles = chunks(TINY, video.shape[1])
    return {
        "whole": vae.encode(video),
        "looped": jnp.concatenate([vae.encode_chunk(video[:, tile.frames]) for tile in tiles], axis=1),
        "drawn": vae.encode(video, key=key),
        "last_drawn": vae.encode_chunk(video[:, tiles[-1].frames], key=jax.random.fold_in(key, len(tiles) - 1)),
    }


@jax.jit
def decoded(vae: VAE, z: jax.Array) -> dict[str, jax.Array]:
    tiles = chunks(TINY, 8)
    clips = [vae.decode_chunk(z[:, tile.latents], tile.num_frames) for tile in tiles]
    return {"whole": vae.decode(z, 8), "looped": jnp.concatenate(clips, axis=1)}


# The shapes of all tests that use the two functions above: 8 frames are a chunk of 5 and one of 3.
VIDEO, KEY, LATENTS = normal(1, 8, 4, 6, 3), jax.random.key(7), normal(1, 5, 2, 3, 4, seed=1)


class TestLayers:
    @pytest.mark.parametrize(
        ("num_frames", "size", "stride"), [(1, 3, 1), (2, 3, 1), (7, 3, 1), (2, 3, 2), (8, 3, 2), (5, 1, 1)]
    )
    def test_causal_conv_is_a_three_dimensional_convolution_padded_in_front(
        self, num_frames: int, size: int, stride: int
    ) -> None:
        conv = CausalConv3D(3, 5, kernel_size=size, time_stride=stride, policy=FLOAT32, rngs=nnx.Rngs(0))
        conv.bias = nnx.Param(normal(5, seed=3))
        x = normal(2, num_frames, 4, 6, 3)
        side = (size // 2, size // 2)
        expected = jax.lax.conv_general_dilated(
            x, conv.kernel[...], (stride, 1, 1), ((size - stride, 0), side, side), dimension_numbers=("NDHWC", "DHWIO", "NDHWC")
        )
        np.testing.assert_allclose(conv(x), expected + conv.bias[...].reshape(1, 1, 1, 1, 5), rtol=0, atol=ROUNDING)

    def test_causal_conv_does_not_see_later_frames(self) -> None:
        conv = CausalConv3D(3, 5, kernel_size=3, policy=FLOAT32, rngs=nnx.Rngs(0))
        x = normal(1, 6, 4, 4, 3)
        changed = conv(x.at[:, 3].add(1.0)) - conv(x)
        moved = np.any(np.asarray(changed), axis=(0, 2, 3, 4))
        np.testing.assert_array_equal(moved, [False, False, False, True, True, True])

    def test_strided_conv_pads_at_the_end_only(self) -> None:
        conv = Conv2D(2, 3, kernel_size=3, stride=2, padding="end", policy=FLOAT32, rngs=nnx.Rngs(0))
        x = np.asarray(normal(1, 5, 4, 2))
        padded = np.pad(x, ((0, 0), (0, 1), (0, 1), (0, 0)))
        corners = [(i, j) for i in (0, 2) for j in (0, 2)]
        expected = [np.einsum("hwi,hwio->o", padded[0, i : i + 3, j : j + 3], np.asarray(conv.kernel[...])) for i, j in corners]
        np.testing.assert_allclose(np.asarray(conv(jnp.asarray(x)))[0], np.reshape(expected, (2, 2, 3)), rtol=0, atol=ROUNDING)

    @pytest.mark.parametrize("shape", [(2, 4, 5, 12), (2, 3, 4, 5, 12)])
    @pytest.mark.parametrize("mean", [0.0, 30.0])
    def test_group_norm_is_its_definition(self, shape: tuple[int, ...], mean: float) -> None:
        norm = GroupNorm(12, groups=3, epsilon=1e-3, policy=FLOAT32)
        norm.scale, norm.bias = nnx.Param(normal(12, seed=1)), nnx.Param(normal(12, seed=2))
        x = np.asarray(normal(*shape)) + np.float32(mean)
        grouped = x.astype(np.float64).reshape(shape[0], -1, 3, 4)
        centred = grouped - grouped.mean((1, 3), keepdims=True)
        normed = centred / np.sqrt((centred**2).mean((1, 3), keepdims=True) + 1e-3)
        expected = normed.reshape(shape) * np.asarray(norm.scale[...]) + np.asarray(norm.bias[...])
        error = np.linalg.norm(norm(jnp.asarray(x)) - expected) / np.linalg.norm(expected)
        assert error < (1 + mean**2) * 3e-7  # E[x^2] - m^2 loses (m / std)^2 roundings of 6e-8, in sums of some hundred terms


class TestChunks:
    @settings(deadline=None)
    @given(num_frames=st.integers(1, 200), micro=st.integers(1, 20))
    def test_chunks_tile_frames_and_latents(self, num_frames: int, micro: int) -> None:
        config = dataclasses.replace(presets.open_sora_1_2.vae, micro_frame_size=micro)
        tiles = chunks(config, num_frames)
        assert [i for tile in tiles for i in range(tile.frames.start, tile.frames.stop)] == list(range(num_frames))
        num_latents, _, _ = latent_size(config, num_frames, 8, 8)
        assert num_latents is not None
        assert [i for tile in tiles for i in range(tile.latents.start, tile.latents.stop)] == list(range(num_latents))
        assert all(tile.latents.stop - tile.latents.start == -(-tile.num_frames // 4) for tile in tiles)

    def test_latent_sizes_are_those_of_the_reference(self) -> None:
        table = json.loads((GOLDEN / "config.json").read_text())["get_latent_size"]
        for size, expected in table.items():
            num_frames, height, width = (None if part == "None" else int(part) for part in size.strip("()").split(", "))
            assert height is not None
            assert width is not None
            assert latent_size(presets.open_sora_1_2.vae, num_frames, height, width) == tuple(expected), size

    @pytest.mark.ci
    def test_a_loop_over_chunks_is_the_whole(self, vae: VAE) -> None:
        latents, frames = encoded(vae, VIDEO, KEY), decoded(vae, LATENTS)
        assert latents["whole"].shape[1:4] == latent_size(TINY, *VIDEO.shape[1:4])
        assert frames["whole"].shape == VIDEO.shape
        np.testing.assert_allclose(latents["looped"], latents["whole"], rtol=0, atol=ROUNDING)
        np.testing.assert_allclose(frames["looped"], frames["whole"], rtol=0, atol=ROUNDING)

    @pytest.mark.ci
    def test_chunks_do_not_see_each_other(self, vae: VAE) -> None:
        changed = VIDEO.at[:, 7].add(1.0)
        moved = np.asarray(encoded(vae, changed, KEY)["whole"] - encoded(vae, VIDEO, KEY)["whole"])
        assert not np.any(moved[:, :3])
        assert np.all(np.any(moved[:, 3:], axis=(0, 2, 3, 4)))  # group norm carries it through its own chunk
        moved = np.asarray(decoded(vae, LATENTS.at[:, 0].add(1.0))["whole"] - decoded(vae, LATENTS)["whole"])
        assert not np.any(moved[:, 5:])
        assert np.all(np.any(moved[:, :5], axis=(0, 2, 3, 4)))

    def test_time_is_padded_in_front_and_the_padding_dropped(self, vae: VAE) -> None:
        x, z = normal(2, 1, 2, 3, 4), normal(2, 1, 2, 3, 4, seed=1)
        padded = jnp.concatenate([jnp.zeros_like(x), x], axis=1)
        run = jax.jit(lambda network, x: network(x))
        one, two = run(vae.temporal_encoder, x), run(vae.temporal_encoder, padded)
        np.testing.assert_allclose(one, two, rtol=0, atol=1e-6)  # the compiler may fuse the padding
        one, two = (jax.jit(lambda network, z, n=n: network(z, n))(vae.temporal_decoder, z) for n in (1, 2))
        np.testing.assert_allclose(one, two[:, 1:], rtol=0, atol=1e-6)


class TestCodec:
    def test_frames_are_independent_and_may_be_batched(self, vae: VAE) -> None:
        video = normal(2, 3, 4, 6, 3)
        at_once, batched = (jax.jit(lambda vae, x, n=n: vae.spatial_moments(x, frame_batch=n)) for n in (None, 4))
        whole = at_once(vae, video)
        np.testing.assert_allclose(batched(vae, video), whole, rtol=0, atol=ROUNDING)  # 6 frames: a group of 4 and a rest
        moved = np.any(np.asarray(at_once(vae, video.at[1, 2].add(1.0)) - whole), axis=(2, 3, 4))
        np.testing.assert_array_equal(moved, [[False] * 3, [False, False, True]])

    def test_statistics_normalise_what_is_encoded_and_restore_what_is_decoded(self, vae: VAE) -> None:
        plain = with_arrays(vae, {"stats.shift": jnp.zeros(4), "stats.scale": jnp.ones(4)})
        shift, scale = (np.reshape(flatten(vae)[f"stats.{name}"], (1, 1, 1, 1, 4)) for name in ("shift", "scale"))
        expected = (encoded(plain, VIDEO, KEY)["whole"] - shift) / scale
        np.testing.assert_allclose(encoded(vae, VIDEO, KEY)["whole"], expected, rtol=0, atol=ROUNDING)
        restored = decoded(plain, LATENTS * scale + shift)["whole"]
        np.testing.assert_allclose(decoded(vae, LATENTS)["whole"], restored, rtol=0, atol=ROUNDING)
        np.testing.assert_allclose(vae.stats.restore(vae.stats.normalise(LATENTS)), LATENTS, rtol=0, atol=1e-6)

    def test_posterior_has_the_moments_it_was_given(self) -> None:
        moments = jnp.asarray([0.5, -2.0, 2 * np.log(0.1), 2 * np.log(3.0)], jnp.float32)
        keys = jax.random.split(jax.random.key(0), 20_000)
        draws = np.asarray(jax.vmap(lambda key: sample_posterior(moments, key))(keys))
        np.testing.assert_array_equal(sample_posterior(moments, None), moments[:2])
        np.testing.assert_allclose(draws.mean(0), [0.5, -2.0], rtol=0, atol=5 * 3.0 / 20_000**0.5)  # 5 standard errors
        np.testing.assert_allclose(draws.std(0), [0.1, 3.0], rtol=5 / 40_000**0.5)
        np.testing.assert_array_equal(split_moments(jnp.asarray([1.0, 1.0, -99.0, 99.0]))[1], [-30.0, 20.0])

    def test_a_key_draws_from_both_posteriors_chunk_by_chunk(self, vae: VAE) -> None:
        out = encoded(vae, VIDEO, KEY)
        np.testing.assert_allclose(out["drawn"][:, 3:], out["last_drawn"], rtol=0, atol=ROUNDING)
        assert np.max(np.abs(out["drawn"] - encoded(vae, VIDEO, jax.random.key(8))["drawn"])) > 1e-2
        # Log variances of -60, clipped to -30, leave of one posterior only its mean.
        certain = {f"{part}_encoder.quant_conv.bias": jnp.asarray([0.0] * 4 + [-60.0] * 4) for part in ("spatial", "temporal")}
        for parts, least, most in ((certain.keys(), 0.0, 1e-4), ({min(certain)}, 1e-2, 99.0), ({max(certain)}, 1e-2, 99.0)):
            out = encoded(with_arrays(vae, {name: certain[name] for name in parts}), VIDEO, KEY)
            assert least < np.max(np.abs(out["drawn"] - out["whole"])) < most, parts

    @pytest.mark.parametrize(
        ("num_frames", "num_latents", "fix"), [(9, 6, "10"), (5, 4, "6, 7"), (10, 5, "8, 9"), (3, 0, "none")]
    )
    def test_frames_that_do_not_fit_the_latents_are_refused(
        self, vae: VAE, num_frames: int, num_latents: int, fix: str
    ) -> None:
        z = jnp.zeros((1, num_latents, 2, 2, 4))
        with pytest.raises(
            ValueError, match=rf"num_frames {num_frames} has \d latent frames, got {num_latents}; .* num_frames {fix}\."
        ):
            vae.decode(z, num_frames)

    def test_chunks_that_are_none_are_refused(self, vae: VAE) -> None:
        with pytest.raises(ValueError, match="num_frames 6 is no chunk; expected 1 to 5"):
            vae.encode_chunk(jnp.zeros((1, 6, 4, 4, 3)))
        with pytest.raises(ValueError, match="num_frames 6 is no chunk; expected 1 to 5"):
            vae.decode_chunk(jnp.zeros((1, 3, 2, 2, 4)), 6)
        with pytest.raises(ValueError, match="expected num_frames 5 to 6"):
            vae.temporal_decoder(jnp.zeros((1, 3, 2, 2, 4)), 4)
        with pytest.raises(ValueError, match="num_frames 0 is no video"):
            vae.decode(jnp.zeros((1, 1, 2, 2, 4)), 0)


class TestWhole:
    @pytest.mark.slow
    def test_every_parameter_has_a_gradient_but_those_that_cancel(self, vae: VAE) -> None:
        video, target = normal(1, 1, 4, 6, 3), normal(1, 1, 4, 6, 3, seed=9)

        def similarity(vae: VAE, key: jax.Array) -> jax.Array:
            return jnp.sum(vae.decode(vae.encode(video, key=key), 1) * target)

        # Zero or not is the question here, so the compiler need not optimise: half the test's time.
        gradient = jax.jit(jax.grad(similarity), compiler_options={"xla_backend_optimization_level": 0})
        sizes = {name: float(np.max(np.abs(value))) for name, value in flatten(gradient(vae, KEY)).items()}
        assert all(np.isfinite(list(sizes.values())))
        # Softmax does not see a shift of its keys, and a round trip divides by the scale it multiplies with.
        cancelling = re.compile(r".*to_k\.bias|stats\..*")
        assert {name for name, size in sizes.items() if size < 1e-4} == set(filter(cancelling.fullmatch, sizes))

    @pytest.mark.slow
    def test_bfloat16_computes_what_float32_does_to_its_precision(self, vae: VAE) -> None:
        mixed = dataclasses.replace(BFLOAT16, param=jnp.float32)
        narrow = unflatten(jax.eval_shape(lambda: VAE(TINY, policy=mixed, rngs=nnx.Rngs(0))), flatten(vae))

        @jax.jit
        def run(vae: VAE, z: jax.Array) -> jax.Array:
            return vae.decode_chunk(z, 1)

        out, truth = run(narrow, LATENTS[:, :1]), np.asarray(run(vae, LATENTS[:, :1]))
        assert out.dtype == jnp.float32
        error = np.linalg.norm(np.asarray(out) - truth) / np.linalg.norm(truth)
        assert 1e-3 < error < 5e-2  # 2^-9 a rounding, some twenty layers deep
        x = normal(1, 2, 2, 3, 4)
        gradient = jax.jit(jax.grad(lambda encoder: jnp.sum(encoder(x).astype(jnp.float32) ** 2)))(narrow.temporal_encoder)
        assert all(np.all(np.isfinite(value)) and np.any(value) for value in flatten(gradient).values())

    def test_parameters_belong_to_the_layers_of_the_configuration(self, vae: VAE) -> None:
        assert {name.split(".")[0] for name in flatten(vae)} == set(TINY.layers)

    def test_lowers_for_every_platform(self, vae: VAE) -> None:
        platforms = ("cpu", "cuda", "tpu")
        both = jax.jit(lambda vae, video: vae.decode(vae.encode(video), 8))
        assert jax.export.export(both, platforms=platforms)(jax.eval_shape(lambda: vae), VIDEO).platforms == platforms


@pytest.fixture(scope="module")
def state_dict() -> dict[str, np.ndarray]:
    return {name: np.asarray(normal(*shape)) for name, shape in state_dict_shapes("vae", TINY).items()}


class TestConversion:
    @pytest.mark.parametrize("pointwise", [False, True])
    def test_old_attention_names_are_understood(self, state_dict: dict[str, np.ndarray], pointwise: bool) -> None:
        old = {}
        for name, array in state_dict.items():
            for new_name, old_name in {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}.items():
                name = name.replace(f"attentions.0.{new_name}.", f"attentions.0.{old_name}.")
            old[name] = (
                array[:, :, None, None] if pointwise and re.search(r"(query|key|value|proj_attn)\.weight", name) else array
            )
        assert old.keys() != state_dict.keys()
        new_flat, old_flat = (convert_weights.convert("vae", arrays, TINY) for arrays in (state_dict, old))
        assert all(np.array_equal(new_flat[name], old_flat[name]) for name in {*new_flat, *old_flat})

    def test_all_faults_are_reported_at_once(self, state_dict: dict[str, np.ndarray]) -> None:
        attention = "spatial_vae.module.decoder.mid_block.attentions.0"
        faulty = {
            **state_dict,
            f"{attention}.query.weight": state_dict[f"{attention}.to_q.weight"],
            "loss.logvar": np.zeros(1, np.float32),
        }
        del faulty["scale"]
        strided = "temporal_vae.encoder.conv_blocks.0.conv.weight"
        faulty[strided] = faulty[strided][:, :, 1:]
        with pytest.raises(convert_weights.ConversionError) as caught:
            convert_weights.convert("vae", faulty, TINY)
        report = "\n".join(caught.value.faults)
        for part in (
            "attention.to_q.kernel: set 2 times",
            "loss.logvar: unknown",
            "stats.scale: missing",
            f"{strided}: shape",
        ):
            assert part in report
        assert len(caught.value.faults) == 4
