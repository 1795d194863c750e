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
from jaxtyping import Float, UInt8

from sora_jax.devices import hosts
from sora_jax.devices.mesh import filled
from sora_jax.inputs import prompt, sizes
from sora_jax.inputs import references as conditioning
from sora_jax.inputs.tokenizer import Tokenizer
from sora_jax.networks.stdit3 import STDiT3, with_null_caption
from sora_jax.networks.vae.codec import latent_size
from sora_jax.pipeline.coders import Coders
from sora_jax.pipeline.make_sampler import make_guidance, make_sampler, make_schedule
from sora_jax.pipeline.open_model import Networks
from sora_jax.pipeline.previews import Previews
from sora_jax.pipeline.samples import Sample, continued
from sora_jax.pipeline.settings import Settings
from sora_jax.pipeline.velocity import Velocity
from sora_jax.pipeline.workload import workload_of
from sora_jax.process import Timings
from sora_jax.sampling import noise
from sora_jax.sampling.calibration import Calibration, calibrate
from sora_jax.sampling.prediction import predicted_clean
from sora_jax.sampling.reuse import Keep
from sora_jax.sampling.sampler import Carry, Result, finish
from sora_jax.streaming.memory_plan import MemoryPlan, plan_memory
from sora_jax.streaming.network import StreamedSTDiT3

LOOP_SEED_STRIDE = 2654435769  # 2^32 / golden ratio: seeds of later clips stay clear of those of other samples


