"""The process that exports a group of stages: reference, save, run what was saved, compare.

``python -m sora_jax.export.worker FOLDER STAGE...`` reads the job of an unfinished folder; the exporter starts one process
after the other, so that nothing of a stage stays in memory.

Invariant: an entry for the manifest is written only for a stage whose every function has passed its check.
"""

import functools
import json
import os
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from sora_jax.config import ModelConfig
from sora_jax.export import capture, check, manifest, stablehlo, stablehlo_sampler
from sora_jax.export.host_program import stage_function
from sora_jax.export.job import WORK, Job, load_values, save_values
from sora_jax.export.size import Size
from sora_jax.export.stages import Function, Stage, load_parameters
from sora_jax.export.targets import Runner, target_module
from sora_jax.process import peak_bytes
from sora_jax.sampling.schedule import OPEN_SORA_TIMESTEPS

SAMPLER = "sampler"  # the name of the group that writes the sampler programs

Cases = dict[str, tuple[capture.Values, dict[str, Any]]]  # inputs and reference outputs by case


def run_group(folder: Path, names: list[str]) -> None:
    """Exports the named stages and leaves their manifest entries in the work folder."""
    job = Job.read(folder)
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(folder / WORK / "compiled"))
    networks = job.networks()
    config = ModelConfig(**{network: entry.config for network, entry in networks.items()})
    exported = job.exported_stages(config)
    values = {size.key: load_values(folder, size) for size in job.sizes}
    compiled: dict[tuple[str, str], Any] = {}
    if names == [SAMPLER]:
        _write_entry(folder, SAMPLER, _export_sampler(job, config, exported, folder, values))
        return
    for stage in job.reference_stages(config):
        if stage.name not in names:
            continue
        params = load_parameters(networks[stage.network], stage)
        cases: dict[str, Cases] = {}
        if stage.name in exported:
            cases = {function.name: _reference(compiled, stage, function, params, values) for function in stage.functions}
            saved = exported[stage.name]
            narrowed = {name: params[name].astype(spec.dtype, copy=False) for name, spec in saved.program.abstract.items()}
            entry = _export_stage(job, saved, narrowed, folder, cases)
            _write_entry(folder, stage.name, entry)
        for size in job.sizes:
            made = next(function for function in stage.functions if size.key in function.sizes)
            known = cases.get(made.name) if size.key == made.sizes[0] else None
            _, outputs = (known or _reference(compiled, stage, made, params, values, size=size))["captured"]
            values[size.key] = capture.after_stage(stage, values[size.key], outputs, job.guidance)
    for size in job.sizes:
        save_values(folder, size, values[size.key])


def _reference(
    compiled: dict[tuple[str, str], Any],
    stage: Stage,
    function: Function,
    params: Mapping[str, np.ndarray],
    values: Mapping[str, capture.Values],
    size: Size | None = None,
) -> Cases:
    """Returns inputs and JAX's outputs of a function; for a given size as captured only."""
    key = (stage.program.name, function.name)
    if key not in compiled:
        compiled[key] = jax.jit(lambda params, given: function.call(params, **given))
    inputs = capture.stage_inputs(function, values[size.key if size else function.sizes[0]])
    given = {"captured": inputs}
    moved = check.with_outliers(inputs)
    if moved is not None and size is None:
        given["outliers"] = moved
    return {case: (arrays, jax.device_get(compiled[key](params, arrays))) for case, arrays in given.items()}


def _export_stage(
    job: Job, stage: Stage, params: Mapping[str, np.ndarray], folder: Path, cases: Mapping[str, Cases]
) -> dict[str, Any]:
    """Returns the entry of a stage that was saved, run and found exact enough."""
    target = target_module(job.target)
    artefacts = target.save(stage, params, folder, job.options)
    limits = check.limits(job.options.precision_of(stage), job.options.weights_of(stage))
    functions = []
    for function in stage.functions:
        artefact = artefacts[function.name]
        run = target.open_function(folder, artefact)
        checks = _checked(f"{stage.name} {function.name}", run, cases[function.name], limits)
        functions.append(manifest.function_entry(function, artefact, checks))
    return manifest.stage_entry(stage, job.options.precision_of(stage), functions, peak_bytes())


def _checked(where: str, run: Runner, cases: Cases, limits: check.Limits) -> list[dict[str, Any]]:
    checks = []
    for case, (inputs, reference) in cases.items():
        measured = check.compare(case, inputs, reference, run(inputs), limits)
        check.require_passed(where, measured)
        checks += [one.to_dict() for one in measured]
    return checks


