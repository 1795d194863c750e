"""The weights that people have on disk: every format becomes the numbers that it stands for, bit for bit, or is refused."""

import dataclasses
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from convert_weights import convert, encodings, second_reader
from convert_weights.checkpoint import Options, convert_checkpoint, open_source
from convert_weights.errors import SourceError
from convert_weights.rules import ConversionError
from convert_weights.to_torch import to_torch
from convert_weights.verify import verify
from sora_jax.config import open_sora_1_2, stdit3_3b
from sora_jax.storage.checkpoint import load_network
from sora_jax.storage.directory import open_network
from tests.support import formats, sources

pytestmark = pytest.mark.usefixtures("small_slices")
Arrays = dict[str, np.ndarray]


@pytest.fixture
def no_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Verification starts no PyTorch, which takes seconds and is another test's subject."""
    monkeypatch.setattr(second_reader.importlib.util, "find_spec", lambda *_: None)


def _plain(arrays: Arrays) -> Arrays:
    return arrays


def _without_prefix(arrays: Arrays) -> Arrays:
    bare = {name.removeprefix("encoder."): array for name, array in arrays.items()}
    bare["embed_tokens.weight"] = bare.pop("shared.weight")
    return bare


def _tied(arrays: Arrays) -> Arrays:
    return {**arrays, "encoder.embed_tokens.weight": arrays["shared.weight"].copy()}


def _whole(arrays: Arrays) -> Arrays:
    return {
        **arrays,
        "decoder.block.0.layer.0.SelfAttention.q.weight": arrays["shared.weight"],
        "lm_head.weight": np.ones((2, 2)),
    }


EIGHT_BITS = [(formats.float8, _plain), (formats.scaled_float8, _without_prefix)]
MORE = [
    (formats.float8, _without_prefix),
    (formats.float8, _tied),
    (formats.scaled_float8, _plain),
    (formats.scaled_float8, _whole),
]


@pytest.mark.parametrize(("packed", "names"), [*EIGHT_BITS, *(pytest.param(*pair, marks=pytest.mark.slow) for pair in MORE)])
@pytest.mark.usefixtures("no_torch")
def test_eight_bit_floats_are_multiplied_out(
    tmp_path: Path, packed: Callable[[Arrays], Arrays], names: Callable[[Arrays], Arrays]
) -> None:
    arrays = names(packed(sources.state_dict("t5")))
    source = formats.write_t5(tmp_path / "source" / "t5xxl.safetensors", arrays)
    manifest = convert_checkpoint("t5", source, tmp_path / "model")
    expected = formats.unscaled(packed(sources.state_dict("t5")))
    sources.expect_converted(tmp_path / "model", "t5", expected)
    recorded = manifest.parameters["block.0.attn.q.kernel"].source
    assert recorded is not None
    assert recorded["dtype"] == "float8_e4m3fn"
    assert ("scale" in recorded) == (packed is formats.scaled_float8)
    assert verify(tmp_path / "model", source=source) == {"t5": []}


def test_the_newer_spelling_of_scales_and_int8_from_them(tmp_path: Path) -> None:
    arrays = formats.scaled_float8(sources.state_dict("t5"), "weight_scale")
    source = formats.write_t5(tmp_path / "source" / "t5xxl.safetensors", arrays)
    manifest = convert_checkpoint("t5", source, tmp_path / "model", dtype="int8")
    plain = formats.write_t5(tmp_path / "plain" / "t5xxl.safetensors", formats.unscaled(arrays))
    other = convert_checkpoint("t5", plain, tmp_path / "other", dtype="int8")
    assert {n: p.checksums for n, p in manifest.parameters.items()} == {n: p.checksums for n, p in other.parameters.items()}


