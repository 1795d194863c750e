"""Which clips a run makes, with which seeds, and where each one goes.

Invariant: a job's path can be written, and no two jobs of a run, or other files of it, have the same one; numbers, and with
them seeds, do not depend on the batch size or on clips that exist already.  Nothing is made here.
"""

import dataclasses
import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from sora_jax import files
from sora_jax.devices.shares import ALL, Share
from sora_jax.inputs import prompt
from sora_jax.pipeline import video
from sora_jax.pipeline.option import Option

_MAX_CLIPS = 100_000  # every name is looked up before the first clip is made
_MAX_NAME_BYTES = 200  # file systems take 255; suffixes and temporary names need the rest


@dataclasses.dataclass(frozen=True, kw_only=True)
class Naming:
    """How clips are named."""

    output: Annotated[
        Path | None,
        Option(
            "Output file of a single clip: .mp4 .gif .png .npz, or a folder of PNGs.", flags=("-o", "--output"), metavar="PATH"
        ),
    ] = None
    save_dir: Annotated[Path | None, Option("Folder of numbered clips (default: this one).", metavar="DIR")] = None
    sample_name: Annotated[str | None, Option("How names of numbered clips begin (default: sample).", metavar="NAME")] = None
    prompt_as_path: Annotated[
        bool, Option("Name clips by their prompts, and leave out those that exist: a run goes on where it ended.")
    ] = False
    format: Annotated[
        str | None, Option("Format of numbered clips (default: mp4; png for images).", choices=("mp4", "gif", "png", "npz"))
    ] = None

    def check(self) -> None:
        """Refuses names that contradict each other, or of which one has no effect.

        Raises:
          ValueError: says which.
        """
        if os.sep in (self.sample_name or ""):
            raise ValueError(f"--sample-name {self.sample_name!r} holds {os.sep!r}; name the folder with --save-dir.")
        if self.output is None:
            return
        if str(self.output) == "-":
            raise ValueError("--output - is no file, and standard output holds paths only; name a file.")
        beside = {"--save-dir": self.save_dir, "--sample-name": self.sample_name}
        for flag, value in beside.items():
            if value is not None:
                raise ValueError(f"{flag} names numbered clips, but --output names the one clip; leave one of them out.")
        suffix = self.output.suffix.lower().removeprefix(".")
        if self.format is not None and suffix != self.format and not (self.format == "png" and not suffix):
            raise ValueError(f"--format {self.format} contradicts the suffix of --output {self.output}; leave --format out.")

    @property
    def folder(self) -> Path:
        """Where clips go."""
        return self.output.parent if self.output else self.save_dir or Path()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """One clip to make: clip ``number`` of the run, from a prompt with its references, to ``path``."""

    number: int
    text: str
    reference: str
    strategy: str
    path: Path


def plan_jobs(
    naming: Naming,
    prompts: Sequence[tuple[str, str, str]],
    *,
    num_samples: int,
    first: int,
    image: bool,
    overwrite: bool,
    share: Share = ALL,
    group: int = 1,
) -> list[Job]:
    """Returns the clips to make and where they go, all of which can go there.

    Args:
      naming: how they are named.
      prompts: text, references and mask strategy of each.
      num_samples: clips of each prompt.
      first: number of the first prompt.
      image: whether clips are single images.
      overwrite: whether they replace what exists.
      share: which of the clips to make.
      group: clips with consecutive numbers that stay together in a share.

    Raises:
      ValueError: there are too many clips for their names.
      FileExistsError: a clip exists and is not to be replaced.
    """
    num_clips = len(prompts) * num_samples
    if num_clips > _MAX_CLIPS:
        raise ValueError(f"{num_clips} clips are asked for; expected at most {_MAX_CLIPS} in a run: lower --num-sample.")
    if naming.output and num_clips > 1:
        raise ValueError(f"--output names one file, but {num_clips} clips are asked for; use --save-dir.")
    if naming.prompt_as_path and not naming.output and not all(text.strip() for text, _, _ in prompts):
        raise ValueError("--prompt-as-path names clips by their prompts, of which one is empty; leave it out or use --output.")
    jobs: list[Job] = []
    planned: set[Path] = set()
    for i, (text, reference, strategy) in enumerate(prompts, start=first):
        for sample in range(num_samples):
            at = {"index": i, "num_samples": num_samples, "sample": sample}
            mine = share.has((i - first) * num_samples + sample, group)
            if not mine and not naming.prompt_as_path:
                continue
            path = naming.output or _numbered_path(naming, text, at, image=image, overwrite=overwrite)
            if naming.prompt_as_path and path in planned:
                continue
            planned.add(path)
            if not mine or (naming.prompt_as_path and path.exists() and not overwrite):
                continue
            jobs.append(Job(number=i * num_samples + sample, text=text, reference=reference, strategy=strategy, path=path))
    check_targets(naming, [job.path for job in jobs], image=image, overwrite=overwrite)
    return jobs


