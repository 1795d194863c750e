"""The interpreter of saved Core ML programs: its operations against coremltools' own value inference and JAX, its rounding,
its reading of compressed weights, its refusals."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

ct = pytest.importorskip("coremltools", reason="the coreml extra (coremltools, stablehlo-coreml) is not installed")
mil = pytest.importorskip("coremltools.converters.mil.mil")

from sora_jax.export import mil_check  # noqa: E402  # imports coremltools
from sora_jax.export.mil_ops import OPERATIONS  # noqa: E402
from sora_jax.export.mil_package import MilError  # noqa: E402

mb, types = mil.Builder, mil.types

IOS18 = ct.target.iOS18
RNG = np.random.default_rng(0)
X = RNG.standard_normal((2, 3, 4)).astype(np.float32)
Y = RNG.standard_normal((2, 3, 4)).astype(np.float32)
POSITIVE = np.abs(X) + np.float32(0.1)
COUNTS = RNG.integers(0, 3, (2, 3, 4)).astype(np.int32)
FLAGS = X > 0


def i32(*values: int) -> np.ndarray:
    return np.asarray(values, np.int32)


def _q(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


BINARY = ["add", "sub", "mul", "real_div", "maximum", "minimum", "greater", "greater_equal", "less", "less_equal", "equal"]
UNARY = ["abs", "cos", "exp", "sin", "tanh"]
# Several lines for one operation name different parameters.
CASES: list[tuple[str, dict[str, Any]]] = [
    *[(name, {"x": X, "y": Y}) for name in [*BINARY, "not_equal"]],
    *[(name, {"x": COUNTS, "y": COUNTS[::-1].copy()}) for name in ("add", "mul", "equal", "less")],
    ("add", {"x": X, "y": Y[:1, :, :1]}),
    *[(name, {"x": X}) for name in UNARY],
    *[(name, {"x": FLAGS, "y": FLAGS[::-1].copy()}) for name in ("logical_and", "logical_or")],
    ("logical_not", {"x": FLAGS}),
    ("sqrt", {"x": POSITIVE}),
    ("rsqrt", {"x": POSITIVE}),
    ("rsqrt", {"x": POSITIVE, "epsilon": np.float32(0.5)}),
    ("gelu", {"x": X, "mode": "TANH_APPROXIMATION"}),
    ("gelu", {"x": X, "mode": "SIGMOID_APPROXIMATION"}),
    ("cast", {"x": 3 * X, "dtype": "int32"}),
    ("cast", {"x": X, "dtype": "fp16"}),
    ("cast", {"x": COUNTS, "dtype": "bool"}),
    ("cast", {"x": FLAGS, "dtype": "fp32"}),
    ("select", {"cond": FLAGS, "a": X, "b": Y}),
    ("reshape", {"x": X, "shape": i32(4, -1)}),
    ("transpose", {"x": X, "perm": i32(2, 0, 1)}),
    ("transpose", {"x": X, "perm": i32(-1, 0, 1)}),
    ("squeeze", {"x": X[:1, :, :1], "axes": i32(0)}),
    ("squeeze", {"x": X[:1, :, :1]}),
    ("expand_dims", {"x": X, "axes": i32(0, 3)}),
    ("concat", {"values": [X, Y[:, :1]], "axis": np.int32(1)}),
    ("concat", {"values": [X, Y], "axis": np.int32(-1), "interleave": False}),
    ("tile", {"x": X, "reps": i32(1, 2, 3)}),
    ("slice_by_index", {"x": X, "begin": i32(0, 1, 0), "end": i32(2, 3, 4), "stride": i32(1, 1, 2)}),
    ("slice_by_index", {"x": X, "begin": i32(1, 0, 3), "end": i32(2, 3, 0), "stride": i32(1, 1, -1)}),
    (
        "slice_by_index",
        {
            "x": X,
            "begin": i32(1, 9, 0),
            "end": i32(9, 9, 3),
            "begin_mask": np.array([False, True, False]),
            "end_mask": np.array([False, True, False]),
            "squeeze_mask": np.array([True, False, False]),
        },
    ),
    ("slice_update", {"x": X, "update": Y[:, :2, :2], "begin": i32(0, 1, 0), "end": i32(2, 3, 4), "stride": i32(1, 1, 2)}),
    ("slice_by_size", {"x": X, "begin": i32(0, 1, 2), "size": i32(2, -1, 1)}),
    ("gather", {"x": X, "indices": i32(1, 0, 1), "axis": np.int32(0)}),
    ("gather", {"x": X, "indices": np.array([[2, 0], [1, -1]], np.int32), "axis": np.int32(1), "batch_dims": np.int32(0)}),
    ("pad", {"x": X, "pad": i32(0, 0, 1, 2, 0, 3), "mode": "constant", "constant_val": np.float32(1.5)}),
    ("pad", {"x": X, "pad": i32(1, 2), "mode": "replicate"}),
    ("pad", {"x": X, "pad": i32(1, 2), "mode": "reflect"}),
    *[(f"reduce_{name}", {"x": X, "axes": i32(-1), "keep_dims": True}) for name in ("max", "mean", "min", "sum")],
    *[(f"reduce_{name}", {"x": X, "axes": i32(0, 2)}) for name in ("max", "mean", "min", "sum")],
    ("softmax", {"x": X, "axis": np.int32(1)}),
    ("softmax", {"x": X}),
    ("matmul", {"x": X, "y": np.swapaxes(Y, 1, 2).copy()}),
    ("matmul", {"x": X, "y": Y, "transpose_y": True}),
    ("matmul", {"x": X, "y": Y, "transpose_x": True}),
    ("linear", {"x": X, "weight": _q(5, 4), "bias": _q(5)}),
    ("linear", {"x": X, "weight": _q(5, 4)}),
]
ATTENTION = {"query": _q(2, 3, 5, 8), "key": _q(2, 3, 7, 8), "value": _q(2, 3, 7, 4)}


@pytest.mark.parametrize(("kind", "given"), CASES, ids=[f"{i}-{kind}" for i, (kind, _) in enumerate(CASES)])
def test_operations_agree_with_coremltools(kind: str, given: dict[str, Any]) -> None:
    """Integers, flags and moved values are equal; float32 arithmetic differs by the order of sums and by libraries."""
    expected = _inferred(kind, given)
    ours = OPERATIONS[kind](**given)
    assert ours.shape == expected.shape
    tolerance = {"rtol": 2e-6, "atol": 2e-6} if expected.dtype == np.float32 else {"rtol": 0}
    np.testing.assert_allclose(ours.astype(expected.dtype), expected, **tolerance)


def test_every_operation_is_compared_with_something() -> None:
    """With coremltools' value inference, or below with JAX, a formula, and coremltools' decompression."""
    below = {"conv", "batch_norm", "scaled_dot_product_attention"}
    below |= {f"constexpr_{name}" for name in ("blockwise_shift_scale", "lut_to_dense", "sparse_to_dense")}
    assert {kind for kind, _ in CASES} | below == set(OPERATIONS)
    assert not below & {kind for kind, _ in CASES}


def _inferred(kind: str, given: dict[str, Any]) -> np.ndarray:
    with mil.Function({}, opset_version=IOS18):
        return np.asarray(getattr(mb, kind)(**given).val)


def test_attention_agrees_with_coremltools_and_jax() -> None:
    seen = RNG.random((2, 1, 5, 7)) > 0.3
    added = _q(2, 1, 5, 7)
    ours = OPERATIONS["scaled_dot_product_attention"]
    np.testing.assert_allclose(ours(**ATTENTION), _inferred("scaled_dot_product_attention", ATTENTION), atol=2e-6)
    for mask in (seen, added):
        inferred = _inferred("scaled_dot_product_attention", {**ATTENTION, "attn_mask": mask})
        np.testing.assert_allclose(ours(**ATTENTION, attn_mask=mask), inferred, atol=2e-6)
        bias = jnp.where(seen, 0.0, -jnp.inf) if mask.dtype == np.bool_ else mask
        logits = ATTENTION["query"] @ ATTENTION["key"].swapaxes(-1, -2) / np.sqrt(8) + bias
        expected = jax.nn.softmax(logits) @ ATTENTION["value"]
        np.testing.assert_allclose(ours(**ATTENTION, attn_mask=mask), expected, atol=2e-6)


@pytest.mark.parametrize(
    ("space", "kernel", "given"),
    [
        ((7, 6), (3, 3), {"pad_type": "custom", "pad": i32(1, 1, 0, 2)}),
        ((7, 6), (3, 2), {"strides": i32(2, 1), "pad_type": "same"}),
        ((7, 6), (2, 2), {"strides": i32(1, 1), "pad_type": "same_lower"}),
        ((9, 8), (3, 3), {"dilations": i32(2, 1), "groups": np.int32(2)}),
        ((4, 5, 6), (3, 2, 1), {"strides": i32(1, 2, 1)}),
        ((6,), (3,), {}),
    ],
)
def test_convolution_agrees_with_jax(space: tuple[int, ...], kernel: tuple[int, ...], given: dict[str, Any]) -> None:
    groups = int(given.get("groups", 1))
    x, weight, bias = _q(2, 4, *space), _q(6, 4 // groups, *kernel), _q(6)
    rank = len(space)
    padding: Any = {"same": "SAME", "same_lower": "SAME_LOWER"}.get(given.get("pad_type", ""), [(0, 0)] * rank)
    if "pad" in given:
        padding = given["pad"].reshape(-1, 2).tolist()
    expected = np.asarray(
        jax.lax.conv_general_dilated(
            x,
            weight,
            tuple(given.get("strides", [1] * rank)),
            padding,
            rhs_dilation=tuple(given.get("dilations", [1] * rank)),
            feature_group_count=groups,
            precision="highest",
        )
    )
    ours = OPERATIONS["conv"](x=x, weight=weight, bias=bias, **given)
    np.testing.assert_allclose(ours, expected + bias.reshape(-1, *(1,) * rank), rtol=1e-5, atol=1e-5)


def test_batch_norm_is_its_formula() -> None:
    x, mean, gamma, beta = _q(2, 3, 4, 5), _q(3), _q(3), _q(3)
    variance = np.abs(_q(3)) + np.float32(0.5)
    given = {"mean": mean, "variance": variance, "gamma": gamma, "beta": beta, "epsilon": np.float32(1e-3)}
    by_channel = [value.reshape(3, 1, 1) for value in (mean, variance, gamma, beta)]
    expected = by_channel[2] * (x - by_channel[0]) / np.sqrt(by_channel[1] + 1e-3) + by_channel[3]
    np.testing.assert_allclose(OPERATIONS["batch_norm"](x=x, **given), expected, rtol=1e-5, atol=1e-6)


def test_slice_update_replaces_what_the_slice_reads() -> None:
    given = {"begin": i32(0, 1, 0), "end": i32(2, 3, 4), "stride": i32(1, 1, 2)}
    update = _q(2, 2, 2)
    changed = OPERATIONS["slice_update"](x=X, update=update, **given)
    expected = X.copy()
    expected[0:2, 1:3, 0:4:2] = update
    np.testing.assert_array_equal(changed, expected)
    np.testing.assert_array_equal(OPERATIONS["slice_by_index"](x=changed, **given), update)


# Whole programs, saved and read back.


def _saved(folder: Path, build: Callable[..., Any], precision: str = "float32", **shapes: tuple[int, ...]) -> Path:
    specs = [mb.TensorSpec(shape=shape, dtype=types.fp32) for shape in shapes.values()]

    program = mb.program(input_specs=specs, opset_version=IOS18)(build)
    chosen = ct.precision.FLOAT16 if precision == "float16" else ct.precision.FLOAT32
    model = ct.convert(
        program, source="milinternal", compute_precision=chosen, minimum_deployment_target=IOS18, skip_model_load=True
    )
    model.save(str(folder / "program.mlpackage"))
    return folder / "program.mlpackage"


def _run(path: Path, *arrays: np.ndarray) -> np.ndarray:
    program = mil_check.load(path)
    (out,) = program.run("main", dict(zip(program.inputs("main"), arrays, strict=True))).values()
    return out


def test_weights_are_read_back_from_the_package(tmp_path: Path) -> None:
    weight = _q(64, 32)
    path = _saved(tmp_path, lambda x: mb.matmul(x=x, y=weight), x=(3, 64))
    x = _q(3, 64)
    np.testing.assert_allclose(_run(path, x), x @ weight, rtol=1e-5, atol=1e-5)
    stored = path / "Data/com.apple.CoreML/weights/weight.bin"
    stored.write_bytes(stored.read_bytes().replace(weight[0].tobytes(), (2 * weight[0]).tobytes()))
    changed = weight.copy()
    changed[0] *= 2
    np.testing.assert_allclose(_run(path, x), x @ changed, rtol=1e-5, atol=1e-5)


def _square_of_next(x: Any) -> Any:
    following = mb.add(x=x, y=np.float32(1))
    return mb.mul(x=mb.mul(x=following, y=following), y=np.float32(1e-3))


def test_every_result_is_rounded_to_float16(tmp_path: Path) -> None:
    """The square of 300 is infinite in float16 whatever is done with it later; 2049 is not a float16."""
    path = _saved(tmp_path, lambda x: _square_of_next(x), "float16", x=(3,))
    out = _run(path, np.asarray([299, 2048, 0.5], np.float32))
    np.testing.assert_array_equal(np.isinf(out), [True, True, False])
    path = _saved(tmp_path, lambda x: mb.mul(x=mb.add(x=x, y=np.float32(1)), y=np.float32(0.5)), "float16", x=(1,))
    np.testing.assert_array_equal(_run(path, np.asarray([2048], np.float32)), [1024])


@pytest.mark.parametrize(("kind", "bits"), [("int8", 8), ("int4", 4), ("lut6", 6), ("lut4", 4), ("sparse", 16)])
def test_compressed_weights_decode_as_coremltools_decodes_them(tmp_path: Path, kind: str, bits: int) -> None:
    optimize = ct.optimize.coreml
    weight = _q(64, 96)
    path = _saved(tmp_path, lambda x: mb.matmul(x=x, y=weight), "float16", x=(64, 64))
    model = ct.models.MLModel(str(path), skip_model_load=True)
    if kind.startswith("int"):
        block = {"granularity": "per_block", "block_size": 32} if bits == 4 else {}
        config = optimize.OpLinearQuantizerConfig(mode="linear_symmetric", dtype=kind, weight_threshold=100, **block)
        model = optimize.linear_quantize_weights(model, optimize.OptimizationConfig(global_config=config))
    elif kind.startswith("lut"):
        grouped = {"granularity": "per_grouped_channel", "group_size": 32} if bits == 4 else {}
        config = optimize.OpPalettizerConfig(mode="uniform", nbits=bits, weight_threshold=100, **grouped)
        model = optimize.palettize_weights(model, optimize.OptimizationConfig(global_config=config))
    else:
        config = optimize.OpMagnitudePrunerConfig(target_sparsity=0.5, weight_threshold=100)
        model = optimize.prune_weights(model, optimize.OptimizationConfig(global_config=config))
    model.save(str(tmp_path / "small.mlpackage"))
    decoded = optimize.decompress_weights(model)
    decoded.save(str(tmp_path / "decoded.mlpackage"))

    counts = mil_check.load(tmp_path / "small.mlpackage").operation_counts("main")
    assert any(name.startswith("constexpr_") for name in counts)
    assert not any(
        name.startswith("constexpr_") for name in mil_check.load(tmp_path / "decoded.mlpackage").operation_counts("main")
    )
    ours, theirs = (_run(tmp_path / f"{name}.mlpackage", np.eye(64)) for name in ("small", "decoded"))
    np.testing.assert_array_equal(ours, theirs)  # a product with the identity is the weight itself
    assert 0 < np.linalg.norm(ours - weight) / np.linalg.norm(weight) < {8: 0.02, 6: 0.05, 4: 0.2, 16: 0.5}[bits]


@pytest.mark.parametrize("axis", [0, 1])
def test_tables_of_vectors_and_groups_decode_as_coremltools_decodes_them(axis: int) -> None:
    indices = RNG.integers(0, 4, (6, 8)).astype(np.uint8)
    table = _q(3, 2, 4, 2)
    with mil.Function({}, opset_version=IOS18):
        made = mb.constexpr_lut_to_dense(
            indices=indices.astype(types.nptype_from_builtin(types.string_to_builtin("uint2"))),
            lut=table,
            vector_axis=np.int32(axis),
        )
    expected = made.op.materialized_val_inference()
    np.testing.assert_array_equal(OPERATIONS["constexpr_lut_to_dense"](indices, table, np.int32(axis)), expected)


def test_loops_run(tmp_path: Path) -> None:
    """Powers of a matrix by a while loop whose body reads a weight and a value from outside."""

    def build(x: Any) -> Any:
        doubled = mb.mul(x=x, y=np.float32(2))
        _, total = mb.while_loop(
            _cond=lambda i, total: mb.less(x=i, y=3),
            _body=lambda i, total: (mb.add(x=i, y=1), mb.add(x=total, y=doubled)),
            loop_vars=(0, x),
        )
        return total

    path = _saved(tmp_path, build, x=(2, 2))
    np.testing.assert_allclose(_run(path, X[0, :2, :2]), 7 * X[0, :2, :2], rtol=1e-6)


def test_an_unknown_operation_is_named(tmp_path: Path) -> None:
    path = _saved(tmp_path, lambda x: mb.cumsum(x=x, axis=0), x=(3,))
    with pytest.raises(MilError, match=r"operation cumsum \(.*\) is not known"):
        _run(path, np.zeros(3))


def test_a_parameter_that_is_not_modelled_is_refused(tmp_path: Path) -> None:
    path = _saved(tmp_path, lambda x: mb.gelu(x=x, mode="EXACT"), x=(3,))
    with pytest.raises(MilError, match=r"operation gelu \(.*\) cannot be run: mode='EXACT'"):
        _run(path, np.zeros(3))


def test_wrong_inputs_are_named(tmp_path: Path) -> None:
    program = mil_check.load(_saved(tmp_path, lambda x: mb.abs(x=x), x=(3,)))
    (name,) = program.inputs("main")
    with pytest.raises(MilError, match=r"takes .*got other"):
        program.run("main", {"other": np.zeros(3)})
    with pytest.raises(MilError, match=r"has shape \(4,\); expected \(3,\)"):
        program.run("main", {name: np.zeros(4)})
    with pytest.raises(KeyError, match="has no function full; it has main"):
        program.run("full", {name: np.zeros(3)})
    with pytest.raises(FileNotFoundError):
        mil_check.load(tmp_path / "absent.mlpackage")
