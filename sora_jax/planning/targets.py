"""The hardware that programs are compiled for, by name, with its maker's figures.

Invariant: everything here is a published figure or the compiler's own name for a topology; nothing was measured, and JAX is not
imported.
"""

import dataclasses
import math
import re
from collections.abc import Mapping
from types import MappingProxyType


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """One chip as its data sheet has it.

    Attributes:
      title: its name for people.
      platform: XLA's compiler, ``tpu`` or ``cuda``.
      memory_bytes: of the chip; what programs may use of it is less on a TPU, and the compiler's business.
      bytes_per_s: bandwidth of that memory.
      flops_per_s: products of matrices with float32 sums, by the dtype of the operands; dense, without sparsity.
      topologies: how several chips are named, as an example; the first one is meant where none is named.
      axes: numbers that a topology has.
    """

    title: str
    platform: str
    memory_bytes: int
    bytes_per_s: float
    flops_per_s: Mapping[str, float]
    topologies: tuple[str, ...]
    axes: int


def _tpu(title: str, gib: int, gigabytes_per_s: float, teraflops: float, topologies: tuple[str, ...], axes: int) -> Chip:
    # A float32 product at full precision is six passes of bfloat16 on a TPU (jax.lax.Precision.HIGHEST).
    peak = {"bfloat16": 1e12 * teraflops, "float32": 1e12 * teraflops / 6}
    return Chip(
        title=title,
        platform="tpu",
        memory_bytes=gib * 2**30,
        bytes_per_s=1e9 * gigabytes_per_s,
        flops_per_s=MappingProxyType(peak),
        topologies=topologies,
        axes=axes,
    )


# Source: cloud.google.com/tpu/docs (v5e, v5p, v6e); NVIDIA H100 data sheet, SXM5 (float32 outside the tensor cores).
CHIPS: Mapping[str, Chip] = MappingProxyType(
    {
        "v5e": _tpu("TPU v5e", 16, 819.0, 197.0, ("2x2", "2x4", "4x4", "8x8"), 2),
        "v6e": _tpu("TPU v6e", 32, 1640.0, 918.0, ("2x2", "2x4"), 2),
        "v5p": _tpu("TPU v5p", 95, 2765.0, 459.0, ("2x2x1", "2x2x2"), 3),
        "h100": Chip(
            title="NVIDIA H100 80GB",
            platform="cuda",
            memory_bytes=84_929_347_584,
            bytes_per_s=3.35e12,
            flops_per_s=MappingProxyType({"bfloat16": 989.4e12, "float32": 66.9e12}),
            topologies=("1x1x1", "1x1x8", "1x4x8"),
            axes=3,
        ),
    }
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
    """A chip and the topology it is one of; ``topology`` is as the compiler names it, without the chip.

    With a ``mesh`` programs are for all devices of the topology together.
    """

    chip_name: str
    topology: str
    mesh: str | None = None

    @property
    def num_devices(self) -> int:
        """Devices of the topology."""
        return math.prod(int(number) for number in self.topology.split("x"))

    @property
    def chip(self) -> Chip:
        """The chip's figures."""
        return CHIPS[self.chip_name]

    @property
    def text(self) -> str:
        """How a user names the target."""
        return f"{self.chip_name}:{self.topology}"

    @property
    def title(self) -> str:
        """What programs are compiled for, for people."""
        if self.mesh is not None:
            return f"each {self.chip.title} of {self.text} in the mesh {self.mesh}"
        return f"one {self.chip.title} of {self.text}"


def parse_target(text: str) -> Target:
    """Returns the target that a name such as ``v5e:4x4`` or ``h100`` means.

    Without a topology it is the smallest that the compiler knows.  Three numbers of an H100 are slices, hosts of a slice and
    devices of a host.

    Raises:
      ValueError: the chip is unknown, or the topology is not of its form.
    """
    name, colon, topology = text.partition(":")
    if name not in CHIPS:
        raise ValueError(
            f"target {text!r} is unknown; expected {', '.join(CHIPS)}, or one of them with a topology, as v5e:4x4."
        )
    chip = CHIPS[name]
    if not colon:
        return Target(chip_name=name, topology=chip.topologies[0])
    if not re.fullmatch(r"[1-9]\d{0,3}(x[1-9]\d{0,3})*", topology) or topology.count("x") + 1 != chip.axes:
        example = f"{name}:{chip.topologies[-1]}"
        raise ValueError(f"target {text!r} has topology {topology!r}; expected {chip.axes} numbers, as {example}.")
    return Target(chip_name=name, topology=topology)
