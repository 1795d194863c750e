"""What the compiler says of one program, and what follows from the chip's data sheet.

Invariant: every figure is the compiler's, counted from its program, or arithmetic with published figures; an estimate is called
one, and nothing is called measured.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from sora_jax.planning.targets import Target

PREALLOCATED = 0.75  # of an NVIDIA GPU's memory, which is what JAX takes unless XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise


@dataclasses.dataclass(frozen=True, kw_only=True)
class Estimate:
    """The least time that a chip's data sheet allows: the longer of computing and moving.

    Attributes:
      seconds: of what is counted.
      compute_s: operations over the peak of the dtype.
      memory_s: bytes over the bandwidth.
    """

    seconds: float
    compute_s: float
    memory_s: float

    @property
    def bound(self) -> str:
        """What takes that time."""
        return "computing" if self.compute_s >= self.memory_s else "memory"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """A program that was compiled, or refused for want of memory; bytes are of one device.

    Attributes:
      target: the hardware.
      program: its name, see `request.PROGRAMS`.
      what: what it computes, in words.
      counted: what operations and moved bytes are counted of.
      times: how often one clip runs what is counted.
      operations: floating-point operations of its products and convolutions.
      compile_s: seconds that compiling took on this machine.
      compile_cpu_s: of the processor.
      attention: the form of every attention of a pair of blocks, by name; empty for other networks.
      refused: the compiler's own message, where it says that the memory does not suffice.
      argument_bytes: weights and inputs.
      output_bytes: results.
      temporary_bytes: arrays in between, all that are reserved.
      code_bytes: of the program itself.
      peak_bytes: most that exists at the same time, arguments and results included.
      moved_bytes: read from and written to the device's memory by all operations.
      compilers_count: the compiler's own operations and bytes, where it has them; each loop counts once there.
      loops: loops whose number of turns is decided while the program runs.
      dtypes: element types of all arrays.
      host_transfers: operations that exchange data with the host.
      collectives: operations between devices, by kind: their number and bytes.
    """

    target: Target
    program: str
    what: str
    counted: str
    times: int
    operations: int | float
    compile_s: int | float
    compile_cpu_s: int | float
    attention: Mapping[str, str] = dataclasses.field(default_factory=dict)
    refused: str | None = None
    argument_bytes: int | None = None
    output_bytes: int | None = None
    temporary_bytes: int | None = None
    code_bytes: int | None = None
    peak_bytes: int | None = None
    moved_bytes: int | None = None
    compilers_count: Mapping[str, int | float] = dataclasses.field(default_factory=dict)
    loops: int = 0
    dtypes: Sequence[str] = ()
    host_transfers: Sequence[str] = ()
    collectives: Mapping[str, Mapping[str, int]] = dataclasses.field(default_factory=dict)

    @property
    def fits(self) -> bool:
        """Whether the program fits one device: the compiler accepts it, and its peak is within the chip's memory."""
        return self.peak_bytes is not None and self.peak_bytes <= self.target.chip.memory_bytes

    @property
    def why(self) -> str:
        """Why it does not fit, or what has to be set so that it does; empty: nothing."""
        memory = self.target.chip.memory_bytes
        if self.refused:
            return self.refused
        if self.peak_bytes is None or self.peak_bytes > memory:
            return f"its peak is above the {memory / 1e9:.1f} GB of the chip; the compiler did not refuse it"
        if self.target.chip.platform == "cuda" and self.peak_bytes > PREALLOCATED * memory:
            return (
                f"set XLA_PYTHON_CLIENT_MEM_FRACTION above {self.peak_bytes / memory:.2f}: JAX takes {PREALLOCATED} by itself"
            )
        return ""

    def estimate(self, dtype: str) -> Estimate | None:
        """Returns the roofline's time for what is counted, computed in ``dtype``; None where nothing was compiled."""
        if self.moved_bytes is None:
            return None
        compute_s = self.operations / self.target.chip.flops_per_s[dtype]
        memory_s = self.moved_bytes / self.target.chip.bytes_per_s
        return Estimate(seconds=max(compute_s, memory_s), compute_s=compute_s, memory_s=memory_s)

    def fields(self, dtype: str) -> dict[str, Any]:
        """Returns everything as JSON-ready values."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "target"}
        estimate = self.estimate(dtype)
        return {
            "compiled_for": self.target.title,
            **values,
            "dtypes": list(self.dtypes),
            "host_transfers": list(self.host_transfers),
            "fits": self.fits,
            "why": self.why,
            "estimate": None if estimate is None else {**dataclasses.asdict(estimate), "bound": estimate.bound},
        }
