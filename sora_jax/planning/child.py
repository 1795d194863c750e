"""The process that compiles, for hardware that this machine need not have.

``python -m sora_jax.planning.child``: the request is the first line of standard input; when standard input ends, whoever
asked is gone and so is this process.  Events go to standard output, a JSON object each: a program that begins, what the
compiler says of it, or the error that ends all.

Invariant: no array is made and no device is used: programs are traced and compiled from shapes, with JAX on the CPU.
"""

import contextlib
import importlib.util
import json
import os
import re
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding

from sora_jax import layout
from sora_jax.devices.axes import parse_axes
from sora_jax.devices.mesh import make_mesh
from sora_jax.planning import h100, operations
from sora_jax.planning.compiled_text import CompiledText
from sora_jax.planning.programs import Program, programs
from sora_jax.planning.request import Request
from sora_jax.planning.targets import Target

_CUDA_PLUGINS = ("xla_cuda13", "xla_cuda12")
_NO_CUDNN = re.compile(r"cuDNN (is )?not (found|detected)")  # what JAX says
_EXHAUSTED = "RESOURCE_EXHAUSTED"
_MAX_REASON = 400  # characters of the compiler's message; what follows lists its largest buffers

Tell = Callable[[Mapping[str, Any]], Any]


class MissingCompilerError(ValueError):
    """The compiler of a platform is not installed; the message holds the pip line."""


def compile_all(request: Request, tell: Tell) -> None:
    """Compiles the programs of a request, telling what begins and what came of it.

    Raises:
      ValueError: the request is wrong, or the compiler is not installed.
    """
    target = request.hardware
    require_compiler(target.chip.platform)
    devices = _devices(target)
    mesh = None if request.mesh is None else _mesh(request.mesh, devices)
    try:
        for program in programs(request, "gpu" if target.chip.platform == "cuda" else "tpu"):
            tell({"event": "begins", "program": program.name, "what": program.what})
            tell({"event": "compiled", **compiled(program, devices[0] if mesh is None or not program.spread else mesh)})
    except RuntimeError as error:
        if not _NO_CUDNN.search(str(error)):
            raise
        raise MissingCompilerError(
            f"{sys.executable} has no cuDNN, whose attention these programs hold ({_first_line(error)}); install it there "
            "with: pip install nvidia-cudnn-cu12, or ask for --attention chunked"
        ) from error


def require_compiler(platform: str) -> None:
    """Refuses to go on where the compiler of a platform is missing from this environment.

    Raises:
      MissingCompilerError: says what to install.
    """
    if platform == "tpu" and importlib.util.find_spec("libtpu") is None:
        raise MissingCompilerError(
            f"{sys.executable} has no libtpu, which compiles for TPUs; install it there, or in an environment of its own "
            "that --python names, with: pip install 'sora_jax[ahead]'"
        )
    if platform == "cuda" and not _has_cuda():
        version = jax.__version__
        raise MissingCompilerError(
            f"{sys.executable} has no CUDA plugin of JAX, which compiles for NVIDIA GPUs; install it in an environment of "
            f"its own that --python names, with: pip install sora_jax jax-cuda12-plugin=={version} jax-cuda12-pjrt=={version}"
        )


def _has_cuda() -> bool:
    if importlib.util.find_spec("jax_plugins") is None:
        return False
    return any(importlib.util.find_spec(f"jax_plugins.{name}") is not None for name in _CUDA_PLUGINS)


def _mesh(text: str, devices: Sequence[Any]) -> Mesh:
    sizes = parse_axes(text)
    return make_mesh(Mesh(np.array(devices).reshape(list(sizes.values())), tuple(sizes)))


def _devices(target: Target) -> Sequence[Any]:
    """Returns the devices of the target's topology, as the compiler describes them.

    Raises:
      ValueError: the compiler knows no such topology.
    """
    try:
        if target.chip.platform == "tpu":
            found = topologies.get_topology_desc(platform="tpu", topology_name=target.text)
        else:
            found = topologies.get_topology_desc(platform="cuda", target_config=h100.DESCRIPTION, topology=target.topology)
    except Exception as error:  # of any kind: the plug-in's own
        raise ValueError(f"the compiler knows no {target.text}: {_first_line(error)}") from error
    return found.devices


def compiled(program: Program, place: Any) -> dict[str, Any]:
    """Returns what the compiler says of a program for a device or a mesh, or why it refuses it for want of memory."""
    on_mesh = isinstance(place, Mesh)
    arguments = jax.tree.map(
        lambda leaf, spec: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=NamedSharding(place, spec) if on_mesh else SingleDeviceSharding(place)
        ),
        program.arguments,
        layout.parameters(program.arguments),
    )
    with jax.set_mesh(place) if on_mesh else contextlib.nullcontext():
        traced = jax.jit(program.function).trace(*arguments)
        lowered = traced.lower()
    row = {
        "program": program.name,
        "what": program.what,
        "counted": program.counted,
        "times": program.times,
        "attention": dict(program.attention),
        "operations": operations.operations(traced.jaxpr),
    }
    began, cpu_began = time.monotonic(), time.process_time()
    refused = None
    try:
        executable = lowered.compile()
    except Exception as error:  # jax.errors.JaxRuntimeError, which also stands for the compiler's own faults
        if _EXHAUSTED not in str(error):
            raise
        refused = " ".join(str(error).split())[:_MAX_REASON]
    row |= {"compile_s": time.monotonic() - began, "compile_cpu_s": time.process_time() - cpu_began, "refused": refused}
    return row if refused else {**row, **_analysed(executable)}


def _analysed(executable: Any) -> dict[str, Any]:
    """Returns the compiler's account of memory, and what stands in the program."""
    memory, cost, text = executable.memory_analysis(), executable.cost_analysis() or {}, CompiledText(executable.as_text())
    return {
        "argument_bytes": memory.argument_size_in_bytes,
        "output_bytes": memory.output_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "code_bytes": memory.generated_code_size_in_bytes,
        "peak_bytes": memory.peak_memory_in_bytes,
        "moved_bytes": text.moved_bytes(),
        "compilers_count": {name: cost[key] for name, key in (("flops", "flops"), ("bytes", "bytes accessed")) if key in cost},
        "loops": text.loops(),
        "dtypes": sorted(text.dtypes()),
        "host_transfers": text.host_transfers(),
        "collectives": {one.kind: {"number": one.number, "bytes": one.nbytes} for one in text.collectives()},
    }


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:_MAX_REASON]


def _channel() -> Tell:
    """Returns what writes events for the process that asked; whatever else is printed goes to standard error."""
    lines = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def tell(event: Mapping[str, Any]) -> None:
        lines.write(json.dumps(event) + "\n")
        lines.flush()

    return tell


def _end_with_the_asker() -> None:
    def wait() -> None:
        while os.read(sys.stdin.fileno(), 4096):
            pass
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def main() -> int:
    """Compiles what standard input asks for."""
    tell = _channel()
    line = sys.stdin.readline()
    _end_with_the_asker()
    try:
        compile_all(Request.from_json(line), tell)
    except Exception as error:
        message = str(error) if isinstance(error, ValueError) else _first_line(error)
        report = {"kind": type(error).__name__, "input": isinstance(error, ValueError), "message": message}
        tell({"event": "error", **report, "traceback": traceback.format_exc()})
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