def _export_sampler(
    job: Job, config: ModelConfig, exported: Mapping[str, Stage], folder: Path, values: Mapping[str, capture.Values]
) -> dict[str, Any]:
    """Returns the entry of the sampler programs.

    One step of each, to the end, is compared with the captured evaluation; two, of which the first merges, with the stages.
    """
    stages = [stage for stage in exported.values() if stage.network == "stdit3"]
    policy = target_module(job.target).policy(job.options)
    functions = stablehlo_sampler.sampler_functions(config, job.sizes, stages, policy=policy)
    artefacts = stablehlo_sampler.save(functions, stages, folder, int8=job.options.weights == "int8")
    limits = check.limits(job.options.precision, job.options.weights).relaxed(check.WHOLE_NETWORK_DB)
    saved = [json.loads((folder / WORK / f"{stage.name}.json").read_text("utf-8")) for stage in stages]
    cases = {size.key: _sampler_cases(job, saved, folder, size.key, values[size.key]) for size in job.sizes}
    stablehlo.program.cache_clear()  # the stages' programs, which the cases needed
    opened = {function.name: stablehlo_sampler.open_sampler(folder, artefacts[function.name]) for function in functions}
    params = stablehlo_sampler.read_params(folder, artefacts[functions[0].name])
    entries = []
    for function in functions:
        run = functools.partial(opened[function.name], params)
        checks = _checked(f"sampler {function.name}", run, cases[function.sizes[0]], limits)
        entries.append(manifest.function_entry(function, artefacts[function.name], checks))
    return {"peak_rss_bytes": peak_bytes(), "functions": entries}


def _sampler_cases(job: Job, saved: list[dict[str, Any]], folder: Path, size: str, values: capture.Values) -> Cases:
    """Returns inputs and latents of one captured step, and of two steps through the saved stages of a size."""
    first = float(values["t_B"][0])
    given = values | {"z_BTHWC": values["noise_BTHWC"]}
    functions = [function for stage in saved for function in stage["functions"] if size in function["sizes"]]
    merged = int(any(function["variant"] == "merged" for function in functions))
    cases = {"captured": (given | sampler_numbers([first], 0, job.guidance), values["z_BTHWC"])}
    z, times = given["z_BTHWC"], [first, first / 2]
    for step, (time, after) in enumerate(zip(times, [first / 2, 0.0], strict=True)):
        known = given | {"z_BTHWC": z, "t_B": np.full_like(values["t_B"], time)}
        for stage in saved:
            function = stage_function(stage, size, "merged" if step < merged else "full")
            run = target_module(job.target).open_function(folder, function["artefact"])
            known = known | run({tensor["name"]: known[tensor["name"]] for tensor in function["inputs"]})
        z = z + capture.guided(known["v_RTHWC"], job.guidance) * np.float32((time - after) / OPEN_SORA_TIMESTEPS)
    cases["two_steps"] = (given | sampler_numbers(times, merged, job.guidance), z)
    steps = {"captured": 1, "two_steps": 2}
    return {
        case: (inputs, {"z_BTHWC": latents, "evaluations_B": np.full(len(latents), steps[case], np.float32)})
        for case, (inputs, latents) in cases.items()
    }


def sampler_numbers(visited: list[float], merge_steps: int, guidance: float) -> dict[str, np.ndarray]:
    """Returns the sampler's numbers for steps at these times, the last one to the end, without a leap."""
    num_steps = len(visited)
    times = np.zeros(stablehlo_sampler.CAPACITY + 1, np.float32)
    times[:num_steps] = visited
    whole = {
        "num_steps": num_steps,
        "merge_steps": merge_steps,
        "leap_index": num_steps - 1,
        "leap_first": num_steps,
        "leap_patience": 1,
    }
    return {
        "times": times,
        "guidance": np.asarray(guidance, np.float32),
        "leap_tolerance": np.asarray(0, np.float32),
        **{name: np.asarray(value, np.int32) for name, value in whole.items()},
    }


def _write_entry(folder: Path, name: str, entry: Any) -> None:
    (folder / WORK / f"{name}.json").write_text(json.dumps(entry), encoding="utf-8")


def main(arguments: list[str]) -> int:
    """Runs the group; a failure is left in the work folder for the exporter to report."""
    folder = Path(arguments[0])
    try:
        run_group(folder, arguments[1:])
    except Exception as error:
        report = {"kind": type(error).__name__, "input": isinstance(error, ValueError), "message": str(error)}
        report["traceback"] = traceback.format_exc()
        _write_entry(folder, "error", report)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
