"""Mutations of the zip archive that a PyTorch file is."""

import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tests.adversarial import bases, hostile
from tests.adversarial.weight_files import Mutation

_LOCAL, _LISTED, _END = b"PK\x03\x04", b"PK\x01\x02", b"PK\x05\x06"


def _file(folder: Path) -> Path:
    return folder / "pytorch_model.bin"


def _program_name(parts: dict[str, bytes]) -> str:
    return next(name for name in parts if name.endswith("data.pkl"))


def _storages(parts: dict[str, bytes]) -> list[str]:
    return [name for name in parts if "/data/" in name]


def any_bytes(folder: Path, draw: np.random.Generator) -> str:
    """Changes bytes anywhere."""
    content, done = hostile.mutate_bytes(_file(folder).read_bytes(), draw)
    _file(folder).write_bytes(content)
    return done


def value_bit(folder: Path, draw: np.random.Generator) -> str:
    """Flips a bit of a stored value; its CRC-32 must show it."""
    content = bytearray(_file(folder).read_bytes())
    with zipfile.ZipFile(_file(folder)) as archive:
        entry = hostile.pick(draw, [entry for entry in archive.infolist() if "/data/" in entry.filename])
    name, extra = struct.unpack_from("<2H", content, entry.header_offset + 26)
    at = entry.header_offset + 30 + name + extra + int(draw.integers(entry.file_size))
    content[at] ^= 1 << int(draw.integers(8))
    _file(folder).write_bytes(content)
    return f"bit of {entry.filename}"


def headers(folder: Path, draw: np.random.Generator) -> str:
    """Puts a hostile number into a field of a header, of the directory or of its end."""
    content = bytearray(_file(folder).read_bytes())
    signature, fields = hostile.pick(
        draw,
        [
            (_LOCAL, ((4, "H"), (6, "H"), (8, "H"), (14, "L"), (18, "L"), (22, "L"), (26, "H"), (28, "H"))),
            (
                _LISTED,
                ((8, "H"), (10, "H"), (16, "L"), (20, "L"), (24, "L"), (28, "H"), (30, "H"), (32, "H"), (34, "H"), (42, "L")),
            ),
            (_END, ((4, "H"), (6, "H"), (8, "H"), (10, "H"), (12, "L"), (16, "L"), (20, "H"))),
        ],
    )
    places = []
    at = content.find(signature)
    while at >= 0:
        places.append(at)
        at = content.find(signature, at + 4)
    offset, kind = hostile.pick(draw, fields)
    place = hostile.pick(draw, places) + offset
    (before,) = struct.unpack_from(f"<{kind}", content, place)
    most = 0xFFFF if kind == "H" else 0xFFFFFFFF
    after = hostile.pick(draw, [0, 1, most, most - 1, (before + 4) & most, (before - 4) & most, before ^ 1])
    struct.pack_into(f"<{kind}", content, place, after)
    _file(folder).write_bytes(content)
    return f"{signature[2:].hex()} + {offset}: {before} to {after}"


def cut_or_extended(folder: Path, draw: np.random.Generator) -> str:
    """Cuts the file, or puts bytes before or behind it."""
    content = _file(folder).read_bytes()
    action, count = int(draw.integers(3)), int(draw.integers(1, len(content)))
    junk = draw.bytes(count % 500 + 1)
    _file(folder).write_bytes((content[:count], junk + content, content + junk)[action])
    return f"{('cut', 'before', 'behind')[action]} {count}"


def checksums_off(folder: Path, draw: np.random.Generator) -> str:
    """Writes zeros for every CRC-32, as torch's option does; sometimes flips a bit then, which nothing can show."""
    content = bytearray(_file(folder).read_bytes())
    with zipfile.ZipFile(_file(folder)) as archive:
        entries = archive.infolist()
    for entry in entries:
        content[entry.header_offset + 14 : entry.header_offset + 18] = bytes(4)
    at = content.find(_LISTED)
    while at >= 0:
        content[at + 16 : at + 20] = bytes(4)
        at = content.find(_LISTED, at + 46)
    _file(folder).write_bytes(content)
    return "no CRC-32" + (", " + value_bit(folder, draw) if draw.integers(2) else "")


def packed(folder: Path, draw: np.random.Generator) -> str:
    """Deflates all entries, or the pickle alone, and sometimes damages the result."""
    parts = bases.zip_parts(_file(folder))
    whole = bool(draw.integers(2))
    with zipfile.ZipFile(_file(folder), "w") as archive:
        for name, content in parts.items():
            deflated = whole or name.endswith("data.pkl")
            archive.writestr(name, content, zipfile.ZIP_DEFLATED if deflated else zipfile.ZIP_STORED)
        entry = next(entry for entry in archive.infolist() if entry.filename.endswith("data.pkl"))
    if not draw.integers(2):
        return f"deflated {'all' if whole else 'the pickle'}"
    content = bytearray(_file(folder).read_bytes())
    content[entry.header_offset + 60 + int(draw.integers(entry.compress_size - 40))] ^= 0xFF
    _file(folder).write_bytes(content)
    return "deflated and damaged"


