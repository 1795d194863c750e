"""The cases of `benchmarks.speed.accelerator`, each a function of the setting that returns JSON-ready figures.

Invariant: a case drops what it put on the device, its figures say what they are (measured, compiled for, a multiple), and it
raises where it cannot run; the caller writes down why.
"""

import dataclasses
import gc
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks._support.accelerator_pair import measure_pair, times
from benchmarks._support.accelerator_work import (
    Work,
    compiled_pair,
    pair_arrays,
    random_network,
    relative_l2,
    velocity_of,
    works,
)
from benchmarks._support.interleaved import interleaved
from sora_jax.networks.vae.codec import chunks
from sora_jax.sampling import noise
from sora_jax.sampling.evaluation import guided_velocity
from sora_jax.sampling.options import Sampling
from sora_jax.sampling.sampler import Sampler
from sora_jax.sampling.schedule import Schedule
from sora_jax.sampling.velocity import Point

GOLDEN = Path(__file__).parents[2] / "tests" / "golden"
SUITES = ("stdit3", "tdtm", "rflow", "vae", "t5", "wide")
# Of the limits of the CPU: a card sums in another order, and its convolutions may transform their input first.
CARD_FACTOR = 10.0
TF32_FACTOR = 3000.0  # 10 bits of a product's factors instead of 23
TIMESTEP, GUIDANCE, STEPS, FRAMES = 900.0, 7.0, 30, 51
PROMPT = "a red circle moves right on a blue background"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """``tiny`` for toy width; timed runs of each candidate; a folder for weights that are streamed."""

    tiny: bool
    repeats: int
    folder: Path

    def work(self, name: str) -> Work:
        """Returns a size by name."""
        return works(tiny=self.tiny)[name]


def fixtures(setting: Setting) -> dict[str, Any]:
    """Returns for each suite of fixtures how far the card is from the reference, in units of the limits."""
    from tests.parity.runner import FAIL, run_folder

    precision = jax.config.jax_default_matmul_precision
    factor = CARD_FACTOR if precision is None else TF32_FACTOR
    suites: dict[str, Any] = {}
    for suite in SUITES[:1] if setting.tiny else SUITES:
        rows = list(run_folder(GOLDEN / suite))
        ratios = [row.rel_l2 / row.limit_rel_l2 for row in rows if row.rel_l2 is not None and row.limit_rel_l2]
        suites[suite] = {
            "tensors": len(ratios),
            "largest_rel_l2": max(row.rel_l2 for row in rows if row.rel_l2 is not None),
            "largest_over_limit": round(max(ratios), 3),
            "beyond_cpu_limit": sum(row.verdict == FAIL for row in rows),
            "not_computed": [f"{row.case}: {row.note}"[:200] for row in rows if row.verdict == FAIL and row.rel_l2 is None],
            "within_card_limit": max(ratios) <= factor,
        }
    return {"products": precision or "float32", "card_factor": factor, "suites": suites}


def pair_480p(setting: Setting) -> dict[str, Any]:
    """Returns the bfloat16 pair at 480p in every form, against PyTorch's."""
    forms = ("dense", "chunked", "cudnn", "flash")
    return measure_pair(setting.work("480p"), "bfloat16", forms, repeats=setting.repeats, rival=True)


