"""A bar for the stages and steps of a generation.

Invariant: the bar is drawn on standard error and leaves no line behind.  The pipeline decides what to report.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

from tqdm import tqdm

_BAR = "{desc} {percentage:3.0f}% |{bar:24}| step {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}]"


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
