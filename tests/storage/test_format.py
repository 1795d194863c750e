"""The files of a model directory, read by others: tensorstore, the zarr package, and ten lines of Python."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import tensorstore as ts

from sora_jax.storage import arrays
from sora_jax.storage.arrays import Parameter, array_metadata, describes, shard_index
from sora_jax.storage.checkpoint import load_network, save_network
from sora_jax.storage.directory import Manifest, ModelDirectoryError, open_network
from sora_jax.storage.reader import Reader
from tests.support.stored import as_format_1, as_tensorstore_writes
from tests.support.tiny_model import CONFIG, random_flat

DTYPES = ["float32", "bfloat16", "int8"]
TABLE = "embed.embedding"


@pytest.fixture(scope="module")
def flat() -> dict[str, np.ndarray]:
    return random_flat("t5")


@pytest.fixture(params=DTYPES)
def manifest(request: pytest.FixtureRequest, tmp_path: Path, flat: dict, monkeypatch: pytest.MonkeyPatch) -> Manifest:
    monkeypatch.setattr(arrays, "BLOCK_BYTES", 128)
    return save_network(tmp_path / "model", "t5", CONFIG.t5, flat, dtype=request.param)


def ten_line_reader(folder: Path) -> np.ndarray:
    """Reads an array of format 2 by the zarr3 specification alone."""
    metadata = json.loads((folder / "zarr.json").read_text())
    shape, inner = metadata["shape"], metadata["codecs"][0]["configuration"]["chunk_shape"]
    dtype = np.dtype(getattr(ml_dtypes, metadata["data_type"], metadata["data_type"])).newbyteorder("<")
    raw = (folder / "/".join(["c", *("0" for _ in shape)])).read_bytes()
    count = shape[0] // inner[0] if shape else 1
    index = np.frombuffer(raw, "<u8", 2 * count, len(raw) - 16 * count).reshape(count, 2)
    blocks = [np.frombuffer(raw, dtype, length // dtype.itemsize, offset).reshape(inner) for offset, length in index]
    return np.concatenate(blocks) if shape else blocks[0]


def test_others_read_the_same_values(manifest: Manifest) -> None:
    values = Reader(manifest).arrays(list(manifest.parameters))
    several = 0
    for name, parameter in manifest.parameters.items():
        path = manifest.array_path(name)
        several += len(parameter.blocks) > 1
        store = ts.open({"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{path}/"}}, open=True).result()
        for found in (store.read().result(), ten_line_reader(path)):
            assert found.dtype == parameter.numpy_dtype
            np.testing.assert_array_equal(found, values[name])
        np.testing.assert_array_equal(store[1:3].read().result(), values[name][1:3])
    assert several > 5


def test_the_zarr_package_reads_what_it_has_a_type_for(manifest: Manifest) -> None:
    zarr = pytest.importorskip("zarr", minversion="3", reason="the zarr package is not installed")
    if manifest.dtype == "bfloat16":
        with pytest.raises(ValueError, match="bfloat16"):
            zarr.open_array(manifest.array_path(TABLE), mode="r")
        return
    values = Reader(manifest).arrays(list(manifest.parameters))
    for name, parameter in manifest.parameters.items():
        array = zarr.open_array(manifest.array_path(name), mode="r")
        np.testing.assert_array_equal(array[:], values[name])
        assert array.shards == parameter.shape
        assert array.chunks == (parameter.rows, *parameter.shape[1:])


def test_a_file_is_the_raw_bytes_and_then_the_index(manifest: Manifest) -> None:
    for name, parameter in manifest.parameters.items():
        raw = manifest.chunk_path(name).read_bytes()
        assert raw[: parameter.nbytes] == Reader(manifest).arrays([name])[name].tobytes()
        assert raw[parameter.nbytes :] == shard_index(parameter.nbytes, len(parameter.blocks))


def test_what_tensorstore_writes_is_accepted(manifest: Manifest) -> None:
    expected = load_network(manifest.path.parent, "t5")[1]
    rewritten = as_tensorstore_writes(manifest)
    found = load_network(manifest.path.parent, "t5")[1]
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array)
    for name, parameter in rewritten.parameters.items():
        assert describes(json.loads((rewritten.array_path(name) / "zarr.json").read_text()), parameter)
        Reader(rewritten).verify(name)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (5,), (4, 2), (2, 2, 2, 4, 3)])
@pytest.mark.parametrize("sharded", [True, False])
def test_metadata_is_what_tensorstore_writes(tmp_path: Path, dtype: str, shape: tuple[int, ...], sharded: bool) -> None:
    rows = (1 if not shape or shape[0] == 5 else 2) if sharded else None
    metadata = array_metadata(shape, dtype, rows)
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{tmp_path}/"}, "metadata": metadata}
    ts.open(spec, create=True).result()
    written = json.loads((tmp_path / "zarr.json").read_text())
    blocks = ("0" * 64,) * (shape[0] // rows if shape and rows else 1)
    parameter = Parameter(shape, dtype, "0" * 64, None, rows, blocks if sharded else ())
    assert describes(written, parameter)
    assert describes(metadata, parameter)
    assert not describes({**written, "codecs": [{"name": "gzip"}]}, parameter)
    assert not describes({**written, "shape": [*shape, 1]}, parameter)
    assert not describes({**written, "storage_transformers": [{"name": "x"}]}, parameter)
    assert describes({**written, "attributes": {"made": "elsewhere"}}, parameter)


def test_format_1_is_read_as_before(manifest: Manifest) -> None:
    expected = load_network(manifest.path.parent, "t5")[1]
    old = as_format_1(manifest)
    assert old.format_version == 1
    found = load_network(manifest.path.parent, "t5")[1]
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array)
    assert open_network(manifest.path.parent, "t5").chunk_path(TABLE).stat().st_size == manifest.parameters[TABLE].nbytes


def test_an_array_of_zeros_has_a_file_and_a_missing_file_is_an_error(tmp_path: Path, flat: dict) -> None:
    """A deleted file must not read as zeros."""
    manifest = save_network(tmp_path, "t5", CONFIG.t5, flat | {"final.scale": np.zeros(16, np.float32)})
    path = manifest.chunk_path("final.scale")
    assert path.read_bytes()[:64] == bytes(64)
    path.unlink()
    with pytest.raises(ModelDirectoryError, match=r"t5 layer final: parameter file .*/final/scale/c/0 is missing; convert t5"):
        load_network(tmp_path, "t5")


def test_a_truncated_file_is_named_with_its_sizes(tmp_path: Path, flat: dict) -> None:
    manifest = save_network(tmp_path, "t5", CONFIG.t5, flat)
    path = manifest.chunk_path("block.0.attn.q.kernel")
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(ModelDirectoryError, match=r"t5 layer block\.0: .* has 1036 bytes, expected 1040; convert t5 again"):
        load_network(tmp_path, "t5")
