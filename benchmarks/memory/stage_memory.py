"""Peak memory and time of the text encoder and of decoding, run from their files at full size, each in its own process.

Command:  python -m benchmarks.memory.stage_memory SCRATCH --stages text --dtypes int8 float32 bfloat16 --linked
              --out benchmarks/results/stage_text.json
          python -m benchmarks.memory.stage_memory SCRATCH --stages decode --rival --out benchmarks/results/stage_decode.json
          python -m benchmarks.memory.stage_memory SCRATCH --stages decode --size 480x854 --slots 2
              --out benchmarks/results/stage_decode_480p.json   (and 720x1280, half an hour)
          (--tiny tries it out at toy width in a minute; --linked stores one text-encoder block and links the other 23)
Needs:    Linux; disk for the weights (text encoder 19, 9.5 or 4.8 GB, --linked 1.3, 0.7 or 0.3 GB; autoencoder 1.6 GB).
Expect:   every peak at most 3.3 GB; the least peak (one segment at a time) of the int8 encoder at 300 tokens at most 0.8 GB;
          17 frames of 256 x 256 decoded in at most 2.0 GB and in no more than PyTorch's time.
Rival:    --rival: diffusers' AutoencoderKL and `torch_decoder` in eager mode on as many threads, weights random too.

The peak is VmHWM of a child process (interpreter, compiler, file pages included) and is listed with the memory plan's
prediction, which counts the programs that the stages before it compiled (``compiled_before_bytes``) and a child does not have.
Linked blocks share their bytes, so they are read from the page cache: read times mean nothing then, memory figures do.
"""

import argparse
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks._support.machine import environment, memory, write_report
from benchmarks._support.random_network import RandomParameters
from benchmarks._support.streaming_model import planned
from sora_jax.config import ModelConfig, open_sora_1_2, pocket
from sora_jax.devices.attention_choice import choose_forms
from sora_jax.networks.registry import CLASSES
from sora_jax.networks.vae.codec import latent_size
from sora_jax.pipeline.open_model import policy_of
from sora_jax.process import Timings
from sora_jax.storage.checkpoint import save_network
from sora_jax.storage.directory import NETWORK_FILE, Manifest, open_network
from sora_jax.streaming import host_loop
from sora_jax.streaming.memory_plan import BASELINE_BYTES, Workload
from sora_jax.streaming.segment_loop import SegmentLoop

RESULTS = Path(__file__).parents[1] / "results" / "stage_memory.json"
NETWORK_OF = {"text": "t5", "decode": "vae", "encode": "vae"}


def main() -> None:
    """Measures what the command line asks for, each case in a child process, prints and writes it."""
    options = parse()
    if options.child:
        print(json.dumps(measure(options)))
        return
    report: dict[str, Any] = {"setting": setting(options), "environment": environment(), "results": []}
    for stage in options.stages:
        for stored in options.dtypes if stage == "text" else ["float32"]:
            directory = write(options, NETWORK_OF[stage], stored)
            for num_slots in options.slots:
                report["results"].append(child(options, [stage, stored, str(num_slots)]))
                print(json.dumps(report["results"][-1]), flush=True)
            if options.remove:
                shutil.rmtree(directory)
        if options.rival and stage == "decode" and options.size[0] == options.size[1]:
            report["results"].append(child(options, ["rival", "float32", "1"]))
            print(json.dumps(report["results"][-1]), flush=True)
    write_report(report, options.out)


