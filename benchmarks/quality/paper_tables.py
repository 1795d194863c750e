"""The paper's tables 3, 4 and 5 and its figure 5, for any model directory and any file of prompts.

Command:  python -m benchmarks.quality.paper_tables --work tables [MODEL_DIR] [--prompts 8] [--prompt-file FILE]
          ... --memory-budget 3.3GB      table 5 with streamed rows: concurrent inference and dynamic loading
          ... --frames OUT               also the clips as VBench reads them, OUT/<method>/<prompt>-0.mp4
Needs:    any model directory, its prompts one a line; the embedded model brings captions and a judge.
Writes:   OUT.json and OUT.md; with --picture figure 5 as a PNG.  WORK holds latents and lines, as those of `sampler_study`,
          from which an interrupted run goes on.
Expect:   LPL of 16 evaluations 1.88 times fewer than 30, the more tokens merged the less motion.

Table 3 is LPL by the step that leaps, table 4 token merging by the number of merged steps, each next to 30 plain steps:
evaluations, likeness to 30 steps and to the fine solution, flicker, motion, and what the caption asks for where the model is
the embedded one.  Table 5 is the time of denoising, and the bytes that a streamed model reads, with the methods alone and
together.  Figure 5 is the cosine of consecutive velocities by step.  The paper's own scores are VBench's, whose networks are
not part of this package: --frames writes what it reads.
"""

import argparse
import re
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks._support import study_pictures, study_report
from benchmarks._support.machine import environment, write_report
from benchmarks._support.study_clips import read_lines
from benchmarks._support.study_methods import MERGED_STEPS, REFERENCE, STEPS, Method, chosen, methods
from benchmarks.quality import sampler_study
from benchmarks.quality.sampler_study import Study
from sora_jax.pipeline import video
from sora_jax.pipeline.pipeline import Pipeline
from sora_jax.shell import describe

RESULTS = Path(__file__).parents[1] / "results" / "paper_tables"
MERGED = 15
TABLE_5: Mapping[str, Mapping[str, Any]] = {
    "none": {},
    "LPL": {"leap": 15},
    "TDTM": {"merge_steps": MERGED},
    "LPL and TDTM": {"leap": 15, "merge_steps": MERGED},
}
COLUMNS_5 = ("methods", "evaluations", "denoising s", "speed-up", "bytes read")


def main() -> None:
    """Samples, measures, and writes the tables; exits with one line if it cannot."""
    options = parse()
    try:
        study = sampler_study.opened(options)
        pipelines = within(study, options.model, options.memory_budget)
        wanted = chosen(methods(), [*study_report.leap_names(), *merge_names()])
        for noise, indices in study.batches():
            sampler_study.run_batch(study, wanted, noise, indices)
            if options.frames:
                write_clips(study, wanted, noise, indices, options.frames)
        lines = read_lines(study.lines)
        rows = {row["name"]: row for row in study_report.summarise(study_report.shared(lines))}
        report = {
            "command": " ".join(["python -m benchmarks.quality.paper_tables", *said(options)]),
            **sampler_study.about(study),
            "environment": environment(),
            "prompts": len(study.prompts),
            "table_3": [rows[name] for name in study_report.leap_names() if name in rows],
            "table_4": [rows[name] for name in (*merge_names(), REFERENCE) if name in rows],
            "table_5": table_5(study, pipelines, options.repeats),
            "figure_5": study_report.cosines(lines),
        }
        write_report(report, options.out.with_suffix(".json"))
        options.out.with_suffix(".md").write_text(markdown(report), encoding="utf-8")
        if options.picture:
            draw(report["figure_5"], options.picture)
        print(markdown(report), end="")
    except (ValueError, OSError) as error:
        sys.exit(f"paper_tables: error: {describe(error)}")


def parse() -> argparse.Namespace:
    """Returns the command line's options."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality.paper_tables", description=__doc__.splitlines()[0])
    sampler_study.add_options(parser, out=RESULTS, prompts=8, batch=8)
    parser.add_argument("--memory-budget", help="also stream the model within this, in table 5")
    parser.add_argument("--repeats", type=int, default=3, help="of table 5; the median counts")
    parser.add_argument("--picture", type=Path, help="PNG file of figure 5; needs matplotlib")
    parser.add_argument("--frames", type=Path, help="folder of the clips, by VBench's names")
    return argparse.Namespace(**vars(parser.parse_args()), calibration_prompts=0)


def said(options: argparse.Namespace) -> list[str]:
    """Returns the options that decide the figures, as they are written."""
    words = [f"--work {options.work.name}", f"--prompts {options.prompts}"]
    words += [f"--num-frames {options.num_frames}"] if options.num_frames else []
    return words + ([f"--memory-budget {options.memory_budget}"] if options.memory_budget else [])


def merge_names() -> list[str]:
    """Returns the methods of the paper's table 4."""
    return [f"TDTM {count}" for count in MERGED_STEPS]


