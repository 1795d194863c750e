"""The engine of weight conversion: declarative rules from PyTorch names and layouts to ours, and back.

A table (``t5.py``, ``stdit3.py``, ``vae.py``) is a list of ``Rule``; this module matches it against a checkpoint's names
and shapes (``make_plan``) and then converts the values (``Assignment.apply``).  Invariant: every source array is used,
ignored for a stated reason or reported, and every parameter of the network is set exactly once; all faults are raised
together.  No file is read or written here, and no network is named.
"""

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np

from convert_weights.encodings import FLOAT8, encoding_of
from convert_weights.errors import printable

Shape = tuple[int, ...]

SOURCE_DTYPES = ("float32", "bfloat16", "float16")

_WRAPPERS = ("module.", "_orig_mod.")
_MAX_FAULT = 1000  # characters
_MAX_LISTED = 200


class ConversionError(ValueError):
    """A checkpoint does not fit the network; ``faults`` lists every reason, one line each, the message the first 200."""

    def __init__(self, subject: str, faults: Sequence[str]):
        self.faults = tuple(printable(fault, _MAX_FAULT) for fault in faults)
        lines = [*self.faults[:_MAX_LISTED]]
        if len(self.faults) > _MAX_LISTED:
            lines.append(f"... and {len(self.faults) - _MAX_LISTED} more")
        count = f"{len(self.faults)} fault{'s' * (len(self.faults) != 1)}"
        super().__init__(f"{printable(subject, _MAX_FAULT)}: {count}\n  " + "\n  ".join(lines))


@dataclasses.dataclass(frozen=True)
class Transform:
    """An invertible change of layout that turns the first axis into the last one, or keeps it first.

    Large arrays are therefore converted a few rows at a time: ``apply`` of some rows is a slice of ``apply`` of all, along
    the target's last axis or, if ``keeps_rows``, its first.  ``shape`` maps a source shape to the target's and returns None
    for one it does not take; ``apply`` and ``inverse`` return views where possible.  ``inverse`` yields the first of the
    accepted source layouts; a reshape to the recorded source shape makes the others.
    """

    name: str
    shape: Callable[[Shape], Shape | None]
    apply: Callable[[np.ndarray], np.ndarray]
    inverse: Callable[[np.ndarray], np.ndarray]
    keeps_rows: bool = False


def _permutation(name: str, axes: tuple[int, ...]) -> Transform:
    back = tuple(int(axis) for axis in np.argsort(axes))
    return Transform(
        name,
        lambda shape: tuple(shape[axis] for axis in axes) if len(shape) == len(axes) else None,
        lambda x: x.transpose(axes),
        lambda x: x.transpose(back),
    )


def _linear_or_conv1x1_shape(shape: Shape) -> Shape | None:
    pointwise = len(shape) == 2 or (len(shape) == 4 and shape[2:] == (1, 1))
    return (shape[1], shape[0]) if pointwise else None


IDENTITY = Transform("identity", lambda shape: shape, lambda x: x, lambda x: x, keeps_rows=True)
LINEAR = _permutation("linear", (1, 0))  # [O, I] -> (I, O)
CONV2D = _permutation("conv2d", (2, 3, 1, 0))  # [O, I, H, W] -> (H, W, I, O)
CONV3D = _permutation("conv3d", (2, 3, 4, 1, 0))  # [O, I, D, H, W] -> (D, H, W, I, O)
LINEAR_OR_CONV1X1 = Transform(  # [O, I] or [O, I, 1, 1] -> (I, O)
    "linear_or_conv1x1", _linear_or_conv1x1_shape, lambda x: x.reshape(x.shape[:2]).T, lambda x: x.T
)
CHANNELS = Transform(  # [1, C, 1, 1, 1] -> (C,)
    "channels",
    lambda shape: (shape[1],) if len(shape) == 5 and shape == (1, shape[1], 1, 1, 1) else None,
    lambda x: x.reshape(-1),
    lambda x: x.reshape(1, -1, 1, 1, 1),
    keeps_rows=True,
)


