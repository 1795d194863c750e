"""Checkpoint files into a model directory: every layout of the published files, bit for bit, and the command's manners."""

import contextlib
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import convert_weights.stream
from convert_weights import convert
from convert_weights.__main__ import main
from convert_weights.files import Options, convert_checkpoint
from convert_weights.pipeline import convert_pipeline
from convert_weights.readers import OpenFile
from convert_weights.rules import ConversionError
from convert_weights.source_config import resolve, to_upstream
from convert_weights.torch_zip import SourceError
from convert_weights.verify import verify
from sora_jax.checkpoint import load_network, save_network
from sora_jax.model_directory import open_network, read_array, read_model_file
from sora_jax.network_writer import NetworkWriter
from sora_jax.quantisation import quantise
from tests import sources


@pytest.fixture(autouse=True)
def small_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several slices for most matrices, as at full size."""
    monkeypatch.setattr(convert_weights.stream, "_SLICE_BYTES", 16384)


def _expect(directory: Path, network: str, arrays: dict[str, np.ndarray] | None = None, dtype: str = "float32") -> None:
    """Checks a converted network against the in-memory engine, bit for bit."""
    config = sources.golden_config(network)
    expected = convert(network, arrays or sources.state_dict(network), config, dtype=dtype, allow_mixed_dtypes=True)
    loaded_config, loaded = load_network(directory, network)
    assert loaded_config == config
    assert loaded.keys() == expected.keys()
    for name, array in expected.items():
        assert loaded[name].dtype == array.dtype
        assert sources.bits(loaded[name]) == sources.bits(array), name


@pytest.mark.parametrize("network", sources.NETWORKS)
def test_a_folder_as_published(tmp_path: Path, network: str) -> None:
    source = sources.write_source(tmp_path / "source", network)
    convert_checkpoint(network, source, tmp_path / "model")
    _expect(tmp_path / "model", network)
    assert verify(tmp_path / "model", source=source) == {network: []}
    assert not [path for path in (tmp_path / "model").iterdir() if path.name.startswith(".")]


def _safetensors_shards(folder: Path) -> Path:
    return sources.write_shards(folder, "t5", shards=3)


def _torch_shards(folder: Path) -> Path:
    return sources.write_shards(folder, "t5", shards=2, suffix=".bin")


def _index_file(folder: Path) -> Path:
    return sources.write_shards(folder, "t5", shards=2) / "model.safetensors.index.json"


def _ema(folder: Path) -> Path:
    arrays = {f"module.{name}": array for name, array in sources.state_dict("t5").items()}
    zeros = {name: np.zeros_like(array) for name, array in arrays.items()}
    source = sources.write_source(folder, "t5")
    (source / "model.safetensors").unlink()
    return sources.write_torch_file(source / "ema.pt", {"ema": arrays, "model": zeros, "step": 7})


def _colossal(folder: Path) -> Path:
    source = sources.write_shards(folder / "model", "t5", shards=2, suffix=".bin")
    return source.parent


def _tied_storage(folder: Path) -> Path:
    arrays = sources.state_dict("t5")
    arrays["encoder.embed_tokens.weight"] = arrays["shared.weight"]
    arrays["encoder.final_layer_norm.weight"] = np.repeat(arrays["encoder.final_layer_norm.weight"], 2)[::2]
    source = sources.write_source(folder, "t5")
    (source / "model.safetensors").unlink()
    sources.write_torch_file(source / "pytorch_model.bin", arrays)
    return source


def _untied(folder: Path) -> Path:
    arrays = sources.state_dict("t5")
    del arrays["shared.weight"]
    return sources.write_source(folder, "t5", arrays)


def _whole_t5(folder: Path) -> Path:
    arrays = sources.state_dict("t5")
    arrays["lm_head.weight"] = np.full((2, 2), np.nan, np.float32)
    arrays["decoder.block.0.layer.0.SelfAttention.q.weight"] = np.zeros((3, 3), np.int64)
    return sources.write_source(folder, "t5", arrays)


LAYOUTS = [_safetensors_shards, _torch_shards, _index_file, _ema, _colossal, _tied_storage, _untied, _whole_t5]


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__.strip("_"))
def test_other_layouts_of_the_same_weights(tmp_path: Path, layout: Callable[[Path], Path]) -> None:
    source = layout(tmp_path / "source")
    convert_checkpoint("t5", source, tmp_path / "model")
    _expect(tmp_path / "model", "t5")
    assert verify(tmp_path / "model", source=source) == {"t5": []}


@pytest.mark.parametrize("network", ["t5", "stdit3"])
@pytest.mark.parametrize("source_dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_source_dtype_to_every_stored_dtype(tmp_path: Path, network: str, source_dtype: str, dtype: str) -> None:
    arrays = sources.halved(sources.state_dict(network), source_dtype)
    source = sources.write_source(tmp_path / "source", network, arrays)
    convert_checkpoint(network, source, tmp_path / "model", dtype=dtype)
    _expect(tmp_path / "model", network, arrays, dtype)
    assert verify(tmp_path / "model", source=source) == {network: []}


@pytest.mark.parametrize("network", ["t5", "stdit3"])
def test_int8_is_that_of_the_quantiser_bit_for_bit(tmp_path: Path, network: str) -> None:
    source = sources.write_source(tmp_path / "source", network)
    manifest = convert_checkpoint(network, source, tmp_path / "model", dtype="int8")
    flat = convert(network, sources.state_dict(network), sources.golden_config(network))
    quantised = [name for name, entry in manifest.parameters.items() if entry.dtype == "int8"]
    for name in quantised:
        values, scale = quantise(name, flat[name])
        assert sources.bits(read_array(manifest, name)) == sources.bits(values)
        assert sources.bits(read_array(manifest, name + "_scale")) == sources.bits(scale)
    for name in flat.keys() - set(quantised):
        assert sources.bits(read_array(manifest, name)) == sources.bits(flat[name])
    assert all(name.endswith(("kernel", "embedding")) for name in quantised)
    assert not any("norm" in name or "table" in name or "bias" in name or "x_embedder" in name for name in quantised)
    assert verify(tmp_path / "model", source=source) == {network: []}


def test_the_vae_in_its_old_spelling_and_from_two_folders(tmp_path: Path) -> None:
    arrays = sources.state_dict("vae")
    spellings = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    old = {}
    for name, array in arrays.items():
        for new, spelling in spellings.items():
            if f"attentions.0.{new}." in name:
                name = name.replace(new, spelling)
                array = array.reshape(*array.shape, 1, 1) if name.endswith("weight") else array
        old[name] = array
    prefix = "spatial_vae.module."
    temporal = sources.write_source(tmp_path / "vae", "vae", {n: a for n, a in old.items() if not n.startswith(prefix)})
    spatial = tmp_path / "spatial"
    spatial.mkdir()
    save_file(
        {n.removeprefix(prefix): a for n, a in old.items() if n.startswith(prefix)},
        spatial / "diffusion_pytorch_model.safetensors",
    )
    fields = json.loads((temporal / "config.json").read_text())
    spatial_fields = fields.pop("vae_2d")
    del spatial_fields["type"], spatial_fields["micro_batch_size"]
    (spatial / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKL", **spatial_fields}))
    (temporal / "config.json").write_text(json.dumps(fields))
    convert_checkpoint("vae", temporal, tmp_path / "model", options=Options(spatial=spatial))
    _expect(tmp_path / "model", "vae")
    with pytest.raises(SourceError, match=r"both hold 2\d\d arrays"):
        convert_checkpoint(
            "vae", sources.write_source(tmp_path / "whole", "vae"), tmp_path / "x", options=Options(spatial=spatial)
        )
    with pytest.raises(ConversionError, match=r"spatial_encoder.*missing"):
        convert_checkpoint("vae", temporal, tmp_path / "x", options=Options(config_file=tmp_path / "whole" / "config.json"))


@pytest.mark.parametrize(
    ("network", "dtype"),
    [
        ("t5", "float32"),
        ("t5", "bfloat16"),
        ("t5", "float16"),
        ("stdit3", "float32"),
        ("stdit3", "bfloat16"),
        ("vae", "float32"),
    ],
)
def test_to_torch_gives_back_the_checkpoint_bit_for_bit(tmp_path: Path, network: str, dtype: str) -> None:
    arrays = sources.halved(sources.state_dict(network), dtype)
    source = sources.write_source(tmp_path / "source", network, arrays)
    stored = "bfloat16" if dtype == "bfloat16" else "float32"
    convert_checkpoint(network, source, tmp_path / "model", dtype=stored)
    assert main(["to-torch", str(tmp_path / "model"), str(tmp_path / "back")]) == 0
    back = load_file(tmp_path / "back" / network / "model.safetensors")
    assert back.keys() == arrays.keys()
    for name, array in arrays.items():
        assert (back[name].dtype, back[name].shape) == (array.dtype, array.shape)
        assert sources.bits(back[name]) == sources.bits(array), name
    convert_checkpoint(network, tmp_path / "back" / network, tmp_path / "again", dtype=stored)
    assert open_network(tmp_path / "again", network).config == sources.golden_config(network)


def test_to_torch_of_a_network_that_was_trained_here(tmp_path: Path) -> None:
    config = sources.golden_config("stdit3")
    arrays = sources.state_dict("stdit3")
    save_network(tmp_path / "model", "stdit3", config, convert("stdit3", arrays, config))
    assert main(["to-torch", str(tmp_path / "model"), str(tmp_path / "back")]) == 0
    back = load_file(tmp_path / "back" / "stdit3" / "model.safetensors")
    assert back.keys() == arrays.keys()
    formula = back.pop("rope.freqs")
    np.testing.assert_allclose(formula, arrays["rope.freqs"], rtol=1e-6)  # computed again: the same to float32 rounding
    assert all(sources.bits(back[name]) == sources.bits(arrays[name]) for name in back)


@pytest.mark.parametrize("network", sources.NETWORKS)
def test_configurations_go_to_upstream_and_back(tmp_path: Path, network: str) -> None:
    config = sources.golden_config(network)
    for fields in (to_upstream(network, config), config.to_dict()):
        (tmp_path / "config.json").write_text(json.dumps(fields))
        assert resolve(network, tmp_path).config == config


@pytest.mark.parametrize(
    ("network", "change", "report"),
    [
        ("t5", {"feed_forward_proj": "relu"}, "feed_forward_proj: 'relu'; only 'gated-gelu' is implemented"),
        ("t5", {"num_layers": "3"}, "num_layers: '3'; expected a value like 24"),
        ("t5", {"sliding_window": 4}, "sliding_window: unknown, so it may change the network"),
        ("stdit3", {"skip_y_embedder": True}, "skip_y_embedder: True; only False"),
        ("stdit3", {"qk_norm_legacy": True}, "qk_norm_legacy: True; only False"),
        ("stdit3", {"patch_size": [2, 2, 2]}, "the temporal patch must be 1"),
        ("vae", {"micro_frame_size": None}, "micro_frame_size: None; only chunked coding"),
        ("vae", {"vae_temporal": {"type": "VAE_Temporal_3D"}}, r"vae_temporal\.type: 'VAE_Temporal_3D'"),
        ("vae", {"vae_2d": {"down_block_types": ["AttnDownBlock2D"]}}, r"vae_2d\.down_block_types"),
    ],
)
def test_what_a_config_asks_for_and_we_lack_is_refused(tmp_path: Path, network: str, change: dict, report: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(sources.upstream_config(network) | change))
    with pytest.raises(ConversionError, match=report):
        resolve(network, tmp_path)


def test_an_unknown_key_can_be_ignored_by_name(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(sources.upstream_config("t5") | {"note": "mine"}))
    assert "note" in resolve("t5", tmp_path, ignore=["note"]).ignored
    assert "dropout_rate" in resolve("t5", tmp_path, ignore=["note"]).ignored


def test_a_pipeline_is_found_by_its_configurations(tmp_path: Path) -> None:
    for network in sources.NETWORKS:
        sources.write_source(tmp_path / "downloads" / f"{network}-v1", network)
    (tmp_path / "downloads" / "t5-v1" / "spiece.model").write_bytes(b"a tokenizer")
    dtypes = {"t5": "int8", "stdit3": "bfloat16", "vae": "float32"}
    manifests = convert_pipeline(tmp_path / "downloads", tmp_path / "model", dtypes=dtypes)
    assert {network: manifest.dtype for network, manifest in manifests.items()} == dtypes
    index = read_model_file(tmp_path / "model")
    assert (index["networks"], index["tokenizer"]) == (["t5", "stdit3", "vae"], "spiece.model")
    assert (tmp_path / "model" / "spiece.model").read_bytes() == b"a tokenizer"
    assert convert_pipeline(tmp_path / "downloads", tmp_path / "model", dtypes=dtypes) == {}
    shutil.copytree(tmp_path / "downloads" / "t5-v1", tmp_path / "downloads" / "t5-v2")
    shutil.rmtree(tmp_path / "downloads" / "vae-v1")
    with pytest.raises(SourceError, match="no vae; 2 of t5"):
        convert_pipeline(tmp_path / "downloads", tmp_path / "model", dtypes=dtypes)


def test_the_origin_is_recorded(tmp_path: Path) -> None:
    source = sources.write_source(tmp_path / "source", "stdit3")
    origin = convert_checkpoint("stdit3", source, tmp_path / "model").origin
    content = (source / "model.safetensors").read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    assert origin["files"] == [{"name": "model.safetensors", "bytes": len(content), "sha256": digest}]
    assert set(origin["ignored_config_keys"]) >= {"enable_flash_attn", "drop_path", "only_train_temporal", "torch_dtype"}


def _run(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


def _one_line(capsys: pytest.CaptureFixture[str]) -> str:
    text = capsys.readouterr().err
    assert text.count("\n") == 1, text
    assert "Traceback" not in text
    return text


def test_the_command_converts_verifies_and_reports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = sources.write_source(tmp_path / "source", "t5")
    assert _run("t5", source, tmp_path / "model", "--dtype", "bfloat16") == 0
    out = capsys.readouterr().out
    assert "config.json keys without effect here: model_type, architectures, dropout_rate" in out
    assert "30 arrays, 0.000 GB as bfloat16" in out
    assert _run("verify", tmp_path / "model", "--source", source) == 0
    assert "bit for bit" in capsys.readouterr().out
    assert _run("t5", source, tmp_path / "model", "--quiet") == 1
    assert "exists; pass --overwrite" in _one_line(capsys)
    assert _run("t5", source, tmp_path / "model", "--quiet", "--overwrite") == 0
    assert open_network(tmp_path / "model", "t5").dtype == "float32"


def test_verify_finds_every_kind_of_damage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = sources.write_source(tmp_path / "source", "t5")
    pristine = tmp_path / "pristine"
    convert_checkpoint("t5", source, pristine)
    names = sorted(open_network(pristine, "t5").parameters)

    def damaged(damage: Callable[[Path], object]) -> str:
        shutil.rmtree(tmp_path / "model", ignore_errors=True)
        shutil.copytree(pristine, tmp_path / "model")
        damage(open_network(tmp_path / "model", "t5").chunk_path(names[3]))
        assert _run("verify", tmp_path / "model") == 1
        return capsys.readouterr().err

    def flip(path: Path) -> None:
        content = bytearray(path.read_bytes())
        content[5] ^= 1
        path.write_bytes(bytes(content))

    def forget(path: Path) -> None:
        manifest = next(parent for parent in path.parents if parent.name == "t5") / "network.json"
        fields = json.loads(manifest.read_text())
        del fields["parameters"][names[3]]
        manifest.write_text(json.dumps(fields))

    assert "checksum" in damaged(flip)
    assert "cannot be read" in damaged(Path.unlink)
    assert "bytes, expected" in damaged(lambda path: path.write_bytes(path.read_bytes() + b"x"))
    assert "does not describe" in damaged(lambda path: (path.parents[2] / "zarr.json").write_text("{}"))
    assert "not part of the network" in damaged(lambda path: (path.parents[2] / "stray").write_text(""))
    assert "not recorded in network.json" in damaged(forget)


def test_verify_notices_another_source(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    convert_checkpoint("t5", sources.write_source(tmp_path / "source", "t5"), tmp_path / "model")
    arrays = sources.state_dict("t5")
    arrays["encoder.final_layer_norm.weight"][7] += 1e-6
    other = sources.write_source(tmp_path / "other", "t5", arrays)
    assert _run("verify", tmp_path / "model", "--source", other) == 1
    err = capsys.readouterr().err
    assert "final.scale: differs from the source's value" in err
    assert "is not the file that was converted" in err
    assert _run("verify", tmp_path / "model", "--source", sources.write_source(tmp_path / "stdit3", "stdit3")) == 1
    assert "is the source of none of t5" in _one_line(capsys)


@pytest.mark.parametrize(
    ("prepare", "report"),
    [
        (lambda folder: None, "holds no weight file"),
        (lambda folder: (folder / "a.safetensors").write_bytes(b"x"), "truncated or not a safetensors file"),
        (lambda folder: (folder / "a.bin").write_bytes(b"x" * 100), "not in PyTorch's zip format"),
        (lambda folder: [(folder / f"{x}.pt").write_bytes(b"x") for x in "ab"], "several checkpoints (a.pt, b.pt)"),
        (lambda folder: (folder / "model.safetensors.index.json").write_text("{}"), "is not an index of shards"),
        (
            lambda folder: (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "x.safetensors"}}'),
            "lacks 1 of 1 shards: x.safetensors",
        ),
        (
            lambda folder: (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../x"}}'),
            "names shards outside its folder",
        ),
    ],
)
def test_unusable_sources_are_one_clear_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], prepare: Callable[[Path], object], report: str
) -> None:
    (tmp_path / "source").mkdir()
    prepare(tmp_path / "source")
    assert _run("t5", tmp_path / "source", tmp_path / "model") == 1
    assert report in _one_line(capsys)
    assert not (tmp_path / "model").exists()


def test_shards_must_hold_what_the_index_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = sources.write_shards(tmp_path / "source", "t5", shards=2)
    index = source / "model.safetensors.index.json"
    fields = json.loads(index.read_text())
    del fields["weight_map"]["shared.weight"]
    index.write_text(json.dumps(fields))
    assert _run("t5", source, tmp_path / "model") == 1
    assert "unlisted ['shared.weight']" in _one_line(capsys)


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), OSError(5, "Input/output error"), KeyboardInterrupt()]
)
def test_a_failure_on_the_way_is_one_line_and_loses_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    """Writing fails with a full disk, reading with a broken one; what was written before is used by the next attempt."""
    source = sources.write_source(tmp_path / "source", "t5")
    convert_checkpoint("t5", source, tmp_path / "expected")
    count = 0
    real = OpenFile.read

    def read(self: OpenFile, offset: int, into: np.ndarray) -> None:
        nonlocal count
        count += 1
        if count > 30:
            raise error
        real(self, offset, into)

    with monkeypatch.context() as patch:
        patch.setattr(OpenFile, "read", read)
        assert _run("t5", source, tmp_path / "model", "--quiet") == (130 if isinstance(error, KeyboardInterrupt) else 1)
    message = _one_line(capsys)
    assert "go on" in message or "Input/output error" in message
    assert not (tmp_path / "model" / "t5").exists()
    written = {path.name for path in (tmp_path / "model" / ".t5.partial").glob("*/*")}
    assert written
    assert _run("t5", source, tmp_path / "model", "--quiet") == 0
    _expect(tmp_path / "model", "t5")


def test_a_disk_that_is_too_small_is_noticed_before_writing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = sources.write_source(tmp_path / "source", "t5")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6, 1000))
    assert _run("t5", source, tmp_path / "model", "--quiet") == 1
    assert "GB are free; make room and run the same command again" in _one_line(capsys)
    assert not (tmp_path / "model" / "t5").exists()


def test_a_second_process_on_the_same_target_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = sources.write_source(tmp_path / "source", "t5")
    config = sources.golden_config("t5")
    with NetworkWriter(tmp_path / "model", "t5", config, dtype="float32", identity={}):
        assert _run("t5", source, tmp_path / "model", "--quiet") == 1
    assert "another process is writing t5" in _one_line(capsys)


def test_an_attempt_that_goes_on_reads_only_what_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = sources.write_source(tmp_path / "source", "t5")
    counts = {"read": 0, "limit": 2**62}
    real = OpenFile.read

    def read(self: OpenFile, offset: int, into: np.ndarray) -> None:
        counts["read"] += into.nbytes
        if counts["read"] > counts["limit"]:
            raise KeyboardInterrupt
        real(self, offset, into)

    def converted(directory: Path, limit: int = 2**62) -> int:
        counts.update(read=0, limit=limit)
        with contextlib.suppress(KeyboardInterrupt):
            convert_checkpoint("t5", source, directory)
        return counts["read"]

    monkeypatch.setattr(OpenFile, "read", read)
    whole = converted(tmp_path / "whole")
    converted(tmp_path / "model", limit=whole // 2)
    assert not (tmp_path / "model" / "t5").exists()
    assert converted(tmp_path / "model") < 0.75 * whole
    _expect(tmp_path / "model", "t5")
