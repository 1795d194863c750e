"""Memory and traffic of an evaluation of STDiT3-XL/2 on meshes of TPUs and H100s, as their compilers say, without any of them.

Command:  python -m benchmarks.memory.meshes_ahead [--json FILE]
Needs:    no accelerator and no weights; the compilers of docs/devices.md, in the interpreters that SORA_JAX_TPU_PYTHON and
          SORA_JAX_CUDA_PYTHON name.  10 to 60 seconds of the processor for each cell.  Cells that the file holds are not
          compiled again.
Expect:   720p, 51 frames: at most 3 GB a device on 16 v5e; 720p, 204 frames: at most 4 GB on 32 H100; the bytes of the
          exchanges equal the formula.
Rival:    the same evaluation on one device, as compiled_ahead.json has it.

Nothing is measured.  Rows are the compiler's account of one device.  The estimate of scaling divides operations and bytes by
data sheets' figures: the longer of computing and memory, and the exchanges on top of it, because nothing is there to compute
while tokens change places.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks._support.cells import complete, results_path
from benchmarks.memory import compiled_ahead
from benchmarks.memory.compiled_ahead import MODEL, SIZES
from sora_jax.config import open_sora_1_2
from sora_jax.devices.axes import parse_axes
from sora_jax.networks.vae.codec import latent_size
from sora_jax.planning.ahead import AheadError, compile_ahead
from sora_jax.planning.request import Request
from sora_jax.planning.targets import CHIPS, parse_target

COMMAND = "python -m benchmarks.memory.meshes_ahead"
RESULTS = Path(__file__).parents[1] / "results" / "meshes_ahead.json"
ONE = "one"
HALF_BYTES = 2  # of a number in bfloat16

# One way, a device.  Sources: NVIDIA H100 data sheet (NVLink 900 GB/s both ways); DGX H100 (one 400 Gb/s adapter a GPU);
# cloud.google.com/tpu/docs/v5e (400 GB/s both ways, over four links).
NVLINK, NETWORK, V5E = 450e9, 50e9, 200e9
GPUS_OF_A_HOST = 8


class Cell(NamedTuple):
    """One evaluation on one mesh."""

    target: str
    mesh: str
    size: str
    num_frames: int
    weights: str = "replicated"


GOALS = (
    Cell("v5e:4x4", "guidance=2,sequence=8", "720p", 51),
    Cell("v5e:8x8", "guidance=2,sequence=32", "720p", 51),
    Cell("h100:1x1x8", "guidance=2,sequence=4", "720p", 51),
    Cell("h100:1x4x8", "guidance=2,sequence=16", "720p", 204),
    Cell("h100:1x1x8", "guidance=2,sequence=4", "720p", 51, "spread"),
    Cell("v5e:4x4", "guidance=2,sequence=8", "720p", 51, "spread"),
)
SCALING = {
    "h100": (
        ("h100", ONE),
        ("h100:1x1x2", "guidance=2"),
        ("h100:1x1x4", "guidance=2,sequence=2"),
        ("h100:1x1x8", "guidance=2,sequence=4"),
        ("h100:1x2x8", "guidance=2,sequence=8"),
        ("h100:1x4x8", "guidance=2,sequence=16"),
    ),
    "v5e": (
        ("v5e:4x4", ONE),
        ("v5e:2x2", "guidance=2,sequence=2"),
        ("v5e:2x4", "guidance=2,sequence=4"),
        ("v5e:4x4", "guidance=2,sequence=8"),
        ("v5e:4x8", "guidance=2,sequence=16"),
        ("v5e:8x8", "guidance=2,sequence=32"),
    ),
}


def cells() -> Iterator[Cell]:
    """Yields what is compiled, the goals first, each once."""
    scaling = (Cell(target, mesh, "720p", 51) for meshes in SCALING.values() for target, mesh in meshes)
    yield from dict.fromkeys((*GOALS, *scaling))


def main() -> None:
    """Compiles the cells that are missing, and writes each as it comes."""
    complete(results_path(__doc__, RESULTS), list(cells()), compiled, COMMAND)


def compiled(cell: Cell) -> dict[str, Any]:
    """Returns the row of a cell: the compiler's account of one device, or the error that ended it."""
    if cell.mesh == ONE:
        alone = compiled_ahead.Cell(cell.target, "evaluation", cell.size, cell.num_frames, "bfloat16", "chunked")
        known = {compiled_ahead.Cell(**row["cell"]): row for row in json.loads(compiled_ahead.RESULTS.read_text())["rows"]}
        return _row(cell, known[alone]["outcome"])
    height, width = SIZES[cell.size]
    request = Request(
        model=MODEL,
        target=cell.target,
        options={"height": height, "width": width, "num_frames": cell.num_frames, "dtype": "bfloat16"},
        attention="chunked",
        programs=("evaluation",),
        mesh=cell.mesh,
        weights=cell.weights,
    )
    try:
        (outcome,) = compile_ahead(request)
    except AheadError as error:
        return {"cell": cell._asdict(), "error": str(error), "outcome": None}
    return _row(cell, outcome.fields("bfloat16"))


def _row(cell: Cell, outcome: Mapping[str, Any]) -> dict[str, Any]:
    row = {"cell": cell._asdict(), "error": None, "outcome": outcome, "formula_bytes": formula_bytes(cell)}
    return row if outcome["refused"] else {**row, "estimate": estimate(cell, outcome)}


