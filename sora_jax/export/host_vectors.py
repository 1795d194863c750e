"""What a host of an export does itself, as pairs of input and output: text, noise, times, guidance, leap, pixels, clips.

Invariant: every value comes from the pipeline and the sampler, none from the reference host (`host_program`), which is tested
by them as any other host is.  The JSON holds small things; arrays of the clip are in a safetensors file.
"""

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from PIL import Image

from sora_jax.export import vectors, weight_file
from sora_jax.export.entries import SizeEntry, TokensEntry
from sora_jax.inputs import prompt, references
from sora_jax.inputs.tokenizer import Tokenizer
from sora_jax.pipeline import video
from sora_jax.pipeline.pipeline import Pipeline
from sora_jax.pipeline.run import Progress
from sora_jax.pipeline.settings import Settings
from sora_jax.sampling import noise
from sora_jax.sampling.leap import Leap, latent_cosine
from sora_jax.sampling.sampler import sample
from sora_jax.sampling.schedule import Schedule

# Every step of cleaning and every substitution has a prompt that needs it.
PROMPTS = (
    "A RED circle moves right on a blue background",
    "  two   squares &amp; <b>one</b> triangle, see https://example.com/a?b=1 (1080p)  ",
    "caf\u00e9 \u2014 \u201cquoted\u201d 12345678 #hashtag @somebody file.jpg",
    "",
    "100%25 caf%C3%A9+by+<person> 1%2B1, www.example.org/x and me@here.net",
    "<p>one</p><!-- not this --> <script>x()</script>two &lt;three&gt; &#65;&#x42; 3 < 4",
    "a\u2019s \u00abb\u00bb\u2014c \u56fe 192.168.0.1 #12 #1234 #12345 1234567 d\\\\ne x&amp;quot y at 12:30 www.a.org",
    "&amp;quot;R&amp;amp;D&amp;quot; by \u66f8@ana. my_photo.png, he said \"\"so'' ... well",
    "[a] (b) one . two \u2022 three\u2019\u2019",
    "a-slug_of_many-words_in-one",
    "a-b_c-d, \ufb01ne \ufb05yle \uff26\uff35\uff2c\uff2c\u3000\u01c6 e\u0301 \u201bso\u201f 1 \uff06lt; 2",
    "photo abc1234 ab12cd 12ab34 a1b2c3d worldwide free shipping, free download free, click for more of it",
    "a png image and jpg images on page 12, 1920x1080 or 2\u04453 or 1.5\u00d72.25 : a ratio.Then stops,turns/around",
    '"all of it is quoted"',
    "-a dash and an end:",
    ".word",
    "a red circle and " * 80,  # longer than any text encoder reads
)
SCORES: tuple[tuple[str, float | None, float | None, str | None], ...] = (
    ("a cat", None, None, None),
    ("a cat", 6.5, 5, "pan right"),
    ("a cat, aesthetic score: 5.0.", 6.5, None, "zoom in"),
    ("a cat, Motion score: high", None, 4.25, None),
)
CLIP_PROMPT = "  A red circle moves right on a BLUE background "
CLIP_STEPS, CLIP_MERGED = 4, 2
_ENDS = 8  # values of noise that are written, at each end


def write(
    folder: Path,
    pipeline: Pipeline,
    settings: Settings,
    tokens: TokensEntry,
    size: SizeEntry,
    *,
    clip: bool,
    given: bool = False,
) -> None:
    """Writes ``host.json`` and, with ``clip``, the arrays of a clip of the size; ``given``: and one with a given frame."""
    (folder / vectors.FOLDER).mkdir(exist_ok=True)
    scores = dict(tokens["scores"])
    content = {
        "scores": [_score_entry(*each) for each in SCORES],
        "captions": [{"prompt": text, "caption": _caption(text, scores)} for text in PROMPTS],
        "tokens": [_token_entry(pipeline.tokenizer, _caption(text, scores), tokens["length"]) for text in PROMPTS],
        "noise": [_noise_entry(seed, (1, *size["latents"])) for seed in (0, 1, 2**32 - 1)],
        "times": [_time_entry(steps, shift) for steps in (1, 7, 30) for shift in (1.0, 2.5, size["shift"])],
        "guidance": [_guidance_entry(scale) for scale in (0.0, 1.0, 7.0)],
        "loop": _loop_entry(),
        "leap": [
            _leap_entry(Leap.dynamic(), 0, _turning()),
            _leap_entry(Leap.dynamic(), 9, _turning()),
            _leap_entry(Leap.static(5), 9, _turning()),
            _leap_entry(Leap.dynamic(), 0, _vanishing()),
        ],
        "pixels": _pixel_entry(),
        "clip": _clip_entry(folder, pipeline, settings, size) if clip else None,
    }
    if clip and given and size["latents"][0] > 1:
        _write_given(folder, pipeline, settings, size)
    text = json.dumps(content, indent=1, allow_nan=False) + "\n"
    (folder / vectors.HOST_FILE).write_text(text, encoding="utf-8")


