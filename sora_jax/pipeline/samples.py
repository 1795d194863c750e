"""What each sample of a request is made from: caption, references and mask strategy, checked before a network is loaded.

Invariant: a `Sample` can be made with the settings it was read for: its files can be decoded, its mask strategy was applied to
empty latents of the right lengths, and each of its segments and entries holds in some clip.  Pixels are read again when the
clip is made, so that a request of a thousand references needs no memory for them.
"""

import dataclasses
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from sora_jax.config import VAEConfig
from sora_jax.inputs import prompt
from sora_jax.inputs import references as conditioning
from sora_jax.networks.vae.codec import latent_size
from sora_jax.pipeline.make_sampler import make_sampling
from sora_jax.pipeline.settings import Settings
from sora_jax.shell import counted

_MARK = re.compile(r"\s*\|\s*-?\d+\s*\|")  # how a prompt of segments begins, whether rightly written or not


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sample:
    """One clip to make.

    Attributes:
      prompt: text without JSON.
      caption: prepared for the text encoder, segments included.
      references: paths separated by ``;``, as the caller wrote them.
      strategy: mask strategy.
    """

    prompt: str
    caption: str
    references: str
    strategy: str

    @property
    def reference_paths(self) -> list[str]:
        """The paths of the references."""
        return self.references.split(";") if self.references else []


def read_samples(
    prompts: Sequence[str],
    references: Sequence[str],
    strategies: Sequence[str],
    num_samples: int,
    settings: Settings,
    vae: VAEConfig,
) -> list[Sample]:
    """Returns ``num_samples`` samples of each prompt, with its JSON split off.

    A reference without a mask strategy fixes the first latent frame.

    Raises:
      ValueError: lengths differ, a prompt, strategy or reference is malformed, or a part of it has no effect.
      FileNotFoundError: a reference is missing.
    """
    if not prompts:
        raise ValueError("no prompt given; expected at least one.")
    for name, values in (("references", references), ("mask strategies", strategies)):
        if len(values) != len(prompts):
            raise ValueError(f"got {len(values)} {name} for {len(prompts)} prompts; expected one for each ('' for none).")
    if not isinstance(num_samples, int) or isinstance(num_samples, bool) or num_samples < 1:
        raise ValueError(f"num_samples is {num_samples!r}; expected a whole number of at least 1.")
    asked = list(zip(prompts, references, strategies, strict=True))
    samples = {one: _sample(*one, settings) for one in dict.fromkeys(asked)}
    lengths = _reference_lengths(samples.values(), settings, vae)
    make_sampling(settings)
    for sample in samples.values():
        for weights_T in rehearse(sample, settings, vae, lengths):
            make_sampling(settings, frame_weights=None if (weights_T == 1).all() else weights_T[None])
    return [samples[one] for one in asked for _ in range(num_samples)]


def refuse_idle(options: Mapping[str, Any], samples: Sequence[Sample], settings: Settings) -> None:
    """Refuses options that a caller gave and that nothing in the request follows.

    Raises:
      ValueError: says which.
    """
    if options.get("align") is not None and settings.loop == 1 and not any(sample.strategy for sample in samples):
        raise ValueError("align rounds where references go, but no prompt has a reference; leave it out.")


def _sample(text: str, references: str, strategy: str, settings: Settings) -> Sample:
    text, references, strategy = prompt.extract_json(text, references, strategy)
    strategy = strategy or ("0" if references else "")
    return Sample(prompt=text, caption=_caption(text, settings), references=references, strategy=strategy)


