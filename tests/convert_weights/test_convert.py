"""Checkpoint files into a model directory: every layout of the published files, bit for bit."""

import contextlib
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from convert_weights import convert
from convert_weights.all_networks import convert_pipeline
from convert_weights.checkpoint import Options, convert_checkpoint
from convert_weights.errors import SourceError
from convert_weights.rules import ConversionError
from convert_weights.source_config import resolve, to_upstream
from convert_weights.source_file import OpenFile
from convert_weights.verify import verify
from sora_jax.commands.convert import main
from sora_jax.storage.checkpoint import save_network
from sora_jax.storage.directory import open_network, read_model_file
from sora_jax.storage.quantisation import quantise
from sora_jax.storage.reader import Reader
from tests.support import sources

pytestmark = pytest.mark.usefixtures("small_slices")


@pytest.mark.parametrize("network", sources.NETWORKS)
def test_a_folder_as_published(tmp_path: Path, network: str) -> None:
    source = sources.write_source(tmp_path / "source", network)
    convert_checkpoint(network, source, tmp_path / "model")
    sources.expect_converted(tmp_path / "model", network)
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
DEAR = (_torch_shards, _colossal)  # other tests read files of torch.save


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(layout, id=layout.__name__.strip("_"), marks=pytest.mark.slow if layout in DEAR else ())
        for layout in LAYOUTS
    ],
)
def test_other_layouts_of_the_same_weights(tmp_path: Path, layout: Callable[[Path], Path]) -> None:
    source = layout(tmp_path / "source")
    convert_checkpoint("t5", source, tmp_path / "model")
    sources.expect_converted(tmp_path / "model", "t5")
    assert verify(tmp_path / "model", source=source) == {"t5": []}


@pytest.mark.parametrize("network", ["t5", "stdit3"])
@pytest.mark.parametrize("source_dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_source_dtype_to_every_stored_dtype(tmp_path: Path, network: str, source_dtype: str, dtype: str) -> None:
    arrays = sources.halved(sources.state_dict(network), source_dtype)
    source = sources.write_source(tmp_path / "source", network, arrays)
    convert_checkpoint(network, source, tmp_path / "model", dtype=dtype)
    sources.expect_converted(tmp_path / "model", network, arrays, dtype)
    assert verify(tmp_path / "model", source=source) == {network: []}


@pytest.mark.parametrize("network", ["t5", "stdit3"])
def test_int8_is_that_of_the_quantiser_bit_for_bit(tmp_path: Path, network: str) -> None:
    source = sources.write_source(tmp_path / "source", network)
    manifest = convert_checkpoint(network, source, tmp_path / "model", dtype="int8")
    flat = convert(network, sources.state_dict(network), sources.golden_config(network))
    quantised = [name for name, entry in manifest.parameters.items() if entry.dtype == "int8"]
    for name in quantised:
        values, scale = quantise(name, flat[name])
        assert sources.bits(Reader(manifest).arrays([name])[name]) == sources.bits(values)
        assert sources.bits(Reader(manifest).arrays([name + "_scale"])[name + "_scale"]) == sources.bits(scale)
    for name in flat.keys() - set(quantised):
        assert sources.bits(Reader(manifest).arrays([name])[name]) == sources.bits(flat[name])
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
    sources.expect_converted(tmp_path / "model", "vae")
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
    with pytest.raises(ValueError, match="vae cannot be stored as 'int8'; expected one of float32"):
        convert_pipeline(tmp_path / "downloads", tmp_path / "other", dtypes=dtypes | {"vae": "int8"})
    assert not (tmp_path / "other").exists()
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
    sources.expect_converted(tmp_path / "model", "t5")
