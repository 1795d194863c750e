"""The whole STDiT3-XL/2 as Core ML packages: bytes, time and memory, with every package checked.

Source: the synthetic checkpoint of convert_speed.py (names, shapes and layout of the published one), converted to bfloat16.
Command: python benchmarks/coreml_export.py --scratch /tmp/coreml --json benchmarks/results/coreml_export.json
Cost: 6 GB of disk space, a minute or two a pair; nothing is left behind unless --keep names a folder for the packages.
Expect: 28 pairs in int8 in 1.3 GB, each with the functions full and merged; peak memory below 6 GB.

Random weights are the hardest to compress: a package below its floor, which ends an export, is only counted here.

Each package is exported, read back and compared with JAX in a process of its own, on the activations that the packages
before it should have given: those of JAX, from noise through all pairs; and again with outlier channels.
The rival is On-device Sora's own export, two float32 packages for every pair (2 x 28 x 170 MB = 9.5 GB); it needs a Mac, so
its bytes are computed and its time is not.
"""

import argparse
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.convert_speed import write_checkpoint
from sora_jax.config import FLOAT32, open_sora_1_2
from sora_jax.export import check, coreml
from sora_jax.export.manifest import versions
from sora_jax.export.size import Size
from sora_jax.export.stages import Stage, list_stages, load_parameters
from sora_jax.export.targets import Options
from sora_jax.model_directory import open_network

ROOT = Path(__file__).resolve().parents[1]


def stages_of(size: Size, options: Options | None) -> dict[str, Stage]:
    """Returns the transformer's stages: as saved with ``options``, or as JAX runs them."""
    policy = FLOAT32 if options is None else coreml.policy(options)
    return {stage.name: stage for stage in list_stages(open_sora_1_2, [size], parts=("stdit3",), policy=policy)}


def first_inputs(specs: dict[str, Any], size: Size) -> dict[str, np.ndarray]:
    """Returns what the front is given: noise, a caption of 40 tokens, the middle of the schedule."""
    rng = np.random.default_rng(0)
    fixed = {"t_B": 500.0, "fps_B": 24.0, "height_px_B": float(size.height), "width_px_B": float(size.width)}
    given = {}
    for name, spec in specs.items():
        if name in fixed:
            given[name] = np.full(spec.shape, fixed[name], np.float32)
        elif name == "mask_BL":
            given[name] = np.tile(np.arange(spec.shape[1]) < 40, (spec.shape[0], 1)).astype(np.float32)
        else:
            given[name] = rng.standard_normal(spec.shape, np.float32)
    return given


def export_one(name: str, model: Path, values_path: Path, folder: Path, size: Size, options: Options) -> dict[str, Any]:
    """Exports and checks one stage; puts what it should give into the file of activations."""
    started = time.monotonic()
    plain, stage = stages_of(size, None)[name], stages_of(size, options)[name]
    params = load_parameters(open_network(model, "stdit3"), stage)
    artefacts = coreml.save(stage, params, folder, options)
    saved = time.monotonic()
    values = dict(np.load(values_path)) if values_path.exists() else first_inputs(dict(plain.functions[0].inputs), size)
    checks: list[check.Check] = []
    for function in reversed(plain.functions):  # the first one's outputs go on to the next stage
        given = {key: values[key] for key in function.inputs}
        call = jax.jit(lambda params, given, function=function: function.call(params, **given))
        run = coreml.open_function(folder, artefacts[function.name])
        floor = check.floor_db(options.precision_of(stage), options.weights_of(stage))
        if (moved := check.with_outliers(given)) is not None:
            checks += check.compare("outliers", moved, jax.device_get(call(params, moved)), run(moved), floor)
        reference = jax.device_get(call(params, given))
        checks += check.compare("captured", given, reference, run(given), floor)
    np.savez(values_path, **(values | reference))
    return {
        "stage": name,
        "functions": [function.name for function in stage.functions],
        "bytes": sum(path.stat().st_size for path in (folder / artefacts[function.name]["file"]).rglob("*") if path.is_file()),
        "save_s": saved - started,
        "check_s": time.monotonic() - saved,
        "peak_rss_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
        "psnr_db": min(entry.psnr_db for entry in checks),
        "relative_l2": max(entry.relative_l2 for entry in checks),
        "passed": all(entry.passed for entry in checks),
        "checks": [entry.to_dict() for entry in checks],
    }


