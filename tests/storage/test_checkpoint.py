"""The model directory: what is saved is what is loaded, and a directory is whole, absent or reported as damaged."""

import contextlib
import json
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
import tensorstore as ts
from flax import nnx

from sora_jax import config as presets
from sora_jax.config import T5Config
from sora_jax.networks.t5 import T5Encoder
from sora_jax.storage.checkpoint import flatten, load_network, read_layer, save_network, unflatten
from sora_jax.storage.directory import (
    ModelDirectoryError,
    array_location,
    array_metadata,
    chunk_name,
    open_network,
    present_networks,
    read_array,
    read_model_file,
    tensorstore_spec,
)
from sora_jax.storage.quantisation import dequantise, quantise
from sora_jax.storage.writer import NetworkWriter, update_model_file

CONFIG = T5Config(
    vocab_size=32,
    d_model=16,
    d_kv=4,
    num_heads=2,
    d_ff=24,
    num_layers=2,
    relative_attention_num_buckets=8,
    relative_attention_max_distance=16,
    layer_norm_epsilon=1e-6,
)


@pytest.fixture(scope="module")
def flat() -> dict[str, np.ndarray]:
    shapes = flatten(jax.eval_shape(lambda: T5Encoder(CONFIG, rngs=nnx.Rngs(0))))
    draw = np.random.default_rng(0)
    return {name: draw.standard_normal(leaf.shape, dtype=np.float32) for name, leaf in shapes.items()}


@pytest.fixture
def model(tmp_path: Path, flat: dict[str, np.ndarray]) -> Path:
    save_network(tmp_path / "model", "t5", CONFIG, flat)
    return tmp_path / "model"


def _same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return a.keys() == b.keys() and all(
        a[name].dtype == b[name].dtype and a[name].shape == b[name].shape and a[name].tobytes() == b[name].tobytes()
        for name in a
    )


def _contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_flatten_and_unflatten_are_inverse(flat: dict[str, np.ndarray]) -> None:
    abstract = jax.eval_shape(lambda: T5Encoder(CONFIG, rngs=nnx.Rngs(0)))
    assert _same(flatten(unflatten(abstract, flat)), flat)


def test_unflatten_names_every_misfit(flat: dict[str, np.ndarray]) -> None:
    abstract = jax.eval_shape(lambda: T5Encoder(CONFIG, rngs=nnx.Rngs(0)))
    wrong = {name: array for name, array in flat.items() if name != "final.scale"}
    wrong |= {"final.bias": np.zeros(3), "embed.embedding": np.zeros((2, 2))}
    report = "unknown final.bias; missing final.scale; embed.embedding has shape"
    with pytest.raises(ValueError, match=report):
        unflatten(abstract, wrong)


def test_float32_comes_back_bit_for_bit(model: Path, flat: dict[str, np.ndarray]) -> None:
    config, loaded = load_network(model, "t5")
    assert config == CONFIG
    assert _same(loaded, flat)
    assert present_networks(model) == ["t5"]


def test_bfloat16_is_rounded_once_and_comes_back_bit_for_bit(tmp_path: Path, flat: dict[str, np.ndarray]) -> None:
    save_network(tmp_path, "t5", CONFIG, flat, dtype="bfloat16")
    rounded = {name: array.astype(ml_dtypes.bfloat16) for name, array in flat.items()}
    assert _same(load_network(tmp_path, "t5")[1], rounded)
    wide = load_network(tmp_path, "t5", dtype="float32")[1]
    assert _same(wide, {name: array.astype(np.float32) for name, array in rounded.items()})


