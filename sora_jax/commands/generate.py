"""``sora-jax generate``: from parsed options to files, with progress.

Invariant: everything that can be refused is refused before a network is loaded, and clip n of a run has the seed
``--seed`` + n whatever the batch size, so that a run resumed in the middle makes the same clips.
"""

import argparse
import contextlib
import dataclasses
import hashlib
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from sora_jax import files
from sora_jax.commands.user_cache import caption_folder, use_compile_cache
from sora_jax.inputs import prompt
from sora_jax.pipeline import video
from sora_jax.shell import note

_SETTINGS = (
    "num_steps guidance preset solver shift plan merge_steps height width resolution aspect_ratio num_frames fps save_fps aes "
    "flow camera_motion loop condition_frame_length condition_frame_edit align dtype"
).split()
_BAR = "{desc} {percentage:3.0f}% |{bar:24}| step {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}]"
_MAX_CLIPS = 100_000  # every name is looked up before the first clip is made
_MAX_NAME_BYTES = 200  # file systems take 255; suffixes and temporary names need the rest


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """One clip to make: clip ``number`` of the run, from a prompt with its references, to ``path``."""

    number: int
    text: str
    reference: str
    strategy: str
    path: Path


def run(options: argparse.Namespace) -> None:
    """Makes and writes the clips that the options ask for, printing each path to standard output.

    Raises:
      ValueError: an option is invalid; nothing was loaded.
      OSError: an input cannot be read, or a file not be written.
    """
    warnings.showwarning = _show_warning
    if options.from_latents:
        _check_latents_options(options)
    _check_profile(options)
    texts = [] if options.from_latents else read_prompts(options)
    use_compile_cache(options.compile_cache)

    from sora_jax.pipeline.pipeline import Pipeline
    from sora_jax.pipeline.run import read_inputs
    from sora_jax.streaming.profile import Profile

    captions = caption_folder(options.caption_cache)
    pipeline = Pipeline.from_pretrained(options.model, memory_budget=options.memory_budget, caption_cache=captions)
    if options.caption_cache is None and pipeline.networks.keep:
        pipeline.networks.caption_cache = None  # the text encoder stays loaded, and is small
    if options.from_latents:
        _decode(options, pipeline)
        return
    given = {name: getattr(options, name) for name in _SETTINGS} | {"leap": _leap(options), "merge": _merge(options)}
    settings = pipeline.resolve({**given, "seed": options.seed})
    pipeline.check(settings, min(options.batch_size, len(texts) * options.num_sample))
    jobs = plan_jobs(options, texts, image=settings.num_frames == 1)
    if not options.quiet:
        _note_what_is_left_out(options, texts, jobs)
    if len(jobs) > options.batch_size:  # else the one call refuses what is wrong
        for text, reference, strategy in dict.fromkeys((job.text, job.reference, job.strategy) for job in jobs):
            read_inputs([text], [reference], [strategy], 1, settings)
    profile = pipeline.networks.profile = Profile() if options.profile_streaming else None
    for batch in batches(jobs, options.batch_size):
        with progress_bar(options.quiet) as callback:
            clip = pipeline(
                [job.text for job in batch],
                references=[job.reference for job in batch],
                mask_strategies=[job.strategy for job in batch],
                seed=(settings.seed + batch[0].number) % 2**32,
                latents_path=options.save_latents,
                overwrite=options.overwrite,
                callback=callback,
                **given,
            )
        _save(options, clip, [job.path for job in batch])
    if profile is not None:
        profile.save(options.profile_streaming, overwrite=options.overwrite)


def _note_what_is_left_out(options: argparse.Namespace, texts: Sequence[str], jobs: Sequence[Job]) -> None:
    left_out = len(texts) * options.num_sample - len(jobs)
    if left_out:
        note(f"{left_out} clips exist already or are asked for twice; making {len(jobs)}.")
    if options.model is None:
        _hint(texts)


def _leap(options: argparse.Namespace) -> Any:
    """Returns the leap that the options name; None where they name none."""
    if not options.leap_extrapolate:
        return options.leap
    from sora_jax.pipeline.sampling import leap_rule

    rule = leap_rule("off" if options.leap is None else options.leap)
    if rule is None:
        raise ValueError("--leap-extrapolate says how to leap, but nothing leaps; give --leap N or --leap dynamic as well.")
    return dataclasses.replace(rule, extrapolate=True)


