"""What a clip's record says of attention is what the networks were traced with; what does not run is refused by name."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from sora_jax.commands import main
from sora_jax.config import open_sora_1_2
from sora_jax.devices.attention_choice import ByLogits, form_name
from sora_jax.networks import registry
from sora_jax.networks.attention import DENSE
from sora_jax.networks.forms import Forms
from sora_jax.pipeline.pipeline import Pipeline
from sora_jax.pipeline.workload import attention_used
from sora_jax.streaming.activations import attention_shapes
from tests.support.tiny_model import CONFIG

PROMPT = "a red circle moves right on a blue background"
SHAPES: list[tuple[int, int, int, int]] = []


def zeros(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def caption_mask(caption_BLE: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(caption_BLE.shape[:2], jnp.bool_)


@dataclasses.dataclass(frozen=True)
class Noted:
    """The dense form, noting what it is asked for."""

    def __call__(self, q_BNSK: jax.Array, k_BNLK: jax.Array, v_BNLK: jax.Array, **options: Any) -> jax.Array:
        SHAPES.append((*q_BNSK.shape[:3], k_BNLK.shape[2]))
        return DENSE(q_BNSK, k_BNLK, v_BNLK, **options)


@pytest.mark.parametrize("hidden_bytes", [None, 4 * CONFIG.stdit3.mlp_size * 20])
def test_the_shapes_of_the_record_are_those_that_a_trace_has(hidden_bytes: int | None) -> None:
    config, forms = CONFIG.stdit3, Forms(attention=Noted(), hidden_bytes=hidden_bytes)
    network = registry.abstract("stdit3", config, forms=forms)
    rows, frames, rows_px, columns_px = 2, 4, 8, 6
    caption = zeros(rows, config.model_max_length, config.caption_channels)
    given = zeros(rows, frames, rows_px, columns_px, 4), zeros(rows), caption, caption_mask(caption)
    sizes = {name: zeros(rows) for name in ("fps_B", "height_px_B", "width_px_B")}
    SHAPES.clear()
    jax.eval_shape(lambda network, given, sizes: network(*given, **sizes), network, given, sizes)
    places = rows_px // 2 * columns_px // 2
    named = attention_shapes(config, rows, frames, places, dataclasses.replace(forms, attention=DENSE))
    assert set(named.values()) <= set(SHAPES)
    assert len(set(SHAPES) - set(named.values())) <= (2 if hidden_bytes else 0)  # a portion's rest


def test_at_480p_the_record_names_what_the_choice_is(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = Pipeline.from_pretrained(tiny_model)
    monkeypatch.setattr(pipe.networks, "config", open_sora_1_2)
    settings = pipe.resolve({"resolution": "480p", "aspect_ratio": "9:16", "num_frames": 51})
    used = attention_used(pipe.networks, settings, 1)
    assert used["stdit3"]["spatial"].startswith("chunked ")
    assert used["stdit3"]["temporal"] == "dense"
    assert used["vae"] == "dense"
    assert attention_used(pipe.networks, pipe.resolve({"height": 720, "width": 1280}), 1)["vae"].startswith("chunked ")


class Takes:
    """A kernel that refuses a bias."""

    def __call__(self, q_BNSK: jax.Array, k_BNLK: jax.Array, v_BNLK: jax.Array, *, bias: Any = None, **_: Any) -> jax.Array:
        if bias is not None:
            raise NotImplementedError("no bias")
        return q_BNSK


def test_a_kernel_is_named_where_it_takes_the_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sora_jax.devices.attention_choice._KERNEL_NAMES", {Takes: "takes"})
    form = ByLogits(10**9, (Takes(),), kernel_bytes=4 * 2 * 8 * 8)
    like = {"head_size": 8, "dtype": "bfloat16"}
    assert form_name(form, (1, 2, 9, 9), **like, masked=True) == "takes"
    assert form_name(form, (1, 2, 9, 9), **like, biased=True) == "dense"
    assert form_name(form, (1, 2, 8, 8), **like) == "dense"


@pytest.mark.parametrize(
    ("attention", "message"),
    [
        ("fast", "attention is 'fast'; expected one of auto, dense, chunked, cudnn, flash."),
        ("cudnn", "attention cudnn needs a gpu and bfloat16, got cpu and float32; use auto, chunked or dense."),
        ("flash", "attention flash needs a tpu and bfloat16, got cpu and float32; use auto, chunked or dense."),
    ],
)
def test_what_does_not_run_here_is_refused_before_anything_is_loaded(tiny_model: Path, attention: str, message: str) -> None:
    stages: list[str] = []
    with pytest.raises(ValueError, match=re.escape(message)):
        Pipeline.from_pretrained(tiny_model, attention=attention)(PROMPT, callback=lambda p: stages.append(p.stage))
    assert not stages


@pytest.mark.parametrize("attention", ["fast", "cudnn"])
def test_the_command_says_so_in_one_line(
    tiny_model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], attention: str
) -> None:
    command = ["generate", PROMPT, "--model", str(tiny_model), "-o", str(tmp_path / "a.mp4"), "--quiet"]
    assert main.main([*command, "--compile-cache", "off", "--attention", attention]) == main.BAD_INPUT
    (line,) = capfd.readouterr().err.strip().splitlines()
    assert "chunked" in line
    assert not list(tmp_path.iterdir())
