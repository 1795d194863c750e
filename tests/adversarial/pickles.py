"""Mutations of the pickle in a PyTorch file, the archive around it and its CRC-32 kept true."""

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


def _file(folder: Path) -> Path:
    return folder / "pytorch_model.bin"


def _change_parts(folder: Path, change: Callable[[dict[str, bytes]], None], compression: int = zipfile.ZIP_STORED) -> None:
    parts = bases.zip_parts(_file(folder))
    change(parts)
    bases.write_zip(_file(folder), parts, compression)


def _program_name(parts: dict[str, bytes]) -> str:
    return next(name for name in parts if name.endswith("data.pkl"))


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


HIDING: frozenset[Mutation] = frozenset({program_bytes, hostile_tensor, aliased, torch_shards})