def _merge(options: argparse.Namespace) -> Any:
    """Returns what the options merge; None where they say nothing of it."""
    given = {
        "odd": options.merge_odd,
        "rope_positions": options.merge_positions,
        "keys_values_only": options.merge_keys_values_only or None,
    }
    if options.merge_attentions is not None:
        attentions = ("spatial", "temporal", "cross")
        chosen = options.merge_attentions.split(",")
        strange = sorted(set(chosen) - set(attentions))
        if strange:
            raise ValueError(f"--merge-attentions names {', '.join(map(repr, strange))}; expected of spatial,temporal,cross.")
        given |= {name: name in chosen for name in attentions}
    given = {name: value for name, value in given.items() if value is not None}
    if not given:
        return None
    from sora_jax.networks.merging import Merge

    return Merge(**given)


def read_prompts(options: argparse.Namespace, how: str = "a prompt in quotes") -> list[str]:
    """Returns the prompts of the command line or of the file; ``how`` tells how the command line takes them.

    Raises:
      ValueError: there is none, or one is no text, or a line of the file is empty.
    """
    if options.prompts and options.prompt_path:
        raise ValueError("got prompts and --prompt-path; give one of them.")
    if options.start_index < 0 or (options.end_index is not None and options.end_index < 0):
        raise ValueError("--start-index and --end-index count from 0; got a negative one.")
    if options.prompt_path:
        try:
            texts = prompt.load_prompts(options.prompt_path, options.start_index, options.end_index)
        except UnicodeDecodeError as error:
            raise ValueError(f"{options.prompt_path} is not a text file in UTF-8 ({error}).") from error
        last = "the end" if options.end_index is None else options.end_index
        where = f" in {options.prompt_path}, lines {options.start_index} to {last}"
    else:
        texts, where = options.prompts, ""
    if not texts:
        raise ValueError(f"no prompt{where}; give {how}, or --prompt-path FILE.")
    for index, text in enumerate(texts, start=options.start_index):
        which = f"prompt {index}{where and f' of {options.prompt_path}'}"
        if options.prompt_path and not text.strip():
            raise ValueError(f"{which} is empty; write one, or give an empty prompt as '' on the command line.")
        if not files.is_utf8(text):
            raise ValueError(f"{which} is not text in UTF-8: {text!r}.")
    return texts


def plan_jobs(options: argparse.Namespace, texts: Sequence[str], *, image: bool) -> list[Job]:
    """Returns the clips to make and where they go, having made sure that they can go there.

    Raises:
      ValueError: options contradict each other.
      FileExistsError: a clip exists and --overwrite was not given.
      OSError: a folder cannot be written.
    """
    references = _each("--reference-path", options.reference_path, texts)
    strategies = _each("--mask-strategy", options.mask_strategy, texts)
    _check_names(options, texts)
    jobs: list[Job] = []
    planned: set[Path] = set()
    for i, (text, reference, strategy) in enumerate(zip(texts, references, strategies, strict=True)):
        for sample in range(options.num_sample):
            path = options.output or _numbered_path(options, options.start_index + i, text, sample, image)
            if options.prompt_as_path and (path in planned or (path.exists() and not options.overwrite)):
                continue
            planned.add(path)
            number = (options.start_index + i) * options.num_sample + sample
            jobs.append(Job(number=number, text=text, reference=reference, strategy=strategy, path=path))
    for job in jobs:
        video.check_target(job.path, 1 if image else 2, overwrite=options.overwrite)
    files.refuse_unwritable(options.output.parent if options.output else options.save_dir)
    return jobs


def _check_names(options: argparse.Namespace, texts: Sequence[str]) -> None:
    """Refuses options that name too few files for the clips, or none that can be."""
    num_clips = len(texts) * options.num_sample
    if options.num_sample < 1 or options.batch_size < 1:
        raise ValueError("--num-sample and --batch-size must be at least 1.")
    if num_clips > _MAX_CLIPS:
        raise ValueError(f"{num_clips} clips are asked for; expected at most {_MAX_CLIPS} in a run: lower --num-sample.")
    if options.output and num_clips > 1:
        raise ValueError(f"--output names one file, but {num_clips} clips are asked for; use --save-dir.")
    if options.prompt_as_path and not options.output and not all(text.strip() for text in texts):
        raise ValueError("--prompt-as-path names clips by their prompts, of which one is empty; leave it out or use --output.")
    if os.sep in (options.sample_name or ""):
        raise ValueError(f"--sample-name {options.sample_name!r} holds {os.sep!r}; name the folder with --save-dir.")
    if options.save_latents and num_clips > options.batch_size:
        raise ValueError("--save-latents names one file, for one batch; raise --batch-size to the number of clips.")


def batches(jobs: Sequence[Job], size: int) -> Iterator[Sequence[Job]]:
    """Yields groups of at most ``size`` jobs with consecutive numbers: the seeds of a batch are consecutive."""
    group: list[Job] = []
    for job in jobs:
        if group and (len(group) == size or job.number != group[-1].number + 1):
            yield group
            group = []
        group.append(job)
    if group:
        yield group


