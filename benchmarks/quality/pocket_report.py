"""What the training of the pocket model took: settings, time, loss and scores of every stage.

Command:  python -m benchmarks.quality.pocket_report --work training
Needs:    seconds; no network is run.

Reads the reports that training wrote (one JSON line each in ``<stage>.jsonl``), the arguments of its starts
(``runs.jsonl``) and the manifests of its model, and writes ``benchmarks/results/pocket_training.json``: settings of every
stage, time, loss and scores over time; stages that the folder did not train stay as the file has them.  Where the
transformer or the text encoder went on from another one (``--warm``, ``--warm-text``), ``--continues REPORT`` keeps that
one's training under ``continues``.
Invariant: every number comes from a file or from the training code; none is typed in.
"""

import argparse
import dataclasses
import hashlib
import itertools
import json
import math
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from benchmarks._support.machine import write_report
from sora_jax.config import pocket
from sora_jax.pocket import train
from sora_jax.pocket.training import codec
from sora_jax.pocket.training import flow as train_flow
from sora_jax.pocket.training import text as train_text
from sora_jax.pocket.training.fit import Stage
from sora_jax.pocket.training.latents import Clips
from sora_jax.pocket.world import words
from sora_jax.storage.directory import open_network, present_networks

RESULTS = Path(__file__).parents[1] / "results" / "pocket_training.json"
STAGES: dict[str, ModuleType] = {
    "spatial": codec,
    "temporal": codec,
    "decoder": codec,
    "text": train_text,
    "flow": train_flow,
}
POINTS = 40  # of a loss curve
RATE_POINTS = 9  # of a learning rate's curve
BEST_BY = ("all four", "motion", "shape")  # the best checkpoint by the first of these scores; the next ones decide ties
_CLOCK = ("step", "of", "seconds", "step_s", "remaining_s")
_RATES = ("learning_rate", "adam_rate")


