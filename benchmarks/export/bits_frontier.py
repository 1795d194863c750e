"""Bytes against the worst output of STDiT3-XL/2's pairs below 8 bits: one width for all matrices, and a width for each.

Command:  python -m benchmarks.export.bits_frontier --pairs 0 --json benchmarks/results/bits_frontier.json
Needs:    1.5 GB of memory, two minutes of one core for each sampled pair.
Expect:   by the rate of a Gaussian source 6 dB for every bit; mixed widths above one width wherever matrices differ.
Rival:    the same bytes with one width for all matrices, which is what ``export --weights`` does.

Weights are random, of the released shapes, as in `released_export`; a few pairs stand for all 28, whose values have the same
distribution.  Bytes are those of 28 pairs: indices, tables of 2^bits float16 values for a matrix, scales of int8, all else in
float16.  Widths are those that Core ML stores: tables of 8, 16 and 64 values, int8 with a scale for every output.
Weights are rounded and multiplied out; arithmetic is float32, so that the rounding of weights is all that is seen.

A width for each matrix: every matrix alone is rounded to every width, and the squared error of the pair's update, captured and
with outlier channels, is its cost there; from the least widths on, the step that saves most error for its bytes is taken while
it fits.  Outputs are then measured as the export's check does: both functions, both cases, the least PSNR counts.
"""

import argparse
import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks._support.machine import environment, write_report
from benchmarks._support.random_network import CAPTION_TOKENS, RandomParameters
from sora_jax.config import open_sora_1_2
from sora_jax.export import check
from sora_jax.export.mixed_bits import allocate, error, table_bytes, table_rounded
from sora_jax.export.program import Stage
from sora_jax.export.size import Size
from sora_jax.export.stages import list_stages
from sora_jax.networks.registry import CLASSES
from sora_jax.storage.quantisation import dequantise, is_quantised, quantise, scale_axis

BUDGETS_GB = (0.6, 0.75, 0.9, 1.2)
WIDTHS = (3, 4, 6, 8)
UNIFORM = (4, 6, 8)  # what ``export --weights`` can do for all matrices at once, and below
SIZE = Size(num_frames=17, height=64, width=64)
_NO_LIMITS = check.Limits(-math.inf, math.inf)

Arrays = dict[str, np.ndarray]
Widths = dict[str, int]


@dataclasses.dataclass(frozen=True)
class Pair:
    """A pair of blocks with its weights, its functions and their inputs and outputs by function and case."""

    stage: Stage
    params: Arrays
    calls: Mapping[str, Callable[..., Any]]
    cases: Mapping[tuple[str, str], tuple[Arrays, Arrays]]
    rounded: Mapping[tuple[str, int], np.ndarray]

    @property
    def matrices(self) -> list[str]:
        """The parameters that are rounded."""
        return [name for name, array in self.params.items() if is_quantised(name, array.shape)]

    def with_widths(self, widths: Widths) -> Arrays:
        """Returns the weights with matrices rounded to their widths."""
        return {**self.params, **{name: self.rounded[name, width] for name, width in widths.items()}}

    def error(self, widths: Widths) -> float:
        """Returns the squared relative error of the full function, captured and with outliers together."""
        cases = {case: arrays for (function, case), arrays in self.cases.items() if function == "full"}
        return error(cases, self.with_widths(widths), lambda params, inputs: jax.device_get(self.calls["full"](params, inputs)))

    def worst(self, widths: Widths) -> dict[str, Any]:
        """Returns the least PSNR of both functions, captured and with outliers, and where it is."""
        params, checks = self.with_widths(widths), []
        for (function, case), (inputs, outputs) in self.cases.items():
            found = jax.device_get(self.calls[function](params, inputs))
            checks += [(function, one) for one in check.compare(case, inputs, outputs, found, _NO_LIMITS)]
        function, least = min(checks, key=lambda one: one[1].psnr_db)
        largest = max(one.relative_l2 for _, one in checks)
        return {"psnr_db": least.psnr_db, "relative_l2": largest, "function": function, "case": least.case}


def sample_pairs(numbers: list[int]) -> list[Pair]:
    """Returns pairs with the inputs that the front makes; each is given the same tokens."""
    listed = list_stages(open_sora_1_2, [SIZE], parts=("stdit3",))
    stages = {stage.name: stage for stage in listed}
    random = RandomParameters(CLASSES["stdit3"], open_sora_1_2.stdit3)
    front = stages["stdit3_front"]
    params = {local: random[name] for local, name in front.parameters.items()}
    made = jax.device_get(jax.jit(lambda p, x: front.functions[0].call(p, **x))(params, _front_inputs(front)))
    pair = stages["stdit3_pair_00"]
    calls = {one.name: jax.jit(lambda p, x, f=one: f.call(p, **x)) for one in pair.functions}
    inputs = {name: np.asarray(made[name]) for name in pair.functions[0].inputs}
    return [_pair(stages[f"stdit3_pair_{number:02}"], random, calls, inputs) for number in numbers]


