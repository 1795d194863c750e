"""What the map of previews takes for an autoencoder of the released size: fitting it, and finding it again.

Command:  python -m benchmarks.memory.preview_map SCRATCH --json benchmarks/results/preview_map.json
          (--budget 3.3GB fits it from the files, within a memory budget)
Needs:    Linux; 1.6 GB of disk for random weights of the released shapes; two CPU minutes.
Expect:   less than a minute of two cores, that is 120 CPU seconds; found again in less than one.
Rival:    --clips N fits on another number of clips.

The other two networks are the embedded model's: the fit asks them for nothing.
"""

import argparse
import dataclasses
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks._support.machine import memory, write_report
from benchmarks._support.random_network import RandomParameters
from sora_jax.config import open_sora_1_2
from sora_jax.networks.registry import CLASSES
from sora_jax.pipeline import preview_fit
from sora_jax.pipeline.model_file import ModelFile
from sora_jax.pipeline.open_model import Networks
from sora_jax.pipeline.previews import Previews
from sora_jax.storage.checkpoint import save_network
from sora_jax.storage.directory import open_network
from sora_jax.streaming.budget import parse_budget


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("scratch", type=Path, help="folder for the weights")
    parser.add_argument("--budget", type=parse_budget, help="memory budget, such as 3.3GB")
    parser.add_argument("--clips", type=int, default=preview_fit.CLIPS)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    preview_fit.CLIPS = options.clips
    config = open_sora_1_2.vae
    if not (options.scratch / "vae").exists():
        save_network(options.scratch, "vae", config, RandomParameters(CLASSES["vae"], config), dtype="float32")
    model = ModelFile.read(None)
    manifests = {**model.manifests, "vae": open_network(options.scratch, "vae")}
    settings = dataclasses.replace(model.resolve({}), dtype="float32")

    def seconds(folder: Path) -> dict[str, float]:
        networks = Networks(manifests, keep=False, budget=options.budget)
        wall, used = time.perf_counter(), time.process_time()
        Previews(networks, settings).prepare(folder)
        return {"cpu_s": round(time.process_time() - used, 2), "s": round(time.perf_counter() - wall, 2)}

    with tempfile.TemporaryDirectory(dir=options.scratch) as folder:
        result: dict[str, Any] = {
            "question": "what the map of previews takes for an autoencoder of the released size",
            "clips": options.clips,
            "budget": options.budget,
            "fitted": seconds(Path(folder)),
            "found again": seconds(Path(folder)),
        }
    write_report({**result, **memory()}, options.json, show=True)


if __name__ == "__main__":
    main()
