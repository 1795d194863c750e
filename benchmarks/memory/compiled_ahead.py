"""Memory of an evaluation of STDiT3-XL/2 on TPUs and on an H100, as their compilers say, without any of them.

Command:  python -m benchmarks.memory.compiled_ahead [--json FILE]
Needs:    no accelerator and no weights; libtpu, and JAX's CUDA plugin in an environment of its own, whose interpreters
          SORA_JAX_TPU_PYTHON and SORA_JAX_CUDA_PYTHON name (docs/devices.md).  10 to 200 seconds of the processor for each of
          the cells, an hour or two in all.  Cells that the file holds are not compiled again: a run that was
          stopped goes on.
Expect:   dense attention at 720p is refused by one TPU v5e, chunked attention fits.
Rival:    dense attention against chunks of 256 queries, on every chip.

Nothing is measured: rows are the compiler's account of memory, operations counted from the traced program, bytes counted from
the compiled text, and the data sheets' least time for both.  An evaluation is a scan over the 28 pairs of blocks; the sampler
has them written out.
"""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks._support.cells import complete, results_path
from sora_jax.planning.ahead import AheadError, compile_ahead
from sora_jax.planning.request import Request
from sora_jax.planning.targets import CHIPS

COMMAND = "python -m benchmarks.memory.compiled_ahead"
RESULTS = Path(__file__).parents[1] / "results" / "compiled_ahead.json"
MODEL = "open-sora-1.2"
SIZES = {"256p": (256, 256), "480p": (480, 854), "720p": (720, 1280)}
TARGETS = ("h100", "v5e:4x4", "v6e:2x2", "v5p:2x2x1")
MORE = ("h100", "v5e:4x4")  # also in float32, and with 204 frames
FORMS = ("dense", "chunked")


class Cell(NamedTuple):
    """One program for one chip."""

    target: str
    program: str
    size: str
    num_frames: int
    dtype: str
    attention: str


def cells() -> Iterator[Cell]:
    """Yields what is compiled, the most telling first."""
    for target in TARGETS:
        for size in SIZES:
            yield from (Cell(target, "evaluation", size, 51, "bfloat16", form) for form in FORMS)
    yield from (Cell("h100", "evaluation", size, 51, "bfloat16", "auto") for size in ("480p", "720p"))  # cuDNN
    for target in MORE:
        for size in SIZES:
            yield from (Cell(target, "evaluation", size, 51, "float32", form) for form in FORMS)
            yield from (Cell(target, "evaluation", size, 204, "bfloat16", form) for form in FORMS)
    for target in TARGETS:
        yield Cell(target, "text", "480p", 51, "bfloat16", "auto")
        yield from (Cell(target, "decode", size, 51, "bfloat16", "auto") for size in ("480p", "720p"))
    for target in TARGETS:
        yield Cell(target, "sampler", "480p", 51, "bfloat16", "chunked")


def main() -> None:
    """Compiles the cells that are missing, and writes each as it comes."""
    complete(results_path(__doc__, RESULTS), list(cells()), compiled, COMMAND)


def compiled(cell: Cell) -> dict[str, Any]:
    """Returns the row of a cell: the compiler's account, its refusal, or the error that ended it."""
    height, width = SIZES[cell.size]
    request = Request(
        model=MODEL,
        target=cell.target,
        options={"height": height, "width": width, "num_frames": cell.num_frames, "dtype": cell.dtype},
        attention=cell.attention,
        programs=(cell.program,),
    )
    try:
        (outcome,) = compile_ahead(request)
    except AheadError as error:
        return {"cell": cell._asdict(), "error": str(error), "outcome": None}
    return {"cell": cell._asdict(), "error": None, "outcome": outcome.fields(cell.dtype)}


def page_table() -> str:
    """Returns the results as the tables of docs/devices.md: evaluations by chip, then whole programs."""
    rows = json.loads(RESULTS.read_text())["rows"]
    done = [(Cell(**row["cell"]), row["outcome"]) for row in rows if row["outcome"] is not None]
    parts = [
        ("### One guided evaluation", [row for row in done if row[0].program == "evaluation"]),
        ("### Other programs", [row for row in done if row[0].program != "evaluation"]),
    ]
    lines: list[str] = []
    for heading, chosen in parts:
        if not chosen:
            continue
        lines += [heading, "", f"| {' | '.join(_COLUMNS)} |", f"|{'---|' * len(_COLUMNS)}"]
        lines += [f"| {' | '.join(_cells(cell, outcome))} |" for cell, outcome in chosen]
        lines += [""]
    return "\n".join(lines)


_COLUMNS = (
    "compiled for one",
    "program",
    "dtype",
    "attention",
    "arguments GB",
    "temporaries GB",
    "peak GB",
    "TFLOP",
    "GB moved",
    "at best s (estimate)",
    "compiled in CPU s",
)


def _cells(cell: Cell, outcome: Mapping[str, Any]) -> list[str]:
    """Returns the texts of one row."""
    chip = CHIPS[cell.target.partition(":")[0]].title
    what = cell.program if cell.program == "text" else f"{cell.program}, {cell.size}, {cell.num_frames} frames"
    head = [chip, what, cell.dtype, cell.attention]
    work = f"{outcome['operations'] / 1e12:.3g}"
    compile_s = f"{outcome['compile_cpu_s']:.0f}"
    if outcome["refused"]:
        needed = re.search(r"\(([\d.]+[MGT])\)|([\d.]+[MGT]) exceeds", outcome["refused"])
        short = f"**refused**: needs {(needed[1] or needed[2]) if needed else 'more'}"
        return [*head, "", "", short, work, "", "", compile_s]
    peak = f"{outcome['peak_bytes'] / 1e9:.2f}"
    memory = [f"{outcome[name] / 1e9:.2f}" for name in ("argument_bytes", "temporary_bytes")]
    fits = peak if outcome["fits"] else f"**{peak}: does not fit**"
    estimate = outcome["estimate"]
    best = f"{estimate['seconds']:.2g} ({estimate['bound']})"
    return [*head, *memory, fits, work, f"{outcome['moved_bytes'] / 1e9:,.0f}", best, compile_s]


if __name__ == "__main__":
    main()
