"""How near previews come to clips: the linear map of the embedded model's autoencoder, and the map that any model gets.

Command:  python -m benchmarks.quality.preview_quality --json benchmarks/results/preview_quality.json
Needs:    the embedded model; two CPU minutes.
Expect:   of previews against what the decoder makes of the same latents, on clips of unseen combinations: 15 dB with the map
          fitted on training clips (which is shipped), 14 dB with the one fitted on moving shapes (which other models get).
Rival:    one colour for a place, from its own four latents: 11.4 dB.

--ship FILE writes the map that is shipped.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks._support.machine import write_report
from sora_jax.metrics import psnr
from sora_jax.pipeline import preview_fit
from sora_jax.pipeline.coders import Coders
from sora_jax.pipeline.pipeline import Pipeline
from sora_jax.pipeline.preview import PreviewMap
from sora_jax.pipeline.video import quantise
from sora_jax.pocket.world import scenes
from sora_jax.process import Timings

NUM_FRAMES, REPEATS = 34, 50


def drawn(num_clips: int, split: str, seed: int) -> np.ndarray:
    """Returns clips of the embedded model's world, in [-1, 1]."""
    found = scenes.sample_scenes(np.random.default_rng(seed), num_clips, split=split)
    return np.asarray(scenes.render(found, scenes.all_frames(NUM_FRAMES)))


def one_colour(latents: np.ndarray, shown: np.ndarray) -> Any:
    """Returns a function of latents that gives every place one colour, from its own values alone: the plainest map."""
    batch, frames, rows, columns, channels = latents.shape
    side = shown.shape[2] // rows
    cells = shown.reshape(batch, frames, rows, side, columns, side, 3).mean((3, 5)).reshape(-1, 3)
    inputs = np.concatenate([latents.reshape(-1, channels), np.ones((len(cells), 1))], axis=1)
    weights = np.linalg.lstsq(inputs, cells, rcond=None)[0]
    return lambda z: quantise((z @ weights[:-1] + weights[-1]).astype(np.float32).repeat(side, axis=2).repeat(side, axis=3))


def milliseconds(preview_map: PreviewMap, z_BTHWC: np.ndarray) -> float:
    """Returns the CPU time of one preview."""
    preview_map.pictures(z_BTHWC)
    start = time.process_time()
    for _ in range(REPEATS):
        preview_map.pictures(z_BTHWC)
    return 1e3 * (time.process_time() - start) / REPEATS


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fitted", type=int, default=32, help="training clips that the shipped map is fitted on")
    parser.add_argument("--unseen", type=int, default=32, help="clips of unseen combinations that maps are measured on")
    parser.add_argument("--seed", type=int, default=2026)
    parser.add_argument("--ship", type=Path, help="write the map that is shipped")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    pipe = Pipeline.from_pretrained()
    config = pipe.config.vae
    coders = Coders(pipe.networks, "float32", Timings(), None)

    def encode(video: np.ndarray) -> np.ndarray:
        return coders.encode_videos([video])[0]

    training = drawn(options.fitted, "training", seed=0)
    maps = {
        "fitted on training clips": preview_fit.fit(config, encode, coders.decode, training),
        "fitted on moving shapes": preview_fit.fit(
            config, encode, coders.decode, preview_fit.moving_shapes(config.micro_frame_size)
        ),
    }
    if options.ship is not None:
        maps["fitted on training clips"].write(options.ship, pipe.model.manifests["vae"])
    shown = preview_fit.shown_frames(config, NUM_FRAMES)
    latents = encode(drawn(options.unseen, "unseen", seed=options.seed))
    frames = quantise(coders.decode(latents, NUM_FRAMES))[:, shown]
    fitted = encode(training)
    plain = one_colour(fitted, np.clip(coders.decode(fitted, NUM_FRAMES)[:, shown], -1, 1))
    result: dict[str, Any] = {
        "question": "how near previews come to what the decoder makes of the same latents",
        "model": pipe.model_id,
        "clips": {"fitted": options.fitted, "unseen": options.unseen, "seed": options.seed},
        "psnr_db": {name: _decibels(one.pictures(latents), frames) for name, one in maps.items()}
        | {"rival, one colour a place": _decibels(plain(latents), frames)},
        "cpu_ms": milliseconds(maps["fitted on training clips"], latents[:1]),
    }
    write_report(result, options.json, show=True)


def _decibels(pictures_BThw3: np.ndarray, frames_BThw3: np.ndarray) -> dict[str, float]:
    """Returns the distance of all clips together, and of the worst and the best one."""
    each = [psnr(one, other) for one, other in zip(pictures_BThw3, frames_BThw3, strict=True)]
    flat = (len(each) * frames_BThw3.shape[1], *frames_BThw3.shape[2:])
    return {"all": psnr(pictures_BThw3.reshape(flat), frames_BThw3.reshape(flat)), "least": min(each), "most": max(each)}


if __name__ == "__main__":
    main()