def rehearse(sample: Sample, settings: Settings, vae: VAEConfig, lengths: Mapping[str, int]) -> list[np.ndarray]:
    """Returns the frame weights [T] of every clip whose frames are partly given, from empty latents of one cell a frame.

    Clips that only continue the one before have the weights of the second, which stands for them.  ``lengths`` holds the
    latent frames of every reference.

    Raises:
      ValueError: the mask strategy names what is not there, or has an entry without effect.
    """
    num_latents = latent_size(vae, settings.num_frames, settings.height, settings.width)[0]
    references = [lengths[path] for path in sample.reference_paths]
    entries = conditioning.parse_mask_strategy(sample.strategy)
    for entry in entries:
        _check_entry(entry, sample.strategy, references, settings.loop, num_latents)
    weights = []
    for loop in sorted({entry.loop for entry in entries} | ({1} if settings.loop > 1 else set())):
        latents: list[list[np.ndarray]] = [[_empty(length) for length in [*references, *[num_latents] * max(loop - 1, 0)]]]
        strategies = [sample.strategy]
        if loop:
            latents, strategies = continued(latents, strategies, _empty(num_latents)[None], loop, settings)
        z = _empty(num_latents)[None]
        weights.append(conditioning.apply_mask_strategy(z, latents, strategies, loop, align=settings.align)[1][0])
    return weights


def continued(
    references: Sequence[Sequence[np.ndarray]],
    strategies: Sequence[str],
    latents_BTHWC: np.ndarray,
    loop: int,
    settings: Settings,
) -> tuple[list[list[np.ndarray]], list[str]]:
    """Returns references and strategies by which clip ``loop`` begins with the end of the clip before, given its latents."""
    return conditioning.append_generated(
        references,
        strategies,
        latents_BTHWC,
        loop,
        length=settings.condition_frame_length,
        edit_ratio=settings.condition_frame_edit,
    )


def _empty(num_latents: int) -> np.ndarray:
    return np.zeros((num_latents, 1, 1, 1), np.float32)


def _caption(text: str, settings: Settings) -> str:
    """Returns the caption of a prompt, having looked whether each of its segments holds in some clip."""
    if _MARK.match(text) and not text.startswith("|0|"):
        raise ValueError(f"prompt {text[:60]!r} begins with segments, but not with |0|; expected |0| text |2| text.")
    _, starts = prompt.split_prompt(text)
    beyond = [start for start in starts or () if start >= settings.loop]
    if beyond:
        raise ValueError(
            f"prompt {text[:60]!r} has a segment from clip {beyond[0]} on, but loop is {settings.loop}; set loop to at least "
            f"{max(beyond) + 1}, or leave the segment out."
        )
    caption = prompt.prepare_prompt(text, aes=settings.aes, flow=settings.flow, camera_motion=settings.camera_motion)
    prompt.prompt_at_loop(caption, settings.loop - 1)
    return caption


def _reference_lengths(samples: Iterable[Sample], settings: Settings, vae: VAEConfig) -> dict[str, int]:
    """Returns the latent frames of every reference, each of which was decoded once to its end."""
    paths = dict.fromkeys(itertools.chain.from_iterable(sample.reference_paths for sample in samples))
    return {path: latent_size(vae, conditioning.count_frames(path), settings.height, settings.width)[0] for path in paths}


def _check_entry(
    entry: conditioning.MaskEntry, strategy: str, references: Sequence[int], num_clips: int, num_latents: int
) -> None:
    """Refuses an entry that cannot be followed, or that changes nothing; `apply_mask_strategy` refuses wrong starts."""
    said = f"mask strategy {strategy!r}"
    if not 0 <= entry.edit_ratio <= 1:
        raise ValueError(f"{said} has edit ratio {entry.edit_ratio}; expected 0 (keep) to 1 (generate).")
    if not 0 <= entry.loop < num_clips:
        raise ValueError(f"{said} has an entry for clip {entry.loop} of {num_clips}; expected 0 to {num_clips - 1} (see loop).")
    if entry.length == 0:
        raise ValueError(f"{said} has an entry of 0 latent frames, which changes nothing; expected 1 or more.")
    available = [*references, *[num_latents] * entry.loop]  # later clips may also name the clips before
    if not -len(available) <= entry.reference < len(available):
        there = f"the prompt has {counted(len(references), 'reference')}, numbered from 0"
        raise ValueError(f"{said} names reference {entry.reference}; {there}.")
    longest = max(available[entry.reference], num_latents)
    if entry.length > longest:
        raise ValueError(
            f"{said} has an entry of {entry.length} latent frames, but the clip has {num_latents} and the reference "
            f"{available[entry.reference]}; expected at most {longest}."
        )