@dataclasses.dataclass(frozen=True, eq=False)
class Rule:
    """One line of a table.

    ``{i}``-like placeholders in ``source`` match integers and are repeated in ``target``; several rules may name the same
    target (spellings of different library versions), of which a checkpoint must contain exactly one.

    Attributes:
      source: name in the PyTorch state dict.
      target: our flat name; None for an array that is only checked.
      transform: change of layout.
      duplicate_of: a source name; where the checkpoint has it, this array must equal it bit for bit and is dropped.
      expected: the value the array must have, to float rounding (arrays that are a formula's value, not weights).
    """

    source: str
    target: str | None
    transform: Transform = IDENTITY
    duplicate_of: str | None = None
    expected: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class Header:
    """Shape and dtype name of a source array, known before its values are read."""

    shape: Shape
    dtype: str


@dataclasses.dataclass(frozen=True, eq=False)
class Assignment:
    """A source array matched with the rule that takes it and, unless it is only checked, with its target."""

    source: str
    target: str | None
    rule: Rule
    duplicate_of: str | None = None

    def apply(self, array: np.ndarray, dtype: str = "float32") -> np.ndarray:
        """Returns the array in the target's layout, C-contiguous, rounded to ``dtype`` (half to even)."""
        return np.ascontiguousarray(self.rule.transform.apply(array).astype(numpy_dtype(dtype), copy=False))

    def faults(self, array: np.ndarray) -> list[str]:
        """Returns what is wrong with the values: NaN, infinity, or another value than the rule expects."""
        bad = int(array.size - np.count_nonzero(np.isfinite(array)))
        if bad:
            return [f"{self.source}: {bad} of {array.size} values are NaN or infinite"]
        if self.rule.expected is None:
            return []
        # One rounding to the stored dtype, and the float32 rounding of the exponent that the formula amplifies.
        rounding = float(ml_dtypes.finfo(array.dtype).eps) + 16 * float(np.finfo(np.float32).eps)
        got, expected = array.astype(np.float64), self.rule.expected.astype(np.float64)
        if np.allclose(got, expected, rtol=rounding, atol=0.0):
            return []
        worst = float(np.max(np.abs(got - expected)))
        return [
            f"{self.source}: differs from its formula by up to {worst:.3g}; this network computes it and takes no other value"
        ]


@dataclasses.dataclass(frozen=True)
class Plan:
    """What becomes of every source array; usable only if ``faults`` is empty.

    Attributes:
      assignments: the arrays that a rule takes.
      ignored: the arrays that are dropped, with the reason.
      faults: everything that names, shapes and dtypes show.
      unfit: source names whose shape or dtype does not fit; their values are not to be read, because the sizes in a header
        that does not fit may be anything.
    """

    assignments: tuple[Assignment, ...]
    ignored: Mapping[str, str]
    faults: tuple[str, ...]
    unfit: frozenset[str] = frozenset()


