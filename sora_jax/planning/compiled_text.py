"""A compiled program read from its text: its operations, loops, collectives, and the bytes that move to and from memory.

Invariant: only what XLA prints is read; an operation of a kind that is not known here counts all its operands and results.
Bytes are those of the arrays, without the padding of tiles; arrays that lie in a TPU's fast memory count nothing.

Source: https://openxla.org/xla/operation_semantics, and XLA's own count (HloCostAnalysis), which takes each loop once.
"""

import dataclasses
import functools
import re
from collections.abc import Iterator, Mapping, Sequence

_BITS = {"pred": 8, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16, "s32": 32, "u32": 32, "s64": 64, "u64": 64}
_BITS |= {"f16": 16, "bf16": 16, "f32": 32, "f64": 64, "c64": 64, "c128": 128}
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\](?:\{([^}]*)\})?")
_FAST = "S(1)"  # a TPU's vector memory, in the layout of an array
_HEADER = re.compile(r"(ENTRY )?%([\w.$-]+) \(.*\{$")
_NAME = re.compile(r"%([\w.$-]+)")
_CALLED = re.compile(r"(?:calls|to_apply|body|branch_computations|called_computations|true_computation|false_computation)=")
_TRIPS = re.compile(r'"?known_trip_count"?:\s*\{"?n"?:\s*"?(\d+)"?\}')

COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "ragged-all-to-all", "collective-permute", "reduce-scatter")
_HOST = ("infeed", "outfeed", "send", "recv")
_HOST_CALLS = ("callback", "MoveToHost", "MoveToDevice")
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id", "iota"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Operation:
    """One line of a computation.

    Attributes:
      name: its name.
      kind: such as ``fusion``.
      shape: its result, as printed.
      operands: names, in order.
      rest: what follows the operands.
      text: what stands in place of the operands; the value of a constant.
      root: whether it is the computation's result.
    """

    name: str
    kind: str
    shape: str
    operands: Sequence[str]
    rest: str
    text: str
    root: bool

    @functools.cached_property
    def nbytes(self) -> int:
        """Bytes of its result in main memory."""
        return shape_bytes(self.shape)

    @functools.cached_property
    def called(self) -> Sequence[str]:
        """Names of the computations that it runs, the condition of a loop excepted."""
        names: list[str] = []
        for match in _CALLED.finditer(self.rest):
            end = re.match(r"\{[^}]*\}|%[\w.$-]+", self.rest[match.end() :])
            names += _NAME.findall(end[0]) if end else []
        return names


@dataclasses.dataclass(frozen=True, kw_only=True)
class Collective:
    """Operations of one kind between devices: how many are run, and the bytes that each device brings to them."""

    kind: str
    number: int
    nbytes: int