def test_int8_is_within_half_a_scale_and_the_rest_exact(tmp_path: Path, flat: dict[str, np.ndarray]) -> None:
    manifest = save_network(tmp_path, "t5", CONFIG, flat, dtype="int8")
    loaded = load_network(tmp_path, "t5")[1]
    quantised = [name for name, entry in manifest.parameters.items() if entry.dtype == "int8"]
    assert len(quantised) == 1 + 7 * CONFIG.num_layers
    for name, array in flat.items():
        if name not in quantised:
            assert loaded[name].tobytes() == array.tobytes()
            continue
        axis = 1 if name.endswith("embedding") else 0
        scale = np.abs(array).max(axis=axis, keepdims=True) / 127
        assert np.all(np.abs(loaded[name] - array) <= scale * (0.5 + 1e-5)), name
        assert np.all(np.abs(array).max(axis=axis) == pytest.approx(np.abs(loaded[name]).max(axis=axis)))


def test_int8_rounds_half_to_even_and_keeps_zeros() -> None:
    rows = np.array([[127, 2.5, -3.5, 0.5], [0, 0, 0, 0]], np.float32)
    values, scale = quantise("embed.embedding", rows)
    np.testing.assert_array_equal(values, [[127, 2, -4, 0], [0, 0, 0, 0]])
    np.testing.assert_array_equal(scale, [1, 1])
    kernel_values, kernel_scale = quantise("block.0.kernel", np.ascontiguousarray(rows.T))
    np.testing.assert_array_equal(kernel_values, values.T)
    np.testing.assert_array_equal(dequantise("block.0.kernel", kernel_values, kernel_scale), values.T)


def test_chunks_are_the_raw_bytes_and_tensorstore_agrees(model: Path, flat: dict[str, np.ndarray], tmp_path: Path) -> None:
    manifest = open_network(model, "t5")
    for name, array in flat.items():
        assert manifest.chunk_path(name).read_bytes() == array.tobytes()
        stored = ts.open(tensorstore_spec(manifest.array_path(name)), read=True).result()
        np.testing.assert_array_equal(stored.read().result(), array)
    assert manifest.chunk_path("block.1.mlp.wo.kernel") == model / "t5/block.1/mlp.wo.kernel/c/0/0"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("shape", [(), (5,), (3, 2), (1, 2, 2, 4, 3)])
def test_metadata_is_what_tensorstore_writes(tmp_path: Path, dtype: str, shape: tuple[int, ...]) -> None:
    metadata = {"shape": list(shape), "data_type": dtype, "codecs": [{"name": "bytes"}]}
    metadata["chunk_grid"] = {"name": "regular", "configuration": {"chunk_shape": list(shape)}}
    ts.open({**tensorstore_spec(tmp_path), "metadata": metadata}, create=True).result()
    assert array_metadata(shape, dtype) == json.loads((tmp_path / "zarr.json").read_text())


def test_an_array_of_zeros_has_a_file_and_a_missing_file_is_an_error(tmp_path: Path, flat: dict[str, np.ndarray]) -> None:
    save_network(tmp_path, "t5", CONFIG, flat | {"final.scale": np.zeros(16, np.float32)})
    manifest = open_network(tmp_path, "t5")
    assert manifest.chunk_path("final.scale").read_bytes() == bytes(64)
    manifest.chunk_path("final.scale").unlink()
    with pytest.raises(ModelDirectoryError, match=r"t5 layer final: parameter file .*/final/scale/c/0 is missing; convert t5"):
        load_network(tmp_path, "t5")
    with pytest.raises(ValueError, match=r"missing|NOT_FOUND|not found"):
        ts.open(tensorstore_spec(manifest.array_path("final.scale")), read=True).result().read().result()


def test_a_truncated_file_is_named_with_its_sizes(model: Path) -> None:
    path = open_network(model, "t5").chunk_path("block.0.attn.q.kernel")
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(ModelDirectoryError, match=r"t5 layer block\.0: .* has 508 bytes, expected 512; convert t5 again"):
        load_network(model, "t5")


@pytest.mark.parametrize("text", ["", "{}", '{"format_version": 1', "[]"])
def test_a_damaged_manifest_is_one_clear_line(model: Path, text: str) -> None:
    (model / "t5" / "network.json").write_text(text)
    with pytest.raises(ModelDirectoryError, match=r"network\.json (is damaged|cannot be read).*convert t5 again") as caught:
        load_network(model, "t5")
    assert "\n" not in str(caught.value)


