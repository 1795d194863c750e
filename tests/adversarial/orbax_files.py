"""Mutations of orbax checkpoints: any file of the folder, as disks, downloads and hands damage it."""

import json
import shutil
from pathlib import Path

import numpy as np

from tests.adversarial import hostile
from tests.adversarial.weight_files import Mutation


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def orbax_bytes(folder: Path, draw: np.random.Generator) -> str:
    """Changes bytes of any file."""
    path = hostile.pick(draw, [path for path in _files(folder) if path.stat().st_size])
    changed, done = hostile.mutate_bytes(path.read_bytes(), draw)
    path.write_bytes(changed)
    return f"{path.name}: {done}"


def orbax_cut(folder: Path, draw: np.random.Generator) -> str:
    """Cuts any file short, empties it, or removes it."""
    path = hostile.pick(draw, _files(folder))
    action = int(draw.integers(3))
    if action == 2:
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2] if action else b"")
    return f"{path.name} {('emptied', 'halved', 'removed')[action]}"


def orbax_exchanged(folder: Path, draw: np.random.Generator) -> str:
    """Puts one file's content into another."""
    first, second = (hostile.pick(draw, _files(folder)) for _ in range(2))
    first.write_bytes(second.read_bytes())
    return f"{first.name} has what {second.name} has"


def orbax_instead(folder: Path, draw: np.random.Generator) -> str:
    """Puts what failed downloads leave in place of a file."""
    path = hostile.pick(draw, _files(folder))
    content, done = hostile.instead(draw)
    path.write_bytes(content)
    return f"{path.name}: {done}"


def orbax_json(folder: Path, draw: np.random.Generator) -> str:
    """Puts a hostile value into a JSON file."""
    path = hostile.pick(draw, [path for path in _files(folder) if _is_json(path)])
    return f"{path.name}: {hostile.mutate_json(path, draw)}"


def orbax_missing_folder(folder: Path, draw: np.random.Generator) -> str:
    """Removes a folder, or puts a file in its place."""
    inner = hostile.pick(draw, sorted(path for path in folder.iterdir() if path.is_dir()))
    shutil.rmtree(inner)
    if draw.integers(2):
        inner.write_bytes(b"a file")
    return f"{inner.name} is no folder"


def _is_json(path: Path) -> bool:
    try:
        return isinstance(json.loads(path.read_bytes()), dict | list)
    except ValueError:
        return False


ORBAX: tuple[Mutation, ...] = (
    orbax_bytes, orbax_cut, orbax_exchanged, orbax_instead, orbax_json, orbax_missing_folder,
)  # fmt: skip
