"""Predicted time and memory of every stage on a phone, compared with what On-device Sora's paper measured there.

Command:  python -m benchmarks.memory.device_plan --profile iphone-15-pro [--bandwidth 1.2GB] [--stored float32] [--json FILE]
Needs:    nothing: shapes only, no weights, seconds.
Expect:   every row states its error.  With the nominal speed the times are lower bounds; `fitted` takes speed and bandwidth
          from the paper's step with and without concurrent inference at 256 x 256, and predicts the rest.
Rival:    the paper's measurements (arXiv 2502.04363, tables 1 and 5 and section 6).

Only the arithmetic of the memory plan is used (`sora_jax.streaming.memory_plan`): the longer of reading and computing.  What a
phone's own runtime adds (compiling for its accelerator, heat) is not modelled and shows as error.
"""

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from benchmarks._support.machine import environment, write_report
from sora_jax.config import open_sora_1_2
from sora_jax.networks import registry
from sora_jax.storage.arrays import Parameter
from sora_jax.storage.checkpoint import flatten
from sora_jax.storage.directory import Manifest
from sora_jax.storage.quantisation import SCALE_SUFFIX, is_quantised, scale_axis
from sora_jax.streaming import activations
from sora_jax.streaming.budget import parse_budget
from sora_jax.streaming.memory_plan import StagePlan, Workload, plan_memory, token_shape

RESULTS = Path(__file__).parents[1] / "results" / "device_plan.json"
SIZES, FRAMES, STEPS = (192, 256), 68, 30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Profile:
    """A device: floating-point operations a second, the memory an app may use, bytes a second of its storage."""

    flop_per_s: float
    budget: int
    bytes_per_s: float


PROFILES = {"iphone-15-pro": Profile(flop_per_s=2.15e12, budget=3_300_000_000, bytes_per_s=1.2e9)}

# iPhone 15 Pro, 68 frames; seconds.  Source: arXiv 2502.04363, table 1 (stages at 256 x 256) and the ablation (30 steps).
PAPER_STAGES_S = {"text": 110.5, "step": 35.4, "decode": 135.0}
PAPER_STEP_S = {"sequential": 29.0, "CI": 23.0}
PAPER_DL_SAVED_S = 17.0  # over 30 steps
PAPER_SPEEDUPS = {"LPL": 1.85, "TDTM": 1.10, "CI+DL": 1.12, "all": 2.33}  # on the transformer, 256 x 256, 30 steps
LPL_EVALUATIONS = 17.73  # dynamic, of 30, on average
MERGED_STEPS = 15  # the paper merges in the first half of the steps


def main() -> None:
    """Prints predictions and measurements side by side, and writes them."""
    options = parse()
    profile = PROFILES[options.profile]
    if options.bandwidth:
        profile = dataclasses.replace(profile, bytes_per_s=float(parse_budget(options.bandwidth)))
    manifests = shapes_only(options.stored)
    report = {
        "setting": {"profile": options.profile, "stored": options.stored, **dataclasses.asdict(profile)},
        "environment": environment(),
        "nominal": predict(manifests, profile),
    }
    fitted = fit(manifests, profile)
    report["fitted"] = {"profile": dataclasses.asdict(fitted), **predict(manifests, fitted)}
    for name in ("nominal", "fitted"):
        print("\n".join([f"-- {name} --", *table(report[name])]))
    write_report(report, options.json)


def parse() -> argparse.Namespace:
    """Returns the command line's options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--profile", choices=list(PROFILES), default="iphone-15-pro")
    parser.add_argument("--bandwidth", help="storage, a second, for example 1.2GB")
    parser.add_argument("--stored", choices=["float32", "bfloat16", "int8"], default="float32", help="dtype of the weights")
    parser.add_argument("--json", type=Path, default=RESULTS)
    return parser.parse_args()


def shapes_only(stored: str) -> dict[str, Manifest]:
    """Returns manifests of the full architecture, without files; the autoencoder is never stored as int8."""
    manifests = {}
    for network in registry.CLASSES:
        config, dtype = getattr(open_sora_1_2, network), "float32" if network == "vae" and stored == "int8" else stored
        shapes = flatten(registry.abstract(network, config))
        parameters = {}
        for name, leaf in shapes.items():
            quantised = dtype == "int8" and is_quantised(name, leaf.shape)
            parameters[name] = Parameter(leaf.shape, dtype if quantised or dtype != "int8" else "float32", "")
            if quantised:
                parameters[name + SCALE_SUFFIX] = Parameter((leaf.shape[scale_axis(name)],), "float32", "")
        manifests[network] = Manifest(Path(), network, config, dtype, parameters, {})
    return manifests


def predict(manifests: dict[str, Manifest], profile: Profile) -> dict[str, Any]:
    """Returns predicted stages and ablation, with the paper's number and the error where there is one."""
    speed = profile.bytes_per_s, profile.flop_per_s
    stages: dict[str, Any] = {}
    ablation: dict[str, Any] = {}
    for size in SIZES:
        plan = plan_memory(manifests, Workload(num_frames=FRAMES, height=size, width=size, num_steps=STEPS), profile.budget)
        denoise = plan.stage("denoise")
        seconds = {"text": plan.stage("text").seconds(*speed), "step": denoise.seconds(*speed) / STEPS}
        seconds["decode"] = plan.stage("decode").seconds(*speed)
        peaks = {stage.name: stage.peak for stage in plan.stages}
        stages[str(size)] = {
            name: {"peak_bytes": peaks["denoise" if name == "step" else name], **compared(value, paper_stage(name, size))}
            for name, value in seconds.items()
        }
        ablation[str(size)] = predict_ablation(manifests, denoise, size, profile)
    return {"stages": stages, "ablation": ablation}