@pytest.mark.slow
@pytest.mark.torch
def test_eight_bit_floats_are_those_of_torch(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    every = np.arange(256, dtype=np.uint8)
    for name in encodings.FLOAT8:
        encoding = encodings.encoding_of(name)
        assert encoding is not None
        expected = torch.from_numpy(every).view(getattr(torch, name)).float().numpy()
        np.testing.assert_array_equal(encoding.decode(every[None])[0], expected)
    arrays = formats.scaled_float8(sources.state_dict("t5"))
    source = formats.write_t5(tmp_path / "source" / "t5xxl.safetensors", arrays)
    convert_checkpoint("t5", source, tmp_path / "model")
    _, flat = load_network(tmp_path / "model", "t5")
    from safetensors.torch import load_file as load_torch

    theirs = load_torch(source)
    name = "encoder.block.1.layer.1.DenseReluDense.wo"
    product = theirs[name + ".weight"].float() * theirs[name + ".scale_weight"]
    np.testing.assert_array_equal(flat["block.1.mlp.wo.kernel"], product.T.numpy())
    notes: list[str] = []
    assert verify(tmp_path / "model", source=source, note=notes.append) == {"t5": []}
    assert notes == ["t5xxl.safetensors: read again by PyTorch"]


@pytest.mark.parametrize(
    ("change", "report"),
    [
        (lambda a: a.pop("encoder.block.1.layer.0.SelfAttention.k.scale_weight"), r"SelfAttention.k.weight: has no scale"),
        (
            lambda a: a.update({"encoder.block.1.layer.0.SelfAttention.k.scale_weight": np.ones(48, np.float32)}),
            r"SelfAttention.k.scale_weight: unknown array \[48\]",
        ),
        (
            lambda a: a.update({"encoder.block.9.layer.0.SelfAttention.k.scale_weight": np.float32(1)[None]}),
            "block.9.layer.0.SelfAttention.k.scale_weight: unknown array",
        ),
        (
            lambda a: a.update({"encoder.block.1.layer.0.SelfAttention.k.scale_weight": np.array(np.nan, np.float32)}),
            "SelfAttention.k.weight: 3072 of 3072 values are NaN",
        ),
    ],
)
def test_a_scale_that_does_not_fit_is_a_fault(tmp_path: Path, change: Callable[[Arrays], Any], report: str) -> None:
    arrays = formats.scaled_float8(sources.state_dict("t5"))
    change(arrays)
    source = formats.write_t5(tmp_path / "source" / "t5xxl.safetensors", arrays)
    with pytest.raises(ConversionError, match=report):
        convert_checkpoint("t5", source, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_eight_bit_floats_go_back_as_they_were(tmp_path: Path) -> None:
    arrays = formats.float8(sources.state_dict("t5"))
    source = formats.write_t5(tmp_path / "source" / "t5xxl.safetensors", arrays)
    back = formats.load(to_torch(convert_checkpoint("t5", source, tmp_path / "model"), tmp_path / "back"))
    assert {name: (array.dtype, sources.bits(array)) for name, array in back.items()} == {
        name: (array.dtype, sources.bits(array)) for name, array in arrays.items()
    }
    scaled = formats.write_t5(tmp_path / "scaled" / "x.safetensors", formats.scaled_float8(sources.state_dict("t5")))
    back = formats.load(to_torch(convert_checkpoint("t5", scaled, tmp_path / "other"), tmp_path / "back2"))
    name = "encoder.block.0.layer.0.SelfAttention.q.weight"
    assert (back[name].dtype, back["shared.weight"].dtype) == (np.float32, ml_dtypes.bfloat16)


def _gguf(tmp_path: Path, kind: str, **options: Any) -> tuple[Path, Arrays]:
    source = tmp_path / "gguf" / f"t5-{kind}.gguf"
    return source, formats.write_gguf(source, formats.BLOCKS, formats.t5_arrays(formats.BLOCKS), kind, **options)


GGUF: list[Any] = [("BF16", "bfloat16"), ("Q8_0", "Q8_0"), ("Q4_K", "Q4_K")]
FURTHER = [("F32", "float32"), ("F16", "float16"), *((kind, kind) for kind in ("Q4_0", "Q5_1", "Q6_K", "IQ4_XS"))]


@pytest.mark.parametrize(("kind", "recorded"), [*GGUF, *(pytest.param(*pair, marks=pytest.mark.slow) for pair in FURTHER)])
def test_gguf_is_decoded_once(tmp_path: Path, kind: str, recorded: str) -> None:
    pytest.importorskip("gguf")
    pack = formats.random_blocks if kind.endswith(("K", "XS")) else None
    source, held = _gguf(tmp_path, kind, pack=pack)
    manifest = convert_checkpoint("t5", source, tmp_path / "model")
    assert manifest.config == formats.BLOCKS
    _, flat = load_network(tmp_path / "model", "t5")
    expected = convert("t5", held, formats.BLOCKS)
    assert flat.keys() == expected.keys()
    assert all(sources.bits(flat[name]) == sources.bits(array) for name, array in expected.items())
    entry = manifest.parameters["block.0.mlp.wi_1.kernel"].source
    assert entry is not None
    assert (entry["name"], entry["dtype"]) == ("enc.blk.0.ffn_up.weight", recorded)
    notes: list[str] = []
    assert verify(tmp_path / "model", source=source, note=notes.append) == {"t5": []}
    assert notes == [f"t5-{kind}.gguf: read again by gguf"]
    back = load_file(to_torch(manifest, tmp_path / "back"))
    assert back.keys() == held.keys()
    again = convert_checkpoint("t5", tmp_path / "back", tmp_path / "again", options=Options(allow_mixed_dtypes=True))
    assert {n: p.checksums for n, p in again.parameters.items()} == {n: p.checksums for n, p in manifest.parameters.items()}


def test_q8_0_is_its_definition() -> None:
    """Blocks of 32: a float16 scale, then as many signed bytes."""
    pytest.importorskip("gguf")
    draw = np.random.default_rng(3)
    scales, codes = draw.standard_normal((4, 2)).astype(np.float16), draw.integers(-128, 128, (4, 2, 32), dtype=np.int8)
    raw = np.concatenate([scales[..., None].view(np.uint8), codes.view(np.uint8)], -1).reshape(4, 2 * 34)
    encoding = encodings.encoding_of("Q8_0")
    assert encoding is not None
    expected = (scales[..., None].astype(np.float32) * codes).reshape(4, 64)
    np.testing.assert_array_equal(encoding.decode(raw), expected)


def _patched(offset: int, value: bytes) -> Callable[[bytes], bytes]:
    return lambda content: content[:offset] + value + content[offset + len(value) :]


@pytest.mark.parametrize(
    ("change", "report"),
    [
        (_patched(0, b"GGUX"), "is no GGUF file"),
        (_patched(4, struct.pack("<I", 1)), "has GGUF version 1; versions 2 and 3"),
        (_patched(4, struct.pack(">I", 3)), "has GGUF version 50331648"),
        (_patched(8, struct.pack("<Q", 1 << 60)), "more than a model has"),
        (_patched(16, struct.pack("<Q", 4000)), "its GGUF header is malformed|is truncated"),
        (lambda content: content[:500], "is truncated"),
        (lambda content: content[:-100], "is truncated or has been appended to"),
        (lambda content: content + bytes(100), "is truncated or has been appended to"),
        (lambda content: content.replace(b"t5encoder", b"t5decoder"), "is a GGUF file of 't5decoder': 1 fault"),
        (lambda content: content.replace(b"enc.blk.0.ffn_up", b"enc.blk.0.ffn_uq"), r"block.0.mlp.wi_1.kernel: missing"),
        (lambda content: content.replace(b"enc.blk.0.ffn_up", b"enc.blk.0.attn_q"), "malformed|occurs twice|truncated"),
    ],
)
def test_a_gguf_header_that_cannot_be_true(tmp_path: Path, change: Callable[[bytes], bytes], report: str) -> None:
    pytest.importorskip("gguf")
    source, _ = _gguf(tmp_path, "Q8_0")
    source.write_bytes(change(source.read_bytes()))
    with pytest.raises((SourceError, ConversionError), match=report):
        convert_checkpoint("t5", source, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_gguf_without_its_package_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gguf")
    source, _ = _gguf(tmp_path, "Q8_0")
    monkeypatch.setattr(encodings, "has_gguf", lambda: False)
    with pytest.raises(SourceError, match=r"install it with: pip install 'sora_jax\[gguf\]'"):
        convert_checkpoint("t5", source, tmp_path / "model")


def test_a_tokenizer_from_elsewhere(tmp_path: Path) -> None:
    source = formats.write_t5(tmp_path / "source" / "t5xxl.safetensors", sources.state_dict("t5"))
    tokenizer = tmp_path / "tokenizer.json"
    tokenizer.write_text("{}")
    options = Options(tokenizer=tokenizer)
    convert_checkpoint("t5", source, tmp_path / "model", options=options)
    assert (tmp_path / "model" / "tokenizer.json").read_text() == "{}"
    assert verify(tmp_path / "model", source=source, options=options) == {"t5": []}
    with pytest.raises(SourceError, match="a tokenizer belongs to t5, not to stdit3"):
        convert_checkpoint("stdit3", sources.write_source(tmp_path / "s", "stdit3"), tmp_path / "x", options=options)
    with pytest.raises(SourceError, match=r"source is no tokenizer|holds no tokenizer"):
        convert_checkpoint("t5", source, tmp_path / "x", options=Options(tokenizer=source.parent))


def test_the_vae_under_its_original_names(tmp_path: Path) -> None:
    arrays = sources.state_dict("vae")
    levels = len(sources.golden_config("vae").spatial.block_out_channels)
    temporal = {name: array for name, array in arrays.items() if not name.startswith("spatial_vae.")}
    source = sources.write_source(tmp_path / "vae", "vae", temporal)
    targets = []
    for prefix in ("", "first_stage_model."):
        spatial = formats.original_names(arrays, levels, prefix)
        if prefix:
            spatial |= {f"{part}.weight": np.zeros((1, 10**3)) for part in ("model.diffusion_model.out", "conditioner.x")}
        options = Options(spatial=tmp_path / f"{prefix}vae.safetensors")
        save_file(spatial, tmp_path / f"{prefix}vae.safetensors")
        plan = open_source("vae", source, options).plan
        assert plan.faults == ()
        assert set(plan.ignored) == {f"spatial_vae.module.{name}" for name in spatial if name.startswith(("model.", "cond"))}
        targets.append({a.source.replace("first_stage_model.", ""): a.target for a in plan.assignments})
    assert targets[0] == targets[1]
    manifest = convert_checkpoint("vae", source, tmp_path / "model", options=options)
    sources.expect_converted(tmp_path / "model", "vae")
    back = load_file(to_torch(manifest, tmp_path / "back"))
    assert len(back) == len(arrays)
    assert open_source("vae", tmp_path / "back").plan.faults == ()


def test_a_training_checkpoint_with_averages_and_the_optimiser(tmp_path: Path) -> None:
    arrays = sources.state_dict("stdit3")
    zeros = {name: array if name == "rope.freqs" else np.zeros_like(array) for name, array in arrays.items()}
    states = {i: {"step": np.float32(3)[None], "exp_avg": array} for i, array in enumerate(zeros.values())}
    groups = [{"lr": 1e-4, "betas": (0.9, 0.999), "amsgrad": False, "params": list(range(len(zeros)))}]
    tree = {"model": zeros, "ema": arrays, "optimizer": {"state": states, "param_groups": groups}, "epoch": 4}
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "config.json").write_text(json.dumps(sources.upstream_config("stdit3")))
    source = sources.write_torch_file(tmp_path / "source" / "step.pt", tree)
    convert_checkpoint("stdit3", source, tmp_path / "model")
    sources.expect_converted(tmp_path / "model", "stdit3")
    convert_checkpoint("stdit3", source, tmp_path / "other", options=Options(section="model"))
    _, flat = load_network(tmp_path / "other", "stdit3")
    assert not any(flat[name].any() for name in flat if name.endswith("kernel"))


def test_shards_as_colossalai_writes_them(tmp_path: Path) -> None:
    """A folder of a training step: ``model`` with numbered shards and an index, next to the optimiser's and the averages."""
    folder = tmp_path / "epoch0-global_step100"
    (folder / "model").mkdir(parents=True)
    (folder / "optimizer").mkdir()
    (folder / "running_states.json").write_text("{}")
    (folder / "model" / "config.json").write_text(json.dumps(sources.upstream_config("stdit3")))
    arrays, weight_map = sources.state_dict("stdit3"), {}
    for shard in (1, 2):
        name = f"pytorch_model-{shard:05d}.bin"
        part = {key: arrays[key] for key in sorted(arrays)[shard - 1 :: 2]}
        sources.write_torch_file(folder / "model" / name, part)
        weight_map.update(dict.fromkeys(part, name))
    (folder / "model" / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    convert_checkpoint("stdit3", folder, tmp_path / "model")
    sources.expect_converted(tmp_path / "model", "stdit3")


def test_without_a_configuration_the_width_chooses_between_the_released_ones(tmp_path: Path) -> None:
    for config in (open_sora_1_2.stdit3, stdit3_3b):
        folder = tmp_path / str(config.hidden_size)
        folder.mkdir()
        save_file({"module.x_embedder.proj.bias": np.zeros(config.hidden_size, np.float32)}, folder / "model.safetensors")
        opened = open_source("stdit3", folder)
        assert opened.resolved.config == config
        assert opened.plan.faults  # nothing else is there
    assert dataclasses.replace(stdit3_3b, hidden_size=1152, num_heads=16) == open_sora_1_2.stdit3
    assert stdit3_3b.head_size == 72


def test_the_manifest_says_what_the_source_was(tmp_path: Path) -> None:
    source = sources.write_source(tmp_path / "source", "t5")
    convert_checkpoint("t5", source, tmp_path / "model")
    assert open_network(tmp_path / "model", "t5").origin["format"] == "safetensors"