def make_plan(
    rules: Sequence[Rule],
    ignored: Mapping[str, str],
    headers: Mapping[str, Header],
    expected: Mapping[str, Shape],
    *,
    allow_mixed_dtypes: bool = False,
) -> Plan:
    """Returns the assignment of every source array, with every fault that names, shapes and dtypes show.

    Args:
      rules: the network's table.
      ignored: source patterns that are dropped, with the reason.
      headers: the checkpoint's arrays by name; a ``module.`` (or ``_orig_mod.``) before all of them is understood.
      expected: shapes of all the network's parameters by flat name.
      allow_mixed_dtypes: accept a checkpoint whose arrays differ in dtype.
    """
    matchers = [(_pattern(rule.source), rule) for rule in rules]
    ignorers = [(_pattern(pattern), reason) for pattern, reason in ignored.items()]
    prefix = common_prefix(headers)
    by_bare_name = {name.removeprefix(prefix): name for name in headers}
    assignments: list[Assignment] = []
    dropped: dict[str, str] = {}
    faults: list[str] = []
    unfit: set[str] = set()
    for name, header in headers.items():
        bare = name.removeprefix(prefix)
        matches = [(match, rule) for pattern, rule in matchers if (match := pattern.fullmatch(bare))]
        reasons = [reason for pattern, reason in ignorers if pattern.fullmatch(bare)]
        if matches:
            match, rule = matches[0]
            target = rule.target.format(**match.groupdict()) if rule.target is not None else None
            duplicate_of = by_bare_name.get(rule.duplicate_of) if rule.duplicate_of else None
            assignment = Assignment(name, target, rule, duplicate_of)
            assignments.append(assignment)
            if found := _header_faults(assignment, header, headers, expected):
                faults += found
                unfit.add(name)
        elif reasons:
            dropped[name] = reasons[0]
        else:
            faults.append(f"{name}: unknown array {list(header.shape)}; no rule of this network takes it")
    faults += _coverage_faults(assignments, expected)
    if not allow_mixed_dtypes:
        faults += _mixed_dtype_faults(assignments, headers)
    return Plan(tuple(assignments), dropped, tuple(faults), frozenset(unfit))


def common_prefix(names: Iterable[str]) -> str:
    """Returns the wrappers' prefix (``module.`` of DDP and ColossalAI, ``_orig_mod.`` of torch.compile) of all names."""
    prefix, names = "", list(names)
    while names and (found := [wrapper for wrapper in _WRAPPERS if all(name.startswith(prefix + wrapper) for name in names)]):
        prefix += found[0]
    return prefix


def target_of(rules: Sequence[Rule], name: str) -> str | None:
    """Returns the parameter that an array of this name sets, in whichever spelling; None where there is none."""
    for rule in rules:
        if rule.target is not None and (match := _pattern(rule.source).fullmatch(name)):
            return rule.target.format(**match.groupdict())
    return None


def takes(rules: Sequence[Rule], names: Iterable[str]) -> int:
    """Returns how many names a table takes."""
    matchers = [_pattern(rule.source) for rule in rules]
    return sum(any(pattern.fullmatch(name) for pattern in matchers) for name in names)


def sources_of(rules: Sequence[Rule], target: str) -> list[tuple[str, Rule]]:
    """Returns the PyTorch names that set a parameter, with their rules: the usual spelling first."""
    return [
        (rule.source.format(**match.groupdict()), rule)
        for rule in rules
        if rule.target is not None and rule.duplicate_of is None and (match := _pattern(rule.target).fullmatch(target))
    ]


def convert_arrays(plan: Plan, arrays: Mapping[str, Any], *, subject: str, dtype: str = "float32") -> dict[str, np.ndarray]:
    """Returns the converted arrays by flat name.

    Raises:
      ConversionError: the plan has faults, or values are not finite or not as required; everything at once.
    """
    faults = list(plan.faults)
    flat: dict[str, np.ndarray] = {}
    for assignment in plan.assignments:
        if assignment.source in plan.unfit:
            continue  # reported by the plan
        array = to_numpy(arrays[assignment.source])
        found = assignment.faults(array)
        if assignment.duplicate_of:
            other = to_numpy(arrays[assignment.duplicate_of])
            if (other.shape, other.dtype) == (array.shape, array.dtype) and other.tobytes() != array.tobytes():
                found = [f"{assignment.source}: differs from {assignment.duplicate_of}, to which it must be tied"]
        faults += found
        if found or assignment.duplicate_of or assignment.target is None:
            continue
        flat[assignment.target] = assignment.apply(array, dtype)
        if not np.isfinite(flat[assignment.target]).all():
            faults.append(f"{assignment.source}: values overflow {dtype}")
    if faults:
        raise ConversionError(subject, faults)
    return flat


