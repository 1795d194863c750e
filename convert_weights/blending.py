"""Numbers that a conversion makes from more than one source: a weighted mean of checkpoints, and adapters of low rank.

Invariant: everything is computed in float32, a few rows at a time, before the values are rounded to the stored dtype; what does
not fit the network is reported with the other faults, and no value of it is read. Which sources there are is recorded by
`checkpoint`.
Source of the adapters: PEFT's LoRA, ``W + scale * alpha / rank * B A``.
"""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from convert_weights.errors import SourceError, printable, shown
from convert_weights.json_text import read_object
from convert_weights.readers import Checkpoint, open_checkpoint
from convert_weights.rules import LINEAR, Plan, Rule, common_prefix, target_of
from convert_weights.source_array import Array
from convert_weights.source_file import OpenFile

_ADAPTER_CONFIG = "adapter_config.json"
_MAX_CONFIG_BYTES = 1 << 20
_MAX_RANK, _MAX_SCALE = 4096, 1e4
_MAX_FACTOR_BYTES = 256 << 20  # of the two factors of one matrix
_ADAPTER_NAME = re.compile(r"(?:base_model\.model\.)?(?P<module>.+)\.lora_(?P<factor>[AB])(?:\.default)?\.weight")
# What changes an adapter's meaning, with the values that mean nothing.
_PLAIN: Mapping[str, tuple[Any, ...]] = {
    "bias": ("none",), "use_dora": (False, None), "fan_in_fan_out": (False, None), "modules_to_save": (None, []),
    "rank_pattern": ({}, None), "alpha_pattern": ({}, None), "lora_bias": (False, None),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Weighted:
    """Another checkpoint of the same network, and its weight in the mean."""

    path: Path
    weight: float


@dataclasses.dataclass(frozen=True)
class Scaled:
    """An adapter of low rank, and what it is multiplied with."""

    path: Path
    scale: float


@dataclasses.dataclass(frozen=True)
class Adapter:
    """The two factors of one matrix, (rank, in) and (out, rank), and what their product is multiplied with."""

    a: Array
    b: Array
    scale: float


@dataclasses.dataclass(frozen=True)
class Blend:
    """What is added to the arrays of a checkpoint, by their names in it.

    Attributes:
      weight: what the checkpoint's own values are multiplied with.
      others: for each array the same array of the other checkpoints, with its weight.
      adapters: for a matrix the adapters that change it.
    """

    weight: float = 1.0
    others: Mapping[str, Sequence[tuple[Array, float]]] = dataclasses.field(default_factory=dict)
    adapters: Mapping[str, Sequence[Adapter]] = dataclasses.field(default_factory=dict)

    def changes(self, name: str) -> bool:
        """Returns whether an array's values become others."""
        return bool(self.others.get(name) or self.adapters.get(name))

    def arrays(self) -> list[Array]:
        """Returns every array of another source."""
        others = [array for group in self.others.values() for array, _ in group]
        return others + [each for group in self.adapters.values() for adapter in group for each in (adapter.a, adapter.b)]

    def opened(self, name: str, files: Mapping[Path, OpenFile]) -> "Mixer":
        """Returns what changes the rows of one array; reads the factors of its adapters."""
        return Mixer(self, name, files)


UNCHANGED = Blend()


class Mixer:
    """Changes the rows of one array, in any order."""

    def __init__(self, blend: Blend, name: str, files: Mapping[Path, OpenFile]):
        self._weight, self._files = np.float32(blend.weight), files
        self._others = [(array, np.float32(weight), array.read_scale(files)) for array, weight in blend.others.get(name, ())]
        self._factors = [_factors(adapter, files) for adapter in blend.adapters.get(name, ())]

    def rows(self, values: np.ndarray, start: int) -> np.ndarray:
        """Returns rows that begin at ``start``, mixed, as float32 of their shape."""
        mixed = values.astype(np.float32)
        if self._others:
            mixed *= self._weight
        for array, weight, scale in self._others:
            mixed += weight * self._read(array, scale, start, len(values)).astype(np.float32).reshape(mixed.shape)
        for b, a in self._factors:
            mixed += (b[start : start + len(values)] @ a).reshape(mixed.shape)
        return mixed

    def _read(self, array: Array, scale: np.ndarray | None, start: int, count: int) -> np.ndarray:
        file = self._files[array.file]
        if not array.contiguous:
            return np.ascontiguousarray(array.read_strided(file)[start : start + count])
        stop = start + count if array.tensor.shape else 1
        row_bytes = array.nbytes // max(array.tensor.shape[0] if array.tensor.shape else 1, 1)
        return array.decoded(array.read(file, start, stop, np.empty(max(row_bytes * count, 1), np.uint8)), scale)


def _factors(adapter: Adapter, files: Mapping[Path, OpenFile]) -> tuple[np.ndarray, np.ndarray]:
    a, b = (np.ascontiguousarray(each.read_strided(files[each.file])).astype(np.float32) for each in (adapter.a, adapter.b))
    for array, values in ((adapter.a, a), (adapter.b, b)):
        if wrong := values.size - np.count_nonzero(np.isfinite(values)):
            raise SourceError(f"{array.file}: {array.name}: {wrong} of {values.size} values are NaN or infinite.")
    return b * np.float32(adapter.scale), a


def parse(text: str, kind: type, default: float | None) -> Any:
    """Returns what ``PATH:NUMBER`` means; the number may be missing where there is a default.

    Raises:
      ValueError: the number is missing, no number, or out of range.
    """
    path, colon, number = text.rpartition(":")
    try:
        value = float(number) if colon and path else None
    except ValueError:
        value = None
    if value is None and default is None:
        raise ValueError(f"{text!r} has no weight; expected SOURCE:WEIGHT, such as step2000.pt:0.5.")
    if value is None:
        return kind(Path(text), default)
    if not math.isfinite(value) or abs(value) > _MAX_SCALE:
        raise ValueError(f"{text!r}: {number} is no weight; expected a number within {_MAX_SCALE:g}.")
    return kind(Path(path), value)


def own_weight(merged: Sequence[Weighted]) -> float:
    """Returns the weight of the first checkpoint in a mean: what the others leave of 1.

    Raises:
      ValueError: a weight is none, or they leave nothing.
    """
    if any(not 0 < each.weight < 1 for each in merged) or not (own := 1 - math.fsum(each.weight for each in merged)) > 0:
        weights = ", ".join(f"{each.weight:g}" for each in merged)
        raise ValueError(f"merged with the weights {weights}; expected numbers above 0 that leave SOURCE a part of 1.")
    return own


def others_of(plan: Plan, others: Sequence[tuple[Plan, Checkpoint, float]]) -> dict[str, list[tuple[Array, float]]]:
    """Returns for each array of a plan the arrays of other checkpoints that set the same parameter, with their weights."""
    found: dict[str, list[tuple[Array, float]]] = {}
    for other, checkpoint, weight in others:
        sources = {a.target: a.source for a in other.assignments if a.target is not None and not a.duplicate_of}
        for assignment in plan.assignments:
            if assignment.target in sources and not assignment.duplicate_of:
                pair = (checkpoint.arrays[sources[assignment.target]], weight)
                found.setdefault(assignment.source, []).append(pair)
    return found


@dataclasses.dataclass(frozen=True)
class OpenedAdapter:
    """An adapter that was matched with the arrays of a checkpoint; ``faults`` where it was not."""

    checkpoint: Checkpoint
    adapters: Mapping[str, Adapter]
    faults: tuple[str, ...]
    record: Mapping[str, Any]


def open_adapter(asked: Scaled, plan: Plan, rules: Sequence[Rule], headers: Mapping[str, Any]) -> OpenedAdapter:
    """Returns an adapter in PEFT's names, matched with the matrices of a plan; reads headers and its configuration.

    Its modules may have another spelling than the checkpoint's arrays, as long as the network's table knows both.

    Raises:
      SourceError: it cannot be read, or its configuration asks for what is not implemented.
    """
    checkpoint = open_checkpoint(_file_of(asked.path))
    factors: dict[str, dict[str, Array]] = {}
    faults: list[str] = []
    for name, array in checkpoint.arrays.items():
        match = _ADAPTER_NAME.fullmatch(name)
        if match is None:
            faults.append(
                f"{asked.path}: {name}: no factor of an adapter; expected names like base_model.model.X.lora_A.weight"
            )
        elif match["factor"] in factors.setdefault(match["module"], {}):
            faults.append(f"{asked.path}: {name}: a second factor {match['factor']} of {match['module']}")
        else:
            factors[match["module"]][match["factor"]] = array
    alpha, rank, root = _read_config(checkpoint.folder)
    prefix = common_prefix(headers)
    matrices = {a.target: a for a in plan.assignments if a.rule.transform is LINEAR and not a.duplicate_of}
    adapters: dict[str, Adapter] = {}
    for module, pair in factors.items():
        assignment = matrices.get(target_of(rules, f"{module.removeprefix(prefix)}.weight"))
        shape = headers[assignment.source].shape if assignment else None
        problem = _problem(pair, shape, rank)
        if assignment is not None and assignment.source in adapters:
            problem = f"{assignment.source} has a pair of factors already"
        if problem or assignment is None:
            faults.append(f"{asked.path}: {module}: {problem or 'no matrix of this network'}")
            continue
        own = pair["A"].tensor.shape[0]
        factor = (own if alpha is None else alpha) / (math.sqrt(own) if root else own)
        adapters[assignment.source] = Adapter(pair["A"], pair["B"], asked.scale * factor)
    record = {"scale": asked.scale, "alpha": alpha, "rank": rank, "matrices": len(adapters)}
    return OpenedAdapter(checkpoint, adapters, tuple(faults), record)


def _file_of(path: Path) -> Path:
    """Returns the file of an adapter's folder as PEFT names it."""
    names = ("adapter_model.safetensors", "adapter_model.bin")
    return next((path / name for name in names if (path / name).is_file()), path)


def _problem(pair: Mapping[str, Array], shape: tuple[int, ...] | None, rank: int | None) -> str:
    if shape is None:
        return "no matrix of this network"
    if pair.keys() != {"A", "B"}:
        return f"lora_{'A' if 'B' in pair else 'B'} is missing"
    a, b = pair["A"].tensor.shape, pair["B"].tensor.shape
    if len(a) != 2 or len(b) != 2 or (b[0], a[1]) != tuple(shape) or a[0] != b[1] or not 0 < a[0] <= _MAX_RANK:
        return f"factors {list(b)} and {list(a)} do not multiply to {list(shape)}"
    if rank is not None and a[0] != rank:
        return f"rank {a[0]}; {_ADAPTER_CONFIG} says {rank}"
    if any(each.tensor.dtype not in ("float32", "float16", "bfloat16") for each in pair.values()):
        return f"dtype {pair['A'].tensor.dtype}; expected float32, float16 or bfloat16"
    if 4 * (math.prod(a) + math.prod(b)) > _MAX_FACTOR_BYTES:
        return f"factors of more than {_MAX_FACTOR_BYTES >> 20} MiB"
    return ""


def _read_config(folder: Path) -> tuple[float | None, int | None, bool]:
    """Returns alpha, rank, and whether alpha is divided by the rank's root; without a file alpha is the rank."""
    path = folder / _ADAPTER_CONFIG
    if not path.is_file():
        return None, None, False
    fields = read_object(path, "an adapter's configuration", max_bytes=_MAX_CONFIG_BYTES)
    alpha: Any = fields.get("lora_alpha")
    rank, root = fields.get("r"), fields.get("use_rslora") or False
    wrong = [f"{key} {shown(fields[key], 40)}" for key, plain in _PLAIN.items() if key in fields and fields[key] not in plain]
    if str(fields.get("peft_type", "LORA")).upper() != "LORA":
        wrong.append(f"peft_type {shown(fields['peft_type'], 40)}")
    if type(alpha) not in (int, float) or not math.isfinite(alpha) or abs(alpha) > _MAX_SCALE:
        wrong.append(f"lora_alpha {shown(alpha, 40)}")
    if type(rank) is not int or not 0 < rank <= _MAX_RANK:
        wrong.append(f"r {shown(rank, 40)}")
    if type(root) is not bool:
        wrong.append(f"use_rslora {shown(root, 40)}")
    if wrong:
        raise SourceError(f"{path} asks for {printable(', '.join(wrong), 300)}; only plain LoRA on linear maps is implemented.")
    return float(alpha), rank, root
