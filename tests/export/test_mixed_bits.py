"""Widths of matrices: by the error they make, within the bytes, and found again in what a converter hands over."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sora_jax.commands import main
from sora_jax.export import check, mixed_bits
from sora_jax.export.mixed_bits import WIDTHS, ByContent, allocate, choose_widths, table_bytes, table_rounded
from sora_jax.export.targets import Options
from tests.support.exports import export_tiny

SHAPES = {"a": (64, 64), "b": (64, 256), "c": (256, 64), "d": (64, 64)}
SIZES = {name: {width: table_bytes(shape, width) for width in WIDTHS} for name, shape in SHAPES.items()}


def spent(widths: dict[str, int]) -> float:
    return sum(SIZES[name][width] for name, width in widths.items())


def drawn(seed: int) -> dict[str, dict[int, float]]:
    """Returns errors of matrices that matter differently, six decibels a bit each."""
    weights = np.random.default_rng(seed).lognormal(0, 2, len(SHAPES))
    return {
        name: {width: float(weight) * 4.0**-width for width in WIDTHS} for name, weight in zip(SHAPES, weights, strict=True)
    }


@pytest.mark.parametrize("seed", range(4))
def test_widths_fit_and_are_nearly_the_best_there_are(seed):
    """Against all 256 choices: at most one step of one matrix away, for less bytes than there are."""
    costs = drawn(seed)
    for mean in (3.5, 4.5, 5.5, 7.0):
        budget = mean / 8 * sum(np.prod(shape) for shape in SHAPES.values())
        widths = allocate(costs, SIZES, budget)
        assert spent(widths) <= budget
        every = [dict(zip(SHAPES, choice, strict=True)) for choice in itertools.product(WIDTHS, repeat=len(SHAPES))]
        cost = [sum(costs[name][width] for name, width in one.items()) for one in every if spent(one) <= budget]
        found = sum(costs[name][width] for name, width in widths.items())
        uniform = [width for width in WIDTHS if spent(dict.fromkeys(SHAPES, width)) <= budget]
        assert min(cost) <= found <= 4 * min(cost)
        assert found <= sum(costs[name][max(uniform)] for name in SHAPES)


def test_the_least_widths_where_nothing_more_fits():
    assert allocate(drawn(0), SIZES, 0.0) == dict.fromkeys(SHAPES, min(WIDTHS))
    assert allocate(drawn(0), SIZES, 1e9) == dict.fromkeys(SHAPES, max(WIDTHS))


def test_a_matrix_that_is_heard_more_has_more_bits():
    rng = np.random.default_rng(0)
    params = {f"{name}.kernel": rng.standard_normal((64, 64)).astype(np.float32) for name in ("loud", "soft")}
    params["loud.bias"] = np.zeros(64, np.float32)
    x = rng.standard_normal((8, 64)).astype(np.float32)

    def call(given: Any, inputs: Any) -> dict[str, np.ndarray]:
        return {"x": inputs["x"] + 10 * inputs["x"] @ given["loud.kernel"] + 0.1 * inputs["x"] @ given["soft.kernel"]}

    cases: Any = {"captured": ({"x": x}, call(params, {"x": x}))}
    widths = choose_widths(params, 5.6, cases, call)
    assert set(widths) == {"loud.kernel", "soft.kernel"}
    assert widths["loud.kernel"] > widths["soft.kernel"]
    assert mixed_bits.error(cases, params, call) == 0.0


def test_tables_have_their_number_of_values_and_six_decibels_a_bit():
    matrix = np.random.default_rng(0).standard_normal((128, 128)).astype(np.float32)
    errors = []
    for width in WIDTHS:
        rounded = table_rounded(matrix, width)
        assert len(np.unique(rounded)) <= 2**width
        errors.append(check.difference(matrix.astype(np.float64), rounded)[0])
    assert np.all(np.diff(errors) >= 5.0 * np.diff(WIDTHS))


def test_a_matrix_is_known_again_transposed_and_in_float16():
    rng = np.random.default_rng(0)
    params = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()}
    known = ByContent(params, {"a": 3, "b": 4, "c": 6, "d": 8})
    for name, width in (("a", 3), ("b", 4), ("c", 6), ("d", 8)):
        assert known.width(params[name].T.astype(np.float16)) == width
        assert len(known.table(params[name].astype(np.float16))[0]) == 2**width
    assert known.width(np.full((64, 64), 9.0, np.float32)) == max(WIDTHS)  # no matrix of the stage


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": "mixed"}, "weights mixed and mean bits go together"),
        ({"mean_bits": 5.0}, "weights mixed and mean bits go together"),
        ({"weights": "mixed", "mean_bits": 3.0}, "mean bits are 3.0; expected a number above 3, at most 8"),
    ],
)
def test_mean_bits_and_mixed_belong_together(options, message):
    with pytest.raises(ValueError, match=message):
        Options(**options)


def test_other_targets_have_no_mixed_weights(tiny_model, tmp_path, capsys):
    command = ["export", str(tiny_model), str(tmp_path / "out"), "--target", "stablehlo"]
    assert main.main([*command, "--weights", "mixed", "--mean-bits", "5"]) == main.BAD_INPUT
    assert "target stablehlo has no weights 'mixed'; it has float, int8." in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.artefacts
def test_core_ml_stores_the_widths(tiny_model, tmp_path, in_process):
    """The manifest's widths are those of the package's tables, in both functions, and the mean is kept."""
    pytest.importorskip("stablehlo_coreml", reason="the coreml extra is not installed")
    from sora_jax.export.mil_package import Package

    options: Any = {"precision": "float16", "stages": ("stdit3",)}
    made = export_tiny(tiny_model, tmp_path / "out", "coreml", weights="mixed", mean_bits=6.0, **options)
    assert made["weights"]["mean_bits"] == 6.0
    pair = next(stage for stage in made["stages"] if stage["name"] == "stdit3_pair_00")
    assert set(pair["bits"].values()) <= set(WIDTHS)
    package = Package(Path(tmp_path / "out" / "stdit3_pair_00.mlpackage"))
    for function in ("full", "merged"):
        tables = [one for one in package.block(function).operations if one.type == "constexpr_lut_to_dense"]
        assert len(tables) == len(pair["bits"])