@dataclasses.dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a generation is; passed to the callback when a stage begins and after every step.

    ``step`` of ``num_steps`` sampling steps are done in clip ``loop`` of ``num_loops``; ``carry`` is the sampler's state
    after a step, else None.  `preview` shows what the step predicts.
    """

    stage: str
    step: int
    num_steps: int
    loop: int
    num_loops: int
    carry: Carry | None = None
    pictures: Callable[[], UInt8[np.ndarray, "B T h w 3"]] | None = dataclasses.field(default=None, repr=False, compare=False)

    def preview(self) -> UInt8[np.ndarray, "B T h w 3"]:
        """Returns the clip that this step predicts: a picture for each latent frame, by a linear map in place of the decoder.

        The clip has the same bits with and without.

        Raises:
          ValueError: no step has been taken, or a memory budget leaves no room to fit the map (`Pipeline.prepare_preview`).
        """
        if self.pictures is None:
            raise ValueError(f"stage {self.stage!r} has no latents to show; ask for a preview where `carry` is not None.")
        return self.pictures()


Callback = Callable[[Progress], Any]
Pixels = Float[np.ndarray, "B t h w 3"]
Latents = Float[np.ndarray, "B T H W C"]  # the clips of a loop follow each other in time
ReferenceLatents = Sequence[Sequence[np.ndarray]]  # for each sample the latents [T, H, W, C] of its references


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampled:
    """What is left to decode.

    Attributes:
      latents: normalised latents.
      results: the record of every clip of the loop.
      videos: the clips before the last one, which were decoded on the way.
    """

    latents: Latents
    results: Sequence[Result]
    videos: Sequence[Pixels]


def planned(networks: Networks, settings: Settings, num_samples: int, *, encodes: bool = False) -> MemoryPlan | None:
    """Returns the memory plan of a generation, None without a budget; ``encodes``: there are references.

    Raises:
      ValueError: the budget is too small; the message says how much is needed, and what would fit.
    """
    if networks.budget is None:
        return None
    workload = workload_of(settings, num_samples, attention=networks.attention, encodes=encodes)
    return plan_memory(networks.manifests, workload, networks.budget)


class Generation:
    """The open networks, the settings and the clock of one generation."""

    def __init__(
        self,
        networks: Networks,
        tokenizer: Tokenizer,
        settings: Settings,
        timings: Timings,
        callback: Callback | None,
        previews: Previews | None = None,
    ):
        self.networks, self.tokenizer, self.settings, self.timings = networks, tokenizer, settings, timings
        self.callback, self.loop, self._previews = callback, 0, previews
        self._plan: MemoryPlan | None = None

    def sample(self, samples: Sequence[Sample]) -> Sampled:
        """Returns the latents of all clips of the loop; all but the last one are decoded, to be continued."""
        references, strategies, features = self._conditions(samples)
        results: list[Result] = []
        videos: list[np.ndarray] = []
        for loop in range(self.settings.loop):
            self.loop = loop
            if loop:
                videos.append(self._decode_clip(np.asarray(results[-1].z)))
                references, strategies = self._continue(references, strategies, videos[-1])
            results.append(self._denoise(*features[loop], *self._start(references, strategies)))
        latents = np.concatenate([np.asarray(result.z) for result in results], axis=1)
        return Sampled(latents=latents, results=results, videos=videos)

    def finish(self, sampled: Sampled) -> Pixels:
        """Returns the pixels, in [-1, 1] and not clipped, of all clips of the loop."""
        return self._join([*sampled.videos, self._decode_clip(np.asarray(sampled.results[-1].z))])

    def prepare(self, samples: Sequence[Sample]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray | None]:
        """Returns what the first clip is denoised from: captions [B, L, E], their mask, noise, frame weights or None."""
        references, strategies, features = self._conditions(samples)
        return *features[0], *self._start(references, strategies)

    def _conditions(
        self, samples: Sequence[Sample]
    ) -> tuple[ReferenceLatents, Sequence[str], list[tuple[np.ndarray, np.ndarray]]]:
        """Returns the latents of references, mask strategies, and for every clip of the loop caption features and mask."""
        self._begin(len(samples), any(sample.references for sample in samples))
        references = self._encode_references(samples)
        features = self._encode_captions([sample.caption for sample in samples])
        return references, [sample.strategy for sample in samples], features

    def calibrate(self, samples: Sequence[Sample], keep: Keep) -> Calibration:
        """Returns what reuse costs along the sampling of the first clip, all samples in one batch."""
        settings, done = self.settings, 0
        captions, mask, z, weights = self.prepare(samples)

        def report(carry: Carry) -> None:
            nonlocal done
            done += 1
            self._report("denoise", done, carry)

        self._report("load")
        with self.networks.on_mesh(), self.transformer() as stdit3, self.timings.measure("denoise"):
            self._report("compile")
            return calibrate(
                self.velocity(stdit3, captions, mask),
                self.networks.place(z),
                make_schedule(settings),
                keep=keep,
                guidance=make_guidance(settings),
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
        """Plans the memory if there is a budget, and refuses one that is too small before anything is loaded."""
        self._plan = planned(self.networks, self.settings, num_samples, encodes=encodes)

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

    def _encode_references(self, samples: Sequence[Sample]) -> ReferenceLatents:
        """Returns the latents of every reference; one that several samples share is encoded once."""
        paths = list(dict.fromkeys(path for sample in samples for path in sample.reference_paths))
        if not paths:
            return [[] for _ in samples]
        self._report("encode")
        height, width = self.settings.height, self.settings.width
        videos = [conditioning.read_reference(path, height, width)[None] for path in paths]
        latents = dict(zip(paths, self._coders.encode_videos(videos), strict=True))
        return [[latents[path][0] for path in sample.reference_paths] for sample in samples]

    def _continue(
        self, references: ReferenceLatents, strategies: Sequence[str], video_Bthw3: np.ndarray
    ) -> tuple[ReferenceLatents, Sequence[str]]:
        """Returns references and strategies by which the next clip begins with the end of the previous one."""
        (latents,) = self._coders.encode_videos([video_Bthw3])
        return continued(references, strategies, latents, self.loop, self.settings)

    def _start(self, references: ReferenceLatents, strategies: Sequence[str]) -> tuple[np.ndarray, np.ndarray | None]:
        """Returns noise with the references inserted, and frame weights; None if no frame comes from a reference."""
        z = np.asarray(noise.initial_noise(self._seed, (len(strategies), *self.latent_shape())))
        z, weights = conditioning.apply_mask_strategy(z, references, strategies, self.loop, align=self.settings.align)
        return z, None if (weights == 1).all() else weights

    def _denoise(self, caption_BLE: np.ndarray, mask_BL: np.ndarray, z: np.ndarray, weights: np.ndarray | None) -> Result:
        settings, num_clips = self.settings, len(z)
        caption_BLE, mask_BL, z = (self._filled(rows) for rows in (caption_BLE, mask_BL, z))
        self._report("load")
        with self.networks.on_mesh(), self.transformer() as stdit3:
            velocity = self.velocity(stdit3, caption_BLE, mask_BL)
            frame_weights = None if weights is None else self._filled(weights)
            sampler = make_sampler(velocity, settings, frame_weights=frame_weights, seed=self._seed)
            self._report("compile")
            with self.timings.measure("compile"):
                start = jax.block_until_ready(sampler.run(sampler.start(self.networks.place(z)), 0))
            self._report("denoise")
            for carry in self.timings.each("denoise", sampler.steps(start)):
                ended = np.asarray(carry.done_B).all()
                pictures = self._pictures(carry, num_clips, sampler.sampling.schedule.num_timesteps)
                self._report("denoise", settings.num_steps if ended else int(carry.step), carry, pictures)
            return _of_clips(finish(carry), num_clips)

    def _filled(self, rows: np.ndarray) -> np.ndarray:
        """Returns rows with the last one repeated until the mesh divides them."""
        return filled(rows, self.networks.whole_batch(1))

    def transformer(self) -> AbstractContextManager[STDiT3 | StreamedSTDiT3]:
        """Returns a context that provides the transformer, in memory or streamed."""
        fixed_bytes = 0 if self._plan is None else self._plan.stage("denoise").fixed
        return self.networks.transformer(self.settings.dtype, self.timings, fixed_bytes=fixed_bytes)

    def velocity(self, stdit3: STDiT3 | StreamedSTDiT3, caption_BLE: np.ndarray, mask_BL: np.ndarray) -> Velocity:
        """Returns the velocity with its conditions; with guidance the null captions follow the prompts' captions."""
        settings, place = self.settings, self.networks.place
        caption_RLE = place(caption_BLE)
        if settings.guided:
            caption_RLE = with_null_caption(caption_RLE, jnp.asarray(stdit3.null_caption_LE))
        sizes_1 = sizes.size_conditions(
            1, height=settings.height, width=settings.width, num_frames=settings.num_frames, fps=settings.fps
        )
        fps, height_px, width_px = (place(sizes_1[name]) for name in ("fps_B", "height_px_B", "width_px_B"))
        return Velocity(
            network=stdit3,
            caption_RLE=caption_RLE,
            mask_BL=place(mask_BL),
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

    def _report(
        self, stage: str, step: int = 0, carry: Carry | None = None, pictures: Callable[[], np.ndarray] | None = None
    ) -> None:
        """Calls the callback; where the mesh is over several processes, an error of one of them ends all at the same point."""
        at = {"step": step, "num_steps": self.settings.num_steps, "loop": self.loop, "num_loops": self.settings.loop}
        progress, failure = Progress(stage=stage, carry=carry, pictures=pictures, **at), None
        if not hosts.is_over_processes(self.networks.mesh):
            if self.callback is not None:
                self.callback(progress)
            return
        try:
            if self.callback is not None:
                self.callback(progress)
        except BaseException as error:  # raised by `together`
            failure = error
        hosts.together(failure)

    def _pictures(self, carry: Carry, num_clips: int, num_timesteps: float) -> Callable[[], np.ndarray] | None:
        """Returns what makes the preview of a step when it is asked for."""
        previews = self._previews
        if previews is None:
            return None
        return lambda: previews.pictures(predicted_clean(carry, num_timesteps)[:num_clips])


def _of_clips(result: Result, num_clips: int) -> Result:
    """Returns the result of the first clips: what a batch was filled up with is dropped."""
    if len(result.evaluations_B) == num_clips:
        return result
    trace = dataclasses.replace(
        result.trace, cosine_NB=result.trace.cosine_NB[:, :num_clips], leapt_NB=result.trace.leapt_NB[:, :num_clips]
    )
    evaluations_B = result.evaluations_B[:num_clips]
    return dataclasses.replace(result, z=result.z[:num_clips], evaluations_B=evaluations_B, trace=trace)
