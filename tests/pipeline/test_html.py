"""What notebooks show of clips and models: the clip itself, and texts that cannot break out."""

import base64
import io
import re
from pathlib import Path

import av
import numpy as np
import pytest

from sora_jax import metrics
from sora_jax.pipeline.html import clip_html, model_html
from sora_jax.pipeline.model_file import ModelFile

HOSTILE = '<script>alert("x")</script>'


def test_a_clip_plays_in_the_text_itself() -> None:
    steps = np.linspace(0, 200, 32).astype(np.uint8)
    frames = np.broadcast_to(steps[None, None, None, :, None], (10, 4, 32, 32, 3))
    shown = clip_html(frames, 8.0, [{"prompt": HOSTILE, "seed": seed} for seed in range(10)])
    assert (shown.count("<video"), "and 2 more" in shown, "seed 7" in shown) == (8, True, True)
    assert "<script>" not in shown
    data = base64.b64decode(re.search(r'src="data:video/mp4;base64,([^"]+)"', shown)[1])
    with av.open(io.BytesIO(data)) as container:
        played = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    assert played.shape == frames.shape[1:]
    assert metrics.psnr(played, frames[0]) > 30


@pytest.mark.parametrize(("shape", "kind"), [((1, 1, 32, 32, 3), "image/png"), ((1, 2, 31, 33, 3), "image/gif")])
def test_what_is_no_video_is_a_picture(shape: tuple[int, ...], kind: str) -> None:
    assert f"data:{kind};base64," in clip_html(np.zeros(shape, np.uint8), 8.0, [{}])


def test_a_model_says_what_it_is(tiny_model: Path) -> None:
    shown = model_html(ModelFile.read(tiny_model))
    assert all(f"<th>{name}</th>" in shown for name in ("model", "t5", "stdit3", "vae", "defaults"))
    assert "one circle or square" in model_html(ModelFile.read(None))
