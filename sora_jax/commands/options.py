"""Options that several commands take, declared once.

Invariant: nothing is done with them here; a command's own options are declared in its module.
"""

import dataclasses
import re
from typing import Annotated

from sora_jax.devices.axes import WEIGHTS, check_weights, parse_axes
from sora_jax.devices.names import ATTENTIONS
from sora_jax.devices.shares import parse_share
from sora_jax.pipeline.option import Option


@dataclasses.dataclass(frozen=True, kw_only=True)
class Writing:
    """How files are written."""

    overwrite: Annotated[bool, Option("Replace what exists.")] = False
    quiet: Annotated[bool, Option("No progress and no notes.")] = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompileCache:
    """Where compiled programs are kept."""

    compile_cache: Annotated[
        str | None, Option("Folder of compiled programs (default: in the user's cache).", metavar="DIR|off")
    ] = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class MemoryBudget:
    """What the process may hold."""

    memory_budget: Annotated[
        str | None,
        Option("Memory that the process may hold, such as 3.3GB; layers are then read as they run.", metavar="SIZE|auto"),
    ] = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Attention:
    """How attention is computed."""

    attention: Annotated[
        str | None,
        Option(
            "Form of attention: auto (the default) chooses by device, dtype and size; cudnn runs on NVIDIA GPUs, flash on "
            "TPUs, both in bfloat16.",
            choices=ATTENTIONS,
        ),
    ] = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Devices:
    """Which devices compute, and which clips."""

    mesh: Annotated[
        str | None,
        Option(
            "Devices that make a batch of clips together, as guidance=2,sequence=4; axes: data, guidance, sequence.",
            metavar="AXES",
        ),
    ] = None
    weights: Annotated[
        str | None,
        Option("The transformer's weights on a mesh: replicated (the default), or spread over its devices.", choices=WEIGHTS),
    ] = None
    distributed: Annotated[
        bool,
        Option("The mesh has devices of several processes, each of which runs this command (SLURM, Open MPI, TPU pods, GKE)."),
    ] = False
    coordinator: Annotated[
        str | None, Option("Without such a launcher: address and a free port of process 0.", metavar="HOST:PORT")
    ] = None
    num_processes: Annotated[
        int | None, Option("Without such a launcher: how many processes there are.", metavar="N", within=(1, 10**6))
    ] = None
    process_id: Annotated[
        int | None, Option("Without such a launcher: which of them this is, from 0.", metavar="I", within=(0, 10**6))
    ] = None
    share: Annotated[
        str | None,
        Option("Make the I-th of N shares of the clips, 0 <= I < N: replicas that share nothing.", metavar="I/N"),
    ] = None

    def check_devices(self) -> None:
        """Refuses what contradicts itself or has no effect, without JAX.

        Raises:
          ValueError: says which option.
        """
        check_weights(self.weights or WEIGHTS[0], self.mesh)
        if self.mesh is not None:
            parse_axes(self.mesh)
        if self.share is not None:
            parse_share(self.share)
        self._check_processes()

    def _check_processes(self) -> None:
        """Refuses processes without a mesh, and half of what tells them."""
        told = {
            "--coordinator": self.coordinator,
            "--num-processes": self.num_processes,
            "--process-id": self.process_id,
        }
        present = [flag for flag, value in told.items() if value is not None]
        if present and not self.distributed:
            raise ValueError(f"{present[0]} tells processes of one mesh apart; it needs --distributed.")
        if present and len(present) < len(told):
            absent = " and ".join(flag for flag, value in told.items() if value is None)
            raise ValueError(f"{present[0]} goes with {absent}; name all three, or none where a launcher tells them.")
        if self.distributed and self.mesh is None:
            raise ValueError("--distributed makes one mesh of several processes' devices; it needs --mesh.")
        if self.process_id is not None and self.num_processes is not None and self.process_id >= self.num_processes:
            raise ValueError(
                f"--process-id is {self.process_id} of {self.num_processes} processes; expected 0 to {self.num_processes - 1}."
            )
        if self.coordinator is not None and not re.fullmatch(r".+:\d{1,5}", self.coordinator):
            raise ValueError(f"--coordinator is {self.coordinator!r}; expected address and port, as 10.0.0.1:8476.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptFile:
    """Prompts from a file."""

    prompt_path: Annotated[str | None, Option("Read prompts from a file, one a line.", metavar="FILE")] = None
    start_index: Annotated[
        int,
        Option("First line of the file to use, from 0; names and seeds count from it.", metavar="N", within=(0, 10**9)),
    ] = 0
    end_index: Annotated[int | None, Option("Line of the file to stop before.", metavar="N", within=(0, 10**9))] = None