class CompiledText:
    """The text of one compiled program, as ``jax.stages.Compiled.as_text`` prints it."""

    def __init__(self, text: str):
        self._computations: dict[str, dict[str, Operation]] = {}
        self.entry = ""
        current: dict[str, Operation] = {}
        for line in text.splitlines():
            header = None if line.startswith(" ") else _HEADER.match(line)
            if header:
                current = self._computations.setdefault(header[2], {})
                self.entry = header[2] if header[1] else self.entry
            elif (operation := _operation(line)) is not None:
                current[operation.name] = operation

    def dtypes(self) -> set[str]:
        """Returns the element types of all results."""
        operations = (operation for part in self._computations.values() for operation in part.values())
        return {match[1] for operation in operations for match in _ARRAY.finditer(operation.shape)}

    def host_transfers(self) -> list[str]:
        """Returns the operations that exchange data with the host, by kind or by what they call."""
        found = []
        for part in self._computations.values():
            for operation in part.values():
                called = re.search(r'custom_call_target="([^"]*)"', operation.rest)
                if operation.kind.removesuffix("-start").removesuffix("-done") in _HOST:
                    found.append(operation.kind)
                elif called and any(name in called[1] for name in _HOST_CALLS):
                    found.append(called[1])
        return found

    def loops(self) -> int:
        """Returns how many loops the program has whose number of turns its text does not hold."""
        operations = (operation for part in self._computations.values() for operation in part.values())
        return sum(operation.kind == "while" and self._trips(operation) is None for operation in operations)

    def collectives(self) -> list[Collective]:
        """Returns what moves between devices; a loop counts with its turns, one of unknown number once."""
        totals: dict[str, list[int]] = {}
        for operation, part, times in self._run(self.entry, 1):
            kind = operation.kind.removesuffix("-start")
            if kind in COLLECTIVES:
                total = totals.setdefault(kind, [0, 0])
                total[0] += times
                total[1] += times * sum(part[name].nbytes for name in operation.operands if name in part)
        return [Collective(kind=kind, number=number, nbytes=nbytes) for kind, (number, nbytes) in sorted(totals.items())]

    def moved_bytes(self) -> int:
        """Returns the bytes that operations read from and write to main memory; loops as in `collectives`."""
        return sum(times * self._moved(operation, part) for operation, part, times in self._run(self.entry, 1))

    def _run(self, computation: str, times: int) -> Iterator[tuple[Operation, Mapping[str, Operation], int]]:
        """Yields every operation that is run, where it stands, and how often; fused ones are one operation."""
        part = self._computations.get(computation, {})
        for operation in part.values():
            if operation.kind in ("while", "call", "conditional", "async-start"):
                turns = (self._trips(operation) or 1) if operation.kind == "while" else 1
                for called in operation.called:
                    yield from self._run(called, times * turns)
            else:
                yield operation, part, times

    def _trips(self, loop: Operation) -> int | None:
        """Returns the turns of a loop: as printed, or the constant that its condition compares a counter from 0 with."""
        if known := _TRIPS.search(loop.rest):
            return int(known[1])
        named = re.search(r"condition=%([\w.$-]+)", loop.rest)
        part = self._computations.get(named[1], {}) if named else {}
        root = next((operation for operation in part.values() if operation.root), None)
        if root is None or root.kind != "compare" or "direction=LT" not in root.rest:
            return None
        limit = part.get(root.operands[1])
        return int(limit.text) if limit is not None and limit.kind == "constant" and limit.text.isdecimal() else None

    def _moved(self, operation: Operation, part: Mapping[str, Operation]) -> int:
        """Returns the bytes that one operation reads and writes."""
        if operation.kind in _FREE or operation.kind.endswith("-done"):
            return 0
        if operation.kind.endswith("-start"):
            return 2 * sum(part[name].nbytes for name in operation.operands[:1] if name in part)
        if operation.kind in ("dynamic-slice", "slice", "gather"):
            return 2 * operation.nbytes
        if operation.kind == "dynamic-update-slice":
            return 2 * _bytes_of(part, operation.operands[1])
        if operation.kind != "fusion":
            return operation.nbytes + sum(_bytes_of(part, name) for name in operation.operands)
        (inner,) = operation.called
        read = sum(self._read(inner, index, _bytes_of(part, name)) for index, name in enumerate(operation.operands))
        return read + self._written(inner, operation.nbytes)

    def _read(self, computation: str, index: int, whole: int) -> int:
        """Returns the bytes that a fusion reads of its operand: a slice where it uses nothing else of it."""
        part = self._computations.get(computation, {})
        name = next((one.name for one in part.values() if one.kind == "parameter" and one.text == str(index)), None)
        total = 0
        for user in (one for one in part.values() if name in one.operands):
            if user.kind == "dynamic-slice" or user.kind == "slice":
                total += user.nbytes
            elif user.kind == "fusion":
                total += sum(self._read(user.called[0], at, whole) for at, one in enumerate(user.operands) if one == name)
            elif user.kind == "dynamic-update-slice" and user.operands[0] == name:
                continue  # written in place
            else:
                return whole
        return min(total, whole)

    def _written(self, computation: str, whole: int) -> int:
        """Returns the bytes that a fusion writes: an update where its result is an operand with a part replaced."""
        part = self._computations.get(computation, {})
        root = next((one for one in part.values() if one.root), None)
        while root is not None and root.kind == "bitcast":
            root = part.get(root.operands[0])
        if root is None:
            return whole
        if root.kind == "dynamic-update-slice":
            return min(whole, _bytes_of(part, root.operands[1]))
        return min(whole, self._written(root.called[0], whole)) if root.kind == "fusion" else whole


def shape_bytes(shape: str) -> int:
    """Returns the bytes of an array or of a tuple of them, as XLA prints its shape; those in fast memory count nothing."""
    total = 0
    for kind, extents, layout in _ARRAY.findall(shape):
        if _FAST not in layout:
            size = 1
            for extent in extents.split(",") if extents else ():
                size *= int(extent)
            total += -(-size * _bits(kind) // 8)
    return total


def _bits(kind: str) -> int:
    return 8 if kind.startswith("f8") else _BITS.get(kind, 0)  # a token has no bytes


def _bytes_of(part: Mapping[str, Operation], name: str) -> int:
    return part[name].nbytes if name in part else 0


def _operation(line: str) -> Operation | None:
    """Returns what one line says, or None where it is no operation."""
    match = re.match(r"\s+(ROOT )?%([\w.$-]+) = ", line)
    if match is None:
        return None
    rest = line[match.end() :]
    shape = rest[: _closing(rest, 0) + 1] if rest.startswith("(") else rest.split(" ", 1)[0]
    kind, opening, _ = rest[len(shape) + 1 :].partition("(")
    if not opening:
        return None
    begin = len(shape) + 1 + len(kind)
    end = _closing(rest, begin)
    inside = rest[begin + 1 : end]
    return Operation(
        name=match[2],
        kind=kind,
        shape=shape,
        operands=tuple(_NAME.findall(inside)),
        rest=rest[end + 1 :],
        text=inside,
        root=match[1] is not None,
    )


def _closing(text: str, opening: int) -> int:
    """Returns where the bracket that opens at an index is closed."""
    depth = 0
    for index in range(opening, len(text)):
        depth += {"(": 1, ")": -1}.get(text[index], 0)
        if depth == 0:
            return index
    return len(text)