def report(work: Path, earlier: Mapping[str, Any] | None = None, continues: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Returns everything about the training in a folder, JSON-ready.

    Stages that the folder has no reports of (training with ``--base``) are those of the ``earlier`` report; ``continues``
    is the report of the training from whose networks those of the folder started.

    Raises:
      FileNotFoundError: no stage has reported anything there.
    """
    curves = {name: read_lines(work / f"{name}.jsonl") for name in STAGES}
    if not any(curves.values()):
        raise FileNotFoundError(f"{work} has no reports; expected one of {', '.join(f'{name}.jsonl' for name in STAGES)}.")
    runs = [run | {"arguments": _portable(run["arguments"])} for run in read_lines(work / "runs.jsonl")]
    arguments = {**vars(train.parse([])), **(runs[-1]["arguments"] if runs else {})}
    arguments |= {f"{name}_steps": lines[-1]["of"] for name, lines in curves.items() if lines}
    settings = stage_settings(argparse.Namespace(**arguments))
    stages = {name: stage_report(curves[name], settings[name], STAGES[name]) for name in STAGES if curves[name]}
    if earlier is not None:
        before = {name: {"commit": earlier["commit"]} | stage for name, stage in earlier["stages"].items()}
        stages = {name: (before | stages)[name] for name in STAGES if name in before | stages}
    for name in STAGES:
        if continues is not None and curves[name] and name in continues["stages"]:
            stages[name]["continues"] = {"commit": continues["commit"]} | continues["stages"][name]
    return {
        "commit": _commit(),
        "arguments": {name: value for name, value in arguments.items() if name != "work"},
        "arguments_from": "runs.jsonl" if runs else "the command's defaults",
        "starts": [_start(run, runs[-1]) for run in runs],
        "world": _constants(words),
        "seconds": round(sum(map(_all_seconds, stages.values()))),
        "stages": stages,
        "model": model_report(work / "model"),
    }


def stage_report(lines: Sequence[Mapping[str, Any]], settings: Mapping[str, Any], module: ModuleType) -> dict[str, Any]:
    """Returns settings, time, loss and scores of one stage; scores that were not requested are None."""
    rows = timeline(lines)
    losses = [row for row in rows if "loss" in row]
    scores = [row for row in rows if "loss" not in row]
    starts = [lines[0], *(line for before, line in itertools.pairwise(lines) if _begins(line, before))]
    result = {
        "steps": lines[-1]["of"],
        "starts": [{"first_report": line["step"], "steps": line["of"]} for line in starts],
        "steps_done": rows[-1]["step"],
        "seconds": round(max(row["seconds"] for row in rows)),
        "settings": dict(settings),
        "constants": _constants(module),
        "loss": columns(thinned(losses, POINTS)),
        "scores": columns(scores),
    }
    judged = [row for row in scores if all(isinstance(row.get(name), float) for name in BEST_BY)]
    if judged:
        result["best"] = max(judged, key=lambda row: [row[name] for name in BEST_BY])
    return result


def _all_seconds(stage: Mapping[str, Any]) -> float:
    """Returns the time of a stage and of those that it continues."""
    return stage["seconds"] + (_all_seconds(stage["continues"]) if "continues" in stage else 0)


def _portable(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Returns arguments without the folders of the machine that trained."""
    return {name: Path(value).name if name == "base" and value else value for name, value in arguments.items()}


def _start(run: Mapping[str, Any], last: Mapping[str, Any]) -> dict[str, Any]:
    """Returns versions and device of one start, and its arguments where they are not those of the last one."""
    others = {name: value for name, value in run["arguments"].items() if value != last["arguments"].get(name)}
    return {name: value for name, value in run.items() if name != "arguments"} | {"other_arguments": others}


def _begins(line: Mapping[str, Any], before: Mapping[str, Any]) -> bool:
    """Returns whether a start reports for the first time: its clock begins at 0."""
    return line["seconds"] < before["seconds"]


def timeline(lines: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Returns the lines by step, with ``seconds`` counted over all starts.

    The clock of a start begins at 0.  Steps that were repeated after a checkpoint count twice in the time, once in the rows.
    """
    before, last = 0.0, lines[0]
    rows: dict[tuple[int, bool], dict[str, Any]] = {}
    for line in lines:
        if _begins(line, last):
            before += last["seconds"]
        last = line
        values = {name: _finite(value) for name, value in line.items() if name not in _CLOCK}
        rows[line["step"], "loss" in line] = {"step": line["step"], "seconds": round(before + line["seconds"], 1), **values}
    return sorted(rows.values(), key=lambda row: row["step"])


def columns(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Returns rows as columns, which take less room."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    return {name: [row.get(name) for row in rows] for name in names}


def thinned(rows: Sequence[Any], num: int) -> list[Any]:
    """Returns at most ``num`` rows at equal distances, the first and the last among them."""
    if len(rows) <= num:
        return list(rows)
    return [rows[i] for i in np.linspace(0, len(rows) - 1, num).round().astype(int)]


def stage_settings(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Returns the settings of every stage, as the training code makes them from the arguments."""
    no_clips = Clips(np.empty(0), np.empty(0), [])
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = train_text.shipped_tokenizer(Path(folder) / "tokenizer.json")
    spatial = {"num_steps": args.spatial_steps, "batch_size": args.spatial_batch, "seed": args.seed}
    temporal = {"num_steps": args.temporal_steps, "batch_size": args.temporal_batch, "seed": args.seed}
    decoder = {"num_steps": args.decoder_steps, "batch_size": args.temporal_batch, "seed": args.seed}
    text: dict[str, Any] = {"num_steps": args.text_steps, "batch_size": args.text_batch, "seed": args.seed}
    text |= {"start": {} if args.warm_text else None}
    flow = {"num_steps": args.flow_steps, "evaluate_every": args.judge_every, "learning_rate": args.flow_rate}
    batches = train_flow.Batches(clips=no_clips, long_clips=no_clips, tokenizer=tokenizer, size=args.batch, seed=args.seed)
    stages = {
        "spatial": (codec.spatial_stage(pocket.vae, **spatial), args.spatial_batch),
        "temporal": (codec.temporal_stage(pocket.vae, {}, **temporal), args.temporal_batch),
        "text": (train_text.text_stage(pocket.t5, tokenizer, **text), args.text_batch),
        "flow": (train_flow.flow_stage(pocket, {}, batches, evaluate=lambda params: {}, **flow), args.batch),
    }
    if args.decoder_steps:
        stages["decoder"] = (codec.decoder_stage(pocket.vae, {}, **decoder), args.temporal_batch)
    return {name: _described(stage) | {"batch": batch} for name, (stage, batch) in stages.items()}


def _described(stage: Stage) -> dict[str, Any]:
    """Returns the numbers of a stage and its rates at a few steps; a rate that is None is the learning rate."""
    values = {field.name: getattr(stage, field.name) for field in dataclasses.fields(stage)}
    steps = np.linspace(0, stage.num_steps - 1, RATE_POINTS).round().astype(int).tolist()
    rates = {
        name: {"step": steps, "rate": [float(f"{float(values[name](step)):.4g}") for step in steps]}
        for name in _RATES
        if values[name] is not None
    }
    return {name: value for name, value in values.items() if isinstance(value, int | float)} | rates


def model_report(directory: Path) -> dict[str, Any]:
    """Returns parameters, bytes and stored dtype of each network that the folder holds, and the checksum of its manifest."""
    networks = {}
    for network in present_networks(directory):
        manifest = open_network(directory, network)
        stored = manifest.parameters.values()
        networks[network] = {
            "dtype": manifest.dtype,
            "parameters": sum(math.prod(one.shape) for one in stored),
            "bytes": sum(one.nbytes for one in stored),
            "manifest_sha256": hashlib.sha256(manifest.values_text().encode()).hexdigest(),
        }
    return networks


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Returns the objects of a file of JSON lines; none where there is no file, nor of a last line still being written."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def _constants(module: ModuleType) -> dict[str, Any]:
    public = {name: value for name, value in vars(module).items() if name.isupper() and not name.startswith("_")}
    return {name: value for name, value in public.items() if isinstance(value, int | float | tuple)}


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty", "--exclude", "*"]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parent).stdout.strip()


def main(arguments: Sequence[str] | None = None) -> None:
    """Writes the report and prints a line for each stage."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("training"), help="folder that training worked in")
    parser.add_argument("--out", type=Path, default=RESULTS, help=f"file to write (default {RESULTS.name} in results)")
    parser.add_argument("--continues", type=Path, metavar="REPORT", help="report of the training that a warm start continued")
    options = parser.parse_args(arguments)
    earlier = json.loads(options.out.read_text()) if options.out.exists() else None
    continues = None if options.continues is None else json.loads(options.continues.read_text())
    made = report(options.work, earlier, continues)
    write_report(made, options.out)
    for name, stage in made["stages"].items():
        last = {score: values[-1] for score, values in stage["scores"].items() if score not in _CLOCK}
        print(f"{name}: {stage['steps_done']} of {stage['steps']} steps, {stage['seconds'] / 60:.1f} min, {last}")


if __name__ == "__main__":
    main()
