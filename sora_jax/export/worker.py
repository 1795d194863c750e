"""The process that exports a group of stages: reference, save, run what was saved, compare.

``python -m sora_jax.export.worker FOLDER STAGE...`` reads the job of an unfinished folder; the exporter starts one process
after the other, so that nothing of a stage stays in memory.  How far it is goes to standard output, a JSON line each; when
standard input ends, the exporter is gone and so is this process.

Invariant: an entry for the manifest is written only for a stage whose every function has passed its check.
"""

import dataclasses
import functools
import json
import os
import sys
import threading
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import jax
import numpy as np

from sora_jax.config import ModelConfig
from sora_jax.export import capture, check, describe, mixed_bits, resident, stablehlo_open, stablehlo_sampler, vectors
from sora_jax.export.attention import export_forms
from sora_jax.export.contents import Contents
from sora_jax.export.entries import FunctionEntry, SamplerEntry, SamplingEntry, StageEntry
from sora_jax.export.host_program import guided
from sora_jax.export.job import WORK, Job, load_values, save_values
from sora_jax.export.opening import Runner, open_function
from sora_jax.export.phases import CAPTION, base_name, stage_function
from sora_jax.export.program import Function, Stage, load_parameters
from sora_jax.export.rows import each_call
from sora_jax.export.size import Size
from sora_jax.export.targets import target_module
from sora_jax.process import peak_bytes
from sora_jax.sampling.schedule import OPEN_SORA_TIMESTEPS

SAMPLER = "sampler"  # the name of the group that writes the sampler programs

Cases = dict[str, tuple[capture.Values, dict[str, Any]]]  # inputs and reference outputs by case
Tell = Callable[[str, float], Any]  # takes a stage's name and how much of it is done


def run_group(folder: Path, names: list[str], tell: Tell) -> None:
    """Exports the named stages and leaves their manifest entries in the work folder."""
    job = Job.read(folder)
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(folder / WORK / "compiled"))
    networks = job.networks()
    config = ModelConfig(**{network: entry.config for network, entry in networks.items()})
    exported = job.exported_stages(config)
    values = {size.key: load_values(folder, size) for size in job.sizes}
    if names == [SAMPLER]:
        _write_entry(folder, SAMPLER, _export_sampler(job, config, exported, folder, values, tell))
        return
    references = _References(values)
    for stage in job.reference_stages(config):
        if stage.name not in names:
            continue
        tell(stage.name, 0.0)
        params = load_parameters(networks[stage.network], stage)
        if stage.name in exported:
            entry = _export_stage(job, stage, exported[stage.name], params, folder, references, tell)
            _write_entry(folder, stage.name, entry)
        for size in job.sizes:
            outputs = references.outputs(stage, params, size)
            values[size.key] = capture.after_stage(stage, values[size.key], outputs, job.guidance)
    for size in job.sizes:
        save_values(folder, size, values[size.key])


class _References:
    """JAX's own results for the captured values; stages of one program share what is compiled."""

    def __init__(self, values: Mapping[str, capture.Values]):
        self.values = values
        self._compiled: dict[tuple[str, str], Any] = {}
        self._known: dict[tuple[str, str, str], dict[str, Any]] = {}

    def cases(self, stage: Stage, function: Function, params: Mapping[str, np.ndarray], *, half: bool) -> Cases:
        """Returns inputs and outputs of a function for its first size, as captured and, of streams, with outliers.

        With ``half`` inputs are values that float16 has: what is rounded before a call is no error of the call.
        """
        inputs = capture.stage_inputs(function, self.values[function.sizes[0]])
        inputs = capture.rounded_to_half(inputs) if half else inputs
        given = {"captured": inputs}
        moved = check.with_outliers(inputs)
        if moved is not None:
            given["outliers"] = capture.rounded_to_half(moved) if half else moved
        cases = {case: (arrays, self._run(stage, function, params, arrays)) for case, arrays in given.items()}
        self._known = {key: outputs for key, outputs in self._known.items() if key[0] == stage.name}
        if not half:  # the run goes on with values as they are
            self._known[(stage.name, function.name, function.sizes[0])] = cases["captured"][1]
        return cases

    def widths(self, stage: Stage, params: Mapping[str, np.ndarray], mean_bits: float, cases: Cases) -> dict[str, int]:
        """Returns bits by matrix of a stage, judged by its first function."""
        function = stage.functions[0]
        return mixed_bits.choose_widths(
            params, mean_bits, cases, lambda rounded, inputs: self._run(stage, function, rounded, inputs)
        )

    def outputs(self, stage: Stage, params: Mapping[str, np.ndarray], size: Size) -> dict[str, Any]:
        """Returns the captured outputs of the function by which a stage goes on for a size."""
        function = next(function for function in stage.functions if size.key in function.sizes)
        known = self._known.get((stage.name, function.name, size.key))
        inputs = capture.stage_inputs(function, self.values[size.key])
        return self._run(stage, function, params, inputs) if known is None else known

    def _run(
        self, stage: Stage, function: Function, params: Mapping[str, np.ndarray], inputs: Mapping[str, np.ndarray]
    ) -> dict[str, Any]:
        key = (stage.program.name, function.name)
        if key not in self._compiled:
            self._compiled[key] = jax.jit(lambda params, given: function.call(params, **given))
        return cast(dict[str, Any], jax.device_get(self._compiled[key](params, inputs)))


