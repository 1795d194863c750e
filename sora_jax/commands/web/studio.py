"""One model, one computation at a time: clips made in a thread of their own, with progress, and stopped when asked.

Invariant: a clip is what `sora-jax generate` makes of the same settings, bit for bit, and its file is complete or not there.  A
computation whose reader went away goes on and its clip is kept.  No HTML is known here.
"""

import contextlib
import dataclasses
import itertools
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sora_jax import shell
from sora_jax.commands.beyond import beyond
from sora_jax.commands.web.form import Request
from sora_jax.commands.web.gallery import SERVED, Galleries, Gallery
from sora_jax.commands.web.made import Made, light
from sora_jax.commands.web.preview import enlarged
from sora_jax.pipeline.clip import Clip
from sora_jax.pipeline.pipeline import Pipeline
from sora_jax.pipeline.run import Progress
from sora_jax.pipeline.samples import refuse_idle
from sora_jax.streaming.profile import Profile

_MAX_FRAME_VALUES = 2**27  # of the pixels of a clip that a visitor may ask for


class Cancelled(Exception):
    """The person who asked for a clip wants it no longer."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
    """How far a computation is."""

    stage: str
    step: int = 0
    num_steps: int = 0
    left_s: float | None = None
    picture: np.ndarray | None = None
    made: Any = None  # `Made`, or a `Comparison`
    failure: str | None = None

    @property
    def text(self) -> str:
        """One line for the person who waits."""
        if self.failure is not None:
            return self.failure
        if self.made is not None:
            return f"done: {self.made.summary}"
        if self.stage != "denoise":
            return f"{self.stage} ..."
        left = "" if self.left_s is None else f", about {self.left_s:.0f} s left"
        return f"step {self.step} of {self.num_steps}{left}"


class Studio:
    """An open pipeline, the folder of its clips, and the computation that runs.

    Args:
      pipeline: makes the clips.
      folder: keeps them.
      previews: folder where the map of previews is kept; None: it is fitted for this process.
      recipes: files of recipes that visitors may choose, by name.
    """

    def __init__(
        self, pipeline: Pipeline, folder: Path, *, previews: Path | None = None, recipes: Mapping[str, Path] | None = None
    ):
        self.recipes = recipes or {}
        self.pipeline, self.folder, self._previews = pipeline, folder, previews
        self.galleries = Galleries(folder / SERVED)
        self._computing = threading.Lock()
        self._asked = itertools.count()
        self._owners: dict[int, Gallery] = {}  # of the computations that run or wait
        self._cancelled: set[int] = set()
        self._closed = False
        self._last = max((int(path.stem[5:]) for path in folder.glob("clip_*.mp4") if path.stem[5:].isdecimal()), default=0)

    def cancel(self, gallery: Gallery) -> bool:
        """Asks a visitor's computations to end at their next step; returns whether there are any."""
        own = [number for number, owner in list(self._owners.items()) if owner is gallery]
        self._cancelled.update(own)
        return bool(own)

    def close(self) -> None:
        """Ends every computation at its next step, without a word: the process ends."""
        self._closed = True

    def make(self, request: Request, gallery: Gallery) -> Iterator[Step]:
        """Yields the steps of making a clip for a visitor; the last one has the clip, or the failure in one line."""
        return self.steps(lambda watch: self.keep(request, self.clip_of(request, watch, gallery), gallery), gallery)

    def steps(self, work: Callable[[Callable[[Step], None]], Any], gallery: Gallery) -> Iterator[Step]:
        """Yields what a visitor's ``work`` reports, then what it returns or why it failed; works wait for each other."""
        steps: queue.Queue[Step] = queue.Queue()
        this = next(self._asked)
        self._owners[this] = gallery

        def watch(step: Step) -> None:
            if self._closed or this in self._cancelled:
                raise Cancelled
            steps.put(step)

        def run() -> None:
            try:
                with self._computing:
                    made = work(watch)
                steps.put(Step(stage="done", made=made))
            except Cancelled:
                steps.put(Step(stage="cancelled", failure="cancelled; nothing was written."))
            except BaseException as error:  # a page shows every failure in one line, as the command line does
                steps.put(Step(stage="failed", failure=f"error: {shell.describe(error)}"))
            finally:
                del self._owners[this]
                self._cancelled.discard(this)

        threading.Thread(target=run, daemon=True).start()
        while True:
            step = steps.get()
            with contextlib.suppress(queue.Empty):
                while step.made is None and step.failure is None:  # a slow reader sees the newest
                    step = steps.get_nowait()
            yield step
            if step.made is not None or step.failure is not None:
                return

    def keep(self, request: Request, clip: Clip, gallery: Gallery) -> Made:
        """Returns the clip as a file of the folder, listed in a visitor's gallery."""
        number = self._last + 1
        (path,) = clip.save(self.folder / f"clip_{number:04d}.mp4")
        self._last = number
        notes = beyond(self.pipeline, self.pipeline.resolve(request.options), [clip.parameters[0]["prompt"]])
        made = Made(number=number, path=path, request=request, clip=light(clip), notes=tuple(notes))
        gallery.add(made)
        return made

    def clip_of(self, request: Request, report: Callable[[Step], Any], gallery: Gallery) -> Clip:
        """Returns the clip of a request, checked as `sora-jax generate` checks it.

        Raises:
          ValueError: a setting, the prompt or the reference is wrong; nothing was computed.
        """
        pipeline = self.pipeline
        settings = pipeline.resolve(request.options)
        values = 3 * settings.loop * settings.num_frames * settings.height * settings.width
        if values > _MAX_FRAME_VALUES:
            raise ValueError(f"{values / 1e6:,.0f} million values are more than a page makes; ask for fewer or smaller frames.")
        pipeline.check(settings)
        samples = pipeline.read(request.prompt, settings, references=request.reference, mask_strategies=request.strategy)
        refuse_idle(request.options, samples, settings)
        if pipeline.networks.budget is not None:
            gallery.profile = pipeline.networks.profile = Profile()
        report(Step(stage="prepare"))
        pipeline.prepare_preview(self._previews)
        return pipeline.generate(samples, settings, callback=_Watch(report))


class _Watch:
    """A callback of the pipeline that turns its progress into steps, with a preview and the time that is left."""

    def __init__(self, report: Callable[[Step], Any]):
        self._report, self._began = report, 0.0

    def __call__(self, progress: Progress) -> None:
        done, total = progress.loop * progress.num_steps + progress.step, progress.num_loops * progress.num_steps
        left = None
        if progress.stage == "denoise":
            if progress.step == 0 and progress.loop == 0:
                self._began = time.monotonic()
            elif done:
                left = (time.monotonic() - self._began) / done * (total - done)
        picture = None if progress.carry is None else enlarged(progress.preview())
        self._report(Step(stage=progress.stage, step=done, num_steps=total, left_s=left, picture=picture))
