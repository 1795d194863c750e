"""One accelerator, measured in minutes: fixtures, attention's forms against PyTorch, a whole clip, every stage.

Command:  python -m benchmarks.speed.accelerator [--minutes 8] [--out benchmarks/results/accelerator.json]
          (--tiny --platform cpu --out FILE tries all of it at toy width in a minute; --tf32 multiplies float32 as TF32)
Needs:    jax 0.10.2 or 0.11, flax, einops, jaxtyping, numpy; torch for the rival, if it is there; 16 GB of the card's memory.
Expect:   on an H100 in bfloat16: a 480p pair at least 1.2 times as fast as PyTorch's compiled SDPA and at half of the card's
          dense peak; 51 frames of 480p in 30 steps in less than 29 s, with a peak of at most 15.5 GB.
Rival:    `torch_pair`, eager and by torch.compile, with scaled_dot_product_attention; a whole evaluation is 28 of its pairs.

The cases run in the order of `accelerator_cases.CASES`, and the file is written anew after each, so a run that is cut short
leaves what it has.  A case that does not begin in time, or for which something is missing, says so in its place; one that
fails says how.  Times are medians after a warm-up; compiling is listed apart.  Programs are kept in a folder next to the file.
"""

import argparse
import json
import time
import traceback
from pathlib import Path
from typing import Any

import jax

from benchmarks._support.accelerator_cases import CASES, Setting
from benchmarks._support.machine import compact, environment

RESULTS = Path(__file__).parents[1] / "results" / "accelerator.json"
CACHE = "accelerator_cache"


def main() -> None:
    """Measures case after case until the time is over, printing and writing each."""
    options = parse()
    if options.platform:
        jax.config.update("jax_platforms", options.platform)
    if options.tf32:
        jax.config.update("jax_default_matmul_precision", "tensorfloat32")
    out = target(options)
    out.parent.mkdir(parents=True, exist_ok=True)
    jax.config.update("jax_compilation_cache_dir", str(out.parent / CACHE))
    setting = Setting(tiny=options.tiny, repeats=options.repeats, folder=out.parent / CACHE)
    report: dict[str, Any] = {
        "setting": {"minutes": options.minutes, "tiny": options.tiny, "repeats": options.repeats, "tf32": options.tf32},
        "environment": {**environment(), "platform": jax.default_backend(), "card": jax.devices()[0].device_kind},
        "results": {},
    }
    began = time.perf_counter()
    for name, case in CASES.items():
        late = time.perf_counter() - began > 60 * options.minutes
        found = {"left_out": f"{options.minutes:g} minutes were over"} if late else measured(case, setting)
        report["results"][name] = found
        out.write_text(compact(report))
        print(json.dumps({name: found}), flush=True)


def parse() -> argparse.Namespace:
    """Returns the command line's options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=8.0, help="no case begins after so many")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--tiny", action="store_true", help="toy width")
    parser.add_argument("--platform", choices=["cpu", "cuda", "tpu"], help="JAX's platform; default: the best there is")
    parser.add_argument("--tf32", action="store_true", help="products of float32 as TF32 on NVIDIA GPUs")
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


def target(options: argparse.Namespace) -> Path:
    """Returns the file to write; the folder of results is for accelerators at full size.

    Raises:
      SystemExit: no file is named, and this is none.
    """
    if options.out is not None:
        return Path(options.out)
    if options.tiny or jax.default_backend() == "cpu":
        raise SystemExit("error: no accelerator at full size; name a file with --out.")
    return RESULTS


def measured(case: Any, setting: Setting) -> dict[str, Any]:
    """Returns what a case found, or why it found nothing: the next cases go on."""
    start = time.perf_counter()
    try:
        found = case(setting)
    except ModuleNotFoundError as error:
        found = {"left_out": f"needs the package {error.name}"}
    except Exception as error:  # a card's own errors have no common class
        found = {"failed": f"{type(error).__name__}: {str(error)[:500]}", "at": traceback.format_exc().splitlines()[-4:]}
    return {**found, "case_s": round(time.perf_counter() - start, 1)}


if __name__ == "__main__":
    main()
