"""An interpreter that stands in for the one with a compiler: it says what it is told to, in the events of `planning.child`."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

GB = 10**9
COMPILED = {
    "event": "compiled",
    "program": "evaluation",
    "what": "one guided evaluation",
    "counted": "one evaluation, all 28 pairs",
    "times": 30,
    "operations": 197e12,
    "compile_s": 40.0,
    "compile_cpu_s": 30.0,
    "argument_bytes": 2 * GB,
    "output_bytes": 1,
    "temporary_bytes": 3 * GB,
    "code_bytes": 1,
    "peak_bytes": 4 * GB,
    "moved_bytes": 819 * GB // 2,
    "dtypes": ["bf16", "f32"],
    "collectives": {"all-to-all": {"number": 56, "bytes": GB}},
}
REFUSED = {name: COMPILED[name] for name in ("event", "program", "what", "counted", "times", "operations")}
REFUSED |= {"compile_s": 1.0, "compile_cpu_s": 1.0, "refused": "RESOURCE_EXHAUSTED: 48.57G exceeds 15.75G."}


def stand_in(folder: Path, events: Sequence[Mapping[str, Any]], *, end: str = "exit 0") -> Path:
    """Returns an executable that keeps its request and environment next to itself, says the events, and ends."""
    (folder / "events").write_text("".join(json.dumps(event) + "\n" for event in events))
    path = folder / "python"
    path.write_text(
        f"#!/bin/sh\nread -r line\nprintf %s \"$line\" > '{folder}/request'\nenv > '{folder}/environment'\n"
        f"cat '{folder}/events'\n{end}\n"
    )
    os.chmod(path, 0o700)
    return path


def environment_of(folder: Path) -> dict[str, str]:
    """Returns the environment in which the stand-in ran."""
    lines = (folder / "environment").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if "=" in line)
