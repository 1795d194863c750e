"""A memory plan for people and for JSON.

Invariant: times are shown with the storage bandwidth and the speed they hold for; nothing is measured here.
"""

import dataclasses
from typing import Any

from sora_jax.streaming.memory_plan import MemoryPlan, StagePlan

_COLUMNS = ("baseline", "compiler", "parameters", "activations", "staging", "retained", "peak", "minimum")


def fields(plan: MemoryPlan, *, bytes_per_s: float, flop_per_s: float) -> dict[str, Any]:
    """Returns the plan as JSON-ready values: bytes, and seconds at a storage bandwidth and a speed."""
    stages = {
        stage.name: {
            **{column: getattr(stage, column) for column in _COLUMNS},
            "retained_layers": stage.retained_layers,
            "num_layers": stage.num_layers,
            "num_slots": stage.num_slots,
            "evaluations": stage.evaluations,
            "read_per_evaluation": stage.read,
            "flops_per_evaluation": stage.flops,
            "seconds": round(stage.seconds(bytes_per_s, flop_per_s), 3),
        }
        for stage in plan.stages
    }
    return {
        "workload": dataclasses.asdict(plan.workload),
        "budget": plan.budget,
        "peak": plan.peak,
        "minimum": plan.minimum,
        "bytes_per_s": bytes_per_s,
        "flop_per_s": flop_per_s,
        "stages": stages,
    }


def table(plan: MemoryPlan, *, bytes_per_s: float, flop_per_s: float) -> list[str]:
    """Returns the plan as lines: megabytes by stage, what is retained, and seconds."""
    work = plan.workload
    budget = "no budget" if plan.budget is None else f"budget {plan.budget / 1e6:,.0f} MB"
    guidance = "guided" if work.guided else "without guidance"
    rows = [["stage", *_COLUMNS, "layers kept", "time"]]
    for stage in plan.stages:
        cells = [f"{getattr(stage, column) / 1e6:,.0f}" for column in _COLUMNS]
        rows.append([stage.name, *cells, _kept(stage), f"{stage.seconds(bytes_per_s, flop_per_s):,.0f} s"])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    clips = f"{work.batch} x {work.num_frames} frames at {work.height}x{work.width}, {work.num_steps} steps {guidance}"
    return [
        f"{clips}, {work.dtype}; {budget}: peak {plan.peak / 1e6:,.0f} MB, least budget {plan.minimum / 1e6:,.0f} MB",
        *("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows),
        f"MB (1e6 bytes); times are estimates at {bytes_per_s / 1e9:.3g} GB/s of storage and {flop_per_s / 1e9:,.0f} GFLOP/s.",
    ]


def _kept(stage: StagePlan) -> str:
    if stage.num_layers:
        return f"{stage.retained_layers} of {stage.num_layers}"
    return "reads ahead" if stage.num_slots > 1 else "one by one"
