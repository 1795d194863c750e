"""The sampler program of a StableHLO export: the whole loop as one program, with all the transformer's weights at once.

Invariant: its numbers are those that the loop of `host_program` takes, so both make the same latents.  The program is
made in `stablehlo_sampler`; no sampler is imported here.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from sora_jax.export.contents import Contents
from sora_jax.export.entries import FunctionEntry, SamplingEntry, StageEntry
from sora_jax.export.opening import rounded
from sora_jax.export.stablehlo_open import Program, program, read_weights
from sora_jax.process import return_freed_memory

# On CPUs XLA would keep the caption's keys and values of every block from step to step, twice while it computes them, and
# order operations for speed: 0.7 GB of STDiT3-XL/2.  These compile the step as it is written, with the least memory.
LEAST_MEMORY: dict[str, str | bool] = {
    "xla_disable_hlo_passes": "while-loop-invariant-code-motion",
    "xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED",
}

Params = dict[str, jax.Array]
Runner = Callable[[Params, Mapping[str, np.ndarray]], dict[str, np.ndarray]]


def sampler_name(function: str) -> str:
    """Returns the name that a sampler program has."""
    return f"sampler.{function}"


def capacity(function: FunctionEntry) -> int:
    """Returns how many times a sampler program takes; the last is always 0."""
    return int(next(tensor["shape"][0] for tensor in function["inputs"] if tensor["name"] == "times"))


def sampler_numbers(times: np.ndarray, capacity: int, sampling: SamplingEntry, *, first: int) -> dict[str, np.ndarray]:
    """Returns the sampler's numbers for steps at these times, the last one to the end.

    Args:
      times: float32 time of every step.
      capacity: length of the program's input ``times``.
      sampling: numbers of the loop; a leap that is off is the static leap of the last step, which goes to the end anyway.
      first: first step whose velocity a dynamic leap compares.

    Raises:
      ValueError: the program takes fewer steps.
    """
    num_steps, leap = len(times), sampling["leap"]
    if num_steps >= capacity:
        raise ValueError(f"num_steps is {num_steps}; the sampler program takes at most {capacity - 1}.")
    padded = np.zeros(capacity, np.float32)
    padded[:num_steps] = times
    index = leap["index"] if leap["mode"] == "static" else num_steps - 1
    return {
        "times": padded,
        "num_steps": np.asarray(num_steps, np.int32),
        "guidance": np.asarray(sampling["guidance"], np.float32),
        "merge_steps": np.asarray(sampling["merge_steps"], np.int32),
        "leap_index": np.asarray(index, np.int32),
        "leap_first": np.asarray(first, np.int32),
        "leap_tolerance": np.asarray(leap["tolerance"], np.float32),
        "leap_patience": np.asarray(leap["patience"], np.int32),
    }


def run(
    contents: Contents, function: FunctionEntry, stages: Sequence[StageEntry], values: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Returns the outputs of a sampler program for named inputs, with the weights of the transformer's stages.

    Raises:
      ExportFileError: a file is damaged, or not what the entries say.
    """
    saved, call = open_sampler(contents, function)
    return call(read_params(contents, stages, saved), values)


def open_sampler(contents: Contents, function: FunctionEntry) -> tuple[Program, Runner]:
    """Returns a saved sampler's program, and the sampler as a function of weights and inputs.

    It is compiled before weights are read, which may then have the memory that compiling takes.

    Raises:
      ExportFileError: the file is damaged, or not the program of the entry.
    """
    path = contents.path(function["artefact"]["file"])
    modified_ns = path.stat().st_mtime_ns
    saved = program(path, modified_ns)
    saved.refuse_other(path, sampler_name(function["name"]), function)
    compiled = _compiled(path, modified_ns)
    dtypes = {name: dtype for name, (dtype, _) in saved.inputs.items()}

    def run(params: Params, given: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {name: np.asarray(value) for name, value in compiled(dict(params), rounded(given, dtypes)).items()}

    return saved, run


def read_params(contents: Contents, stages: Sequence[StageEntry], saved: Program) -> Params:
    """Returns the weights of the transformer's stages, which all samplers of a folder share.

    Raises:
      ExportFileError: see `stablehlo_open.read_weights`.
    """
    params: Params = {}
    for stage in stages:
        name = stage["functions"][0]["artefact"].get("weights", "")
        params |= jax.device_put(read_weights(contents, name, stage["name"], saved, prefix=f"{stage['name']}/"))
        return_freed_memory()  # what was read and copied to the device: else an eighth of the weights stays allocated
    return params


@functools.lru_cache(maxsize=2)  # a static and a dynamic leap
def _compiled(path: Path, modified_ns: int) -> Callable[..., Any]:
    """Returns the compiled program of a file; compiled once until the file changes."""
    exported = program(path, modified_ns).exported
    (params, inputs), _ = jax.tree.unflatten(exported.in_tree, exported.in_avals)
    options = LEAST_MEMORY if jax.default_backend() == "cpu" else None
    compiled = jax.jit(exported.call).lower(params, inputs).compile(compiler_options=options)
    return_freed_memory()
    return compiled
