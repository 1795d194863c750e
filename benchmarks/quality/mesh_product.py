"""Samples on every mesh with every option against the same on one device: the full product, of which CI runs a covering set.

Command:  python -m benchmarks.quality.mesh_product
Needs:    two cores, 2 GB; about 10 seconds of the processor a pair, a quarter of an hour in all.  Pairs that the file holds are
          not run again.
Expect:   relative L2 of the latents at most 1e-5 in float32, with the same evaluations and leaps, by one program.
Rival:    one device, in the same process.

Devices are eight virtual ones of this machine's CPU; weights are random, of a toy width (`tests.devices.meshes`).
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks._support.machine import compact, environment
from tests.devices import meshes

COMMAND = "python -m benchmarks.quality.mesh_product"
RESULTS = Path(__file__).parents[1] / "results" / "mesh_product.json"
WEIGHTS = ("replicated", "spread")


def pairs() -> list[str]:
    """Returns the names of all pairs: every mesh with every option; weights are spread in every second one."""
    names = [f"{mesh}:{option}" for option in meshes.OPTIONS for mesh in meshes.MESHES]
    return [f"{name}:{WEIGHTS[number % 2]}" for number, name in enumerate(names)]


def main() -> None:
    """Runs the pairs that are missing, those of an option in one process, and writes them as they come."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path, default=RESULTS, help="file of the results, which is added to")
    path = parser.parse_args().json
    rows = {row["case"]: row for row in json.loads(path.read_text())["rows"]} if path.exists() else {}
    for option in meshes.OPTIONS:
        missing = [name for name in pairs() if name.split(":")[1] == option and name not in rows]
        if not missing:
            continue
        print(f"{option}: {len(missing)} meshes", flush=True)
        devices = {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
            "MESH_LITTLE_OPTIMISED": "1",
        }
        command = [sys.executable, "-m", "tests.devices.meshes", *missing]
        ended = subprocess.run(command, env={**os.environ, **devices}, stdout=subprocess.PIPE, text=True, check=True)
        rows |= {row["case"]: row for row in map(json.loads, ended.stdout.splitlines())}
        write(path, [rows[name] for name in pairs() if name in rows])


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    """Replaces the file of the results."""
    worst = max(row["error"] for row in rows)
    same = all(row["leapt"] and row["evaluations"][0] == row["evaluations"][1] and row["programs"] == 1 for row in rows)
    summary = {"pairs": len(rows), "of": len(pairs()), "largest_error": worst, "same_evaluations_and_one_program": same}
    temporary = path.with_suffix(".partial")
    temporary.write_text(compact({"command": COMMAND, "summary": summary, "rows": rows, "environment": environment()}))
    temporary.replace(path)


if __name__ == "__main__":
    main()
