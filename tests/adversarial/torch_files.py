"""Mutations of PyTorch files: of the zip archive around them, and of the pickle within, its CRC-32 kept true."""

import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tests.adversarial import bases, hostile
from tests.adversarial.weight_files import Mutation
from tests.support import sources

_LOCAL, _LISTED, _END = b"PK\x03\x04", b"PK\x01\x02", b"PK\x05\x06"


def _file(folder: Path) -> Path:
    return folder / "pytorch_model.bin"


def _change_parts(folder: Path, change: Callable[[dict[str, bytes]], None], compression: int = zipfile.ZIP_STORED) -> None:
    parts = bases.zip_parts(_file(folder))
    change(parts)
    bases.write_zip(_file(folder), parts, compression)


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


def program_bytes(folder: Path, draw: np.random.Generator) -> str:
    """Changes bytes of the pickle."""
    done = ""

    def change(parts: dict[str, bytes]) -> None:
        nonlocal done
        name = _program_name(parts)
        parts[name], done = hostile.mutate_bytes(parts[name], draw)

    _change_parts(folder, change)
    return done


def _nested(code: bytes, count: int) -> bytes:
    return b"\x80\x04)" + b"\x85" * count + code


PROGRAMS: dict[str, bytes] = {
    "os.system": b"\x80\x02cos\nsystem\nX\x02\x00\x00\x00id\x85R.",
    "builtins.eval": b"\x80\x04\x8c\x08builtins\x8c\x04eval\x93\x8c\x031+1\x85R.",
    "torch.load": b"\x80\x02ctorch\nload\nX\x01\x00\x00\x00x\x85R.",
    "a new object": b"\x80\x02ccollections\nOrderedDict\n)\x81.",
    "attributes of a function": b"\x80\x02ccollections\nOrderedDict\n}b.",
    "an extension": b"\x80\x02\x82\x01.",
    "nothing": b"\x80\x02.",
    "no end": b"\x80\x02}",
    "2,000,000 lists": b"\x80\x02" + b"]" * 2_000_000 + b".",
    "an integer of 10 MB": b"\x80\x02\x8b" + struct.pack("<i", 10**7) + b"\x7f" * 10**7 + b".",
    "an integer of 2 GB": b"\x80\x02\x8b" + struct.pack("<i", 2**31 - 1) + b"\x7f" * 100 + b".",
    "decimals": b"\x80\x02L" + b"9" * 100_000 + b"L\n.",
    "text of 2**62 bytes": b"\x80\x04\x8d" + struct.pack("<Q", 2**62) + b"x.",
    "nested tuples": _nested(b".", 300_000),
    "nested tuples as a module": _nested(b"\x8c\x01x\x93.", 300_000),
    "nested tuples as a storage": _nested(b"Q.", 300_000),
    "nested tuples as a key": b"\x80\x04}" + _nested(b"Ns.", 300_000)[2:],
    "nested tuples called": b"\x80\x04ctorch\nSize\n" + _nested(b"R.", 300_000)[2:],
    "nested lists": b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".",
    "nested dictionaries": b"\x80\x02" + b"}K\x01" * 50_000 + b"}" + b"s" * 50_000 + b".",
    "a list in itself": b"\x80\x02]q\x00h\x00a.",
    "a dictionary in itself": b"\x80\x02}q\x00X\x05\x00\x00\x00modelh\x00s.",
    "lists of the same list": b"\x80\x02"
    + b"".join(b"](" + b"h%c" % max(i - 1, 0) * (200 * bool(i)) + b"eq%c" % i for i in range(60))
    + b".",
    "a huge memo": b"\x80\x02}r\xff\xff\xff\x7f.",
    "a name of 10 MB": b"\x80\x02}X" + struct.pack("<L", 10**7) + b"x" * 10**7 + b"K\x01s.",
    "control characters": b"\x80\x02c\x1b[2J\nsys\x07tem\n.",
    "a frame of 2**62": b"\x80\x04\x95" + struct.pack("<Q", 2**62) + b"}.",
    "marks": b"\x80\x02" + b"(" * 500_000 + b".",
    "pickled by protocol 0": pickle.dumps({"a": 1}, protocol=0),
    "pickled by protocol 5": pickle.dumps({"a": [1, (2.5, "x")]}, protocol=5),
}


def hostile_program(folder: Path, draw: np.random.Generator) -> str:
    """Puts a hostile pickle in place of the program."""
    done = hostile.pick(draw, list(PROGRAMS))
    compression = zipfile.ZIP_DEFLATED if draw.integers(2) else zipfile.ZIP_STORED
    _change_parts(folder, lambda parts: parts.update({_program_name(parts): PROGRAMS[done]}), compression)
    return done


