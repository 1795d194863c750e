"""One generation, stage by stage: captions, references, denoising, decoding, for every clip of a loop.

Invariant: each stage takes host arrays and returns host arrays, so that nothing of a network outlives its stage.

Source: Open-Sora v1.2 scripts/inference.py.  Differs from source: references and extended clips enter as the mean of their
posterior, not a draw; without masked frames the sampler runs without a mask, which gives the same latents.
"""

import dataclasses
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from sora_jax.inputs import prompt, sizes
from sora_jax.inputs import references as conditioning
from sora_jax.inputs.tokenizer import Tokenizer
from sora_jax.networks.stdit3 import STDiT3, with_null_caption
from sora_jax.networks.vae.codec import latent_size
from sora_jax.pipeline.coders import Coders
from sora_jax.pipeline.open_model import Networks
from sora_jax.pipeline.sampling import guidance_scale, make_sampler, make_schedule
from sora_jax.pipeline.settings import Settings
from sora_jax.pipeline.velocity import Velocity
from sora_jax.process import Timings
from sora_jax.sampling import noise
from sora_jax.sampling.calibration import Calibration, calibrate
from sora_jax.sampling.reuse import Keep
from sora_jax.sampling.sampler import Carry, Result, finish
from sora_jax.streaming.memory_plan import MemoryPlan, Workload, plan_memory
from sora_jax.streaming.network import StreamedSTDiT3

LOOP_SEED_STRIDE = 2654435769  # 2^32 / golden ratio: seeds of later clips stay clear of those of other samples


@dataclasses.dataclass(frozen=True, kw_only=True)
class Progress:
    """Where a generation stands; handed to the callback when a stage begins and after every step.

    ``step`` of ``num_steps`` sampling steps are done in clip ``loop`` of ``num_loops``; ``carry`` is the sampler's state
    after a step, else None.
    """

    stage: str
    step: int
    num_steps: int
    loop: int
    num_loops: int
    carry: Carry | None = None


Callback = Callable[[Progress], Any]
Pixels = Float[np.ndarray, "B t h w 3"]
Latents = Float[np.ndarray, "B T H W C"]  # the clips of a loop follow each other in time
ReferenceLatents = Sequence[Sequence[np.ndarray]]  # for each sample the latents [T, H, W, C] of its references


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inputs:
    """What each sample of the batch is made from.

    Attributes:
      prompts: text without JSON.
      captions: prepared for the text encoder, segments included.
      reference_paths: as given, separated by ``;``.
      references: pixels [t, h, w, 3] of each of the sample's references.
      strategies: mask strategies.
    """

    prompts: Sequence[str]
    captions: Sequence[str]
    reference_paths: Sequence[str]
    references: Sequence[Sequence[np.ndarray]]
    strategies: Sequence[str]


def read_inputs(
    prompts: Sequence[str], reference_paths: Sequence[str], strategies: Sequence[str], num_samples: int, settings: Settings
) -> Inputs:
    """Returns ``num_samples`` samples of each prompt, with its JSON split off and its references read.

    A reference without a mask strategy fixes the first latent frame.

    Raises:
      ValueError: lengths differ, or a prompt, strategy or reference is malformed.
      FileNotFoundError: a reference is missing.
    """
    if not prompts:
        raise ValueError("no prompt given; expected at least one.")
    for name, values in (("references", reference_paths), ("mask strategies", strategies)):
        if len(values) != len(prompts):
            raise ValueError(f"got {len(values)} {name} for {len(prompts)} prompts; expected one for each ('' for none).")
    if num_samples < 1:
        raise ValueError(f"num_samples is {num_samples}; expected at least 1.")
    parts = [prompt.extract_json(*given) for given in zip(prompts, reference_paths, strategies, strict=True)]
    samples = [(text, paths, strategy or ("0" if paths else "")) for text, paths, strategy in parts for _ in range(num_samples)]
    for _, paths, strategy in samples:
        _check_strategy(strategy, len(_split(paths)))
    pixels = {
        path: conditioning.read_reference(path, settings.height, settings.width)
        for path in dict.fromkeys(path for _, paths, _ in samples for path in _split(paths))
    }
    captions = [
        prompt.prepare_prompt(text, aes=settings.aes, flow=settings.flow, camera_motion=settings.camera_motion)
        for text, _, _ in samples
    ]
    for caption in captions:
        prompt.prompt_at_loop(caption, settings.loop - 1)
    return Inputs(
        prompts=[text for text, _, _ in samples],
        captions=captions,
        reference_paths=[paths for _, paths, _ in samples],
        references=[[pixels[path] for path in _split(paths)] for _, paths, _ in samples],
        strategies=[strategy for _, _, strategy in samples],
    )


