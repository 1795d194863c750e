"""How large functions are said to be before they are written, and what does not fit."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import pytest

from sora_jax.commands import main
from sora_jax.export import footprint
from sora_jax.export.footprint import Footprint, traced_values
from sora_jax.export.program import Function, Program, Stage
from sora_jax.export.stages import list_stages
from sora_jax.export.targets import Options
from tests.support.exports import SMALL
from tests.support.tiny_model import CONFIG

pytest.importorskip("jsonschema", reason="manifests are validated with jsonschema (extra stablehlo, onnx or coreml)")

FITTING = Footprint(
    program="pair", stages=2, function="full", sizes=(), largest=8, shape=(2,), dimension=16384, weights=4, inputs=2, outputs=1
)


def shape_of(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


@pytest.fixture(scope="module")
def pair() -> Stage:
    return next(stage for stage in list_stages(CONFIG, [SMALL], parts=("stdit3",)) if stage.name == "stdit3_pair_00")


def test_only_what_depends_on_inputs_is_a_value_and_rows_are_flattened():
    """A table of weights is a constant; a product with weights flattens its rows, one of two activations does not."""

    def call(params, *, x):
        table = jnp.outer(params["w"][0], params["w"][0])  # 4 x 4, of weights alone
        hidden = jax.lax.map(lambda row: row @ params["w"], x)  # 3 rows of (5, 2) @ (2, 4), one at a time
        return {"y": hidden @ table, "products": jnp.einsum("bsd,btd->bst", hidden, hidden)}

    outputs = {"y": shape_of(3, 5, 4), "products": shape_of(3, 5, 5)}
    function = Function(name="f", variant="f", sizes=(), call=call, inputs={"x": shape_of(3, 5, 2)}, outputs=outputs)
    values = list(traced_values({"w": shape_of(2, 4)}, function))
    assert (4, 4) not in {value.shape for value in values}
    assert {(3, 5, 2), (3, 5, 4), (3, 5, 5), (5, 4)} <= {value.shape for value in values}
    assert sorted(value.rows for value in values if value.rows > 1) == [5, 15]  # in the map, and with the table
    program = Program(name="p", abstract={"w": shape_of(2, 4)}, functions=(function,), keep_float32=False)
    stage = Stage(name="p_00", program=program, network="stdit3", layers=(), parameters={})
    (found,) = footprint.measure([stage], Options(precision="float16"), "coreml")
    assert (found.largest, found.shape, found.dimension) == (2 * 75, (3, 5, 5), 15)
    assert (found.weights, found.inputs, found.outputs) == (2 * 8, 4 * 30, 4 * (60 + 75))
    assert found.memory == 150 + 16 + 120 + 540


def test_weights_are_counted_as_they_are_stored(pair):
    shapes = {name: spec.shape for name, spec in pair.program.abstract.items()}
    matrices = sum(math.prod(shape) for name, shape in shapes.items() if name.endswith("kernel"))
    outputs = sum(shape[1] for name, shape in shapes.items() if name.endswith("kernel"))
    others = sum(map(math.prod, shapes.values())) - matrices
    assert footprint.weight_bytes(pair, Options()) == 4 * (matrices + others)
    assert footprint.weight_bytes(pair, Options(weights="int8")) == matrices + 4 * (outputs + others)
    vae = dataclasses.replace(pair, network="vae")
    assert footprint.weight_bytes(vae, Options(weights="int8")) == footprint.weight_bytes(pair, Options())


def test_stages_of_one_program_are_measured_once(pair):
    found = footprint.measure([pair, dataclasses.replace(pair, name="stdit3_pair_01")], Options(), "onnx")
    assert [(one.function, one.stages) for one in found] == [("full", 2), ("merged", 2)]
    full, merged = found
    assert footprint.total_weights(found) == 2 * full.weights
    hidden = 4 * 2 * 2 * 2 * CONFIG.stdit3.mlp_ratio * CONFIG.stdit3.hidden_size  # R T S, float32
    assert full.largest >= hidden > merged.largest // 2


@pytest.mark.parametrize(
    ("change", "target", "limit", "message"),
    [
        ({}, "coreml", 15, None),
        ({"dimension": 16385}, "coreml", None, "a dimension of 16385, at most 16384 fit the Neural Engine"),
        ({"dimension": 16385}, "onnx", None, None),
        ({"weights": 2**32 + 1}, "coreai", None, "weights of 4.00 GiB, at most 4 GiB fit one allocation"),
        ({"largest": 2**33}, "coreai", None, "a value of 8.00 GiB, at most 4 GiB"),
        ({"largest": 9}, "stablehlo", 15, "a need of at least 0.02 kB of memory, the limit is 0.01 kB (1 more)"),
    ],
)
def test_what_exceeds_a_limit_is_refused(change, target, limit, message):
    found = [dataclasses.replace(FITTING, **change)] * (2 if message and "more" in message else 1)
    if message is None:
        footprint.refuse_oversize(found, target, limit)
        return
    with pytest.raises(ValueError, match=r"pair full has .*choose a smaller size, or pass --allow-oversize") as error:
        footprint.refuse_oversize(found, target, limit)
    assert message in str(error.value)


def test_a_rehearsal_prints_every_function_and_writes_nothing(tiny_model, tmp_path, capsys):
    command = ["export", str(tiny_model), str(tmp_path / "out"), "--target", "stablehlo", "--stages", "t5", "--dry-run"]
    assert main.main(command) == main.OK
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    assert [line.split("  ")[0] for line in lines[1:-1]] == ["t5_embed main", "t5_block main", "t5_final main"]
    assert "out would hold 3 stages, about" in printed.err
    assert main.main([*command, "--memory-limit", "1kB", "--allow-oversize"]) == main.OK
    assert "OVERSIZE: a need of at least" in capsys.readouterr().out
    for arguments in (command, command[:-1]):  # the export itself refuses too, before it writes
        assert main.main([*arguments, "--quiet", "--memory-limit", "1kB"]) == main.BAD_INPUT
        assert "t5_embed main has a need of at least" in capsys.readouterr().err
    assert main.main([*command, "--quiet", "--memory-limit", "much"]) == main.BAD_INPUT
    assert "memory limit is 'much'; expected a size such as 500MB" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
