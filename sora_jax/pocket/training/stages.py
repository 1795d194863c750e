"""The stages of pocket's training put together: what `sora_jax.pocket.train` does once its arguments are read.

Invariant: the outcome is a function of the recipe alone, not of interruptions.
"""

import functools
import json
import os
from pathlib import Path

import jax

from sora_jax.config import pocket
from sora_jax.inputs import sizes
from sora_jax.inputs.tokenizer import Tokenizer
from sora_jax.pipeline.model_file import model_path
from sora_jax.pocket.judging import cases
from sora_jax.pocket.judging.measure import measure
from sora_jax.pocket.judging.scores import score
from sora_jax.pocket.training import codec as train_codec
from sora_jax.pocket.training import flow, latents
from sora_jax.pocket.training import text as train_text
from sora_jax.pocket.training.fit import Params, fit
from sora_jax.pocket.training.recipe import Recipe
from sora_jax.pocket.world.captions import KNOWN as CAPTIONS
from sora_jax.pocket.world.vocabulary import write_tokenizer
from sora_jax.pocket.world.words import FPS, NUM_FRAMES, SIZE_PX
from sora_jax.storage.checkpoint import load_network, save_network
from sora_jax.storage.writer import update_model_file
from sora_jax.version import __version__

# How the model is used unless a caller says otherwise, and what it was trained and judged on, for model.json.
DEFAULTS = {"num_steps": 30, "guidance": 3.0, "height": SIZE_PX, "width": SIZE_PX, "num_frames": NUM_FRAMES, "fps": FPS}
TRAINED = {
    "sizes": [[SIZE_PX, SIZE_PX]],
    "num_frames": [1, sizes.FRAMES_PER_CHUNK, NUM_FRAMES, flow.LONG_FRAMES],
    "fps": [FPS],
    # pocket_judge_empty.json and pocket_judge.json in benchmarks/results; at 7 shapes are exaggerated (docs/embedded_model.md).
    "guidance": [1.0, 3.0],
    "captions": CAPTIONS,
}
TRAINING_SEED = 1_000_000  # of the captions that watch training, apart from those of published figures


def codec_stages(recipe: Recipe) -> Params:
    """Returns the codec after its first two stages: both autoencoders and the statistics of its latents."""
    stage = train_codec.spatial_stage(
        pocket.vae, num_steps=recipe.spatial_steps, batch_size=recipe.spatial_batch, seed=recipe.seed
    )
    spatial = train_codec.unit_variance(fit(stage, recipe.work, seed=recipe.seed), pocket.vae, seed=recipe.seed)
    stage = train_codec.temporal_stage(
        pocket.vae, spatial, num_steps=recipe.temporal_steps, batch_size=recipe.temporal_batch, seed=recipe.seed
    )
    return train_codec.with_stats(spatial | fit(stage, recipe.work, seed=recipe.seed), pocket.vae, seed=recipe.seed)


def with_decoders(recipe: Recipe, codec: Params) -> Params:
    """Returns the codec with decoders that were trained further."""
    stage = train_codec.decoder_stage(
        pocket.vae, codec, num_steps=recipe.decoder_steps or 0, batch_size=recipe.temporal_batch, seed=recipe.seed
    )
    return codec | fit(stage, recipe.work, seed=recipe.seed)


def text_encoder(recipe: Recipe, tokenizer: Tokenizer, start: Params | None) -> Params:
    """Returns the complete text encoder."""
    stage = train_text.text_stage(
        pocket.t5, tokenizer, num_steps=recipe.text_steps, batch_size=recipe.text_batch, seed=recipe.seed, start=start
    )
    return train_text.encoder_params(fit(stage, recipe.work, seed=recipe.seed))


def _stored(model: str | None, network: str) -> Params:
    return jax.device_put(load_network(model_path(model), network, dtype="float32")[1])


def transformer(recipe: Recipe, model: Path, codec: Params, text: Params, tokenizer: Tokenizer) -> Params:
    """Returns the transformer; every evaluation writes it to the model directory and judges clips made from there."""

    def evaluate(params: Params) -> dict[str, float]:
        save_network(model, "stdit3", pocket.stdit3, params, dtype=recipe.dtype, overwrite=True)
        asked = cases.captions(recipe.judged, seed=TRAINING_SEED)
        seen = [measure(made.frames_thw3) for made in cases.clips(model, asked)]
        return {name: rate.share for name, rate in score(seen, [one.attributes for one in asked]).items()}

    cached = functools.partial(latents.cache_clips, codec, pocket)
    long_frames = flow.LONG_FRAMES
    batches = flow.Batches(
        clips=cached(recipe.work / "latents", num_clips=recipe.clips, seed=recipe.seed),
        long_clips=cached(
            recipe.work / "long_latents", num_clips=recipe.long_clips, seed=recipe.seed + 1, num_frames=long_frames
        ),
        tokenizer=tokenizer,
        size=recipe.batch,
        seed=recipe.seed,
        lessons=[_lesson(text) for text in recipe.lessons],
    )
    stage = flow.flow_stage(
        pocket,
        text,
        batches,
        num_steps=recipe.flow_steps,
        evaluate=evaluate,
        evaluate_every=recipe.judge_every,
        learning_rate=recipe.flow_rate,
        start=_stored(recipe.base, "stdit3") if recipe.warm else None,
    )
    return fit(stage, recipe.work, seed=recipe.seed)


def _lesson(text: str) -> flow.Lesson:
    start, stop, motions = text.split(":")
    return flow.Lesson(start=int(start), stop=int(stop), motions=tuple(motions.split(",")))


def record_run(recipe: Recipe) -> None:
    """Adds a line to ``runs.jsonl`` in the work folder: arguments, versions and device of one start."""
    recipe.work.mkdir(parents=True, exist_ok=True)
    arguments = {name: value for name, value in vars(recipe).items() if name != "work"}
    machine = {"device": jax.devices()[0].device_kind, "cpus": os.cpu_count()}
    line = {"arguments": arguments, "sora_jax": __version__, "jax": jax.__version__, **machine}
    with (recipe.work / "runs.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")


def train(recipe: Recipe) -> None:
    """Trains every stage that is not complete and writes the model directory."""
    base = {network: _stored(recipe.base, network) for network in ("vae", "t5")} if recipe.base else {}
    record_run(recipe)
    model = recipe.work / "model"
    model.mkdir(parents=True, exist_ok=True)
    write_tokenizer(model / "tokenizer.json")
    tokenizer = Tokenizer.from_file(model / "tokenizer.json")
    codec = base["vae"] if base else codec_stages(recipe)
    codec = with_decoders(recipe, codec) if recipe.decoder_steps else codec
    text = base["t5"] if base and not recipe.warm_text else text_encoder(recipe, tokenizer, base.get("t5"))
    save_network(model, "vae", pocket.vae, codec, dtype=recipe.dtype, overwrite=True)
    save_network(model, "t5", pocket.t5, text, dtype=recipe.dtype, overwrite=True)
    update_model_file(model, tokenizer="tokenizer.json", defaults=DEFAULTS, trained=TRAINED)
    params = transformer(recipe, model, codec, text, tokenizer)
    save_network(model, "stdit3", pocket.stdit3, params, dtype=recipe.dtype, overwrite=True)
