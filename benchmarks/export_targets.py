"""Bytes, errors and time of a model exported to each target, and how close the exported loop's video is to the pipeline's.

Source: the embedded pocket model, or a model directory (``--model``).
Command: python benchmarks/export_targets.py --scratch /tmp/export --json benchmarks/results/export_targets.json
Cost: pocket: about two minutes a row on two cores, 60 MB of disk; nothing is left behind.
Expect: float32 rows above 100 dB and videos above 50 dB; int8 a quarter of the bytes of the matrices; peak memory below 6 GB.

The rival is the same model directory: its bytes as stored, and the pipeline that runs it.  Core ML rows have no video: their
programs are interpreted, far too slowly for thirty steps, and were never run on Apple hardware.
"""

import argparse
import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.machine import environment
from sora_jax import Pipeline, noise, prompt, video
from sora_jax.export import ExportedModel, check, export

PROMPT = "a red circle moves right on a blue background"
ROWS = (
    ("stablehlo", "float32", "float"),
    ("stablehlo", "float16", "float"),
    ("stablehlo", "float32", "int8"),
    ("onnx", "float32", "float"),
    ("onnx", "float16", "float"),
    ("onnx", "float32", "int8"),
    ("coreml", "float32", "float"),
    ("coreml", "float16", "float"),
    ("coreml", "float16", "int8"),
    ("coreml", "float16", "lut6"),
    ("coreml", "float16", "int4"),
)


def measure(model: Path | None, target: str, precision: str, weights: str, num_steps: int, scratch: Path) -> dict[str, Any]:
    """Returns one row of the table."""
    out = scratch / "out"
    began = time.perf_counter()
    made = export(model, out, target=target, precision=precision, weights=weights, settings={"num_steps": num_steps})
    seconds = time.perf_counter() - began
    checks = [entry for stage in made["stages"] for function in stage["functions"] for entry in function["checks"]]
    row = {
        "target": target,
        "precision": precision,
        "weights": weights,
        "megabytes": made["total_bytes"] / 1e6,
        "export_s": seconds,
        "peak_rss_gb": max(stage["peak_rss_bytes"] for stage in made["stages"]) / 1e9,
        "comparisons": len(checks),
        "worst_psnr_db": min(entry["psnr_db"] for entry in checks),
        "worst_relative_l2": max(entry["relative_l2"] for entry in checks),
    }
    if target != "coreml":
        row |= compare_video(model, out, num_steps)
    shutil.rmtree(out)
    return row


def compare_video(model: Path | None, out: Path, num_steps: int) -> dict[str, float]:
    """Returns the PSNR of the exported loop's 8-bit frames against the pipeline's, and both times without compiling."""
    pipeline, exported = Pipeline.from_pretrained(model), ExportedModel(out)
    given = pipeline.resolve({"num_steps": num_steps})
    text = prompt.prepare_prompt(PROMPT, aes=given.aes, flow=given.flow, camera_motion=given.camera_motion)
    ids, mask = pipeline.tokenizer.encode([text], exported.manifest["tokens"]["length"])
    z = np.asarray(noise.initial_noise(0, (1, *exported.manifest["sizes"][0]["latents"])))
    clip = pipeline(PROMPT, num_steps=num_steps)
    exported(ids, mask, z, num_steps=1)
    began = time.perf_counter()
    frames = video.quantise(exported(ids, mask, z, num_steps=num_steps).frames_Bthw3)
    seconds = time.perf_counter() - began
    psnr_db, _ = check.difference(clip.frames.astype(np.float64), frames.astype(np.float64))
    run_s = sum(value for stage, value in clip.timings.items() if stage not in ("compile", "load"))
    return {"video_psnr_db": psnr_db, "exported_s": seconds, "pipeline_s": run_s}


def main() -> None:
    """Measures and prints, or writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="a model directory (default: pocket)")
    parser.add_argument("--targets", default="stablehlo,onnx,coreml")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--scratch", type=Path, required=True, help="a folder that does not exist; removed afterwards")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    options.scratch.mkdir(parents=True)
    try:
        wanted = [row for row in ROWS if row[0] in options.targets.split(",")]
        rows = [measure(options.model, *row, options.steps, options.scratch) for row in wanted]
    finally:
        shutil.rmtree(options.scratch)
    directory = options.model or Path(__file__).resolve().parents[1] / "sora_jax" / "pocket" / "weights"
    result = {
        "question": "bytes, errors and time of a model exported to each target",
        "model_megabytes": sum(path.stat().st_size for path in directory.rglob("*") if path.is_file()) / 1e6,
        "num_steps": options.steps,
        "rows": rows,
        **environment(),
    }
    text = json.dumps(result, indent=1)
    print(text)
    if options.json:
        options.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