def entries(folder: Path, draw: np.random.Generator) -> str:
    """Loses, renames, adds, empties or enlarges entries."""
    parts = bases.zip_parts(_file(folder))
    root = _program_name(parts).removesuffix("data.pkl")
    storage = hostile.pick(draw, _storages(parts))
    changes: dict[str, Callable[[], Any]] = {
        "lost": lambda: parts.pop(storage),
        "program lost": lambda: parts.pop(root + "data.pkl"),
        "two programs": lambda: parts.update({"b/data.pkl": b"."}),
        "renamed": lambda: parts.update({storage + "\x1b[2J": parts.pop(storage)}),
        "emptied": lambda: parts.update({storage: b""}),
        "cut": lambda: parts.update({storage: parts[storage][:-4]}),
        "longer": lambda: parts.update({storage: parts[storage] + bytes(4)}),
        "big-endian": lambda: parts.update({root + "byteorder": b"big"}),
        "byteorder of 70 MB": lambda: parts.update({root + "byteorder": bytes(70 << 20)}),
        "path": lambda: parts.update({"../../x": b"x", "/etc/x": b"x"}),
        "20,000 more": lambda: parts.update({f"{root}x{i}": b"" for i in range(20_000)}),
    }
    name = hostile.pick(draw, list(changes))
    changes[name]()
    compression = zipfile.ZIP_DEFLATED if name.startswith("byteorder of") else zipfile.ZIP_STORED
    bases.write_zip(_file(folder), parts, compression)
    return f"{name} {storage}"


def twice(folder: Path, draw: np.random.Generator) -> str:
    """Adds a second entry of a name that is there."""
    parts = bases.zip_parts(_file(folder))
    name = hostile.pick(draw, list(parts))
    with zipfile.ZipFile(_file(folder), "a") as archive:
        import warnings

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            archive.writestr(name, bytes(len(parts[name])))
    return f"{name} twice"


def encrypted(folder: Path, draw: np.random.Generator) -> str:
    """Marks entries as encrypted, or as packed by another method."""
    content = bytearray(_file(folder).read_bytes())
    flag, method = hostile.pick(draw, [(1, 0), (0x41, 0), (0x2000, 0), (0, 99), (0, 12), (0, 14), (1, 99)])
    for signature, offset in ((_LOCAL, 6), (_LISTED, 8)):
        at = content.find(signature)
        while at >= 0:
            struct.pack_into("<2H", content, at + offset, flag, method)
            at = content.find(signature, at + 26)
    _file(folder).write_bytes(content)
    return f"flag {flag}, method {method}"


def rewritten(folder: Path, draw: np.random.Generator) -> str:
    """Writes the archive otherwise: in another order, with 64-bit sizes, a comment, or descriptors behind the bytes."""
    parts = bases.zip_parts(_file(folder))
    names = list(parts)
    draw.shuffle(names)
    action = int(draw.integers(4))
    with zipfile.ZipFile(_file(folder), "w") as archive:
        for name in names:
            with archive.open(name, "w", force_zip64=action == 1) as entry:
                entry.write(parts[name])
        if action == 2:
            archive.comment = b"saved again" * int(draw.integers(1, 100))
    if action == 3:
        _through_pipe(_file(folder), parts)
    return ("order", "64-bit sizes", "a comment", "descriptors")[action]


def _through_pipe(path: Path, parts: dict[str, bytes]) -> None:
    class Forward:
        """A file that cannot be rewound, so that sizes follow the bytes."""

        def __init__(self, file: Any):
            self.write, self.flush = file.write, file.flush

    with open(path, "wb") as file, zipfile.ZipFile(Forward(file), "w") as archive:  # type: ignore[arg-type]
        for name, content in parts.items():
            archive.writestr(name, content)


def something_else(folder: Path, draw: np.random.Generator) -> str:
    """Puts another kind of file in its place."""
    content, done = hostile.instead(draw)
    _file(folder).write_bytes(content)
    return done


ARCHIVES: tuple[Mutation, ...] = (
    any_bytes, value_bit, headers, cut_or_extended, checksums_off, packed, entries, twice, encrypted, rewritten, something_else,
)  # fmt: skip
HIDING: frozenset[Mutation] = frozenset({checksums_off})
