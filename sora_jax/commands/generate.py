"""``sora-jax generate``: from the command line to files, with progress.

Invariant: everything that can be refused is refused before a network is loaded, and what needs no network before JAX is
imported.  Clip n of a run has the seed ``--seed`` + n whatever the batch size, so that a run resumed in the middle makes the
same clips.
"""

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from sora_jax import files, shell
from sora_jax.commands import options, preview_file, processes
from sora_jax.commands.beyond import beyond
from sora_jax.commands.jobs import Job, Naming, batches, decoded_paths, plan_jobs, refuse_shared
from sora_jax.commands.progress import progress_bar
from sora_jax.commands.prompts import read_prompts
from sora_jax.commands.spelling import Spelling
from sora_jax.commands.user_cache import caption_folder, preview_folder, use_compile_cache
from sora_jax.devices import guard
from sora_jax.devices.axes import check_mesh_request, parse_axes
from sora_jax.devices.shares import ALL, Share, parse_share
from sora_jax.pipeline import command_line
from sora_jax.pipeline.clip_options import OPTIONS, ClipOptions, Options, SamplingOptions
from sora_jax.pipeline.frame_size import frames_size
from sora_jax.pipeline.latents_file import check_latents_target, read_parameters
from sora_jax.pipeline.model_file import ModelFile
from sora_jax.pipeline.option import Option, declared
from sora_jax.pipeline.settings import Settings
from sora_jax.shell import counted, note
from sora_jax.streaming.budget import parse_budget

if TYPE_CHECKING:
    from sora_jax.pipeline.clip import Clip
    from sora_jax.pipeline.pipeline import Pipeline

# What goes with --from-latents.
_WITH_LATENTS = {
    "from_latents", "model", "start_index", "memory_budget", "output", "save_dir", "sample_name", "prompt_as_path", "format",
    "overwrite", "quiet", "caption_cache", "compile_cache", "attention", "mesh",
}  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class What(options.PromptFile):
    """What clips show."""

    prompts: Annotated[
        tuple[str, ...],
        Option("Caption; '|0| ... |1| ...' for loops, JSON at its end.", metavar="PROMPT", positional=True, repeats=True),
    ] = ()
    num_sample: Annotated[int, Option("Clips for each prompt.", metavar="N", within=(1, 10**9))] = 1
    reference_path: Annotated[
        tuple[str, ...],
        Option("Reference images or videos; repeat it for each prompt.", metavar="FILE[;FILE]", repeats=True),
    ] = ()
    mask_strategy: Annotated[
        tuple[str, ...],
        Option(
            "Where they go, loop,reference,start,target start,length,edit;...; once for each prompt.",
            metavar="GROUPS",
            repeats=True,
        ),
    ] = ()
    from_latents: Annotated[str | None, Option("Decode a file of --save-latents, and generate nothing.", metavar="NPZ")] = None
    model: Annotated[
        str | None, Option("Model directory or its URL, or pocket: the embedded model, which is the default.", metavar="DIR")
    ] = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Running(options.MemoryBudget, options.Attention, options.Devices):
    """How the computation runs."""

    batch_size: Annotated[int, Option("Clips in a batch.", metavar="N", within=(1, 10**6))] = 1
    dry_run: Annotated[
        bool, Option("Say what would be made: sizes, tokens, evaluations, memory, time and files; make nothing.")
    ] = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Where(Naming, options.Writing, options.CompileCache):
    """Where files go."""

    save_latents: Annotated[Path | None, Option("Write the latents before they are decoded.", metavar="NPZ")] = None
    profile_streaming: Annotated[
        Path | None, Option("Write a Chrome trace of reading and computing the layers.", metavar="FILE")
    ] = None
    preview: Annotated[
        Path | None,
        Option("After every step, write what the clip will look like, in place of the last one; .png or .gif.", metavar="FILE"),
    ] = None
    preview_every: Annotated[
        int | None, Option("Write the preview after every N-th step only.", metavar="N", within=(1, 10**6))
    ] = None
    caption_cache: Annotated[
        str | None,
        Option(
            "Folder of caption features (default: in the user's cache, for models too large to stay in memory).",
            metavar="DIR|off",
        ),
    ] = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments(What, Running, Spelling, Where):
    """What the command line asks for."""

    clip: Options


