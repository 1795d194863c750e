"""Mutations of GGUF files, and of the scales of eight-bit floats."""

import struct
from pathlib import Path

import numpy as np

from tests.adversarial import hostile
from tests.adversarial.weight_files import Mutation, _file, _join, _names, _parts


def _gguf(folder: Path) -> Path:
    return folder / "model.gguf"


def _values_start(content: bytes) -> int:
    """Returns about where the values begin: behind the last name of a tensor."""
    return content.rindex(b".weight") + len(b".weight") + 40


def gguf_header(folder: Path, draw: np.random.Generator) -> str:
    """Changes bytes of the header."""
    content = _gguf(folder).read_bytes()
    start = _values_start(content)
    changed, done = hostile.mutate_bytes(content[:start], draw)
    _gguf(folder).write_bytes(changed + content[start:])
    return done


def gguf_numbers(folder: Path, draw: np.random.Generator) -> str:
    """Puts a hostile number of eight bytes anywhere into the header."""
    content = _gguf(folder).read_bytes()
    at = int(draw.integers(8, _values_start(content) - 8))
    number = int(hostile.pick(draw, [0, 1, 7, 2**31, 2**32 - 1, 2**40, 2**63, 2**64 - 1, len(content)]))
    _gguf(folder).write_bytes(content[:at] + struct.pack("<Q", number) + content[at + 8 :])
    return f"{number} at byte {at}"


def gguf_counts(folder: Path, draw: np.random.Generator) -> str:
    """Lies about the number of tensors or of fields."""
    content = _gguf(folder).read_bytes()
    at, number = int(draw.choice([8, 16])), int(hostile.pick(draw, [0, 1, 5, 19, 10**6, 2**63]))
    _gguf(folder).write_bytes(content[:at] + struct.pack("<Q", number) + content[at + 8 :])
    return f"count {number} at byte {at}"


def gguf_types(folder: Path, draw: np.random.Generator) -> str:
    """Gives a tensor another type or offset."""
    content = _gguf(folder).read_bytes()
    names = [b"attn_q.weight", b"ffn_up.weight", b"token_embd.weight", b"output_norm.weight"]
    name = names[int(draw.integers(len(names)))]
    at = content.index(name) + len(name)
    (dimensions,) = struct.unpack_from("<I", content, at)
    at += 4 + 8 * dimensions
    kind = int(hostile.pick(draw, [0, 1, 2, 3, 4, 8, 9, 10, 12, 24, 28, 30, 39, 10**6]))
    _gguf(folder).write_bytes(content[:at] + struct.pack("<I", kind) + content[at + 4 :])
    return f"{name.decode()} of type {kind}"


def gguf_data(folder: Path, draw: np.random.Generator) -> str:
    """Flips a bit of a value: the format has no checksum."""
    content = bytearray(_gguf(folder).read_bytes())
    at = int(draw.integers(_values_start(bytes(content)) + 64, len(content)))
    content[at] ^= 1 << int(draw.integers(8))
    _gguf(folder).write_bytes(bytes(content))
    return f"bit of byte {at}"


def gguf_cut(folder: Path, draw: np.random.Generator) -> str:
    """Cuts the file short, or appends to it."""
    content = _gguf(folder).read_bytes()
    size = int(draw.integers(len(content) + 200))
    _gguf(folder).write_bytes(content[:size] + bytes(max(0, size - len(content) + 40)))
    return f"{size} of {len(content)} bytes"


def gguf_instead(folder: Path, draw: np.random.Generator) -> str:
    """Puts another kind of file in its place."""
    content, done = hostile.instead(draw)
    _gguf(folder).write_bytes(content)
    return done


def lost_scale(folder: Path, draw: np.random.Generator) -> str:
    """Renames, reshapes or doubles a scale, so that its matrix has none."""
    header, data = _parts(_file(folder))
    name = hostile.pick(draw, [name for name in _names(header) if name.endswith("scale_weight")])
    action = int(draw.integers(3))
    if action == 0:
        header[name + "s"] = header.pop(name)
    elif action == 1:
        header[name]["shape"] = [1, 1, 0]
        header[name]["data_offsets"][1] = header[name]["data_offsets"][0]
    else:
        header[name.replace("scale_weight", "weight_scale")] = {
            "dtype": "F32",
            "shape": [],
            "data_offsets": [len(data), len(data) + 4],
        }
        data += struct.pack("<f", 3.0)
    _join(_file(folder), header, data)
    return f"{name}: {('renamed', 'emptied', 'doubled')[action]}"


GGUF: tuple[Mutation, ...] = (gguf_header, gguf_numbers, gguf_counts, gguf_types, gguf_data, gguf_cut, gguf_instead)
HIDING: frozenset[Mutation] = frozenset({gguf_header, gguf_numbers, gguf_data})