def _each(option: str, values: Sequence[str] | None, texts: Sequence[str]) -> Sequence[str]:
    if values is None:
        return [""] * len(texts)
    if len(values) != len(texts):
        raise ValueError(f"{option} got {len(values)} texts for {len(texts)} prompts; give one for each ('' for none).")
    return values


def _numbered_path(options: argparse.Namespace, index: int, text: str, sample: int, image: bool) -> Path:
    """Returns where a clip goes that --output does not name; without --prompt-as-path a name that is free."""
    kind = options.format or ("png" if image else "mp4")
    suffix = "" if kind == "png" and not image else f".{kind}"  # frames go into a folder of PNGs
    name = prompt.sample_path(
        "",
        index=index,
        prompt=text,
        prompt_as_path=options.prompt_as_path,
        name=options.sample_name,
        num_samples=options.num_sample,
        sample=sample,
    )
    path = options.save_dir / (_short(name) + suffix)
    return path if options.prompt_as_path or options.overwrite else files.numbered(path, video.sidecar)


def _short(name: str) -> str:
    """Returns a name that file systems accept; a long one ends in a digest of the whole."""
    name = "".join(character if character.isprintable() else "_" for character in name).lstrip(".") or "_"
    if len(name.encode()) <= _MAX_NAME_BYTES:
        return name
    digest = hashlib.sha256(name.encode()).hexdigest()[:12]
    return name.encode()[: _MAX_NAME_BYTES - 13].decode(errors="ignore") + "-" + digest


def _check_profile(options: argparse.Namespace) -> None:
    path = options.profile_streaming
    if path is None:
        return
    if options.memory_budget is None or options.from_latents:
        raise ValueError("--profile-streaming records how layers are streamed; it needs --memory-budget and a prompt.")
    files.check_target(path, overwrite=options.overwrite)


def _check_latents_options(options: argparse.Namespace) -> None:
    names = ("prompts", "prompt_path", "save_latents", "seed", "leap", "reference_path", "mask_strategy", *_SETTINGS)
    given = [name for name in names if getattr(options, name) not in (None, [])]
    if given:
        raise ValueError(f"--from-latents decodes what the file holds; it does not go with {' and '.join(given)}.")


def _decode(options: argparse.Namespace, pipeline: Any) -> None:
    from sora_jax.pipeline.clip import load_latents

    _, parameters = load_latents(options.from_latents)
    if options.output and len(parameters) > 1:
        raise ValueError(f"--output names one file, but {options.from_latents} holds {len(parameters)} clips; use --save-dir.")
    image = all(sample.get("num_frames") == 1 for sample in parameters)
    paths = [
        options.output or _numbered_path(options, options.start_index + i, str(sample.get("prompt", "")), 0, image)
        for i, sample in enumerate(parameters)
    ]
    if len(set(paths)) < len(paths):
        raise ValueError(f"{options.from_latents} holds several clips of one prompt; leave --prompt-as-path out.")
    for path in paths:
        video.check_target(path, 1 if image else 2, overwrite=options.overwrite)
    files.refuse_unwritable(options.output.parent if options.output else options.save_dir)
    with progress_bar(options.quiet) as callback:
        clip = pipeline.resume(options.from_latents, callback=callback)
    _save(options, clip, paths)


def _save(options: argparse.Namespace, clip: Any, paths: Sequence[Path]) -> None:
    for sample, path in enumerate(paths):
        clip.save(path, sample=sample, overwrite=options.overwrite)
        sys.stdout.write(f"{path}\n")
        sys.stdout.flush()
    if not options.quiet:
        note(", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in clip.timings.items()))


def _hint(texts: Sequence[str]) -> None:
    """Says which words the pocket model knows, where a prompt goes beyond them."""
    from sora_jax.pocket.world import captions

    segments = [segment for text in texts for segment in prompt.split_prompt(prompt.extract_json(text)[0])[0]]
    for hint in dict.fromkeys(captions.parse(segment).hint for segment in segments):
        if hint:
            note(hint)


@contextlib.contextmanager
def progress_bar(quiet: bool) -> Iterator[Any]:
    """Yields a pipeline callback that shows the stage, and while sampling the step, time and remaining time."""
    with tqdm(total=1, bar_format="{desc}", desc="open", disable=quiet, leave=False) as bar:

        def show(progress: Any) -> None:
            done, total = progress.loop * progress.num_steps + progress.step, progress.num_steps * progress.num_loops
            if progress.stage == "denoise" and (bar.total != total or done == 0):
                bar.reset(total)  # the remaining time counts from the first step
            bar.bar_format = _BAR if progress.stage == "denoise" else "{desc}"
            bar.n = done
            bar.set_description_str(progress.stage)

        yield show


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    note(f"warning: {' '.join(str(message).split())}")