def _rewrite(folder: Path, tree: Any) -> None:
    """Writes the file anew from a tree that may hold impossible tensors."""
    sources.write_torch_file(_file(folder), tree)


def hostile_tensor(folder: Path, draw: np.random.Generator) -> str:
    """Describes a known or unknown tensor by hostile numbers."""
    arrays = dict(bases.base("t5").arrays)
    first = next(iter(arrays.values()))
    numbers = [0, 1, 2, 8, -1, 10**6, 10**18, 2**63, 10**38, 10**60, 1.5, "8", None, True]
    count = int(draw.integers(1, 4))
    shape: Any = tuple(hostile.pick(draw, numbers) for _ in range(count))
    strides: Any = tuple(hostile.pick(draw, numbers) for _ in range(count + int(draw.integers(5) == 0)))
    if not draw.integers(4):
        shape, strides = hostile.pick(draw, [((40000, 40000), (0, 0)), ((1,) * 70, (1,) * 70), ([8], (1,)), ((8, 8), (0, 0))])
    name = hostile.pick(draw, [*arrays, "strange"])
    length = first.size if draw.integers(4) else hostile.pick(draw, numbers)
    dtype = hostile.pick(draw, ["float32", "float32", "float16", "int64"])
    arrays[name] = sources.torch_tensor("0", dtype, length, shape=shape, strides=strides)
    _rewrite(folder, arrays)
    return f"{name}: {dtype} {shape!s:.30} {strides!s:.30} of {length}"


def aliased(folder: Path, draw: np.random.Generator) -> str:
    """Lets two names of one shape mean the same storage, or transposes a square by its strides."""
    arrays = dict(bases.base("t5").arrays)
    square = [name for name, array in arrays.items() if array.ndim == 2 and len(set(array.shape)) == 1]
    first, second = (str(name) for name in draw.choice(square, 2, replace=False))
    arrays[first] = arrays[first].T if draw.integers(2) else arrays[second]
    _rewrite(folder, arrays)
    return f"{first} transposed or {second}"


def wrapped(folder: Path, draw: np.random.Generator) -> str:
    """Puts the state dict into a training checkpoint, or tensors into views: must be read as before."""
    arrays = dict(bases.base("t5").arrays)
    tree: Any = hostile.pick(
        draw, [{"ema": arrays}, {"model": arrays, "step": 3}, {"state_dict": arrays, "opt": {"lr": 0.1, "a": [1, (2,)]}}]
    )
    if draw.integers(2):
        tree = {name: np.repeat(array, 2, axis=0)[::2] if draw.integers(2) else array for name, array in arrays.items()}
    _rewrite(folder, tree)
    return f"{list(tree)[:2]}"


def other_tree(folder: Path, draw: np.random.Generator) -> str:
    """Saves something else than a state dict of tensors."""
    arrays = dict(bases.base("t5").arrays)
    name = str(draw.choice(list(arrays)))
    trees: list[Any] = [{}, [], 5, None, "x", {"model": 3}, {"a": {"b": {"c": arrays}}}, {"model": {}, "ema": []}]
    trees += [list(arrays.items()), {n: a for n, a in arrays.items() if n != name}, arrays | {5: arrays[name]}]
    values = (5, {"a": arrays[name]}, arrays[name].astype(np.float16), arrays[name][:1], np.full_like(arrays[name], np.nan))
    trees += [arrays | {name: value} for value in values] + [arrays | {"\x1b[2J": arrays[name]}]
    which = int(draw.integers(len(trees)))
    _rewrite(folder, trees[which])
    return f"tree {which}"


PICKLES: tuple[Mutation, ...] = (
    program_bytes,
    hostile_program,
    hostile_program,
    hostile_tensor,
    hostile_tensor,
    aliased,
    wrapped,
    other_tree,
)


def torch_shards(folder: Path, draw: np.random.Generator) -> str:
    """Mutates one shard of several."""
    path = hostile.pick(draw, sorted(folder.glob("pytorch_model-*")))
    action = int(draw.integers(3))
    if action == 0:
        content, done = hostile.mutate_bytes(path.read_bytes(), draw)
        path.write_bytes(content)
    elif action == 1:
        os.truncate(path, int(draw.integers(path.stat().st_size)))
        done = "cut"
    else:
        parts = bases.zip_parts(path)
        name = _program_name(parts)
        parts[name], done = hostile.mutate_bytes(parts[name], draw)
        bases.write_zip(path, parts)
    return f"{path.name}: {done}"


HIDING: frozenset[Mutation] = frozenset({checksums_off, program_bytes, hostile_tensor, aliased, torch_shards})
