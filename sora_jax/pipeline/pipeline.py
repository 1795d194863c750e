"""From prompt to clip: settings, inputs and stages put together, and no arithmetic of its own.

Invariant: a clip depends on prompt, settings, weights and seed only: sample b of a batch is the clip that ``seed + b`` gives
alone.  How the stages run is `generation`'s business, where a model lies `networks`'.
"""

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import jax
import numpy as np

from sora_jax.config import NETWORKS
from sora_jax.inputs.tokenizer import Tokenizer
from sora_jax.networks import merging
from sora_jax.networks.merging import Merge
from sora_jax.networks.vae.codec import latent_size
from sora_jax.pipeline import settings, video
from sora_jax.pipeline.caption_cache import CaptionCache
from sora_jax.pipeline.clip import Clip, check_latents_target, load_latents, save_latents
from sora_jax.pipeline.open_model import Networks
from sora_jax.pipeline.recipe_file import PlanFile
from sora_jax.pipeline.run import Callback, Generation, Inputs, read_inputs
from sora_jax.pipeline.sampling import make_sampling
from sora_jax.pipeline.settings import Settings
from sora_jax.process import Timings
from sora_jax.sampling.leap import Leap
from sora_jax.sampling.reuse import Keep, Plan
from sora_jax.sampling.sampler import Trace
from sora_jax.storage import directory as model_directory
from sora_jax.streaming.budget import parse_budget
from sora_jax.version import __version__

POCKET = Path(__file__).parents[1] / "pocket" / "weights"
_TOKENIZERS = ("tokenizer.json", "spiece.model")


