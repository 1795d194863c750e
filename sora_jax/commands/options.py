"""Options that several commands take, declared once.

Invariant: nothing is done with them here; a command's own options are declared in its module.
"""

import dataclasses
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptFile:
    """Prompts from a file."""

    prompt_path: Annotated[str | None, Option("Read prompts from a file, one a line.", metavar="FILE")] = None
    start_index: Annotated[
        int,
        Option("First line of the file to use, from 0; names and seeds count from it.", metavar="N", within=(0, 10**9)),
    ] = 0
    end_index: Annotated[int | None, Option("Line of the file to stop before.", metavar="N", within=(0, 10**9))] = None
