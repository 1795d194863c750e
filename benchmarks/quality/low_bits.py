"""How well captions are followed when the transformer has fewer than 8 bits a weight: one width, and a width for each matrix.

Command:  python -m benchmarks.quality.low_bits --clips 100 --json benchmarks/results/low_bits.json
Needs:    the embedded model; eight samplings of each caption, a quarter of an hour on two cores.
Expect:   captions followed as before from 6 bits on; at equal bytes a width for each matrix nearer to the exact clips.
Rival:    at equal bytes one width for all matrices, which is what ``export --weights lut4``, ``lut6`` and ``int8`` do.

The points are those of `bits_frontier`: 4, 5, 6 and 8 bits a weight make 28 pairs of the released shapes 0.6, 0.75, 0.9 and
1.2 GB.  Only the matrices of the pairs are rounded.  Widths are chosen as ``export --weights mixed`` chooses them: pair by
pair, on captured values and with outlier channels.  Weights are multiplied out; clips are sampled by 16 steps of AB2.
"""

import argparse
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks._support.machine import environment, write_report
from benchmarks.export.bits_frontier import round_to
from benchmarks.quality.int8_error import rates
from sora_jax.config import ModelConfig
from sora_jax.export import capture, check, mixed_bits
from sora_jax.export.program import Function, Stage
from sora_jax.export.size import Size
from sora_jax.export.stages import list_stages
from sora_jax.metrics import psnr
from sora_jax.pipeline.model_file import POCKET
from sora_jax.pipeline.pipeline import Pipeline
from sora_jax.pocket.judging import cases
from sora_jax.storage.checkpoint import load_network, save_network
from sora_jax.storage.quantisation import is_quantised

MEAN_BITS = {4: 0.6, 5: 0.75, 6: 0.9, 8: 1.2}  # gigabytes of the released shapes
UNIFORM = (4, 6, 8)
SAMPLING: Any = {"solver": "ab2", "num_steps": 16, "shift": 4.0}

Arrays = dict[str, np.ndarray]


def captured_pairs(flat: Mapping[str, Arrays], config: ModelConfig, pipeline: Pipeline) -> Iterator[tuple[Stage, Arrays, Any]]:
    """Yields each pair of blocks, its weights, and its inputs and outputs by case in one real evaluation."""
    settings = pipeline.resolve({})
    size = Size(num_frames=settings.num_frames, height=settings.height, width=settings.width)
    values = capture.start(config, pipeline.tokenizer, size, settings)
    for stage in list_stages(config, [size], parts=("t5", "stdit3")):
        params = {local: flat[stage.network][name] for local, name in stage.parameters.items()}
        function = stage.functions[0]
        call = as_call(function)
        inputs = capture.stage_inputs(function, values)
        outputs = call(params, inputs)
        if "_pair_" in stage.name:
            given = {"captured": inputs, "outliers": check.with_outliers(inputs)}
            yield stage, params, {case: (arrays, call(params, arrays)) for case, arrays in given.items() if arrays is not None}
        values = capture.after_stage(stage, values, outputs, settings.guidance)


def as_call(function: Function) -> Any:
    """Returns a function of weights and inputs, compiled."""
    compiled = jax.jit(lambda params, inputs: function.call(params, **inputs))
    return lambda params, inputs: jax.device_get(compiled(params, inputs))


def variants(model: Path) -> Iterator[tuple[dict[str, Any], Arrays]]:
    """Yields what each point is, and the transformer's weights there."""
    networks = {network: load_network(model, network, dtype="float32") for network in ("t5", "stdit3", "vae")}
    flat = {network: dict(arrays) for network, (_, arrays) in networks.items()}
    config = ModelConfig(**{network: one for network, (one, _) in networks.items()})
    pairs = list(captured_pairs(flat, config, Pipeline.from_pretrained(model)))
    for bits in UNIFORM:
        rounded = {}
        for stage, params, _ in pairs:
            rounded |= {stage.parameters[name]: round_to(params[name], bits, name) for name in matrices(params)}
        yield {"widths": "one", "bits": bits, "gigabytes_released": MEAN_BITS[bits]}, {**flat["stdit3"], **rounded}
    for mean, gigabytes in MEAN_BITS.items():
        rounded, counts = {}, dict.fromkeys(mixed_bits.WIDTHS, 0)
        for stage, params, given in pairs:
            widths = mixed_bits.choose_widths(params, mean, given, as_call(stage.functions[0]))
            for name, width in widths.items():
                rounded[stage.parameters[name]] = mixed_bits.table_rounded(params[name], width)
                counts[width] += 1
        point = {"widths": "for each matrix", "bits": mean, "gigabytes_released": gigabytes, "matrices_by_width": counts}
        yield point, {**flat["stdit3"], **rounded}


def matrices(params: Arrays) -> list[str]:
    """Returns the names of the weights that are rounded."""
    return [name for name, array in params.items() if is_quantised(name, array.shape)]


def measured(model: Path, num_clips: int, seed: int, scratch: Path) -> list[dict[str, Any]]:
    """Returns a row for each point: faithfulness, and how near its clips come to those of the exact weights."""
    asked = cases.captions(num_clips, seed=seed)
    attributes = [one.attributes for one in asked]
    exact = [one.frames_thw3 for one in cases.clips(model, asked, SAMPLING)]
    rows = [{"widths": "exact", "faithfulness": rates(exact, attributes)}]
    config = load_network(model, "stdit3", dtype="float32")[0]
    for point, flat in variants(model):
        copy = scratch / "model"
        shutil.copytree(model, copy, ignore=shutil.ignore_patterns("recipes"))
        save_network(copy, "stdit3", config, flat, dtype="float32", overwrite=True)
        made = [one.frames_thw3 for one in cases.clips(copy, asked, SAMPLING)]
        near = [psnr(a, b) for a, b in zip(made, exact, strict=True)]
        psnr_db = {"median": float(np.median(near)), "least": float(np.min(near))}
        rows.append({**point, "psnr_db": psnr_db, "faithfulness": rates(made, attributes)})
        print(rows[-1], flush=True)
        shutil.rmtree(copy)
    return rows


def main() -> None:
    """Measures, prints and writes what the command line asks for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--clips", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        rows = measured(POCKET, options.clips, options.seed, Path(scratch))
    write_report(
        {"question": "captions followed below 8 bits a weight", "clips": options.clips, "seed": options.seed,
         "environment": environment(), "rows": rows},
        options.json,
    )  # fmt: skip


if __name__ == "__main__":
    main()
