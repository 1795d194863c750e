"""NEVER RUN SO FAR.  Runs every program of this folder on a Mac, on its test vectors, and prints what it found.

    pip install coremltools numpy safetensors          (Core ML)
    pip install coreai-core==1.0.0b3 numpy safetensors (Core AI)
    python verify_on_mac.py [FOLDER]

A line for every function: the error against JAX, its limits, the time of a run, and for Core ML on which units its operations
are planned to run.  `sora-jax export` copies this file beside its artefacts; it was written and its types were checked on
Linux, where neither framework runs on a device.

Invariant: needs nothing of sora_jax; changes nothing in the folder.
"""

import asyncio
import collections
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

REPEATS = 5
Arrays = dict[str, np.ndarray]


def errors(given: Arrays, expected: Arrays, outputs: Arrays) -> tuple[float, float]:
    """Returns the lowest PSNR in dB and the largest relative L2 error; an output that replaces an input counts as a change."""
    worst_db, worst_l2 = 200.0, 0.0
    for name, array in expected.items():
        a, b = (np.asarray(x, np.float64) for x in (array, outputs[name]))
        if name in given and given[name].shape == a.shape:
            a, b = a - given[name], b - given[name]
        if not np.isfinite(b).all():
            return -200.0, math.inf
        rmse, peak = float(np.sqrt(np.mean((a - b) ** 2))), float(np.abs(a).max(initial=0.0))
        if rmse > 0:
            worst_db = min(worst_db, 20 * math.log10(peak / rmse) if peak else -200.0)
            worst_l2 = max(worst_l2, float(np.linalg.norm(a - b) / np.linalg.norm(a)) if peak else math.inf)
    return worst_db, worst_l2


def read_vectors(path: Path) -> tuple[Arrays, Arrays]:
    """Returns inputs and expected outputs of a function."""
    from safetensors.numpy import load_file

    arrays = load_file(path)
    inputs = {name.removeprefix("in/"): array for name, array in arrays.items() if name.startswith("in/")}
    return inputs, {name.removeprefix("out/"): array for name, array in arrays.items() if name.startswith("out/")}


def in_core_ml(path: Path, function: dict[str, Any], given: Arrays) -> tuple[Arrays, float, str]:
    """Returns outputs, the least seconds of a run, and the number of operations on each unit."""
    import coremltools
    from coremltools.models.compute_plan import MLComputePlan

    called = function["artefact"]["function"]
    named = None if called == "main" else called
    units = coremltools.ComputeUnit.ALL
    model = coremltools.models.MLModel(str(path), function_name=named, compute_units=units)
    outputs, seconds = model.predict(given), math.inf
    for _ in range(REPEATS):
        began = time.perf_counter()
        outputs = model.predict(given)
        seconds = min(seconds, time.perf_counter() - began)
    plan = MLComputePlan.load_from_path(path=model.get_compiled_model_path(), compute_units=units)
    counts: collections.Counter[str] = collections.Counter()
    program = plan.model_structure.program
    for operation in program.functions[called].block.operations if program else ():
        usage = plan.get_compute_device_usage_for_mlprogram_operation(operation)
        if usage is not None:
            counts[type(usage.preferred_compute_device).__name__.removeprefix("ML").removesuffix("ComputeDevice")] += 1
    return dict(outputs), seconds, ", ".join(f"{unit} {count}" for unit, count in sorted(counts.items()))


def in_core_ai(path: Path, function: dict[str, Any], given: Arrays) -> tuple[Arrays, float, str]:
    """Returns outputs and the least seconds of a run; Core AI does not say which unit ran."""
    import coreai.authoring
    from coreai.runtime import NDArray

    async def run() -> tuple[Arrays, float]:
        seconds, outputs = math.inf, {}
        async with coreai.authoring.AIModelAsset.load(path).executable() as model:
            call = model.load_function(function["artefact"]["function"])
            for _ in range(REPEATS):
                arrays: dict[str, Any] = {name: NDArray(np.ascontiguousarray(array)) for name, array in given.items()}
                began = time.perf_counter()
                made: dict[str, Any] = dict(await call(arrays))
                seconds = min(seconds, time.perf_counter() - began)
                outputs = {name: np.array(value.numpy()) for name, value in made.items()}
        return outputs, seconds

    return *asyncio.run(run()), ""


def main(arguments: list[str]) -> int:
    """Prints the table; 1 where a function misses its limits or does not run."""
    folder = Path(arguments[0]) if arguments else Path(__file__).parent
    manifest = json.loads((folder / "manifest.json").read_text("utf-8"))
    run = {"coreml": in_core_ml, "coreai": in_core_ai}[manifest["target"]]
    failed = 0
    for stage in manifest["stages"]:
        for function in stage["functions"]:
            given, expected = read_vectors(folder / function["vectors"])
            given = {one["name"]: given[one["name"]].astype(one["dtype"]) for one in function["inputs"]}
            suffix, limits = function["artefact"]["output_suffix"], function["checks"][0]
            try:
                outputs, seconds, units = run(folder / function["artefact"]["file"], function, given)
                db, l2 = errors(given, expected, {name.removesuffix(suffix): array for name, array in outputs.items()})
            except Exception as error:  # the table goes on: what one function meets says nothing of the next
                db, l2, seconds, units = -200.0, math.inf, math.nan, f"{type(error).__name__}: {error}"
            passed = db >= limits["floor_db"] and l2 <= limits["ceiling_l2"]
            failed += not passed
            verdict = "pass" if passed else "FAIL"
            name = f"{stage['name']} {function['name']}"
            limit = f"limits {limits['floor_db']:g} dB, {limits['ceiling_l2']:g}"
            print(f"{verdict}  {name:40}  {db:6.1f} dB  {l2:8.2g}  ({limit})  {1e3 * seconds:9.1f} ms  {units}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
