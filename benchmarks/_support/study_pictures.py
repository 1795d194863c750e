"""Pictures of `sampler_study`: closeness to the reference by evaluations, and the cosine of each step (the paper's figure 5).

Needs matplotlib (extra ``study``); without it nothing is drawn and one line says so.
"""

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Row = Mapping[str, Any]

# Families drawn, in the order of the legend, with their name there, colour and line.
DRAWN = {
    "recipe": ("recipes of this model", "black", "*"),
    "Euler": ("Euler", "black", "-"),
    "Euler shift 2": ("Euler, times shifted by 2", "grey", "--"),
    "Euler shift 6": ("Euler, times shifted by 6", "grey", ":"),
    "AB2": ("AB2", "tab:blue", "-"),
    "AB2 shift 4": ("AB2, times shifted by 4", "tab:blue", "--"),
    "AB2 shift 6": ("AB2, times shifted by 6", "tab:blue", ":"),
    "AB3 shift 6": ("AB3, times shifted by 6", "tab:cyan", ":"),
    "UniPC shift 6": ("UniPC, times shifted by 6", "tab:brown", ":"),
    "first block shift 6, extrapolated": ("first block, extrapolated, by 6", "tab:purple", ":"),
    "TeaCache shift 6, extrapolated": ("TeaCache, extrapolated, by 6", "tab:pink", ":"),
    "reuse": ("reuse plan, Euler", "tab:green", "-"),
    "reuse AB2 shift 6, extrapolated": ("plan, AB2, extrapolated, by 6", "tab:olive", ":"),
    "LPL": ("LPL, static", "tab:red", "-"),
    "LPL shift 6": ("LPL, times shifted by 6", "tab:red", ":"),
    "LPL dynamic": ("LPL, dynamic", "tab:red", ""),
}
CEILING_DB = 70.0  # upper end of the picture: clips closer to the reference look the same


def draw(report: Mapping[str, Any], folder: Path) -> None:
    """Writes sampler_frontier.png and sampler_cosines.png."""
    pyplot = pyplot_or_none()
    if pyplot is None:
        return
    folder.mkdir(parents=True, exist_ok=True)
    frontier, axes = pyplot.subplots(1, 2, figsize=(11.5, 4.4), layout="constrained")
    for axis, (name, reference) in zip(axes, {"fine": "the fine solution", "30": "30 Euler steps"}.items(), strict=True):
        draw_families(axis, report["methods"], f"psnr_{name}")
        axis.set(xlabel="evaluations", ylabel=f"PSNR against {reference}, median, dB", xlim=(7, 31))
    drawn = {name: line for axis in axes for line, name in zip(*axis.get_legend_handles_labels(), strict=True)}
    frontier.legend(drawn.values(), drawn.keys(), loc="outside right center", fontsize=9)
    figure, axis = pyplot.subplots(figsize=(6, 3.6), layout="constrained")
    draw_cosines(axis, report["cosines"])
    for name, one in (("frontier", frontier), ("cosines", figure)):
        one.savefig(folder / f"sampler_{name}.png", dpi=100, metadata={"Software": None})
        pyplot.close(one)


def pyplot_or_none() -> Any:
    """Returns matplotlib's pyplot for files; None, and a line that says so, where it is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        print("no pictures: matplotlib is not installed (pip install '.[study]')")
        return None
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    return pyplot


def draw_families(axis: Any, rows: Sequence[Row], measure: str) -> None:
    """Draws a line for each family of methods that differ in their evaluations, a star for each that stands alone."""
    for family, (name, colour, style) in DRAWN.items():
        group = [row for row in rows if row["family"] == family and row[measure]["median"] < CEILING_DB]
        x, y = [row["evaluations"] for row in group], [row[measure]["median"] for row in group]
        if group and style == "*":
            axis.plot(x, y, "-", color=colour, marker="*", markersize=9, label=name, linewidth=1.2)
        elif group and style:
            axis.plot(x, y, style, color=colour, marker=".", label=name, linewidth=1.2)
        elif group:
            axis.plot(x, y, "*", color=colour, markersize=10, label=name)


def draw_cosines(axis: Any, found: Mapping[str, Any]) -> None:
    """Draws mean and band of one minus the cosine, and marks where the dynamic rule leapt by the share of clips."""
    distance = {name: [1 - value for value in found[name]] for name in ("mean", "low", "high")}
    axis.fill_between(found["step"], distance["high"], distance["low"], alpha=0.3, label="5 % to 95 % of clips")
    axis.semilogy(found["step"], distance["mean"], label="mean")
    if found["leaps"]:
        steps = [int(step) for step in found["leaps"]]
        at = [distance["mean"][found["step"].index(step)] for step in steps]
        total = sum(found["leaps"].values())
        sizes = [300 * count / total for count in found["leaps"].values()]
        axis.scatter(steps, at, s=sizes, color="tab:red", zorder=3)
        axis.plot([], [], "o", color="tab:red", label="dynamic LPL leaps (area: share of clips)")
    axis.set(xlabel="step of 30", ylabel="1 - cosine with the velocity before")
    axis.legend(fontsize=8)