def to_numpy(array: Any) -> np.ndarray:
    """Returns a NumPy array (or JAX array, or PyTorch tensor of any device and dtype) as NumPy, bits unchanged."""
    if hasattr(array, "detach"):
        array = array.detach().cpu()
        name = str(array.dtype).removeprefix("torch.")
        if name == "bfloat16" or name in FLOAT8:  # NumPy has no such types; float32 holds every value
            return array.float().numpy().astype(numpy_dtype(name))
        return array.numpy()
    return np.asarray(array)


def numpy_dtype(name: str) -> np.dtype:
    """Returns the NumPy dtype of a dtype name."""
    return FLOAT8[name] if name in FLOAT8 else np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)


def _is_packed(dtype: str) -> bool:
    """Returns whether values of a dtype are decoded to float32 when they are read."""
    return dtype not in SOURCE_DTYPES and encoding_of(dtype) is not None


def _pattern(template: str) -> re.Pattern[str]:
    """Returns the regular expression of a template: ``{i}`` is an integer, ``{*}`` any text."""
    parts = re.split(r"\{(\w+|\*)\}", template)
    literal = [re.escape(part) for part in parts[::2]]
    groups = [".*" if name == "*" else f"(?P<{name}>0|[1-9][0-9]*)" for name in parts[1::2]]
    return re.compile("".join(text for pair in zip(literal, [*groups, ""], strict=True) for text in pair))


def _header_faults(
    assignment: Assignment, header: Header, headers: Mapping[str, Header], expected: Mapping[str, Shape]
) -> list[str]:
    name, rule, target = assignment.source, assignment.rule, assignment.target
    faults = []
    if header.dtype not in SOURCE_DTYPES and not _is_packed(header.dtype):
        faults.append(f"{name}: dtype {header.dtype}; expected one of {', '.join(SOURCE_DTYPES)}")
    if rule.expected is not None and header.shape != rule.expected.shape:
        faults.append(f"{name}: shape {list(header.shape)}; expected {list(rule.expected.shape)}")
    if assignment.duplicate_of and headers[assignment.duplicate_of] != header:
        faults.append(f"{name}: shape or dtype differs from {assignment.duplicate_of}, to which it must be tied")
    if target is None:
        return faults
    if target not in expected:
        faults.append(f"{name}: unknown array; it would set {target}, which this configuration does not have")
        return faults
    shape = rule.transform.shape(header.shape)
    if shape is None or shape != tuple(expected[target]):
        faults.append(
            f"{name}: shape {list(header.shape)} does not become {list(expected[target])} of {target} ({rule.transform.name})"
        )
    return faults


def _coverage_faults(assignments: Iterable[Assignment], expected: Mapping[str, Shape]) -> list[str]:
    setters: dict[str, list[str]] = {}
    for assignment in assignments:
        if assignment.target is not None and not assignment.duplicate_of:
            setters.setdefault(assignment.target, []).append(assignment.source)
    faults = [f"{target}: missing; no source array sets it" for target in expected if target not in setters]
    return faults + [
        f"{target}: set {len(names)} times, by {', '.join(names)}" for target, names in setters.items() if len(names) > 1
    ]


def _mixed_dtype_faults(assignments: Iterable[Assignment], headers: Mapping[str, Header]) -> list[str]:
    names: dict[str, list[str]] = {}
    assignments = list(assignments)
    if any(_is_packed(headers[assignment.source].dtype) for assignment in assignments):
        return []  # who packs values leaves some as they were, on purpose
    for assignment in assignments:
        dtype = headers[assignment.source].dtype
        if assignment.rule.expected is None and dtype in SOURCE_DTYPES:
            names.setdefault(dtype, []).append(assignment.source)
    if len(names) < 2:
        return []
    usual = max(names, key=lambda dtype: len(names[dtype]))
    return [
        f"{name}: dtype {dtype}, but {len(names[usual])} other arrays are {usual}; allow mixed dtypes if this was intended"
        for dtype, group in names.items()
        if dtype != usual
        for name in group
    ]
