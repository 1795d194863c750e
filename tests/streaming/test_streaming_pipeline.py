"""A memory budget changes how a clip is made, not the clip."""

import json
from pathlib import Path

import numpy as np
import pytest

from sora_jax.commands import main
from sora_jax.pipeline import pipeline
from sora_jax.pipeline.clip import Clip
from sora_jax.pipeline.pipeline import Pipeline
from sora_jax.pipeline.run import Progress

PROMPT = "a red circle moves right on a blue background"
NUM_BLOCKS = 2  # of the tiny transformer


@pytest.fixture(scope="module")
def clip(tiny_model: Path) -> Clip:
    return Pipeline.from_pretrained(tiny_model)(PROMPT)


@pytest.fixture(scope="module")
def pipe(tiny_model: Path) -> Pipeline:
    return Pipeline.from_pretrained(tiny_model, memory_budget="8GB")


def test_a_clip_within_a_budget_is_the_clip_without(pipe, clip):
    streamed = pipe(PROMPT)
    assert pipe.memory_budget == 8_000_000_000
    assert np.linalg.norm(streamed.latents - clip.latents) <= 1e-6 * np.linalg.norm(clip.latents)
    assert np.abs(streamed.frames.astype(int) - clip.frames.astype(int)).max() <= 1
    assert streamed.parameters == clip.parameters


def test_a_callback_may_lower_the_budget(pipe, clip):
    held = []

    def lower(progress: Progress) -> None:
        if progress.carry is None:
            return
        (stream,) = pipe.networks._streams.values()
        held.append(len(stream.blocks.retained))
        if progress.step == 2:
            pipe.memory_budget = stream.retention.fixed_bytes  # nothing more

    streamed = pipe(PROMPT, callback=lower)
    assert held == [NUM_BLOCKS, NUM_BLOCKS, 0, 0]
    assert pipe.memory_budget < 8_000_000_000
    np.testing.assert_allclose(streamed.latents, clip.latents, rtol=0, atol=1e-5)


def test_a_budget_that_is_too_small_names_what_is_needed(tiny_model):
    with pytest.raises(ValueError, match=r"memory budget of 0.01 GB is too small: .* needs [\d.]+ GB"):
        Pipeline.from_pretrained(tiny_model, memory_budget="10MB")(PROMPT)


def test_a_budget_that_is_too_small_is_refused_before_anything_is_read(tiny_model, monkeypatch):
    pipe = Pipeline.from_pretrained(tiny_model, memory_budget="300MB")
    monkeypatch.setattr(pipeline, "read_samples", lambda *_: pytest.fail("references were looked for"))
    with pytest.raises(ValueError, match=r"memory budget of 0.3 GB is too small"):
        pipe(PROMPT, references="missing.png")
    with pytest.raises(ValueError, match=r"memory budget of 0.3 GB is too small"):
        pipe.calibrate(PROMPT, evaluations=2)


def test_without_a_budget_none_can_be_set(tiny_model):
    pipe = Pipeline.from_pretrained(tiny_model)
    assert pipe.memory_budget is None
    with pytest.raises(ValueError, match="open it again with memory_budget"):
        pipe.memory_budget = "1GB"


def test_generate_within_a_budget_and_its_profile(tiny_model, tmp_path, capsys):
    profile = tmp_path / "trace.json"
    arguments = ["generate", PROMPT, "--model", str(tiny_model), "-o", str(tmp_path / "clip.npz"), "--quiet"]
    arguments += ["--compile-cache", "off", "--caption-cache", "off"]
    assert main.main([*arguments, "--memory-budget", "8GB", "--profile-streaming", str(profile)]) == 0
    spans = {(event["cat"], event["name"]) for event in json.loads(profile.read_text())["traceEvents"] if event["ph"] == "X"}
    layers = ("block.0.attn", "spatial_blocks.0", "temporal_blocks.0", "spatial_decoder")
    assert {(lane, layer) for lane in ("load", "compute") for layer in layers} <= spans


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--memory-budget", "much"], "memory budget is 'much'; expected a size such as 3.3GB"),
        (["--profile-streaming", "trace.json"], "it needs --memory-budget"),
    ],
)
def test_what_generate_refuses(tiny_model, tmp_path, capsys, options, message):
    arguments = ["generate", PROMPT, "--model", str(tiny_model), "-o", str(tmp_path / "clip.npz"), "--compile-cache", "off"]
    assert main.main([*arguments, *options]) == main.BAD_INPUT
    assert message in capsys.readouterr().err
