"""The conversion engine: every fault is found, all at once, and every transform can be undone."""

import dataclasses
from collections.abc import Callable

import jax
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

from convert_weights import convert, parameter_shapes, table
from convert_weights.rules import (
    CHANNELS,
    CONV2D,
    CONV3D,
    IDENTITY,
    LINEAR,
    LINEAR_OR_CONV1X1,
    ConversionError,
    Header,
    Rule,
    common_prefix,
    convert_arrays,
    make_plan,
    sources_of,
)
from sora_jax.networks.stdit3 import STDiT3
from sora_jax.networks.t5 import T5Encoder
from sora_jax.networks.vae.codec import VAE
from sora_jax.storage.checkpoint import flatten
from tests.support import sources

RULES = [
    Rule("layer.{i}.weight", "block.{i}.kernel", LINEAR),
    Rule("shared", "embedding"),
    Rule("tied", "embedding", duplicate_of="shared"),
    Rule("freqs", None, expected=np.array([1.0, 1 / 3], np.float32)),
]
IGNORED = {"optimizer.{*}": "training state"}
EXPECTED = {"block.0.kernel": (3, 2), "embedding": (4,)}


def _arrays() -> dict[str, np.ndarray]:
    return {
        "layer.0.weight": np.arange(6, dtype=np.float32).reshape(2, 3),
        "shared": np.ones(4, np.float32),
        "tied": np.ones(4, np.float32),
        "freqs": np.array([1.0, 1 / 3], np.float32),
        "optimizer.step.0": np.zeros((), np.int64),
    }


def _convert(arrays: dict[str, np.ndarray], **options: bool) -> dict[str, np.ndarray]:
    headers = {name: Header(array.shape, array.dtype.name) for name, array in arrays.items()}
    return convert_arrays(make_plan(RULES, IGNORED, headers, EXPECTED, **options), arrays, subject="toy")


def _faults(arrays: dict[str, np.ndarray]) -> str:
    with pytest.raises(ConversionError) as caught:
        _convert(arrays)
    return "\n".join(caught.value.faults)


def test_values_are_transposed_and_ties_dropped() -> None:
    flat = _convert(_arrays())
    np.testing.assert_array_equal(flat["block.0.kernel"], np.arange(6).reshape(2, 3).T)
    assert flat.keys() == EXPECTED.keys()
    assert all(array.flags.c_contiguous for array in flat.values())


@pytest.mark.parametrize(
    ("name", "value", "report"),
    [
        ("layer.1.weight", np.zeros((2, 3), np.float32), "layer.1.weight: unknown array; it would set block.1.kernel"),
        ("layer.01.weight", np.zeros((2, 3), np.float32), "layer.01.weight: unknown array"),
        ("other", np.zeros(3, np.float32), r"other: unknown array \[3\]"),
        ("layer.0.weight", None, "block.0.kernel: missing"),
        ("layer.0.weight", np.zeros((3, 2), np.float32), r"layer.0.weight: shape \[3, 2\] does not become \[3, 2\]"),
        ("layer.0.weight", np.zeros((2, 3, 1), np.float32), r"layer.0.weight: shape \[2, 3, 1\]"),
        ("layer.0.weight", np.zeros((2, 3), np.float64), "layer.0.weight: dtype float64"),
        ("layer.0.weight", np.zeros((2, 3), np.float16), "layer.0.weight: dtype float16, but 2 other arrays are float32"),
        ("layer.0.weight", np.full((2, 3), np.nan, np.float32), "layer.0.weight: 6 of 6 values are NaN or infinite"),
        ("shared", np.array([1, 1, 1, -np.inf], np.float32), "shared: 1 of 4 values"),
        ("tied", np.array([1, 1, 1, 2], np.float32), "tied: differs from shared"),
        ("tied", np.ones(5, np.float32), "tied: shape or dtype differs from shared"),
        ("freqs", np.array([1.0, 0.34], np.float32), "freqs: differs from its formula"),
        ("freqs", np.ones(3, np.float32), r"freqs: shape \[3\]; expected \[2\]"),
    ],
)
def test_each_fault_is_reported_by_name(name: str, value: np.ndarray | None, report: str) -> None:
    arrays = _arrays()
    if value is None:
        del arrays[name]
    else:
        arrays[name] = value
    with pytest.raises(ConversionError, match=report):
        _convert(arrays)


def test_all_faults_are_in_one_report() -> None:
    arrays = _arrays()
    del arrays["shared"], arrays["tied"]
    arrays["layer.0.weight"] = np.full((2, 3), np.inf, np.float32)
    arrays |= {"other": np.zeros(1, np.float32), "freqs": np.zeros(2, np.float32)}
    assert [line.partition(":")[0] for line in _faults(arrays).splitlines()] == [
        "other",
        "embedding",
        "layer.0.weight",
        "freqs",
    ]


def test_one_target_set_by_two_spellings_is_a_fault() -> None:
    rules = [Rule("to_q", "q"), Rule("query", "q")]
    headers = {"to_q": Header((2,), "float32"), "query": Header((2,), "float32")}
    assert make_plan(rules, {}, headers, {"q": (2,)}).faults == ("q: set 2 times, by to_q, query",)


def test_a_tied_array_alone_sets_its_target() -> None:
    arrays = _arrays()
    arrays["tied"] = 2 * arrays.pop("shared")
    np.testing.assert_array_equal(_convert(arrays)["embedding"], np.full(4, 2.0))


def test_a_formula_may_be_rounded_to_the_dtype_of_the_checkpoint() -> None:
    rounded = {name: array.astype(ml_dtypes.bfloat16) for name, array in _arrays().items() if array.dtype == np.float32}
    assert _convert(rounded).keys() == EXPECTED.keys()


