"""Previews: what a step predicts, the linear map that shows it, where the map comes from, and the file of generate."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from sora_jax.commands import main
from sora_jax.config import pocket
from sora_jax.metrics import psnr
from sora_jax.pipeline import preview_fit
from sora_jax.pipeline.coders import Coders
from sora_jax.pipeline.model_file import ModelFile
from sora_jax.pipeline.open_model import Networks
from sora_jax.pipeline.pipeline import Pipeline
from sora_jax.pipeline.preview import FILE_NAME, PreviewMap, chunk_of, frame_features, shape_of
from sora_jax.pipeline.run import Progress
from sora_jax.process import Timings
from sora_jax.sampling.prediction import predicted_clean
from sora_jax.sampling.sampler import Sampler
from sora_jax.sampling.schedule import Schedule

pytestmark = pytest.mark.usefixtures("little_optimised")
PROMPT = "a red circle"


@pytest.fixture
def two_clips(monkeypatch: pytest.MonkeyPatch) -> None:
    """A map is fitted on two clips, which is enough to see where it comes from."""
    monkeypatch.setattr(preview_fit, "CLIPS", 2)


def test_a_straight_flow_is_predicted_exactly_by_every_step() -> None:
    """Along a line from noise to data every velocity is the same, and leads to the data."""
    rng = np.random.default_rng(0)
    data, noise = rng.normal(size=(2, 2, 3, 4)).astype(np.float32)
    schedule = Schedule.uniform(5, shift=2.0)
    sampler = Sampler.create(lambda z, t: jnp.asarray(data - noise), schedule)
    predicted = [predicted_clean(carry, schedule.num_timesteps) for carry in sampler.steps(jnp.asarray(noise))]
    assert len(predicted) == 5
    for one in predicted:
        np.testing.assert_allclose(one, data, atol=1e-5)


def test_before_the_first_step_and_where_nothing_is_sampled_latents_are_shown_as_they_are() -> None:
    z = np.random.default_rng(0).normal(size=(1, 3, 4)).astype(np.float32)
    schedule = Schedule.uniform(4)
    weights = np.asarray([[0.0, 1.0, 0.3]], np.float32)

    class Video:
        def __call__(self, z, t_B):
            return self.evaluate(z, t_B, frame_mask_BT=None, merged=False)

        def evaluate(self, z, t_B, *, frame_mask_BT, merged):
            return jnp.ones_like(z)

    sampler = Sampler.create(Video(), schedule, frame_weights=weights)
    start = sampler.start(jnp.asarray(z))
    np.testing.assert_array_equal(predicted_clean(start, schedule.num_timesteps), z)
    first, *_, last = sampler.steps(start)
    shown = predicted_clean(first, schedule.num_timesteps)
    np.testing.assert_array_equal(shown[:, [0, 2]], z[:, [0, 2]])  # kept for good, and not sampled yet
    np.testing.assert_allclose(shown[:, 1], z[:, 1] + 1, atol=1e-6)
    np.testing.assert_array_equal(predicted_clean(last, schedule.num_timesteps), np.asarray(last.z))


def linear_codec(config: Any) -> tuple[Any, Any]:
    """Returns an autoencoder without networks: a latent is the mean colour of its cell and a slope, decoded linearly."""
    side, step = config.spatial.downsampling, config.temporal.downsampling

    def encode(video: np.ndarray) -> np.ndarray:
        shown = video[:, preview_fit.shown_frames(config, video.shape[1])]
        batch, frames, height, width, _ = shown.shape
        cells = shown.reshape(batch, frames, height // side, side, width // side, side, 3)
        slope = cells[:, :, :, :, :, -1].mean((3, -1)) - cells[:, :, :, :, :, 0].mean((3, -1))
        return np.concatenate([cells.mean((3, 5)), slope[..., None]], axis=-1).astype(np.float32)

    def decode(z: np.ndarray, num_frames: int, shown: Sequence[int]) -> np.ndarray:
        ramp = np.linspace(-0.5, 0.5, side)
        cells = 0.5 * z[..., None, None, :3] + 0.1 * (z[..., 3, None] * ramp)[..., None, :, None]
        batch, frames, rows, columns = z.shape[:4]
        cells = np.broadcast_to(cells, (batch, frames, rows, columns, side, side, 3))
        assert len(shown) == frames == -(-num_frames // step)
        return cells.transpose(0, 1, 2, 4, 3, 5, 6).reshape(batch, frames, rows * side, columns * side, 3)

    return encode, decode


def test_a_linear_decoder_is_found_again() -> None:
    config = pocket.vae
    encode, decode = linear_codec(config)
    found = preview_fit.fit(config, encode, decode, preview_fit.moving_shapes(17))
    assert found.weights.shape == shape_of(config) == (109, 192)
    z = encode(preview_fit.moving_shapes(17)[:2, :, ::-1])  # clips that it was not fitted on
    np.testing.assert_allclose(found.pixels(z), decode(z, 17, preview_fit.shown_frames(config, 17)), atol=0.01)
    assert found.pictures(np.full_like(z, np.nan)).max() == 0


def test_a_picture_shows_the_last_frame_that_its_latent_frame_encodes() -> None:
    assert preview_fit.shown_frames(pocket.vae, 17) == [0, 4, 8, 12, 16]
    assert preview_fit.shown_frames(pocket.vae, 34) == [0, 4, 8, 12, 16, 17, 21, 25, 29, 33]
    assert preview_fit.shown_frames(pocket.vae, 20) == [0, 4, 8, 12, 16, 19]
    assert preview_fit.shown_frames(pocket.vae, 1) == [0]


@pytest.mark.ci
def test_frames_that_are_shown_are_decoded_alone(tiny_model: Path) -> None:
    coders = Coders(Networks.open(ModelFile.read(tiny_model).manifests, keep=False), "float32", Timings(), None)
    z = np.random.default_rng(0).normal(size=(1, 6, 2, 2, 4)).astype(np.float32)
    whole = coders.decode(z, 20)
    for shown in (preview_fit.shown_frames(pocket.vae, 20), [18]):
        np.testing.assert_allclose(coders.decode(z, 20, shown), whole[:, shown], atol=1e-5)


def test_neighbours_in_time_are_those_of_the_same_chunk() -> None:
    z = np.zeros((1, 10, 1, 1, 4), np.float32)
    z[:, 4] = 1
    seen = [np.any(features) for features in frame_features(z, 5)]
    assert [frame for frame, found in enumerate(seen) if found] == [3, 4]


def test_a_file_of_a_map_is_used_for_its_autoencoder_alone(tiny_model: Path, tmp_path: Path) -> None:
    vae = ModelFile.read(tiny_model).manifests["vae"]
    weights = np.random.default_rng(0).normal(size=shape_of(vae.config)).astype(np.float32)
    path = tmp_path / FILE_NAME
    PreviewMap(weights=weights, chunk=chunk_of(vae.config)).write(path, vae)
    read = PreviewMap.read(path, vae)
    assert read is not None
    np.testing.assert_array_equal(read.weights, weights)
    assert PreviewMap.read(path, ModelFile.read(None).manifests["vae"]) is None
    whole = path.read_bytes()
    header = json.loads(whole.partition(b"\n")[0])
    for damaged in (
        b"", b"{}\n", b"[" * 9999, whole[:-1], whole[:-4] + b"\0\0\0\1", whole.replace(b"preview map 1", b"preview map 9"),
        whole.replace(f'"chunk": {header["chunk"]}'.encode(), b'"chunk": 0'), whole.replace(b'"shape": [', b'"shape": [-'),
    ):  # fmt: skip
        path.write_bytes(damaged)
        assert PreviewMap.read(path, vae) is None, damaged[:60]
    assert PreviewMap.read(tmp_path / "missing", vae) is None


def test_a_clip_has_the_same_bits_with_and_without_previews(tiny_model: Path, tmp_path: Path, two_clips: None) -> None:
    pipe = Pipeline.from_pretrained(tiny_model)
    pipe.prepare_preview(tmp_path / "maps")
    (kept,) = (tmp_path / "maps").iterdir()
    seen: list[np.ndarray] = []

    def watch(progress: Progress) -> None:
        if progress.carry is None:
            with pytest.raises(ValueError, match="has no latents to show; ask for a preview where `carry` is not None"):
                progress.preview()
        else:
            seen.append(progress.preview())

    options = {"seed": 3, "num_steps": 3}
    plain, watched = pipe(PROMPT, **options), pipe([PROMPT, "a blue square"], **options, callback=watch)
    np.testing.assert_array_equal(watched.latents[:1], pipe([PROMPT, "a blue square"], **options).latents[:1])
    assert [(one.shape, one.dtype) for one in seen] == [((2, 5, 32, 48, 3), np.dtype(np.uint8))] * 3
    found = PreviewMap.read(kept, pipe.model.manifests["vae"])
    assert found is not None
    np.testing.assert_array_equal(seen[-1], found.pictures(watched.latents))  # the last step predicts the latents themselves
    again = Pipeline.from_pretrained(tiny_model)
    assert generated_with_previews(again, tmp_path) == plain.frames.tobytes()


def generated_with_previews(pipe: Pipeline, folder: Path) -> bytes:
    """Returns the pixels of a clip whose map comes from the folder."""
    before = [path.stat().st_mtime_ns for path in (folder / "maps").iterdir()]
    pipe.prepare_preview(folder / "maps")
    assert [path.stat().st_mtime_ns for path in (folder / "maps").iterdir()] == before
    return pipe(PROMPT, seed=3, num_steps=3, callback=lambda progress: progress.carry and progress.preview()).frames.tobytes()


def test_a_budget_leaves_no_room_to_fit_a_map_on_the_way(tiny_model: Path) -> None:
    pipe = Pipeline.from_pretrained(tiny_model, memory_budget="2GB")
    with pytest.raises(ValueError, match=r"call prepare_preview\(\) of the pipeline before it generates"):
        pipe._previews.pictures(np.zeros((1, 5, 4, 6, 4), np.float32))


def test_generate_writes_previews_on_the_way_and_keeps_the_last(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], two_clips: None
) -> None:
    from sora_jax.commands import preview_file

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    written: list[tuple[int, ...]] = []
    write = preview_file.write
    monkeypatch.setattr(
        preview_file, "write", lambda path, pictures, **rest: (written.append(pictures.shape), write(path, pictures, **rest))
    )
    common = ["generate", PROMPT, "--model", str(tiny_model), "--steps", "5", "--quiet", "--compile-cache", "off"]
    png, gif = tmp_path / "way.png", tmp_path / "way.gif"
    options = ["--preview", str(png), "--preview-every", "2", "-o", str(tmp_path / "a.mp4")]
    assert main.main([*common, *options]) == main.OK
    assert written == [(1, 5, 32, 48, 3)] * 3  # after steps 2, 4 and 5
    assert Image.open(png).size == (5 * 48, 32)
    assert main.main([*common, "--preview", str(gif), "-o", str(tmp_path / "b.mp4")]) == main.OK
    assert (Image.open(gif).n_frames, Image.open(gif).size) == (5, (48, 32))
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()
    assert len(list((tmp_path / "cache" / "sora_jax" / "previews").iterdir())) == 1
    capsys.readouterr()
    for options, message in (
        (["--preview", str(png)], "way.png exists; pass --overwrite"),
        (["--preview", str(tmp_path / "x.mp4")], "expected a name that ends in .png (frames in a row) or .gif"),
        (["--preview-every", "2"], "--preview-every says when previews are written; it needs --preview FILE"),
        (["--preview", str(gif), "--overwrite", "-o", str(gif)], "choose another name"),
    ):
        assert main.main([*common, *options]) == main.BAD_INPUT
        error = capsys.readouterr().err
        assert (message in error, error.count("\n")) == (True, 1), error


@pytest.mark.slow
def test_a_map_is_fitted_within_a_memory_budget(tiny_model: Path, tmp_path: Path, two_clips: None) -> None:
    streamed, whole = Pipeline.from_pretrained(tiny_model, memory_budget="2GB"), Pipeline.from_pretrained(tiny_model)
    maps = [pipe._previews.prepare() for pipe in (streamed, whole)]
    np.testing.assert_allclose(maps[0].weights, maps[1].weights, atol=1e-3)
    seen: list[np.ndarray] = []
    streamed(PROMPT, num_steps=2, callback=lambda progress: progress.carry and seen.append(progress.preview()))
    assert [one.shape for one in seen] == [(1, 5, 32, 48, 3)] * 2


@pytest.mark.slow
def test_previews_of_the_embedded_model_are_near_to_its_clips() -> None:
    pipe = Pipeline.from_pretrained()
    assert PreviewMap.read(pipe.model.directory / FILE_NAME, pipe.model.manifests["vae"]) is not None  # it is shipped
    last: list[np.ndarray] = []
    clip = pipe(
        "a red circle moves right on a blue background",
        callback=lambda progress: progress.carry and last.append(progress.preview()[0]),
    )
    frames = clip.frames[0][preview_fit.shown_frames(pipe.config.vae, 34)]
    assert len(last) == 30
    distances = [psnr(one, frames) for one in last]
    assert distances[-1] > 12  # a linear map: colours and places, no edges
    assert distances[-1] > distances[0]
