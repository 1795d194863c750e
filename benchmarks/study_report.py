"""Tables and figures of `sampler_study`: from its lines to JSON, markdown and a picture.

Invariant: every number comes from the lines; nothing is made or measured here.  Medians stand with their quartiles, shares
with their 95 % interval.  The picture needs matplotlib (extra ``study``); without it the tables are written alone.
"""

import importlib.util
import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.machine import environment
from benchmarks.study_methods import LEAP_EVALUATIONS, LONG_REFERENCE, MERGED_STEPS, REFERENCE, STEPS, frontier
from sora_jax.pocket.scores import Rate

MEDIANS = ("psnr_30", "ssim_30", "psnr_200", "ssim_200", "steadiness", "flow", "flow_kept", "pace", "object_px")
SHARES = ("colour", "shape", "motion", "speed", "all")
_BAND = (0.05, 0.95)
_NOTE = (
    "Evaluations are those of the guided velocity: conditional and unconditional rows together count one. PSNR and SSIM are "
    f"against {STEPS} and 200 Euler steps from the same noise; medians, quartiles in brackets. Shares are of clips that show "
    "what their caption names, with 95 % intervals. Pace: speed of the object over the speed its caption names. Flow kept: "
    f"flow magnitude over that of {STEPS} Euler steps. Steadiness: VBench's formula of temporal flickering. LPL released "
    "decides for a whole batch from its first clip."
)

Row = Mapping[str, Any]


def write(lines: Sequence[Row], out: Path, about: Mapping[str, Any]) -> None:
    """Writes OUT.json, OUT.md and, with matplotlib, OUT.png.

    Raises:
      ValueError: there are no lines.
    """
    if not lines:
        raise ValueError("the study has no lines yet; run it without --report.")
    rows = summarise(lines)
    compared = [row for row in rows if row["name"] != LONG_REFERENCE]
    report = {
        **about,
        "environment": environment(),
        "clips": len(lines),
        "methods": rows,
        "frontier": {name: frontier(compared, name) for name in ("ssim_30", "ssim_200")},
        "cosines": cosines(lines),
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".json").write_text(json.dumps(report, indent=1, allow_nan=False) + "\n")
    out.with_suffix(".md").write_text(markdown(report))
    if importlib.util.find_spec("matplotlib") is None:
        print("no picture: matplotlib is not installed (pip install '.[study]')")
    else:
        draw(report, out.with_suffix(".png"))


def summarise(lines: Iterable[Row]) -> list[dict[str, Any]]:
    """Returns a row for each method: evaluations and medians with quartiles, shares with intervals; fewest first."""
    groups: dict[str, list[Row]] = {}
    for line in lines:
        groups.setdefault(line["method"], []).append(line)
    rows = []
    for name, group in groups.items():
        row: dict[str, Any] = {"name": name, "family": group[0]["family"], "clips": len(group)}
        counts = [line["evaluations"] for line in group]
        row |= {"evaluations": round(statistics.fmean(counts), 3), "fewest": min(counts), "most": max(counts)}
        row |= {key: spread([line[key] for line in group if key in line]) for key in MEDIANS if any(key in x for x in group)}
        for key in SHARES:
            outcomes = [line[key] for line in group if key in line]
            if outcomes:
                row[key] = Rate(sum(outcomes), len(outcomes)).to_dict()
        rows.append(row)
    return sorted(rows, key=lambda row: (row["evaluations"], row["name"]))


def spread(values: Sequence[float]) -> dict[str, float]:
    """Returns median and quartiles."""
    low, median, high = np.quantile(values, (0.25, 0.5, 0.75))
    return {"median": round(float(median), 5), "low": round(float(low), 5), "high": round(float(high), 5)}


def cosines(lines: Iterable[Row]) -> dict[str, Any]:
    """Returns mean and 5..95 % band of the cosine of each of the 30 Euler steps and the one before, and where LPL leapt."""
    lines = list(lines)
    full = [line["cosine"] for line in lines if line["method"] == REFERENCE]
    table = np.array([[np.nan if value is None else value for value in one] for one in full], float)
    seen = np.isfinite(table).all(axis=0)
    columns = table[:, seen]
    leaps: dict[int, int] = {}
    for line in lines:
        if line["method"] == "LPL dynamic" and "leap" in line:
            leaps[line["leap"]] = leaps.get(line["leap"], 0) + 1
    return {
        "step": np.flatnonzero(seen).tolist(),
        "mean": columns.mean(axis=0).round(6).tolist(),
        "low": np.quantile(columns, _BAND[0], axis=0).round(6).tolist(),
        "high": np.quantile(columns, _BAND[1], axis=0).round(6).tolist(),
        "leaps": {str(step): leaps[step] for step in sorted(leaps)},
    }


