"""Runs the cases of a fixture folder and reports one row per tensor.

Invariant: every way in which a case can go wrong - a missing file, a file without a case, damage, an exception, a tensor
too many or too few, a value beyond its limit - becomes a row that counts as a failure; nothing is skipped in silence.
A suite is a module of this package:

    cases(folder) -> {case: fixture file}              what config.json and the layout promise
    compute(folder, case) -> {tensor key: array}       for .safetensors fixtures, in the fixture's own keys and layout
    check(folder, case) -> [difference, ...]           for .json fixtures, empty where all is equal

The runner prints nothing and knows no network.
"""

import collections
import dataclasses
import gc
import importlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np

from tests.parity import limits
from tests.parity.fixtures import (
    MANIFESTS,
    FixtureError,
    find_suites,
    is_fixture,
    is_input,
    misfit_inputs,
    missing_tensors,
    read_json,
    read_tensors,
)

PASS, FAIL, PENDING = "pass", "fail", "pending"


class NotYet(Exception):
    """Raised by a suite for a case whose feature does not exist yet."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """The verdict on one tensor, or on a whole case where ``tensor`` is empty."""

    suite: str
    case: str
    tensor: str = ""
    verdict: str
    max_abs: float | None = None
    rel_l2: float | None = None
    limit_max_abs: float | None = None
    limit_rel_l2: float | None = None
    note: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One fixture: its suite's module and folder, and the file that config.json promises."""

    suite: str
    name: str
    folder: Path
    path: Path


def load_suite(suite: str) -> ModuleType:
    """Returns the module that computes a suite."""
    return importlib.import_module(f"tests.parity.{suite}")


def list_cases(suite: str, folder: Path) -> list[Case]:
    """Returns the cases of a suite in the order of its module.

    Raises:
      FixtureError: config.json is missing or damaged.
    """
    try:
        promised = load_suite(suite).cases(folder)
    except (ImportError, OSError, ValueError, KeyError, TypeError, AttributeError) as fault:
        raise FixtureError(f"the cases of {suite} cannot be listed: {_line(fault)}") from fault
    return [Case(suite=suite, name=name, folder=folder, path=path) for name, path in promised.items()]


def run_folder(folder: Path, dump: Path | None = None) -> Iterator[Row]:
    """Yields the rows of every suite in a fixture folder; ``dump`` receives the computed tensors.

    Raises:
      FixtureError: the folder is unusable.
    """
    for suite, place in find_suites(folder).items():
        try:
            cases = list_cases(suite, place)
        except FixtureError as fault:
            yield Row(suite=suite, case="*", verdict=FAIL, note=str(fault))
            continue
        yield from orphans(suite, place, cases)
        for case in cases:
            yield from run_case(case, dump)
            gc.collect()


def run_case(case: Case, dump: Path | None = None) -> list[Row]:
    """Returns the rows of one case."""
    if not case.path.is_file():
        return [_failure(case, f"{case.path.name} is missing")]
    try:
        if case.path.suffix == ".json":
            differences = load_suite(case.suite).check(case.folder, case.name)
            return [_failure(case, difference) for difference in differences] or [_whole(case, PASS, "equal")]
        reference = read_tensors(case.path)
        computed = {key: np.asarray(value) for key, value in load_suite(case.suite).compute(case.folder, case.name).items()}
    except NotYet as pending:
        return [_whole(case, PENDING, f"not yet: {pending}")]
    except FixtureError as fault:
        return [_failure(case, str(fault))]
    except Exception as fault:  # whatever a damaged fixture provokes in the code under test is that case's failure
        return [_failure(case, _line(fault))]
    if dump is not None:
        _write(dump / case.suite / f"{case.name}.safetensors", computed)
    return _judge(case, reference, computed)


def _judge(case: Case, reference: dict[str, np.ndarray], computed: dict[str, np.ndarray]) -> list[Row]:
    outputs = [key for key in reference if not is_input(key)]
    missing = missing_tensors(case.suite, case.name, config_entry(case), reference)
    rows = [dataclasses.replace(_failure(case, "the fixture lacks this tensor"), tensor=key) for key in missing]
    misfits = misfit_inputs(reference)
    rows += [dataclasses.replace(_failure(case, "batch differs from the latents'"), tensor=key) for key in misfits]
    for key in sorted(outputs):
        if key not in computed:
            rows.append(dataclasses.replace(_failure(case, "not computed"), tensor=key))
            continue
        result = limits.compare(computed[key], reference[key], limits.limit_for(case.suite, case.name, key))
        rows.append(
            Row(
                suite=case.suite,
                case=case.name,
                tensor=key,
                verdict=PASS if result.passed else FAIL,
                max_abs=result.max_abs,
                rel_l2=result.rel_l2,
                limit_max_abs=result.limit_max_abs,
                limit_rel_l2=result.limit_rel_l2,
                note=result.note,
            )
        )
    return rows


def config_entry(case: Case) -> dict[str, object]:
    """Returns the case's entry in config.json, empty where the folder has no config or the case is part of the layout."""
    path = case.folder / "config.json"
    if not path.is_file():
        return {}
    config = read_json(path)
    return {**config.get("cases", {}), **config.get("ods_cases", {})}.get(case.name, {})


def orphans(suite: str, folder: Path, cases: list[Case]) -> list[Row]:
    """Returns failures for files that no case claims, and for files that two cases claim."""
    claimed = collections.Counter(case.path.resolve() for case in cases)
    notes = {path.name: f"claimed by {count} cases" for path, count in claimed.items() if count > 1}
    if suite != MANIFESTS:
        files = [path for path in sorted(folder.iterdir()) if path.is_file() and is_fixture(path, suite)]
        notes |= {path.name: "a file without a case in config.json" for path in files if path.resolve() not in claimed}
    return [Row(suite=suite, case=name, verdict=FAIL, note=note) for name, note in notes.items()]


def _write(path: Path, tensors: dict[str, np.ndarray]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    from safetensors.numpy import save_file

    save_file({key: np.asarray(value, order="C") for key, value in tensors.items()}, path)


def _whole(case: Case, verdict: str, note: str) -> Row:
    return Row(suite=case.suite, case=case.name, verdict=verdict, note=note)


def _failure(case: Case, note: str) -> Row:
    return _whole(case, FAIL, note)


def _line(fault: BaseException) -> str:
    lines = str(fault).strip().splitlines()
    return f"{type(fault).__name__}: {lines[0] if lines else ''}"[:300]
