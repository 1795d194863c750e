"""Mutations of safetensors files, of shards with an index, and of configurations.

A mutation takes the folder of an honest source and a generator of random numbers, changes files in place and returns what it
did.  ``HIDING`` names those whose result may hold other values that no shape can betray.
"""

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tests.adversarial import hostile

Mutation = Callable[[Path, np.random.Generator], str]


def _file(folder: Path) -> Path:
    return folder / "model.safetensors"


def _parts(path: Path) -> tuple[dict[str, Any], bytes]:
    content = path.read_bytes()
    (length,) = struct.unpack_from("<Q", content)
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def _join(path: Path, header: Any, data: bytes, padding: bytes = b"") -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) + len(padding)) + text + padding + data)


def _names(header: dict[str, Any]) -> list[str]:
    return [name for name in header if name != "__metadata__"]


def header_bytes(folder: Path, draw: np.random.Generator) -> str:
    """Changes bytes of the header, its length kept true."""
    header, data = _parts(_file(folder))
    text, done = hostile.mutate_bytes(json.dumps(header).encode(), draw)
    _join(_file(folder), text, data)
    return done


def header_values(folder: Path, draw: np.random.Generator) -> str:
    """Puts a hostile value into the header."""
    header, data = _parts(_file(folder))
    scratch = folder / "header.json"
    scratch.write_text(json.dumps(header))
    done = hostile.mutate_json(scratch, draw)
    _join(_file(folder), scratch.read_bytes(), data)
    scratch.unlink()
    return done


def any_bytes(folder: Path, draw: np.random.Generator) -> str:
    """Changes bytes anywhere in the file."""
    content, done = hostile.mutate_bytes(_file(folder).read_bytes(), draw)
    _file(folder).write_bytes(content)
    return done


def data_bit(folder: Path, draw: np.random.Generator) -> str:
    """Flips a bit of a value: the format has no checksum."""
    header, data = _parts(_file(folder))
    changed = bytearray(data)
    at = int(draw.integers(len(data)))
    changed[at] ^= 1 << int(draw.integers(8))
    _join(_file(folder), header, bytes(changed))
    return f"bit of value byte {at}"


def cut(folder: Path, draw: np.random.Generator) -> str:
    """Cuts the file short."""
    size = int(draw.integers(_file(folder).stat().st_size))
    os.truncate(_file(folder), size)
    return f"cut to {size}"


def appended(folder: Path, draw: np.random.Generator) -> str:
    """Appends bytes."""
    count = int(draw.integers(1, 100))
    with open(_file(folder), "ab") as file:
        file.write(bytes(count))
    return f"{count} bytes more"


def header_length(folder: Path, draw: np.random.Generator) -> str:
    """Lies about the length of the header."""
    content = _file(folder).read_bytes()
    length = int(hostile.pick(draw, [0, 1, 2**31, 2**62, 2**64 - 1, len(content), len(content) - 9, int(draw.integers(3000))]))
    _file(folder).write_bytes(struct.pack("<Q", length) + content[8:])
    return f"header of {length} bytes"


def exchanged_spans(folder: Path, draw: np.random.Generator) -> str:
    """Exchanges where two arrays of one shape lie."""
    header, data = _parts(_file(folder))
    names = _names(header)
    first = hostile.pick(draw, names)
    alike = [name for name in names if name != first and header[name]["shape"] == header[first]["shape"]]
    if not alike:
        return exchanged_spans(folder, draw)
    second = hostile.pick(draw, alike)
    header[first], header[second] = header[second], header[first]
    _join(_file(folder), header, data)
    return f"{first} exchanged with {second}"


def transposed_square(folder: Path, draw: np.random.Generator) -> str:
    """Transposes a square matrix."""
    header, data = _parts(_file(folder))
    square = [name for name in _names(header) if len(header[name]["shape"]) == 2 and len(set(header[name]["shape"])) == 1]
    name = hostile.pick(draw, square)
    start, stop = header[name]["data_offsets"]
    matrix = np.frombuffer(data[start:stop], np.float32).reshape(header[name]["shape"])
    _join(_file(folder), header, data[:start] + np.ascontiguousarray(matrix.T).tobytes() + data[stop:])
    return f"{name} transposed"


def not_finite(folder: Path, draw: np.random.Generator) -> str:
    """Makes one value NaN or infinite."""
    header, data = _parts(_file(folder))
    changed = np.frombuffer(data, np.float32).copy()
    changed[draw.integers(changed.size)] = hostile.pick(draw, [np.nan, np.inf, -np.inf])
    _join(_file(folder), header, changed.tobytes())
    return "a value not finite"


