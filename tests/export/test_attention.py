"""Exported attention: chunked beyond a limit on its logits, in operations that converters have, and named in the manifest."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sora_jax.commands import main
from sora_jax.config import FLOAT32, DTypePolicy, open_sora_1_2
from sora_jax.export import onnx
from sora_jax.export.attention import LOGITS_LIMIT, attention_entry, export_forms
from sora_jax.export.exporter import export
from sora_jax.export.program import Stage
from sora_jax.export.size import Size
from sora_jax.export.stages import PARTS, list_stages
from sora_jax.export.targets import Options
from sora_jax.networks.attention import DENSE, Chunked
from tests.support.tiny_model import CONFIG, random_flat

SIZE = Size(num_frames=17, height=160, width=192)  # 120 tokens of a frame
LIMIT = 4 * 10 * 2 * 64 * 120  # rows, heads, 64 of 120 queries


def pair(limit: int, target: Any = "onnx", policy: DTypePolicy = FLOAT32) -> Stage:
    stages = list_stages(CONFIG, [SIZE], parts=("stdit3",), policy=policy, forms=export_forms(limit, target))
    return next(stage for stage in stages if stage.name == "stdit3_pair_00")


def drawn(stage: Stage, name: str) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    rng, flat = np.random.default_rng(0), random_flat("stdit3")
    params = {local: flat[full].astype(stage.program.abstract[local].dtype) for local, full in stage.parameters.items()}
    inputs = {
        given: np.ones(spec.shape, np.float32) if "mask" in given else rng.standard_normal(spec.shape, np.float32)
        for given, spec in stage.function(name).inputs.items()
    }
    return params, inputs


def text(limit: int, target: Any) -> str:
    stage = pair(limit, target)
    function = stage.function("full")
    return jax.jit(lambda p, x: function.call(p, **x)).lower(stage.program.abstract, function.inputs).as_text()


def test_a_chunk_is_a_loop_in_stablehlo_and_written_out_elsewhere() -> None:
    dense, looped, written = text(LOGITS_LIMIT, "onnx"), text(LIMIT, "stablehlo"), text(LIMIT, "coreml")
    plain = list_stages(CONFIG, [SIZE], parts=("stdit3",))
    stage = next(stage for stage in plain if stage.name == "stdit3_pair_00")
    function = stage.function("full")
    assert dense == jax.jit(lambda p, x: function.call(p, **x)).lower(stage.program.abstract, function.inputs).as_text()
    assert "while" in looped
    assert "while" not in written
    assert "10x2x120x120x" in dense
    assert "10x2x120x120x" not in written


@pytest.mark.parametrize("half_range", [False, True])
def test_blocks_written_out_have_the_bits_of_the_loop(half_range: bool) -> None:
    rng = np.random.default_rng(1)
    q, k, v = (jnp.asarray(rng.standard_normal((2, 2, 150, 8), np.float32)) for _ in range(3))
    mask = jnp.asarray(rng.random((2, 1, 1, 150)) < 0.7)
    bias = jnp.asarray(rng.standard_normal((1, 2, 150, 150), np.float32))
    given = {"scale": 0.3, "mask": mask, "bias": bias, "half_range": half_range}
    looped, written, whole = (
        jax.jit(lambda q, k, v, form=form: form(q, k, v, **given))(q, k, v)
        for form in (Chunked(64), Chunked(64, unrolled=True), DENSE)
    )
    np.testing.assert_array_equal(looped, written)
    np.testing.assert_array_equal(whole, written)


def test_onnx_computes_the_chunks(tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    stage = pair(LIMIT)
    params, inputs = drawn(stage, "merged")
    made = onnx.save(stage, params, tmp_path, Options(logits_limit=LIMIT))["merged"]
    call = jax.jit(pair(LOGITS_LIMIT).function("merged").call)
    expected = call(jax.tree.map(jnp.asarray, params), **jax.tree.map(jnp.asarray, inputs))["x_RTSD"]
    (found,) = onnxruntime.InferenceSession(str(tmp_path / made["file"])).run(None, inputs)
    error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
    assert error <= 1e-5


def test_the_manifest_names_the_limit_and_what_it_cuts() -> None:
    at_480p = Size(num_frames=51, height=480, width=848)
    small = attention_entry(open_sora_1_2, [Size(num_frames=51, height=256, width=256)], PARTS, LOGITS_LIMIT)
    assert small == {"logits_limit_bytes": LOGITS_LIMIT, "chunked": []}
    entry = attention_entry(open_sora_1_2, [at_480p], ("t5", "stdit3"), LOGITS_LIMIT)
    assert {(one["part"], one["attention"]) for one in entry["chunked"]} == {
        ("stdit3", "spatial"), ("stdit3", "spatial cross"), ("stdit3", "temporal cross"),
    }  # fmt: skip
    assert all(64 <= one["queries"] < 1590 and one["size"] == at_480p.key for one in entry["chunked"])


@pytest.mark.slow
@pytest.mark.artefacts
def test_an_export_with_a_limit_passes_its_checks(tiny_model: Path, tmp_path: Path) -> None:
    made = export(
        tiny_model, tmp_path / "out", target="stablehlo", height=160, width=192, stages=("stdit3",), logits_limit=LIMIT
    )
    assert made["attention"]["logits_limit_bytes"] == LIMIT
    assert {one["attention"] for one in made["attention"]["chunked"]} == {"spatial"}
    pair = next(stage for stage in made["stages"] if stage["name"] == "stdit3_pair_00")
    assert not pair["functions"][0]["artefact"]["symbolic"]  # chunks are of a number


@pytest.mark.parametrize("limit", ["auto", "much", "0"])
def test_a_limit_that_is_none_is_refused(tiny_model: Path, tmp_path: Path, capfd: Any, limit: str) -> None:
    command = ["export", str(tiny_model), str(tmp_path / "out"), "--target", "stablehlo", "--logits-limit", limit]
    assert main.main(command) == main.BAD_INPUT
    (line,) = capfd.readouterr().err.strip().splitlines()
    assert f"logits limit is '{limit}'; expected a size such as 500MB" in line
    assert not (tmp_path / "out").exists()
