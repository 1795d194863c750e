"""Command line of the parity runner: ``python -m tests.parity DIR [--json F] [--dump OUT] [--allow-pending]``.

Exit status 0: every case passed; 1: a case failed, or is pending without ``--allow-pending``; 2: the folder is unusable
or nothing was run.
"""

import collections
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import jax

from sora_jax.shell import BAD_INPUT, INTERRUPTED, Parser
from tests.parity.fixtures import FixtureError
from tests.parity.runner import FAIL, PASS, PENDING, Row, run_folder


def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser(prog="python -m tests.parity", description="Compare with fixtures made by the PyTorch reference.")
    parser.add_argument("folder", type=Path, metavar="DIR", help="a fixture folder, or one of its suites")
    parser.add_argument("--json", type=Path, metavar="F", help="write every row as JSON")
    parser.add_argument("--dump", type=Path, metavar="OUT", help="write every computed tensor to OUT/SUITE/CASE.safetensors")
    parser.add_argument("--allow-pending", action="store_true", help="cases not implemented yet do not fail")
    options = parser.parse_args(arguments)
    try:
        rows = []
        for row in run_folder(options.folder, options.dump):
            rows.append(row)
            print(_format(row), flush=True)
        status = exit_status(rows, allow_pending=options.allow_pending)
        if options.json:
            options.json.write_text(json.dumps(_report(rows, status), indent=1) + "\n", encoding="utf-8")
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        return INTERRUPTED
    except (FixtureError, OSError) as fault:
        print(f"error: {fault}", file=sys.stderr)
        return BAD_INPUT
    print(_summary(rows))
    return status


def exit_status(rows: Sequence[Row], *, allow_pending: bool) -> int:
    """Returns 0 where all passed, 1 where something failed, 2 where nothing was run."""
    counts = collections.Counter(row.verdict for row in rows)
    if counts[FAIL] or (counts[PENDING] and not allow_pending):
        return 1
    return 0 if counts[PASS] else 2


def _report(rows: Sequence[Row], status: int) -> dict[str, object]:
    return {
        "exit_status": status,
        "counts": dict(collections.Counter(row.verdict for row in rows)),
        "jax": jax.__version__,
        "device": jax.devices()[0].device_kind,
        "rows": [dataclasses.asdict(row) for row in rows],
    }


def _format(row: Row) -> str:
    name = "/".join(part for part in (row.suite, row.case, row.tensor) if part)
    parts = [f"{row.verdict:7}", f"{name:64}"]
    if row.max_abs is not None:
        parts.append(f"max abs {_number(row.max_abs)} < {_number(row.limit_max_abs)}")
    if row.rel_l2 is not None:
        parts.append(f"rel L2 {_number(row.rel_l2)} < {_number(row.limit_rel_l2)}")
    return "  ".join([*parts, row.note] if row.note else parts)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1e}"


def _summary(rows: Sequence[Row]) -> str:
    verdicts: dict[tuple[str, str], set[str]] = collections.defaultdict(set)
    for row in rows:
        verdicts[row.suite, row.case].add(row.verdict)
    cases = collections.Counter(next(v for v in (FAIL, PENDING, PASS) if v in found) for found in verdicts.values())
    return f"{len(verdicts)} cases: {cases[PASS]} pass, {cases[FAIL]} fail, {cases[PENDING]} pending; {len(rows)} rows"


if __name__ == "__main__":
    sys.exit(main())