class Pipeline:
    """A model directory, opened; make one with `from_pretrained`, call it with a prompt."""

    def __init__(self, networks: Networks, tokenizer: Tokenizer, defaults: Mapping[str, Any]):
        self.networks, self.tokenizer, self.defaults = networks, tokenizer, defaults
        self.config = networks.config

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike[str] | None = None,
        *,
        keep: bool | None = None,
        memory_budget: str | int | float | None = None,
        caption_cache: str | os.PathLike[str] | None = None,
    ) -> Self:
        """Returns the pipeline of a model directory, or of the embedded pocket model; loads no weights yet.

        Args:
          path: the model directory; None: the pocket model.
          keep: whether networks stay in memory between stages and calls; None: if the model is below 1 GB and no budget
            is given.
          memory_budget: what the process may hold, such as ``"3.3GB"``, ``"auto"`` or bytes; the transformer's blocks are
            then read while it runs, and as many retained as fit; the other networks run from their files.
          caption_cache: folder where caption features are kept, so that a prompt is encoded once; None: nowhere.

        Raises:
          ModelDirectoryError: a network is missing or damaged; the message holds the command that adds it.
          FileNotFoundError: there is no tokenizer.
          ValueError: the tokenizer is damaged or does not fit the text encoder, or the budget cannot be read.
        """
        directory = POCKET if path is None else Path(path)
        budget = None if memory_budget is None else parse_budget(memory_budget)
        networks = Networks.open(directory, keep=keep, budget=budget)
        networks.caption_cache = None if caption_cache is None else CaptionCache(caption_cache)
        index = model_directory.read_model_file(directory)
        tokenizer = Tokenizer.from_file(tokenizer_path(directory, index.get("tokenizer")))
        rows = networks.config.t5.vocab_size
        if tokenizer.vocab_size > rows:
            raise ValueError(f"{directory}: the tokenizer has {tokenizer.vocab_size} ids, the text encoder only {rows}.")
        return cls(networks, tokenizer, index.get("defaults", {}))

    @property
    def memory_budget(self) -> int | None:
        """Bytes that the process may hold, settable as in `from_pretrained`; during a run from the next block on."""
        return self.networks.budget

    @memory_budget.setter
    def memory_budget(self, memory_budget: str | int | float) -> None:
        self.networks.budget = parse_budget(memory_budget)

    def __call__(
        self,
        prompts: str | Sequence[str],
        *,
        num_steps: int | None = None,
        guidance: int | float | None = None,
        seed: int | None = None,
        preset: str | None = None,
        solver: str | None = None,
        shift: int | float | None = None,
        leap: int | str | Leap | None = None,
        plan: Plan | str | os.PathLike[str] | None = None,
        merge_steps: int | None = None,
        merge: Merge | None = None,
        height: int | None = None,
        width: int | None = None,
        resolution: str | None = None,
        aspect_ratio: str | None = None,
        num_frames: int | str | None = None,
        fps: int | float | None = None,
        save_fps: int | float | None = None,
        aes: int | float | str | None = None,
        flow: int | float | str | None = None,
        camera_motion: str | None = None,
        references: str | Sequence[str] | None = None,
        mask_strategies: str | Sequence[str] | None = None,
        loop: int | None = None,
        condition_frame_length: int | None = None,
        condition_frame_edit: int | float | None = None,
        align: int | str | None = None,
        num_samples: int = 1,
        dtype: str | None = None,
        latents_path: str | os.PathLike[str] | None = None,
        overwrite: bool = False,
        callback: Callback | None = None,
    ) -> Clip:
        """Returns a clip for each prompt (``num_samples`` of each), generated in one batch.

        What is None is the model's default (model.json), else Open-Sora's; ``settings.Settings`` describes the numbers.

        Args:
          prompts: text, ``|0| first |2| then`` for loops, with optional JSON (reference_path, mask_strategy) at its end.
          num_steps: sampling steps.
          guidance: weight of the caption; 1 evaluates without the null caption, at half the cost.
          seed: of sample 0; sample b has ``seed + b``.
          preset: ``"exact"``, as Open-Sora samples, or ``"recommended"``, see `presets`; what is given besides goes before it.
          solver: ``"euler"``, ``"ab2"``, ``"dpmpp"`` or ``"heun"``, see `sampler.sample`.
          shift: of the times on top of the resolution's own; above 1 more steps are spent at high noise.
          leap: ``"off"``, a step that leaps to the end, ``"dynamic"``, ``"released"``, or a `Leap`.
          plan: which steps evaluate: a `Plan`, or a file of `calibrate`; ``num_steps`` is the plan's unless given.
          merge_steps: first steps with merged temporal tokens.
          merge: what those steps merge.
          height: pixels, a multiple of 16 (autoencoder 8 x patch 2).
          width: pixels, likewise.
          resolution: instead of height and width, for example ``"240p"``.
          aspect_ratio: height:width, for example ``"9:16"``.
          num_frames: a number, or a duration such as ``"2s"``; 1 is an image.
          fps: frame rate the model is conditioned on.
          save_fps: frame rate of the file; ``fps`` unless given.
          aes: aesthetic score appended to the caption; ``"off"`` for none.
          flow: motion score, likewise.
          camera_motion: camera motion, likewise.
          references: for each prompt the paths of its reference images or videos, separated by ``;``.
          mask_strategies: for each prompt, groups ``loop,reference,reference start,target start,length,edit ratio``.
          loop: clips in a row, each continuing the one before.
          condition_frame_length: latent frames that a clip takes over.
          condition_frame_edit: edit ratio of those frames.
          align: latent frames that starts in mask strategies are rounded to; ``"off"`` for none.
          num_samples: samples of each prompt.
          dtype: compute dtype, ``"float32"`` or ``"bfloat16"``.
          latents_path: npz file written before the last decoding; `resume` continues from it.
          overwrite: replace an existing latents file.
          callback: called with `Progress` on the host; an exception it raises ends the generation.

        Raises:
          ValueError: a setting, prompt or strategy is invalid; nothing was computed.
          FileNotFoundError: a reference is missing.
          FileExistsError: the latents file exists and ``overwrite`` is False; nothing was computed.
        """
        given = {
            "num_steps": num_steps,
            "guidance": guidance,
            "seed": seed,
            "preset": preset,
            "solver": solver,
            "shift": shift,
            "leap": leap,
            "plan": plan,
            "merge_steps": merge_steps,
            "merge": merge,
            "height": height,
            "width": width,
            "resolution": resolution,
            "aspect_ratio": aspect_ratio,
            "num_frames": num_frames,
            "fps": fps,
            "save_fps": save_fps,
            "aes": aes,
            "flow": flow,
            "camera_motion": camera_motion,
            "loop": loop,
            "condition_frame_length": condition_frame_length,
            "condition_frame_edit": condition_frame_edit,
            "align": align,
            "dtype": dtype,
        }
        chosen = self.resolve(given)
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        self.check(chosen, len(texts) * num_samples)
        if latents_path is not None:
            check_latents_target(latents_path, overwrite=overwrite)
        inputs = read_inputs(texts, _each(references, texts), _each(mask_strategies, texts), num_samples, chosen)

        def keep(latents: np.ndarray, parameters: Sequence[Mapping[str, Any]]) -> None:
            if latents_path is not None:
                save_latents(latents_path, latents, parameters, overwrite=overwrite)

        return self._generate(inputs, chosen, keep, callback)

    def _generate(
        self,
        inputs: Inputs,
        chosen: Settings,
        keep: Callable[[np.ndarray, list[dict[str, Any]]], None],
        callback: Callback | None,
    ) -> Clip:
        """Returns the clip; ``keep`` is handed latents and parameters before the last decoding."""
        timings, parameters = Timings(), self._parameters(inputs, chosen)
        generation = Generation(self.networks, self.tokenizer, chosen, timings, callback)
        pixels, latents, results = generation.run(inputs, lambda latents: keep(latents, parameters))
        evaluations_B = np.sum([result.evaluations_B for result in results], axis=0)
        return Clip(
            frames=video.quantise(pixels),
            latents=latents,
            fps=chosen.save_fps,
            parameters=[
                {**made_from, "evaluations": float(count)} for made_from, count in zip(parameters, evaluations_B, strict=True)
            ],
            trace=_joined([result.trace for result in results]),
            evaluations_B=evaluations_B,
            timings=timings,
        )

    def calibrate(
        self,
        prompts: str | Sequence[str],
        *,
        evaluations: int,
        chosen: Settings | None = None,
        keep: Keep = "residual",
        half_from: int | None = None,
        callback: Callback | None = None,
    ) -> PlanFile:
        """Returns the reuse plan with the smallest measured error for this model, to be given to a call as ``plan``.

        Args:
          prompts: captions to measure on, all in one batch.
          evaluations: steps that the plan evaluates in full.
          chosen: settings from `resolve`; what they say of solver, leap and plan is not used.
          keep: what a reused step takes over, see `plans.Plan`.
          half_from: steps from this one on evaluate the caption alone, with the guidance difference of the last full step.
          callback: called with `Progress` on the host.

        Raises:
          ValueError: a setting is invalid, or no plan has so many evaluations.
        """
        chosen = self.resolve({}) if chosen is None else chosen
        if not 1 <= evaluations <= chosen.num_steps:
            raise ValueError(f"a plan of {chosen.num_steps} steps cannot have {evaluations} evaluations; give 1 to all steps.")
        if half_from is not None and not chosen.guided:
            raise ValueError("half steps reuse the guidance difference, but guidance is 1; leave half_from out.")
        self._check_merging(chosen)
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        settings.check_room(chosen, len(texts))
        inputs = read_inputs(texts, [""] * len(texts), [""] * len(texts), 1, chosen)
        generation = Generation(self.networks, self.tokenizer, chosen, Timings(), callback)
        measured = generation.calibrate(inputs, keep)
        plan = measured.plan(evaluations)
        error = measured.error(plan)
        unused = ("solver", "leap", "plan", "aes", "flow", "camera_motion", "save_fps", "loop", "align")
        recorded = {name: value for name, value in chosen.to_dict().items() if name not in unused}
        return PlanFile(
            plan=plan if half_from is None else plan.with_half_steps(half_from),
            model=self.model_id,
            error=error,
            calibrated={**recorded, "prompts": list(inputs.captions), "sora_jax": __version__},
        )

    def resume(self, path: str | os.PathLike[str], *, callback: Callback | None = None) -> Clip:
        """Returns the clip of a latents file: only decoding is left to do.

        Raises:
          FileNotFoundError: no such file.
          ValueError: the file is damaged, or made by a model with other latents.
        """
        latents, parameters = load_latents(path)
        try:
            chosen = Settings.from_dict(parameters[0])
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{path} lacks the settings of its samples ({error}); expected a file of --save-latents."
            ) from error
        timings = Timings()
        generation = Generation(self.networks, self.tokenizer, chosen, timings, callback)
        expected = (len(latents), *generation.latent_shape(num_clips=chosen.loop))
        if latents.shape != expected:
            raise ValueError(
                f"{path} holds latents {list(latents.shape)}; this model makes {list(expected)} with their settings."
            )
        return Clip(
            frames=video.quantise(generation.decode(latents)),
            latents=latents,
            fps=chosen.save_fps,
            parameters=parameters,
            trace=None,
            evaluations_B=None,
            timings=timings,
        )

    def resolve(self, given: Mapping[str, Any]) -> Settings:
        """Returns complete settings from those given (see `Settings.resolve`), with sizes this model can make."""
        if given.get("height") is not None and given.get("width") is not None:
            settings.check_multiple(self.config.vae, self.config.stdit3.patch_size[1], given["height"], given["width"])
        plan = given.get("plan")
        if isinstance(plan, str | os.PathLike):
            given = {**given, "plan": PlanFile.read(plan).for_model(self.model_id, plan)}
        return Settings.resolve(self.defaults, given)

    def check(self, chosen: Settings, num_clips: int = 1) -> None:
        """Refuses settings that cannot be sampled, or a video beyond this machine's memory, before anything is loaded.

        Raises:
          ValueError: they do not go together, or ``num_clips`` such videos do not fit into memory.
        """
        settings.check_room(chosen, num_clips)
        make_sampling(chosen)
        self._check_merging(chosen)

    def _check_merging(self, chosen: Settings) -> None:
        if chosen.merge_steps:
            num_latents, _, _ = latent_size(self.config.vae, chosen.num_frames, chosen.height, chosen.width)
            merging.check_frames(num_latents, chosen.merge.odd)

    def _parameters(self, inputs: Inputs, chosen: Settings) -> list[dict[str, Any]]:
        """Returns for each sample what it is made from, JSON-ready."""
        made_by = {"sora_jax": __version__, "jax": jax.__version__, "device": jax.devices()[0].device_kind}
        rows = zip(inputs.prompts, inputs.captions, inputs.reference_paths, inputs.strategies, strict=True)
        return [
            {
                "prompt": text,
                "caption": caption,
                "references": paths,
                "mask_strategy": strategy,
                **chosen.to_dict(),
                "seed": (chosen.seed + b) % 2**32,
                "model": self.model_id,
                **made_by,
            }
            for b, (text, caption, paths, strategy) in enumerate(rows)
        ]

    @property
    def model_id(self) -> str:
        """The folder's name and a digest of its manifests, which hold the checksum of every parameter; of no format."""
        digest = hashlib.sha256()
        for network in NETWORKS:
            digest.update(self.networks.manifests[network].values_text().encode())
        directory = self.networks.directory.resolve()
        return f"{'pocket' if directory == POCKET.resolve() else directory.name} {digest.hexdigest()[:16]}"


def _each(values: str | Sequence[str] | None, prompts: Sequence[str]) -> list[str]:
    """Returns one text for each prompt; a single text is for a single prompt."""
    if values is None:
        return [""] * len(prompts)
    return [values] if isinstance(values, str) else list(values)


def _joined(traces: Sequence[Trace]) -> Trace:
    """Returns the rows of all clips of a loop, one after the other."""
    return jax.tree.map(lambda *rows: np.concatenate(rows), *traces)


def tokenizer_path(directory: Path, name: str | None) -> Path:
    """Returns the tokenizer of a model directory; ``name`` is what its index says, if anything.

    Raises:
      FileNotFoundError: there is none.
    """
    candidates = [name] if name else _TOKENIZERS
    for candidate in candidates:
        if (directory / candidate).is_file():
            return directory / candidate
    raise FileNotFoundError(f"{directory} has no tokenizer; put {' or '.join(candidates)} there.")