def formula_bytes(cell: Cell) -> int:
    """Returns what a device brings to the two exchanges of every pair, docs/devices.md's formula."""
    axes, config = _axes(cell), open_sora_1_2
    each = axes["sequence"]
    if each == 1:
        return 0
    frames, rows, columns = latent_size(config.vae, cell.num_frames, *SIZES[cell.size])
    places = math.ceil(rows / config.stdit3.patch_size[1]) * math.ceil(columns / config.stdit3.patch_size[2])
    tokens = math.ceil(frames / each) * each * math.ceil(places / each)
    return 2 * config.stdit3.depth * (2 // axes["guidance"]) * tokens * config.stdit3.hidden_size * HALF_BYTES


def estimate(cell: Cell, outcome: Mapping[str, Any]) -> dict[str, float]:
    """Returns the seconds of an evaluation that data sheets allow at best: computing or memory, and exchanges."""
    busy = outcome["estimate"]["seconds"]
    exchanged = sum(one["bytes"] / seconds_rate(cell, kind) for kind, one in outcome["collectives"].items())
    return {"computing_s": busy, "exchanging_s": exchanged, "all_s": busy + exchanged}


def seconds_rate(cell: Cell, kind: str) -> float:
    """Returns the bytes a second that a device brings to a collective.

    H100: NVLink within a host, the slower network where a group has several.  v5e: half of the devices of a group of a x b
    send half of what they have over the a links of its middle, so an all-to-all takes b times as long as the links of one chip
    would.  What devices keep for themselves does not travel.  A gathering brings its part to all others.
    """
    chip, topology = cell.target.split(":")
    sides = [int(number) for number in topology.split("x")]
    group = _axes(cell)["sequence"] if kind == "all-to-all" else math.prod(sides)
    travels = group - 1 if kind == "all-gather" else (group - 1) / group
    if chip == "h100":
        return (NVLINK if group <= GPUS_OF_A_HOST else NETWORK) / max(travels, 1e-9)
    longer = max(sides[1], group // sides[1]) if group >= sides[1] else group
    return V5E / longer / max(travels, 1e-9)


def _axes(cell: Cell) -> Mapping[str, int]:
    return parse_axes("data=1" if cell.mesh == ONE else cell.mesh)


def page_table() -> str:
    """Returns the results as the tables of docs/devices.md: memory and traffic, then the estimate of scaling."""
    rows = {Cell(**row["cell"]): row for row in json.loads(RESULTS.read_text())["rows"] if row["outcome"] is not None}
    lines = ["### One guided evaluation on a mesh", "", *_header(_MEMORY)]
    lines += [f"| {' | '.join(_memory(cell, rows[cell]))} |" for cell in GOALS if cell in rows]
    lines += ["", "### Scaling, an estimate", "", *_header(_SCALING)]
    for meshes in SCALING.values():
        ladder = [rows[cell] for target, mesh in meshes if (cell := Cell(target, mesh, "720p", 51)) in rows]
        alone = rows.get(Cell(*meshes[0], "720p", 51))
        lines += [f"| {' | '.join(_scaled(row, alone))} |" for row in ladder if alone is not None]
    return "\n".join([*lines, ""])


_MEMORY = ("devices", "mesh", "clip", "weights", "arguments GB", "temporaries GB", "peak GB", "exchanged GB", "formula GB")
_SCALING = (
    "clip",
    "devices of a replica",
    "mesh",
    "peak GB",
    "computing or memory ms",
    "exchanging ms",
    "together ms",
    "of one device's time",
    "of perfect scaling",
)


def _header(columns: Sequence[str]) -> list[str]:
    return [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]


def _memory(cell: Cell, row: Mapping[str, Any]) -> list[str]:
    outcome, target = row["outcome"], parse_target(cell.target)
    devices = f"{target.num_devices} {CHIPS[target.chip_name].title} ({cell.target})"
    sizes = [f"{outcome[name] / 1e9:.2f}" for name in ("argument_bytes", "temporary_bytes", "peak_bytes")]
    exchanged = outcome["collectives"].get("all-to-all", {"bytes": 0})["bytes"]
    traffic = [f"{number / 1e9:.3f}" for number in (exchanged, row["formula_bytes"])]
    return [devices, cell.mesh, f"{cell.size}, {cell.num_frames} frames", cell.weights, *sizes, *traffic]


def _scaled(row: Mapping[str, Any], alone: Mapping[str, Any]) -> list[str]:
    cell = Cell(**row["cell"])
    target = parse_target(cell.target)
    count = 1 if cell.mesh == ONE else target.num_devices
    head = [f"{cell.size}, {cell.num_frames} frames", f"{count} {CHIPS[target.chip_name].title}", cell.mesh]
    times = row["estimate"]
    parts = [f"{1e3 * times[name]:,.{0 if times[name] >= 0.1 else 1}f}" for name in ("computing_s", "exchanging_s", "all_s")]
    share = times["all_s"] / alone["estimate"]["all_s"]
    return [*head, f"{row['outcome']['peak_bytes'] / 1e9:.2f}", *parts, f"{share:.3f}", f"{1 / share / count:.0%}"]


if __name__ == "__main__":
    main()