def _front_inputs(front: Stage) -> Arrays:
    rng = np.random.default_rng(0)
    inputs = {name: rng.standard_normal(spec.shape, np.float32) for name, spec in front.functions[0].inputs.items()}
    mask = (np.arange(inputs["mask_BL"].shape[1])[None] < CAPTION_TOKENS).astype(np.float32)
    numbers = {"t_B": 1000, "fps_B": 24, "height_px_B": SIZE.height, "width_px_B": SIZE.width}
    return inputs | {"mask_BL": mask} | {name: np.float32([number]) for name, number in numbers.items()}


def _pair(stage: Stage, random: RandomParameters, calls: Mapping[str, Callable[..., Any]], inputs: Arrays) -> Pair:
    params = {local: random[name] for local, name in stage.parameters.items()}
    moved = check.with_outliers(inputs)
    given = {"captured": inputs, **({} if moved is None else {"outliers": moved})}
    cases = {
        (function, case): (arrays, jax.device_get(call(params, arrays)))
        for function, call in calls.items()
        for case, arrays in given.items()
    }
    matrices = {name: array for name, array in params.items() if is_quantised(name, array.shape)}
    rounded = {(name, width): round_to(array, width, name) for name, array in matrices.items() for width in WIDTHS}
    return Pair(stage, params, calls, cases, rounded)


def round_to(matrix: np.ndarray, width: int, name: str) -> np.ndarray:
    """Returns a matrix as it is multiplied out of so many bits a value."""
    if width == 8:
        return dequantise(name, *quantise(name, matrix))
    return table_rounded(matrix, width)


def matrix_bytes(name: str, shape: tuple[int, ...], width: int) -> float:
    """Returns the bytes of a matrix and its table or scales."""
    if width < 8:
        return table_bytes(shape, width)
    return math.prod(shape) + 2 * shape[scale_axis(name)]


def pair_bytes(pair: Pair, widths: Widths) -> float:
    """Returns the bytes of a pair; what is no matrix is float16."""
    others = sum(2 * array.size for name, array in pair.params.items() if name not in widths)
    return others + sum(matrix_bytes(name, pair.params[name].shape, width) for name, width in widths.items())


def measure(numbers: list[int]) -> dict[str, Any]:
    """Returns the costs of matrices and, for every budget, the worst output of one width and of a width for each."""
    pairs, depth = sample_pairs(numbers), open_sora_1_2.stdit3.depth
    first = pairs[0]
    costs = {name: {width: _mean(pair.error({name: width}) for pair in pairs) for width in WIDTHS} for name in first.matrices}
    size = functools.partial(_sizes, first)
    most = dict.fromkeys(first.matrices, max(WIDTHS))
    others = pair_bytes(first, most) - sum(size(name)[max(WIDTHS)] for name in first.matrices)
    points = []
    for budget_gb in BUDGETS_GB:
        room = budget_gb * 1e9 / depth
        fitting = [width for width in UNIFORM if pair_bytes(first, dict.fromkeys(first.matrices, width)) <= room]
        mixed = allocate(costs, {name: size(name) for name in first.matrices}, room - others)
        point: dict[str, Any] = {"budget_gb": budget_gb, "mixed": {**_point(pairs, mixed, depth), "widths": mixed}}
        if fitting:
            uniform = dict.fromkeys(first.matrices, max(fitting))
            point["uniform"] = {**_point(pairs, uniform, depth), "width": max(fitting)}
        points.append(point)
        print(budget_gb, {name: point[name] for name in ("uniform", "mixed") if name in point}, flush=True)
    return {"pairs": numbers, "costs": costs, "points": points}


def _sizes(pair: Pair, name: str) -> dict[int, float]:
    return {width: matrix_bytes(name, pair.params[name].shape, width) for width in WIDTHS}


def _point(pairs: list[Pair], widths: Widths, depth: int) -> dict[str, Any]:
    worst = min((pair.worst(widths) for pair in pairs), key=lambda one: one["psnr_db"])
    return {"gigabytes": depth * pair_bytes(pairs[0], widths) / 1e9, **worst}


def _mean(values: Any) -> float:
    return float(np.mean(list(values)))


def main() -> None:
    """Measures, prints and writes what the command line asks for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pairs", default="0,14", help="numbers of the pairs that stand for all")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    report: dict[str, Any] = {
        "question": "bytes against the worst output of STDiT3-XL/2's pairs, one width for all matrices and a width for each",
        "setting": {"pairs": options.pairs, "size": SIZE.key, "widths": WIDTHS, "weights": "random"},
        "environment": environment(),
    }
    report["results"] = measure([int(number) for number in options.pairs.split(",")])
    write_report(report, options.json, show=True)


if __name__ == "__main__":
    main()
