import dataclasses
import itertools
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from sora_jax.inputs import references
from sora_jax.inputs.tokenizer import Tokenizer
from sora_jax.networks.layers import precision_of
from sora_jax.networks.merge_rule import Merge
from sora_jax.networks.stdit3 import STDiT3
from sora_jax.networks.t5 import T5Encoder
from sora_jax.networks.vae.codec import VAE
from sora_jax.pipeline import clip_info, open_model, video
from sora_jax.pipeline.clip import Clip
from sora_jax.pipeline.pipeline import Pipeline
from sora_jax.pipeline.run import Progress
from sora_jax.pipeline.settings import Settings
from sora_jax.process import Timings
from sora_jax.sampling import noise
from sora_jax.sampling.leap import Leap
from sora_jax.sampling.schedule import Schedule
from sora_jax.storage.checkpoint import load_network, unflatten
from sora_jax.storage.directory import ModelDirectoryError
from tests.support.tiny_model import CONFIG

pytestmark = pytest.mark.usefixtures("little_optimised")

PROMPT = "a red circle moves right on a blue background"
LATENT_SHAPE = (5, 4, 6, 4)  # 17 frames of 32 x 48


@pytest.fixture(scope="module")
def pipe(tiny_model: Path) -> Pipeline:
    return Pipeline.from_pretrained(tiny_model)


@pytest.fixture(scope="module")
def clip(pipe: Pipeline) -> Clip:
    return pipe(PROMPT, seed=5)


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("references") / "picture.png"
    Image.fromarray(np.random.default_rng(1).integers(0, 256, (40, 40, 3), np.uint8)).save(path)
    return path


def network(directory: Path, name: str, build: Any) -> Any:
    config, flat = load_network(directory, name)
    return jax.device_put(unflatten(jax.eval_shape(lambda: build(config, rngs=nnx.Rngs(0))), flat))


def encoded(directory: Path, pixels: np.ndarray) -> np.ndarray:
    return np.asarray(jax.jit(lambda vae, x: vae.encode(x))(network(directory, "vae", VAE), pixels))


def test_a_clip_is_the_sampling_written_out_by_hand(tiny_model: Path, clip: Clip) -> None:
    """Text, guidance, schedule, Euler steps and decoding against a loop that shares only the networks and the noise."""
    ids, mask = Tokenizer.from_file(tiny_model / "tokenizer.json").encode([PROMPT], CONFIG.stdit3.model_max_length)
    caption = jax.jit(lambda t5: t5(jnp.asarray(ids), jnp.asarray(mask)))(network(tiny_model, "t5", T5Encoder))
    stdit3 = network(tiny_model, "stdit3", STDiT3)
    size = {"fps_B": jnp.full(1, 8.0), "height_px_B": jnp.full(1, 32.0), "width_px_B": jnp.full(1, 48.0)}

    @jax.jit
    def velocity(z: jax.Array, t: jax.Array, text: jax.Array) -> jax.Array:
        return stdit3(z, t, text, jnp.asarray(mask), **size)[..., :4]

    z = noise.initial_noise(5, (1, *LATENT_SHAPE))
    times = [*Schedule.open_sora(4, height_px=32, width_px=48, num_frames=17).visited, 0.0]
    for t, t_next in itertools.pairwise(times):
        time = jnp.full(1, t, jnp.float32)
        conditional, unconditional = velocity(z, time, caption), velocity(z, time, stdit3.null_caption_LE[None])
        z = z + (t - t_next) / 1000 * (unconditional + 3.0 * (conditional - unconditional))
    # Float32 sums in another order: batch 2 in the pipeline, 1 here.
    np.testing.assert_allclose(clip.latents, z, rtol=1e-4, atol=1e-4)
    decoded = jax.jit(lambda vae, z: vae.decode(z, 17))(network(tiny_model, "vae", VAE), clip.latents)
    assert np.abs(clip.frames.astype(int) - video.quantise(np.asarray(decoded))).max() <= 1
    assert clip.frames.shape == (1, 17, 32, 48, 3)


def test_equal_seeds_give_equal_clips_and_others_do_not(pipe: Pipeline, clip: Clip) -> None:
    again = pipe(PROMPT, seed=5)
    np.testing.assert_array_equal(again.frames, clip.frames)
    np.testing.assert_array_equal(again.latents, clip.latents)
    assert again.parameters == clip.parameters
    assert np.abs(pipe(PROMPT, seed=6).latents - clip.latents).max() > 0.1


