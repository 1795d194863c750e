"""Training of the pocket model: what a batch holds, and that an interrupted run ends with the bits of one that was not."""

import dataclasses
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sora_jax.config import pocket
from sora_jax.inputs.sizes import LATENTS_PER_CHUNK
from sora_jax.inputs.tokenizer import Tokenizer
from sora_jax.pocket import train
from sora_jax.pocket.training import codec as train_codec
from sora_jax.pocket.training import flow, latents
from sora_jax.pocket.training import stages as stages_together
from sora_jax.pocket.training import text as train_text
from sora_jax.pocket.training.fit import Stage, fit
from sora_jax.pocket.training.flow import Batches, Lesson
from sora_jax.pocket.training.latents import Clips
from sora_jax.pocket.training.recipe import DECODER_STEPS
from sora_jax.pocket.training.text import shipped_tokenizer
from sora_jax.pocket.world.scenes import sample_scenes
from sora_jax.pocket.world.words import is_unseen
from sora_jax.storage.checkpoint import load_network

pytestmark = pytest.mark.usefixtures("little_optimised")


def _regression(num_steps: int) -> Stage:
    true_kernel = jnp.asarray(np.random.default_rng(0).normal(size=(8, 8)), jnp.float32)

    def loss(params, batch, key):
        noise = 0.01 * jax.random.normal(key, (16, 8))
        error = jnp.mean((batch @ params["kernel"] + params["bias"][None] - batch @ true_kernel - noise) ** 2)
        return error, {"error": error}

    return Stage(
        name="regression",
        num_steps=num_steps,
        init=lambda: {"kernel": jnp.zeros((8, 8)), "bias": jnp.ones(8)},
        batch=lambda step: np.random.default_rng(step).normal(size=(16, 8)).astype(np.float32),
        loss=loss,
        learning_rate=optax.constant_schedule(0.02),
        average=0.9,
        evaluate=lambda params: {"distance": float(jnp.abs(params["kernel"] - true_kernel).max())},
        evaluate_every=20,
        save_every=10,
        report_every=10,
    )


@pytest.mark.ci
def test_an_interrupted_run_ends_with_the_same_bits(tmp_path):
    whole = fit(_regression(60), tmp_path / "whole", seed=3)
    stage = _regression(60)

    def fails_at_34(step):
        if step == 34:
            raise KeyboardInterrupt
        return stage.batch(step)

    with pytest.raises(KeyboardInterrupt):
        fit(dataclasses.replace(stage, batch=fails_at_34), tmp_path / "resumed", seed=3)
    resumed = fit(stage, tmp_path / "resumed", seed=3)
    for name in whole:
        np.testing.assert_array_equal(resumed[name], whole[name])
    lines = [json.loads(line) for line in (tmp_path / "resumed" / "regression.jsonl").read_text().splitlines()]
    judged = {line["step"]: line["distance"] for line in lines if "distance" in line}
    assert list(judged) == [20, 40, 60]
    assert judged[60] < 0.9 * judged[20]


def test_times_of_noisy_samples_lie_where_layout_is_decided():
    noisy_B = jnp.arange(20_000) % 2 == 1
    t_B = np.asarray(flow.training_times(jax.random.key(0), noisy_B, 0.395))
    assert ((t_B > 0) & (t_B < 1)).all()
    # medians: r u / (1 + (r - 1) u) at u = 1/2, and the sigmoid of the mean logit
    assert np.median(t_B[::2]) == pytest.approx(0.395 / 1.395, abs=0.01)
    assert np.median(t_B[1::2]) == pytest.approx(1 / (1 + np.exp(-1.2)), abs=0.01)
    assert (t_B[::2] > 0.75).mean() < 0.04 < 0.5 < (t_B[1::2] > 0.75).mean()


@pytest.mark.parametrize("num_latents", [1, 5, 10])
def test_given_frames(num_latents):
    given = flow._given_frames(np.random.default_rng(0), 4000, num_latents, share=0.5)
    assert not given.all(axis=1).any()
    if num_latents == 1:
        assert not given.any()
        return
    assert given.any(axis=1).mean() == pytest.approx(0.5, abs=0.03)
    sizes = set(given.sum(axis=1).tolist())
    assert sizes == ({0, 1} if num_latents == LATENTS_PER_CHUNK else {0, 1, LATENTS_PER_CHUNK})
    chunks = given[given.sum(axis=1) == LATENTS_PER_CHUNK]
    assert chunks[:, :LATENTS_PER_CHUNK].all()