def parse() -> argparse.Namespace:
    """Returns the command line's options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("scratch", type=Path, help="folder for the weights")
    parser.add_argument("--stages", nargs="+", default=["text", "decode"], choices=list(NETWORK_OF))
    parser.add_argument("--dtypes", nargs="+", default=["int8"], choices=["float32", "bfloat16", "int8"], help="of text")
    parser.add_argument("--frames", type=int, default=17)
    parser.add_argument("--size", type=parsed_size, default=(256, 256), metavar="PX|HxW", help="rows and columns of pixels")
    parser.add_argument("--slots", type=int, nargs="+", default=[2, 1], help="segments in memory; 1: no reading ahead")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--linked", action="store_true", help="store one block of the text encoder and link the others")
    parser.add_argument("--remove", action="store_true", help="remove the weights afterwards")
    parser.add_argument("--rival", action="store_true")
    parser.add_argument("--tiny", action="store_true", help="toy width")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--child", nargs=3, metavar=("STAGE", "STORED", "SLOTS"), help=argparse.SUPPRESS)
    return parser.parse_args()


def parsed_size(text: str) -> tuple[int, int]:
    """Returns rows and columns."""
    rows, _, columns = text.partition("x")
    return int(rows), int(columns or rows)


def setting(options: argparse.Namespace) -> dict[str, Any]:
    """Returns what decides the numbers."""
    left_out = ("out", "child", "scratch", "remove")
    return {name: value for name, value in vars(options).items() if name not in left_out}


def config_of(options: argparse.Namespace) -> ModelConfig:
    """Returns the architecture: Open-Sora 1.2, or at toy width."""
    return pocket if options.tiny else open_sora_1_2


def write(options: argparse.Namespace, network: str, stored: str) -> Path:
    """Writes a network of the true shapes with random weights, unless it exists, and returns its model directory."""
    directory = options.scratch / f"{network}-{stored}{'-linked' if options.linked else ''}{'-tiny' if options.tiny else ''}"
    config = getattr(config_of(options), network)
    if (directory / network).exists():
        return directory
    if network != "t5" or not options.linked:
        save_network(directory, network, config, RandomParameters(CLASSES[network], config), dtype=stored)
        return directory
    single = dataclasses.replace(config, num_layers=1)
    manifest = save_network(directory, network, single, RandomParameters(CLASSES[network], single), dtype=stored)
    _link_blocks(manifest, config)
    return directory


def _link_blocks(manifest: Manifest, config: Any) -> None:
    """Turns an encoder of one block into one of ``config.num_layers`` blocks that share its files."""
    parameters = dict(manifest.parameters)
    for i in range(1, config.num_layers):
        shutil.copytree(manifest.path / "block.0", manifest.path / f"block.{i}", copy_function=os.link)
        for name in manifest.names("block.0"):
            parameters[name.replace("block.0.", f"block.{i}.", 1)] = manifest.parameters[name]
    whole = dataclasses.replace(manifest, config=config, parameters=parameters)
    (manifest.path / NETWORK_FILE).write_text(json.dumps(whole.to_dict()))


def child(options: argparse.Namespace, case: list[str]) -> dict[str, Any]:
    """Returns the measurement of a case in a new process; of several repeats the fastest, with the largest peak."""
    runs = []
    for _ in range(options.repeats):
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.memory.stage_memory", *sys.argv[1:], "--child", *case],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            return {"stage": case[0], "stored": case[1], "num_slots": int(case[2]), "failed": done.stderr[-2000:]}
        runs.append(json.loads(done.stdout.splitlines()[-1]))
    return {**min(runs, key=lambda run: run["seconds"]), "peak_bytes": max(run["peak_bytes"] for run in runs)}


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Returns peak, times and plan of one case, run in this process."""
    stage, stored, num_slots = options.child[0], options.child[1], int(options.child[2])
    if stage == "rival":
        return measure_rival(options)
    network, timings = NETWORK_OF[stage], Timings()
    manifest = open_network(write(options, network, stored), network)
    start = time.perf_counter()
    forms = choose_forms("auto", platform="cpu", dtype="float32", streamed=True)
    loop = SegmentLoop(manifest, policy_of("float32"), timings, forms=forms, num_slots=num_slots)
    out = run_stage(stage, loop, options)
    seconds = time.perf_counter() - start
    work = Workload(num_frames=options.frames, height=options.size[0], width=options.size[1], encodes=stage == "encode")
    plan = planned(manifest, config_of(options), work, stage)
    return {
        "stage": stage,
        "stored": stored,
        "num_slots": num_slots,
        "seconds": seconds,
        "timings": timings,
        "cpu_s": round(time.process_time(), 1),
        "planned_bytes": plan.minimum if num_slots == 1 else plan.peak,
        "compiled_before_bytes": plan.baseline - BASELINE_BYTES,
        "finite": bool(np.isfinite(out).all()),
        **memory(),
    }


def run_stage(stage: str, loop: SegmentLoop, options: argparse.Namespace) -> np.ndarray:
    """Returns the output of a stage on random inputs of the size asked for."""
    rng, config = np.random.default_rng(0), config_of(options)
    if stage == "text":
        length = config.stdit3.model_max_length
        ids = rng.integers(0, config.t5.vocab_size, (1, length)).astype(np.int32)
        return host_loop.encode_text(loop, ids, np.ones((1, length), bool))
    frames, rows, columns = latent_size(config.vae, options.frames, *options.size)
    if stage == "decode":
        z = rng.standard_normal((1, frames or 1, rows, columns, 4)).astype(np.float32)
        return host_loop.decode(loop, z, options.frames)
    video = rng.uniform(-1, 1, (1, options.frames, *options.size, 3)).astype(np.float32)
    return host_loop.encode(loop, video)


def measure_rival(options: argparse.Namespace) -> dict[str, Any]:
    """Returns peak and time of decoding in eager PyTorch."""
    from benchmarks._support import torch_decoder

    config = config_of(options).vae
    start = time.perf_counter()
    decode = torch_decoder.make(config)
    built = time.perf_counter()
    temporal_s, spatial_s = decode(options.frames, options.size[0])
    return {
        "stage": "rival",
        "stored": "float32",
        "num_slots": 1,
        "seconds": temporal_s + spatial_s,
        "timings": {"build": built - start, "temporal": temporal_s, "spatial": spatial_s},
        **memory(),
    }


if __name__ == "__main__":
    main()
