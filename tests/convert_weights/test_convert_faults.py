"""No damaged checkpoint is converted: 400 seeded changes of state dicts and files, each of which must be reported.

Changes that no reader of the format could notice are not made: a square matrix transposed, two arrays of one shape
exchanged, or a bit of a value flipped (safetensors files carry no checksum).
"""

import json
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save

from convert_weights import convert
from convert_weights.checkpoint import convert_checkpoint
from convert_weights.errors import SourceError
from convert_weights.rules import ConversionError
from tests.support import sources

OPTIONAL = {"rope.freqs", "encoder.embed_tokens.weight"}  # a formula's value, and a tied copy: may be absent
CHANGES_PER_KIND = 12

Arrays = dict[str, np.ndarray]


def _drop(arrays: Arrays, name: str, draw: np.random.Generator) -> str:
    del arrays[name]
    return "missing"


def _rename(arrays: Arrays, name: str, draw: np.random.Generator) -> str:
    new = draw.choice([name + "_", "module." + name, name.replace(".", "_", 1) + "x", name.upper(), name[1:]])
    arrays[new] = arrays.pop(name)
    return f"{new}: unknown array"


def _renumber(arrays: Arrays, name: str, draw: np.random.Generator) -> str:
    """Adds the array again under the number of a block that the configuration does not have."""
    parts = name.split(".")
    numbers = [i for i, part in enumerate(parts) if part.isdigit()]
    if not numbers:
        return _rename(arrays, name, draw)
    parts[numbers[0]] = str(int(parts[numbers[0]]) + 100)
    arrays[".".join(parts)] = arrays[name]
    return f"{'.'.join(parts)}: unknown array"


def _duplicate(arrays: Arrays, name: str, draw: np.random.Generator) -> str:
    spellings = {"to_q.": "query.", "to_k.": "key.", "to_v.": "value.", "to_out.0.": "proj_attn."}
    for new, old in spellings.items():
        if f"attentions.0.{new}" in name:
            arrays[name.replace(new, old)] = arrays[name]
            return "set 2 times"
    arrays[name + ".copy"] = arrays[name]
    return f"{name}.copy: unknown array"


def _transpose(arrays: Arrays, name: str, draw: np.random.Generator) -> str:
    array = arrays[name]
    if len(set(array.shape)) < 2:
        return _reshape(arrays, name, draw)
    while array.shape == arrays[name].shape:
        array = arrays[name].transpose(draw.permutation(array.ndim))
    arrays[name] = np.ascontiguousarray(array)
    return f"{name}: shape"


def _reshape(arrays: Arrays, name: str, draw: np.random.Generator) -> str:
    array = arrays[name]
    shapes = [(array.size,), (1, *array.shape), (*array.shape, 1), (array.shape[0], 1, *array.shape[1:])]
    shapes = [shape for shape in shapes if shape != array.shape]
    arrays[name] = array.reshape(shapes[draw.integers(len(shapes))])
    return f"{name}: shape"


def _resize(arrays: Arrays, name: str, draw: np.random.Generator) -> str:
    axis = draw.integers(arrays[name].ndim)
    arrays[name] = (
        np.concatenate([arrays[name], arrays[name]], axis=axis) if draw.integers(2) else arrays[name].take([], axis=axis)
    )
    return f"{name}: shape"


def _retype(arrays: Arrays, name: str, draw: np.random.Generator) -> str:
    arrays[name] = arrays[name].astype(draw.choice(["float64", "float16", "int8", "int32", "int64", "bool"]))
    return f"{name}: (dtype|shape or dtype)"


def _poison(arrays: Arrays, name: str, draw: np.random.Generator) -> str:
    arrays[name] = arrays[name].copy()
    arrays[name].reshape(-1)[draw.integers(arrays[name].size)] = draw.choice([np.nan, np.inf, -np.inf])
    return f"{name}: (1 of|differs from)"


KINDS = [_drop, _rename, _renumber, _duplicate, _transpose, _reshape, _resize, _retype, _poison]


def _changed(network: str, kind: Callable[..., str], draw: np.random.Generator) -> tuple[Arrays, str, str]:
    arrays = sources.state_dict(network)
    names = [name for name in arrays if kind is not _drop or name not in OPTIONAL]
    name = str(draw.choice(names))
    return arrays, name, kind(arrays, name, draw)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__.strip("_"))
@pytest.mark.parametrize("network", sources.NETWORKS)
def test_no_changed_state_dict_is_accepted(network: str, kind: Callable[..., str]) -> None:
    """27 cases of 12 changes: 324."""
    config = sources.golden_config(network)
    draw = np.random.default_rng([sources.NETWORKS.index(network), KINDS.index(kind)])
    for _ in range(CHANGES_PER_KIND):
        arrays, name, report = _changed(network, kind, draw)
        with pytest.raises(ConversionError) as caught:
            convert(network, arrays, config)
        assert any(_matches(report, fault) for fault in caught.value.faults), (name, report, caught.value.faults[:5])


