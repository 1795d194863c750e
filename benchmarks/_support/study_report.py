"""Tables of `sampler_study`: from its lines to JSON and markdown.

Invariant: every number comes from the lines; nothing is sampled or measured here.  Methods of one table are compared on the
same clips.  Medians stand with their quartiles, shares with their 95 % interval.
"""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks._support import study_pictures
from benchmarks._support.machine import environment, write_report
from benchmarks._support.study_clips import CAPPED_DB
from benchmarks._support.study_methods import FINE_REFERENCE, LEAP_EVALUATIONS, MERGED_STEPS, REFERENCE, STEPS, frontier
from sora_jax.pocket.judging.scores import Rate

OVER_EULER = {"over_euler_fine": "psnr_fine", "over_euler_30": "psnr_30"}
MEDIANS = ("psnr_fine", "ssim_fine", "psnr_30", "ssim_30", *OVER_EULER, "steadiness", "flow", "flow_kept", "pace", "object_px")
SHARES = ("colour", "shape", "motion", "speed", "all")
_BAND = (0.05, 0.95)
_NORMAL_95 = 1.96
_NOTE = (
    "Evaluations are those of the guided velocity: conditional and unconditional rows together count one. PSNR and SSIM are "
    f"against the {FINE_REFERENCE} steps, and {STEPS} Euler steps from the same noise; medians, quartiles in brackets. Over "
    "Euler: PSNR less that of the same clip by plain Euler at as many evaluations, dB. Shares are of clips that show what "
    "their caption names, with 95 % intervals; all less 30: the share of all, less that of 30 Euler steps on the same clips. "
    "Pace: speed of the object over the speed its caption names. Flow kept: flow magnitude over that of "
    f"{STEPS} Euler steps. Steadiness: VBench's formula of temporal flickering. LPL released decides for a whole batch from "
    "its first clip."
)

Row = Mapping[str, Any]


def write(lines: Sequence[Row], out: Path, about: Mapping[str, Any], pictures: Path) -> None:
    """Writes OUT.json, OUT.md and the pictures.

    Raises:
      ValueError: there are no lines.
    """
    if not lines:
        raise ValueError("the study has no lines yet; run it without --report.")
    rows = summarise(shared(lines))
    compared = [row for row in rows if row["name"] != FINE_REFERENCE]
    report = {
        **about,
        "environment": environment(),
        "clips": len(lines),
        "methods": rows,
        "frontier": {name: frontier(compared, name) for name in ("psnr_fine", "ssim_fine", "psnr_30", "ssim_30")},
        "best_on_more_clips": summarise(most_clips(lines)),
        "cosines": cosines(lines),
    }
    write_report(report, out.with_suffix(".json"))
    out.with_suffix(".md").write_text(markdown(report))
    study_pictures.draw(report, pictures)


def shared(lines: Sequence[Row]) -> list[Row]:
    """Returns the lines of the clips, by prompt and noise, that every method made."""
    made: dict[str, set[tuple[int, int]]] = {}
    for line in lines:
        made.setdefault(line["method"], set()).add((line["prompt"], line["noise"]))
    common = set.intersection(*made.values())
    return [line for line in lines if (line["prompt"], line["noise"]) in common]


def most_clips(lines: Sequence[Row]) -> list[Row]:
    """Returns the lines of the methods with the most clips; none if all methods have equally many."""
    counts: dict[str, int] = {}
    for line in lines:
        counts[line["method"]] = counts.get(line["method"], 0) + 1
    most = max(counts.values())
    return [line for line in lines if counts[line["method"]] == most] if most > min(counts.values()) else []


def over_euler(lines: Iterable[Row]) -> list[Row]:
    """Returns the lines, each with its PSNR less that of plain Euler's clip at as many evaluations.

    The difference is left out if there is no such clip, or if it is the reference itself.
    """
    lines = list(lines)
    plain = {(x["prompt"], x["noise"], x["evaluations"]): x for x in lines if x["family"] == "Euler"}
    out = []
    for line in lines:
        rival = plain.get((line["prompt"], line["noise"], line["evaluations"]), {})
        names = {name: like for name, like in OVER_EULER.items() if rival.get(like, CAPPED_DB) < CAPPED_DB}
        out.append({**line, **{name: line[like] - rival[like] for name, like in names.items()}})
    return out


def summarise(lines: Iterable[Row]) -> list[dict[str, Any]]:
    """Returns a row for each method: evaluations and medians with quartiles, shares with intervals; fewest first."""
    groups: dict[str, list[Row]] = {}
    for line in over_euler(lines):
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
        if pairs := paired(group, groups.get(REFERENCE, [])):
            row["all_less_30"] = pairs
        rows.append(row)
    return sorted(rows, key=lambda row: (row["evaluations"], row["name"]))


def paired(group: Iterable[Row], exact: Iterable[Row]) -> dict[str, float]:
    """Returns the share of captions followed less that of 30 Euler steps on the same clips, with its 95 % interval."""
    followed = {(line["prompt"], line["noise"]): line["all"] for line in exact if "all" in line}
    both = [
        (line["all"], followed[at]) for line in group if "all" in line and (at := (line["prompt"], line["noise"])) in followed
    ]
    if len(both) < 2:
        return {}
    ahead = [float(ours) - float(theirs) for ours, theirs in both]
    mean, half = statistics.fmean(ahead), _NORMAL_95 * statistics.stdev(ahead) / math.sqrt(len(ahead))
    return {"mean": round(mean, 5), "low": round(mean - half, 5), "high": round(mean + half, 5)}


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
    more = ["## The best and the paper's on more clips", "", *table(report["best_on_more_clips"]), ""]
    more = more if report["best_on_more_clips"] else []
    lines = [
        "# Sampler study",
        "",
        f"Model {report['model']}; {settings}. {report['clips']} clips, commit {machine['commit']}, {machine['device']}.",
        "",
        _NOTE,
        "",
        "## Best at their number of evaluations",
        "",
        *table([rows[name] for name in dict.fromkeys(name for names in report["frontier"].values() for name in names)]),
        "",
        *more,
        "## Linear proportional leap (the paper's table 3)",
        "",
        f"LPL n evaluates the first n of {STEPS} steps, the last of them leaps; {REFERENCE} leaps nowhere.",
        "",
        *table([rows[name] for name in leap_names() if name in rows]),
        "",
        "## Temporal token merging (the paper's table 4)",
        "",
        f"TDTM n merges in the first n of {STEPS} steps; {REFERENCE} merges in none.",
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
    columns = [key for key in (*MEDIANS, *SHARES, "all_less_30") if any(key in row for row in rows)]
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
    middle = next(value[name] for name in ("median", "share", "mean") if name in value)
    return f"{middle:.3g} ({value['low']:.3g}..{value['high']:.3g})"


def cosine_table(found: Mapping[str, Any]) -> list[str]:
    """Returns the cosines by step, and how many clips leapt there by the dynamic rule."""
    lines = ["| step | mean | 5 % .. 95 % of clips | clips that leapt |", "|---|---|---|---|"]
    for step, mean, low, high in zip(found["step"], found["mean"], found["low"], found["high"], strict=True):
        lines.append(f"| {step} | {mean:.5f} | {low:.5f} .. {high:.5f} | {found['leaps'].get(str(step), 0)} |")
    return lines
