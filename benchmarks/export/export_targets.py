"""Bytes, errors and time of a model exported to each target, and how close the exported loop's video is to the pipeline's.

Command:  python -m benchmarks.export.export_targets --scratch DIR --json benchmarks/results/export_targets.json [--model DIR]
Needs:    the extra ``export``; for the embedded model 60 MB of disk and two to four minutes a row on two cores.
Expect:   float32 rows above 100 dB and videos above 50 dB; int8 a quarter of the bytes of the matrices; memory below 6 GB.
Rival:    the same model directory: its bytes as stored, and the pipeline that runs it.

Videos of Core ML rows, and of Core AI's in float16, have one step: their programs are interpreted, or computed in software, and
slowly; nothing ran on Apple hardware.
Each row is written as soon as it is measured, and rows already in the file are kept: a stopped run continues.
"""

import argparse
import json
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks._support.machine import environment, new_folder, write_report
from sora_jax import Pipeline
from sora_jax.export import ExportedModel, check, export
from sora_jax.export.entries import Precision, TargetName, Weights
from sora_jax.inputs import prompt
from sora_jax.pipeline import video
from sora_jax.pipeline.model_file import POCKET
from sora_jax.sampling import noise

PROMPT = "a red circle moves right on a blue background"
ROWS: tuple[tuple[TargetName, Precision, Weights], ...] = (
    ("stablehlo", "float32", "float"),
    ("stablehlo", "float16", "float"),
    ("stablehlo", "float32", "int8"),
    ("onnx", "float32", "float"),
    ("onnx", "float16", "float"),
    ("onnx", "float32", "int8"),
    ("coreai", "float32", "float"),
    ("coreai", "float32", "int8"),
    ("coreai", "float16", "float"),
    ("coreml", "float32", "float"),
    ("coreml", "float16", "float"),
    ("coreml", "float16", "int8"),
    ("coreml", "float16", "lut6"),
    ("coreml", "float16", "int4"),
)


def measure(
    model: Path | None, target: TargetName, precision: Precision, weights: Weights, num_steps: int, scratch: Path
) -> dict[str, Any]:
    """Returns one row of the table; an export that the check refused has its message in place of numbers."""
    out = scratch / "out"
    row: dict[str, Any] = {"target": target, "precision": precision, "weights": weights}
    began = time.perf_counter()
    try:
        made = export(model, out, target=target, precision=precision, weights=weights, settings={"num_steps": num_steps})
    except check.CheckError as error:
        return {**row, "refused": str(error)}
    row["export_s"] = time.perf_counter() - began
    sampler = made["sampler"]
    parts = [(stage["name"], stage["peak_rss_bytes"], stage["functions"]) for stage in made["stages"]]
    parts += [("sampler", sampler["peak_rss_bytes"], sampler["functions"])] if sampler else []
    checks: list[dict[str, Any]] = [
        {"stage": name, **entry} for name, _, functions in parts for function in functions for entry in function["checks"]
    ]
    worst = min(checks, key=lambda entry: entry["psnr_db"] - entry["floor_db"])
    row |= {
        "megabytes": made["total_bytes"] / 1e6,
        "peak_rss_gb": max(peak for _, peak, _ in parts) / 1e9,
        "comparisons": len(checks),
        "worst": worst,
        "worst_relative_l2": max(entry["relative_l2"] for entry in checks),
    }
    slow = target == "coreml" or (target, precision) == ("coreai", "float16")
    row |= compare_video(model, out, 1 if slow else num_steps)
    shutil.rmtree(out)
    return row


def compare_video(model: Path | None, out: Path, num_steps: int) -> dict[str, float]:
    """Returns the PSNR of the exported loop's 8-bit frames against the pipeline's, and both times without loading."""
    pipeline, exported = Pipeline.from_pretrained(model), ExportedModel(out)
    given = pipeline.resolve({"num_steps": num_steps})
    text = prompt.prepare_prompt(PROMPT, aes=given.aes, flow=given.flow, camera_motion=given.camera_motion)
    ids, mask = pipeline.tokenizer.encode([text], exported.manifest["tokens"]["length"])
    z = np.asarray(noise.initial_noise(0, (1, *exported.manifest["sizes"][0]["latents"])))
    clip = pipeline(PROMPT, num_steps=num_steps)
    if num_steps > 1:
        exported(ids, mask, z, num_steps=1)
    began = time.perf_counter()
    frames = video.quantise(exported(ids, mask, z, num_steps=num_steps).frames_Bthw3)
    seconds = time.perf_counter() - began
    psnr_db, _ = check.difference(clip.frames.astype(np.float64), frames.astype(np.float64))
    run_s = sum(value for stage, value in clip.timings.items() if stage not in ("compile", "load"))
    return {"video_steps": num_steps, "video_psnr_db": psnr_db, "exported_s": seconds, "pipeline_s": run_s}


def read_rows(path: Path | None, setting: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns the rows of an earlier run.

    Raises:
      ValueError: they were measured in another setting.
    """
    if path is None or not path.exists():
        return []
    report = json.loads(path.read_text("utf-8"))
    found = report.get("setting", {})
    if any(found.get(name) != setting[name] for name in ("model", "num_steps")):
        raise ValueError(f"{path} has rows of {found}, expected {setting}; choose another file or remove it.")
    return list(report["rows"])


def main() -> None:
    """Measures and prints, or writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="a model directory (default: pocket)")
    parser.add_argument("--targets", default="stablehlo,onnx,coreai,coreml")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--scratch", type=new_folder, required=True, help="a folder that does not exist; removed afterwards")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    directory = options.model or POCKET
    setting = {
        "model": directory.name if options.model else "pocket",
        "model_megabytes": sum(path.stat().st_size for path in directory.rglob("*") if path.is_file()) / 1e6,
        "num_steps": options.steps,
    }
    rows = read_rows(options.json, setting)
    known = {(row["target"], row["precision"], row["weights"]) for row in rows}
    options.scratch.mkdir(parents=True)
    try:
        for chosen in (row for row in ROWS if row[0] in options.targets.split(",") and row not in known):
            commit = environment()["commit"]
            rows.append(measure(options.model, *chosen, options.steps, options.scratch) | {"commit": commit})
            print(json.dumps(rows[-1]), flush=True)
            question = "bytes, errors and time of a model exported to each target"
            write_report({"question": question, "setting": setting, "rows": rows}, options.json)
    finally:
        shutil.rmtree(options.scratch)


if __name__ == "__main__":
    main()