def test_a_manifest_of_another_format_is_refused(model: Path) -> None:
    fields = json.loads((model / "t5" / "network.json").read_text())
    (model / "t5" / "network.json").write_text(json.dumps(fields | {"format_version": 2}))
    with pytest.raises(ModelDirectoryError, match="has format version 2; this release reads 1"):
        load_network(model, "t5")


def test_a_missing_network_comes_with_the_command_that_adds_it(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelDirectoryError, match=rf"has only t5\); add it with: sora-jax convert vae SOURCE {model}"):
        load_network(model, "vae")
    with pytest.raises(ModelDirectoryError, match="does not exist"):
        load_network(tmp_path / "nowhere", "t5")


def test_layers_are_what_the_configuration_names(model: Path, flat: dict[str, np.ndarray]) -> None:
    manifest = open_network(model, "t5")
    assert manifest.layers == ("embed", "block.0", "block.1", "final")
    layers = [read_layer(manifest, layer) for layer in manifest.layers]
    assert sum(map(len, layers)) == len(flat)
    assert set(layers[2]) == {name for name in flat if name.startswith("block.1.")}


def test_block_1_does_not_take_the_parameters_of_block_10(tmp_path: Path) -> None:
    config = presets.open_sora_1_2.t5
    names = {f"{layer}.scale": np.full(2, i, np.float32) for i, layer in enumerate(config.layers)}
    save_network(tmp_path, "t5", config, names)
    manifest = open_network(tmp_path, "t5")
    assert manifest.names("block.1") == ["block.1.scale"]
    np.testing.assert_array_equal(read_array(manifest, "block.10.scale"), [11, 11])


def test_large_arrays_are_mapped_and_reach_jax_without_a_copy(tmp_path: Path) -> None:
    names = {f"{layer}.scale": np.ones(2, np.float32) for layer in CONFIG.layers}
    save_network(tmp_path, "t5", CONFIG, names | {"embed.embedding": np.ones((1024, 512), np.float32)})
    array = load_network(tmp_path, "t5")[1]["embed.embedding"]
    assert not array.flags.writeable
    on_device = jax.device_put(array, jax.devices("cpu")[0])
    assert on_device.unsafe_buffer_pointer() == array.__array_interface__["data"][0]


def test_an_existing_network_is_replaced_only_when_asked(model: Path, flat: dict[str, np.ndarray]) -> None:
    doubled = {name: 2 * array for name, array in flat.items()}
    with pytest.raises(ModelDirectoryError, match="exists; pass --overwrite"):
        save_network(model, "t5", CONFIG, doubled)
    assert _same(load_network(model, "t5")[1], flat)
    save_network(model, "t5", CONFIG, doubled, overwrite=True)
    assert _same(load_network(model, "t5")[1], doubled)
    assert sorted(path.name for path in model.iterdir()) == ["model.json", "t5"]


@pytest.mark.parametrize("value", [np.nan, np.inf, 3.4e38])
def test_a_failed_save_leaves_what_was_there(model: Path, flat: dict[str, np.ndarray], value: float) -> None:
    before = _contents(model)
    wrong = flat | {"final.scale": np.full(16, value, np.float32)}
    with pytest.raises(ValueError, match=r"final\.scale holds NaN or infinite values, or values beyond bfloat16"):
        save_network(model, "t5", CONFIG, wrong, dtype="bfloat16", overwrite=True)
    assert _contents(model) == before


def test_a_failed_first_save_leaves_no_directory(tmp_path: Path, flat: dict[str, np.ndarray]) -> None:
    with pytest.raises(ValueError, match="parameter strange belongs to none of the layers"):
        save_network(tmp_path / "new", "t5", CONFIG, flat | {"strange": np.zeros(1, np.float32)})
    assert not (tmp_path / "new").exists()
    with pytest.raises(ModelDirectoryError, match=r"nothing was written for layers block\.1, final"):
        save_network(tmp_path / "new", "t5", CONFIG, {n: a for n, a in flat.items() if n.startswith(("embed.", "block.0."))})
    assert not (tmp_path / "new").exists()