def _score_entry(text: str, aes: float | None, flow: float | None, camera_motion: str | None) -> dict[str, Any]:
    scores = {"aes": aes, "flow": flow, "camera_motion": camera_motion}
    return {
        "prompt": text,
        "scores": scores,
        "scored": prompt.append_scores(text, aes=aes, flow=flow, camera_motion=camera_motion),
    }


def _caption(text: str, scores: Mapping[str, Any]) -> str:
    return prompt.prompt_at_loop(prompt.prepare_prompt(text, **scores), 0)


def _token_entry(tokenizer: Tokenizer, caption: str, length: int) -> dict[str, Any]:
    ids, mask = tokenizer.encode([caption], length)
    return {"caption": caption, "ids": ids[0].tolist(), "mask": mask[0].astype(int).tolist()}


def _noise_entry(seed: int, shape: tuple[int, ...]) -> dict[str, Any]:
    values = np.asarray(noise.initial_noise(seed, shape)).ravel()
    return {"seed": seed, "shape": list(shape), "first": _floats(values[:_ENDS]), "last": _floats(values[-_ENDS:])}


def _time_entry(num_steps: int, shift: float) -> dict[str, Any]:
    times = Schedule.uniform(num_steps, shift=shift).visited
    return {"num_steps": num_steps, "shift": shift, "times": _floats(times)}


def _guidance_entry(scale: float) -> dict[str, Any]:
    rows = np.random.default_rng(0).standard_normal((2, 4)).astype(np.float32)
    guided = rows[1] + np.float32(scale) * (rows[0] - rows[1])
    return {"guidance": scale, "conditional": _floats(rows[0]), "unconditional": _floats(rows[1]), "guided": _floats(guided)}


def _leap_entry(leap: Leap, merge_steps: int, velocities: np.ndarray) -> dict[str, Any]:
    """Returns velocities with the sampler's decisions about them."""
    num_steps = len(velocities)
    rule = leap.rule(num_steps)
    state, cosines, decisions = rule.start(1), [], []
    for step, v in enumerate(velocities):
        comparable = step > 0 and step != merge_steps
        cosine_B = latent_cosine(jnp.asarray(v[None]), jnp.asarray(velocities[step - 1][None]), None)
        state, leaps_B = rule.decide(
            state,
            cosine_B,
            step=jnp.asarray(step),
            comparable_B=jnp.asarray([comparable]),
            may_leap_B=jnp.asarray([True]),
            restart=jnp.asarray(step == merge_steps),
        )
        cosines.append(float(cosine_B[0]) if comparable else None)
        decisions.append(bool(leaps_B[0]))
    return {
        "leap": {
            "mode": leap.mode,
            "index": leap.index if leap.mode == "static" else None,
            "tolerance": leap.tolerance,
            "min_share": leap.min_share,
            "patience": leap.patience,
        },
        "num_steps": num_steps,
        "merge_steps": merge_steps,
        "velocities": [_floats(v) for v in velocities],
        "cosines": cosines,
        "merged": [step < merge_steps for step in range(num_steps)],
        "leaps_at": decisions.index(True) if True in decisions else None,
    }


def _turning() -> np.ndarray:
    """Returns fourteen velocities [14, 2] whose direction turns slower and slower and then faster."""
    angles = np.cumsum(np.concatenate([np.linspace(0.5, 0.1, 10), np.linspace(0.2, 0.4, 4)]))
    return np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)


def _vanishing() -> np.ndarray:
    """Returns those velocities, of which some are so small, or nothing, that the floor of the norms decides their cosines."""
    sizes = np.ones(14, np.float32)
    sizes[[7, 10]] = 0, 1e-5
    sizes[[8, 9]] = 1e-4
    return _turning() * sizes[:, None]


def _loop_entry() -> dict[str, Any]:
    """Returns where the sampler ends that meets those velocities: in step 12 it leaps."""
    velocities, start = jnp.asarray(_turning()), jnp.asarray([[0.5, -0.25]], jnp.float32)
    schedule = Schedule.uniform(len(velocities), shift=2.5)
    visited = jnp.asarray(schedule.visited)
    made = sample(lambda z, t_B: velocities[jnp.argmin(abs(visited - t_B))][None], start, schedule, leap=Leap.dynamic())
    return {"times": _floats(schedule.visited), "start": _floats(np.asarray(start)[0]), "end": _floats(np.asarray(made.z)[0])}