def evaluation_480p(setting: Setting) -> dict[str, Any]:
    """Returns one guided evaluation of all pairs, each with weights of its own, and its peak against the compiled one."""
    work = setting.work("480p")
    velocity, z = velocity_of(work, random_network("stdit3", work.config.stdit3, dtype="bfloat16")), _noise(work)
    start = time.perf_counter()
    program = _evaluation.lower(velocity, z).compile()
    compile_s = time.perf_counter() - start
    seconds = interleaved({"evaluation": lambda: program(velocity, z)}, max(1, setting.repeats // 2))["evaluation"]
    sizes = program.memory_analysis()
    return {
        **times(seconds, work.config.stdit3.depth * work.pair_flop(), "bfloat16"),
        "compile_s": round(compile_s, 1),
        "compiled_for_bytes": sizes.argument_size_in_bytes + sizes.temp_size_in_bytes + sizes.output_size_in_bytes,
        "measured_peak_bytes": _peak_bytes(),
    }


def clip_480p(setting: Setting) -> dict[str, Any]:
    """Returns the time of a clip of 480p, 30 steps, from noise to pixels, without the text encoder and compiling."""
    work = setting.work("480p")
    steps, frames = (2, 17) if setting.tiny else (STEPS, FRAMES)
    velocity = velocity_of(work, random_network("stdit3", work.config.stdit3, dtype="bfloat16"))
    schedule = Schedule.open_sora(steps, height_px=8 * work.rows, width_px=8 * work.columns, num_frames=frames)
    sampler = Sampler.create(velocity, schedule, guidance=GUIDANCE)
    carry = sampler.start(_noise(work))
    jax.block_until_ready(sampler.run(carry, 0))
    start = time.perf_counter()
    z = jax.block_until_ready(sampler.run(carry, steps)).z
    sampling_s = time.perf_counter() - start
    vae, parts = random_network("vae", work.config.vae, dtype="bfloat16"), chunks(work.config.vae, frames)
    for part in {part.num_frames: part for part in parts}.values():  # compiles
        jax.block_until_ready(_decode(vae, z[:, part.latents], part.num_frames))
    start = time.perf_counter()
    pixels = [jax.block_until_ready(_decode(vae, z[:, part.latents], part.num_frames)) for part in parts]
    decoding_s = time.perf_counter() - start
    return {
        "steps": steps,
        "frames": frames,
        "sampling_s": round(sampling_s, 3),
        "decoding_s": round(decoding_s, 3),
        "clip_s": round(sampling_s + decoding_s, 3),
        "finite": all(bool(jnp.isfinite(part).all()) for part in pixels),
        "measured_peak_bytes": _peak_bytes(),
    }


def pair_256p(setting: Setting) -> dict[str, Any]:
    """Returns the bfloat16 pair at 256p, as chosen and dense."""
    return measure_pair(setting.work("256p"), "bfloat16", ("auto", "dense"), repeats=setting.repeats, rival=True)


def pair_720p(setting: Setting) -> dict[str, Any]:
    """Returns the bfloat16 pair at 720p, as chosen and chunked."""
    return measure_pair(setting.work("720p"), "bfloat16", ("auto", "chunked"), repeats=setting.repeats, rival=True)


def pair_float32(setting: Setting) -> dict[str, Any]:
    """Returns the float32 pair at 480p, and how far bfloat16 is from it on the same weights."""
    work = setting.work("480p")
    found, arrays = measure_pair(work, "float32", ("auto",), repeats=setting.repeats, rival=False), pair_arrays(work)
    exact, rough = (compiled_pair(work, arrays, dtype=dtype, attention="auto")() for dtype in ("float32", "bfloat16"))
    return {**found, "bfloat16_rel_l2": relative_l2(rough, exact)}


def text_encoder(setting: Setting) -> dict[str, Any]:
    """Returns the text encoder on one caption; its blocks share weights, which changes neither time nor arithmetic."""
    config = setting.work("480p").config
    length = config.stdit3.model_max_length
    ids = jnp.asarray(np.random.default_rng(0).integers(0, config.t5.vocab_size, (1, length), np.int32))
    mask = jnp.asarray(np.arange(length)[None] < min(120, length))
    return _in_both(setting, "t5", config.t5, lambda network: network(ids, mask), share="block")


def vae_chunk(setting: Setting) -> dict[str, Any]:
    """Returns the decoder on a chunk of 17 frames of 480p."""
    work = setting.work("480p")
    channels = work.config.vae.temporal.embed_dim
    z = jnp.asarray(np.random.default_rng(0).standard_normal((1, 5, work.rows, work.columns, channels), np.float32))
    return _in_both(setting, "vae", work.config.vae, lambda network: network.decode_chunk(z, 17, frame_batch=1))


def streamed_evaluation(setting: Setting) -> dict[str, Any]:
    """Returns an evaluation of two pairs whose blocks the host hands over, and its distance from the resident one."""
    from sora_jax.config import policy_of
    from sora_jax.networks import registry
    from sora_jax.storage.checkpoint import flatten, load_parameters, save_network, unflatten
    from sora_jax.storage.directory import open_network
    from sora_jax.streaming.network import STDiT3Stream

    work = setting.work("480p")
    config = dataclasses.replace(work.config.stdit3, depth=2)
    directory = setting.folder / f"streamed_{config.hidden_size}"
    if not (directory / "stdit3").exists():
        drawn = flatten(random_network("stdit3", config, dtype="float32"))
        save_network(directory, "stdit3", config, {name: np.asarray(value) for name, value in drawn.items()}, dtype="bfloat16")
    manifest, z = open_network(directory, "stdit3"), _noise(work)
    abstract = registry.abstract("stdit3", config, policy=policy_of("bfloat16"))
    resident = jax.device_put(unflatten(abstract, load_parameters(manifest)))
    expected, seconds = np.asarray(_evaluation(velocity_of(work, resident), z)), []
    with STDiT3Stream(manifest, dtype="bfloat16", backend="host", retained=0).open() as network:
        velocity = velocity_of(work, network)
        for _ in range(3):
            start = time.perf_counter()
            found = np.asarray(_evaluation(velocity, z))
            seconds.append(time.perf_counter() - start)
    return {"pairs": 2, "min_s": round(min(seconds), 4), "rel_l2_to_resident": relative_l2(found, expected)}


def pocket_clip(setting: Setting) -> dict[str, Any]:
    """Returns the embedded model's clip in bfloat16 against float32: distance of latents, PSNR of frames, seconds."""
    from sora_jax import Pipeline
    from sora_jax.metrics import psnr

    pipe, clips = Pipeline.from_pretrained(), {}
    for dtype in ("float32", "bfloat16"):
        for _ in range(1 if setting.tiny else 2):  # the first compiles
            clips[dtype] = pipe(PROMPT, dtype=dtype, seed=0, num_steps=2 if setting.tiny else STEPS)
    exact, rough = clips["float32"], clips["bfloat16"]
    return {
        "seconds": {name: round(sum(clip.timings.values()), 3) for name, clip in clips.items()},
        "latents_rel_l2": relative_l2(rough.latents, exact.latents),
        "psnr_db": round(float(psnr(rough.frames[0], exact.frames[0])), 2),
    }


CASES: Mapping[str, Callable[[Setting], dict[str, Any]]] = {
    case.__name__: case
    for case in (
        fixtures, pair_480p, evaluation_480p, clip_480p, pair_256p, pair_720p, pair_float32, text_encoder, vae_chunk,
        streamed_evaluation, pocket_clip,
    )
}  # fmt: skip


@jax.jit
def _evaluation(velocity: Any, z: jax.Array) -> jax.Array:
    sampling = Sampling.resolve(Schedule.uniform(1), guidance=GUIDANCE)
    return guided_velocity(sampling, Point(velocity=velocity, z=z, t=jnp.asarray(TIMESTEP), active_BT=None, merged=False))


@jax.jit(static_argnames="num_frames")
def _decode(vae: Any, z_BTHWC: jax.Array, num_frames: int) -> jax.Array:
    return vae.decode_chunk(z_BTHWC, num_frames, frame_batch=1)


def _in_both(
    setting: Setting, network: str, config: Any, run: Callable[[Any], jax.Array], *, share: str = ""
) -> dict[str, Any]:
    """Returns the times of a network in bfloat16 and float32, and the distance of the one from the other."""
    outputs, found = {}, {}
    for dtype in ("bfloat16", "float32"):
        module = random_network(network, config, dtype=dtype, share=share)
        start = time.perf_counter()
        program = jax.jit(run).lower(module).compile()
        compile_s = time.perf_counter() - start
        seconds = interleaved({dtype: lambda program=program, module=module: program(module)}, setting.repeats)[dtype]
        outputs[dtype] = np.asarray(program(module), np.float32)
        found[dtype] = {"median_s": round(statistics.median(seconds), 4), "compile_s": round(compile_s, 1)}
        del module, program
        gc.collect()
    return {**found, "bfloat16_rel_l2": relative_l2(outputs["bfloat16"], outputs["float32"])}


def _noise(work: Work) -> jax.Array:
    channels = work.config.stdit3.in_channels
    return jnp.asarray(noise.initial_noise(0, (1, work.frames, work.rows, work.columns, channels)))


def _peak_bytes() -> int | None:
    """Returns the most bytes that the card held since the process began; None: it does not say."""
    stats = jax.devices()[0].memory_stats() or {}
    return stats.get("peak_bytes_in_use")
