"""Outcomes as JSON and as lines for people.

Invariant: both say what was compiled for which hardware, and that nothing was run there.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from sora_jax.planning.outcome import Outcome
from sora_jax.planning.request import Model, Request

NOTHING_MEASURED = "compiled only: nothing was run there, and no figure is a measurement"


def fields(request: Request, model: Model, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Returns request and outcomes as JSON-ready values."""
    clip = model.settings
    return {
        "model": request.model,
        "clip": {
            "num_frames": clip.num_frames,
            "height": clip.height,
            "width": clip.width,
            "num_steps": clip.num_steps,
            "guided": clip.guided,
            "dtype": clip.dtype,
        },
        "attention": request.attention,
        "compiled_for": request.hardware.title,
        "memory_bytes": request.hardware.chip.memory_bytes,
        "weights": request.weights,
        "optimisation": request.optimisation,
        "note": NOTHING_MEASURED,
        "programs": [outcome.fields(clip.dtype) for outcome in outcomes],
        "fits": all(outcome.fits for outcome in outcomes),
    }


def table(request: Request, model: Model, outcomes: Sequence[Outcome]) -> list[str]:
    """Returns the same as lines."""
    clip, target = model.settings, request.hardware
    guided = "guided" if clip.guided else "without guidance"
    asked = (
        f"{request.model}: {clip.num_frames} frames of {clip.height} x {clip.width}, {clip.dtype}, {guided}, "
        f"{clip.num_steps} steps, attention {request.attention}"
    )
    lines = [asked, f"compiled for {target.title} ({gigabytes(target.chip.memory_bytes)}); {NOTHING_MEASURED}"]
    for outcome in outcomes:
        lines += ["", f"{outcome.program}: {outcome.what}"]
        lines += [f"  {name:12} {value}" for name, value in _rows(request, clip.dtype, outcome).items()]
    return lines


def _rows(request: Request, dtype: str, outcome: Outcome) -> Mapping[str, str]:
    rows = {"fits": ("yes" if outcome.fits else "no") + (f": {outcome.why}" if outcome.why else "")}
    if outcome.peak_bytes is not None:
        rows["memory"] = (
            f"arguments {gigabytes(outcome.argument_bytes)}, temporaries {gigabytes(outcome.temporary_bytes)}, "
            f"peak {gigabytes(outcome.peak_bytes)}"
        )
        if request.optimisation == "fast" and outcome.target.chip.platform == "tpu":
            rows["memory"] += " (fast compilation: temporaries up to half again too high)"
    if outcome.attention:
        rows["attention"] = ", ".join(f"{name} {form}" for name, form in outcome.attention.items())
    rows["operations"] = f"{outcome.operations / 1e12:.3g} TFLOP, {outcome.counted}"
    estimate = outcome.estimate(dtype)
    if estimate is not None and outcome.moved_bytes is not None:
        rows["bytes"] = f"{gigabytes(outcome.moved_bytes)} to and from memory, {outcome.counted}"
        rows["at best"] = (
            f"{estimate.seconds:.3g} s, {outcome.times} times in a clip (estimate from the data sheet: computing "
            f"{estimate.compute_s:.3g} s, memory {estimate.memory_s:.3g} s)"
        )
        rows["collectives"] = _collectives(outcome)
        rows["host"] = ", ".join(outcome.host_transfers) or "no transfers"
    rows["compiled in"] = f"{outcome.compile_s:.0f} s here, {outcome.compile_cpu_s:.0f} s of the processor"
    return rows


def _collectives(outcome: Outcome) -> str:
    found = (f"{one['number']} {kind}, {gigabytes(one['bytes'])}" for kind, one in outcome.collectives.items())
    return "; ".join(found) or "none"


def gigabytes(number: int | None) -> str:
    """Returns bytes as GB, in three digits."""
    return f"{(number or 0) / 1e9:.3g} GB"
