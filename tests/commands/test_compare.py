"""``sora-jax compare``: the measures are those of `metrics` on the pixels that files hold."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from sora_jax import metrics
from sora_jax.commands import main
from sora_jax.pipeline import clip_frames, video
from sora_jax.pipeline.clip_frames import read_frames

STEPS = np.linspace(0, 200, 32)[None, None, :, None]
CLIP = np.clip(STEPS + np.random.default_rng(0).normal(0, 20, (4, 32, 32, 3)), 0, 255).astype(np.uint8)
OTHER = np.clip(CLIP + np.random.default_rng(1).normal(0, 5, CLIP.shape), 0, 255).astype(np.uint8)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    video.save(CLIP, "a.npz", fps=8)
    video.save(OTHER, "b.npz", fps=8)
    return tmp_path


@pytest.mark.parametrize(("name", "least_db"), [("clip.npz", np.inf), ("clip", np.inf), ("clip.gif", 25), ("clip.mp4", 25)])
def test_what_was_written_is_read_back(folder: Path, name: str, least_db: float) -> None:
    """npz and PNG hold every bit, GIF 256 colours a frame, and H.264 half of the colour's resolution."""
    smooth = np.stack([np.roll(np.broadcast_to(STEPS[0], (32, 32, 3)).astype(np.uint8), i, axis=0) for i in range(5)])
    smooth[:, :, 0] = np.arange(5, dtype=np.uint8)[:, None, None]  # a GIF joins frames that are equal
    assert metrics.psnr(read_frames(video.save(smooth, name, fps=8)), smooth) >= least_db
    assert read_frames(video.save(smooth[:1], "one.png", fps=8)).shape == (1, 32, 32, 3)


def test_two_clips_are_measured(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["compare", "a.npz", "b.npz", "--json"]) == main.OK
    found = json.loads(capsys.readouterr().out)
    assert found == {
        "shape": [4, 32, 32, 3],
        "equal": False,
        "psnr_db": metrics.psnr(CLIP, OTHER),
        "ssim": metrics.ssim(CLIP, OTHER),
        "flicker": [metrics.temporal_flickering(one) for one in (CLIP, OTHER)],
        "motion": [metrics.flow_magnitude(one) for one in (CLIP, OTHER)],
    }
    assert main.main(["compare", "a.npz", "a.npz"]) == main.OK
    assert "PSNR: infinite: the clips are equal\nSSIM: 1.0000\n" in capsys.readouterr().out


def test_a_single_small_picture_has_neither_motion_nor_ssim(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    video.save(CLIP[:1, :8], "small.png", fps=8)
    assert main.main(["compare", "small.png", "small.png", "--json"]) == main.OK
    found = json.loads(capsys.readouterr().out)
    assert (found["equal"], found["psnr_db"], found["ssim"], found["motion"]) == (True, None, None, [None, None])


@pytest.mark.parametrize(
    ("clip", "message"),
    [
        ("short.npz", "short.npz has 3 frames of 32 x 32 and a.npz has 4 frames of 32 x 32; expected two clips of one size"),
        ("text.mp4", "text.mp4 is not a readable mp4 file"),
        ("other.npz", "other.npz holds no frames"),
        ("wide.npz", "expected uint8[frames, height, width, 3]"),
        ("pixels.npz", "pixels.npz has 10000 pixels in all frames; expected at most 5000"),
    ],
)
def test_what_cannot_be_compared_is_one_line(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], clip: str, message: str
) -> None:
    video.save(CLIP[:3], "short.npz", fps=8)
    Path("text.mp4").write_text("words")
    np.savez("other.npz", numbers=np.zeros(3))
    np.savez("wide.npz", frames=np.zeros((1, 32, 32, 3), np.float32), fps=8.0)
    np.savez("pixels.npz", frames=np.zeros((1, 100, 100, 3), np.uint8), fps=8.0)
    monkeypatch.setattr(clip_frames, "MAX_PIXELS", 5000)
    assert main.main(["compare", clip, "a.npz"]) == main.BAD_INPUT
    error = capsys.readouterr().err
    assert (error.count("\n"), message in error) == (1, True), error


def test_the_module_of_measures_is_the_same_command(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "sora_jax.metrics", "a.npz", "b.npz"], capture_output=True, text=True, check=True
    )
    assert main.main(["compare", "a.npz", "b.npz"]) == main.OK
    assert (done.stdout, done.stderr) == (capsys.readouterr().out, "")