GROUPS: Mapping[str, command_line.Group] = {
    "what": declared(What),
    "how (defaults are the model's)": {**command_line.of_clip(*declared(ClipOptions)), **declared(Running)},
    "fewer evaluations": {**command_line.of_clip(*declared(SamplingOptions)), **declared(Spelling)},
    "where": declared(Where),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """What is made: the jobs, all with the same settings but for their seeds, by a model that is not open yet."""

    asked: Arguments
    model: ModelFile
    settings: Settings
    jobs: Sequence[Job]


def command(arguments: Sequence[str]) -> int | None:
    """Reads the command line and makes clips; returns the exit code where another process makes them."""
    parser = command_line.make_parser("sora-jax generate", "Makes clips from prompts.", GROUPS)
    clip = {**command_line.of_clip(*declared(ClipOptions)), **command_line.of_clip(*declared(SamplingOptions))}
    asked = command_line.read(parser, arguments, Arguments, clip)
    if not processes.is_guard(asked) or asked.dry_run or asked.from_latents:
        run(asked)
        return None
    _check_together(asked)
    folders = {asked.folder} | ({asked.save_latents.parent} if asked.save_latents else set())
    return processes.supervise("generate", arguments, folders)


def run(asked: Arguments) -> None:
    """Makes and writes the clips that are asked for, printing each path to standard output.

    Raises:
      ValueError: an option is wrong or without effect; nothing was loaded.
      OSError: an input cannot be read, or a file not be written.
    """
    _check_together(asked)
    if asked.dry_run and not asked.from_latents:
        rehearse(resolve(asked))
        return
    paths = (asked.output, asked.save_latents, asked.profile_streaming, asked.preview)
    folders = {asked.folder, *(path.parent for path in paths if path)}
    if asked.from_latents:
        work = functools.partial(decode, decoding(asked))
    elif asked.distributed:
        work = functools.partial(make_together, asked)
    else:
        work = functools.partial(make, resolve(asked))
    use_compile_cache(asked.compile_cache)
    with guard.failures_told():
        shell.interruptibly(work, lambda: files.remove_partial(*folders))


def resolve(asked: Arguments) -> Request:
    """Returns what is to be made, after everything was refused that can be without JAX.

    Raises:
      ValueError: an option is wrong or without effect, or no clip can have its name.
      OSError: an input cannot be read, or a file not be written.
    """
    texts = read_prompts(asked, asked.prompts)
    references = _each("--reference-path", asked.reference_path, texts)
    strategies = _each("--mask-strategy", asked.mask_strategy, texts)
    clip = asked.spelt_out(asked.clip)
    model = ModelFile.read(asked.model)
    settings = model.resolve(clip)
    settings.check_room(min(asked.batch_size, len(texts) * asked.num_sample))
    share = ALL if asked.share is None else parse_share(asked.share)
    prompts = list(zip(texts, references, strategies, strict=True))
    plan = functools.partial(_planned, asked, prompts, share, image=settings.num_frames == 1)
    jobs = processes.jobs_of_the_writer(plan) if asked.distributed and not asked.dry_run else plan()
    _check_targets(asked)
    if asked.mesh is not None:
        check_mesh_request(parse_axes(asked.mesh), guided=settings.guided, num_clips=asked.batch_size)
    if not asked.quiet:
        if len(asked.prompts) > 1 and not any(len(text.split()) > 1 for text in asked.prompts):
            note(f"{len(asked.prompts)} prompts of one word each; put a prompt of several words in quotes.")
        left_out = share.number_of(len(texts) * asked.num_sample, asked.batch_size) - len(jobs)
        if left_out:
            note(f"{counted(left_out, 'clip')} exist already or are asked for twice; making {len(jobs)}.")
        if "resolution" in clip or "aspect_ratio" in clip:
            rows, columns = frames_size(settings.height, settings.width)
            note(f"clips have {rows} rows and {columns} columns of pixels (aspect ratios are height:width).")
    return Request(asked=asked, model=model, settings=settings, jobs=jobs)


def _planned(asked: Arguments, prompts: Sequence[tuple[str, str, str]], share: Share, *, image: bool) -> list[Job]:
    """Returns the clips to make, each of which can be written, as can the other files.

    Raises:
      ValueError: no clip can have its name, or two files have the same.
      OSError: a file exists, or cannot be written.
    """
    jobs = plan_jobs(
        asked,
        prompts,
        num_samples=asked.num_sample,
        first=asked.start_index,
        image=image,
        overwrite=asked.overwrite,
        share=share,
        group=asked.batch_size,
    )
    if asked.save_latents:
        if len(jobs) > asked.batch_size:
            raise ValueError("--save-latents names one file, for one batch; raise --batch-size to the number of clips.")
        check_latents_target(asked.save_latents, overwrite=asked.overwrite)
    others = {
        "--save-latents": asked.save_latents,
        "--profile-streaming": asked.profile_streaming,
        "--preview": asked.preview,
    }
    refuse_shared([job.path for job in jobs], others)
    return jobs


def _check_together(asked: Arguments) -> None:
    """Refuses options that contradict each other or have no effect alone, before processes join.

    Raises:
      ValueError: says which, and what is expected.
    """
    asked.check()
    asked.check_devices()
    if asked.memory_budget is not None:
        parse_budget(asked.memory_budget)
        if asked.mesh is not None:
            raise ValueError(
                "--memory-budget streams weights into one device; it does not go with --mesh: leave one of them out."
            )
    elif asked.profile_streaming:
        raise ValueError("--profile-streaming records how layers are streamed; it needs --memory-budget.")
    if asked.preview is None and asked.preview_every is not None:
        raise ValueError("--preview-every says when previews are written; it needs --preview FILE.")
    if asked.preview is not None and asked.distributed:
        raise ValueError("--preview is written by a process alone; it does not go with --distributed: leave one of them out.")


def _check_targets(asked: Arguments) -> None:
    """Refuses files on the way that cannot be written.

    Raises:
      ValueError: a name has a suffix that cannot be.
      OSError: a file exists, or cannot be written.
    """
    if asked.profile_streaming:
        files.check_target(asked.profile_streaming, overwrite=asked.overwrite)
    if asked.preview is not None:
        preview_file.check(asked.preview, overwrite=asked.overwrite)


def rehearse(request: Request) -> None:
    """Prints what a request would make; raises what `make` would, as far as no network is needed for it."""
    if not request.jobs:
        return
    import jax

    from sora_jax.commands.dry_run import describe
    from sora_jax.devices.compute_dtype import choose_dtype

    asked = request.asked
    dtype = choose_dtype(request.settings.dtype, platform=jax.default_backend())
    lines = describe(
        request.model,
        dataclasses.replace(request.settings, dtype=dtype),
        request.jobs,
        clip=asked.clip,
        batch_size=asked.batch_size,
        memory_budget=asked.memory_budget,
        attention=asked.attention or "auto",
    )
    shell.result("\n".join(lines))


def make_together(asked: Arguments) -> None:
    """Joins the other processes of the mesh, and makes with them what is asked for.

    Raises:
      ValueError, OSError: as `resolve` and `make`.
      RuntimeError: another process failed.
    """
    writes = processes.join(asked)
    make(resolve(asked if writes else dataclasses.replace(asked, quiet=True)))


def make(request: Request) -> None:
    """Makes and writes the clips of a request, one batch after the other; where processes do it together, one writes.

    Raises:
      ValueError: a prompt, reference or mask strategy is wrong, or the budget too small; nothing was loaded.
      OSError: a file cannot be read or written.
    """
    asked, settings, jobs = request.asked, request.settings, request.jobs
    if not jobs:
        return
    from sora_jax.devices import hosts
    from sora_jax.pipeline.samples import refuse_idle

    pipeline = opened(asked, request.model)
    settings = pipeline.networks.decide(settings)
    pipeline.check(settings, min(asked.batch_size, pipeline.networks.whole_batch(len(jobs))))
    samples = pipeline.read(
        [job.text for job in jobs],
        settings,
        references=[job.reference for job in jobs],
        mask_strategies=[job.strategy for job in jobs],
    )
    refuse_idle(asked.clip, samples, settings)
    if not asked.quiet:
        note_what_is_beyond(pipeline, settings, [sample.prompt for sample in samples])
    profile = None
    if asked.profile_streaming:
        from sora_jax.streaming.profile import Profile

        profile = pipeline.networks.profile = Profile()
    if asked.preview is not None:
        pipeline.prepare_preview(preview_folder())
    rows = iter(samples)
    for batch in batches(jobs, asked.batch_size):
        paths = [job.path for job in batch]
        with contextlib.ExitStack() as claims:
            hosts.decided(functools.partial(claims.enter_context, files.claimed(*paths)))
            with progress_bar(asked.quiet) as callback:
                clip = pipeline.generate(
                    list(itertools.islice(rows, len(batch))),
                    settings.with_seed(settings.seed + batch[0].number),
                    latents_path=asked.save_latents,
                    overwrite=asked.overwrite,
                    callback=_previewing(asked, settings, callback),
                )
            hosts.decided(functools.partial(save, asked, clip, paths))
    if profile is not None and asked.profile_streaming:
        profile.save(asked.profile_streaming, overwrite=asked.overwrite)


def _previewing(asked: Arguments, settings: Settings, callback: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Returns the callback, with the preview that was asked for."""
    if asked.preview is None:
        return callback
    seconds = settings.num_frames / settings.save_fps
    return preview_file.writing(asked.preview, asked.preview_every or 1, seconds, callback)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decoding:
    """Latents that are decoded, by a model that is not open yet, to ``paths``."""

    asked: Arguments
    model: ModelFile
    latents: str
    paths: Sequence[Path]


def decoding(asked: Arguments) -> Decoding:
    """Returns what is to be decoded, after everything was refused that can be without JAX.

    Raises:
      ValueError: an option has no effect on latents, or their file is damaged.
      OSError: the file cannot be read, or a clip not be written.
    """
    latents = str(asked.from_latents)
    own = [each for each in declared(Arguments).values() if each.name not in _WITH_LATENTS]
    flags = [each.called for each in own if getattr(asked, each.name) != each.default]
    flags += [OPTIONS[name].called for name in asked.clip]
    if flags:
        raise ValueError(f"--from-latents decodes what the file holds; it does not go with {' and '.join(flags)}.")
    model = ModelFile.read(asked.model)
    paths = decoded_paths(asked, read_parameters(latents), latents, first=asked.start_index, overwrite=asked.overwrite)
    return Decoding(asked=asked, model=model, latents=latents, paths=paths)


def decode(request: Decoding) -> None:
    """Decodes latents and writes their clips."""
    asked = request.asked
    pipeline = opened(asked, request.model)
    with files.claimed(*request.paths):
        with progress_bar(asked.quiet) as callback:
            clip = pipeline.resume(request.latents, callback=callback)
        save(asked, clip, request.paths)


def opened(asked: Arguments, model: ModelFile) -> "Pipeline":
    """Returns the pipeline of the model; a text encoder that stays loaded needs no cache of captions, unless one is named."""
    from sora_jax.pipeline.pipeline import Pipeline
    from sora_jax.storage.checkpoint import shortened

    cache = caption_folder(asked.caption_cache)
    pipeline = Pipeline.open(
        model,
        memory_budget=asked.memory_budget,
        caption_cache=cache,
        attention=asked.attention or "auto",
        mesh=asked.mesh,
        weights=asked.weights or "replicated",
    )
    whole = pipeline.networks.whole_parameters()
    if whole and not asked.quiet:
        note(f"these weights stay whole on every device, whose number does not divide them: {shortened(whole)}.")
    if asked.caption_cache is None and pipeline.networks.keep:
        pipeline.networks.caption_cache = None
    return pipeline


def save(asked: Arguments, clip: "Clip", paths: Sequence[Path]) -> None:
    """Writes the samples of a clip and prints their paths."""
    for sample, path in enumerate(paths):
        clip.save(path, sample=sample, overwrite=asked.overwrite)
        shell.result(path)
    if not asked.quiet:
        note(", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in clip.timings.items()))


def note_what_is_beyond(pipeline: "Pipeline", settings: Settings, prompts: Sequence[str]) -> None:
    """Says which words the model does not know, and what of the request lies outside what it was trained for."""
    for line in beyond(pipeline, settings, prompts):
        note(line)
    note_dtype(settings)


def note_dtype(settings: Settings) -> None:
    """Says where the compute dtype may be slow on this device."""
    import jax

    from sora_jax.devices.compute_dtype import dtype_note

    slow = dtype_note(settings.dtype, platform=jax.default_backend())
    if slow:
        note(slow)


def _each(flag: str, values: Sequence[str], texts: Sequence[str]) -> Sequence[str]:
    if not values:
        return [""] * len(texts)
    if len(values) != len(texts):
        given = f"{counted(len(values), 'text')} for {counted(len(texts), 'prompt')}"
        raise ValueError(f"{flag} got {given}; give one for each ('' for none).")
    return values
