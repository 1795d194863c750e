"""From prompt to clip: settings, samples and stages put together, and no arithmetic of its own.

Invariant: a clip depends on prompt, settings, weights and seed only: sample b of a batch is the clip that ``seed + b`` gives
alone.  `run` executes the stages, `model_file` reads what a model says of itself, `open_model` opens it.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self, Unpack

import jax
import numpy as np
from jax.sharding import Mesh

from sora_jax.devices import hosts
from sora_jax.devices.axes import check_mesh_request
from sora_jax.devices.mesh import axis_sizes, name_of
from sora_jax.inputs.tokenizer import Tokenizer
from sora_jax.networks import merging
from sora_jax.networks.vae.codec import latent_size
from sora_jax.pipeline import video
from sora_jax.pipeline.caption_cache import CaptionCache
from sora_jax.pipeline.clip import Clip
from sora_jax.pipeline.clip_options import Options
from sora_jax.pipeline.html import model_html
from sora_jax.pipeline.latents_file import check_latents_target, load_latents, save_latents
from sora_jax.pipeline.model_file import ModelFile
from sora_jax.pipeline.open_model import Networks
from sora_jax.pipeline.previews import Previews
from sora_jax.pipeline.recipe_file import CALIBRATED, PlanFile
from sora_jax.pipeline.run import Callback, Generation, planned
from sora_jax.pipeline.samples import Sample, read_samples, refuse_idle
from sora_jax.pipeline.settings import Settings
from sora_jax.pipeline.workload import attention_used
from sora_jax.process import Timings
from sora_jax.sampling.reuse import Keep
from sora_jax.sampling.sampler import Trace
from sora_jax.streaming.budget import parse_budget
from sora_jax.version import __version__


class Pipeline:
    """A model directory, opened; make one with `from_pretrained`, call it with a prompt."""

    def __init__(self, model: ModelFile, networks: Networks, tokenizer: Tokenizer):
        self.model, self.networks, self.tokenizer = model, networks, tokenizer
        self.config = networks.config
        self._previews = Previews(networks, networks.decide(model.resolve({})))

    def __repr__(self) -> str:
        budget = "" if self.memory_budget is None else f", memory budget {self.memory_budget / 1e9:.3g} GB"
        return f"<Pipeline {self.model_id} in {self.model.directory}{budget}>"

    def _repr_html_(self) -> str:
        """Returns what a notebook shows: the model, its networks, and what it was trained for."""
        return model_html(self.model)

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike[str] | None = None,
        *,
        keep: bool | None = None,
        memory_budget: str | int | float | None = None,
        caption_cache: str | os.PathLike[str] | None = None,
        attention: str = "auto",
        mesh: str | Mesh | None = None,
        weights: str = "replicated",
    ) -> Self:
        """Returns the pipeline of a model directory, or of the embedded pocket model; loads no weights yet.

        Args:
          path: the model directory or its URL (http, https, s3, gs); None or ``"pocket"``: the embedded model.
          keep: whether networks stay in memory between stages and calls; None: they do if the model is below 1 GB and there
            is no budget.
          memory_budget: what the process may hold, such as ``"3.3GB"``, ``"auto"`` or bytes; the transformer's blocks are
            then read while it runs, and as many retained as fit; the other networks run from their files.
          caption_cache: folder where caption features are kept, so that a prompt is encoded once; None: nowhere.
          attention: ``auto`` chooses the form of every attention by device, dtype and size; or ``dense``, ``chunked``,
            ``cudnn`` (NVIDIA GPUs, bfloat16), ``flash`` (TPUs, bfloat16).
          mesh: several devices for one batch of clips, as ``"guidance=2,sequence=4"``, or a mesh with these axes: ``data``
            (clips), ``guidance`` (rows with and without caption), ``sequence`` (tokens).
          weights: of the transformer on a mesh: ``replicated``, or ``spread``: every device holds some rows of each matrix,
            and fetches the others when it multiplies.

        Raises:
          ModelDirectoryError: a network is missing or damaged; the message holds the command that adds it.
          FileNotFoundError: there is no tokenizer.
          ValueError: the tokenizer is damaged or does not fit the text encoder, the budget cannot be read, no form of
            attention has that name, or the mesh does not fit the devices.
        """
        return cls.open(
            ModelFile.read(path),
            keep=keep,
            memory_budget=memory_budget,
            caption_cache=caption_cache,
            attention=attention,
            mesh=mesh,
            weights=weights,
        )

    @classmethod
    def open(
        cls,
        model: ModelFile,
        *,
        keep: bool | None = None,
        memory_budget: str | int | float | None = None,
        caption_cache: str | os.PathLike[str] | None = None,
        attention: str = "auto",
        mesh: str | Mesh | None = None,
        weights: str = "replicated",
    ) -> Self:
        """Returns the pipeline of a model whose files of JSON were read; otherwise as `from_pretrained`."""
        budget = None if memory_budget is None else parse_budget(memory_budget)
        networks = Networks.open(model.manifests, keep=keep, budget=budget, attention=attention, mesh=mesh, weights=weights)
        networks.caption_cache = None if caption_cache is None else CaptionCache(caption_cache)
        tokenizer = Tokenizer.from_file(model.tokenizer_path)
        rows = networks.config.t5.vocab_size
        if tokenizer.vocab_size > rows:
            raise ValueError(f"{model.directory}: the tokenizer has {tokenizer.vocab_size} ids, the text encoder only {rows}.")
        return cls(model, networks, tokenizer)

    @property
    def memory_budget(self) -> int | None:
        """Bytes that the process may hold, settable as in `from_pretrained`; during a run from the next block on."""
        return self.networks.budget

    @memory_budget.setter
    def memory_budget(self, memory_budget: str | int | float) -> None:
        self.networks.budget = parse_budget(memory_budget)

    @property
    def model_id(self) -> str:
        """The folder's name and a digest of its manifests, which hold the checksum of every parameter."""
        return self.model.model_id

    def __call__(
        self,
        prompts: str | Sequence[str],
        *,
        references: str | Sequence[str] | None = None,
        mask_strategies: str | Sequence[str] | None = None,
        num_samples: int = 1,
        latents_path: str | os.PathLike[str] | None = None,
        overwrite: bool = False,
        callback: Callback | None = None,
        **options: Unpack[Options],
    ) -> Clip:
        """Returns a clip for each prompt (``num_samples`` of each), generated in one batch.

        Args:
          prompts: text, ``|0| first |2| then`` for loops, with optional JSON (reference_path, mask_strategy) at its end.
          references: for each prompt the paths of its reference images or videos, separated by ``;``.
          mask_strategies: for each prompt, groups ``loop,reference,reference start,target start,length,edit ratio``.
          num_samples: samples of each prompt.
          latents_path: npz file written before the last decoding; `resume` continues from it.
          overwrite: replace an existing latents file.
          callback: called with `Progress` on the host; an exception it raises ends the generation.
          options: see `Options`; what is None or left out is the model's default (model.json), else Open-Sora's.

        Raises:
          ValueError: an option, prompt or strategy is wrong or without effect; nothing was computed.
          FileNotFoundError: a reference is missing.
          FileExistsError: the latents file exists and ``overwrite`` is False; nothing was computed.
        """
        settings = self.resolve(options)
        texts = _texts("prompts", prompts)
        self.check(settings, len(texts) * num_samples if isinstance(num_samples, int) else 1)
        if latents_path is not None:
            self._by_the_writer(lambda: check_latents_target(latents_path, overwrite=overwrite))
        samples = self.read(texts, settings, references=references, mask_strategies=mask_strategies, num_samples=num_samples)
        refuse_idle(options, samples, settings)
        return self.generate(samples, settings, latents_path=latents_path, overwrite=overwrite, callback=callback)

    def resolve(self, options: Mapping[str, Any]) -> Settings:
        """Returns complete settings from options (see `Options`), with a size that this model and a dtype that this device has.

        Raises:
          ValueError: an option is wrong or without effect.
        """
        return self.networks.decide(self.model.resolve(options))

    def check(self, settings: Settings, num_clips: int = 1) -> None:
        """Refuses settings that this machine, the budget or this model cannot do, before anything is loaded.

        Raises:
          ValueError: says how much memory there is, or is needed, which numbers of frames can be merged, where the
            attention runs, or what the mesh divides.
        """
        settings.check_room(num_clips)
        if self.networks.mesh is not None:
            if settings.reuse is not None:
                raise ValueError("reuse decides from values that a mesh spreads over devices; leave one of the two out.")
            check_mesh_request(axis_sizes(self.networks.mesh), guided=settings.guided, num_clips=num_clips)
        if settings.reuse is not None and num_clips > 1:
            raise ValueError(
                f"reuse decides for a batch together, so that a clip would depend on its neighbours; make one at a time "
                f"(batch size 1), not {num_clips}."
            )
        self.networks.forms(settings.dtype)
        planned(self.networks, settings, num_clips)
        if settings.merge_steps:
            num_latents, _, _ = latent_size(self.config.vae, settings.num_frames, settings.height, settings.width)
            merging.check_frames(num_latents, settings.merge.odd)

    def read(
        self,
        prompts: str | Sequence[str],
        settings: Settings,
        *,
        references: str | Sequence[str] | None = None,
        mask_strategies: str | Sequence[str] | None = None,
        num_samples: int = 1,
    ) -> list[Sample]:
        """Returns what each sample of a request is made from, checked; the arguments are those of a call.

        Raises:
          ValueError: a prompt, strategy or reference is malformed, or a part of it has no effect.
          FileNotFoundError: a reference is missing.
        """
        texts = _texts("prompts", prompts)
        paths = [""] * len(texts) if references is None else _texts("references", references)
        strategies = [""] * len(texts) if mask_strategies is None else _texts("mask_strategies", mask_strategies)
        return read_samples(texts, paths, strategies, num_samples, settings, self.config.vae)

    def generate(
        self,
        samples: Sequence[Sample],
        settings: Settings,
        *,
        latents_path: str | os.PathLike[str] | None = None,
        overwrite: bool = False,
        callback: Callback | None = None,
    ) -> Clip:
        """Returns the clip of one batch of samples that `read` has returned for these settings."""
        timings, parameters = Timings(), self._parameters(samples, settings)
        generation = Generation(self.networks, self.tokenizer, settings, timings, callback, self._previews)
        sampled = generation.sample(samples)
        if latents_path is not None:
            self._by_the_writer(lambda: save_latents(latents_path, sampled.latents, parameters, overwrite=overwrite))
        pixels = generation.finish(sampled)
        evaluations_B = np.sum([result.evaluations_B for result in sampled.results], axis=0)
        return Clip(
            frames=video.quantise(pixels),
            latents=sampled.latents,
            fps=settings.save_fps,
            parameters=[
                {**made_from, "evaluations": float(count)} for made_from, count in zip(parameters, evaluations_B, strict=True)
            ],
            trace=_joined([result.trace for result in sampled.results]),
            evaluations_B=evaluations_B,
            timings=timings,
        )

    def prepare_preview(self, folder: str | os.PathLike[str] | None = None) -> None:
        """Makes sure that `Progress.preview` has its map: the model's own, the folder's, or one that is fitted and kept there.

        Without this call the first preview fits the map, once for the pipeline; under a memory budget it must come first.

        Raises:
          ModelDirectoryError: a parameter of the autoencoder is missing or damaged.
          ValueError: the memory budget is too small to fit a map.
          OSError: the folder cannot be written.
        """
        self._previews.prepare(None if folder is None else Path(folder))

    def calibrate(
        self,
        prompts: str | Sequence[str],
        *,
        evaluations: int,
        settings: Settings | None = None,
        keep: Keep = "residual",
        half_from: int | None = None,
        callback: Callback | None = None,
    ) -> PlanFile:
        """Returns the reuse plan with the smallest measured error for this model, for a call's option ``plan``.

        Args:
          prompts: captions to measure on, all in one batch.
          evaluations: steps that the plan evaluates in full.
          settings: from `resolve`; how they take steps and which they skip is not used.  None: the model's defaults.
          keep: what a reused step takes over, see `reuse.Plan`.
          half_from: steps from this one on evaluate the caption alone, with the guidance difference of the last full step.
          callback: called with `Progress` on the host.

        Raises:
          ValueError: a setting is wrong, or no plan has so many evaluations; nothing was measured.
        """
        settings = self.resolve({}) if settings is None else settings
        settings.check_calibration(evaluations, half_from)
        texts = _texts("prompts", prompts)
        self.check(settings, len(texts))
        samples = self.read(texts, settings)
        generation = Generation(self.networks, self.tokenizer, settings, Timings(), callback)
        measured = generation.calibrate(samples, keep)
        plan = measured.plan(evaluations)
        error = measured.error(plan)
        recorded = {name: value for name, value in settings.to_dict().items() if name in CALIBRATED}
        return PlanFile(
            plan=plan if half_from is None else plan.with_half_steps(half_from),
            model=self.model_id,
            error=error,
            calibrated={**recorded, "prompts": [sample.caption for sample in samples], "sora_jax": __version__},
        )

    def resume(self, path: str | os.PathLike[str], *, callback: Callback | None = None) -> Clip:
        """Returns the clip of a latents file: only decoding is left to do.

        Raises:
          FileNotFoundError: no such file.
          ValueError: the file is damaged, or made by a model with other latents.
        """
        latents, parameters = load_latents(path)
        try:
            settings = self.networks.decide(Settings.from_dict(parameters[0]))
        except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(
                f"{path} lacks the settings of its samples ({error}); expected a file of --save-latents."
            ) from error
        self.networks.forms(settings.dtype)
        timings = Timings()
        generation = Generation(self.networks, self.tokenizer, settings, timings, callback)
        expected = (len(latents), *generation.latent_shape(num_clips=settings.loop))
        if latents.shape != expected:
            raise ValueError(
                f"{path} holds latents {list(latents.shape)}; this model makes {list(expected)} with their settings."
            )
        return Clip(
            frames=video.quantise(generation.decode(latents)),
            latents=latents,
            fps=settings.save_fps,
            parameters=parameters,
            trace=None,
            evaluations_B=None,
            timings=timings,
        )

    def _by_the_writer(self, function: Callable[[], Any]) -> None:
        """Calls a function in the process that writes files; an error of it is raised in all processes of the mesh."""
        if not hosts.is_over_processes(self.networks.mesh):
            function()
            return

        def call() -> None:
            function()

        hosts.decided(call)

    def _parameters(self, samples: Sequence[Sample], settings: Settings) -> list[dict[str, Any]]:
        """Returns for each sample what it is made from, JSON-ready."""
        made_by = {"sora_jax": __version__, "jax": jax.__version__, "device": jax.devices()[0].device_kind}
        if self.networks.mesh is not None:
            made_by["mesh"] = name_of(self.networks.mesh)
        attention = attention_used(self.networks, settings, len(samples))
        return [
            {
                "prompt": sample.prompt,
                "caption": sample.caption,
                "references": sample.references,
                "mask_strategy": sample.strategy,
                **settings.to_dict(),
                "seed": settings.with_seed(settings.seed + b).seed,
                "model": self.model_id,
                "attention": attention,
                **made_by,
            }
            for b, sample in enumerate(samples)
        ]


def _texts(name: str, values: Any) -> list[str]:
    """Returns a list of texts; a single one stands for a list of one.

    Raises:
      ValueError: it is something else.
    """
    texts = [values] if isinstance(values, str) or not isinstance(values, Sequence) else list(values)
    for text in texts:
        if not isinstance(text, str):
            raise ValueError(f"{name} hold {text!r}; expected a text, or a list of texts.")
    return texts


def _joined(traces: Sequence[Trace]) -> Trace:
    """Returns the rows of all clips of a loop, one after the other."""
    return jax.tree.map(lambda *rows: np.concatenate(rows), *traces)