def test_a_wrapper_is_understood_only_around_all_names() -> None:
    wrapped = {f"module._orig_mod.{name}": array for name, array in _arrays().items()}
    assert _convert(wrapped).keys() == EXPECTED.keys()
    assert common_prefix(["module.a", "module.b", "c"]) == ""
    arrays = _arrays()
    arrays["module.shared"] = arrays.pop("shared")
    assert "module.shared: unknown array" in _faults(arrays)


def test_mixed_dtypes_can_be_allowed() -> None:
    arrays = _arrays()
    arrays["layer.0.weight"] = arrays["layer.0.weight"].astype(np.float16)
    assert _convert(arrays, allow_mixed_dtypes=True)["block.0.kernel"].dtype == np.float32


@pytest.mark.parametrize(
    ("transform", "shape"),
    [
        (IDENTITY, (3, 2)),
        (LINEAR, (3, 2)),
        (CONV2D, (5, 4, 3, 2)),
        (CONV3D, (6, 5, 4, 3, 2)),
        (LINEAR_OR_CONV1X1, (3, 2)),
        (LINEAR_OR_CONV1X1, (3, 2, 1, 1)),
        (CHANNELS, (1, 4, 1, 1, 1)),
    ],
)
def test_transforms_are_invertible_and_work_on_some_rows(transform, shape: tuple[int, ...]) -> None:
    x = np.random.default_rng(0).standard_normal(shape)
    y = transform.apply(x)
    assert y.shape == transform.shape(shape)
    np.testing.assert_array_equal(transform.inverse(y).reshape(shape), x)
    parts = [transform.apply(x[:1]), transform.apply(x[1:])] if shape[0] > 1 else [y]
    np.testing.assert_array_equal(np.concatenate(parts, axis=0 if transform.keeps_rows else -1), y)


@pytest.mark.parametrize(
    ("transform", "shape"),
    [
        (LINEAR, (3, 2, 1)),
        (CONV2D, (3, 2)),
        (CONV3D, (3, 2, 1, 1)),
        (LINEAR_OR_CONV1X1, (3, 2, 1, 3)),
        (CHANNELS, (2, 4, 1, 1, 1)),
    ],
)
def test_transforms_refuse_other_layouts(transform, shape: tuple[int, ...]) -> None:
    assert transform.shape(shape) is None


def test_convolutions_keep_their_meaning() -> None:
    weight = np.random.default_rng(1).standard_normal((5, 4, 3, 2))  # out, in, height, width
    assert CONV2D.apply(weight)[2, 1, 3, 4] == weight[4, 3, 2, 1]
    weight = np.random.default_rng(1).standard_normal((6, 5, 4, 3, 2))  # out, in, depth, height, width
    assert CONV3D.apply(weight)[3, 2, 1, 4, 5] == weight[5, 4, 3, 2, 1]


def test_rounding_to_bfloat16_is_half_to_even_and_overflow_a_fault() -> None:
    arrays = _arrays()
    arrays["shared"] = arrays["tied"] = np.array([1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8, 3.4e38], np.float32)
    headers = {name: Header(array.shape, array.dtype.name) for name, array in arrays.items()}
    made = make_plan(RULES, IGNORED, headers, EXPECTED)
    with pytest.raises(ConversionError, match="shared: values overflow bfloat16"):
        convert_arrays(made, arrays, subject="toy", dtype="bfloat16")
    arrays["shared"][3] = arrays["tied"][3] = 0
    rounded = convert_arrays(made, arrays, subject="toy", dtype="bfloat16")["embedding"].astype(np.float32)
    np.testing.assert_array_equal(rounded, [1, 1 + 2**-6, -1, 0])


@pytest.mark.parametrize("network", sources.NETWORKS)
def test_every_parameter_has_a_name_to_go_back_to(network: str) -> None:
    config = sources.golden_config(network)
    rules, _ = table(network, config)
    arrays = sources.state_dict(network)
    back = {sources_of(rules, name)[0][0] for name in parameter_shapes(network, config)}
    assert back <= arrays.keys()
    left = arrays.keys() - back
    assert left <= {"rope.freqs", "encoder.embed_tokens.weight"}


@pytest.mark.parametrize(("network", "build"), [("t5", T5Encoder), ("stdit3", STDiT3), ("vae", VAE)])
def test_parameter_shapes_are_those_of_the_whole_network(network: str, build: Callable[..., object]) -> None:
    config = sources.golden_config(network)
    whole = flatten(jax.eval_shape(lambda: build(config, rngs=nnx.Rngs(0))))
    assert dict(parameter_shapes(network, config)) == {name: leaf.shape for name, leaf in whole.items()}


def test_state_dicts_of_tensors_are_taken_as_they_are() -> None:
    torch = pytest.importorskip("torch", reason="the reference extra (torch, transformers, diffusers) is not installed")
    arrays = sources.state_dict("t5")
    tensors = {name: torch.nn.Parameter(torch.from_numpy(array).bfloat16()) for name, array in arrays.items()}
    config = sources.golden_config("t5")
    expected = convert("t5", sources.halved(arrays, "bfloat16"), config)
    flat = convert("t5", tensors, config)
    assert all(sources.bits(flat[name]) == sources.bits(expected[name]) for name in expected)


def test_an_unknown_network_is_named() -> None:
    with pytest.raises(ValueError, match="unknown network 'clip'; expected one of t5, stdit3, vae"):
        convert("clip", {}, None)


def test_a_deeper_configuration_than_the_checkpoint_misses_blocks() -> None:
    config = dataclasses.replace(sources.golden_config("t5"), num_layers=4)
    with pytest.raises(ConversionError, match="9 faults") as caught:
        convert("t5", sources.state_dict("t5"), config)
    assert all(fault.startswith("block.3.") for fault in caught.value.faults)