def markdown(report: Mapping[str, Any]) -> str:
    """Returns the tables as one page."""
    rows = {row["name"]: row for row in report["methods"]}
    settings = ", ".join(f"{name} {value}" for name, value in report["settings"].items())
    machine = report["environment"]
    lines = [
        "# Sampler study",
        "",
        f"Model {report['model']}; {settings}. {report['clips']} clips, commit {machine['commit']}, {machine['device']}.",
        "",
        _NOTE,
        "",
        "## Best at their number of evaluations",
        "",
        *table([rows[name] for name in dict.fromkeys([*report["frontier"]["ssim_200"], *report["frontier"]["ssim_30"]])]),
        "",
        "## Linear proportional leap (the paper's table 3)",
        "",
        *table([rows[name] for name in leap_names() if name in rows]),
        "",
        "## Temporal token merging (the paper's table 4)",
        "",
        *table([rows[name] for name in [*(f"TDTM {count}" for count in MERGED_STEPS), REFERENCE] if name in rows]),
        "",
        "## Cosine of consecutive velocities (the paper's figure 5)",
        "",
        *cosine_table(report["cosines"]),
        "",
        "## All methods",
        "",
        *table(report["methods"]),
    ]
    return "\n".join(lines) + "\n"


def leap_names() -> list[str]:
    """Returns the methods of the paper's table 3; 30 of 30 is the plain sampling."""
    static = [f"LPL {count}" for count in LEAP_EVALUATIONS if count != STEPS]
    return [*static, "LPL dynamic", "LPL released", REFERENCE]


def table(rows: Sequence[Row]) -> list[str]:
    """Returns a markdown table of methods."""
    columns = [key for key in (*MEDIANS, *SHARES) if any(key in row for row in rows)]
    titles = ["method", "evaluations", "speed-up by evaluations", *(column.replace("_", " ") for column in columns), "clips"]
    lines = ["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]
    for row in rows:
        cells = [row["name"], f"{row['evaluations']:.4g}", f"{STEPS / row['evaluations']:.2f}x"]
        cells += [cell(row.get(column)) for column in columns]
        lines.append("| " + " | ".join([*cells, str(row["clips"])]) + " |")
    return lines


def cell(value: Mapping[str, Any] | None) -> str:
    """Returns a median with its quartiles or a share with its interval."""
    if value is None:
        return ""
    middle = value["median"] if "median" in value else value["share"]
    return f"{middle:.3g} ({value['low']:.3g}..{value['high']:.3g})"


def cosine_table(found: Mapping[str, Any]) -> list[str]:
    """Returns the cosines by step, and how many clips the dynamic rule let leap there."""
    lines = ["| step | mean | 5 % .. 95 % of clips | clips that leapt |", "|---|---|---|---|"]
    for step, mean, low, high in zip(found["step"], found["mean"], found["low"], found["high"], strict=True):
        lines.append(f"| {step} | {mean:.5f} | {low:.5f} .. {high:.5f} | {found['leaps'].get(str(step), 0)} |")
    return lines


def draw(report: Mapping[str, Any], path: Path) -> None:
    """Draws likeness over evaluations, against both references, and the cosines."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(15, 4.5), layout="constrained")
    for axis, measure, title in zip(axes, ("ssim_30", "ssim_200"), ("30", "200"), strict=False):
        draw_families(axis, report["methods"], measure)
        axis.set(xlabel="evaluations", ylabel=f"SSIM against {title} Euler steps, median", xlim=(7, 31))
    axes[0].legend(fontsize=7)
    found = report["cosines"]
    axes[2].fill_between(found["step"], found["low"], found["high"], alpha=0.3, label="5 % to 95 % of clips")
    axes[2].plot(found["step"], found["mean"], label="mean")
    if found["leaps"]:
        steps = [int(step) for step in found["leaps"]]
        at = [found["mean"][found["step"].index(step)] for step in steps]
        sizes = [20 + 10 * count for count in found["leaps"].values()]
        axes[2].scatter(steps, at, s=sizes, color="tab:red", zorder=3, label="dynamic rule leaps (area: clips)")
    axes[2].set(xlabel="step", ylabel="cosine of this velocity and the one before")
    axes[2].legend(fontsize=7)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(figure)


def draw_families(axis: Any, rows: Sequence[Row], measure: str) -> None:
    """Draws a line for each family of methods that differ in their evaluations, a mark for each that stands alone."""
    families: dict[str, list[Row]] = {}
    for row in rows:
        if row["name"] != LONG_REFERENCE and row["family"] not in ("TDTM", "LPL and TDTM"):
            families.setdefault(row["family"], []).append(row)
    for index, (family, group) in enumerate(sorted(families.items())):
        colour, style = f"C{index % 10}", "-" if index < 10 else "--"
        x, y = [row["evaluations"] for row in group], [row[measure]["median"] for row in group]
        if len(group) > 1:
            axis.plot(x, y, style, color=colour, marker=".", label=family, linewidth=1)
        else:
            axis.plot(x, y, "*", color=colour, markersize=9, label=family)