def _export_stage(
    job: Job,
    reference: Stage,
    stage: Stage,
    params: Mapping[str, np.ndarray],
    folder: Path,
    references: _References,
    tell: Tell,
) -> StageEntry:
    """Returns the entry of a stage that was saved, run and found exact enough."""
    steps = 3 * len(stage.functions)  # references, saving, checks
    cases: dict[str, Cases] = {}
    judged: Cases = {}  # of the first function, with both rows of guidance
    half = job.options.boundary_of(stage) == "float16"
    for function in reference.functions:
        both = references.cases(reference, function, params, half=half)
        judged = judged or both
        written = stage.function(function.name)
        cases[function.name] = {case: capture.called_with(written, *arrays) for case, arrays in both.items()}
        tell(stage.name, len(cases) / steps)
    narrowed = {name: params[name].astype(spec.dtype, copy=False) for name, spec in stage.program.abstract.items()}
    options = job.options
    if options.weights_of(stage) == "mixed":
        options = dataclasses.replace(options, widths=references.widths(reference, params, options.mean_bits or 0, judged))
    artefacts = target_module(job.target).save(stage, narrowed, folder, options)
    entry = describe.stage_entry(stage, options, artefacts)
    limits = check.limits(job.options.precision_of(stage), job.options.weights_of(stage))
    for number, function_entry in enumerate(entry["functions"]):
        tell(stage.name, (2 * len(stage.functions) + number) / steps)
        run = open_function(job.target, Contents(folder, None), entry, function_entry)
        name = function_entry["name"]
        base = base_name(name, function_entry.get("attention"))  # forms of attention compute the same
        function_entry["checks"] = [one.to_dict() for one in _checked(f"{stage.name} {name}", run, cases[base], limits)]
        if job.vectors:
            function_entry["vectors"] = vectors.write_function(folder, stage.name, base, *cases[base]["captured"])
    entry["peak_rss_bytes"] = peak_bytes()
    tell(stage.name, 1.0)
    return entry


def _checked(where: str, run: Runner, cases: Cases, limits: check.Limits) -> list[check.Check]:
    """Returns the measurements of a function that keeps its limits."""
    checks = []
    for case, (inputs, reference) in cases.items():
        measured = check.compare(case, inputs, reference, run(inputs), limits)
        check.require_passed(where, measured)
        checks += measured
    return checks