def in_a_process(name: str) -> dict[str, Any]:
    """Returns the record of a stage exported in a process of its own, interpreter start included."""
    started = time.monotonic()
    command = [sys.executable, __file__, *sys.argv[1:], "--one", name]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise RuntimeError(f"{name}: {result.stderr.strip().splitlines()[-1:]}")
    return {**json.loads(result.stdout.splitlines()[-1]), "seconds": time.monotonic() - started}


def prepare(model: Path, scratch: Path) -> None:
    """Converts a synthetic checkpoint and removes it."""
    write_checkpoint(scratch / "source", "stdit3", "bfloat16")
    command = [sys.executable, "-m", "convert_weights", "stdit3", scratch / "source", model, "--dtype", "bfloat16", "--quiet"]
    subprocess.run(command, check=True, cwd=ROOT)
    shutil.rmtree(scratch / "source")


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Returns totals and the records of all packages, with what they were measured on."""
    options.packages.mkdir(parents=True)
    prepare(options.model, options.scratch)
    names = ["stdit3_front", *(f"stdit3_pair_{i:02}" for i in range(options.pairs)), "stdit3_final"]
    started = time.monotonic()
    records = []
    for name in names:
        records.append(in_a_process(name))
        print(json.dumps(records[-1]), file=sys.stderr, flush=True)
    pairs = [record for record in records if "pair" in record["stage"]]
    revision = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False, cwd=ROOT)
    return {
        "question": "STDiT3-XL/2 as Core ML packages",
        "weights": options.weights,
        "precision": options.precision,
        "size": options.size.key,
        "num_pairs": len(pairs),
        "pairs_gb": sum(record["bytes"] for record in pairs) / 1e9,
        "total_gb": sum(record["bytes"] for record in records) / 1e9,
        "total_s": time.monotonic() - started,
        "peak_rss_gb": max(record["peak_rss_gb"] for record in records),
        "worst_psnr_db": min(record["psnr_db"] for record in records),
        "below_the_floor": [record["stage"] for record in records if not record["passed"]],
        "on_device_sora_gb": 2 * len(pairs) * 170e6 / 1e9,
        "packages": records,
        "checked_on": "Linux, by sora_jax.export.mil_check; nothing was compiled or run on Apple hardware",
        "cores": os.cpu_count(),
        "load_average": os.getloadavg(),
        "python": platform.python_version(),
        "versions": versions(coreml.PACKAGES),
        "commit": revision.stdout.strip(),
    }


def main() -> None:
    """Measures and prints, or writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scratch", type=Path, required=True, help="a folder that does not exist; removed afterwards")
    parser.add_argument("--keep", type=Path, help="a folder that does not exist, for the packages; kept")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--pairs", type=int, default=open_sora_1_2.stdit3.depth, help="export only the first N pairs")
    parser.add_argument("--weights", default="int8", choices=("float", "int8", "lut6", "int4"))
    parser.add_argument("--precision", default="float16", choices=("float32", "float16"))
    parser.add_argument("--num-frames", type=int, default=34)
    parser.add_argument("--height", type=int, default=192)
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.size = Size(num_frames=options.num_frames, height=options.height, width=options.width)
    options.model = options.scratch / "model"
    options.packages = options.keep or options.scratch / "packages"
    if options.one:
        how = Options(precision=options.precision, weights=options.weights, metadata={"model": "synthetic STDiT3-XL/2"})
        values = options.scratch / "activations.npz"
        print(json.dumps(export_one(options.one, options.model, values, options.packages, options.size, how)))
        return
    options.scratch.mkdir(parents=True)
    try:
        result = measure(options)
    finally:
        shutil.rmtree(options.scratch)
    text = json.dumps(result, indent=1)
    print(text)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
