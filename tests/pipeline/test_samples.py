"""What samples are made from: parts of a request that cannot be followed, or have no effect, are refused before any work."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sora_jax.inputs import references
from sora_jax.pipeline import video
from sora_jax.pipeline.model_file import ModelFile
from sora_jax.pipeline.samples import Sample, read_samples, rehearse
from sora_jax.pipeline.settings import Settings
from tests.support.tiny_model import CONFIG, DEFAULTS

pytestmark = pytest.mark.usefixtures("little_optimised")

PROMPT = "a red circle"


def settings(**options: Any) -> Settings:
    return Settings.resolve(DEFAULTS, options)  # 17 frames of 32 x 48: 5 latent frames


def read(prompt: str = PROMPT, references: str = "", strategy: str = "", **options: Any) -> Sample:
    (sample,) = read_samples([prompt], [references], [strategy], 1, settings(**options), CONFIG.vae)
    return sample


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A picture (1 latent frame) and a clip of 34 frames (10 latent frames) in the current folder."""
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (48, 32), (200, 30, 30)).save("red.png")
    video.save(np.zeros((34, 32, 48, 3), np.uint8), "clip.mp4", fps=8)


@pytest.mark.parametrize(
    ("strategy", "message"),
    [
        ("1", "has an entry for clip 1 of 1; expected 0 to 0"),
        ("-1", "has an entry for clip -1 of 1"),
        ("0;9,0", "has an entry for clip 9 of 1"),
        ("0,2", "names reference 2; the prompt has 2"),
        ("0,-3", "names reference -3; the prompt has 2"),
        ("0,0,1", "starts at latent frame 1 of a reference of 1"),
        ("0,1,10", "starts at latent frame 10 of a reference of 10"),
        ("0,1,-11", "starts at latent frame -11 of a reference of 10"),
        ("0,0,0,5", "starts at latent frame 5 of a clip of 5"),
        ("0,0,0,0,0", "an entry of 0 latent frames, which changes nothing"),
        ("0,0,0,0,6", "the clip has 5 and the reference 1; expected at most 5"),
        ("0,1,0,0,11", "the clip has 5 and the reference 10; expected at most 10"),
        ("0,0,0,0,1,1.5", "has edit ratio 1.5; expected 0"),
    ],
)
def test_an_entry_that_cannot_be_followed_is_refused(files: None, strategy: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read(references="red.png;clip.mp4", strategy=strategy)


@pytest.mark.parametrize("strategy", ["0", "0,1,0,0,10", "0,1,-5,-5,5,0.3", "0;0,1,5,0,10,0.5", "0,-1"])
def test_what_the_reference_follows_is_followed(files: None, strategy: str) -> None:
    """A length is cut to what the clip or the reference has left, as there."""
    assert read(references="red.png;clip.mp4", strategy=strategy).strategy == strategy


def test_later_clips_may_name_the_clips_before(files: None) -> None:
    options = {"loop": 3, "num_frames": 34}
    sample = read(references="red.png", strategy="2,-1,0,5,5", **options)
    lengths = {"red.png": 1}
    weights = rehearse(sample, settings(**options), CONFIG.vae, lengths)
    # Clip 1 stands for those that only continue; clip 2 has the entry as well, and both keep 5 frames of the clip before.
    np.testing.assert_array_equal(weights, [[0] * 5 + [1] * 5, [0] * 10])
    with pytest.raises(ValueError, match="names reference 3; the prompt has 1"):
        read(references="red.png", strategy="2,3", **options)


def test_the_rehearsed_weights_are_those_of_the_sampling(files: None) -> None:
    """Against the function that puts real latents in."""
    strategy = "0,1,0,0,3,0.25;0,0,0,4,1"
    sample = read(references="red.png;clip.mp4", strategy=strategy)
    (weights,) = rehearse(sample, settings(), CONFIG.vae, {"red.png": 1, "clip.mp4": 10})
    latents = [np.ones((1, 4, 6, 4), np.float32), np.ones((10, 4, 6, 4), np.float32)]
    _, expected = references.apply_mask_strategy(np.zeros((1, 5, 4, 6, 4), np.float32), [latents], [strategy], 0, align=5)
    np.testing.assert_array_equal(weights, expected[0])


@pytest.mark.parametrize(
    ("prompt", "loop", "message"),
    [
        ("|0| a |99| b", 1, "has a segment from clip 99 on, but loop is 1; set loop to at least 100"),
        ("|0| a |1| b |2| c", 2, "has a segment from clip 2 on, but loop is 2"),
        ("|1| a", 1, r"begins with segments, but not with \|0\|; expected \|0\| text \|2\| text"),
        (" |0| a", 1, "begins with segments, but not with"),
        ("| 0 | a", 1, "begins with segments, but not with"),
    ],
)
def test_a_segment_that_never_holds_is_refused(prompt: str, loop: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read(prompt, loop=loop, num_frames=34)


@pytest.mark.parametrize("prompt", ["|0| a |1| b", "a |1| b", "| a", "a | b | c"])
def test_bars_that_are_no_segments_are_text(prompt: str) -> None:
    assert read(prompt, loop=2, num_frames=34).prompt == prompt


def test_references_are_decoded_to_be_counted_and_not_kept(files: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once for each file, whatever the number of samples; damage behind the beginning is seen."""
    counted: list[str] = []
    count = references.count_frames
    monkeypatch.setattr(references, "count_frames", lambda path: counted.append(str(path)) or count(path))
    samples = read_samples([PROMPT, "b"], ["clip.mp4"] * 2, [""] * 2, 3, settings(), CONFIG.vae)
    assert counted == ["clip.mp4"]
    assert [sample.prompt for sample in samples] == [PROMPT] * 3 + ["b"] * 3
    assert {sample.strategy for sample in samples} == {"0"}
    assert all(set(vars(sample)) == {"prompt", "caption", "references", "strategy"} for sample in samples)
    whole = Path("red.png").read_bytes()
    Path("cut.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"cut\.png is not a readable image"):
        read(references="cut.png")


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        ("red.png;", "a reference path is empty; expected paths with one ';' between them, and none at the end"),
        (";red.png", "a reference path is empty"),
        ("https://example.org/a.png", "is an address on the network; download it"),
        ("S3://bucket/a.mp4", "is an address on the network"),
    ],
)
def test_a_path_that_is_none_is_refused(files: None, paths: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read(references=paths)


def test_a_request_is_resolved_from_json_alone(tiny_model: Path) -> None:
    model = ModelFile.read(tiny_model)
    assert model.resolve({}) == settings()
