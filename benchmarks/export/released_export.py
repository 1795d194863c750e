"""Open-Sora 1.2 exported at its released widths by the command itself: bytes, time, memory and errors of every stage.

Command:  python -m benchmarks.export.released_export --scratch scratch --target coreml --precision float16 --weights int8
            --stages stdit3 --json benchmarks/results/coreml_export.json
Needs:    the extra of the target; 10 GB of disk for all 28 pairs (weights in bfloat16 and artefacts), removed at the end.
Expect:   Core ML in int8: 28 pairs in 1.3 GB, each with the functions full and merged; at most 6 GB of memory in any process.
Rival:    On-device Sora's own export, two float32 packages for every pair (2 x 28 x 170 MB = 9.5 GB).  It needs a Mac, so its
          bytes are computed and its time is not.

Weights are random, of the released names and shapes; --pairs and --t5-blocks leave out layers, which are all alike.  Bytes do
not depend on the size of the video, which is small here because the check interprets every program.
There is a result only if every stage passed the export's own check on the activations of the stages before it.
"""

import argparse
import dataclasses
import resource
import shutil
import time
from pathlib import Path
from typing import Any, get_args

from benchmarks._support.machine import environment, new_folder, write_report
from benchmarks._support.random_network import RandomParameters
from sora_jax.config import ModelConfig, open_sora_1_2
from sora_jax.export import export
from sora_jax.export.entries import ExportManifest, FileEntry, StageEntry, TargetName
from sora_jax.export.progress import Progress
from sora_jax.networks.registry import CLASSES
from sora_jax.pocket.world.vocabulary import write_tokenizer
from sora_jax.storage.checkpoint import save_network
from sora_jax.storage.writer import update_model_file

RIVAL_PAIR_BYTES = 2 * 170_000_000  # full and merged, float32
TOKENIZER = "tokenizer.json"


def write_model(directory: Path, config: ModelConfig) -> None:
    """Writes the three networks with random weights in bfloat16."""
    for network, build in CLASSES.items():
        entry = getattr(config, network)
        save_network(directory, network, entry, RandomParameters(build, entry), dtype="bfloat16")
    write_tokenizer(directory / TOKENIZER)
    update_model_file(directory, tokenizer=TOKENIZER, defaults={})


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Returns totals and one record for every stage."""
    config = dataclasses.replace(
        open_sora_1_2,
        t5=dataclasses.replace(open_sora_1_2.t5, num_layers=options.t5_blocks),
        stdit3=dataclasses.replace(open_sora_1_2.stdit3, depth=options.pairs),
    )
    write_model(options.scratch / "model", config)
    began, times = time.monotonic(), {}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)

    def progress(at: Progress) -> None:
        if at.stage not in times:
            times[at.stage] = time.monotonic() - began
            print(f"{times[at.stage]:7.0f} s  {at.done}/{at.total} {at.stage}", flush=True)

    made = export(
        options.scratch / "model",
        options.scratch / "exported",
        target=options.target,
        num_frames=options.num_frames,
        height=options.height,
        width=options.width,
        precision=options.precision,
        weights=options.weights,
        stages=tuple(options.stages.split(",")),
        progress=progress,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return {
        "wall_s": time.monotonic() - began,
        "cpu_s": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
        **totals(made),
    }


def totals(made: ExportManifest) -> dict[str, Any]:
    """Returns what a manifest says about bytes, memory and errors."""
    stages = [stage_record(stage, made["files"]) for stage in made["stages"]]
    pairs = [stage for stage in stages if stage["stage"].startswith("stdit3_pair")]
    return {
        "total_gb": made["total_bytes"] / 1e9,
        "num_pairs": len(pairs),
        "pairs_gb": sum(stage["bytes"] for stage in pairs) / 1e9,
        "on_device_sora_pairs_gb": len(pairs) * RIVAL_PAIR_BYTES / 1e9,
        "peak_rss_gb": max(stage["peak_rss_gb"] for stage in stages),
        "sampler_peak_rss_gb": made["sampler"]["peak_rss_bytes"] / 1e9 if made["sampler"] else None,
        "worst_psnr_db": min(stage["psnr_db"] for stage in stages),
        "worst_relative_l2": max(stage["relative_l2"] for stage in stages),
        "notes": made["notes"],
        "made_by": made["made_by"],
        "stages": stages,
    }


def stage_record(stage: StageEntry, files: dict[str, FileEntry]) -> dict[str, Any]:
    """Returns one stage: bytes of its own files (a program shared by stages counts with each), memory and worst errors."""
    artefacts = [function["artefact"] for function in stage["functions"]]
    names = {value for artefact in artefacts for key, value in artefact.items() if key in ("file", "weights")}
    checks = [check for function in stage["functions"] for check in function["checks"]]
    return {
        "stage": stage["name"],
        "functions": [function["name"] for function in stage["functions"]],
        "precision": stage["precision"],
        "bytes": sum(entry["bytes"] for path, entry in files.items() if path in names or path.partition("/")[0] in names),
        "peak_rss_gb": stage["peak_rss_bytes"] / 1e9,
        "psnr_db": min(check["psnr_db"] for check in checks),
        "floor_db": checks[0]["floor_db"],
        "ceiling_l2": checks[0]["ceiling_l2"],
        "relative_l2": max(check["relative_l2"] for check in checks),
    }


def main() -> None:
    """Measures, prints and writes what the command line asks for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--scratch", type=new_folder, required=True, help="a folder that does not exist; removed afterwards")
    parser.add_argument("--target", choices=get_args(TargetName), default="coreml")
    parser.add_argument("--precision", choices=("float32", "float16"), default="float32")
    parser.add_argument("--weights", choices=("float", "int8", "lut6", "int4"), default="float")
    parser.add_argument("--stages", default="t5,stdit3,vae_decoder")
    parser.add_argument("--pairs", type=int, default=open_sora_1_2.stdit3.depth)
    parser.add_argument("--t5-blocks", type=int, default=1)
    parser.add_argument("--num-frames", type=int, default=17)
    parser.add_argument("--height", type=int, default=64)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--note", help="anything to know about the run, for the record")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    setting = {name: value for name, value in vars(options).items() if name not in ("scratch", "json")}
    report: dict[str, Any] = {"question": "Open-Sora 1.2 exported at its released widths", "setting": setting}
    report["environment"] = environment()
    options.scratch.mkdir(parents=True)
    try:
        report["results"] = measure(options)
    finally:
        shutil.rmtree(options.scratch)
    write_report(report, options.json, show=True)


if __name__ == "__main__":
    main()
