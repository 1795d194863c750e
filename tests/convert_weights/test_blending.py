"""Means of checkpoints and adapters of low rank, made while a network is converted, against float64."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from convert_weights import convert
from convert_weights.blending import Scaled, Weighted, parse
from convert_weights.checkpoint import convert_checkpoint
from convert_weights.errors import SourceError
from convert_weights.opening import Options
from convert_weights.rules import ConversionError
from convert_weights.to_torch import to_torch
from convert_weights.verify import verify
from sora_jax.commands.convert import main
from sora_jax.shell import BAD_INPUT
from sora_jax.storage.checkpoint import load_network
from sora_jax.storage.directory import open_network
from tests.support import formats, sources

pytestmark = pytest.mark.usefixtures("small_slices")
Arrays = dict[str, np.ndarray]
QKV = "spatial_blocks.0.attn.qkv"


def _other(network: str, seed: int) -> Arrays:
    draw = np.random.default_rng(seed)
    arrays = sources.state_dict(network)
    return {n: a if n == "rope.freqs" else draw.standard_normal(a.shape, dtype=np.float32) for n, a in arrays.items()}


def _adapter(folder: Path, *, rank: int = 3, alpha: float = 6.0, module: str = QKV, **changes: Any) -> tuple[Path, np.ndarray]:
    """Writes an adapter as PEFT does; returns its folder and what it adds at scale 1, in float64."""
    out, into = sources.state_dict("stdit3")[f"{QKV}.weight"].shape
    draw = np.random.default_rng(4)
    a, b = draw.standard_normal((rank, into), dtype=np.float32), draw.standard_normal((out, rank), dtype=np.float32)
    folder.mkdir()
    names = {f"base_model.model.{module}.lora_A.weight": a, f"base_model.model.{module}.lora_B.weight": b}
    save_file({**names, **changes.pop("arrays", {})}, folder / "adapter_model.safetensors")
    fields = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "bias": "none", "target_modules": ["qkv"], **changes}
    (folder / "adapter_config.json").write_text(json.dumps(fields))
    return folder, b.astype(np.float64) @ a.astype(np.float64)


def test_a_weighted_mean_of_three_checkpoints(tmp_path: Path) -> None:
    states = [sources.state_dict("stdit3"), _other("stdit3", 1), formats.scaled_float8(sources.state_dict("t5"))]
    states[2] = sources.halved(_other("stdit3", 2), "bfloat16")
    paths = [sources.write_source(tmp_path / str(i), "stdit3", state) for i, state in enumerate(states)]
    options = Options(merged=(Weighted(paths[1], 0.25), Weighted(paths[2], 0.125)))
    manifest = convert_checkpoint("stdit3", paths[0], tmp_path / "model", options=options)
    mean = {
        name: sum(w * s[name].astype(np.float64) for w, s in zip((0.625, 0.25, 0.125), states, strict=True))
        for name in states[0]
        if name != "rope.freqs"
    }
    expected = convert(
        "stdit3",
        {**{n: m.astype(np.float32) for n, m in mean.items()}, "rope.freqs": states[0]["rope.freqs"]},
        sources.golden_config("stdit3"),
    )
    _, flat = load_network(tmp_path / "model", "stdit3")
    assert flat.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_allclose(flat[name], array, rtol=1e-6, atol=1e-6)
    assert [entry["weight"] for entry in manifest.origin["merged"]] == [0.25, 0.125]
    assert all(len(entry["files"][0]["sha256"]) == 64 for entry in manifest.origin["merged"])
    assert len(manifest.origin["files"]) == 1
    assert verify(tmp_path / "model", source=paths[0], options=options) == {"stdit3": []}
    assert verify(tmp_path / "model", source=paths[0])["stdit3"]  # the mean is not its first part
    back = load_file(to_torch(open_network(tmp_path / "model", "stdit3"), tmp_path / "back"))
    assert {array.dtype.name for array in back.values()} == {"float32"}


def test_eight_bit_checkpoints_are_merged_as_numbers(tmp_path: Path) -> None:
    packed = formats.scaled_float8(sources.state_dict("t5"))
    source = sources.write_source(tmp_path / "plain", "t5")
    other = formats.write_t5(tmp_path / "packed" / "x.safetensors", packed)
    convert_checkpoint("t5", source, tmp_path / "model", options=Options(merged=(Weighted(other, 0.5),)))
    _, flat = load_network(tmp_path / "model", "t5")
    name = "encoder.block.2.layer.0.SelfAttention.o.weight"
    expected = 0.5 * sources.state_dict("t5")[name] + 0.5 * formats.unscaled(packed)[name]
    np.testing.assert_allclose(flat["block.2.attn.o.kernel"], expected.T, rtol=1e-6)


@pytest.mark.parametrize(("scale", "root"), [pytest.param(1.0, False, marks=pytest.mark.slow), (-0.5, True)])
def test_an_adapter_is_added_in_float32(tmp_path: Path, scale: float, root: bool) -> None:
    arrays = {f"module.{name}": array for name, array in sources.state_dict("stdit3").items()}
    source = sources.write_source(tmp_path / "source", "stdit3", sources.halved(arrays, "bfloat16"))
    folder, product = _adapter(tmp_path / "adapter", use_rslora=root)
    options = Options(adapters=(Scaled(folder, scale),))
    manifest = convert_checkpoint("stdit3", source, tmp_path / "model", options=options)
    _, flat = load_network(tmp_path / "model", "stdit3")
    plain = sources.halved(sources.state_dict("stdit3"), "bfloat16")
    expected = plain[f"{QKV}.weight"].astype(np.float64) + scale * 6.0 / (np.sqrt(3) if root else 3) * product
    np.testing.assert_allclose(flat[f"{QKV}.kernel"], expected.T, rtol=1e-5, atol=1e-5)
    name = "temporal_blocks.0.attn.qkv"
    np.testing.assert_array_equal(flat[f"{name}.kernel"], plain[f"{name}.weight"].astype(np.float32).T)
    (recorded,) = manifest.origin["adapters"]
    assert (recorded["scale"], recorded["alpha"], recorded["rank"], recorded["matrices"]) == (scale, 6.0, 3, 1)
    assert recorded["files"][0]["name"] == "adapter_model.safetensors"
    assert verify(tmp_path / "model", source=source, options=options) == {"stdit3": []}


def test_an_adapter_finds_its_matrices_under_other_names(tmp_path: Path) -> None:
    """An adapter has transformers' names; the encoder to which it belongs may be a GGUF file."""
    pytest.importorskip("gguf")
    arrays = formats.t5_arrays(formats.BLOCKS)
    held = formats.write_gguf(tmp_path / "t5.gguf", formats.BLOCKS, arrays, "Q8_0")
    name = "encoder.block.0.layer.1.DenseReluDense.wo"
    a, b = np.ones((1, 256), np.float32), np.linspace(-1, 1, 256, dtype=np.float32)[:, None]
    save_file({f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}, tmp_path / "adapter.safetensors")
    options = Options(adapters=(Scaled(tmp_path / "adapter.safetensors", 2.0),))
    convert_checkpoint("t5", tmp_path / "t5.gguf", tmp_path / "model", options=options)
    _, flat = load_network(tmp_path / "model", "t5")
    np.testing.assert_allclose(flat["block.0.mlp.wo.kernel"], (held[f"{name}.weight"] + 2 * b @ a).T, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "report"),
    [
        ({"module": "spatial_blocks.9.attn.qkv"}, "spatial_blocks.9.attn.qkv: no matrix of this network"),
        ({"module": "spatial_blocks.0.attn.proj"}, "do not multiply to"),
        ({"module": "x_embedder.proj"}, "no matrix of this network"),
        ({"r": 5}, "rank 3; adapter_config.json says 5"),
        ({"arrays": {"strange": np.ones(2, np.float32)}}, "strange: no factor of an adapter"),
        ({"arrays": {f"{QKV}.lora_A.weight": np.ones((3, 2), np.float32)}}, "a second factor A of spatial_blocks.0.attn.qkv"),
        ({"arrays": {f"{QKV[:-3]}proj.lora_B.weight": np.ones((2, 2), np.float32)}}, "lora_A is missing"),
        ({"use_dora": True}, "use_dora True; only plain LoRA"),
        ({"rank_pattern": {"x": 4}}, "only plain LoRA"),
        ({"lora_alpha": None}, "lora_alpha None"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused(tmp_path: Path, changes: dict[str, Any], report: str) -> None:
    source = sources.write_source(tmp_path / "source", "stdit3")
    folder, _ = _adapter(tmp_path / "adapter", **changes)
    with pytest.raises((ConversionError, SourceError), match=report):
        convert_checkpoint("stdit3", source, tmp_path / "model", options=Options(adapters=(Scaled(folder, 1.0),)))
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize(
    ("merged", "report"),
    [
        (lambda folder: (Weighted(folder / "b", 1.0),), "merged with the weights 1; expected numbers above 0"),
        (lambda folder: (Weighted(folder / "b", 0.6), Weighted(folder / "c", 0.4)), "leave SOURCE a part of 1"),
        (lambda folder: (Weighted(folder / "a", 0.5),), "is named twice"),
        (lambda folder: (Weighted(folder / "c", 0.5),), r"c: .*final_layer.linear.bias: shape \[2\]"),
    ],
)
def test_a_mean_that_is_none_is_refused(tmp_path: Path, merged: Callable[[Path], Any], report: str) -> None:
    source = sources.write_source(tmp_path / "a", "stdit3")
    sources.write_source(tmp_path / "b", "stdit3", _other("stdit3", 1))
    sources.write_source(tmp_path / "c", "stdit3", {**_other("stdit3", 1), "final_layer.linear.bias": np.ones(2, np.float32)})
    with pytest.raises((ConversionError, SourceError), match=report):
        convert_checkpoint("stdit3", source, tmp_path / "model", options=Options(merged=merged(tmp_path)))
    assert not (tmp_path / "model").exists()


def test_the_command_merges_and_adds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = sources.write_source(tmp_path / "a", "stdit3")
    other = sources.write_source(tmp_path / "b", "stdit3", _other("stdit3", 1))
    folder, _ = _adapter(tmp_path / "adapter")
    extra = ["--merge", f"{other}:0.5", "--lora", f"{folder}:0.7"]
    assert main(["stdit3", str(source), str(tmp_path / "model"), "--quiet", *extra]) == 0
    assert main(["verify", str(tmp_path / "model"), "--source", str(source), *extra]) == 0
    assert main(["stdit3", str(source), str(tmp_path / "x"), "--merge", str(other)]) == BAD_INPUT
    assert "has no weight; expected SOURCE:WEIGHT" in capsys.readouterr().err


def test_weights_and_scales_are_read_from_behind_the_last_colon() -> None:
    assert parse("a:b:0.5", Weighted, None) == Weighted(Path("a:b"), 0.5)
    assert parse("a.safetensors", Scaled, 1.0) == Scaled(Path("a.safetensors"), 1.0)
    assert parse("a:-2", Scaled, 1.0) == Scaled(Path("a"), -2.0)
    with pytest.raises(ValueError, match="nan is no weight"):
        parse("a:nan", Scaled, 1.0)