def test_a_batch_holds_the_clips_of_consecutive_seeds(pipe: Pipeline, clip: Clip) -> None:
    batch = pipe(["a green square", PROMPT], seed=4)
    assert [made["seed"] for made in batch.parameters] == [4, 5]
    # DESIGN: a sample alone and in a batch agree to 1e-5; relative to latents of size 1.
    np.testing.assert_allclose(batch.latents[1], clip.latents[0], rtol=1e-5, atol=1e-5)


def test_samples_of_a_prompt_stand_together(pipe: Pipeline, clip: Clip) -> None:
    batch = pipe([PROMPT], num_samples=2, seed=4)
    assert [made["prompt"] for made in batch.parameters] == [PROMPT] * 2
    np.testing.assert_allclose(batch.latents[1], clip.latents[0], rtol=1e-5, atol=1e-5)


def test_an_image_is_conditioned_on_its_own_frame_rate(pipe: Pipeline) -> None:
    image = pipe(PROMPT, num_frames=1, num_steps=2)
    assert image.frames.shape == (1, 1, 32, 48, 3)
    other = dataclasses.replace(pipe.resolve({"num_frames": 1, "num_steps": 2}), fps=24.0)
    np.testing.assert_array_equal(image.latents, pipe.generate(pipe.read(PROMPT, other), other).latents)


def test_the_frame_rate_conditions_a_video(pipe: Pipeline, clip: Clip) -> None:
    assert np.abs(pipe(PROMPT, seed=5, fps=24).latents - clip.latents).max() > 1e-3


def test_an_image_to_video_clip_keeps_its_first_latent_frame(pipe: Pipeline, tiny_model: Path, picture: Path) -> None:
    made = pipe(PROMPT, references=str(picture), seed=5)
    expected = encoded(tiny_model, references.read_reference(picture, 32, 48)[None])
    np.testing.assert_allclose(made.latents[0, 0], expected[0, 0], rtol=1e-5, atol=1e-5)  # compiled in another program
    assert made.parameters[0]["mask_strategy"] == "0"
    by_json = pipe(PROMPT + f' {{"reference_path": "{picture}", "mask_strategy": "0"}}', seed=5)
    np.testing.assert_array_equal(by_json.latents, made.latents)


@pytest.mark.ci
def test_an_edit_ratio_between_keeping_and_generating(pipe: Pipeline, tiny_model: Path, clip: Clip, tmp_path: Path) -> None:
    path = video.save(clip.frames[0], tmp_path / "clip.mp4", fps=8)
    reference = encoded(tiny_model, references.read_reference(path, 32, 48)[None])[0]
    kept, edited = (
        pipe(PROMPT, references=str(path), mask_strategies=f"0,0,0,0,5,{ratio}", num_steps=8).latents[0] for ratio in (0, 0.5)
    )
    np.testing.assert_allclose(kept, reference, rtol=1e-5, atol=1e-5)
    assert np.abs(edited - reference).max() > 0.1


@pytest.mark.slow
def test_an_extension_continues_with_the_end_of_the_clip_before(pipe: Pipeline, tiny_model: Path) -> None:
    made = pipe(f"|0|{PROMPT}|1|a green square", num_frames=34, loop=2, num_steps=2, seed=5)
    assert made.frames.shape == (1, 34 + 17, 32, 48, 3)
    assert made.latents.shape == (1, 20, *LATENT_SHAPE[1:])
    alone = pipe(PROMPT, num_frames=34, num_steps=2, seed=5)
    np.testing.assert_array_equal(made.latents[:, :10], alone.latents)
    np.testing.assert_array_equal(made.frames[:, :34], alone.frames)
    vae = network(tiny_model, "vae", VAE)
    again = encoded(tiny_model, np.asarray(jax.jit(lambda vae, z: vae.decode(z, 34))(vae, alone.latents)))
    np.testing.assert_allclose(made.latents[:, 10:15], again[:, 5:], rtol=1e-4, atol=1e-4)  # another program, twice
    assert made.evaluations_B.tolist() == [4]