def _export_sampler(
    job: Job,
    config: ModelConfig,
    exported: Mapping[str, Stage],
    folder: Path,
    values: Mapping[str, capture.Values],
    tell: Tell,
) -> SamplerEntry:
    """Returns the entry of the sampler programs.

    One step of each, to the end, is compared with the captured evaluation; two, of which the first merges, with the stages.
    """
    tell(SAMPLER, 0.0)
    stages = [stage for stage in exported.values() if stage.network == "stdit3"]
    contents, policy = Contents(folder, None), target_module(job.target).policy(job.options)
    forms = export_forms(job.options.logits_limit, job.target)
    functions = stablehlo_sampler.sampler_functions(config, job.sizes, stages, policy=policy, forms=forms)
    artefacts = stablehlo_sampler.save(functions, stages, folder, int8=job.options.weights == "int8")
    entries = [describe.function_entry(function, artefacts[function.name]) for function in functions]
    limits = check.limits(job.options.precision, job.options.weights).relaxed(check.WHOLE_NETWORK_DB)
    saved: list[StageEntry] = [json.loads((folder / WORK / f"{stage.name}.json").read_text("utf-8")) for stage in stages]
    cases = {size.key: _sampler_cases(job, saved, contents, size.key, values[size.key]) for size in job.sizes}
    tell(SAMPLER, 0.4)
    stablehlo_open.program.cache_clear()  # the stages' programs, which the cases needed
    opened = [resident.open_sampler(contents, entry) for entry in entries]
    tell(SAMPLER, 0.8)
    params = resident.read_params(contents, saved, opened[0][0])
    for entry, (_, call) in zip(entries, opened, strict=True):
        checks = _checked(f"sampler {entry['name']}", functools.partial(call, params), cases[entry["sizes"][0]], limits)
        entry["checks"] = [one.to_dict() for one in checks]
    tell(SAMPLER, 1.0)
    return {"peak_rss_bytes": peak_bytes(), "functions": entries}


def _sampler_cases(job: Job, saved: list[StageEntry], contents: Contents, size: str, values: capture.Values) -> Cases:
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
            if stage["name"] == CAPTION:
                (known,) = _run_saved(job, contents, stage, stage_function(stage, size, "main"), [known])
        calls = list(each_call(known, job.cut.guidance_rows))
        for stage in saved:
            if stage["name"] != CAPTION:
                function = stage_function(stage, size, "merged" if step < merged else "full")
                calls = _run_saved(job, contents, stage, function, calls)
        v = guided(np.concatenate([call["v_RTHWC"] for call in calls]), job.guidance)
        z = z + v * np.float32((time - after) / OPEN_SORA_TIMESTEPS)
    cases["two_steps"] = (given | sampler_numbers(times, merged, job.guidance), z)
    steps = {"captured": 1, "two_steps": 2}
    return {
        case: (inputs, {"z_BTHWC": latents, "evaluations_B": np.full(len(latents), steps[case], np.float32)})
        for case, (inputs, latents) in cases.items()
    }


def _run_saved(
    job: Job, contents: Contents, stage: StageEntry, function: FunctionEntry, calls: list[capture.Values]
) -> list[capture.Values]:
    """Returns the values of every call with the outputs of a saved function."""
    run = open_function(job.target, contents, stage, function)
    names = [tensor["name"] for tensor in function["inputs"]]
    return [values | run({name: values[name] for name in names}) for values in calls]


def sampler_numbers(visited: list[float], merge_steps: int, guidance: float) -> dict[str, np.ndarray]:
    """Returns the sampler's numbers for steps at these times, the last one to the end, without a leap."""
    sampling: SamplingEntry = {
        "num_steps": len(visited),
        "num_timesteps": OPEN_SORA_TIMESTEPS,
        "guidance": guidance,
        "merge_steps": merge_steps,
        "leap": {"mode": "off", "index": None, "tolerance": 0.0, "min_share": 1.0, "patience": 1},
    }
    times = np.asarray(visited, np.float32)
    return resident.sampler_numbers(times, stablehlo_sampler.CAPACITY + 1, sampling, first=len(visited))


def _write_entry(folder: Path, name: str, entry: Any) -> None:
    (folder / WORK / f"{name}.json").write_text(json.dumps(entry), encoding="utf-8")


def _end_with_the_exporter() -> None:
    """Ends this process when standard input ends: the exporter holds its other end for as long as it lives."""

    def wait() -> None:
        while os.read(sys.stdin.fileno(), 4096):
            pass
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _channel() -> Tell:
    """Returns what writes lines to the exporter; whatever else a library prints goes to standard error."""
    lines = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def tell(stage: str, share: float) -> None:
        lines.write(json.dumps({"stage": stage, "share": share}) + "\n")
        lines.flush()

    return tell


def main(arguments: list[str]) -> int:
    """Runs the group; a failure is left in the work folder for the exporter to report."""
    folder = Path(arguments[0])
    _end_with_the_exporter()
    try:
        run_group(folder, arguments[1:], _channel())
    except Exception as error:
        report = {"kind": type(error).__name__, "input": isinstance(error, ValueError), "message": str(error)}
        report["traceback"] = traceback.format_exc()
        _write_entry(folder, "error", report)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