def decoded_paths(
    naming: Naming, samples: Sequence[Mapping[str, Any]], source: str, *, first: int, overwrite: bool
) -> list[Path]:
    """Returns where the clips of a latents file go, from the parameters of its samples.

    Raises:
      ValueError: the file holds several clips for one name.
      FileExistsError: a clip exists and is not to be replaced.
    """
    if naming.output and len(samples) > 1:
        raise ValueError(f"--output names one file, but {source} holds {len(samples)} clips; use --save-dir.")
    image = all(sample.get("num_frames") == 1 for sample in samples)
    paths = []
    for i, sample in enumerate(samples, start=first):
        at = {"index": i, "num_samples": 1, "sample": 0}
        text = str(sample.get("prompt", ""))
        paths.append(naming.output or _numbered_path(naming, text, at, image=image, overwrite=overwrite))
    if len(set(paths)) < len(paths):
        raise ValueError(f"{source} holds several clips of one prompt; leave --prompt-as-path out.")
    check_targets(naming, paths, image=image, overwrite=overwrite)
    return paths


def check_targets(naming: Naming, paths: Sequence[Path], *, image: bool, overwrite: bool) -> None:
    """Refuses paths at which no clip can be written.

    Raises:
      ValueError: a suffix does not fit.
      FileExistsError: one exists and is not to be replaced.
      OSError: the folder cannot be written.
    """
    for path in paths:
        video.check_target(path, 1 if image else 2, overwrite=overwrite)
    files.refuse_unwritable(naming.folder)


def refuse_shared(clips: Sequence[Path], others: Mapping[str, Path | None]) -> None:
    """Refuses another file of the run at the path of a clip, of its JSON, or of a third file.

    Raises:
      ValueError: says which; the clip would be lost when it is written.
    """
    taken = {os.path.realpath(path): f"the clip {path}" for clip in clips for path in (clip, video.sidecar(clip))}
    for flag, path in others.items():
        if path is None:
            continue
        if (owner := taken.get(os.path.realpath(path))) is not None:
            raise ValueError(f"{flag} {path} is also the file of {owner}; choose another name.")
        taken[os.path.realpath(path)] = flag


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


def _numbered_path(naming: Naming, text: str, at: Mapping[str, int], *, image: bool, overwrite: bool) -> Path:
    """Returns where a clip goes that --output does not name; without --prompt-as-path a name that is free."""
    kind = naming.format or ("png" if image else "mp4")
    suffix = "" if kind == "png" and not image else f".{kind}"  # frames go into a folder of PNGs
    name = prompt.sample_path("", prompt=text, prompt_as_path=naming.prompt_as_path, name=naming.sample_name, **at)
    path = naming.folder / (_short(name) + suffix)
    return path if naming.prompt_as_path or overwrite else files.numbered(path, video.sidecar)


def _short(name: str) -> str:
    """Returns a name that file systems accept; a long one ends in a digest of the whole."""
    name = "".join(character if character.isprintable() else "_" for character in name).lstrip(".") or "_"
    if len(name.encode()) <= _MAX_NAME_BYTES:
        return name
    digest = hashlib.sha256(name.encode()).hexdigest()[:12]
    return name.encode()[: _MAX_NAME_BYTES - 13].decode(errors="ignore") + "-" + digest
