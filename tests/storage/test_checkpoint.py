"""The model directory: what is saved is what is loaded, and a directory is whole, absent or reported as damaged."""

import contextlib
import json
import os
import threading
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

from sora_jax import config as presets
from sora_jax import files
from sora_jax.config import T5Config
from sora_jax.networks.t5 import T5Encoder
from sora_jax.storage.arrays import chunk_name
from sora_jax.storage.checkpoint import flatten, load_network, load_parameters, read_layer, save_network, unflatten
from sora_jax.storage.directory import ModelDirectoryError, array_location, open_network, present_networks, read_model_file
from sora_jax.storage.quantisation import dequantise, quantise
from sora_jax.storage.reader import Reader
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


def test_a_missing_network_comes_with_the_command_that_adds_it(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelDirectoryError, match=rf"has only t5\); add it with: sora-jax convert vae SOURCE {model}"):
        load_network(model, "vae")
    with pytest.raises(ModelDirectoryError, match="does not exist"):
        load_network(tmp_path / "nowhere", "t5")


def test_layers_are_what_the_configuration_names(model: Path, flat: dict[str, np.ndarray]) -> None:
    manifest = open_network(model, "t5")
    assert manifest.layers == ("embed", "block.0", "block.1", "final")
    layers = [read_layer(Reader(manifest), layer) for layer in manifest.layers]
    assert sum(map(len, layers)) == len(flat)
    assert set(layers[2]) == {name for name in flat if name.startswith("block.1.")}


def test_block_1_does_not_take_the_parameters_of_block_10(tmp_path: Path) -> None:
    config = presets.open_sora_1_2.t5
    names = {f"{layer}.scale": np.full(2, i, np.float32) for i, layer in enumerate(config.layers)}
    save_network(tmp_path, "t5", config, names)
    manifest = open_network(tmp_path, "t5")
    assert manifest.names("block.1") == ["block.1.scale"]
    np.testing.assert_array_equal(Reader(manifest).arrays(["block.10.scale"])["block.10.scale"], [11, 11])


def test_what_is_loaded_is_a_copy_that_jax_takes_as_it_is(tmp_path: Path) -> None:
    names = {f"{layer}.scale": np.ones(2, np.float32) for layer in CONFIG.layers}
    manifest = save_network(tmp_path, "t5", CONFIG, names | {"embed.embedding": np.ones((1024, 512), np.float32)})
    array = load_network(tmp_path, "t5")[1]["embed.embedding"]
    assert not array.flags.writeable
    on_device = jax.device_put(array, jax.devices("cpu")[0])
    assert on_device.unsafe_buffer_pointer() == array.__array_interface__["data"][0]
    path = manifest.chunk_path("embed.embedding")
    path.write_bytes(bytes(path.stat().st_size))  # `cp` over it
    os.truncate(path, 0)
    assert (np.asarray(on_device) == 1).all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_a_flipped_bit_is_never_loaded(tmp_path: Path, flat: dict[str, np.ndarray], dtype: str) -> None:
    manifest = save_network(tmp_path, "t5", CONFIG, flat, dtype=dtype)
    for name in ("embed.embedding", "final.scale", *(("block.1.mlp.wo.kernel_scale",) if dtype == "int8" else ())):
        path = manifest.chunk_path(name)
        data = bytearray(path.read_bytes())
        data[3] ^= 4
        path.write_bytes(data)
        with pytest.raises(ModelDirectoryError, match=rf"{path} does not have the checksum"):
            load_network(tmp_path, "t5")
        data[3] ^= 4
        path.write_bytes(data)
    assert len(load_network(tmp_path, "t5")[1]) == len(flat)


def test_a_network_replaced_while_it_is_loaded_is_an_error(
    model: Path, flat: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest, fill, count, one_at_a_time = open_network(model, "t5"), Reader._fill, 0, threading.Lock()

    def fill_and_replace(*args: Any) -> None:
        nonlocal count
        with one_at_a_time:  # layers are loaded two at a time
            fill(*args)
            count += 1
            if count == 1:
                save_network(model, "t5", CONFIG, {name: 2 * array for name, array in flat.items()}, overwrite=True)

    monkeypatch.setattr(Reader, "_fill", fill_and_replace)
    with pytest.raises(ModelDirectoryError, match=r"/t5 was replaced or removed after it was opened; open the model again"):
        load_parameters(manifest)


def test_a_misfit_of_many_parameters_is_a_short_line(flat: dict[str, np.ndarray]) -> None:
    abstract = jax.eval_shape(lambda: T5Encoder(CONFIG, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match=r"^21 parameters do not fit T5Encoder: missing .*; and 16 more$") as raised:
        unflatten(abstract, {})
    assert len(str(raised.value)) < 300


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


@pytest.mark.parametrize("damage", ["a bit", "the index", "a link"])
def test_what_was_damaged_before_the_restart_is_written_again(tmp_path: Path, flat: dict[str, np.ndarray], damage: str) -> None:
    _interrupt(tmp_path, flat, 5)
    name = list(flat)[2]
    path = tmp_path / ".t5.partial" / array_location(name, CONFIG.layers) / chunk_name(flat[name].shape)
    data = bytearray(path.read_bytes())
    data[0 if damage == "a bit" else -1] ^= 1
    path.write_bytes(data)
    if damage == "a link":
        data[-1] ^= 1
        (tmp_path / "elsewhere").write_bytes(data)
        path.unlink()
        path.symlink_to(tmp_path / "elsewhere")
    with _writer(tmp_path) as writer:
        assert set(writer.recorded) == set(list(flat)[:5]) - {name}


LIES = ["{}", "[]", "5", '{"name": "../x"}', "[" * 100_000, '{"name": "embed.embedding", "shape": [-1]}']


@pytest.mark.parametrize("line", LIES, ids=lambda line: line[:20])
def test_a_journal_with_another_line_is_believed_up_to_it(tmp_path: Path, flat: dict[str, np.ndarray], line: str) -> None:
    _interrupt(tmp_path, flat, 5)
    journal = tmp_path / ".t5.journal"
    lines = journal.read_text().splitlines(keepends=True)
    journal.write_text("".join([*lines[:3], line + "\n", *lines[3:]]))
    with _writer(tmp_path) as writer:
        assert len(writer.recorded) == 2


def test_temporary_files_follow_no_link_and_leftovers_go(tmp_path: Path, flat: dict[str, np.ndarray]) -> None:
    victim = tmp_path / "victim"
    victim.write_text("mine")
    model = tmp_path / "model"
    model.mkdir()
    (model / ".t5.partial").symlink_to(tmp_path)
    left = f".model.json.{files._machine()}-999999999-0-01234567.partial"  # of a process that is dead
    for name in (".model.json.new", left, "..t5.journal.new", ".t5.journal"):
        (model / name).symlink_to(victim)
    save_network(model, "t5", CONFIG, flat)
    assert victim.read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "victim"]
    assert {path.name for path in model.iterdir()} <= {"model.json", "t5", ".model.json.new", "..t5.journal.new"}


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