def _pixel_entry() -> dict[str, Any]:
    values = np.asarray([-2, -1, -0.999, -1 / 255, 0, 1 / 510, 0.5, 0.998, 1, 3], np.float32)
    return {"values": _floats(values), "pixels": video.quantise(values).tolist()}


def _clip_entry(folder: Path, pipeline: Pipeline, settings: Settings, size: SizeEntry) -> dict[str, Any]:
    """Returns what the pipeline did for a clip of a few steps, and writes its arrays."""
    numbers = _clip_numbers(settings, size)
    merged = numbers["merge_steps"]
    seen: dict[int, np.ndarray] = {}

    def keep(at: Progress) -> None:
        if at.carry is not None:
            seen[at.step] = np.asarray(at.carry.v)

    clip = pipeline(CLIP_PROMPT, callback=keep, **_clip_options(settings, size))
    velocities = [seen[step] for step in sorted(seen)]
    arrays = {
        "noise_BTHWC": np.asarray(noise.initial_noise(0, (1, *size["latents"]))),
        "v_0_BTHWC": velocities[0],
        "v_1_BTHWC": velocities[1],
        "z_BTHWC": np.asarray(clip.latents),
        "frames_Bthw3": clip.frames,
    }
    weight_file.write(folder / vectors.CLIP_FILE, arrays, stage=vectors.CLIP)
    trace = clip.trace
    if trace is None:
        raise RuntimeError("the pipeline sampled a clip without a trace")
    cosines = np.asarray(trace.cosine_NB)[:CLIP_STEPS, 0]
    return {
        "prompt": CLIP_PROMPT,
        "size": size["key"],
        "seed": 0,
        **numbers,
        "leap": "off",
        "times": _floats(np.asarray(trace.time_N)[:CLIP_STEPS]),
        "merged": [step < merged for step in range(CLIP_STEPS)],
        "cosines": [None if np.isnan(cosine) else float(cosine) for cosine in cosines],
    }


def _clip_numbers(settings: Settings, size: SizeEntry) -> dict[str, Any]:
    merged = CLIP_MERGED if size["latents"][0] > 1 else 0
    return {"num_steps": CLIP_STEPS, "guidance": settings.guidance, "merge_steps": merged}


def _clip_options(settings: Settings, size: SizeEntry) -> dict[str, Any]:
    """Returns the options by which the pipeline makes the clip."""
    shape = {name: size[name] for name in ("num_frames", "height", "width")}
    scores = {"aes": settings.aes, "flow": settings.flow, "camera_motion": settings.camera_motion}
    own = {"seed": 0, "leap": "off", "shift": settings.shift}
    rate = {} if size["num_frames"] == 1 else {"fps": settings.fps}  # an image is refused with one
    return {**own, **rate, **_clip_numbers(settings, size), **shape, **scores}


def _write_given(folder: Path, pipeline: Pipeline, settings: Settings, size: SizeEntry) -> None:
    """Writes the arrays of the clip with a given first frame: a smooth picture, which every host reads from the file."""
    height, width = size["height"], size["width"]
    rows, columns = np.mgrid[0:height, 0:width] / np.reshape([height, width], (2, 1, 1))
    pixels = video.quantise(np.stack([2 * rows - 1, 1 - 2 * columns, np.sin(9 * rows * columns)], axis=-1).astype(np.float32))
    with tempfile.TemporaryDirectory() as scratch:
        picture = Path(scratch) / "first.png"
        Image.fromarray(pixels).save(picture)
        options = _clip_options(settings, size)
        clip = pipeline(CLIP_PROMPT, references=str(picture), mask_strategies="0", align="off", **options)
        image_Bthw3 = references.read_reference(picture, height, width)[None]
    z_BTHWC = np.asarray(clip.latents)
    arrays = {
        "image_Bthw3": image_Bthw3,
        "encoded_BTHWC": z_BTHWC[:, :1],  # a frame that is given stays as it was encoded
        "noise_BTHWC": np.asarray(noise.initial_noise(0, z_BTHWC.shape)),
        "frame_mask_BT": (np.arange(z_BTHWC.shape[1])[None] > 0).astype(np.float32),
        "z_BTHWC": z_BTHWC,
    }
    weight_file.write(folder / vectors.GIVEN_FILE, arrays, stage=vectors.GIVEN)


def _floats(values: np.ndarray | Sequence[float]) -> list[float]:
    return [float(value) for value in np.asarray(values, np.float32)]