def write_clips(study: Study, wanted: Sequence[Method], noise: int, indices: Sequence[int], out: Path) -> None:
    """Writes the clips of a batch that are not there yet, one folder for each method."""
    generation = study.generation(seed=study.settings.seed)
    latents = study.work / "latents" / f"noise{noise}-prompt{indices[0]:04d}-batch{study.batch}"
    for method in wanted:
        folder = out / re.sub(r"[^a-z0-9.]+", "-", method.name.lower())
        targets = [folder / f"{study.prompts[i].text}-{noise}.mp4" for i in indices]
        if all(target.exists() for target in targets):
            continue
        folder.mkdir(parents=True, exist_ok=True)
        for target, frames in zip(targets, sampler_study.decoded(generation, latents, method.name), strict=False):
            video.save(frames, target, fps=study.settings.save_fps, overwrite=True)


def within(study: Study, model: Path | None, budget: str | None) -> dict[str, Pipeline]:
    """Returns the model in memory and, if there is a budget, streamed, by what the names of its rows end with.

    Raises:
      ValueError: the budget is too small.
    """
    pipelines = {"": study.pipeline}
    if budget:
        streamed = Pipeline.from_pretrained(model, memory_budget=budget)
        streamed.check(streamed.resolve(kept(study)), 1)
        pipelines[f", streamed within {budget}"] = streamed
    return pipelines


def table_5(study: Study, pipelines: Mapping[str, Pipeline], repeats: int) -> list[dict[str, Any]]:
    """Returns a row for each combination of methods, in memory and streamed within a budget, over the plain sampling."""
    rows: list[dict[str, Any]] = []
    for suffix, pipeline in pipelines.items():
        found = timed(pipeline, {**kept(study), "num_steps": STEPS}, study.prompts[0].text, repeats)
        rows += [{"name": name + suffix, **row} for name, row in found.items()]
    for row in rows:
        row["speed_up"] = round(rows[0]["seconds"] / row["seconds"], 3)
    return rows


def kept(study: Study) -> dict[str, Any]:
    """Returns what all rows of table 5 share."""
    names = ("guidance", "seed", "num_frames", "height", "width", "dtype")
    return {name: getattr(study.settings, name) for name in names}


def timed(pipeline: Pipeline, shared: Mapping[str, Any], prompt: str, repeats: int) -> dict[str, dict[str, Any]]:
    """Returns evaluations of a clip, the median seconds of denoising, and the bytes a clip reads where blocks are streamed.

    The ways of sampling alternate.
    """
    rows: dict[str, dict[str, Any]] = {}
    seconds: dict[str, list[float]] = {name: [] for name in TABLE_5}
    for repeat in range(repeats + 1):
        for name, changes in TABLE_5.items():
            settings = pipeline.resolve({**shared, **changes})
            before = pipeline.networks.bytes_read(settings.dtype)
            clip = pipeline.generate(pipeline.read([prompt], settings), settings)
            after = pipeline.networks.bytes_read(settings.dtype)
            if repeat:  # the first one compiles
                seconds[name].append(clip.timings["denoise"])
            read = None if before is None or after is None else after - before
            rows[name] = {"evaluations": float(clip.evaluations_B[0]), "bytes_read": read}
    return {name: {**row, "seconds": round(statistics.median(seconds[name]), 4)} for name, row in rows.items()}


def markdown(report: Mapping[str, Any]) -> str:
    """Returns the tables as one page."""
    settings = ", ".join(f"{name} {value}" for name, value in report["settings"].items())
    machine = report["environment"]
    table = [
        "| " + " | ".join(COLUMNS_5) + " |",
        "|---" * len(COLUMNS_5) + "|",
        *(
            f"| {row['name']} | {row['evaluations']:g} | {row['seconds']:.3g} | {row['speed_up']:.2f}x "
            f"| {'' if row['bytes_read'] is None else row['bytes_read']} |"
            for row in report["table_5"]
        ),
    ]
    lines = [
        "# The paper's tables",
        "",
        f"Model {report['model']}; {settings}; {report['prompts']} prompts, commit {machine['commit']}, {machine['device']}.",
        "Medians, quartiles in brackets; columns as in the sampler study.",
        "",
        "## Table 3: linear proportional leap",
        "",
        *study_report.table(report["table_3"]),
        "",
        "## Table 4: temporal token merging",
        "",
        *study_report.table(report["table_4"]),
        "",
        f"## Table 5: time of denoising, one clip of {STEPS} steps",
        "",
        *table,
        "",
        "## Figure 5: cosine of consecutive velocities",
        "",
        *study_report.cosine_table(report["figure_5"]),
    ]
    return "\n".join(lines) + "\n"


def draw(cosines: Mapping[str, Any], path: Path) -> None:
    """Writes figure 5, where matplotlib is installed."""
    pyplot = study_pictures.pyplot_or_none()
    if pyplot is None:
        return
    figure, axis = pyplot.subplots(figsize=(6, 3.6), layout="constrained")
    study_pictures.draw_cosines(axis, cosines)
    figure.savefig(path, dpi=100, metadata={"Software": None})
    pyplot.close(figure)


if __name__ == "__main__":
    main()
