"""Token merging: which frames share a token, what merging leaves unchanged, and which frame counts are refused."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sora_jax import config as presets
from sora_jax.networks.merging import Merge, check_frames, frame_tokens, merge, query_positions, token_positions, unmerge
from sora_jax.networks.stdit3 import Conditioning, STDiT3Block
from sora_jax.storage.checkpoint import flatten, unflatten

pytestmark = pytest.mark.usefixtures("little_optimised")

TDTM = json.loads((Path(__file__).parents[1] / "golden/tdtm/config.json").read_text())
TINY = dataclasses.replace(presets.pocket.stdit3, hidden_size=24, num_heads=2)
# Sums of a few dozen float32 terms in another order, through one block.
ROUNDING = {"rtol": 0, "atol": 1e-5}


def frames_of(values: list[float]) -> jax.Array:
    return jnp.asarray(values, jnp.float32)[None, :, None, None]


@pytest.mark.parametrize("num_frames", [2, 5, 8])
def test_frames_that_share_a_token_survive(num_frames: int) -> None:
    x = frames_of([float(token) for token in frame_tokens(num_frames, odd="alone")])
    np.testing.assert_array_equal(unmerge(merge(x, odd="alone"), num_frames), x)


@pytest.mark.parametrize("num_frames", [2, 5, 8])
def test_a_token_is_the_mean_of_its_frames(num_frames: int) -> None:
    x = np.random.default_rng(num_frames).standard_normal((2, num_frames, 3, 4)).astype(np.float32)
    tokens = frame_tokens(num_frames, odd="alone")
    expected = np.stack([x[:, tokens == token].mean(axis=1) for token in range(tokens[-1] + 1)], axis=1)
    merged = merge(jnp.asarray(x), odd="alone")
    np.testing.assert_allclose(merged, expected, rtol=0, atol=3e-7)
    np.testing.assert_array_equal(unmerge(merged, num_frames), merged[:, tokens])


def test_released_rule_drops_the_last_odd_frame_and_repeats_the_pair_before() -> None:
    merged = merge(frames_of([0, 2, 4, 6, 8, 10, 99]), odd="released")
    np.testing.assert_array_equal(merged[0, :, 0, 0], [1, 5, 9])
    np.testing.assert_array_equal(unmerge(merged, 7)[0, :, 0, 0], [1, 1, 5, 5, 9, 9, 9])
    np.testing.assert_array_equal(frame_tokens(7, odd="released"), [0, 0, 1, 1, 2, 2, 2])


@pytest.mark.parametrize("num_frames", range(1, 65))
def test_released_rule_takes_the_odd_counts_of_the_published_code(num_frames: int) -> None:
    if num_frames % 2 == 0 or num_frames in TDTM["T_that_roundtrip_in_upstream_python"]:
        assert frame_tokens(num_frames, odd="released").tolist()[-2:] == [num_frames // 2 - 1] * 2
    else:
        with pytest.raises(ValueError, match=f"got {num_frames};|restore {num_frames} latent frames"):
            check_frames(num_frames, "released")


@pytest.mark.parametrize("odd", ["alone", "released"])
def test_one_frame_is_refused(odd: str) -> None:
    with pytest.raises(ValueError, match=r"at least 2 latent frames, got 1; use merge_steps=0\."):
        merge(frames_of([1.0]), odd=odd)  # type: ignore[arg-type]


def test_unmerge_refuses_tokens_that_cannot_be_those_frames() -> None:
    with pytest.raises(ValueError, match="3 merged tokens cannot stand for 9 frames"):
        unmerge(frames_of([1, 2, 3]), 9)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"odd": "drop"}, "Merge.odd is 'drop'; expected one of 'alone', 'released'"),
        ({"rope_positions": "first"}, "Merge.rope_positions is 'first'"),
        ({"spatial": False, "temporal": False, "cross": False}, "selects no attention"),
        ({"spatial": False, "temporal": False, "keys_values_only": True}, "set spatial or temporal"),
    ],
)
def test_meaningless_options_are_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Merge(**fields)  # type: ignore[arg-type]


@pytest.mark.parametrize(("num_frames", "odd"), [(6, "alone"), (7, "alone"), (7, "released")])
def test_mean_positions_are_means_over_frames(num_frames: int, odd: str) -> None:
    rule = Merge(odd=odd, rope_positions="mean")  # type: ignore[arg-type]
    index = frames_of(list(range(num_frames)))
    np.testing.assert_array_equal(token_positions(num_frames, rule), merge(index, odd=rule.odd)[0, :, 0, 0])
    np.testing.assert_array_equal(query_positions(num_frames, rule), np.arange(num_frames))


@pytest.fixture(scope="module")
def blocks() -> dict[str, STDiT3Block]:
    """Blocks without the zeros of the initialisation, which would hide errors."""
    made = {}
    for name in ("spatial", "temporal"):
        shell = jax.eval_shape(lambda name=name: STDiT3Block(TINY, temporal=name == "temporal", rngs=nnx.Rngs(0)))
        generator = np.random.default_rng(1)
        flat = {
            key: jnp.asarray(generator.standard_normal(leaf.shape) * 0.3, jnp.float32) for key, leaf in flatten(shell).items()
        }
        made[name] = unflatten(shell, flat)
    return made


@pytest.fixture(scope="module")
def conditioning() -> Conditioning:
    keys = jax.random.split(jax.random.key(3), 3)
    return Conditioning(
        caption_BLD=jax.random.normal(keys[0], (1, 5, TINY.hidden_size)),
        mask_BL=None,
        mod_BF6D=jax.random.normal(keys[1], (1, 1, 6, TINY.hidden_size)),
        t_BD=jax.random.normal(keys[2], (1, TINY.hidden_size)),
        t0_BD=None,
        frame_mask_BT=None,
    )


def tokens_of(num_frames: int, *, paired: bool) -> jax.Array:
    """Returns video tokens, with ``paired`` equal in frames 2k and 2k+1."""
    x = jax.random.normal(jax.random.key(num_frames), (1, num_frames, 4, TINY.hidden_size))
    return x[:, np.arange(num_frames) // 2] if paired else x


def run(block: STDiT3Block, x: jax.Array, conditioning: Conditioning, rule: Merge | None) -> np.ndarray:
    return np.asarray(jax.jit(lambda block, x, conditioning: block(x, conditioning, merge=rule))(block, x, conditioning))


@pytest.mark.parametrize("rule", [Merge(), Merge(keys_values_only=True), Merge(cross=False)])
def test_merging_equal_frames_leaves_a_spatial_block_as_it_is(
    blocks: dict[str, STDiT3Block], conditioning: Conditioning, rule: Merge
) -> None:
    x = tokens_of(5, paired=True)
    block = blocks["spatial"]
    np.testing.assert_allclose(run(block, x, conditioning, rule), run(block, x, conditioning, None), **ROUNDING)


def test_queries_of_equal_frames_see_what_their_token_sees(blocks: dict[str, STDiT3Block], conditioning: Conditioning) -> None:
    x = tokens_of(6, paired=True)
    block = blocks["temporal"]
    whole, keys_only = (run(block, x, conditioning, Merge(cross=False, keys_values_only=flag)) for flag in (False, True))
    np.testing.assert_allclose(keys_only, whole, **ROUNDING)
    assert np.abs(whole - run(block, x, conditioning, None)).max() > 1e-3  # positions 0, 1, 2 are not 0 ... 5


@pytest.mark.parametrize("name", ["spatial", "temporal"])
def test_every_option_changes_the_block_it_names(blocks: dict[str, STDiT3Block], conditioning: Conditioning, name: str) -> None:
    x = tokens_of(7, paired=False)
    attention_only = Merge(spatial=name == "spatial", temporal=name == "temporal", cross=False)
    other_block = Merge(spatial=name != "spatial", temporal=name != "temporal", cross=False)
    rules = [
        None,
        attention_only,
        Merge(spatial=False, temporal=False),
        dataclasses.replace(attention_only, keys_values_only=True),
    ]
    rules += [dataclasses.replace(attention_only, rope_positions="mean")] if name == "temporal" else []
    outs = [run(blocks[name], x, conditioning, rule) for rule in rules]
    for i, first in enumerate(outs):
        for second in outs[:i]:
            assert np.abs(first - second).max() > 1e-3
    np.testing.assert_array_equal(run(blocks[name], x, conditioning, other_block), outs[0])


def test_merged_attentions_compute_half(blocks: dict[str, STDiT3Block], conditioning: Conditioning) -> None:
    x = tokens_of(8, paired=False)

    def flops(rule: Merge | None) -> float:
        lowered = jax.jit(lambda block, x, given: block(x, given, merge=rule)).lower(blocks["spatial"], x, conditioning)
        return lowered.cost_analysis()["flops"]

    width, count, caption, mlp = TINY.hidden_size, x.shape[1] * x.shape[2], 5, TINY.mlp_size
    # qkv 3, proj 1, cross q and proj 2 of width^2; logits and values of places and of caption tokens
    attentions = count * (6 * width**2 + 2 * width * x.shape[2] + 2 * width * caption) * 2
    unmerged = count * 2 * width * mlp * 2 + caption * 2 * width**2 * 2
    expected = (unmerged + attentions / 2) / (unmerged + attentions)
    assert flops(Merge()) / flops(None) == pytest.approx(expected, rel=0.1)  # the rest is elementwise