def _check_strategy(strategy: str, num_references: int) -> None:
    for entry in conditioning.parse_mask_strategy(strategy):
        if not 0 <= entry.edit_ratio <= 1:
            raise ValueError(
                f"mask strategy {strategy!r} has edit ratio {entry.edit_ratio}; expected 0 (keep) to 1 (generate)."
            )
        if entry.loop == 0 and not -num_references <= entry.reference < num_references:
            raise ValueError(f"mask strategy {strategy!r} names reference {entry.reference}; the prompt has {num_references}.")


def _split(paths: str) -> list[str]:
    return paths.split(";") if paths else []


class Generation:
    """The open networks, the settings and the clock of one generation."""

    def __init__(
        self, networks: Networks, tokenizer: Tokenizer, settings: Settings, timings: Timings, callback: Callback | None
    ):
        self.networks, self.tokenizer, self.settings, self.timings = networks, tokenizer, settings, timings
        self.callback, self.loop = callback, 0
        self._plan: MemoryPlan | None = None

    def run(self, inputs: Inputs, keep_latents: Callable[[np.ndarray], Any]) -> tuple[Pixels, Latents, list[Result]]:
        """Returns pixels in [-1, 1], not clipped, normalised latents, and the record of every clip of the loop.

        ``keep_latents`` is handed the latents before the last decoding.
        """
        self._begin(len(inputs.captions), any(inputs.references))
        references = self._encode_references(inputs.references)
        strategies: Sequence[str] = inputs.strategies
        features = self._encode_captions(inputs.captions)
        results: list[Result] = []
        videos: list[np.ndarray] = []
        for loop in range(self.settings.loop):
            self.loop = loop
            if loop:
                videos.append(self._decode_clip(np.asarray(results[-1].z)))
                references, strategies = self._continue(references, strategies, videos[-1])
            results.append(self._denoise(*features[loop], *self._start(references, strategies)))
        latents = np.concatenate([np.asarray(result.z) for result in results], axis=1)
        keep_latents(latents)
        videos.append(self._decode_clip(np.asarray(results[-1].z)))
        return self._join(videos), latents, results

    def prepare(self, inputs: Inputs) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray | None]:
        """Returns what the first clip is denoised from: captions [B, L, E], their mask, noise, frame weights or None."""
        self._begin(len(inputs.captions), any(inputs.references))
        references = self._encode_references(inputs.references)
        captions, mask = self._encode_captions(inputs.captions)[0]
        return captions, mask, *self._start(references, inputs.strategies)

    def calibrate(self, inputs: Inputs, keep: Keep) -> Calibration:
        """Returns what reuse costs along the sampling of the first clip, all of ``inputs`` in one batch."""
        settings, done = self.settings, 0
        captions, mask, z, weights = self.prepare(inputs)

        def report(carry: Carry) -> None:
            nonlocal done
            done += 1
            self._report("denoise", done, carry)

        self._report("load")
        with self._transformer() as stdit3, self.timings.measure("denoise"):
            self._report("compile")
            return calibrate(
                self.velocity(stdit3, captions, mask),
                jnp.asarray(z),
                make_schedule(settings),
                keep=keep,
                guidance=guidance_scale(settings),
                merge_steps=settings.merge_steps or None,
                frame_weights=weights,
                seed=self._seed,
                callback=report,
            )

    def decode(self, latents_BTHWC: Latents) -> Pixels:
        """Returns the pixels, in [-1, 1] and not clipped, of the latents of all clips of a loop."""
        self._begin(len(latents_BTHWC), encodes=False)
        return self._join([self._decode_clip(clip) for clip in np.split(latents_BTHWC, self.settings.loop, axis=1)])

    def _begin(self, num_samples: int, encodes: bool) -> None:
        """Plans the memory where there is a budget, and refuses one that is too small before anything is loaded."""
        networks, settings = self.networks, self.settings
        if networks.budget is not None:
            workload = Workload(
                num_frames=settings.num_frames,
                height=settings.height,
                width=settings.width,
                batch=num_samples,
                guided=settings.guided,
                dtype=settings.dtype,
                num_steps=settings.num_steps,
                encodes=encodes or settings.loop > 1,
            )
            self._plan = plan_memory(networks.manifests, workload, networks.budget)

    @property
    def _coders(self) -> Coders:
        return Coders(self.networks, self.settings.dtype, self.timings, self._plan)

    def _join(self, videos: Sequence[np.ndarray]) -> np.ndarray:
        """Returns the clips of a loop one after the other, each without the frames it took over."""
        if len(videos) == 1:
            return videos[0]
        taken = sizes.frames_of_latents(self.settings.condition_frame_length)
        return np.concatenate([videos[0], *(video[:, taken:] for video in videos[1:])], axis=1)

    def latent_shape(self, num_clips: int = 1) -> tuple[int, int, int, int]:
        """Returns frames, rows, columns and channels of a sample's latents, of one clip or several in a row."""
        config, settings = self.networks.config, self.settings
        frames, rows, columns = latent_size(config.vae, settings.num_frames, settings.height, settings.width)
        return num_clips * frames, rows, columns, config.stdit3.in_channels

    def _encode_captions(self, captions: Sequence[str]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Returns caption features [B, L, E] and mask [B, L] for every clip of the loop; each caption is encoded once."""
        self._report("text")
        texts = [[prompt.prompt_at_loop(caption, loop) for caption in captions] for loop in range(self.settings.loop)]
        unique = list(dict.fromkeys(text for row in texts for text in row))
        ids, mask = self.tokenizer.encode(unique, self.networks.config.stdit3.model_max_length)
        features = self._coders.encode_text(ids, mask)
        rows = [[unique.index(text) for text in row] for row in texts]
        return [(features[row], mask[row]) for row in rows]

    def _encode_references(self, references: Sequence[Sequence[np.ndarray]]) -> ReferenceLatents:
        """Returns the latents of every reference; one that several samples share is encoded once."""
        if not any(references):
            return references
        self._report("encode")
        unique = {id(pixels): pixels for given in references for pixels in given}
        latents = dict(zip(unique, self._coders.encode_videos([pixels[None] for pixels in unique.values()]), strict=True))
        return [[latents[id(pixels)][0] for pixels in given] for given in references]

    def _continue(
        self, references: ReferenceLatents, strategies: Sequence[str], video_Bthw3: np.ndarray
    ) -> tuple[ReferenceLatents, Sequence[str]]:
        """Returns references and strategies by which the next clip begins with the end of the previous one."""
        (latents,) = self._coders.encode_videos([video_Bthw3])
        return conditioning.append_generated(
            references,
            strategies,
            latents,
            self.loop,
            condition_frame_length=self.settings.condition_frame_length,
            condition_frame_edit=self.settings.condition_frame_edit,
        )

    def _start(self, references: ReferenceLatents, strategies: Sequence[str]) -> tuple[np.ndarray, np.ndarray | None]:
        """Returns noise with the references put in, and frame weights; None where no frame is given."""
        z = np.asarray(noise.initial_noise(self._seed, (len(strategies), *self.latent_shape())))
        z, weights = conditioning.apply_mask_strategy(z, references, strategies, self.loop, align=self.settings.align)
        return z, None if (weights == 1).all() else weights

    def _denoise(self, caption_BLE: np.ndarray, mask_BL: np.ndarray, z: np.ndarray, weights: np.ndarray | None) -> Result:
        settings = self.settings
        self._report("load")
        with self._transformer() as stdit3:
            velocity = self.velocity(stdit3, caption_BLE, mask_BL)
            sampler = make_sampler(velocity, settings, frame_weights=weights, seed=self._seed)
            self._report("compile")
            with self.timings.measure("compile"):
                start = jax.block_until_ready(sampler.run(sampler.start(jnp.asarray(z)), 0))
            self._report("denoise")
            for carry in self.timings.each("denoise", sampler.steps(start)):
                ended = np.asarray(carry.done_B).all()
                self._report("denoise", settings.num_steps if ended else int(carry.step), carry)
            return finish(carry)

    def _transformer(self) -> AbstractContextManager[STDiT3 | StreamedSTDiT3]:
        """Returns the context in which the transformer is there, in memory or streamed."""
        fixed_bytes = 0 if self._plan is None else self._plan.stage("denoise").fixed
        return self.networks.transformer(self.settings.dtype, self.timings, fixed_bytes=fixed_bytes)

    def velocity(self, stdit3: STDiT3 | StreamedSTDiT3, caption_BLE: np.ndarray, mask_BL: np.ndarray) -> Velocity:
        """Returns the velocity with its conditions; with guidance the null captions follow the prompts' captions."""
        settings, caption_RLE = self.settings, jnp.asarray(caption_BLE)
        if settings.guided:
            caption_RLE = with_null_caption(caption_RLE, jnp.asarray(stdit3.null_caption_LE))
        sizes_1 = sizes.size_conditions(
            1, height=settings.height, width=settings.width, num_frames=settings.num_frames, fps=settings.fps
        )
        fps, height_px, width_px = (jnp.asarray(sizes_1[name]) for name in ("fps_B", "height_px_B", "width_px_B"))
        return Velocity(
            network=stdit3,
            caption_RLE=caption_RLE,
            mask_BL=jnp.asarray(mask_BL),
            fps=fps,
            height_px=height_px,
            width_px=width_px,
            merge=settings.merge,
        )

    def _decode_clip(self, latents_BTHWC: np.ndarray) -> np.ndarray:
        self._report("decode", self.settings.num_steps)
        return self._coders.decode(latents_BTHWC, self.settings.num_frames)

    @property
    def _seed(self) -> int:
        return (self.settings.seed + self.loop * LOOP_SEED_STRIDE) % 2**32

    def _report(self, stage: str, step: int = 0, carry: Carry | None = None) -> None:
        if self.callback is not None:
            at = {"step": step, "num_steps": self.settings.num_steps, "loop": self.loop, "num_loops": self.settings.loop}
            self.callback(Progress(stage=stage, carry=carry, **at))