def paper_stage(name: str, size: int) -> float | None:
    """Returns the paper's seconds of a stage, which it gives at 256 x 256; the text encoder knows no size."""
    return PAPER_STAGES_S[name] if size == 256 or name == "text" else None


def predict_ablation(manifests: dict[str, Manifest], denoise: StagePlan, size: int, profile: Profile) -> dict[str, Any]:
    """Returns the seconds of the transformer with each technique alone and with all, and their speed-ups."""
    work = Workload(num_frames=FRAMES, height=size, width=size)
    compute = denoise.flops / profile.flop_per_s
    load = (denoise.read + denoise.retained) / profile.bytes_per_s
    merged = merged_flops(work) / profile.flop_per_s
    kept = denoise.retained_layers / denoise.num_layers
    share = MERGED_STEPS / STEPS
    steps = {
        "sequential": load + compute,
        "CI": max(load, compute),
        "CI+DL": max((1 - kept) * load, (1 - kept) * compute) + kept * compute,
        "TDTM": load + share * merged + (1 - share) * compute,
    }
    blended = share * merged + (1 - share) * compute
    steps["all"] = max((1 - kept) * load, (1 - kept) * blended) + kept * blended
    totals = {name: STEPS * value for name, value in steps.items()}
    totals["CI+DL"] += kept * load
    totals["LPL"] = LPL_EVALUATIONS * steps["sequential"]
    totals["all"] = LPL_EVALUATIONS * steps["all"] + kept * load
    paper = PAPER_SPEEDUPS if size == 256 else {}
    rows: dict[str, Any] = {
        name: {"seconds": value, "speedup": compared(totals["sequential"] / value, paper.get(name))}
        for name, value in totals.items()
    }
    if size == 256:
        rows["sequential step"] = compared(steps["sequential"], PAPER_STEP_S["sequential"])
        rows["CI step"] = compared(steps["CI"], PAPER_STEP_S["CI"])
        rows["DL saves"] = compared(totals["CI"] - totals["CI+DL"], PAPER_DL_SAVED_S)
    return rows


def merged_flops(work: Workload) -> float:
    """Returns the operations of an evaluation whose attentions see pairs of frames as one; the MLP sees all."""
    config = open_sora_1_2.stdit3
    rows, frames, places = token_shape(open_sora_1_2, work)
    halved = activations.denoise_flops(config, rows, -(-frames // 2), places)
    mlp = 2 * config.depth * 2.0 * 2 * config.hidden_size * config.mlp_size
    mlp_of_the_rest = mlp * rows * places * (frames - -(-frames // 2))
    return halved + mlp_of_the_rest


def fit(manifests: dict[str, Manifest], profile: Profile) -> Profile:
    """Returns the profile behind the paper's two steps: overlapped they take the computing, sequentially the reading too."""
    denoise = plan_memory(manifests, Workload(num_frames=FRAMES, height=256, width=256), profile.budget).stage("denoise")
    load_s = PAPER_STEP_S["sequential"] - PAPER_STEP_S["CI"]
    return dataclasses.replace(
        profile,
        flop_per_s=denoise.flops / PAPER_STEP_S["CI"],
        bytes_per_s=(denoise.read + denoise.retained) / load_s,
    )


def compared(predicted: float, measured: float | None) -> dict[str, float | None]:
    """Returns a prediction, its measurement and the relative error."""
    error = None if measured is None else predicted / measured - 1
    return {"predicted": predicted, "paper": measured, "error": error}


def table(report: dict[str, Any]) -> list[str]:
    """Returns the rows as lines."""
    lines = []
    for size in map(str, SIZES):
        for name, row in report["stages"][size].items():
            lines.append(f"{size} {name:16} {row['peak_bytes'] / 1e9:5.2f} GB  {_line(row, ' s')}")
        for name, row in report["ablation"][size].items():
            if "speedup" in row:
                lines.append(f"{size} {name:16} {row['seconds']:8.1f} s  {_line(row['speedup'], 'x')}")
            else:
                lines.append(f"{size} {name:16} {_line(row, ' s')}")
    return lines


def _line(row: dict[str, Any], unit: str) -> str:
    if row["paper"] is None:
        return f"{row['predicted']:.2f}{unit}"
    return f"{row['predicted']:.2f}{unit} (paper {row['paper']:.2f}{unit}, error {100 * row['error']:+.0f} %)"


if __name__ == "__main__":
    main()
