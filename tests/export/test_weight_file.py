"""The safetensors files of exports: read as they were written, and no number of a header is believed by itself."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from sora_jax.export import weight_file
from sora_jax.export.contents import ExportFileError

ARRAYS = {
    "a": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b": np.arange(4, dtype=np.float16),
    "c": np.full((2, 2), -3, np.int8),
    "empty": np.zeros((0, 5), np.float32),
}


@pytest.fixture
def path(tmp_path):
    weight_file.write(tmp_path / "w.safetensors", ARRAYS, stage="t5_final")
    return tmp_path / "w.safetensors"


def test_what_is_read_is_what_was_written_and_what_safetensors_reads(path):
    theirs, ours = load_file(path), weight_file.read(path)
    assert ours.keys() == theirs.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(ours[name], array)
        np.testing.assert_array_equal(theirs[name], array)
        assert ours[name].dtype == array.dtype
    assert weight_file.index(path).stage == "t5_final"


def with_header(path, text: bytes, *, length: int | None = None) -> None:
    data = path.read_bytes()
    values = data[8 + int.from_bytes(data[:8], "little") :]
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + values)


@pytest.mark.parametrize("length", [2**62, 2**63 + 5, 10**6])
def test_a_header_longer_than_its_file_is_refused_by_its_length(path, length):
    with_header(path, b"{}", length=length)
    with pytest.raises(ExportFileError, match=rf"w\.safetensors announces a header of {length} bytes in a file of"):
        weight_file.read(path)


@pytest.mark.parametrize(
    ("name", "field", "value", "message"),
    [
        ("a", "shape", [2, 4], "array a of 32 bytes lies at"),
        ("a", "shape", [2**62, 2**62], "array a of"),
        ("a", "shape", [-2, -3], "array a has shape"),
        ("a", "shape", [True, 6], "array a has shape"),
        ("a", "shape", "23", "array a has shape"),
        ("a", "shape", None, "array a has shape"),
        ("a", "dtype", "F64", "KeyError: 'F64'"),
        ("a", "dtype", ["F32"], "TypeError"),
        ("c", "data_offsets", [0, 24], "array"),
        ("c", "data_offsets", [0], "ValueError"),
        ("c", "data_offsets", None, "TypeError"),
        ("b", "data_offsets", [2**62, 2**62 + 8], "array c of 4 bytes lies at 32 to 36, expected from 24"),
    ],
)
def test_numbers_that_do_not_agree_are_refused(path, name, field, value, message):
    data = path.read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    header[name][field] = value
    with_header(path, json.dumps(header).encode())
    with pytest.raises(ExportFileError, match=message) as refused:
        weight_file.read(path)
    assert str(refused.value).startswith(str(path))


@pytest.mark.parametrize("text", [b"", b"[1]", b"\xff\xfe", b"[" * 100_000, b'{"a": 1}', b'{"__metadata__": 3}'])
def test_a_header_that_is_none_is_refused(path, text):
    with_header(path, text)
    with pytest.raises(ExportFileError, match=r"w\.safetensors"):
        weight_file.read(path)


def test_values_that_are_missing_or_too_many_are_refused(path):
    data = path.read_bytes()
    for changed in (data[:-1], data + b"\0", data[:4], b""):
        path.write_bytes(changed)
        with pytest.raises(ExportFileError, match=r"w\.safetensors"):
            weight_file.read(path)
