"""``--distributed``: a command as one of several processes whose devices make a mesh together.

The command that a user starts is a guard (``devices.guard``); it runs itself once more as the worker, which joins the others.

Invariant: which clips are made is decided by the process that writes them, and the same for all, whatever files the others see.
"""

import dataclasses
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from sora_jax import files
from sora_jax.commands import options
from sora_jax.commands.jobs import Job
from sora_jax.devices import guard


def is_guard(asked: options.Devices) -> bool:
    """Returns whether this process is to guard a worker, instead of being one or alone."""
    return asked.distributed and guard.Channel.of_worker() is None


def supervise(command: str, arguments: Sequence[str], folders: Iterable[Path]) -> int:
    """Runs a command of ``sora-jax`` as the worker of this process and returns the exit code.

    Args:
      command: its name.
      arguments: its arguments.
      folders: where it writes; what it had begun to write there is removed if it dies.
    """

    def clean_up() -> None:
        for folder in folders:
            files.remove_leftovers(folder)

    return guard.supervise([sys.executable, "-m", "sora_jax", command, *arguments], clean_up=clean_up)


def join(asked: options.Devices) -> bool:
    """Joins the other processes, and returns whether this one writes; only that one has notes and progress.

    Raises:
      ValueError: nothing tells how many processes there are.
      RuntimeError: the others cannot be reached.
    """
    import jax

    from sora_jax.devices import hosts

    hosts.join(asked.coordinator, asked.num_processes, asked.process_id)
    return jax.process_index() == hosts.WRITER


def jobs_of_the_writer(plan: Callable[[], Sequence[Job]]) -> list[Job]:
    """Returns in every process the jobs that the one that writes plans; raises in every process what it raises there."""
    from sora_jax.devices import hosts

    told = hosts.decided(lambda: [{**dataclasses.asdict(job), "path": str(job.path)} for job in plan()])
    return [Job(**{**fields, "path": Path(fields["path"])}) for fields in told]