def reshaped(folder: Path, draw: np.random.Generator) -> str:
    """Gives an array another shape of as many values."""
    header, data = _parts(_file(folder))
    entry = header[hostile.pick(draw, _names(header))]
    shape = entry["shape"]
    size = int(np.prod(shape))
    entry["shape"] = hostile.pick(
        draw, [[size], [1, *shape], [*shape, 1], [*shape[::-1], 1], [size // 2, 2], [1] * 30 + [size]]
    )
    _join(_file(folder), header, data)
    return f"{shape} to {entry['shape']!s:.40}"


def empty_shape(folder: Path, draw: np.random.Generator) -> str:
    """Adds or replaces an array by one of no values and huge extents."""
    header, data = _parts(_file(folder))
    name = hostile.pick(draw, ["strange", "encoder.final_layer_norm.weight", "encoder.block.0.layer.0.layer_norm.weight"])
    shape = hostile.pick(draw, [[10**18, 0], [0, 10**18], [2**62, 2**62, 0], [0]])
    header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}
    _join(_file(folder), header, data)
    return f"{name} of {shape}"


def renamed(folder: Path, draw: np.random.Generator) -> str:
    """Renames, removes or adds an array."""
    header, data = _parts(_file(folder))
    name = hostile.pick(draw, _names(header))
    new = hostile.pick(
        draw, ["module." + name, name + ".x", name.upper(), name.replace("0", "9"), "", name + "\x1b[2J", "x" * 5000]
    )
    header[new] = header.pop(name)
    _join(_file(folder), header, data)
    return f"{name} is {new!r:.40}"


def harmless(folder: Path, draw: np.random.Generator) -> str:
    """Changes what must change nothing: order, padding, metadata, a wrapper's prefix on all names."""
    header, data = _parts(_file(folder))
    action = int(draw.integers(4))
    padding = b""
    if action == 0:
        names = list(header)
        draw.shuffle(names)
        header = {name: header[name] for name in names}
    elif action == 1:
        padding = b" " * int(draw.integers(1, 5000))
    elif action == 2:
        header["__metadata__"] = {"format": "pt", "note": "x" * int(draw.integers(3000))}
    else:
        header = {name if name == "__metadata__" else f"module.{name}": entry for name, entry in header.items()}
    _join(_file(folder), header, data, padding)
    return ("order", "padding", "metadata", "prefix")[action]


def laid_out_otherwise(folder: Path, draw: np.random.Generator) -> str:
    """Writes the arrays in another order, header and data alike."""
    header, data = _parts(_file(folder))
    names = _names(header)
    draw.shuffle(names)
    pieces, offset = [], 0
    for name in names:
        start, stop = header[name]["data_offsets"]
        pieces.append(data[start:stop])
        header[name]["data_offsets"] = [offset, offset + stop - start]
        offset += stop - start
    _join(_file(folder), header, b"".join(pieces))
    return "another order of the data"


def many(folder: Path, draw: np.random.Generator) -> str:
    """Adds tens of thousands of arrays, or one that nests too deep."""
    header, data = _parts(_file(folder))
    if draw.integers(2):
        header |= {f"x.{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(50_000)}
        _join(_file(folder), header, data)
        return "50,000 arrays"
    _join(_file(folder), hostile.nested(draw).encode(), data)
    return "a nested header"


def something_else(folder: Path, draw: np.random.Generator) -> str:
    """Puts another kind of file in its place."""
    content, done = hostile.instead(draw)
    _file(folder).write_bytes(content)
    return done


def no_file(folder: Path, draw: np.random.Generator) -> str:
    """Puts in its place what is no regular file."""
    path = _file(folder)
    kind = int(draw.integers(5))
    content = path.read_bytes()
    path.unlink()
    if kind == 0:
        os.mkfifo(path)
    elif kind == 1:
        path.mkdir()
    elif kind == 2:
        path.symlink_to(path)
    elif kind == 3:
        path.symlink_to("/dev/zero")
    else:
        (folder / "blob").write_bytes(content)
        path.symlink_to(folder / "blob")  # as in the cache of a hub: must be read
    return ("pipe", "folder", "link to itself", "link to a device", "link to a blob")[kind]


SAFETENSORS: tuple[Mutation, ...] = (
    header_bytes, header_values, any_bytes, data_bit, cut, appended, header_length, exchanged_spans, transposed_square,
    not_finite, reshaped, empty_shape, renamed, harmless, laid_out_otherwise, many, something_else, no_file,
)  # fmt: skip
# Those that change nothing but bytes, names and spans, whatever the dtype of the arrays.
ANY_DTYPE: tuple[Mutation, ...] = (
    header_bytes, header_values, any_bytes, data_bit, cut, header_length, exchanged_spans, renamed, empty_shape,
    laid_out_otherwise,
)  # fmt: skip


def _index(folder: Path) -> Path:
    return folder / "model.safetensors.index.json"


def index_values(folder: Path, draw: np.random.Generator) -> str:
    """Puts a hostile value into the index."""
    return hostile.mutate_json(_index(folder), draw)


def index_bytes(folder: Path, draw: np.random.Generator) -> str:
    """Changes bytes of the index."""
    content, done = hostile.mutate_bytes(_index(folder).read_bytes(), draw)
    _index(folder).write_bytes(content)
    return done


def shard_names(folder: Path, draw: np.random.Generator) -> str:
    """Names hostile files as shards."""
    fields = json.loads(_index(folder).read_text())
    name = hostile.pick(draw, list(fields["weight_map"]))
    shard = hostile.pick(
        draw, [*hostile.VALUES, "..", ".", "../model.safetensors", str(_index(folder)), _index(folder).name, "config.json"]
    )
    fields["weight_map"][name] = shard
    _index(folder).write_text(json.dumps(fields))
    return f"{name} in {shard!r:.30}"


def shards_exchanged(folder: Path, draw: np.random.Generator) -> str:
    """Exchanges, loses, doubles, cuts or replaces shards."""
    first, second = sorted(folder.glob("model-*"))
    action = int(draw.integers(5))
    if action == 0:
        content = first.read_bytes()
        first.write_bytes(second.read_bytes())
        second.write_bytes(content)
    elif action == 1:
        second.unlink()
    elif action == 2:
        shutil.copyfile(first, second)
    elif action == 3:
        os.truncate(second, int(draw.integers(second.stat().st_size)))
    else:
        second.write_bytes(hostile.instead(draw)[0])
    return ("exchanged", "lost", "doubled", "cut", "replaced")[action]


def index_harmless(folder: Path, draw: np.random.Generator) -> str:
    """Reorders the index, or loses its metadata."""
    fields = json.loads(_index(folder).read_text())
    names = list(fields["weight_map"])
    draw.shuffle(names)
    _index(folder).write_text(json.dumps({"weight_map": {name: fields["weight_map"][name] for name in names}}))
    return "reordered"


SHARDS: tuple[Mutation, ...] = (index_values, index_bytes, shard_names, shards_exchanged, index_harmless)


def config_values(folder: Path, draw: np.random.Generator) -> str:
    """Puts a hostile value into config.json."""
    return hostile.mutate_json(folder / "config.json", draw)


def adapter_values(folder: Path, draw: np.random.Generator) -> str:
    """Puts a hostile value into an adapter's configuration."""
    return hostile.mutate_json(folder / "adapter_config.json", draw)


def config_numbers(folder: Path, draw: np.random.Generator) -> str:
    """Puts a hostile number in place of one of config.json."""
    path = folder / "config.json"
    tree = json.loads(path.read_text())
    numeric = [(c, k) for c, k in hostile.places(tree) if isinstance(c[k], int | float) and not isinstance(c[k], bool)]
    container, key = hostile.pick(draw, numeric)
    container[key] = hostile.pick(draw, [*hostile.NUMBERS, container[key] + 1, container[key] * 2, -container[key], 10**7])
    path.write_text(json.dumps(tree))
    return f"{key} = {container[key]}"


def config_bytes(folder: Path, draw: np.random.Generator) -> str:
    """Changes bytes of config.json, or puts something else there."""
    path = folder / "config.json"
    content, done = hostile.mutate_bytes(path.read_bytes(), draw) if draw.integers(4) else hostile.instead(draw)
    path.write_bytes(content)
    return done


def companions(folder: Path, draw: np.random.Generator) -> str:
    """Puts something else in place of the tokenizer."""
    content, done = hostile.instead(draw)
    (folder / "tokenizer.json").write_bytes(content)
    return f"tokenizer: {done}"


CONFIGURATIONS: tuple[Mutation, ...] = (config_values, config_numbers, config_bytes)
ADAPTERS: tuple[Mutation, ...] = (
    header_bytes, header_values, any_bytes, data_bit, cut, appended, header_length, not_finite, reshaped, empty_shape, renamed,
    harmless, laid_out_otherwise, something_else, no_file, adapter_values,
)  # fmt: skip
HIDING: frozenset[Mutation] = frozenset(
    {
        any_bytes,
        header_bytes,
        data_bit,
        exchanged_spans,
        transposed_square,
        adapter_values,
        config_values,
        config_numbers,
        config_bytes,
        companions,
    }
)