def test_a_static_leap_saves_evaluations(pipe: Pipeline, clip: Clip) -> None:
    leapt = pipe(PROMPT, seed=5, leap=1)
    assert leapt.evaluations_B.tolist() == [2]
    assert leapt.parameters[0]["evaluations"] == 2
    np.testing.assert_array_equal(pipe(PROMPT, seed=5, leap=Leap.static(1)).latents, leapt.latents)
    np.testing.assert_allclose(pipe(PROMPT, seed=5, leap=3).latents, clip.latents, rtol=1e-5, atol=1e-5)


def test_merged_steps_come_first(pipe: Pipeline, clip: Clip) -> None:
    merged = pipe(PROMPT, seed=5, merge_steps=2)
    assert merged.trace is not None
    assert merged.trace.merged_N.tolist() == [True, True, False, False]
    assert np.abs(merged.latents - clip.latents).max() > 1e-4


def test_guidance_one_is_the_conditional_velocity(pipe: Pipeline) -> None:
    # 1 skips the null caption; just above 1 evaluates it with a weight of about zero.
    bare, guided = (pipe(PROMPT, guidance=value, num_steps=2).latents for value in (1, 1 + 1e-6))
    np.testing.assert_allclose(bare, guided, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_bfloat16_computes_in_bfloat16(pipe: Pipeline, clip: Clip) -> None:
    rough = pipe(PROMPT, seed=5, dtype="bfloat16").latents
    error = np.linalg.norm(rough - clip.latents) / np.linalg.norm(clip.latents)
    assert 1e-4 < error < 0.2  # 8 bits of mantissa, through four steps


def test_latents_are_saved_before_decoding_and_resume(pipe: Pipeline, clip: Clip, tmp_path: Path) -> None:
    path, seen = tmp_path / "latents.npz", []

    def watch(progress: Progress) -> None:
        seen.append((progress.stage, path.exists()))

    pipe(PROMPT, seed=5, latents_path=path, callback=watch)
    assert ("decode", True) in seen
    assert ("denoise", True) not in seen
    resumed = pipe.resume(path)
    np.testing.assert_array_equal(resumed.frames, clip.frames)
    assert resumed.parameters[0]["prompt"] == PROMPT
    assert clip_info.inspect(path).parameters["samples"][0]["seed"] == 5


def test_the_callback_counts_steps_and_may_stop(pipe: Pipeline, tmp_path: Path) -> None:
    steps: list[tuple[int, bool]] = []

    def stop_after_two(progress: Progress) -> None:
        if progress.stage == "denoise":
            steps.append((progress.step, progress.carry is not None))
        if progress.step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pipe(PROMPT, callback=stop_after_two, latents_path=tmp_path / "latents.npz")
    assert steps == [(0, False), (1, True), (2, True)]
    assert not list(tmp_path.iterdir())


def test_a_stage_is_freed_before_the_next(tiny_model: Path) -> None:
    pipe, loaded = Pipeline.from_pretrained(tiny_model, keep=False), []
    pipe(PROMPT, num_steps=1, callback=lambda _: loaded.append(len(pipe.networks._loaded)))
    assert max(loaded) == 1
    assert not pipe.networks._loaded


def test_timings_are_apart_and_saving_adds_its_own(clip: Clip, tmp_path: Path) -> None:
    assert {"load", "compile", "text", "denoise", "decode"} <= clip.timings.keys()
    assert clip.save(tmp_path / "clip.mp4") == [tmp_path / "clip.mp4"]
    assert clip.timings["write"] > 0
    assert clip_info.inspect(tmp_path / "clip.mp4").parameters == clip.parameters[0]


def test_the_record_names_the_form_of_every_attention(clip: Clip) -> None:
    pair = dict.fromkeys(("spatial", "spatial cross", "temporal", "temporal cross"), "dense")
    assert clip.parameters[0]["attention"] == {"asked": "auto", "t5": "dense", "stdit3": pair, "vae": "dense"}
    assert clip.parameters[0]["dtype"] == "float32"


def test_clips_and_pipelines_say_what_they_are(pipe: Pipeline, clip: Clip, tiny_model: Path) -> None:
    assert repr(clip) == f"<Clip 1 x 17 frames, 32 x 48 pixels, 8 fps, seed 5, {PROMPT!r}>"
    long = dataclasses.replace(clip, parameters=[{"prompt": "a" * 1000, "seed": 1}])
    assert len(repr(long)) < 150
    assert repr(pipe) == f"<Pipeline {pipe.model_id} in {tiny_model}>"


@pytest.mark.parametrize("name", ["a\0b.mp4", "a.mp4\0", "\0"])
def test_a_name_with_a_zero_byte_leaves_nothing(clip: Clip, tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="has a zero byte, which no name of a file can have"):
        clip.save(tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_a_request_is_resolved_and_read_once(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a call does in one go can be done in three, with the same clip: resolve, read, generate."""
    resolved: list[int] = []
    resolve = Settings.resolve
    monkeypatch.setattr(Settings, "resolve", lambda *options: resolved.append(1) or resolve(*options))
    whole = pipe(PROMPT, num_steps=2, seed=3)
    assert len(resolved) == 1
    settings = pipe.resolve({"num_steps": 2})
    samples = pipe.read([PROMPT, "a green square"], settings)
    again = pipe.generate(samples[:1], settings.with_seed(3))
    assert len(resolved) == 2
    np.testing.assert_array_equal(again.frames, whole.frames)
    assert again.parameters == whole.parameters


def test_several_samples_get_numbered_files(pipe: Pipeline, tmp_path: Path) -> None:
    batch = pipe([PROMPT, PROMPT], seed=4)
    assert [path.name for path in batch.save(tmp_path / "clip.npz")] == ["clip-0.npz", "clip-1.npz"]
    with np.load(tmp_path / "clip-1.npz") as stored:
        np.testing.assert_array_equal(stored["frames"], batch.frames[1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"height": 250, "width": 64}, r"height 250 is not a multiple of 16 \(VAE 8 x patch 2\); nearest valid: 240, 256"),
        ({"height": 8, "width": 64}, "nearest valid: 16"),
        ({"height": 64}, "got height alone; give both height and width"),
        ({"height": 64, "width": 64, "resolution": "240p"}, "got both height and width and resolution"),
        ({"resolution": "240p"}, "got resolution alone; give both"),
        ({"resolution": "241p", "aspect_ratio": "9:16"}, "resolution '241p' is unknown"),
        ({"resolution": "240p", "aspect_ratio": "7:5"}, "aspect ratio '7:5' is unknown"),
        ({"num_steps": 0}, "num_steps is 0; expected a whole number from 1 to 100000"),
        ({"steps": 3}, "option 'steps' is unknown; did you mean num_steps?"),
        ({"num_steps": -3}, "num_steps is -3"),
        ({"num_frames": 0}, "num_frames is 0; expected a positive whole number or one of"),
        ({"num_frames": "3 seconds"}, "num_frames is '3 seconds'"),
        ({"fps": 0}, "fps is 0; expected a positive number"),
        ({"guidance": float("nan")}, "guidance is nan; expected a number"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**32}, "seed is 4294967296; expected a whole number from 0 to 4294967295"),
        ({"leap": "sometimes"}, "leap is 'sometimes'; expected off, dynamic, released"),
        ({"latents_path": "latents.txt"}, "latents file latents.txt has suffix '.txt'; expected .npz"),
        ({"leap": 4}, "leap index 4 is beyond the last of 4 steps"),
        ({"merge_steps": -1}, "merge_steps is -1"),
        ({"merge_steps": 5}, r"merge_steps is 5 of 4 steps; expected 0 to 4 \(all\)"),
        ({"merge": Merge(odd="released")}, "merge says what merged steps merge, but merge_steps is 0"),
        ({"shift": 1e9}, r"shift 1e\+09 with 4 steps: times of neighbouring steps are equal in float32"),
        ({"merge_steps": 1, "num_frames": 1}, "merging needs at least 2 latent frames"),
        ({"loop": 2}, r"takes over 17 frames .* but a clip has 17; expected num_frames above 17\."),
        ({"loop": 2, "num_frames": 34, "leap": 0, "condition_frame_edit": 0.5}, "leap index 0 is before every frame"),
        ({"loop": 2, "num_frames": 34, "condition_frame_length": 3}, "3 latent frames are not whole chunks"),
        ({"loop": 2, "num_frames": 1}, "cannot extend a single image"),
        ({"condition_frame_edit": 1.5}, "condition_frame_edit is 1.5; expected 0"),
        ({"align": 0}, "align is 0"),
        ({"align": 3}, "align rounds where references go, but no prompt has a reference; leave it out"),
        ({"fps": 8, "num_frames": 1}, "fps is what a video is conditioned on, but num_frames is 1, an image; leave it out"),
        ({"dtype": "float16"}, "dtype is 'float16'; expected auto, float32 or bfloat16"),
        ({"num_samples": 0}, "num_samples is 0"),
        ({"mask_strategies": "0,x"}, "mask strategy '0,x' is malformed"),
        ({"mask_strategies": "0,0,0,0,1,7"}, "edit ratio 7.0; expected 0"),
        ({"mask_strategies": "0"}, "names reference 0; the prompt has 0"),
        ({"mask_strategies": ["", ""]}, "got 2 mask strategies for 1 prompts"),
        ({"references": "gone.png"}, r"Reference gone.png does not exist"),
        ({"prompts": []}, "no prompt given"),
        ({"prompts": "a { b"}, "JSON is malformed"),
    ],
)
def test_what_cannot_be_made_is_refused_before_any_network_is_loaded(
    tiny_model: Path, options: dict[str, Any], message: str
) -> None:
    pipe, stages = Pipeline.from_pretrained(tiny_model), []
    options = {"prompts": PROMPT, **options}
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        pipe(**options, callback=lambda progress: stages.append(progress.stage))
    assert not stages


WRONG_TYPES = """
import json, sys
import sora_jax

pipe, lines = sora_jax.Pipeline.from_pretrained(sys.argv[1]), []
for arguments in ({"num_samples": 1.5}, {"references": [3]}, {"prompts": 3}):
    try:
        pipe(**{"prompts": "a red circle", **arguments})
    except ValueError as error:
        lines.append(str(error))
print(json.dumps(lines))
"""


def test_arguments_of_wrong_types_get_one_line_where_no_type_checker_runs(tiny_model: Path) -> None:
    """In this process the tests' own checker would answer first."""
    child = subprocess.run([sys.executable, "-c", WRONG_TYPES, tiny_model], capture_output=True, text=True, check=True)
    samples, paths, prompts = json.loads(child.stdout)
    assert samples == "num_samples is 1.5; expected a whole number of at least 1."
    assert paths == "references hold 3; expected a text, or a list of texts."
    assert prompts == "prompts hold 3; expected a text, or a list of texts."


def test_programs_are_compiled_anew_for_another_precision_of_products() -> None:
    traced = []

    def doubled(x: jax.Array) -> jax.Array:
        traced.append(precision_of(x.dtype))
        return 2 * x

    def run() -> None:
        open_model.call("encode", Timings(), doubled, (), jnp.ones(3))

    run()
    with jax.default_matmul_precision("tensorfloat32"):
        run()
    run()
    assert traced == [jax.lax.Precision.HIGHEST, None]


def test_a_missing_network_is_named_with_the_command_that_adds_it(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelDirectoryError, match="does not exist"):
        Pipeline.from_pretrained(tmp_path / "nowhere")
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    shutil.rmtree(model / "vae")
    with pytest.raises(ModelDirectoryError, match=r"has no vae .*sora-jax convert vae SOURCE"):
        Pipeline.from_pretrained(model)
    shutil.rmtree(model / "t5")
    with pytest.raises(ModelDirectoryError, match=r"has no t5 and no vae; add them with: sora-jax convert t5 SOURCE"):
        Pipeline.from_pretrained(model)


def test_damage_is_found_when_a_model_is_opened(tiny_model: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    bias = next(path for path in (model / "stdit3").rglob("c/*") if path.is_file())
    bias.write_bytes(bias.read_bytes()[:-1])
    with pytest.raises(ModelDirectoryError, match=r"bytes, expected \d+; convert stdit3 again"):
        Pipeline.from_pretrained(model)
    bias.unlink()
    with pytest.raises(ModelDirectoryError, match="is missing; convert stdit3 again"):
        Pipeline.from_pretrained(model)
    (model / "tokenizer.json").unlink()
    shutil.rmtree(model / "stdit3")
    shutil.copytree(tiny_model / "stdit3", model / "stdit3")
    with pytest.raises(FileNotFoundError, match="has no tokenizer"):
        Pipeline.from_pretrained(model)


def test_adaptive_reuse_is_refused_for_several_clips_and_on_a_mesh(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = pipe.resolve({"reuse": "input"})
    with pytest.raises(ValueError, match=r"reuse decides for a batch together.* make one at a time \(batch size 1\), not 2"):
        pipe.check(settings, 2)
    monkeypatch.setattr(pipe.networks, "mesh", object())
    with pytest.raises(
        ValueError, match="reuse decides from values that a mesh spreads over devices; leave one of the two out"
    ):
        pipe.check(settings, 1)
