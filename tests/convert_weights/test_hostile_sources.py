"""Files that lie: every number is compared with what must be true before it is believed, and every lie is one line."""

import json
import os
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from convert_weights.checkpoint import convert_checkpoint
from convert_weights.errors import SourceError, printable
from convert_weights.readers import open_checkpoint
from convert_weights.rules import ConversionError
from convert_weights.source_file import OpenFile
from convert_weights.torch_zip import read_tree
from tests.support import sources


def refused(source: Path, model: Path, match: str, network: str = "t5") -> None:
    """Converting is refused in one line that names a file of the source, and nothing is left behind."""
    with pytest.raises((SourceError, ConversionError), match=match) as caught:
        convert_checkpoint(network, source, model)
    assert "\n" not in str(caught.value) or isinstance(caught.value, ConversionError)
    assert str(source) in str(caught.value)
    assert not model.exists()


def torch_source(folder: Path, arrays: dict[str, Any] | None = None) -> Path:
    source = sources.write_source(folder, "t5")
    (source / "model.safetensors").unlink()
    return sources.write_torch_file(source / "pytorch_model.bin", sources.state_dict("t5") if arrays is None else arrays)


# A5, A6: sizes in headers.


def test_a_known_name_of_a_huge_shape_is_refused_before_a_value_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stride 0 makes 40000 x 40000 values of four bytes."""
    arrays = sources.state_dict("t5")
    first = next(iter(arrays.values()))
    huge = sources.torch_tensor("0", "float32", first.size, shape=(40000, 40000), strides=(0, 0))
    path = torch_source(tmp_path / "source", arrays | {"shared.weight": huge})
    read: list[int] = []
    real = OpenFile.read
    monkeypatch.setattr(OpenFile, "read", lambda self, offset, into: (read.append(into.nbytes), real(self, offset, into))[1])
    refused(path, tmp_path / "model", r"shared.weight: shape \[40000, 40000\] does not become")
    assert max(read) < 1 << 20


def _safetensors(path: Path, fields: Any, data: bytes = b"") -> None:
    text = fields if isinstance(fields, bytes) else json.dumps(fields).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def test_empty_arrays_of_huge_shapes_end(tmp_path: Path) -> None:
    source = sources.write_source(tmp_path / "source", "t5")
    content = (source / "model.safetensors").read_bytes()
    (length,) = struct.unpack_from("<Q", content)
    fields = json.loads(content[8 : 8 + length])
    for name in ("encoder.final_layer_norm.weight", "strange"):
        fields[name] = {"dtype": "F32", "shape": [10**18, 0], "data_offsets": [0, 0]}
        _safetensors(source / "model.safetensors", fields, b"")
        with pytest.raises((SourceError, ConversionError)):
            convert_checkpoint("t5", source, tmp_path / "model")
    arrays = sources.state_dict("t5")
    first, name = next(iter(arrays.values())), "encoder.final_layer_norm.weight"
    for shape, strides in (((10**18, 0), (1, 1)), ((0, 5), (7, 3)), ((3, 0), (0, 0)), ((0,), (10**30,))):
        empty = sources.torch_tensor("0", "float32", first.size, shape=shape, strides=strides)
        path = torch_source(tmp_path / f"zip{shape}", arrays | {name: empty})
        refused(path, tmp_path / "model", rf"{name}: shape")


@pytest.mark.parametrize(
    ("fields", "report"),
    [
        ({"a": {"dtype": "F32", "shape": [2] * 40, "data_offsets": [0, 4]}}, "header is malformed"),
        ({"a": {"dtype": "F32", "shape": [10**4000, 0], "data_offsets": [0, 0]}}, "header is malformed"),
        ({"a": {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]}}, "header is malformed"),
        ({"a": {"dtype": "F32", "shape": "1", "data_offsets": [0, 4]}}, "header is malformed"),
        ({"a": {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]}}, "header is malformed"),
        ({"a": {"dtype": "F32", "shape": [1]}}, "expected the fields data_offsets, dtype, shape"),
        ({"a": [1]}, "expected the fields data_offsets, dtype, shape"),
        ([1], "expected a JSON object"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (b"\xff\xfe", "header is malformed"),
        (b"1" * 5000, "header is malformed"),
        ({"a\x1b[31m": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, r"'a.*x1b.31m' is no name of an array"),
    ],
)
def test_hostile_headers_of_safetensors_are_one_line(tmp_path: Path, fields: Any, report: str) -> None:
    _safetensors(tmp_path / "a.safetensors", fields, bytes(4))
    with pytest.raises(SourceError, match=report) as caught:
        open_checkpoint(tmp_path / "a.safetensors")
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 2500


def test_a_checkpoint_of_too_many_arrays_is_refused(tmp_path: Path) -> None:
    fields = {f"x{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(40_000)}
    _safetensors(tmp_path / "a.safetensors", fields)
    with pytest.raises(SourceError, match="more than 32768 arrays"):
        open_checkpoint(tmp_path / "a.safetensors")


def test_a_view_that_is_spread_over_its_storage_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import convert_weights.source_array

    monkeypatch.setattr(convert_weights.source_array, "_SMALL_SPAN_BYTES", 100)
    arrays = sources.state_dict("t5")
    name = "encoder.final_layer_norm.weight"
    wide = np.repeat(arrays[name], 3)[::3]
    converted = torch_source(tmp_path / "wide", arrays | {name: wide})
    convert_checkpoint("t5", converted, tmp_path / "model")
    sources.expect_converted(tmp_path / "model", "t5")
    sparse = np.repeat(arrays[name], 50)[::50]
    refused(torch_source(tmp_path / "sparse", arrays | {name: sparse}), tmp_path / "x", "save it as a contiguous tensor")


# B1, B2: pickles.


def _program(path: Path, program: bytes) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", program)
    return path


def _nested_tuples(depth: int) -> bytes:
    return b")" + b"\x85" * depth


def _shared_lists(depth: int, width: int) -> bytes:
    """A tree whose leaves are width ** depth, of depth lists."""
    lists = (
        b"](" + (b"h" + bytes([max(level - 1, 0)])) * (width if level else 0) + b"eq" + bytes([level]) for level in range(depth)
    )
    return b"\x80\x02" + b"".join(lists) + b"."


HOSTILE_PICKLES = {
    "a million empty lists": (b"\x80\x02(" + b"]" * 1_100_000 + b"l.", "more than 1000000 pickle operations"),
    "an integer of 10 MB": (b"\x80\x02\x8b" + struct.pack("<i", 10**7) + b"\x7f" * 10**7 + b".", "an integer of 79999999 bits"),
    "an integer of 17 bytes": (b"\x80\x02\x8a\x11" + b"\x7f" * 17 + b".", "an integer of 135 bits"),
    "nested tuples as a module": (b"\x80\x04" + _nested_tuples(300_000) + b"\x8c\x01x\x93.", "malformed"),
    "nested tuples as a name": (b"\x80\x04\x8c\x01x" + _nested_tuples(300_000) + b"\x93.", "malformed"),
    "nested tuples as a key": (b"\x80\x04}" + _nested_tuples(300_000) + b"Ns.", "malformed"),
    "nested tuples as a storage": (b"\x80\x04" + _nested_tuples(300_000) + b"Q.", "malformed"),
    "nested tuples as arguments": (
        b"\x80\x04ctorch._utils\n_rebuild_tensor_v2\n" + _nested_tuples(300_000) + b"R.",
        "malformed",
    ),
    "nested tuples as a result": (b"\x80\x04" + _nested_tuples(300_000) + b".", "more than 64 deep"),
    "lists of 250 times the same list, 60 deep": (_shared_lists(60, 250), "does not hold a state dict"),
    "a control character in a name": (b"\x80\x02cos\nsys\x1b[2Jtem\n.", r"os\.sys\\x1b\[2Jtem"),
    "a storage of another type": (
        b"\x80\x02(X\x07\x00\x00\x00storagectorch\nSize\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x04tQ.",
        "malformed",
    ),
}


@pytest.mark.parametrize("case", HOSTILE_PICKLES)
def test_hostile_pickles_are_refused_in_bounded_work(tmp_path: Path, case: str) -> None:
    program, report = HOSTILE_PICKLES[case]
    path = _program(tmp_path / "pytorch_model.bin", program)
    with pytest.raises(SourceError, match=report) as caught:
        open_checkpoint(path)
    assert str(path) in str(caught.value)
    assert str(caught.value).isprintable()


def test_a_storage_declared_twice_otherwise_is_refused(tmp_path: Path) -> None:
    for second in (("0", "float32", (8,)), ("0", "float16", (8,))):
        program = sources.torch_program({"a": ("0", "float32", (4,)), "b": second})
        with zipfile.ZipFile(tmp_path / "a.pt", "w") as archive:
            archive.writestr("a/data.pkl", program)
            archive.writestr("a/data/0", bytes(16))
        with pytest.raises(SourceError, match="storage '0' is declared twice, as 4 of float32 and 8 of float"):
            read_tree(tmp_path / "a.pt")


# B8: indices.


@pytest.mark.parametrize("shard", [5, None, 1.5, True, [], {}, "", ".", "..", "a/b", "/etc/passwd", "a\0b", "a\nb"])
def test_shard_names_of_any_type_are_one_line(tmp_path: Path, shard: Any) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": shard}}))
    with pytest.raises(SourceError, match=r"is not an index of shards|outside its folder|lacks 1 of 1") as caught:
        open_checkpoint(tmp_path)
    assert str(caught.value).isprintable()
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"weight_map": []}', "5", "{", '{"weight_map": {"a": "x", "a": "y"}}', "{}"])
def test_hostile_indices_are_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(SourceError, match=r"model.safetensors.index.json is not an index of shards"):
        open_checkpoint(tmp_path)


# What is there in place of weights.


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize(
    ("content", "report"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n", "is a git-LFS pointer, .* git lfs pull"),
        (b"\n <!DOCTYPE html><html>", "is an HTML page"),
        (b"<HTML><body>404", "is an HTML page"),
        (b'<?xml version="1.0"?><Error><Code>AccessDenied', "is an XML document"),
        (b"", "is empty; download it again"),
        (bytes(4096), "holds zeros where its header should be"),
        (b"\x1f\x8b\x08\x00abc", "is a gzip archive; unpack it first"),
    ],
)
def test_what_is_no_weights_is_named(tmp_path: Path, name: str, content: bytes, report: str) -> None:
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / name).write_bytes(content)
    (tmp_path / "source" / "config.json").write_text(json.dumps(sources.upstream_config("t5")))
    refused(tmp_path / "source", tmp_path / "model", f"{name} {report}")


def test_a_pipe_in_place_of_a_file_does_not_wait(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.safetensors")
    with pytest.raises(SourceError, match="is not a regular file"):
        OpenFile(tmp_path / "model.safetensors")
    with pytest.raises(SourceError, match="does not exist"):
        open_checkpoint(tmp_path / "model.safetensors")


def test_texts_from_files_are_shown_in_one_line_of_bounded_length() -> None:
    assert printable("a\x1b[31m\nb\ud800\u202ec") == r"a\x1b[31m\nb\ud800\u202ec"
    assert printable("x" * 1000, 10) == "xxxxxxxxxx... (1000 characters)"
    nested: list[Any] = []
    for _ in range(100_000):
        nested = [nested]
    assert printable(nested) == "a list that cannot be shown"
    assert zlib.crc32(b"") == 0  # an entry without bytes has the CRC-32 of none


# B7, B8, C: numbers and kinds in config.json.


@pytest.mark.parametrize(
    ("network", "place", "value"),
    [
        ("t5", ("num_layers",), 10**9), ("t5", ("num_layers",), 0), ("t5", ("d_model",), -8), ("t5", ("vocab_size",), 2**63),
        ("t5", ("layer_norm_epsilon",), -1.0), ("t5", ("layer_norm_epsilon",), 10**400), ("t5", ("num_heads",), True),
        ("t5", ("relative_attention_max_distance",), 0), ("t5", ("d_kv",), [[[1]]]), ("stdit3", ("depth",), 10**9),
        ("stdit3", ("num_heads",), 0), ("stdit3", ("input_sq_size",), 0), ("stdit3", ("patch_size",), [1, 0, 2]),
        ("stdit3", ("patch_size",), []), ("stdit3", ("mlp_ratio",), 1e30), ("vae", ("micro_frame_size",), 0),
        ("vae", ("micro_frame_size",), True), ("vae", ("micro_frame_size",), 10**9), ("vae", ("vae_2d",), "x"),
        ("vae", ("vae_2d",), [1]), ("vae", ("vae_temporal",), 5), ("vae", ("vae_2d", "layers_per_block"), -1),
        ("vae", ("vae_2d", "down_block_types"), 5), ("vae", ("vae_2d", "norm_num_groups"), 0),
    ],
)  # fmt: skip
def test_impossible_configurations_are_one_report(tmp_path: Path, network: str, place: tuple[str, ...], value: Any) -> None:
    source = sources.write_source(tmp_path / "source", network)
    fields = sources.upstream_config(network)
    container = fields
    for key in place[:-1]:
        container = container[key]
    container[place[-1]] = value
    (source / "config.json").write_text(json.dumps(fields))
    refused(source, tmp_path / "model", place[-1], network)


@pytest.mark.parametrize(
    "text", ['{"depth": NaN}', "[" * 100_000, "[]", "\xff", '{"a": 1, "a": 1}', '{"depth": ' + "9" * 5000 + "}"]
)
def test_configurations_that_are_no_object_are_one_line(tmp_path: Path, text: str) -> None:
    source = sources.write_source(tmp_path / "source", "stdit3")
    (source / "config.json").write_text(text, "latin-1")
    refused(source, tmp_path / "model", r"config\.json (is not a configuration|describes a network)", "stdit3")