def test_the_vae_is_never_int8(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="vae cannot be stored as 'int8'; expected one of float32, bfloat16"):
        save_network(tmp_path, "vae", presets.pocket.vae, {}, dtype="int8")


def _writer(model: Path, source: str = "a source", **options: Any) -> NetworkWriter:
    return NetworkWriter(model, "t5", CONFIG, dtype="float32", identity={"source": source}, **options)


def _interrupt(model: Path, flat: dict[str, np.ndarray], count: int) -> None:
    with contextlib.suppress(KeyboardInterrupt), _writer(model) as writer:
        for name in list(flat)[:count]:
            writer.write(name, flat[name])
        raise KeyboardInterrupt


def test_an_interrupted_writer_goes_on(tmp_path: Path, flat: dict[str, np.ndarray]) -> None:
    _interrupt(tmp_path, flat, 5)
    assert present_networks(tmp_path) == []
    with _writer(tmp_path) as writer:
        assert set(writer.recorded) == set(list(flat)[:5])
        for name, array in flat.items():
            if name not in writer.recorded:
                writer.write(name, array)
        writer.finish()
    assert _same(load_network(tmp_path, "t5")[1], flat)


def test_another_source_or_dtype_starts_anew(tmp_path: Path, flat: dict[str, np.ndarray]) -> None:
    _interrupt(tmp_path, flat, 5)
    with _writer(tmp_path, "another source") as writer:
        assert not writer.recorded
    with NetworkWriter(tmp_path, "t5", CONFIG, dtype="bfloat16", identity={"source": "another source"}) as writer:
        assert not writer.recorded


def test_the_journal_is_believed_only_as_far_as_it_goes(tmp_path: Path, flat: dict[str, np.ndarray]) -> None:
    _interrupt(tmp_path, flat, 5)
    journal = tmp_path / ".t5.journal"
    lines = journal.read_text().splitlines(keepends=True)
    assert len(lines) == 6
    journal.write_text("".join(lines[:4]) + lines[4][:20])  # torn by a power failure
    first = json.loads(lines[1])
    (tmp_path / ".t5.partial" / array_location(first["name"], CONFIG.layers) / chunk_name(tuple(first["shape"]))).unlink()
    with _writer(tmp_path) as writer:
        assert set(writer.recorded) == {json.loads(line)["name"] for line in lines[2:4]}


def test_two_writers_of_one_network_exclude_each_other(tmp_path: Path) -> None:
    with _writer(tmp_path):
        with pytest.raises(ModelDirectoryError, match="another process is writing t5"):
            _writer(tmp_path).__enter__()
    with _writer(tmp_path):
        pass


def test_a_replacement_cut_in_two_is_undone(model: Path, flat: dict[str, np.ndarray]) -> None:
    (model / "t5").rename(model / ".t5.replaced")
    with pytest.raises(ModelDirectoryError, match="exists; pass --overwrite"):
        _writer(model).__enter__()
    assert _same(load_network(model, "t5")[1], flat)


def test_too_few_bytes_are_not_recorded(tmp_path: Path) -> None:
    with _writer(tmp_path) as writer:
        with pytest.raises(ValueError, match=r"final.scale: 8 bytes were written, expected 64"):
            with writer.open_array("final.scale", (16,), "float32") as write:
                write(np.zeros(2, np.float32))
    with _writer(tmp_path) as writer:
        assert not writer.recorded


def test_the_index_keeps_what_it_is_told(model: Path) -> None:
    update_model_file(model, tokenizer="spiece.model", defaults={"num_frames": 34})
    update_model_file(model)
    fields = read_model_file(model)
    assert (fields["networks"], fields["tokenizer"], fields["defaults"]) == (["t5"], "spiece.model", {"num_frames": 34})
    with pytest.raises(ValueError, match=r"model\.json has no fields"):
        update_model_file(model, defualts={})
