"""One model, one computation at a time: clips made in a thread of their own, with progress, and stopped when asked.

Invariant: a clip is what `sora-jax generate` makes of the same settings, bit for bit, and its file is complete or not there.  A
computation whose reader went away goes on and its clip is kept.  No HTML is known here.
"""

import contextlib
import dataclasses
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sora_jax import shell
from sora_jax.commands.web.form import Request
from sora_jax.commands.web.preview import preview
from sora_jax.pipeline.clip import Clip
from sora_jax.pipeline.pipeline import Pipeline
from sora_jax.pipeline.run import Progress
from sora_jax.pipeline.samples import refuse_idle
from sora_jax.streaming.profile import Profile

_MAX_FRAME_VALUES = 2**27  # of the pixels of a clip that a visitor may ask for
_MAX_LISTED = 200  # clips that the page remembers; the files of older ones stay


class Cancelled(Exception):
    """The person who asked for a clip wants it no longer."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Made:
    """A clip on disk, and the request that it answers."""

    number: int
    path: Path
    request: Request
    clip: Clip

    @property
    def title(self) -> str:
        """One line for a list of clips."""
        return f"{self.number}: {self.request.prompt[:60]} (seed {self.clip.parameters[0]['seed']})"

    @property
    def summary(self) -> str:
        """One line on what it took."""
        clip = self.clip
        _, frames, height, width = clip.frames.shape[:4]
        evaluations = 0 if clip.evaluations_B is None else float(clip.evaluations_B[0])
        taken = ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in clip.timings.items())
        return f"{frames} frames of {height} x {width}, {evaluations:g} evaluations; {taken}"


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
    """An open pipeline, the folder of its clips, and the computation that runs."""

    def __init__(self, pipeline: Pipeline, folder: Path):
        self.pipeline, self.folder = pipeline, folder
        self.made: list[Made] = []
        self.profile: Profile | None = None
        self._computing, self._running = threading.Lock(), threading.Event()
        self._cancelled: set[int] = set()
        self._started = self._current = 0
        self._last = max((int(path.stem[5:]) for path in folder.glob("clip_*.mp4") if path.stem[5:].isdecimal()), default=0)

    def cancel(self) -> bool:
        """Asks the computation that runs to end at its next step; returns whether one does."""
        if not self._running.is_set():
            return False
        self._cancelled.add(self._current)
        return True

    def make(self, request: Request) -> Iterator[Step]:
        """Yields the steps of making a clip; the last one has the clip, or the failure in one line."""
        return self.steps(lambda watch: self.keep(request, self.clip_of(request, watch)))

    def find(self, number: int | None) -> Made | None:
        """Returns the clip of a number, if the page remembers it."""
        return next((made for made in self.made if made.number == number), None)

    def steps(self, work: Callable[[Callable[[Step], None]], Any]) -> Iterator[Step]:
        """Yields what ``work`` reports, and at last what it returns, or why it failed; works wait for each other."""
        steps: queue.Queue[Step] = queue.Queue()

        def run() -> None:
            try:
                with self._computing:
                    steps.put(Step(stage="done", made=self._watched(work, steps.put)))
            except Cancelled:
                steps.put(Step(stage="cancelled", failure="cancelled; nothing was written."))
            except BaseException as error:  # a page shows every failure in one line, as the command line does
                steps.put(Step(stage="failed", failure=f"error: {shell.describe(error)}"))

        threading.Thread(target=run, daemon=True).start()
        while True:
            step = steps.get()
            with contextlib.suppress(queue.Empty):
                while step.made is None and step.failure is None:  # a slow reader sees the newest
                    step = steps.get_nowait()
            yield step
            if step.made is not None or step.failure is not None:
                return

    def _watched(self, work: Callable[[Callable[[Step], None]], Any], report: Callable[[Step], None]) -> Any:
        """Returns what ``work`` does; `cancel` ends it at its next report."""
        self._started += 1
        self._current = this = self._started
        self._running.set()

        def watch(step: Step) -> None:
            if this in self._cancelled:
                raise Cancelled
            report(step)

        try:
            return work(watch)
        finally:
            self._running.clear()
            self._cancelled.discard(this)

    def keep(self, request: Request, clip: Clip) -> Made:
        """Returns the clip as a file of the folder, listed on the page."""
        number = self._last + 1
        (path,) = clip.save(self.folder / f"clip_{number:04d}.mp4")
        self._last = number
        made = Made(number=number, path=path, request=request, clip=_light(clip))
        self.made = [*self.made[-_MAX_LISTED + 1 :], made]
        return made

    def clip_of(self, request: Request, report: Callable[[Step], Any]) -> Clip:
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
            self.profile = pipeline.networks.profile = Profile()
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
        picture = None if progress.carry is None else preview(progress.carry)
        self._report(Step(stage=progress.stage, step=done, num_steps=total, left_s=left, picture=picture))


def _light(clip: Clip) -> Clip:
    """Returns the clip without its pixels, of which the file holds the record; its shape stays."""
    return dataclasses.replace(
        clip, frames=np.broadcast_to(np.uint8(0), clip.frames.shape), latents=np.broadcast_to(np.float32(0), clip.latents.shape)
    )


def numbers(made: Sequence[Made]) -> list[tuple[str, int]]:
    """Returns the clips of a list, newest first, each with its number."""
    return [(one.title, one.number) for one in reversed(made)]