@pytest.fixture(scope="module")
def clips() -> Clips:
    scenes = sample_scenes(np.random.default_rng(0), 64)
    latent = np.arange(64, dtype=np.float16)[:, None, None, None, None]
    z = np.broadcast_to(latent[:, None], (64, 2, 10, 8, 8, 4))
    return latents._with_reversals(z, z[:, :, 0], scenes)


def make_batches(clips: Clips, tokenizer: Tokenizer, *lessons: Lesson) -> Batches:
    """Returns the batches of these clips; the long ones are the same with a third chunk."""
    longer = dataclasses.replace(clips, z_NTHWC=np.concatenate([clips.z_NTHWC, clips.z_NTHWC[:, :5]], axis=1))
    return Batches(clips=clips, long_clips=longer, tokenizer=tokenizer, size=16, seed=0, lessons=lessons)


def test_reversed_clips_have_reversed_captions_and_stay_in_training(clips):
    forwards_of = clips.z_NTHWC[:, 0, 0, 0, 0].astype(int)  # every latent holds the number of its clip
    assert forwards_of[:64].tolist() == list(range(64))
    assert len(forwards_of) > 100
    for number, other in zip(forwards_of[64:], clips.attributes[64:], strict=True):
        one = clips.attributes[number]
        assert other == one | {"motion": latents._REVERSED[one["motion"]]}
        assert not is_unseen(*(other[name] for name in ("shape", "colour", "background", "motion")))


def test_a_lesson_sees_fast_clips_of_its_motions_at_high_noise(clips, tmp_path):
    lesson = Lesson(start=10, stop=20, motions=("left", "grow"))
    batches = make_batches(clips, shipped_tokenizer(tmp_path / "tokenizer.json"), lesson)
    wanted = [one.get("speed") == "fast" and one["motion"] in ("left", "grow") for one in clips.attributes]
    fast = {float(z) for z in clips.z_NTHWC[wanted, 0, 0, 0, 0]}
    inside, outside = [batches(step) for step in range(10, 20)], [batches(step) for step in range(20, 60)]
    assert all(batch["noisy"].all() and batch["z"].shape[1] == 10 for batch in inside)
    assert {float(z) for batch in inside for z in batch["z"][:, 0, 0, 0, 0]} <= fast
    assert {batch["z"].shape[1] for batch in outside} == {1, 5, 10, 15}
    assert not {float(z) for batch in outside for z in batch["z"][:, 0, 0, 0, 0]} <= fast
    assert all(batch["noisy"].mean() == 0.5 for batch in outside)
    assert sum(batch["given"].any(axis=1).mean() for batch in inside) > 6


def test_some_captions_are_empty_and_none_of_images_tells_of_motion(clips, tmp_path):
    tokenizer = shipped_tokenizer(tmp_path / "tokenizer.json")
    batches = [make_batches(clips, tokenizer)(step) for step in range(200)]
    nothing = tokenizer.encode([""], 32)[0][0]
    empty = np.mean([(batch["ids"] == nothing).all(axis=1).mean() for batch in batches])
    assert empty == pytest.approx(flow.EMPTY_SHARE, abs=0.015)
    quiet = {float(clips.z_NTHWC[i, 0, 0, 0, 0]) for i, one in enumerate(clips.attributes) if one["motion"] == "still"}
    shown = {float(z) for batch in batches for z in batch["z"][(batch["ids"] == nothing).all(axis=1), 0, 0, 0, 0]}
    assert shown <= quiet
    moving = {token for word in ("moves", "slowly", "still", "grows") for token in tokenizer.encode([word], 32)[0][0][:1]}
    images = np.concatenate([batch["ids"] for batch in batches if batch["z"].shape[1] == 1])
    assert not np.isin(images, list(moving)).any()
    assert all((batch["fps"] == 120).all() == (batch["z"].shape[1] == 1) for batch in batches)


