"""Peak memory and CPU time of one pair of blocks at 480p, attention dense and in chunks, each in a process of its own.

Command:  python -m benchmarks.memory.attention_forms [--rows 1] [--forms dense chunked auto]
          (--tiny tries it out at toy width)
Needs:    Linux; 4 GB of memory for the dense form with one row of guidance, 7 GB with two; a minute of two cores a form.
Expect:   with one row: dense about 3.1 GB, chunked about 1.9 GB and no more than 1.25 times the CPU seconds; the same bits.
Rival:    the dense form.

The peak is VmHWM of the process after the second run, interpreter and compiler included; the peak before it is listed apart.
CPU seconds of a run count both cores and do not depend on what else the machine does.
"""

import argparse
import hashlib
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks._support.accelerator_work import compiled_pair, pair_arrays, works
from benchmarks._support.machine import environment, memory, write_report

RESULTS = Path(__file__).parents[1] / "results" / "attention_forms.json"


def main() -> None:
    """Measures each form in a child process, prints and writes it."""
    options = parse()
    if options.child:
        print(json.dumps(measure(options)))
        return
    setting = {"rows": options.rows, "forms": options.forms, "tiny": options.tiny, "dtype": "float32"}
    report: dict[str, Any] = {"setting": setting, "environment": environment(), "results": {}}
    for form in options.forms:
        command = [sys.executable, "-m", "benchmarks.memory.attention_forms", "--child", "--forms", form]
        command += ["--rows", str(options.rows), *(["--tiny"] if options.tiny else [])]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        found = json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else {"failed": done.stderr[-500:]}
        report["results"][form] = found
        print(json.dumps({form: found}), flush=True)
        write_report(report, options.out)


def parse() -> argparse.Namespace:
    """Returns the command line's options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=1, help="of the batch; guidance has two")
    parser.add_argument("--forms", nargs="+", default=["dense", "chunked", "auto"], choices=["dense", "chunked", "auto"])
    parser.add_argument("--tiny", action="store_true", help="toy width")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Returns peak, CPU seconds of two runs, and a digest of the output, of one form in this process."""
    work = works(tiny=options.tiny)["480p"]
    run = compiled_pair(work, pair_arrays(work, rows=options.rows), dtype="float32", attention=options.forms[0])
    before, seconds = memory()["peak_bytes"], []
    for _ in range(2):
        start = time.process_time()
        out = np.asarray(jax.block_until_ready(run()))
        seconds.append(round(time.process_time() - start, 1))
    return {
        "peak_before_bytes": before,
        "peak_bytes": memory()["peak_bytes"],
        "cpu_s": seconds,
        "finite": bool(np.isfinite(out).all()),
        "output_sha256": hashlib.sha256(out.tobytes()).hexdigest(),
    }


if __name__ == "__main__":
    main()