def _matches(report: str, fault: str) -> bool:
    return re.search(report if "|" in report else re.escape(report), fault) is not None


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__.strip("_"))
def test_no_changed_file_is_accepted_and_nothing_is_written(tmp_path: Path, kind: Callable[..., str]) -> None:
    """The same changes through files: 36 of them; the report is that of the in-memory engine, and no directory is made."""
    draw = np.random.default_rng([7, KINDS.index(kind)])
    for i in range(4):
        arrays, _, _ = _changed("t5", kind, draw)
        source = sources.write_source(tmp_path / f"source{i}", "t5", arrays)
        with pytest.raises(ConversionError) as caught:
            convert_checkpoint("t5", source, tmp_path / f"model{i}")
        assert not (tmp_path / f"model{i}").exists()
        with pytest.raises(ConversionError) as expected:
            convert("t5", arrays, sources.golden_config("t5"))
        assert set(caught.value.faults) == set(expected.value.faults)


def _truncate(content: bytes, draw: np.random.Generator) -> bytes:
    return content[: draw.integers(len(content))]


def _extend(content: bytes, draw: np.random.Generator) -> bytes:
    return content + bytes(int(draw.integers(1, 9)))


def _header(content: bytes) -> tuple[dict[str, Any], bytes]:
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def _joined(text: str, data: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode() + data


def _lengthen_header(content: bytes, draw: np.random.Generator) -> bytes:
    return struct.pack("<Q", struct.unpack("<Q", content[:8])[0] + int(draw.integers(1, 2**40))) + content[8:]


def _shift(content: bytes, draw: np.random.Generator) -> bytes:
    fields, data = _header(content)
    name = draw.choice([key for key in fields if key != "__metadata__"])
    fields[name]["data_offsets"][draw.integers(2)] += int(draw.choice([-4, 4]))
    return _joined(json.dumps(fields), data)


def _relabel(content: bytes, draw: np.random.Generator) -> bytes:
    fields, data = _header(content)
    fields[draw.choice([key for key in fields if key != "__metadata__"])]["dtype"] = str(
        draw.choice(["BF16", "F8_E4M3", "I32", "F64", "?"])
    )
    return _joined(json.dumps(fields), data)


def _name_twice(content: bytes, draw: np.random.Generator) -> bytes:
    fields, data = _header(content)
    name = draw.choice([key for key in fields if key != "__metadata__"])
    text = json.dumps(fields)
    return _joined(text[:-1] + f", {json.dumps(name)}: {json.dumps(fields[name])}}}", data)


FILE_CHANGES = [_truncate, _extend, _lengthen_header, _shift, _relabel, _name_twice]


@pytest.mark.parametrize("change", FILE_CHANGES, ids=lambda change: change.__name__.strip("_"))
def test_no_damaged_safetensors_file_is_accepted(tmp_path: Path, change: Callable[..., bytes]) -> None:
    """6 cases of 8 changes: 48."""
    draw = np.random.default_rng([8, FILE_CHANGES.index(change)])
    source = sources.write_source(tmp_path / "source", "t5")
    content = save(sources.state_dict("t5"))
    for _ in range(8):
        (source / "model.safetensors").write_bytes(change(content, draw))
        with pytest.raises((SourceError, ConversionError)):
            convert_checkpoint("t5", source, tmp_path / "model")
        assert not (tmp_path / "model").exists()


def test_a_pytorch_file_that_ends_early_is_not_accepted(tmp_path: Path) -> None:
    source = sources.write_source(tmp_path / "source", "t5")
    (source / "model.safetensors").unlink()
    path = sources.write_torch_file(source / "pytorch_model.bin", sources.state_dict("t5"))
    content = path.read_bytes()
    for length in np.random.default_rng(9).integers(0, len(content), 12):
        path.write_bytes(content[:length])
        with pytest.raises(SourceError):
            convert_checkpoint("t5", source, tmp_path / "model")
        assert not (tmp_path / "model").exists()


def test_faults_of_names_and_of_values_are_in_one_report(tmp_path: Path) -> None:
    arrays = sources.state_dict("stdit3")
    arrays["strange"] = np.zeros(3, np.float32)
    arrays["final_layer.linear.bias"] = np.zeros(5, np.float32)
    arrays["t_block.1.bias"][3] = np.nan
    arrays["rope.freqs"] *= 1.01
    arrays["y_embedder.y_proj.fc1.weight"] = arrays["y_embedder.y_proj.fc1.weight"].astype(np.float64)
    del arrays["spatial_blocks.1.attn.q_norm.weight"]
    source = sources.write_source(tmp_path / "source", "stdit3", arrays)
    with pytest.raises(ConversionError, match="6 faults") as caught:
        convert_checkpoint("stdit3", source, tmp_path / "model")
    assert {fault.partition(":")[0] for fault in caught.value.faults} == {
        "strange",
        "final_layer.linear.bias",
        "t_block.1.bias",
        "rope.freqs",
        "y_embedder.y_proj.fc1.weight",
        "spatial_blocks.1.attn.q_norm.scale",
    }