@pytest.mark.slow
def test_a_warm_start_begins_with_the_transformer_of_the_base(clips, tiny_model, tmp_path, monkeypatch):
    """Not with new weights; the learning rate climbs to the one that is given, 200 steps on."""
    stages = []
    monkeypatch.setattr(latents, "cache_clips", lambda *_, **__: clips)
    monkeypatch.setattr(stages_together, "fit", lambda stage, directory, seed: stages.append(stage) or stage.init())
    tokenizer = shipped_tokenizer(tmp_path / "tokenizer.json")
    for more in ([], ["--warm", "--flow-rate", "5e-4"]):
        args = train.parse(["--work", str(tmp_path), "--base", str(tiny_model), *more])
        stages_together.transformer(args, tmp_path, {}, {}, tokenizer)
    new, warm = stages
    stored = load_network(tiny_model, "stdit3", dtype="float32")[1]
    params = warm.init()
    assert params.keys() == stored.keys()
    for name, value in stored.items():
        np.testing.assert_array_equal(params[name], value)
    assert any(new.init()[name].shape != value.shape for name, value in stored.items())
    assert [float(stage.learning_rate(1000)) for stage in stages] == pytest.approx([2e-3, 5e-4])


@pytest.mark.parametrize("option", ["--warm", "--warm-text"])
def test_a_warm_start_needs_a_base(option):
    with pytest.raises(ValueError, match="name them with --base MODEL_DIR"):
        train.parse([option])


@pytest.mark.slow
def test_a_warm_text_encoder_begins_with_that_of_the_base(tmp_path):
    tokenizer = shipped_tokenizer(tmp_path / "tokenizer.json")
    new = train_text.text_stage(pocket.t5, tokenizer, num_steps=99, batch_size=2, seed=0)
    start = {name: value + 1 for name, value in train_text.encoder_params(new.init()).items()}
    warm = train_text.text_stage(pocket.t5, tokenizer, num_steps=99, batch_size=2, seed=0, start=start)
    assert train_text.encoder_params(warm.init()) == start
    assert warm.init().keys() == new.init().keys()  # heads, which are not kept, are always new
    assert max(map(float, map(warm.learning_rate, range(100)))) < max(map(float, map(new.learning_rate, range(100))))


@pytest.mark.parametrize(
    ("arguments", "steps"), [([], DECODER_STEPS), (["--base", "x"], 0), (["--base", "x", "--decoder-steps", "7"], 7)]
)
def test_decoders_are_trained_again_with_the_codec_or_when_told(arguments, steps):
    assert train.parse(arguments).decoder_steps == steps


@pytest.mark.slow
def test_decoders_are_trained_behind_frozen_encoders(tiny_model):
    config, codec = load_network(tiny_model, "vae", dtype="float32")
    stage = train_codec.decoder_stage(config, jax.device_put(codec), num_steps=99, batch_size=1, seed=0)
    params = stage.init()
    assert {name.split(".")[0] for name in params} == {"spatial_decoder", "temporal_decoder"}
    loss = jax.jit(jax.value_and_grad(lambda params: stage.loss(params, stage.batch(0), jax.random.key(0))[0]))
    before, gradient = loss(params)
    after, _ = loss(jax.tree.map(lambda value, slope: value - 1e-3 * slope, params, gradient))
    assert after < before
    assert all(jnp.abs(slope).max() > 0 for slope in gradient.values())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lesson", "10:20"], "--lesson is '10:20'; expected FROM:TO:MOTIONS"),
        (["--lesson", "1:2:sideways"], "--lesson 1:2:sideways names other motions than left"),
        (["--lesson", "a:2:left"], "--lesson is 'a:2:left'; expected FROM:TO:MOTIONS"),
        (["--flow-rate", "0"], "--flow-rate is 0; expected a number above 0"),
        (["--clips", "-1"], "--clips is -1; expected a whole number from 0"),
    ],
)
def test_a_recipe_that_is_none_is_one_line(arguments, message, capsys):
    assert train.main(arguments) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith(f"sora-jax: error: {message}")


def test_a_base_that_is_missing_is_one_line_and_nothing_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main(["--work", str(tmp_path / "work"), "--base", str(tmp_path / "missing")]) == 2
    assert re.fullmatch(r"sora-jax: error: .*missing.*\n", capsys.readouterr().err)
    assert not (tmp_path / "work").exists()
